"""Labelled shards as batches: what counts, in which order, and that pixels, masks and boxes move alike."""

import shutil

import numpy as np
import pytest
import torch

from imitate_ds.batch import IGNORED
from imitate_ds.data.labeled import (
    Order,
    build_labeled_loader,
    build_scoring_loader,
    open_labeled,
)
from imitate_ds.data.shards import build_shards, load_index
from imitate_ds.data.sources.base import RadiographRef, Study
from imitate_ds.finetune_config import LabeledAugmentConfig, LabeledDataConfig, TaskConfig

CLASSES = TaskConfig(kind="classification", targets=("effusion", "cardiomegaly"))
MASKS = TaskConfig(kind="segmentation", targets=("lungs", "heart"))
BOXES = TaskConfig(kind="detection")
STILL = LabeledAugmentConfig(rotation=0, translation=0, scale=0, brightness=0, contrast=0)


def data(**settings) -> LabeledDataConfig:
    return LabeledDataConfig(shards="unused", **settings)


@pytest.fixture(scope="module")
def index(phantom_shards):
    return load_index(phantom_shards)


def square(top=16, left=8, side=24):
    """A bright square on grey noise."""
    image = np.random.default_rng(0).integers(20, 60, (64, 64)).astype(np.uint8)
    image[top : top + side, left : left + side] = 250
    return image


def hull(top=16, left=8, side=24, unsaid=0):
    mask = np.zeros((64, 64), np.uint8)
    mask[top : top + side, left : left + side] = 255
    mask[:unsaid] = 127
    return mask


class Squares:
    """Six patients: labels of every kind, a mask and a box where there is a square, nothing said of the last."""

    name, synthetic, has_reports = "squares", True, True
    labels = ({"a": 1, "b": 0}, {"a": 0, "b": -1}, {"a": -1}, {"b": 1}, {"a": 1, "b": 1}, {})

    def __len__(self):
        return len(self.labels)

    def __iter__(self):
        for i, labels in enumerate(self.labels):
            said = i < 5
            box = {"label": "square", "x": 8, "y": 16, "width": 24, "height": 24}
            yield Study(
                patient_id=f"p{i}",
                study_id=f"s{i}",
                split="train",
                findings="x",
                impression="x",
                radiographs=(RadiographRef(f"i{i}", "frontal", square),),
                labels=labels,
                masks={"square": hull_of_four if i == 4 else hull} if said else {},
                extra={"boxes": [box] if i < 4 else []} if said else {},
            )


def hull_of_four():
    return hull(unsaid=4)


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squares") / "shards"
    build_shards(Squares(), folder, image_size=64, workers=0, progress=False)
    return load_index(folder)


def test_the_index_names_what_is_annotated(squares):
    assert (squares.labels, squares.masks, squares.boxes) == (("a", "b"), ("square",), ("square",))


def test_blank_and_uncertain_labels(squares):
    task = TaskConfig(kind="classification")

    def labels(**settings):
        split = open_labeled(squares, "train", task, data(**settings))
        return {key: row.tolist() for key, row in zip(split.keys, split.labels, strict=True)}, split.not_annotated

    ignored, not_annotated = labels()
    # the third says "uncertain" only, and the last nothing: neither says anything about the task
    assert sorted(ignored.values()) == [[-1, 1], [0, -1], [1, 0], [1, 1]]
    assert not_annotated == 2
    ones, _ = labels(uncertain="ones")
    assert sorted(ones.values()) == [[-1, 1], [0, 1], [1, -1], [1, 0], [1, 1]]
    by_name, not_annotated = labels(uncertain={"a": "ones", "b": "zeros"}, blank="zeros")
    assert sorted(by_name.values()) == [[0, 0], [0, 0], [0, 1], [1, 0], [1, 0], [1, 1]]
    assert not_annotated == 0


def test_what_is_not_there_is_named(squares):
    for task, words in (
        (TaskConfig(kind="classification", targets=("c",)), r"no 'c' among its labels; it has: a, b"),
        (TaskConfig(kind="segmentation", targets=("lungs",)), r"no 'lungs' among its masks; it has: square"),
        (TaskConfig(kind="classification", exclusive=True), r"2 samples .* not exactly one of the targets"),
    ):
        with pytest.raises(ValueError, match=words):
            open_labeled(squares, "train", task, data())


def test_of_masks_what_nobody_says_does_not_count(squares):
    split = open_labeled(squares, "train", TaskConfig(kind="segmentation"), data())
    assert (len(split), split.not_annotated) == (5, 1)
    (batch,) = build_scoring_loader(split, input_size=64, batch_size=8, workers=0)
    values = [sorted(mask.unique().tolist()) for mask in batch.masks]
    assert values.count([0, 1]) == 4
    assert values.count([0, 1, IGNORED]) == 1


def test_boxes_and_masks_move_with_the_pixels(squares):
    """The square is where its pixels are bright, its mask is set, and its box is drawn, however it was moved."""
    split = open_labeled(squares, "train", TaskConfig(kind="segmentation"), data())
    boxed = open_labeled(squares, "train", TaskConfig(kind="detection"), data())
    augment = LabeledAugmentConfig(
        rotation=0, translation=0.1, scale=0.2, horizontal_flip=0.5, brightness=0, contrast=0
    )
    order = Order(5, 5, seed=1)
    for with_masks, with_boxes in zip(
        build_labeled_loader(split, order, augment, input_size=48, workers=0, seed=5, steps=range(4)),
        build_labeled_loader(boxed, order, augment, input_size=48, workers=0, seed=5, steps=range(4)),
        strict=True,
    ):
        assert torch.equal(with_masks.images, with_boxes.images)
        for image, mask, boxes in zip(with_masks.images, with_masks.masks[:, 0], with_boxes.boxes, strict=True):
            inside = mask == 1
            assert image[0][inside].float().mean() > 220
            assert image[0][~inside].float().mean() < 80
            rows, columns = torch.where(inside)
            for box in boxes:
                drawn = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                assert (box - drawn).abs().max() < 1.5  # pixels


