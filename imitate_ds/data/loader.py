"""Shards -> batches: the plan says which samples, workers read, decode and augment them, whole batches come out.

The plan stays in the training process, which hands each worker the samples of its next batch; so a worker holds no more
for a million samples than for a hundred, and batches arrive in the plan's order whatever the number of workers.
"""

import copy
import hashlib
import json
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from imitate_ds.batch import Batch, Tokens
from imitate_ds.config import DataConfig, RunConfig
from imitate_ds.data.batch_buffers import BatchBuffers
from imitate_ds.data.shard_index import ShardIndex, write_atomic
from imitate_ds.data.shard_plan import PlannedSample, ShardPlan, rank_rows
from imitate_ds.data.shard_reader import Sample, ShardReader
from imitate_ds.data.shard_sample import error_rule
from imitate_ds.data.shard_store import UnreachableError
from imitate_ds.data.train_plan import build_train_plan, open_train_folders
from imitate_ds.data.transforms import VIEWS, TrainViews, eval_view
from imitate_ds.data.worker_processes import PREFETCHED_BY_WORKER, in_workers

log = logging.getLogger(__name__)

Tokenize = Callable[[Sequence[str]], list[list[int]]]  # texts -> the ids of their tokens

VERIFY = "check the shards with 'imitate-ds shards verify'"


class Damaged(NamedTuple):
    """A sample that could not be used, and the rule it broke."""

    key: str
    rule: str


class Request(NamedTuple):
    """What a worker is asked for: the samples of one step on this rank."""

    step: int
    rows: list[PlannedSample]
    buffer: int | None  # where its views are to be written


class _TrainSet(Dataset):
    """A request -> its batch, in whichever process asks."""

    def __init__(
        self, reader: ShardReader, plan: ShardPlan, config: RunConfig, first_row: int, tokenize: Tokenize | None
    ):
        self.reader = reader
        self.tokenize = tokenize
        self.plan = plan
        self.first_row = first_row  # of the global batch
        self.seed = config.seed
        self.max_skipped = config.data.max_skipped
        self.views = TrainViews(config.data.augment, config.data.input_size)
        self.on_device = config.data.augment_on == "device"
        self.buffers: BatchBuffers | None = None

    def __getitem__(self, request: Request) -> tuple[Batch, list[Damaged], int | None]:
        """A packed batch, what was damaged in it, and the buffer that holds its views, which then are not in the batch."""
        step, rows, buffer = request
        read = [self._read(step, self.first_row + place, row) for place, row in enumerate(rows)]
        samples = [sample for sample, _, _ in read]
        seeds = [view_seed(self.seed, where.visit, sample.key) for sample, where, _ in read]
        damaged = [found for _, _, several in read for found in several]
        _check_damage(damaged, self.max_skipped, self.plan.epoch_of(step))
        images, draws = torch.stack([sample.image for sample in samples]), self.views.draw(seeds)
        batch = _collate(samples, images[:, None], step, self.tokenize)
        if self.on_device:
            return _packed(batch._replace(draws=draws)), damaged, None
        if self.buffers is None or buffer is None:
            return _packed(batch._replace(images=self.views(images, draws))), damaged, None
        self.views(images, draws, out=self.buffers.to_fill(buffer))
        return _packed(batch._replace(images=torch.empty(0))), damaged, buffer

    def _read(self, step: int, position: int, row: PlannedSample) -> tuple[Sample, PlannedSample, list[Damaged]]:
        """A planned sample, or the first of its substitutes that is whole."""
        damaged: list[Damaged] = []
        for where in chain([row], (self.plan.substitute(step, position, attempt) for attempt in count(1))):
            try:
                return self.reader.read(where, at_least=self.views.decode_side), where, damaged
            except (UnreachableError, PermissionError):
                raise  # the network's damage, not the sample's: to skip it would change what is trained on
            except (ValueError, OSError) as error:
                damaged.append(Damaged(self.reader.key(where), error_rule(error)))
                _check_damage(damaged, self.max_skipped, self.plan.epoch_of(step))
        raise AssertionError("substitutes never end")


class _EvalSet(Dataset):
    def __init__(
        self, reader: ShardReader, samples: list[int], batch_size: int, input_size: int, tokenize: Tokenize | None
    ):
        self.reader = reader
        self.tokenize = tokenize
        self.samples = samples
        self.batch_size = batch_size
        self.input_size = input_size

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __getitem__(self, step: int) -> Batch:
        mine = self.samples[step * self.batch_size : (step + 1) * self.batch_size]
        samples = [self._read(self.reader.row_of(sample)) for sample in mine]
        views = [eval_view(sample.image, self.input_size)[None] for sample in samples]
        return _collate(samples, torch.stack(views), step, self.tokenize)

    def _read(self, where: PlannedSample) -> Sample:
        try:
            return self.reader.read(where)
        except (UnreachableError, PermissionError):
            raise
        except (ValueError, OSError) as error:
            raise ValueError(f"sample {self.reader.key(where)}: {error_rule(error)}; {VERIFY}") from error


