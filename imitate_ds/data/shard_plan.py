"""Which sample, in which order, on which rank: pure integers, no I/O.

The order of an epoch is a function of (seed, epoch) alone: shards permuted, then samples permuted inside windows of a
few shards, so that reading stays within a few files at a time. Global batch b of the epoch is order[b*G : (b+1)*G] and
a rank takes its contiguous slice of it. A run may therefore stop on 4 ranks and go on with 3, or start in mid-epoch,
without reading what came before; the whole state is one global step.
"""

from collections.abc import Sequence

import numpy as np

ShardRow = tuple[int, int]  # (number of the shard, row inside it)


class ShardPlan:
    """The order in which a run sees the samples of its training shards.

    shard_sizes: samples per shard. groups: one integer per sample, shard after shard, equal for samples that show the
    same study; such samples are kept out of each other's global batch, where they would be false negatives.

    Steps are global: step s lies in epoch s // steps_per_epoch. What does not fill a last global batch is left out of
    that epoch (other samples in each). Raises ValueError where the samples do not fill one global batch.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        seed: int,
        global_batch_size: int,
        window: int = 8,
        groups: np.ndarray | None = None,
    ):
        self.shard_sizes = tuple(shard_sizes)
        self.samples = sum(shard_sizes)
        if self.samples < global_batch_size:
            raise ValueError(
                f"data.shards: {self.samples} training samples in {len(shard_sizes)} shards, fewer than one global "
                f"batch of {global_batch_size} (train.micro_batch_size x ranks); lower train.micro_batch_size, use "
                "fewer ranks, or build more shards with 'imitate-ds shards build'"
            )
        if groups is not None and len(groups) != self.samples:
            raise ValueError(f"groups: {len(groups)} of them for {self.samples} samples; one per sample is needed")
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.window = window
        self.steps_per_epoch = self.samples // global_batch_size
        self._starts = np.cumsum([0, *shard_sizes], dtype=np.int64)
        self._groups = groups
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def global_batch(self, step: int) -> list[ShardRow]:
        """The samples of one step over all ranks: the same for any world size."""
        start = step % self.steps_per_epoch * self.global_batch_size
        order = self._epoch_order(self.epoch_of(step))
        return self._shard_rows(order[start : start + self.global_batch_size])

    def rank_batch(self, step: int, rank: int, world_size: int) -> list[ShardRow]:
        """This rank's contiguous slice of the step's global batch."""
        if self.global_batch_size % world_size:
            raise ValueError(
                f"global batch size {self.global_batch_size}: must be divisible by the {world_size} ranks; "
                "it is train.micro_batch_size x ranks"
            )
        size = self.global_batch_size // world_size
        return self.global_batch(step)[rank * size : (rank + 1) * size]

    def substitute(self, step: int, position: int, attempt: int) -> ShardRow:
        """Who steps in for the damaged sample at a position of a step's global batch, at the 1st, 2nd, ... attempt.

        The sample half an epoch away: as rarely as possible one of the same batch, and the same for any world size.
        """
        order = self._epoch_order(self.epoch_of(step))
        damaged = step % self.steps_per_epoch * self.global_batch_size + position
        place = (damaged + self.samples // 2 + attempt - 1) % self.samples
        return self._shard_rows(order[place : place + 1])[0]

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """Sample numbers, counted over all shards, in this epoch's order. Only the latest epoch is held."""
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._draw_order(epoch)
        return self._order

    def _draw_order(self, epoch: int) -> np.ndarray:
        # Sorting the raw words of PCG64, which NumPy promises to keep, unlike the streams of Generator.permutation:
        # a run resumed under another NumPy must not see another order.
        bits = np.random.PCG64([self.seed, epoch])
        shards = np.argsort(bits.random_raw(len(self._starts) - 1), kind="stable")
        windows = []
        for first in range(0, len(shards), self.window):
            rows = np.concatenate([self._samples_of(shard) for shard in shards[first : first + self.window]])
            windows.append(rows[np.argsort(bits.random_raw(len(rows)), kind="stable")])
        order = np.concatenate(windows)
        if self._groups is not None:
            _part_groups(order, self._groups, self.global_batch_size)
        return order

    def _samples_of(self, shard: int) -> np.ndarray:
        return np.arange(int(self._starts[shard]), int(self._starts[shard + 1]))

    def _shard_rows(self, samples: np.ndarray) -> list[ShardRow]:
        shards = np.searchsorted(self._starts, samples, side="right") - 1
        return list(zip(shards.tolist(), (samples - self._starts[shards]).tolist(), strict=True))


def _part_groups(order: np.ndarray, groups: np.ndarray, batch: int) -> None:
    """Swap, in place, a sample whose group is already in its batch with the first later one whose group is not.

    Near the end of an epoch there may be none left; the collision then stays.
    """
    for start in range(0, len(order) - batch + 1, batch):
        end = start + batch
        present, first = np.unique(groups[order[start:end]], return_index=True)
        seen = set(present.tolist())
        for repeat in start + np.setdiff1d(np.arange(batch), first):
            later = next((i for i in range(end, len(order)) if int(groups[order[i]]) not in seen), None)
            if later is None:
                return
            order[[repeat, later]] = order[[later, repeat]]
            seen.add(int(groups[order[repeat]]))
