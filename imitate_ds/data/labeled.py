"""Labelled shards -> LabeledBatch: labels, masks and boxes of one task, for fine-tuning and its measurement.

What a batch holds is a function of seed and step, the same for any number of ranks. Nothing is left out in silence: samples that
say nothing about the task are counted, and a damaged one stops the run, for a figure over most of a split is none of the split.
"""

import difflib
import io
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from imitate_ds.batch import IGNORED, LabeledBatch
from imitate_ds.data.loader import VERIFY, view_seed
from imitate_ds.data.shard_index import ShardEntry, ShardIndex, read_at, read_metas
from imitate_ds.data.shard_plan import rank_rows
from imitate_ds.data.shard_reader import ShardReader
from imitate_ds.data.shard_sample import MASK, error_rule
from imitate_ds.data.sources.base import OUTSIDE, UNSAID
from imitate_ds.data.worker_processes import in_workers
from imitate_ds.finetune_config import LabeledAugmentConfig, LabeledDataConfig, TaskConfig

NEAREST_EXACT = v2.InterpolationMode.NEAREST_EXACT
UNKNOWN = -2  # a label that a study does not say anything about; -1 is uncertain


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """What samples are known to be for one task, as much of it as measuring needs."""

    targets: tuple[str, ...]  # names of labels, masks, or objects
    keys: list[str]
    patients: np.ndarray  # [n], hashes
    labels: np.ndarray  # int8 [n, L]: 1, 0, or -1 where it does not count; L = 0 for masks and boxes
    # of each sample, float32 [b, 4] x1 y1 x2 y2 in pixels of the stored square; their labels int64 [b]
    boxes: list[np.ndarray] = field(repr=False)
    box_labels: list[np.ndarray] = field(repr=False)

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, kw_only=True)
class LabeledSplit(Annotations):
    """The samples of one split that are annotated for a task, in index order; nothing of the pixels is read yet."""

    index: ShardIndex
    split: str
    rows: np.ndarray  # [n]: which sample of the split
    masks: tuple[str, ...] = ()  # names; empty where the task needs none
    not_annotated: int = 0  # samples of the split that say nothing about the task

    def describe(self) -> dict[str, Any]:
        """For a result file (ShardIndex.describe)."""
        about = self.index.describe(self.split, self.keys, self.patients.tolist())
        return about | {"not_annotated": self.not_annotated}

    def only(self, keys: Sequence[str]) -> "LabeledSplit":
        """Those of a list of keys, in index order."""
        wanted = set(keys)
        return self._take([i for i, key in enumerate(self.keys) if key in wanted])

    def _take(self, places: list[int]) -> "LabeledSplit":
        return replace(
            self,
            rows=self.rows[places],
            keys=[self.keys[i] for i in places],
            patients=self.patients[places],
            labels=self.labels[places],
            boxes=[self.boxes[i] for i in places],
            box_labels=[self.box_labels[i] for i in places],
        )


def task_targets(index: ShardIndex, task: TaskConfig) -> tuple[str, ...]:
    """The targets of a task on these shards. Raises ValueError where one is not there, naming those that are."""
    what, there = {
        "classification": ("labels", index.labels),
        "segmentation": ("masks", index.masks),
        "detection": ("boxes", index.boxes),
    }[task.kind]
    if not there:
        raise ValueError(
            f"task.kind = {task.kind!r}: {index.root} names no {what}; build it from a source that gives them, and again if an "
            "older version built it (shards/README.md)"
        )
    if missing := [name for name in task.targets if name not in there]:
        raise ValueError(
            f"task.targets: {index.root} has no {missing[0]!r} among its {what}; it has: {', '.join(there)}"
        )
    return task.targets or there


