"""The phantom: the same study from the same seed, and a picture, report, labels, masks and boxes that agree."""

import json
import pickle
import re
from collections import Counter

import numpy as np
import pytest

from imitate_ds.data.sources import open_source
from imitate_ds.data.sources.phantom import PhantomSource, render_mask, render_radiograph
from imitate_ds.data.sources.phantom_case import LABELS, sample_case

SIZE = 128
MANY = 1500


@pytest.fixture(scope="module")
def source() -> PhantomSource:
    return PhantomSource(studies=MANY, seed=3, size=SIZE)


@pytest.fixture(scope="module")
def studies(source):
    return list(source)


def test_same_seed_same_study_in_any_order(source, studies):
    again = PhantomSource(studies=50, seed=3, size=SIZE).study(41)
    first = studies[41]
    assert (again.findings, again.impression, again.labels, again.extra) == (
        first.findings,
        first.impression,
        first.labels,
        first.extra,
    )
    last_first = render_radiograph(3, 41, SIZE)
    render_radiograph(3, 7, SIZE)
    np.testing.assert_array_equal(last_first, first.radiographs[0].read())


def test_seeds_differ():
    one, other = (PhantomSource(studies=30, seed=seed, size=SIZE) for seed in (0, 1))
    assert [s.labels for s in one] != [s.labels for s in other]
    assert not np.array_equal(render_radiograph(0, 0, SIZE), render_radiograph(1, 0, SIZE))
    assert {s.patient_id for s in one}.isdisjoint(s.patient_id for s in other)


def test_a_study_survives_pickling(studies):
    study = studies[5]
    copy = pickle.loads(pickle.dumps(study))
    np.testing.assert_array_equal(copy.radiographs[0].read(), study.radiographs[0].read())
    for name, read in study.masks.items():
        np.testing.assert_array_equal(copy.masks[name](), read())


@pytest.mark.parametrize("size", [64, 97, 256])
def test_radiographs_and_masks_have_the_size_asked_for(size):
    for number in range(6):
        pixels = render_radiograph(0, number, size)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (size, size)
        assert pixels.std() > 15
        for name in ("lungs", "heart", "lesions"):
            mask = render_mask(0, number, size, name)
            assert mask.dtype == np.uint8
            assert mask.shape == (size, size)
            assert set(np.unique(mask)) <= {0, 255}


def test_it_looks_like_a_chest(studies):
    normal = [study for study in studies if study.labels["normal"]][:40]
    for study in normal:
        pixels, lungs, heart = study.radiographs[0].read(), study.masks["lungs"]() > 0, study.masks["heart"]() > 0
        assert pixels[lungs].mean() < pixels[heart].mean() - 20
        assert 0.15 < lungs.mean() < 0.5
        assert not (lungs & heart).any()
        columns = np.flatnonzero(heart.any(axis=0))
        spread = np.flatnonzero(lungs.any(axis=0))
        assert columns.mean() > spread.mean()  # the heart lies on the patient's left


def test_synthetic_is_said_everywhere(source, studies):
    assert source.synthetic is True
    assert source.name == "phantom"
    assert all(study.extra["synthetic"] is True for study in studies)
    json.dumps([study.extra for study in studies])


def test_labels_are_the_drawn_lesions(studies):
    for number, study in enumerate(studies):
        kinds = {lesion.kind for lesion in sample_case(3, number).lesions}
        assert tuple(study.labels) == LABELS
        assert {name for name, value in study.labels.items() if value} == (kinds or {"normal"})
    prevalence = {name: np.mean([study.labels[name] for study in studies]) for name in LABELS}
    assert 0.33 < prevalence.pop("normal") < 0.43
    assert all(0.07 < share < 0.3 for share in prevalence.values())


def test_reports_name_what_is_there_and_deny_what_is_not(studies):
    words = {
        "cardiomegaly": r"cardiomegaly|enlarge",
        "effusion": r"effusion",
        "pneumothorax": r"pneumothorax",
        "consolidation": r"consolidation",
        "nodule": r"nodule",
        "atelectasis": r"atelectasis",
        "device": r"pacemaker|catheter|line with its tip|leads|tube",
    }
    for study in filter(lambda study: study.findings, studies):
        sentences = study.findings.split(". ")
        positive = [s for s in sentences if not re.match(r"no |there is no |the cardiac silhouette is not", s, re.I)]
        for name, pattern in words.items():
            assert bool(re.search(pattern, ". ".join(positive), re.I)) == bool(study.labels[name]), study.findings


def test_effusions_are_described_on_the_side_where_they_are_drawn(studies):
    seen = Counter()
    for number, study in enumerate(studies):
        drawn = {lesion.side for lesion in sample_case(3, number).lesions if lesion.kind == "effusion"}
        said = " ".join(s for s in study.findings.split(". ") if "effusion" in s and not s.startswith("No "))
        if not said or not drawn:
            continue
        expected = {"right", "left"} if "bilateral" in said else set(re.findall(r"right|left", said.lower()))
        assert drawn == expected
        boxes = [box for box in study.extra["boxes"] if box["label"] == "effusion"]
        middle = {box["x"] + box["width"] / 2 < SIZE / 2 for box in boxes}
        assert middle == {side == "right" for side in drawn}  # the patient's right is on the left of the image
        seen.update(drawn)
    assert min(seen["right"], seen["left"]) > 20


