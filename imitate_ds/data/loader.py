"""Shards -> batches: the plan says which samples, workers read, decode and augment them, whole batches come out.

A WebDataset pipeline of four stages (plan, load, views, collate) runs in every worker. Worker w takes the batches
w, w + W, ... and the DataLoader asks its workers in turn, so batches arrive in the plan's order whatever W is. Members
are read by their offset in the tar, so a run starts anywhere without reading what came before.
"""

import hashlib
import logging
import signal
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from webdataset.pipeline import DataPipeline

from imitate_ds.batch import Batch
from imitate_ds.config import RunConfig
from imitate_ds.data.radiographs import decode_radiograph
from imitate_ds.data.shard_index import ShardIndex, load_index
from imitate_ds.data.shard_plan import ShardPlan, ShardRow
from imitate_ds.data.shard_sample import error_rule
from imitate_ds.data.text_cache import TextCache, load_text_cache
from imitate_ds.data.transforms import TrainViews, eval_view

log = logging.getLogger(__name__)

VERIFY = "check the shards with 'imitate-ds shards verify'"
OPEN_SHARDS = 16  # tars a worker holds open; twice the plan's window, for batches that lie across two windows


class Sample(NamedTuple):
    key: str
    image: Tensor  # uint8 [1, H, W]; behind the views [V, 1, h, w]
    findings: Tensor  # float32 [E]
    impression: Tensor
    has_findings: bool
    has_impression: bool


class Damaged(NamedTuple):
    """A sample that could not be used, and the rule it broke."""

    key: str
    rule: str


class Loaded(NamedTuple):
    step: int
    samples: list[Sample]
    damaged: list[Damaged]


class _OpenShard(NamedTuple):
    file: BinaryIO
    text: TextCache | None


class ShardReader:
    """Reads samples of one split in any order; holds the last few tars open and their embeddings mapped.

    Offsets lie in arrays: a worker's copy of the index of 200,000 samples takes 6 MB, where Member tuples take 87 MB.
    """

    def __init__(self, index: ShardIndex, split: str, *, impression_text: str = "impression", with_text: bool = True):
        shards = index.of_split(split)
        members = [member for shard in shards for member in shard.members]
        self.root = index.root
        self.impression_text = impression_text
        self.with_text = with_text
        self.samples = len(members)
        self._shards = tuple(replace(shard, members=()) for shard in shards)
        self._starts = np.cumsum([0, *(shard.samples for shard in shards)])
        self._keys = np.array([member.key for member in members], dtype="S16")
        self._places = np.array([(m.image_offset, m.image_size) for m in members], dtype=np.int64).reshape(-1, 2)
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        if with_text:
            for shard in self._shards:
                load_text_cache(self.root, shard)  # maps the file only: embeddings of another build fail here and now

    def row_of(self, sample: int) -> ShardRow:
        """Where the n-th sample of the split lies."""
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return shard, sample - int(self._starts[shard])

    def key(self, where: ShardRow) -> str:
        return bytes(self._keys[self._starts[where[0]] + where[1]]).decode()

    def read(self, where: ShardRow) -> Sample:
        """Raises ValueError or OSError for a sample that is damaged."""
        shard = self._shard(where[0])
        offset, size = self._places[self._starts[where[0]] + where[1]].tolist()
        shard.file.seek(offset)
        image = torch.tensor(decode_radiograph(shard.file.read(size)))[None]
        if shard.text is None:
            nothing = torch.empty(0)
            return Sample(self.key(where), image, nothing, nothing, False, False)
        return Sample(self.key(where), image, *self._text(shard.text, where[1]))

    def _text(self, text: TextCache, row: int) -> tuple[Tensor, Tensor, bool, bool]:
        """The embeddings of both sections, and whether each is there."""
        findings, impression = text.findings[row].float(), text.impression[row].float()
        has_findings, has_impression = bool(text.has_findings[row]), bool(text.has_impression[row])
        if self.impression_text == "report":
            impression, has_impression = text.report[row].float(), has_findings or has_impression
        if not (findings.isfinite().all() and impression.isfinite().all()):
            raise ValueError("text embedding is not finite; run 'imitate-ds shards embed'")
        return findings, impression, has_findings, has_impression

    def _shard(self, number: int) -> _OpenShard:
        if number not in self._open:
            if len(self._open) >= OPEN_SHARDS:
                self._open.popitem(last=False)[1].file.close()
            entry = self._shards[number]
            text = load_text_cache(self.root, entry) if self.with_text else None
            self._open[number] = _OpenShard((self.root / entry.name).open("rb"), text)
        self._open.move_to_end(number)
        return self._open[number]


