"""Retrieval of one level, with embeddings whose right answers are known."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from imitate_ds.evaluation.retrieval import Pairs, balanced_places, score_pairs


def _pairs(
    images: torch.Tensor, texts: torch.Tensor, groups: list[int], labels: list[list[int]] | None = None
) -> Pairs:
    n = len(groups)
    table = np.array(labels) if labels else np.zeros((n, 0))
    return Pairs(normalize(images), normalize(texts), np.array(groups), np.arange(n), table)


def test_duplicates_are_one_candidate_and_one_query():
    rows = torch.eye(3)[[0, 0, 1, 2]]
    figures, _ = score_pairs(_pairs(rows, rows, [0, 0, 1, 2]))
    assert figures["image_to_text_R@1"]["value"] == 1
    assert figures["image_to_text_R@1"]["n"] == 4
    assert figures["text_to_image_R@1"]["value"] == 1
    assert figures["text_to_image_R@1"]["n"] == 3
    assert figures["image_to_text_chance_R@1"]["value"] == pytest.approx(1 / 3, abs=1e-6)
    assert figures["image_to_text_blind_R@1"]["value"] == 0.5
    assert figures["text_to_image_chance_R@1"]["value"] == pytest.approx((0.5 + 0.25 + 0.25) / 3, abs=1e-6)


def test_the_exact_pair_only_is_capped_by_duplicates():
    rows = torch.eye(3)[[0, 0, 1, 2]]
    figures, _ = score_pairs(_pairs(rows, rows, [0, 1, 2, 3]))
    assert figures["image_to_text_R@1"]["value"] == 0.5
    assert figures["image_to_text_R@5"]["value"] == 1


def test_ties_by_index_only_where_asked():
    pairs = _pairs(torch.ones(4, 2), torch.eye(4)[:, :2] * 0 + 1, [0, 1, 2, 3])
    assert score_pairs(pairs)[0]["image_to_text_R@1"]["value"] == 0
    assert score_pairs(pairs, ties="index")[0]["image_to_text_R@1"]["value"] == 0.25


def test_random_embeddings_are_at_chance():
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(600, 16, generator=generator) for _ in range(2))
    labels = np.random.default_rng(0).integers(0, 2, (600, 3)).tolist()
    figures, curves = score_pairs(_pairs(images, texts, list(range(600)), labels))
    for name in ("image_to_text_R@10", "text_to_image_R@10", "image_to_text_P@10", "text_to_image_P@10"):
        chance = figures[name.replace("_R@", "_chance_R@").replace("_P@", "_chance_P@")]["value"]
        low, high = figures[name]["low"], figures[name]["high"]
        assert low - 0.01 <= chance <= high + 0.01, name
    assert curves["image_to_text"]["k"][-1] == 100
    assert curves["image_to_text"]["recall"] == sorted(curves["image_to_text"]["recall"])


def test_value_lies_in_its_interval_and_intervals_are_of_patients():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(200, 8, generator=generator)
    pairs = _pairs(images, images + torch.randn(200, 8, generator=generator), [i // 2 for i in range(200)])
    figures, _ = score_pairs(pairs)
    one_patient, _ = score_pairs(pairs._replace(patients=np.zeros(200, dtype=int)))
    for name, value in figures.items():
        if value["low"] is not None:
            assert value["low"] < value["value"] < value["high"], name
            assert one_patient[name]["low"] == one_patient[name]["high"], "one patient: every draw is the same"


def test_one_report_for_every_radiograph_is_the_blind_precision():
    labels = [[1, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0]]
    images, texts = torch.eye(4)[[0, 0, 0, 0]], torch.eye(4)
    figures, _ = score_pairs(_pairs(images, texts, [0, 1, 2, 3], labels))
    assert (
        figures["image_to_text_P@1"]["value"]
        == figures["image_to_text_blind_P@1"]["value"]
        == pytest.approx(2 / 3, abs=1e-6)
    )
    assert figures["image_to_text_chance_P@1"]["value"] == pytest.approx(1 / 3, abs=1e-6)


def test_precision_is_left_out_without_labels_and_beyond_the_candidates():
    rows = torch.eye(4)
    figures, _ = score_pairs(_pairs(rows, rows, [0, 1, 2, 3]))
    assert not any("P@" in name for name in figures)
    figures, _ = score_pairs(_pairs(rows, rows, [0, 1, 2, 3], [[1], [0], [0], [-1]]))
    assert figures["image_to_text_P@1"]["value"] == 1
    assert figures["image_to_text_P@1"]["classes"] == 1
    assert "image_to_text_P@5" not in figures


def test_a_balanced_set_has_as_many_of_each_class_and_of_no_other():
    rng = np.random.default_rng(0)
    labels = rng.integers(-1, 2, (400, 3))
    keys = [f"{number:016x}" for number in rng.permutation(400)]
    places = balanced_places(keys, labels, ("a", "b", "c"), 20)
    present = labels[places] == 1
    assert present.sum(axis=0).tolist() == [20, 20, 20]
    assert (present.sum(axis=1) == 1).all()
    # the same studies however the shards were written
    shuffled = rng.permutation(400)
    again = balanced_places([keys[i] for i in shuffled], labels[shuffled], ("a", "b", "c"), 20)
    assert {keys[i] for i in places} == {keys[i] for i in shuffled[again]}
    first = [key for key, row in sorted(zip(keys, labels == 1, strict=True)) if row.tolist() == [True, False, False]]
    assert set(first[:20]) <= {keys[i] for i in places}


def test_a_class_with_too_few_is_named_with_how_many_there_are():
    labels = np.array([[1, 0], [1, 1], [0, 1], [1, 0], [-1, 1]])
    with pytest.raises(
        ValueError, match="--per-class 3: too few studies have one of the classes and no other: a 2, b 2;"
    ):
        balanced_places(list("abcde"), labels, ("a", "b"), 3)


def test_precision_of_a_balanced_set_names_its_classes():
    labels = [[1, 0], [1, 0], [0, 1], [0, 1]]
    images = torch.eye(4)[[0, 0, 2, 0]]  # the last radiograph finds reports of the other class
    pairs = _pairs(images, torch.eye(4)[[0, 0, 2, 2]], [0, 1, 2, 3], labels)
    figures, _ = score_pairs(pairs._replace(classes=("a", "b")))
    assert figures["image_to_text_P@1"]["by_class"] == {"a": 1.0, "b": 0.5}
    assert figures["image_to_text_P@1"]["value"] == 0.75
    assert figures["image_to_text_chance_P@1"]["value"] == 0.5
    assert "by_class" not in score_pairs(pairs)[0]["image_to_text_P@1"]
