"""Which sample, in which order, on which rank: pure integers, no I/O.

The order of an epoch is a function of (seed, epoch) alone. Shards are permuted; a window of a few thousand samples moves
over them; the samples of a window are dealt to its global batches at random, each study to batches of its own. So
reading stays within a few files at a time, and no study is its own negative.

A global batch is the same set for any number of ranks. Inside it samples lie in the order of the shards, and a rank
takes a contiguous slice: its share of a window is a few whole shards, whatever the number of ranks. The whole state of
the data is one global step.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

PLAN = 2  # version of the order: a run goes on only in the order that it began in
WINDOW_SAMPLES = 4096  # samples that are mixed with each other, at least; eight shards of the usual size
WINDOW_BATCHES = 8  # and at least so many global batches
SUBSTITUTES = 16  # batches that are searched for substitutes
DEALING, PASSES, SHARES = 1, 2, 3  # streams of random words


class PlannedSample(NamedTuple):
    shard: int  # counted over all folders
    row: int  # inside the shard
    visit: int  # which pass over its folder this is; the epoch, where every folder has weight 1


class Folder(NamedTuple):
    """What the plan must know of one shard folder."""

    shard_sizes: Sequence[int]
    groups: np.ndarray  # integers [samples], equal for samples that must not meet: those of one study, or one patient
    weight: float = 1.0  # passes over the folder in an epoch
    rows: np.ndarray | None = None  # integers [samples], where in its shard a sample is; None: they follow each other

    def only(self, kept: np.ndarray) -> "Folder":
        """The same with some of its samples: kept is bool [samples], the shards one after another."""
        sizes = [int(part.sum()) for part in np.split(kept, np.cumsum(self.shard_sizes)[:-1])]
        return Folder(sizes, self.groups[kept], self.weight, self.places()[kept])

    def places(self) -> np.ndarray:
        """Where in its shard every sample is, [samples]."""
        return np.concatenate([np.arange(size) for size in self.shard_sizes]) if self.rows is None else self.rows


class ShardPlan:
    """The order in which a run sees the samples of its training shards.

    Steps are global: step s lies in epoch s // steps_per_epoch. What does not fill a last global batch is left out of
    that epoch (other samples in each); so are samples of a group that has more of them than the epoch has batches.
    Raises ValueError where there are not enough different groups for one global batch.
    """

    def __init__(
        self, folders: Sequence[Folder], seed: int, global_batch_size: int, *, window_samples: int = WINDOW_SAMPLES
    ):
        self.seed = seed
        self.global_batch_size = global_batch_size
        self._passes = [_Passes(folder, seed, number) for number, folder in enumerate(folders)]
        self.samples = sum(part.per_epoch for part in self._passes)
        self._shard_starts = np.cumsum(
            [0, *(size for folder in folders for size in folder.shard_sizes)], dtype=np.int64
        )
        self._folder_starts = np.cumsum([0, *(part.samples for part in self._passes)], dtype=np.int64)
        self._rows = None if all(f.rows is None for f in folders) else np.concatenate([f.places() for f in folders])
        self._groups = np.unique(np.concatenate([f.groups for f in folders]), return_inverse=True)[1].astype(np.int32)
        self.window_samples = max(window_samples, WINDOW_BATCHES * global_batch_size)
        self.steps_per_epoch = self._most_batches()
        if not self.steps_per_epoch:
            raise ValueError(
                f"data.shards: {self.samples} training samples of {self._groups.max(initial=-1) + 1} studies in "
                f"{len(self._shard_starts) - 1} shards, fewer than one global batch of {global_batch_size} "
                "(train.global_batch_size, or train.micro_batch_size x ranks) may need, for none meets itself (data.apart); "
                "lower it, raise a weight or data.share, or build more shards with 'imitate-ds shards build'"
            )
        self._epoch, self._order = -1, np.empty((0, 0), dtype=np.int64)
        self._substitutes: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    @property
    def different(self) -> int:
        """Samples that can be visited; `samples` counts how many an epoch visits, by the folders' weights."""
        return int(self._folder_starts[-1])

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def global_batch(self, step: int) -> list[PlannedSample]:
        """The samples of one step over all ranks: the same for any world size."""
        return self._planned(self._batch(step))

    def rank_batch(self, step: int, rank: int, world_size: int) -> list[PlannedSample]:
        """This rank's contiguous slice of the step's global batch."""
        rows = rank_rows(self.global_batch_size, rank, world_size)
        return self._planned(self._batch(step)[rows.start : rows.stop])

    def substitute(self, step: int, position: int, attempt: int) -> PlannedSample:
        """Who steps in for the damaged sample at a position of a step's global batch, at the 1st, 2nd, ... attempt.

        A sample of about half an epoch away, whose group is not in the batch: the same for any number of ranks, and
        another one for every position and attempt. Raises RuntimeError where there is none left.
        """
        own = self._substitutes_of(step)[position :: self.global_batch_size]  # of this position alone
        if attempt > len(own):
            raise RuntimeError(
                f"step {step}: {len(own)} samples could step in for the damaged one at position {position} of the batch, and all "
                "are damaged too; check the shards with 'imitate-ds shards verify'"
            )
        return self._planned(own[attempt - 1 : attempt])[0]

    def _batch(self, step: int) -> np.ndarray:
        return self._epoch_order(self.epoch_of(step))[step % self.steps_per_epoch]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """The visited samples of an epoch, [steps_per_epoch, global_batch_size]. Only the latest epoch is held."""
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._draw_order(epoch)
        return self._order

    def _draw_order(self, epoch: int) -> np.ndarray:
        visits = self._visits_of(epoch)
        bits = np.random.PCG64([self.seed, DEALING, epoch])
        windows = max(1, len(visits) // self.window_samples)
        order = self._deal_windows(visits, bits, windows)
        while len(order) < self.steps_per_epoch:  # some group has more samples in a window than that has batches
            windows //= 2
            order = self._deal_windows(visits, bits, windows)
        return order[: self.steps_per_epoch]

    def _visits_of(self, epoch: int) -> np.ndarray:
        """All that an epoch visits, in the order of the shards; folders are spread evenly over it.

        A visit is one number, pass * (samples of all folders) + sample.
        """
        parts = [
            part.visits(epoch, first, int(self._folder_starts[-1]))
            for part, first in zip(self._passes, self._folder_starts, strict=False)
        ]
        if len(parts) == 1:
            return parts[0]
        times = np.concatenate([(np.arange(len(part)) + 0.5) / max(1, len(part)) for part in parts])
        return np.concatenate(parts)[np.argsort(times, kind="stable")]

    def _deal_windows(self, visits: np.ndarray, bits: np.random.PCG64, windows: int) -> np.ndarray:
        """Deal every window to batches; what is left over goes on into the next window."""
        batches: list[np.ndarray] = []
        rest = np.empty(0, dtype=np.int64)
        for part in np.array_split(visits, windows):
            pool = np.concatenate([rest, part])
            dealt, rest = _deal(pool, self._groups[pool % self._folder_starts[-1]], self.global_batch_size, bits)
            batches.append(dealt)
        return np.concatenate(batches)

    def _most_batches(self) -> int:
        """The largest number of batches that every epoch can fill without a group twice in one of them."""
        repeats = np.concatenate([np.full(part.samples, part.most_visits) for part in self._passes])
        counts = np.sort(np.bincount(self._groups, weights=repeats).astype(np.int64))[::-1]
        # No epoch visits more than self.samples: at worst the largest groups, as often as they can come.
        shares = np.clip((self.samples - (np.cumsum(counts) - counts)) / np.maximum(counts, 1), 0, 1)
        return _most(
            self.samples // self.global_batch_size,
            lambda batches: (
                self.samples - np.ceil((shares * np.maximum(counts - batches, 0)).sum())
                >= batches * self.global_batch_size
            ),
        )

    def _substitutes_of(self, step: int) -> np.ndarray:
        if step != self._substitutes[0]:
            order = self._epoch_order(self.epoch_of(step))
            place = step % len(order)
            away = (place + len(order) // 2 + np.arange(min(SUBSTITUTES, len(order)))) % len(order)
            ring = order[away].ravel() if len(order) > 1 else self._visits_of(self.epoch_of(step))
            groups = self._groups[ring % self._folder_starts[-1]]
            first = np.sort(np.unique(groups, return_index=True)[1])
            absent = ~np.isin(groups[first], self._groups[order[place] % self._folder_starts[-1]])
            self._substitutes = step, ring[first[absent]]
        return self._substitutes[1]

    def _planned(self, visits: np.ndarray) -> list[PlannedSample]:
        passes, samples = np.divmod(visits, self._folder_starts[-1])
        shards = np.searchsorted(self._shard_starts, samples, side="right") - 1
        rows = samples - self._shard_starts[shards] if self._rows is None else self._rows[samples]
        return list(map(PlannedSample, shards.tolist(), rows.tolist(), passes.tolist()))


def rank_rows(global_batch_size: int, rank: int, world_size: int) -> range:
    """Which rows of a global batch are a rank's: shares differ by one at most, whatever the number of ranks."""
    return range(global_batch_size * rank // world_size, global_batch_size * (rank + 1) // world_size)


def drawn_patients(patients: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Whether a sample is of one of the drawn patients, bool [samples]: a share of all patients, at least one.

    By one random order of the patients, of which a share is the beginning: what 0.1 holds, 0.5 holds too.
    """
    names, inverse = np.unique(patients, return_inverse=True)
    order = np.argsort(np.random.PCG64([seed, SHARES]).random_raw(len(names)), kind="stable")
    drawn = np.zeros(len(names), dtype=bool)
    drawn[order[: max(1, round(share * len(names)))]] = True
    return drawn[inverse]


class _Passes:
    """The passes over one folder: all its samples, shard after shard, in another order of the shards in each."""

    def __init__(self, folder: Folder, seed: int, number: int):
        self.sizes = np.array(folder.shard_sizes, dtype=np.int64)
        self.samples = int(self.sizes.sum())
        if len(folder.groups) != self.samples:
            raise ValueError(
                f"groups: {len(folder.groups)} of them for {self.samples} samples; one per sample is needed"
            )
        self.per_epoch = round(folder.weight * self.samples)
        whole, part = divmod(self.per_epoch, max(1, self.samples))
        # of one sample: an epoch may begin and end in mid-pass, but for weights such as 0.5
        self.most_visits = whole + (2 if part and self.samples % part else bool(part))
        if self.samples and not self.per_epoch:
            raise ValueError(
                f"data.shards: weight {folder.weight} of {self.samples} samples is less than one an epoch; give at least "
                f"{1 / self.samples:.1g}, or leave the folder out"
            )
        self.seed, self.number = seed, number

    def visits(self, epoch: int, first_sample: int, all_samples: int) -> np.ndarray:
        """The part of the endless sequence of passes that belongs to an epoch."""
        start, stop = epoch * self.per_epoch, (epoch + 1) * self.per_epoch
        parts = [np.empty(0, dtype=np.int64)]
        while start < stop:
            number, place = divmod(start, self.samples)
            taken = self._one_pass(number)[place : place + stop - start]
            parts.append(taken + (first_sample + number * all_samples))
            start += len(taken)
        return np.concatenate(parts)

    def _one_pass(self, number: int) -> np.ndarray:
        # Sorting the raw words of PCG64, which NumPy promises to keep, unlike the streams of Generator.permutation:
        # a run resumed under another NumPy must not see another order.
        words = np.random.PCG64([self.seed, PASSES, self.number, number]).random_raw(len(self.sizes))
        order = np.argsort(words, kind="stable")
        starts = (np.cumsum(self.sizes) - self.sizes)[order]
        sizes = self.sizes[order]
        return np.arange(self.samples) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)


def _deal(pool: np.ndarray, groups: np.ndarray, batch: int, bits: np.random.PCG64) -> tuple[np.ndarray, np.ndarray]:
    """As many batches [b, batch] as the pool fills without a group twice in one, and what is left, in the pool's order.

    Samples are put in random order, those of a group side by side, and dealt like cards: neighbours never get into the
    same batch as long as no group has more of them than there are batches.
    """
    if not len(pool):
        return np.empty((0, batch), dtype=np.int64), pool
    shuffled = np.argsort(bits.random_raw(len(pool)), kind="stable")
    _, first, inverse, counts = np.unique(groups[shuffled], return_index=True, return_inverse=True, return_counts=True)
    beside = np.argsort(first[inverse], kind="stable")
    cards = shuffled[beside]
    numbers = np.arange(len(cards))
    place = numbers - np.maximum.accumulate(np.where(np.diff(inverse[beside], prepend=-1), numbers, 0))  # in its group
    batches = _most(len(pool) // batch, lambda batches: np.minimum(counts, batches).sum() >= batches * batch)
    dealt = cards[place < batches][: batches * batch]
    left = np.ones(len(pool), dtype=bool)
    left[dealt] = False
    left[
        cards[place >= max(1, 2 * batches)]
    ] &= not batches  # of a group too large to be dealt, more would only pile up
    return pool[np.sort(dealt.reshape(batch, batches).T, axis=1)], pool[left]


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number of batches that fits, where a smaller one always does: what can be dealt is concave."""
    return bisect_left(range(1, limit + 1), True, key=lambda batches: not fits(batches))
