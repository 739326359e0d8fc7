"""Overlays: outlines where they belong, both seen where they agree, in a folder that is its owner's alone."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from imitate_ds.batch import IGNORED, LabeledBatch
from imitate_ds.evaluation.overlays import PREDICTED, SIDE, TRUE, draw_overlays, overlay
from imitate_ds.heads.detection import Found

GREY = np.full((64, 64), 90, np.uint8)
ZOOM = SIDE // 64


def square(low, high):
    mask = np.zeros((1, 64, 64), bool)
    mask[0, low:high, low:high] = True
    return mask


def where(picture, colour) -> np.ndarray:
    return (np.asarray(picture) == colour).all(axis=2)


def test_outlines_of_masks_lie_within_them():
    picture = overlay(GREY, square(8, 24), square(40, 56))
    assert picture.size == (SIDE, SIDE)
    for colour, (low, high) in ((TRUE, (8, 24)), (PREDICTED, (40, 56))):
        rows, columns = np.nonzero(where(picture, colour))
        for places in (rows, columns):
            assert (places.min(), places.max()) == (low * ZOOM, high * ZOOM - 1)
        middle = (low + high) // 2 * ZOOM
        assert not where(picture, colour)[middle, middle]


@pytest.mark.parametrize("shape", [square(8, 24), np.array([[8.0, 8.0, 24.0, 24.0]])])
def test_where_both_agree_both_are_seen(shape):
    picture = overlay(GREY, shape, shape)
    assert where(picture, TRUE).any()
    assert where(picture, PREDICTED).any()


def test_a_mask_at_the_border_has_no_outline_there():
    marked = where(overlay(GREY, square(0, 24), square(0, 0)), TRUE)
    assert not marked[: 20 * ZOOM, : 20 * ZOOM].any()
    assert marked[24 * ZOOM - 1, 0]


def batch(masks, boxes):
    n = len(boxes)
    images = torch.from_numpy(np.stack([GREY] * n))[:, None]
    labels = [torch.zeros(len(each), dtype=torch.int64) for each in boxes]
    return LabeledBatch([f"{i:016x}" for i in range(n)], images, torch.zeros(n, 0), masks, boxes, labels, 0)


def test_each_sample_is_drawn_into_a_folder_for_the_owner_alone(tmp_path):
    folder = tmp_path / "overlays"
    folder.mkdir(mode=0o755)
    (folder / "ffffffffffffffff.png").write_bytes(b"of before")
    masks = torch.full((2, 1, 64, 64), IGNORED, dtype=torch.uint8)
    masks[0, 0, :, :32] = 0
    given = batch(masks, [torch.zeros(0, 4)] * 2)
    draw_overlays(folder, lambda it: torch.ones(len(it.keys), 1, 64, 64), lambda answer: answer, [given])
    assert sorted(os.listdir(folder)) == [f"{key}.png" for key in given.keys]
    assert folder.stat().st_mode & 0o777 == 0o700
    first, second = (where(Image.open(folder / f"{key}.png"), PREDICTED) for key in given.keys)
    assert first[:, 32 * ZOOM - 1].all()  # of known pixels alone
    assert not second.any()


def test_boxes_are_drawn_where_the_model_is_sure(tmp_path):
    given = batch(torch.zeros(1, 0, 64, 64, dtype=torch.uint8), [torch.tensor([[4.0, 4, 20, 20]])])
    found = Found(torch.tensor([[30.0, 30, 50, 50], [5, 40, 9, 44]]), torch.tensor([0.6, 0.4]), torch.zeros(2))
    draw_overlays(tmp_path / "a" / "b", lambda it: [found], lambda answer: answer, [given])
    picture = Image.open(tmp_path / "a" / "b" / f"{given.keys[0]}.png")
    assert where(picture, TRUE)[4 * ZOOM, 10 * ZOOM]
    assert where(picture, PREDICTED)[30 * ZOOM, 40 * ZOOM]
    assert not where(picture, PREDICTED)[:, : 25 * ZOOM].any()
