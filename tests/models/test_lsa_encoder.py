import shutil

import pytest
import torch

from imitate_ds.models.lsa_encoder import LsaEncoder
from imitate_ds.models.text_encoder import load_text_encoder
from imitate_ds.models.text_encoder_folder import DESCRIPTION

REPORTS = [
    "The lungs are clear. No pleural effusion.",
    "Small left pleural effusion.",
    "Large right pleural effusion with atelectasis.",
    "Cardiomegaly. No pneumothorax.",
    "The heart is enlarged.",
    "No acute cardiopulmonary abnormality.",
]


def test_lsa_rows_are_tf_idf_on_its_leading_directions():
    encoder = LsaEncoder.fit(REPORTS, dim=4)
    rows = encoder.encode([*REPORTS, "", "nan", "zzz qqq"])
    assert rows.shape == (9, 4)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows.norm(dim=1), torch.tensor([1.0] * 6 + [0.0] * 3))
    likeness = rows[:6] @ rows[:6].T
    assert likeness[1, 2] > likeness[1, 3]  # two effusions are more alike than an effusion and a large heart


def test_lsa_is_deterministic_and_narrows_to_what_the_texts_span():
    first, second = LsaEncoder.fit(REPORTS, dim=256), LsaEncoder.fit(REPORTS, dim=256)
    assert first.width == len(REPORTS)
    assert first.fingerprint == second.fingerprint
    assert torch.equal(first.encode(REPORTS), second.encode(REPORTS))
    assert LsaEncoder.fit(REPORTS, dim=3).fingerprint != first.fingerprint
    assert LsaEncoder.fit(REPORTS[:5], dim=3).fingerprint != LsaEncoder.fit(REPORTS, dim=3).fingerprint


def test_lsa_passes_over_blanks_and_case_but_not_over_no():
    encoder = LsaEncoder.fit([*REPORTS, "XXXX XXXX-year-old ___ with XXXX effusion."], dim=7)
    with_blanks, without = encoder.encode(["XXXX EFFUSION ___ seen", "effusion seen"])
    torch.testing.assert_close(with_blanks, without)
    assert not torch.allclose(*encoder.encode(["effusion", "no effusion"]))


def test_lsa_saved_and_loaded_is_the_same_encoder(tmp_path):
    encoder = LsaEncoder.fit(REPORTS, dim=4)
    encoder.save(tmp_path / "encoder")
    again = load_text_encoder(str(tmp_path / "encoder"))
    assert again.fingerprint == encoder.fingerprint
    assert torch.equal(again.encode(REPORTS), encoder.encode(REPORTS))
    assert {path.suffix for path in (tmp_path / "encoder").iterdir()} == {".json", ".safetensors"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("terms.json", None),
        ("terms.json", "["),
        ("terms.json", '["effusion"]'),
        ("lsa.safetensors", None),
        ("lsa.safetensors", "torn"),
        (DESCRIPTION, '{"kind": "lsa", "fingerprint": "0123456789abcdef"}'),
        (DESCRIPTION, "{"),
        (DESCRIPTION, "[]"),
    ],
)
def test_a_damaged_lsa_folder_says_what_to_do(tmp_path, name, content):
    LsaEncoder.fit(REPORTS, dim=4).save(tmp_path)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{tmp_path}.*run 'imitate-ds shards embed'"):
        load_text_encoder(str(tmp_path))


def test_lsa_files_of_two_encoders_do_not_belong_together(tmp_path):
    LsaEncoder.fit(REPORTS, dim=4).save(tmp_path / "a")
    LsaEncoder.fit(REPORTS, dim=3).save(tmp_path / "b")
    shutil.copy(tmp_path / "b" / "lsa.safetensors", tmp_path / "a")
    with pytest.raises(ValueError, match="files that do not belong together"):
        load_text_encoder(str(tmp_path / "a"))


def test_lsa_refuses_what_it_cannot_be_fitted_on():
    with pytest.raises(ValueError, match="1 different texts to fit on"):
        LsaEncoder.fit(["clear lungs", "clear lungs", "", "nan"])
    with pytest.raises(ValueError, match="dim = 1: must be at least 2"):
        LsaEncoder.fit(REPORTS, dim=1)
    with pytest.raises(ValueError, match="lsa: the texts to fit on hold no words"):
        LsaEncoder.fit(["XXXX", "___ 3"])
    with pytest.raises(ValueError):  # noqa: PT011  (scikit-learn's words)
        LsaEncoder.fit(["effusion", "effusion."])
    with pytest.raises(ValueError, match="is fitted on the training reports; use 'imitate-ds shards embed'"):
        load_text_encoder("lsa")