@dataclass(frozen=True)
class TrainBatches:
    """The batches of one rank, in the plan's order. Counts damaged samples, which the workers cannot: each sees some.

    skipped: how many samples were passed over for each reason, in all that was iterated so far.
    """

    samples: "_TrainSet"
    requests: "_Requests"
    workers: int
    record: Path | None
    skipped: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.requests)

    def __iter__(self) -> Iterator[Batch]:
        samples, buffers = copy.copy(self.samples), self._new_buffers()
        samples.buffers = buffers
        plan, requests = samples.plan, replace(self.requests, buffers=buffers)
        epoch = plan.epoch_of(self.requests.steps.start)
        damaged = self._noted_before(epoch)
        for batch, found, buffer in in_workers(samples, self.workers, requests):
            if epoch != plan.epoch_of(batch.step):
                epoch, damaged = plan.epoch_of(batch.step), []
            self._note(batch.step, found)
            damaged += found
            _check_damage(damaged, samples.max_skipped, epoch)
            if buffers and buffer is not None:
                batch = batch._replace(images=_pinned(buffers.lend(buffer)))
            yield _unpacked(batch)

    def _new_buffers(self) -> BatchBuffers | None:
        """For the batches on their way, the one in use, and the one before it."""
        if not self.workers or self.samples.on_device:
            return None
        rows, size = self.requests.rows, self.samples.views.input_size
        return BatchBuffers(PREFETCHED_BY_WORKER * self.workers + 2, (rows, VIEWS, 1, size, size))

    def _noted_before(self, epoch: int) -> list[Damaged]:
        """What this rank skipped in the epoch before a resume; lines of steps that are now done again are dropped."""
        if not self.record or not self.record.is_file():
            return []
        lines = [
            json.loads(line)
            for line in self.record.read_text(encoding="utf-8").splitlines(keepends=True)
            if line[-1] == "\n"
        ]
        kept = [line for line in lines if line["step"] < self.requests.steps.start]
        write_atomic(self.record, "".join(json.dumps(line) + "\n" for line in kept).encode())
        return [
            Damaged(line["key"], line["rule"]) for line in kept if self.samples.plan.epoch_of(line["step"]) == epoch
        ]

    def _note(self, step: int, found: list[Damaged]) -> None:
        self.skipped.update(sample.rule for sample in found)
        for sample in found:
            log.warning("sample %s skipped in step %d: %s", sample.key, step, sample.rule)
        if found and self.record:
            lines = [json.dumps({"step": step, **sample._asdict()}) + "\n" for sample in found]
            with self.record.open("a", encoding="utf-8") as file:
                file.writelines(lines)


def build_train_loader(
    config: RunConfig,
    *,
    rank: int,
    world_size: int,
    start_step: int = 0,
    stop_step: int,
    global_batch_size: int = 0,
    folders: Sequence[ShardIndex] | None = None,
    record: Path | None = None,
    tokenize: Tokenize | None = None,
) -> TrainBatches:
    """This rank's share of the global batches start_step .. stop_step - 1, two views of every sample.

    global_batch_size: that of the run; 0: as config says for world_size ranks. tokenize: batches hold tokens too.

    A damaged sample is replaced by another one, logged by key, counted, and written to `record` (JSON lines) if given;
    above data.max_skipped damaged samples on a rank in one epoch, iterating raises RuntimeError.
    """
    data = config.data
    folders = folders or open_train_folders(data)
    global_batch_size = global_batch_size or config.train.studies_of(world_size)
    plan = build_train_plan(data, folders, seed=config.seed, global_batch_size=global_batch_size)
    for folder in folders:
        _check_cache(folder, data, plan)
    reader = ShardReader(
        folders,
        data.train_split,
        impression_text=data.impression_text,
        verify=data.verify,
        may_lack_text=data.max_skipped > 0,
        with_words=tokenize is not None,
    )
    requests = _Requests(plan, reader, rank, world_size, range(start_step, stop_step))
    first_row = rank_rows(global_batch_size, rank, world_size).start
    return TrainBatches(_TrainSet(reader, plan, config, first_row, tokenize), requests, data.workers, record)


def _check_cache(folder: ShardIndex, data: DataConfig, plan: ShardPlan) -> None:
    """A cache that holds less than this window of shards and the next would fetch every shard many times."""
    shards = folder.of_split(data.train_split)
    whole = sum(shard.bytes for shard in shards)
    read = data.share * sum(shard.samples for shard in shards)  # a share lies scattered over all shards
    window = whole * min(1.0, plan.window_samples / max(1.0, read))
    needed = (
        min(whole, 3 * window) / 2**30
    )  # the one that is read, the one that is fetched, and what lies across their ends
    if folder.store and data.cache_gib < needed:
        raise ValueError(
            f"data.cache_gib = {data.cache_gib}: {folder.store.location} needs {needed:.2g} GiB, for the shards that are read "
            "together and the next; raise it, or copy the folder to a local disk"
        )


