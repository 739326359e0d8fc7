import numpy as np
import pytest

from imitate_ds.data.shard_plan import ShardPlan

SIZES = (13, 7, 21, 1, 18)  # 60 samples
PINNED = [[(1, 1), (0, 1), (0, 2)], [(2, 1), (1, 2), (1, 0)]]


def _epoch(plan: ShardPlan, epoch: int) -> list[tuple[int, int]]:
    first = epoch * plan.steps_per_epoch
    return [row for step in range(first, first + plan.steps_per_epoch) for row in plan.global_batch(step)]


def test_an_epoch_shows_every_sample_once():
    plan = ShardPlan(SIZES, seed=3, global_batch_size=12, window=2)
    everything = {(shard, row) for shard, size in enumerate(SIZES) for row in range(size)}
    assert plan.steps_per_epoch == 5
    assert len(_epoch(plan, 0)) == 60
    assert set(_epoch(plan, 0)) == everything == set(_epoch(plan, 7))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_ranks_share_out_the_same_global_batch(world_size):
    plan = ShardPlan(SIZES, seed=3, global_batch_size=12)
    for step in (0, 4, 5, 17):
        parts = [plan.rank_batch(step, rank, world_size) for rank in range(world_size)]
        assert {len(part) for part in parts} == {12 // world_size}
        assert [row for part in parts for row in part] == plan.global_batch(step)


def test_order_depends_on_seed_and_epoch_only():
    plan = ShardPlan(SIZES, seed=3, global_batch_size=12)
    orders = [_epoch(plan, 0), _epoch(plan, 1), _epoch(ShardPlan(SIZES, seed=4, global_batch_size=12), 0)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert plan.global_batch(2) == orders[0][24:36], "asking for an earlier epoch again gives it again"


def test_order_is_pinned():
    """A run resumed with a newer program must go on in the order it began in."""
    plan = ShardPlan((3, 4, 2), seed=42, global_batch_size=3, window=2)
    assert [plan.global_batch(step) for step in (0, 3)] == PINNED


def test_a_window_of_shards_is_read_before_the_next():
    plan = ShardPlan((10,) * 8, seed=0, global_batch_size=5, window=2)
    shards = [shard for shard, _ in _epoch(plan, 0)]
    windows = [set(shards[i : i + 20]) for i in range(0, 80, 20)]
    assert [len(w) for w in windows] == [2, 2, 2, 2]
    assert set.union(*windows) == set(range(8))


def test_what_is_left_out_of_an_epoch_changes():
    plan = ShardPlan((7,), seed=0, global_batch_size=4)
    assert plan.steps_per_epoch == 1
    left_out = [frozenset(range(7)) - {row for _, row in plan.global_batch(epoch)} for epoch in range(4)]
    assert len(set(left_out)) > 1


def test_empty_shards_are_passed_over():
    plan = ShardPlan((0, 3, 0, 2, 0), seed=0, global_batch_size=5)
    assert set(plan.global_batch(0)) == {(1, 0), (1, 1), (1, 2), (3, 0), (3, 1)}


def test_substitutes_are_deterministic_and_reach_every_sample():
    plan = ShardPlan(SIZES, seed=1, global_batch_size=12)
    tried = [plan.substitute(7, 5, attempt) for attempt in range(1, 61)]
    assert len(set(tried)) == 60
    assert tried == [ShardPlan(SIZES, seed=1, global_batch_size=12).substitute(7, 5, a) for a in range(1, 61)]
    assert not set(plan.global_batch(7)) & {plan.substitute(7, position, 1) for position in range(12)}


def test_samples_of_one_study_are_kept_apart():
    groups = np.repeat(np.arange(20), 3)  # three radiographs each
    apart = ShardPlan(SIZES, seed=3, global_batch_size=6, groups=groups)
    starts = np.concatenate([[0], np.cumsum(SIZES)])

    def repeats(plan: ShardPlan, step: int) -> int:
        studies = [groups[starts[shard] + row] for shard, row in plan.global_batch(step)]
        return len(studies) - len(set(studies))

    assert sum(repeats(ShardPlan(SIZES, seed=3, global_batch_size=6), step) for step in range(10)) > 0
    assert [repeats(apart, step) for step in range(9)] == [0] * 9  # the last batch of an epoch has nobody to swap with
    assert len(set(_epoch(apart, 0))) == 60


def test_too_few_samples_says_what_to_change():
    with pytest.raises(ValueError, match=r"data\.shards: 60 .* 5 shards, fewer .* 64 .*micro_batch_size") as error:
        ShardPlan(SIZES, seed=0, global_batch_size=64)
    assert "fewer ranks" in str(error.value)
    assert "imitate-ds shards build" in str(error.value)


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(ValueError, match="12: must be divisible by the 5 ranks"):
        ShardPlan(SIZES, seed=0, global_batch_size=12).rank_batch(0, 0, 5)


def test_groups_of_another_length_are_refused():
    with pytest.raises(ValueError, match="groups: 3 of them for 60 samples"):
        ShardPlan(SIZES, seed=0, global_batch_size=12, groups=np.zeros(3, dtype=np.int64))
