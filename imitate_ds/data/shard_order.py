"""What was in the batch when the loss spiked: the plan of a run, as keys."""

from collections.abc import Iterator, Sequence

from imitate_ds.config import DataConfig
from imitate_ds.data.shard_plan import PlannedSample
from imitate_ds.data.train_plan import build_train_plan, open_train_folders


def order_lines(
    data: DataConfig,
    *,
    seed: int,
    global_batch_size: int,
    steps: range,
    world_size: int = 0,
    workers: int = 0,
    start_step: int = 0,
) -> Iterator[str]:
    """One line a step, `STEP KEY KEY ...`, keys sorted: the global batch, the same for any number of ranks.

    With a world_size one line a step and rank, `STEP rank R worker W KEY ...`, keys in the order of the batch; W is for a
    run that began, or was resumed, at start_step. Raises ValueError where the shards or their split do not suit.
    """
    folders = open_train_folders(data, check_files=False)  # a damaged folder is when this is asked
    shards = [shard for folder in folders for shard in folder.of_split(data.train_split)]
    plan = build_train_plan(data, folders, seed=seed, global_batch_size=global_batch_size)

    def keys(rows: Sequence[PlannedSample]) -> list[str]:
        return [shards[row.shard].members[row.row].key for row in rows]

    for step in steps:
        if not world_size:
            yield " ".join([str(step), *sorted(keys(plan.global_batch(step)))])
        for rank in range(world_size):
            worker = (step - start_step) % max(1, workers)
            yield " ".join([f"{step} rank {rank} worker {worker}", *keys(plan.rank_batch(step, rank, world_size))])