@dataclass(frozen=True)
class EvalBatches:
    """The batches of one rank, in index order. May be iterated again."""

    loader: DataLoader
    batches: int

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Batch]:
        for batch, _ in self.loader:
            yield batch


@dataclass(frozen=True)
class TrainBatches:
    """The batches of one rank, in the plan's order. Counts damaged samples, which the workers cannot: each sees some."""

    loader: DataLoader
    plan: ShardPlan
    max_skipped: int
    steps: range

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Batch]:
        epoch, damaged = -1, []
        for batch, found in self.loader:
            if epoch != self.plan.epoch_of(batch.step):
                epoch, damaged = self.plan.epoch_of(batch.step), []
            for sample in found:
                log.warning("sample %s skipped in step %d: %s", sample.key, batch.step, sample.rule)
            damaged += found
            _check_damage(damaged, self.max_skipped, epoch)
            yield batch


def build_train_plan(config: RunConfig, index: ShardIndex, *, world_size: int) -> ShardPlan:
    """The order of the training split; samples of one study never meet in one global batch."""
    shards = index.of_split(config.data.train_split)
    studies = [member.study for shard in shards for member in shard.members]
    return ShardPlan(
        [shard.samples for shard in shards],
        seed=config.seed,
        global_batch_size=config.train.micro_batch_size * world_size,
        groups=np.unique(np.array(studies, dtype="S12"), return_inverse=True)[1],
    )


def build_train_loader(
    config: RunConfig, *, rank: int, world_size: int, start_step: int = 0, stop_step: int
) -> TrainBatches:
    """This rank's share of the global batches start_step .. stop_step - 1, two views of every sample.

    A damaged sample is replaced by another one, logged by key and counted; above data.max_skipped damaged samples on
    a rank in one epoch, iterating raises RuntimeError.
    """
    index = load_index(config.data.shards)
    plan = build_train_plan(config, index, world_size=world_size)
    reader = ShardReader(index, config.data.train_split, impression_text=config.data.impression_text)
    views = TrainViews(config.data.augment, config.data.input_size)
    pipeline = DataPipeline(
        partial(_worker_share, range(start_step, stop_step)),
        partial(_load_planned, reader, plan, rank, world_size, config.data.max_skipped),
        partial(_map_images, partial(_train_views, views, config.seed, plan)),
        _collate,
    )
    loader = _in_workers(pipeline, config.data.workers)
    return TrainBatches(loader, plan, config.data.max_skipped, range(start_step, stop_step))