def test_zones_are_drawn_where_they_are_described(studies):
    heights = {zone: [] for zone in ("upper", "mid", "lower")}
    for number, study in enumerate(studies[:400]):
        zones = [lesion.zone for lesion in sample_case(3, number).lesions if lesion.kind == "nodule"]
        boxes = [box for box in study.extra["boxes"] if box["label"] == "nodule"]
        for zone, box in zip(zones, boxes, strict=True):
            heights[zone].append(box["y"] + box["height"] / 2)
            assert re.search(rf"nodule .*{zone}|{zone}.* nodule", study.findings) or not study.findings
    assert max(heights["upper"]) < min(heights["mid"])
    assert max(heights["mid"]) < min(heights["lower"])


def test_boxes_enclose_the_lesion_mask(studies):
    for study in studies[:120]:
        mask = study.masks["lesions"]()
        covered = np.zeros_like(mask)
        for box in study.extra["boxes"]:
            assert set(box) == {"label", "x", "y", "width", "height"}
            part = mask[box["y"] : box["y"] + box["height"], box["x"] : box["x"] + box["width"]]
            assert part.shape == (box["height"], box["width"])
            assert part.any(axis=0)[[0, -1]].all()
            assert part.any(axis=1)[[0, -1]].all()
            covered[box["y"] : box["y"] + box["height"], box["x"] : box["x"] + box["width"]] = 1
        assert not mask[covered == 0].any()


def test_every_localised_lesion_has_a_box(studies):
    outlined = {"effusion", "pneumothorax", "consolidation", "nodule", "atelectasis"}
    for number, study in enumerate(studies):
        kinds = [lesion.kind for lesion in sample_case(3, number).lesions if lesion.kind in outlined]
        assert [box["label"] for box in study.extra["boxes"]] == kinds


def test_lesions_can_be_seen(studies):
    """An effusion is brighter, a pneumothorax darker than the rest of the lungs."""
    for study in studies[:250]:
        kinds = {box["label"] for box in study.extra["boxes"]}
        if kinds not in ({"effusion"}, {"pneumothorax"}):
            continue
        pixels = study.radiographs[0].read().astype(float)
        lesion = study.masks["lesions"]() > 0
        rest = (study.masks["lungs"]() > 0) & ~lesion
        difference = pixels[lesion].mean() - pixels[rest].mean()
        assert difference > 15 if kinds == {"effusion"} else difference < -3


def test_sections_are_missing_now_and_then_but_never_both(studies):
    assert 0.05 < np.mean([study.findings == "" for study in studies]) < 0.11
    assert 0.015 < np.mean([study.impression == "" for study in studies]) < 0.05
    assert all(study.findings or study.impression for study in studies)


def test_findings_have_two_to_five_sentences(studies):
    counts = {study.findings.count(".") for study in studies if study.findings}
    assert counts <= {2, 3, 4, 5}
    assert not any(re.search(r"[{}]| {2}|\.\.| \.", study.findings + study.impression) for study in studies)


def test_normal_reports_read_alike_and_others_vary(studies):
    normal = [study.impression for study in studies if study.labels["normal"] and study.impression]
    assert Counter(normal)["No acute cardiopulmonary abnormality."] > 0.6 * len(normal)
    abnormal = {study.findings for study in studies if not study.labels["normal"]}
    assert len(abnormal) > 0.6 * sum(not study.labels["normal"] for study in studies)
    assert sum("ossible" in study.findings or "may" in study.findings for study in studies) > 30


def test_patients_return_and_stay_in_one_split(studies):
    per_patient = Counter(study.patient_id for study in studies)
    assert max(per_patient.values()) == 3
    assert 0.08 < np.mean([count > 1 for count in per_patient.values()]) < 0.12
    splits = {}
    for study in studies:
        assert splits.setdefault(study.patient_id, study.split) == study.split
    shares = Counter(study.split for study in studies)
    assert 0.87 < shares["train"] / MANY < 0.93
    assert min(shares["val"], shares["test"]) > 40


def test_split_shares_can_be_chosen():
    shares = Counter(study.split for study in PhantomSource(studies=600, size=64, val_share=0.2, test_share=0.0))
    assert set(shares) == {"train", "val"}
    assert 0.15 < shares["val"] / 600 < 0.25


def test_ids_are_unique(studies):
    assert len({study.study_id for study in studies}) == MANY
    assert len({study.radiographs[0].image_id for study in studies}) == MANY
    assert {study.radiographs[0].view_position for study in studies} == {"frontal"}


def test_it_opens_by_name():
    source = open_source("phantom", None, studies=4, seed=1, size=64)
    assert len(source) == len(list(source)) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"studies": 0}, "studies = 0: must be at least 1"),
        ({"seed": -1}, "seed = -1"),
        ({"size": 16}, "size = 16: must be at least 64"),
        ({"val_share": 0.6, "test_share": 0.5}, "val_share = 0.6, test_share = 0.5"),
        ({"val_share": -0.1}, "val_share = -0.1"),
    ],
)
def test_wrong_options_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        PhantomSource(**options)


def test_unknown_study_and_mask_are_refused():
    with pytest.raises(ValueError, match="study 3: this source has studies 0 to 2"):
        PhantomSource(studies=3).study(3)
    with pytest.raises(ValueError, match="mask 'ribs': must be one of lungs, heart, lesions"):
        render_mask(0, 0, 64, "ribs")
