"""The pointing game, with maps whose maximum is known, and from end to end on phantoms."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from imitate_ds.data.loader import build_eval_loader
from imitate_ds.data.shards import load_index
from imitate_ds.evaluate import evaluate_grounding
from imitate_ds.evaluation.embedded import read_split
from imitate_ds.evaluation.grounding import (
    Pointing,
    ask_for,
    box_mask,
    is_hit,
    overlay,
    point,
    pointing_figures,
    read_boxes,
    usual_levels,
)
from imitate_ds.evaluation.prompt_file import load_prompts
from imitate_ds.hub import load_model

LABELS = ("atelectasis", "consolidation", "effusion", "nodule", "pneumothorax")


@pytest.fixture(scope="module")
def records(phantom_shards):
    return read_split(load_index(phantom_shards), "val")


def _images(records):
    options = {"input_size": 64, "batch_size": 1, "workers": 0, "with_text": False}
    for batch in build_eval_loader(records.index, records.split, **options):
        yield batch.keys[0], batch.images[0, 0]


def test_boxes_are_scaled_to_the_pixels_of_the_input():
    mask = box_mask([{"x": 8, "y": 16, "width": 4, "height": 8}, {"x": 0, "y": 0, "width": 2, "height": 2}], 16, 32)
    rows, columns = np.nonzero(mask)
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == [
        (0, 0),
        *((y, x) for y in (8, 9, 10, 11) for x in (4, 5)),
    ]
    assert not box_mask([], 16, 32).any()


def test_a_hit_is_a_maximum_in_a_box():
    heat, mask = np.zeros((8, 8), dtype=np.float32), np.zeros((8, 8), dtype=bool)
    mask[2:4, 5:7] = True
    assert not is_hit(heat, ~mask), "a map without any positive value points nowhere"
    heat[4, 5] = 1
    assert not is_hit(heat, mask)
    heat[3, 6] = 2
    assert is_hit(heat, mask)
    heat[0, 0] = 2
    assert not is_hit(heat, mask), "of equal maxima the first counts"


def test_each_sample_is_asked_for_the_labels_it_has_boxes_of(export, records):
    model, boxes = load_model(export), read_boxes(records)
    words = ask_for(boxes, None, "findings")
    assert tuple(words) == LABELS
    usual = usual_levels(model, records.index, "train", workers=0)
    pointing = point(model, records, boxes, words, "findings", usual, workers=0)
    masks = [{label: box_mask(own, 64, 64) for label, own in sample.items()} for sample in boxes]
    for row, (key, image) in enumerate(_images(records)):
        assert key == records.keys[row]
        for column, label in enumerate(LABELS):
            if label not in masks[row]:
                assert np.isnan(pointing.hits[row, column])
                assert np.isnan(pointing.areas[row, column])
                continue
            text = model.encode_ensemble(words[label])[None]
            heat = model.ground_rows(image[None], text, "findings", usual)[0].numpy()
            assert pointing.hits[row, column] == is_hit(heat, masks[row][label])
            assert pointing.areas[row, column] == masks[row][label].mean()
    for column, label in enumerate(LABELS):
        own = [sample[label] for sample in masks if label in sample]
        assert pointing.blind[column] == pytest.approx(np.mean(own, axis=0).max())


def test_figures_weigh_labels_alike_and_draw_patients():
    nan = np.nan
    hits = np.array([[1, nan], [1, nan], [1, 0], [nan, 1], [nan, 0], [nan, 0]])
    pointing = Pointing(("a", "b"), hits, np.where(np.isnan(hits), nan, 0.25), np.array([0.5, 0.4]))
    figures = pointing_figures(pointing, np.arange(6))
    assert figures["pointing/a"]["value"] == 1
    assert figures["pointing/b"]["value"] == 0.25
    assert figures["pointing_macro"]["value"] == 0.625
    assert (figures["pointing/a"]["n"], figures["pointing/b"]["n"], figures["pointing_macro"]["n"]) == (3, 4, 7)
    assert figures["chance_pointing_macro"]["value"] == 0.25
    assert figures["blind_pointing/b"]["value"] == 0.4
    assert figures["blind_pointing_macro"]["value"] == 0.45
    assert figures["pointing/b"]["low"] < 0.25 < figures["pointing/b"]["high"]
    one = pointing_figures(pointing, np.zeros(6, dtype=int))["pointing/b"]
    assert one["low"] == one["high"] == 0.25


def test_from_end_to_end(export, phantom_shards, records, tmp_path):
    result = evaluate_grounding(export, phantom_shards, tmp_path, branch="findings")
    metrics = result["metrics"]
    assert {f"{kind}pointing/{label}" for kind in ("", "chance_", "blind_") for label in LABELS} < set(metrics)
    counts = {label: sum(label in sample for sample in read_boxes(records)) for label in LABELS}
    assert {label: metrics[f"pointing/{label}"]["n"] for label in LABELS} == counts
    assert result["settings"]["branch"] == "findings"
    assert result["settings"]["prompts"]["effusion"][0] == "There is a pleural effusion."
    assert "train" in result["settings"]["usual"]
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.html"}, "no picture unless asked for"
    page = (tmp_path / "report.html").read_text()
    assert all(words in page for words in ("pointing game", "random pixel", "best fixed pixel"))
    written = json.loads((tmp_path / "results.json").read_text())["results"][0]
    assert written == json.loads(json.dumps(result))


def test_pictures_are_named_by_key_and_for_the_owner_alone(export, phantom_shards, records, tmp_path):
    evaluate_grounding(export, phantom_shards, tmp_path, branch="findings", prompts="siim", pictures=True)
    folder = tmp_path / "grounding"
    wanted = {
        f"{key}.pneumothorax.png"
        for key, it in zip(records.keys, read_boxes(records), strict=True)
        if "pneumothorax" in it
    }
    assert {path.name for path in folder.iterdir()} == wanted
    assert folder.stat().st_mode & 0o077 == 0
    with Image.open(next(folder.iterdir())) as picture:
        assert picture.size == (256, 256)
        assert picture.mode == "RGB"
    assert "data:image/png" not in (tmp_path / "report.html").read_text()


def test_an_overlay_is_the_radiograph_where_nothing_answers():
    image = np.arange(64, dtype=np.uint8).reshape(8, 8)
    heat = np.zeros((8, 8), dtype=np.float32)
    heat[1, 6] = 2
    pixels = np.array(overlay(image, heat, np.zeros((8, 8), dtype=bool)))
    assert pixels[30, 2].tolist() == [image[7, 0]] * 3
    assert pixels[6, 26].tolist() != [image[1, 6]] * 3


def test_what_is_usual_is_the_mean_over_radiographs(export, phantom_shards):
    model, index = load_model(export), load_index(phantom_shards)
    usual = usual_levels(model, index, "test", workers=0)
    assert [tuple(level.shape[1:]) for level in usual] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    images = torch.randint(0, 256, (5, 1, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(model.usual_levels(images, batch_size=2), model.usual_levels(images))


def test_files_and_phrases_give_maps(export, phantom_shards, tmp_path):
    model = load_model(export)
    images = torch.randint(0, 256, (3, 1, 64, 64), dtype=torch.uint8)
    texts = ["Pleural effusion.", "Cardiomegaly.", "Pneumothorax."]
    maps = model.grounding(images, texts, "findings", model.usual_levels(images), batch_size=2)
    assert maps.shape == (3, 64, 64)
    rows = model.encode_text(texts)
    torch.testing.assert_close(
        maps, model.ground_rows(images, rows, "findings", model.usual_levels(images)), atol=1e-5, rtol=1e-3
    )
    Image.fromarray(images[0, 0].numpy()).save(tmp_path / "a.png")
    assert model.grounding([tmp_path / "a.png"], texts[:1]).shape == (1, 64, 64)
    for wrong in ("Pleural effusion.", texts[:2]):
        with pytest.raises(ValueError, match="texts: must be a list of one text for each image"):
            model.grounding(images, wrong)
    with pytest.raises(ValueError, match="branch = 'pooled'"):
        model.grounding(images, texts, "pooled")
    with pytest.raises(ValueError, match="at least one radiograph"):
        model.usual_levels([])


def test_what_cannot_be_pointed_at_is_named(export, phantom_shards, records, tmp_path):
    with pytest.raises(ValueError, match=r"--reference-split dev: .* has no such split; it has: train"):
        evaluate_grounding(export, phantom_shards, tmp_path, reference_split="dev")
    with pytest.raises(
        ValueError, match=r"--prompts rsna: has none of the labels of boxes \(atelectasis.*; it has: pneumonia"
    ):
        ask_for(read_boxes(records), load_prompts("rsna"), "findings")
    bare = shutil.copytree(phantom_shards, tmp_path / "shards")
    for shard in load_index(bare).of_split("val"):
        data = (bare / shard.name).read_bytes()
        (bare / shard.name).write_bytes(data.replace(b'"boxes"', b'"bexes"'))
    with pytest.raises(ValueError, match="no boxes in split 'val'; build them from a source that gives them"):
        read_boxes(read_split(load_index(bare), "val"))
