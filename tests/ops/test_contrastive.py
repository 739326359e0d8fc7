"""The door: what it lets in, and what it says of the rest."""

import pytest
import torch

from imitate_ds.ops.contrastive import clinical_contrastive_loss

ROWS = torch.eye(4)


def test_auto_is_dense_at_this_size():
    auto, dense = (clinical_contrastive_loss(ROWS, ROWS, temperature=0.1, backend=name) for name in ("auto", "dense"))
    assert torch.equal(auto, dense)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": torch.eye(3)}, r"found \[4, 4\] and \[3, 3\]"),
        ({"query": ROWS[0], "keys": ROWS[0]}, r"must both be \[N, D\]"),
        ({"query": ROWS[:0], "keys": ROWS[:0]}, "at least one row"),
        ({"prior": torch.eye(5)}, r"prior: must be \[N, E\] with N = 4, found \[5, 5\]"),
        ({"valid": torch.ones(4)}, r"valid: must be bool \[N\] with N = 4, found torch.float32"),
        ({"valid": torch.ones(3, dtype=torch.bool)}, r"found torch.bool \[3\]"),
        ({"temperature": 0.0}, r"temperature = 0.0: must be greater than 0"),
        ({"temperature": float("nan")}, r"must be greater than 0"),
        ({"temperature": torch.ones(2)}, r"must hold one number, found shape \[2\]"),
        ({"prior_strength": -0.1}, r"prior_strength = -0.1: must be at least 0"),
        ({"target_norm": "rows"}, r"target_norm = 'rows': must be one of none, row, ref"),
        ({"backend": "cuda"}, r"backend = 'cuda': must be one of auto, dense"),
    ],
)
def test_bad_input_is_refused_by_name(change, message):
    arguments = {"query": ROWS, "keys": ROWS, "temperature": 0.1} | change
    with pytest.raises(ValueError, match=message):
        clinical_contrastive_loss(**arguments)
