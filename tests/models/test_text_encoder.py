import json
import subprocess
import sys

import pytest

from imitate_ds.models.huggingface_encoder import look_up_shape
from imitate_ds.models.text_encoder import load_text_encoder
from imitate_ds.models.text_encoder_folder import DESCRIPTION


@pytest.mark.parametrize("read", [load_text_encoder, look_up_shape])
def test_a_folder_of_another_kind_is_refused(tmp_path, read):
    (tmp_path / DESCRIPTION).write_text(json.dumps({"kind": "word2vec"}))
    with pytest.raises(ValueError, match="kind = 'word2vec': must be 'lsa' or 'huggingface'; copy the folder again"):
        read(str(tmp_path))
    (tmp_path / DESCRIPTION).write_text(json.dumps({"kind": "huggingface", "max_tokens": "many"}))
    with pytest.raises(ValueError, match="max_tokens = 'many': must be a whole number"):
        read(str(tmp_path))


def test_pre_training_imports_no_encoder_until_one_is_asked_for():
    """Every rank would pay for it: two seconds of transformers and scikit-learn."""
    program = (
        "import sys, imitate_ds.pretrain; print(sorted({'transformers', 'sklearn', 'tokenizers'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.splitlines()[-1] == "[]"
