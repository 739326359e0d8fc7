import json

import pytest

from imitate_ds.models.text_encoder import load_text_encoder
from imitate_ds.models.text_encoder_folder import DESCRIPTION


def test_a_folder_of_another_kind_is_refused(tmp_path):
    (tmp_path / DESCRIPTION).write_text(json.dumps({"kind": "word2vec"}))
    with pytest.raises(ValueError, match="kind = 'word2vec': must be 'lsa' or 'huggingface'"):
        load_text_encoder(str(tmp_path))