@pytest.mark.parametrize("size", [28, 32, 56, 96])
def test_masks_lie_where_the_pixels_do_at_any_size(squares, size):
    """The centre of the square, of its mask and of its box, in shares of the side."""
    split = open_labeled(squares, "train", TaskConfig(kind="segmentation"), data())
    (batch,) = build_scoring_loader(split, input_size=size, batch_size=8, workers=0)
    for image, mask in zip(batch.images[:, 0].float(), batch.masks[:, 0], strict=True):
        for inside in (mask == 1, image > 155):
            rows, columns = torch.where(inside)
            assert (rows.float().mean() + 0.5).item() / size == pytest.approx(28 / 64, abs=0.3 / size)
            assert (columns.float().mean() + 0.5).item() / size == pytest.approx(20 / 64, abs=0.3 / size)


def test_beyond_the_image_nobody_has_drawn_a_mask(squares):
    split = open_labeled(squares, "train", TaskConfig(kind="segmentation"), data())
    turned = LabeledAugmentConfig(rotation=45, translation=0.3, scale=0, brightness=0, contrast=0)
    (batch,) = build_labeled_loader(
        split, Order(5, 5, seed=1), turned, input_size=64, workers=0, seed=5, steps=range(1)
    )
    beyond = batch.images[:, 0] == 0  # its own pixels are at least 20
    assert beyond.any()
    assert (batch.masks[:, 0][beyond] == IGNORED).float().mean() > 0.95  # but for the line between


def test_a_misspelt_name_of_an_uncertain_label_is_refused(squares):
    with pytest.raises(ValueError, match=r"data\.uncertain: .* no 'A' among its labels.*; it has: a, b"):
        open_labeled(squares, "train", TaskConfig(kind="classification"), data(uncertain={"A": "ones"}))


def test_every_sample_once_in_each_pass_whatever_the_ranks(index):
    split = open_labeled(index, "train", CLASSES, data())
    order = Order(len(split), 25, seed=4)
    steps = range(2 * order.steps_per_epoch)

    def keys(step, world_size):
        return [place for rank in range(world_size) for place, _ in order.batch(step, rank, world_size)]

    whole = [place for step in steps for place in keys(step, 1)]
    assert sorted(whole[: len(split)]) == list(range(len(split)))
    assert sorted(whole[len(split) : 2 * len(split)]) == list(range(len(split)))
    assert whole[: len(split)] != whole[len(split) : 2 * len(split)]
    for world_size in (2, 3, 4):
        assert [keys(step, world_size) for step in steps] == [keys(step, 1) for step in steps]


@pytest.mark.parametrize("task", [CLASSES, MASKS, BOXES], ids=lambda task: task.kind)
def test_workers_and_a_later_start_change_nothing(index, task):
    split = open_labeled(index, "train", task, data())
    order = Order(len(split), 16, seed=4)

    def batches(workers, steps):
        loader = build_labeled_loader(
            split, order, LabeledAugmentConfig(), input_size=32, workers=workers, seed=4, steps=steps
        )
        return list(loader)

    for one, other in zip(batches(2, range(3)), [*batches(0, range(1)), *batches(0, range(1, 3))], strict=True):
        assert one.keys == other.keys
        for a, b in zip(one[1:4], other[1:4], strict=True):
            assert torch.equal(a, b)
        assert all(torch.equal(a, b) for a, b in zip(one.boxes, other.boxes, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(one.box_labels, other.box_labels, strict=True))


def test_scoring_sees_every_sample_unchanged_and_ranks_the_same_number_of_batches(index):
    split = open_labeled(index, "val", CLASSES, data())
    parts = [
        list(build_scoring_loader(split, input_size=64, batch_size=7, workers=0, rank=rank, world_size=3))
        for rank in range(3)
    ]
    assert len({tuple(len(batch.keys) for batch in part) for part in parts}) == 1
    keys = [key for part in parts for batch in part for key in batch.keys]
    assert set(keys) == set(split.keys)
    (first, *_) = build_labeled_loader(
        split, Order(len(split), 4, seed=0), STILL, input_size=64, workers=0, seed=0, steps=range(1)
    )
    shown = {
        key: image for part in parts for batch in part for key, image in zip(batch.keys, batch.images, strict=True)
    }
    for key, image in zip(first.keys, first.images, strict=True):
        assert torch.equal(shown[key], image)


def test_a_damaged_sample_stops_the_run_and_is_named_by_its_key(phantom_shards, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(phantom_shards, folder)
    index = load_index(folder)
    shard = index.of_split("val")[0]
    member = next(iter(shard.members))
    with (folder / shard.name).open("r+b") as file:
        file.seek(member.image_offset + 50)
        file.write(b"\0" * 40)
    split = open_labeled(index, "val", CLASSES, data())
    with pytest.raises(ValueError, match=rf"sample {member.key}: .*imitate-ds shards verify"):
        list(build_scoring_loader(split, input_size=32, batch_size=64, workers=0))