def build_eval_loader(
    shards: Path | ShardIndex,
    split: str,
    *,
    input_size: int,
    batch_size: int,
    workers: int,
    impression_text: str = "impression",
    rank: int = 0,
    world_size: int = 1,
    with_text: bool = True,
) -> EvalBatches:
    """Every sample of a split once, in index order, one view each; rank r has the r-th contiguous part.

    All ranks get the same number of batches of the same sizes, so that collectives match: the split's last sample is
    repeated to fill up, and whoever gathers drops repeats by key. Batch.step counts the batches. with_text=False reads
    no embeddings; the text fields are then empty. A damaged sample raises ValueError: a figure over most of a split
    is not a figure of the split.
    """
    index = shards if isinstance(shards, ShardIndex) else load_index(shards)
    reader = ShardReader(index, split, impression_text=impression_text, with_text=with_text)
    share = -(-reader.samples // world_size)
    mine = [min(rank * share + i, reader.samples - 1) for i in range(share)]
    pipeline = DataPipeline(
        partial(_worker_share, range(-(-share // batch_size))),
        partial(_load_listed, reader, mine, batch_size),
        partial(_map_images, partial(_eval_views, input_size)),
        _collate,
    )
    return EvalBatches(_in_workers(pipeline, workers), -(-share // batch_size))


def _in_workers(pipeline: DataPipeline, workers: int) -> DataLoader:
    """Run a pipeline in worker processes, or here where there are none.

    By fork: the first batch came after 1.4 s, with forkserver after 6 s and with spawn after 24 s (two workers, two busy
    cores), since those import the trainer's main module, DeepSpeed included, in every worker, and again for each
    evaluation. A worker may be forked beside the threads of gloo or NCCL because it never calls them, and computes on
    one thread; 160 forks beside busy all-reduces were tried.
    """
    return DataLoader(
        pipeline,  # type: ignore[arg-type]  # an IterableDataset, through a base that pyright cannot see
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        multiprocessing_context="fork" if workers else None,
    )


def _start_worker(worker: int) -> None:
    """Signals are the trainer's business: a drained run still wants the batches its workers hold."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _worker_share(steps: range) -> Iterator[int]:
    """Stage 1: the batches this worker makes, every W-th."""
    info = get_worker_info()
    return iter(steps[info.id :: info.num_workers] if info else steps)


def _load_planned(
    reader: ShardReader, plan: ShardPlan, rank: int, world_size: int, max_skipped: int, steps: Iterable[int]
) -> Iterator[Loaded]:
    """Stage 2 of training: this rank's samples of each step, a damaged one replaced as the plan says."""
    for step in steps:
        rows = plan.rank_batch(step, rank, world_size)
        samples: list[Sample] = []
        damaged: list[Damaged] = []
        for position, row in enumerate(rows, rank * len(rows)):
            substitutes = (plan.substitute(step, position, attempt) for attempt in count(1))
            for candidate in chain([row], substitutes):
                try:
                    samples.append(reader.read(candidate))
                    break
                except (ValueError, OSError) as error:
                    damaged.append(Damaged(reader.key(candidate), error_rule(error)))
                    _check_damage(damaged, max_skipped, plan.epoch_of(step))
        yield Loaded(step, samples, damaged)


def _load_listed(reader: ShardReader, samples: list[int], batch_size: int, steps: Iterable[int]) -> Iterator[Loaded]:
    """Stage 2 of evaluation."""
    for step in steps:
        rows = [reader.row_of(sample) for sample in samples[step * batch_size : (step + 1) * batch_size]]
        yield Loaded(step, [_read_or_name(reader, row) for row in rows], [])


def _read_or_name(reader: ShardReader, row: ShardRow) -> Sample:
    try:
        return reader.read(row)
    except (ValueError, OSError) as error:
        raise ValueError(f"sample {reader.key(row)}: {error_rule(error)}; {VERIFY}") from error


def _map_images(make_views: Callable[[Sample, int], Tensor], source: Iterable[Loaded]) -> Iterator[Loaded]:
    """Stage 3: radiographs [1, H, W] to views [V, 1, h, w]."""
    for loaded in source:
        samples = [sample._replace(image=make_views(sample, loaded.step)) for sample in loaded.samples]
        yield loaded._replace(samples=samples)


def _train_views(views: TrainViews, seed: int, plan: ShardPlan, sample: Sample, step: int) -> Tensor:
    text = f"{seed}/{plan.epoch_of(step)}/{sample.key}"
    return views(sample.image, int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big"))


def _eval_views(input_size: int, sample: Sample, step: int) -> Tensor:
    return eval_view(sample.image, input_size)[None]


def _collate(source: Iterable[Loaded]) -> Iterator[tuple[Batch, list[Damaged]]]:
    """Stage 4."""
    for step, samples, damaged in source:
        keys, images, findings, impression, has_findings, has_impression = zip(*samples, strict=True)
        batch = Batch(
            keys=list(keys),
            images=torch.stack(images),
            findings=torch.stack(findings),
            impression=torch.stack(impression),
            has_findings=torch.tensor(has_findings),
            has_impression=torch.tensor(has_impression),
            step=step,
        )
        yield batch, damaged


def _check_damage(damaged: list[Damaged], max_skipped: int, epoch: int) -> None:
    if len(damaged) > max_skipped:
        raise RuntimeError(
            f"data.max_skipped = {max_skipped}: {len(damaged)} damaged samples on this rank in epoch {epoch}, the last "
            f"{damaged[-1].key} ({damaged[-1].rule}); {VERIFY}, or raise data.max_skipped"
        )
