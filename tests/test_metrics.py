"""Figures against scikit-learn, against counting by hand, and at their edges."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, roc_auc_score

from imitate_ds.metrics import (
    accuracy_statistic,
    auroc,
    auroc_statistic,
    average_precision_statistic,
    blind_recall_at_k,
    bootstrap_by_patient,
    bootstrap_p,
    bootstrap_values,
    chance_recall_at_k,
    f1_statistic,
    figure,
    macro_auroc_statistic,
    macro_statistic,
    mean_statistic,
    positive_ranks,
    precision_at_k,
    recall_at_k,
    roc_curve,
)


def _groups(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


def test_recall_counts_wrong_candidates_before_the_best_right_one():
    similarity = torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.9, 0.5, 0.1]])
    ranks = positive_ranks(similarity, _groups(0, 1, 2), _groups(0, 1, 2))
    assert ranks.tolist() == [0, 1, 2]
    assert recall_at_k(similarity, _groups(0, 1, 2), _groups(0, 1, 2), k=1) == pytest.approx(1 / 3)
    assert recall_at_k(similarity, _groups(0, 1, 2), _groups(0, 1, 2), k=3) == 1


def test_a_duplicate_text_is_as_right_as_the_own_one():
    similarity = torch.tensor([[0.2, 0.9, 0.5]])
    assert positive_ranks(similarity, _groups(7), _groups(7, 7, 3)).item() == 0
    assert positive_ranks(similarity, _groups(7), _groups(7, 8, 3)).item() == 2


def test_ties_count_against_the_query():
    similarity = torch.ones(4, 4)
    groups = torch.arange(4)
    assert positive_ranks(similarity, groups, groups).tolist() == [3, 3, 3, 3]
    # float noise is a tie as well
    assert positive_ranks(torch.tensor([[0.5, 0.5 - 1e-8]]), _groups(0), _groups(0, 1)).item() == 1


def test_ties_by_index_are_those_of_a_stable_sort():
    groups = torch.arange(4)
    assert positive_ranks(torch.ones(4, 4), groups, groups, ties="index").tolist() == [0, 1, 2, 3]
    noise = torch.tensor([[0.5, 0.5 - 1e-8, 0.5 + 1e-8, 0.9]])
    assert positive_ranks(noise, _groups(1), groups, ties="index").item() == 2
    similarity = torch.randint(0, 4, (30, 30), generator=torch.Generator().manual_seed(0)) / 4
    order = similarity.argsort(dim=1, descending=True, stable=True)
    wanted = (order == torch.arange(30)[:, None]).int().argmax(dim=1)
    ranks = positive_ranks(similarity, torch.arange(30), torch.arange(30), ties="index")
    assert ranks.tolist() == wanted.tolist()


def test_a_query_without_right_candidate_is_refused():
    with pytest.raises(ValueError, match="every query must have at least one right candidate"):
        positive_ranks(torch.ones(1, 2), _groups(5), _groups(0, 1))


@pytest.mark.parametrize("k", [1, 3])
def test_chance_recall_is_what_random_orders_give(k):
    right, candidates = np.array([1, 2, 5]), 8
    rng = np.random.default_rng(0)
    hits = [[rng.permutation(candidates)[:k].min() < r for r in right] for _ in range(20_000)]
    assert chance_recall_at_k(right, candidates, k) == pytest.approx(np.mean(hits), abs=0.01)
    assert chance_recall_at_k(right, candidates, 100) == 1


def test_blind_recall_is_the_share_of_the_commonest_texts():
    groups = np.array([0, 0, 0, 1, 1, 2, 3, 4])
    assert blind_recall_at_k(groups, 1) == 3 / 8
    assert blind_recall_at_k(groups, 2) == 5 / 8


def test_precision_by_class():
    labels = torch.tensor([[1, 0], [1, 1], [0, 1]]).bool()
    similarity = torch.tensor([[0.9, 0.8, 0.1], [0.9, 0.1, 0.8], [0.2, 0.3, 0.1]])
    shares = precision_at_k(similarity, labels, labels, k=2)
    np.testing.assert_allclose(shares, [[1, np.nan], [0.5, 0.5], [np.nan, 0.5]])
    with pytest.raises(ValueError, match="k = 4"):
        precision_at_k(similarity, labels, labels, k=4)


def test_equal_candidates_stand_in_index_order():
    labels = torch.tensor([[1], [0], [1], [0]]).bool()
    noise = 1e-9 * torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert precision_at_k(0.5 + noise, labels, labels, k=1)[:, 0].nan_to_num().tolist() == [1, 0, 1, 0]


def test_auroc_equals_scikit_learn_with_ties_and_weights():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(-1, 2, 400), rng.normal(size=400).round(1)
    weights = rng.integers(0, 4, 400)
    known = labels >= 0
    assert auroc(labels, scores) == pytest.approx(roc_auc_score(labels[known], scores[known]), abs=1e-12)
    weighted = roc_auc_score(labels[known], scores[known], sample_weight=weights[known])
    assert auroc_statistic(labels, scores)(weights) == pytest.approx(weighted, abs=1e-12)


@pytest.mark.parametrize("labels", [[1, 1, 1], [0, 0, -1], [-1, -1, -1]])
def test_auroc_of_one_class_is_not_defined(labels):
    assert math.isnan(auroc(np.array(labels), np.array([0.1, 0.2, 0.3])))


@pytest.mark.parametrize("decimals", [1, 8])
@pytest.mark.parametrize("seed", range(5))
def test_average_precision_equals_scikit_learn_with_ties_and_weights(seed, decimals):
    rng = np.random.default_rng(seed)
    labels, scores = rng.integers(-1, 2, 300), rng.normal(size=300).round(decimals)
    known = labels >= 0
    for weights in (np.ones(300), rng.integers(0, 4, 300), rng.random(300)):
        wanted = average_precision_score(labels[known], scores[known], sample_weight=weights[known])
        assert average_precision_statistic(labels, scores)(weights) == pytest.approx(wanted, abs=1e-12)


def test_average_precision_of_constant_scores_is_the_prevalence():
    assert average_precision_statistic(np.array([1, 0, 0, 0]), np.zeros(4))(np.ones(4)) == 0.25


def test_f1_and_accuracy_equal_scikit_learn_with_weights():
    rng = np.random.default_rng(0)
    labels, predicted, weights = rng.integers(-1, 2, 200), rng.random(200) > 0.4, rng.integers(0, 4, 200)
    known = labels >= 0
    given = {"y_true": labels[known], "y_pred": predicted[known], "sample_weight": weights[known]}
    assert f1_statistic(labels, predicted)(weights) == pytest.approx(f1_score(**given), abs=1e-12)
    assert accuracy_statistic(labels, predicted)(weights) == pytest.approx(accuracy_score(**given), abs=1e-12)


@pytest.mark.parametrize("kind", [auroc_statistic, average_precision_statistic, f1_statistic, accuracy_statistic])
@pytest.mark.parametrize("labels", [[1, 1, 1], [0, 0, -1], [-1, -1, -1]])
def test_a_label_with_one_value_is_not_defined_by_any_measure(kind, labels):
    values = np.array([True, False, True])
    assert math.isnan(kind(np.array(labels), values)(np.ones(3)))
    assert math.isnan(kind(np.array([1, 0, -1]), values)(np.array([1, 0, 5]))), "one value has all the weight"
    assert math.isnan(macro_statistic(kind, np.array(labels)[:, None], values[:, None])(np.ones(3))[-1])


def test_macro_auroc_leaves_out_what_is_not_defined():
    labels = np.array([[0, 1, -1], [1, 1, -1], [0, 1, -1], [1, 1, -1]])
    scores = np.tile(np.array([[0.1], [0.4], [0.2], [0.15]]), (1, 3))
    values = macro_auroc_statistic(labels, scores)(np.ones(4))
    np.testing.assert_allclose(values, [0.75, np.nan, np.nan, 0.75])


def test_roc_curve_has_the_area_it_draws():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 5000)
    scores = rng.normal(size=5000) + labels
    false_positives, true_positives = roc_curve(labels, scores, points=1001)
    assert (false_positives[0], false_positives[-1], true_positives[-1]) == (0, 1, 1)
    assert np.trapezoid(true_positives, false_positives) == pytest.approx(auroc(labels, scores), abs=2e-3)


def test_roc_curve_of_constant_scores_is_one_step():
    false_positives, true_positives = roc_curve(np.array([0, 1, 1]), np.zeros(3), points=3)
    assert (false_positives, true_positives) == ([0, 0.5, 1], [0, 0, 1])


def test_weighted_mean_skips_nan():
    values = np.array([[1.0, np.nan], [3.0, np.nan], [np.nan, np.nan]])
    np.testing.assert_allclose(mean_statistic(values)(np.array([1, 3, 9])), [2.5, np.nan])


def test_bootstrap_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        values = rng.normal(size=80)
        low, high = bootstrap_by_patient(mean_statistic(values), np.arange(80), draws=300, seed=seed)
        covered += int(low[0] <= 0 <= high[0])
    assert 85 <= covered <= 99


def test_p_is_small_as_often_as_it_says():
    rng = np.random.default_rng(0)
    small = 0
    for seed in range(200):
        differences = bootstrap_values(mean_statistic(rng.normal(size=80)), np.arange(80), draws=199, seed=seed)
        small += int(bootstrap_p(differences)[0] <= 0.1)
    assert 10 <= small <= 32


def test_p_is_never_nought_and_counts_what_is_defined():
    draws = np.array([[1.0, -1, 0, np.nan, 1], [2, 1, 0, np.nan, np.nan], [3, 1, 0, np.nan, np.nan]])
    np.testing.assert_allclose(bootstrap_p(draws), [2 / 4, 4 / 4, 1, np.nan, 2 / 2])


def test_samples_of_one_patient_go_together():
    rng = np.random.default_rng(0)
    by_patient = np.repeat(rng.normal(size=40), 25)  # 25 equal samples of each patient: no more sure than one
    wide = bootstrap_by_patient(mean_statistic(by_patient), np.repeat(np.arange(40), 25))
    narrow = bootstrap_by_patient(mean_statistic(by_patient), np.arange(1000))
    assert (wide[1] - wide[0]) > 3 * (narrow[1] - narrow[0])


def test_bootstrap_is_seeded_keeps_shape_and_survives_undefined_figures():
    labels = np.array([[1, 1], [0, 1], [0, 1], [0, 1]])
    statistic = macro_auroc_statistic(labels, np.arange(8.0).reshape(4, 2))
    first = bootstrap_by_patient(statistic, ["a", "b", "c", "d"], seed=3)
    np.testing.assert_array_equal(first, bootstrap_by_patient(statistic, ["a", "b", "c", "d"], seed=3))
    assert first[0].shape == (3,)
    assert np.isnan(first[0][1]), "a label that is never defined has no interval"
    assert np.isfinite(first[0][0]), "draws without the only positive are left out"
    with pytest.raises(ValueError, match="patients"):
        bootstrap_by_patient(statistic, [])


def test_a_figure_is_json_without_nan():
    assert figure(float("nan"), n=3) == {"value": None, "low": None, "high": None, "n": 3}
    assert figure(0.5, 0.25, 0.75, n=3, std=0.1)["std"] == 0.1
