"""Validation during training (on two ranks against one: tests/test_pretrain.py)."""

import torch

from imitate_ds.batch import Batch, Features
from imitate_ds.evaluation.validation import first_of_each, key_numbers, retrieval_rows


def test_repeated_samples_are_dropped_by_key():
    keys = ["ffffffffffffffff", "0000000000000001", "ffffffffffffffff", "00000000000000ab"]
    assert sorted(first_of_each(key_numbers(keys)).tolist()) == [0, 1, 3]


def test_a_model_without_findings_branch_has_one_level():
    rows, has = torch.randn(3, 4), torch.ones(3, dtype=torch.bool)
    features = Features(rows[:, None], None, None, rows, rows)
    batch = Batch(["a", "b", "c"], torch.zeros(3, 1, 1, 8, 8), rows, rows, has, has, 0)
    assert {name.split("/")[0] for name in retrieval_rows(features, batch)} == {"impression"}