@dataclass(frozen=True)
class _Requests:
    """What the training process asks its workers for, step after step; may be iterated again."""

    plan: ShardPlan
    reader: ShardReader
    rank: int
    world_size: int
    steps: range
    buffers: BatchBuffers | None = None

    @property
    def rows(self) -> int:
        return len(rank_rows(self.plan.global_batch_size, self.rank, self.world_size))

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Request]:
        planned = ((step, self.plan.rank_batch(step, self.rank, self.world_size)) for step in self.steps)
        for step, rows in self._prefetched(planned) if self.reader.remote else planned:
            yield Request(step, rows, self.buffers.take() if self.buffers else None)

    def _prefetched(self, planned: Iterator[tuple[int, list[PlannedSample]]]) -> Iterator:
        """The same, each a few batches after its shards were asked for."""
        waiting: deque[tuple[int, list[PlannedSample]]] = deque()
        asked: set[int] = set()
        for step, rows in planned:
            shards = {row.shard for row in rows}
            self.reader.prefetch(sorted(shards - asked))
            asked = shards
            waiting.append((step, rows))
            if len(waiting) > self.plan.window_samples // self.plan.global_batch_size:
                yield waiting.popleft()
        yield from waiting


def build_eval_loader(
    folders: ShardIndex | Sequence[ShardIndex],
    split: str,
    *,
    input_size: int,
    batch_size: int,
    workers: int,
    impression_text: str = "impression",
    rank: int = 0,
    world_size: int = 1,
    with_text: bool = True,
    text_encoder: str = "",
    tokenize: Tokenize | None = None,
) -> DataLoader:
    """Every sample of a split once, in index order, one view each; rank r has the r-th contiguous part.

    All ranks get the same number of batches of the same sizes, so that collectives match: the split's last sample is
    repeated to fill up, and whoever gathers drops repeats by key. Batch.step counts the batches. with_text=False reads
    no embeddings; the text fields are then empty. tokenize: batches hold tokens too. A damaged sample raises ValueError:
    a figure over most of a split is not a figure of the split.
    """
    folders = [folders] if isinstance(folders, ShardIndex) else folders
    reader = ShardReader(
        folders,
        split,
        impression_text=impression_text,
        with_text=with_text,
        with_words=tokenize is not None,
        text_encoder=text_encoder,
    )
    share = -(-reader.samples // world_size)
    mine = [min(rank * share + i, reader.samples - 1) for i in range(share)]
    batches = _EvalSet(reader, mine, batch_size, input_size, tokenize)
    return in_workers(batches, workers, range(len(batches)))


def _pinned(tensor: Tensor) -> Tensor:
    """In memory that a GPU reads while the CPU goes on; of images the copy also gives the worker its buffer back at once."""
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


def view_seed(seed: int, visit: int, key: str) -> int:
    """The same views of a sample in the same visit, wherever and in whatever order they are made."""
    text = f"{seed}/{visit}/{key}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


def _collate(samples: list[Sample], images: Tensor, step: int, tokenize: Tokenize | None) -> Batch:
    keys, _, findings, impression, has_findings, has_impression, words = zip(*samples, strict=True)
    return Batch(
        keys=list(keys),
        images=images,
        findings=torch.stack(findings).float(),
        impression=torch.stack(impression).float(),
        has_findings=torch.tensor(has_findings),
        has_impression=torch.tensor(has_impression),
        step=step,
        tokens=_tokens(words, tokenize) if tokenize else None,
    )


def _tokens(reports: Sequence[tuple[str, str]], tokenize: Tokenize) -> Tokens:
    """Of findings and impression of every report; one that is missing has none, not even the marks of a text."""
    sections = [section for report in reports for section in report]
    found = iter(tokenize([section for section in sections if section]))
    ids = [next(found) if section else [] for section in sections]
    lengths = torch.tensor([len(numbers) for numbers in ids]).view(-1, 2)
    return Tokens(torch.tensor([number for numbers in ids for number in numbers], dtype=torch.int32), lengths)


def _packed(batch: Batch) -> Batch:
    """With numpy arrays, all but the images: they go through the pipe by value. A tensor costs two handshakes of the worker
    with the training process, 1 ms for each of the four small ones."""
    tokens = batch.tokens and Tokens(*(part.numpy() for part in batch.tokens))  # type: ignore[arg-type]
    small = {name: value.numpy() for name, value in _small_tensors(batch, Tensor)}
    return batch._replace(**{**small, "tokens": tokens})


def _unpacked(batch: Batch) -> Batch:
    small = {name: _pinned(torch.from_numpy(value)) for name, value in _small_tensors(batch, np.ndarray)}
    tokens = batch.tokens and Tokens(*(_pinned(torch.from_numpy(part)) for part in batch.tokens))
    return batch._replace(**{**small, "tokens": tokens})


def _small_tensors(batch: Batch, kind: type) -> Iterator[tuple[str, Any]]:
    return ((name, value) for name, value in batch._asdict().items() if name != "images" and isinstance(value, kind))


def _check_damage(damaged: list[Damaged], max_skipped: int, epoch: int) -> None:
    if len(damaged) > max_skipped:
        raise RuntimeError(
            f"data.max_skipped = {max_skipped}: {len(damaged)} damaged samples on this rank in epoch {epoch}, the last "
            f"{damaged[-1].key} ({damaged[-1].rule}); {VERIFY}, or raise data.max_skipped"
        )