def open_labeled(index: ShardIndex, split: str, task: TaskConfig, data: LabeledDataConfig) -> LabeledSplit:
    """What the shards say about one split. Raises ValueError where nothing of it is annotated for the task."""
    targets = task_targets(index, task)
    _check_names(index, data)
    found = _Found([], [], [], [], [], [])
    row = 0
    for shard in index.of_split(split):
        stored = _mask_places(index, shard) if task.kind == "segmentation" else {}
        for member, meta in read_metas(index, shard):
            if (annotation := _annotation(meta, task, targets, data, stored.get(member.key, {}))) is not None:
                found.add(row, member.key, member.patient, *annotation)
            row += 1
    if not found.keys:
        raise ValueError(
            f"split {split!r} of {index.root}: none of its {row} samples is annotated with {', '.join(targets)}"
        )
    labels = np.array(found.labels, dtype=np.int8).reshape(len(found.keys), -1)
    if task.exclusive:
        _check_exclusive(index, split, found.keys, labels)
    return LabeledSplit(
        index=index,
        split=split,
        targets=targets,
        rows=np.array(found.rows),
        keys=found.keys,
        patients=np.array(found.patients),
        labels=labels,
        boxes=found.boxes,
        box_labels=found.box_labels,
        masks=targets if task.kind == "segmentation" else (),
        not_annotated=row - len(found.keys),
    )


