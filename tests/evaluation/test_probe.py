"""The linear probe on features whose labels are known to be linear in them."""

import numpy as np
import pytest

from imitate_ds.evaluation.probe import FALLBACK, fit_probe
from imitate_ds.metrics import auroc


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(900, 12)).astype(np.float32) * 50 + 7  # scaling is the probe's own business
    labels = (features[:, :2] + rng.normal(size=(900, 2)) * 20 > 7).astype(int)
    return features, labels, np.arange(900) // 3


def test_finds_what_is_linear_and_more_labels_do_not_hurt(data):
    features, labels, patients = data
    few, many = (
        fit_probe(features[:600], labels[:600], patients[:600], features[600:], share=share, seed=0)
        for share in (0.05, 1.0)
    )
    figures = [[auroc(labels[600:, i], fit.scores[:, i]) for i in range(2)] for fit in (few, many)]
    assert min(figures[1]) > 0.95
    assert np.mean(figures[1]) >= np.mean(figures[0]) - 0.01
    assert (few.samples, many.samples) == (30, 600), "10 of 200 patients, with all three samples each"


def test_uncertain_labels_are_left_out(data):
    features, labels, patients = data
    hidden = labels.copy()
    hidden[::2] = -1
    wrong = np.where(hidden == -1, 1 - labels, hidden)  # what -1 would do if it were read as a value
    good = fit_probe(features[:600], hidden[:600], patients[:600], features[600:], share=1.0, seed=0)
    bad = fit_probe(features[:600], wrong[:600], patients[:600], features[600:], share=1.0, seed=0)
    assert auroc(labels[600:, 0], good.scores[:, 0]) > 0.95 > auroc(labels[600:, 0], bad.scores[:, 0])


def test_a_label_with_one_value_is_scored_by_a_constant_and_named(data):
    features, labels, patients = data
    one_value = labels.copy()
    one_value[:, 1] = 0
    fit = fit_probe(features[:600], one_value[:600], patients[:600], features[600:], share=1.0, seed=0)
    assert fit.untrained == [1]
    assert auroc(labels[600:, 1], fit.scores[:, 1]) == 0.5


def test_too_few_patients_to_choose_take_the_fallback(data):
    features, labels, patients = data
    same = np.zeros_like(labels)
    fit = fit_probe(features, same, patients, features, share=0.01, seed=0)
    assert fit.strength == FALLBACK
    assert not fit.scores.any()


def test_draws_are_seeded(data):
    features, labels, patients = data
    fits = [fit_probe(features, labels, patients, features[:9], share=0.1, seed=seed) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(fits[0].scores, fits[1].scores)
    assert not np.array_equal(fits[0].scores, fits[2].scores)
