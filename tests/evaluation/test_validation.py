"""Validation during training (on two ranks against one: tests/test_pretrain.py)."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from imitate_ds.batch import Batch, Features
from imitate_ds.config import ObjectiveConfig
from imitate_ds.evaluation.validation import (
    LOSS_CHUNK,
    first_of_each,
    image_text_loss,
    key_numbers,
    retrieval_rows,
)
from imitate_ds.objective import imitate_loss


def test_repeated_samples_are_dropped_by_key():
    keys = ["ffffffffffffffff", "0000000000000001", "ffffffffffffffff", "00000000000000ab"]
    assert sorted(first_of_each(key_numbers(keys)).tolist()) == [0, 1, 3]


def test_a_model_without_findings_branch_has_one_level():
    rows, has = torch.randn(3, 4), torch.ones(3, dtype=torch.bool)
    features = Features(rows[:, None], None, None, rows, rows)
    batch = Batch(["a", "b", "c"], torch.zeros(3, 1, 1, 8, 8), rows, rows, has, has, 0)
    assert {name.split("/")[0] for name in retrieval_rows(features, batch)} == {"impression"}


def _split(studies, *, seed=0):
    """A batch of single views, and features of it, without a findings section in every fifth."""
    numbers = torch.Generator().manual_seed(seed)
    image, fine, text, fine_text = (normalize(torch.randn(studies, 8, generator=numbers)) for _ in range(4))
    prior, fine_prior = (torch.randn(studies, 16, generator=numbers) for _ in range(2))
    has = torch.ones(studies, dtype=torch.bool)
    has_findings = torch.arange(studies) % 5 > 0
    features = Features(image[:, None], fine[:, None], fine[:, None], text, fine_text)
    return features, Batch([], torch.zeros(studies, 1, 1, 8, 8), fine_prior, prior, has_findings, has, 0)


def _objective(**settings):
    weights = {"image_impression": 1.5, "views_impression": 0.0, "views_findings": 0.0}
    return ObjectiveConfig.model_validate({"weights": weights, "negatives": "local", **settings})


def test_the_loss_of_one_chunk_is_the_objective_without_its_views():
    features, batch = _split(100)
    wanted = imitate_loss(features, batch, _objective())
    assert image_text_loss(retrieval_rows(features, batch), _objective(), 0.07)["loss"] == pytest.approx(
        float(wanted.total), rel=1e-5
    )


def test_the_loss_is_a_mean_over_chunks_whatever_is_left_over():
    features, batch = _split(2 * LOSS_CHUNK + 50)
    rows = retrieval_rows(features, batch)
    parts = [{name: rows[name][start : start + LOSS_CHUNK] for name in rows} for start in (0, LOSS_CHUNK)]
    each = [image_text_loss(part, _objective(), 0.07)["loss"] for part in parts]
    assert image_text_loss(rows, _objective(), 0.07)["loss"] == pytest.approx(sum(each) / 2)
    assert each[0] != each[1]


def test_the_loss_of_an_encoder_that_says_nothing_is_that_of_chance():
    features, batch = _split(LOSS_CHUNK)
    blind = features._replace(image_impression=features.image_impression[:1].expand(LOSS_CHUNK, 1, 8))
    plain = _objective(prior_strength=0.0, weights={"image_findings": 0.0, "image_impression": 1.0})
    by_text = image_text_loss(retrieval_rows(blind, batch), plain, 10.0)["loss"]
    assert by_text == pytest.approx(2 * math.log(LOSS_CHUNK), rel=0.01)
    nothing = _objective(weights={"image_findings": 0.0, "image_impression": 0.0, "views_impression": 1.0})
    assert image_text_loss(retrieval_rows(features, batch), nothing, 0.07) == {}