def _check_names(index: ShardIndex, data: LabeledDataConfig) -> None:
    """Raises ValueError for a label in data.uncertain that is not there: it would count as ignored, and nobody be told."""
    for name in data.uncertain if isinstance(data.uncertain, dict) else ():
        if name not in index.labels:
            near = difflib.get_close_matches(name, index.labels, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(
                f"data.uncertain: {index.root} has no {name!r} among its labels{hint}; it has: {', '.join(index.labels)}"
            )


class _Found(NamedTuple):
    rows: list[int]
    keys: list[str]
    patients: list[str]
    labels: list[list[int]]
    boxes: list[np.ndarray]
    box_labels: list[np.ndarray]

    def add(self, *values: Any) -> None:
        for column, value in zip(self, values, strict=True):
            column.append(value)


def _annotation(
    meta: dict, task: TaskConfig, targets: tuple[str, ...], data: LabeledDataConfig, masks: dict
) -> tuple[list[int], np.ndarray, np.ndarray] | None:
    """Labels, boxes and box labels of one sample; None where it says nothing about the task."""
    nothing = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    if task.kind == "classification":
        labels = [_resolved(name, meta["labels"].get(name, UNKNOWN), data) for name in targets]
        return (labels, *nothing) if any(label >= 0 for label in labels) else None
    if task.kind == "segmentation":
        return ([], *nothing) if any(name in masks for name in targets) else None
    if "boxes" not in meta["extra"]:
        return None
    boxes = [box for box in meta["extra"]["boxes"] if box["label"] in targets]
    corners = [[box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"]] for box in boxes]
    numbers = [targets.index(box["label"]) for box in boxes]
    return [], np.array(corners, np.float32).reshape(-1, 4), np.array(numbers, np.int64)


def _resolved(name: str, value: int, data: LabeledDataConfig) -> int:
    """1, 0, or -1 where it does not count."""
    if value == UNKNOWN:
        return 0 if data.blank == "zeros" else -1
    if value == -1:
        policy = data.uncertain.get(name, "ignore") if isinstance(data.uncertain, dict) else data.uncertain
        return {"ignore": -1, "ones": 1, "zeros": 0}[policy]
    return value


def _check_exclusive(index: ShardIndex, split: str, keys: list[str], labels: np.ndarray) -> None:
    wrong = np.flatnonzero((labels == 1).sum(axis=1) != 1)
    if len(wrong):
        raise ValueError(
            f"task.exclusive = True: {len(wrong)} samples of split {split!r} of {index.root} have not exactly one of the "
            f"targets, the first is {keys[wrong[0]]}; take exclusive out, or choose other targets"
        )


def _mask_places(index: ShardIndex, shard: ShardEntry) -> dict[str, dict[str, tuple[int, int]]]:
    """key -> mask -> offset and size in the tar."""
    places: dict[str, dict[str, tuple[int, int]]] = {}
    with tarfile.open(index.fetch(shard.file)) as tar:
        for info in tar:
            if info.name.endswith(MASK):
                key, _, name = info.name.removesuffix(MASK).partition(".")
                places.setdefault(key, {})[name] = info.offset_data, info.size
    return places


class Order(NamedTuple):
    """Which samples a step sees: all of them once, in random order, then all again in another one, and so on."""

    samples: int
    global_batch_size: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.samples // self.global_batch_size)

    def batch(self, step: int, rank: int, world_size: int) -> list[tuple[int, int]]:
        """(sample, how often all were seen before) of this rank's share of a step."""
        rows = rank_rows(self.global_batch_size, rank, world_size)
        places = (divmod(step * self.global_batch_size + row, self.samples) for row in rows)
        return [(int(_order_of_visit(self.seed, visit, self.samples)[place]), visit) for visit, place in places]


@lru_cache(maxsize=4)
def _order_of_visit(seed: int, visit: int, samples: int) -> np.ndarray:
    # as in shard_plan.py: raw words of PCG64, which NumPy promises to keep
    return np.argsort(np.random.PCG64([seed, visit]).random_raw(samples), kind="stable")


class _Request(NamedTuple):
    step: int
    samples: list[tuple[int, int]]  # place in the split, visit


@dataclass(frozen=True)
class _Requests:
    order: Order
    rank: int
    world_size: int
    steps: range

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[_Request]:
        return (_Request(step, self.order.batch(step, self.rank, self.world_size)) for step in self.steps)


class _LabeledSet(Dataset):
    """A request -> its batch, in whichever process asks."""

    def __init__(self, split: LabeledSplit, views: v2.Transform, seed: int):
        self.split, self.views, self.seed = split, views, seed
        self.reader = ShardReader([split.index], split.split, with_text=False)

    def __getitem__(self, request: _Request) -> LabeledBatch:
        samples = [self._sample(place, visit) for place, visit in request.samples]
        keys = [self.split.keys[place] for place, _ in request.samples]
        labels = torch.from_numpy(self.split.labels[[place for place, _ in request.samples]])
        images, masks, boxes, box_labels = zip(*samples, strict=True)
        several = [[value.numpy() for value in values] for values in (boxes, box_labels)]
        return LabeledBatch(keys, torch.stack(images), labels, torch.stack(masks), *several, request.step)  # type: ignore[arg-type]

    def _sample(self, place: int, visit: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        key = self.split.keys[place]
        try:
            image = self.reader.read(self.reader.row_of(int(self.split.rows[place]))).image
            masks = self._masks(place, image.shape[-2:])
        except (ValueError, OSError) as error:
            raise ValueError(f"sample {key}: {error_rule(error)}; {VERIFY}") from error
        boxes = tv_tensors.BoundingBoxes(
            torch.from_numpy(self.split.boxes[place]),  # type: ignore[call-overload]
            format="XYXY",
            canvas_size=(image.shape[-2], image.shape[-1]),
        )
        whole = {
            "image": tv_tensors.Image(image),
            "masks": tv_tensors.Mask(masks),
            "boxes": boxes,
            "labels": torch.from_numpy(self.split.box_labels[place]),
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(view_seed(self.seed, visit, key))
            seen = self.views(whole)
        return tuple(seen[name].as_subclass(Tensor) for name in ("image", "masks", "boxes", "labels"))  # type: ignore[return-value]

    def _masks(self, place: int, size: Sequence[int]) -> Tensor:
        """uint8 [M, H, W]: 1, 0 or IGNORED; a mask that this sample has not is IGNORED all over."""
        masks = torch.full((len(self.split.masks), *size), IGNORED, dtype=torch.uint8)
        if not self.split.masks:
            return masks
        shard, stored = self._stored[self.reader.row_of(int(self.split.rows[place])).shard]
        for number, name in enumerate(self.split.masks):
            if (found := stored[self.split.keys[place]].get(name)) is not None:
                with self.split.index.fetch(shard.file).open("rb") as file:
                    levels = np.asarray(Image.open(io.BytesIO(read_at(file, shard, *found))).convert("L"))
                if levels.shape != tuple(size):
                    raise ValueError("mask and radiograph differ in size")
                masks[number] = torch.from_numpy(np.where(levels > UNSAID, 1, np.where(levels > OUTSIDE, IGNORED, 0)))
        return masks

    @cached_property
    def _stored(self) -> list[tuple[ShardEntry, dict]]:
        shards = self.split.index.of_split(self.split.split)
        return [(shard, _mask_places(self.split.index, shard)) for shard in shards]


class LabeledBatches:
    """A rank's batches, in order. None is skipped: a damaged sample stops the run."""

    def __init__(self, loader: DataLoader):
        self._loader = loader
        self.skipped: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[LabeledBatch]:
        return (
            batch._replace(boxes=_tensors(batch.boxes), box_labels=_tensors(batch.box_labels)) for batch in self._loader
        )


def _tensors(arrays: list[Any]) -> list[Tensor]:
    """What came through the pipe by value: a tensor costs two handshakes, 1 ms, of which a batch would need a hundred."""
    return [torch.from_numpy(array) for array in arrays]


def build_labeled_loader(
    split: LabeledSplit, order: Order, augment: LabeledAugmentConfig, *, input_size: int, workers: int, seed: int,
    rank: int = 0, world_size: int = 1, steps: range,
) -> LabeledBatches:  # fmt: skip
    """This rank's share of the training batches of `steps`."""
    samples = _LabeledSet(split, _train_views(augment, input_size), seed)
    return LabeledBatches(in_workers(samples, workers, _Requests(order, rank, world_size, steps)))


def build_scoring_loader(
    split: LabeledSplit, *, input_size: int, batch_size: int, workers: int, rank: int = 0, world_size: int = 1
) -> LabeledBatches:
    """Every sample once, unchanged; rank r has the r-th contiguous part.

    All ranks get the same number of batches of the same sizes, so that collectives match: the last sample is repeated to fill
    up, and whoever gathers drops repeats by key. Masks have the size of the encoder's input.
    """
    share = -(-len(split) // world_size)
    mine = [(min(rank * share + i, len(split) - 1), 0) for i in range(share)]
    requests = [
        _Request(start // batch_size, mine[start : start + batch_size]) for start in range(0, share, batch_size)
    ]
    return LabeledBatches(in_workers(_LabeledSet(split, _Fitted(input_size), 0), workers, requests))


class _Fitted(v2.Transform):
    """Resized to the encoder's input. Masks by their nearest pixel as it lies under the radiograph's: v2.Resize takes that of
    the upper left corner, and so moves them by half a pixel."""

    def __init__(self, input_size: int):
        super().__init__()
        self.size = [input_size, input_size]

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            return tv_tensors.Mask(v2.functional.resize_image(inpt.as_subclass(Tensor), self.size, NEAREST_EXACT))
        return v2.functional.resize(inpt, self.size, antialias=True)


def _train_views(augment: LabeledAugmentConfig, input_size: int) -> v2.Transform:
    """Moved and shaded, boxes that have left the image or shrunk to less than two pixels taken out."""
    move = v2.RandomAffine(
        degrees=(-augment.rotation, augment.rotation),
        translate=(augment.translation, augment.translation),
        scale=(1 - augment.scale, 1 + augment.scale),
        interpolation=v2.InterpolationMode.BILINEAR,
        fill={tv_tensors.Mask: IGNORED, "others": 0},  # nobody has drawn a mask beyond the image
    )
    return v2.Compose([
        move,
        v2.RandomHorizontalFlip(augment.horizontal_flip),
        v2.ColorJitter(brightness=augment.brightness, contrast=augment.contrast),
        _Fitted(input_size),
        v2.ClampBoundingBoxes(),
        v2.SanitizeBoundingBoxes(min_size=2, labels_getter=lambda sample: sample["labels"]),
    ])  # fmt: skip
