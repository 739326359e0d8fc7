import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imitate_ds.data.shard_plan import Folder, PlannedSample, ShardPlan, drawn_patients

SIZES = (13, 7, 21, 1, 18)  # 60 samples
PINNED = [[(2, 0), (2, 1), (1, 0)], [(2, 0), (0, 0), (1, 1)]]


def _plan(sizes=SIZES, batch=12, groups=None, seed=3, weight=1.0, **options) -> ShardPlan:
    groups = np.arange(sum(sizes)) if groups is None else groups
    return ShardPlan([Folder(sizes, groups, weight)], seed=seed, global_batch_size=batch, **options)


def _epoch(plan: ShardPlan, epoch: int) -> list[PlannedSample]:
    first = epoch * plan.steps_per_epoch
    return [row for step in range(first, first + plan.steps_per_epoch) for row in plan.global_batch(step)]


def _places(rows: list[PlannedSample]) -> list[tuple[int, int]]:
    return [(row.shard, row.row) for row in rows]


def _groups_in(plan: ShardPlan, groups: np.ndarray, sizes, step: int) -> list[int]:
    starts = np.cumsum([0, *sizes])
    return [int(groups[starts[row.shard] + row.row]) for row in plan.global_batch(step)]


def test_an_epoch_shows_every_sample_once():
    plan = _plan()
    everything = {(shard, row) for shard, size in enumerate(SIZES) for row in range(size)}
    assert plan.steps_per_epoch == 5
    for epoch in (0, 7):
        assert len(_epoch(plan, epoch)) == 60
        assert set(_places(_epoch(plan, epoch))) == everything
        assert {row.visit for row in _epoch(plan, epoch)} == {epoch}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_ranks_share_out_the_same_global_batch(world_size):
    plan = _plan()
    for step in (0, 4, 5, 17):
        parts = [plan.rank_batch(step, rank, world_size) for rank in range(world_size)]
        assert {len(part) for part in parts} == {12 // world_size}
        assert [row for part in parts for row in part] == plan.global_batch(step)


def test_order_depends_on_seed_and_epoch_only():
    plan = _plan()
    orders = [_epoch(plan, 0), _epoch(plan, 1), _epoch(_plan(seed=4), 0)]
    assert len({tuple(_places(order)) for order in orders}) == 3
    assert plan.global_batch(2) == orders[0][24:36], "asking for an earlier epoch again gives it again"


def test_order_is_pinned():
    """A run resumed with a newer program must go on in the order it began in; else raise PLAN."""
    plan = _plan((3, 4, 2), batch=3, seed=42)
    assert [_places(plan.global_batch(step)) for step in (0, 3)] == PINNED


def test_a_window_of_shards_is_read_before_the_next():
    plan = _plan((10,) * 8, batch=1, window_samples=20)
    shards = [row.shard for row in _epoch(plan, 0)]
    windows = [set(shards[i : i + 20]) for i in range(0, 80, 20)]
    assert [len(w) for w in windows] == [2, 2, 2, 2]
    assert set.union(*windows) == set(range(8))
    assert shards[:20] != sorted(shards[:20]), "and mixed within"


def test_a_rank_reads_its_own_part_of_a_window():
    plan = _plan((64,) * 64, batch=64, window_samples=1024)
    for rank in range(4):
        touched = {row.shard for step in range(16) for row in plan.rank_batch(step, rank, 4)}
        assert len(touched) <= 9, "a quarter of the 16 shards of a window, and the edges; not all of them"


def test_what_is_left_out_of_an_epoch_changes():
    plan = _plan((7,), batch=4, seed=0)
    assert plan.steps_per_epoch == 1
    left_out = [frozenset(range(7)) - {row.row for row in plan.global_batch(epoch)} for epoch in range(4)]
    assert len(set(left_out)) > 1


def test_empty_shards_are_passed_over():
    plan = _plan((0, 3, 0, 2, 0), batch=5)
    assert set(_places(plan.global_batch(0))) == {(1, 0), (1, 1), (1, 2), (3, 0), (3, 1)}


@pytest.mark.parametrize("batch", [6, 20])
def test_samples_of_one_study_never_meet(batch):
    groups = np.repeat(np.arange(20), 3)  # three radiographs each
    plan = _plan(batch=batch, groups=groups)
    assert plan.steps_per_epoch == 60 // batch
    for step in range(3 * plan.steps_per_epoch):
        assert len(set(_groups_in(plan, groups, SIZES, step))) == batch
    assert len(set(_places(_epoch(plan, 1)))) == 60


def test_a_study_with_more_radiographs_than_batches_is_not_forced_in():
    groups = np.array([0] * 40 + list(range(1, 21)))  # forty of one, twenty others
    plan = _plan(batch=4, groups=groups)
    assert plan.steps_per_epoch == 6, "20 others fill six batches of four with one of the forty in each"
    for epoch in (0, 1):
        assert all(len(set(_groups_in(plan, groups, SIZES, 6 * epoch + step))) == 4 for step in range(6))


def test_substitutes_are_deterministic_new_to_the_batch_and_of_other_studies():
    groups = np.repeat(np.arange(30), 2)
    plan, again = _plan(batch=6, groups=groups), _plan(batch=6, groups=groups)
    starts = np.cumsum([0, *SIZES])
    for step in (0, 7, 23):
        batch = _groups_in(plan, groups, SIZES, step)
        first = [plan.substitute(step, position, 1) for position in range(6)]
        assert first == [again.substitute(step, position, 1) for position in range(6)]
        names = [int(groups[starts[row.shard] + row.row]) for row in first]
        assert len({*names, *batch}) == 12, "all six may be damaged, and no study meets itself"
        second = [plan.substitute(step, position, 2) for position in range(6)]
        others = {int(groups[starts[row.shard] + row.row]) for row in second}
        assert len({*names, *batch, *others}) == 18, "nor when a substitute is damaged too"


def test_where_every_study_is_in_the_batch_none_can_step_in():
    plan = _plan((6,), batch=6)
    with pytest.raises(RuntimeError, match="step 0: 0 samples could step in for the damaged one at position 0"):
        plan.substitute(0, 0, 1)
    assert _plan((7,), batch=6).substitute(0, 0, 1) not in _plan((7,), batch=6).global_batch(0)


def test_folders_mix_by_weight():
    folders = [
        Folder((30, 30), np.arange(60), 1.0),
        Folder((20,), np.arange(60, 80), 2.0),
        Folder((40,), np.arange(80, 120), 0.5),
    ]
    plan = ShardPlan(folders, seed=1, global_batch_size=10)
    assert plan.samples == 60 + 40 + 20
    assert plan.steps_per_epoch == 12
    seen = [Counter(_places(_epoch(plan, epoch))) for epoch in range(2)]
    for counts in seen:
        folder_of = Counter()
        for (shard, _), count in counts.items():
            folder_of[min(shard, 2) if shard < 2 else shard] += count
        assert folder_of == {0: 30, 1: 30, 2: 40, 3: 20}
        assert all(count == 2 for (shard, _), count in counts.items() if shard == 2), "weight 2: each twice"
    halves = [{row for (shard, row) in counts if shard == 3} for counts in seen]
    assert halves[0].isdisjoint(halves[1]), "weight 0.5: the other half in the next epoch"
    for step in range(24):
        batch = plan.global_batch(step)
        assert len(set(_places(batch))) == 10, "a sample that comes twice in an epoch does not meet itself"
    visits = Counter((row.shard, row.row, row.visit) for epoch in range(4) for row in _epoch(plan, epoch))
    assert set(visits.values()) == {1}, "every visit has views of its own"


def test_one_study_in_two_folders_does_not_meet_itself():
    same = np.arange(30)
    plan = ShardPlan([Folder((30,), same), Folder((30,), same)], seed=0, global_batch_size=10)
    for step in range(plan.steps_per_epoch):
        assert len({row.row for row in plan.global_batch(step)}) == 10


def test_folders_are_spread_over_the_epoch():
    folders = [Folder((100,) * 9, np.arange(900)), Folder((100,), np.arange(900, 1000))]
    plan = ShardPlan(folders, seed=0, global_batch_size=10, window_samples=100)
    small = [sum(row.shard == 9 for row in plan.global_batch(step)) for step in range(100)]
    assert all(sum(small[i : i + 20]) in range(15, 26) for i in range(0, 100, 20))


def test_a_share_is_of_patients_and_lies_within_a_larger_one():
    patients = np.repeat(np.arange(200) * 7919, np.arange(200) % 4 + 1)  # one to four radiographs each
    shares = (0.1, 0.25, 0.5, 1.0)
    drawn = [drawn_patients(patients, share, seed=3) for share in shares]
    for share, kept in zip(shares, drawn, strict=True):
        assert len(set(patients[kept])) == round(share * 200)
        assert not set(patients[kept]) & set(patients[~kept]), "all radiographs of a patient, or none"
    for smaller, larger in itertools.pairwise(drawn):
        assert not (smaller & ~larger).any()
    assert (drawn_patients(patients, 0.5, seed=4) != drawn[2]).any()
    assert drawn_patients(patients, 1e-9, seed=3).any(), "one patient at least"


def test_a_plan_of_some_samples_names_them_by_their_place_in_the_shard():
    kept = np.zeros(sum(SIZES), dtype=bool)
    kept[[0, 12, 13, 25, 41, 42, 59]] = True
    part = Folder(SIZES, np.arange(sum(SIZES))).only(kept)
    plan = ShardPlan([part], seed=3, global_batch_size=3)
    assert (plan.samples, plan.steps_per_epoch) == (7, 2)
    seen = {place for epoch in range(9) for place in _places(_epoch(plan, epoch))}
    assert seen == {(0, 0), (0, 12), (1, 0), (2, 5), (3, 0), (4, 0), (4, 17)}


def test_too_few_samples_says_what_to_change():
    with pytest.raises(ValueError, match=r"data\.shards: 60 .* 5 shards, fewer .* 64 .*micro_batch_size") as error:
        _plan(batch=64)
    assert "imitate-ds shards build" in str(error.value)
    with pytest.raises(ValueError, match="60 training samples of 4 studies"):
        _plan(batch=5, groups=np.arange(60) % 4)


@pytest.mark.parametrize("ranks", [1, 2, 5, 7, 12, 16])
def test_ranks_share_a_batch_as_evenly_as_they_can(ranks):
    shares = [len(_plan().rank_batch(0, rank, ranks)) for rank in range(ranks)]
    assert sum(shares) == 12
    assert max(shares) - min(shares) <= 1


def test_groups_of_another_length_are_refused():
    with pytest.raises(ValueError, match="groups: 3 of them for 60 samples"):
        _plan(groups=np.zeros(3, dtype=np.int64))


@st.composite
def _runs(draw):
    """A collection, a global batch, and a run that is killed and goes on with others."""
    shards = draw(st.lists(st.integers(0, 20), min_size=1, max_size=10))
    batch = draw(st.integers(1, 32))
    worlds = draw(st.lists(st.integers(1, 16), min_size=1, max_size=3))
    samples = sum(shards)
    studies = draw(st.integers(1, 2 * samples + 1))  # from one study of everything to hardly a repeat
    groups = np.random.default_rng(draw(st.integers(0, 99))).integers(0, studies, samples)
    workers = draw(st.lists(st.integers(0, 8), min_size=len(worlds), max_size=len(worlds)))
    lengths = draw(st.lists(st.integers(0, 9), min_size=len(worlds), max_size=len(worlds)))
    return shards, groups, batch, list(zip(worlds, workers, lengths, strict=True))


@settings(max_examples=1000, deadline=None)
@given(_runs(), st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_whatever_is_killed_and_resumed_consumes_exactly_the_plan(run, seed, window):
    """Over world sizes 1-16, workers 0-8, kill points and epochs: no study lost, none twice."""
    shards, groups, batch, parts = run
    most = [b for b in range(1, len(groups) // batch + 1) if np.minimum(np.bincount(groups), b).sum() >= b * batch]
    if not most:
        with pytest.raises(ValueError, match="fewer than one global batch"):
            _plan(shards, batch=batch, groups=groups, seed=seed)
        return
    whole = _plan(shards, batch=batch, groups=groups, seed=seed, window_samples=window)
    assert whole.steps_per_epoch == max(most), "every batch that can be filled is"
    consumed: list[list[PlannedSample]] = []
    for world_size, workers, length in parts:  # each part is a new process, which knows the step it starts at
        start = len(consumed)
        plan = _plan(shards, batch=batch, groups=groups, seed=seed, window_samples=window)
        steps = range(start, start + length)
        by_rank = [_read_by_workers(plan, steps, rank, world_size, workers) for rank in range(world_size)]
        consumed += [[row for rows in step for row in rows] for step in zip(*by_rank, strict=True)]
    assert consumed == [whole.global_batch(step) for step in range(len(consumed))]
    for first in range(0, len(consumed), whole.steps_per_epoch):
        epoch = [row for rows in consumed[first : first + whole.steps_per_epoch] for row in rows]
        assert len(set(epoch)) == len(epoch), "none twice"
        if len(epoch) == len(groups):
            assert set(_places(epoch)) == {(s, row) for s, size in enumerate(shards) for row in range(size)}, (
                "none lost"
            )
    for step in range(len(consumed)):
        assert len(set(_groups_in(whole, groups, shards, step))) == batch, "no study meets itself"


def _read_by_workers(plan: ShardPlan, steps: range, rank: int, world_size: int, workers: int) -> list[list]:
    """What a rank gets when worker w makes the batches w, w + W, ... and they are asked in turn."""
    workers = max(1, workers)
    made = [[plan.rank_batch(step, rank, world_size) for step in steps[worker::workers]] for worker in range(workers)]
    return [made[place % workers][place // workers] for place in range(len(steps))]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 12), min_size=1, max_size=4), st.floats(0.1, 3)), min_size=1, max_size=3
    ),
    st.integers(1, 8),
    st.integers(1, 60),
)
def test_mixtures_fill_every_epoch_alike(parts, batch, studies):
    """Folders of any size and weight, which share studies: constant steps, every visit once, no study twice in a batch."""
    groups = [np.random.default_rng(number).integers(0, studies, sum(sizes)) for number, (sizes, _) in enumerate(parts)]
    folders = [Folder(sizes, found, weight) for (sizes, weight), found in zip(parts, groups, strict=True)]
    try:
        plan = ShardPlan(folders, seed=1, global_batch_size=batch, window_samples=20)
    except ValueError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert "fewer than one global batch" in refused or "less than one an epoch" in refused
        return
    starts, all_groups = np.cumsum([0, *(size for sizes, _ in parts for size in sizes)]), np.concatenate(groups)
    seen: Counter = Counter()
    for step in range(4 * plan.steps_per_epoch):
        rows = plan.global_batch(step)
        assert len({int(all_groups[starts[row.shard] + row.row]) for row in rows}) == batch
        seen.update(rows)
    assert set(seen.values()) == {1}


def test_one_group_of_half_the_samples_is_planned_too():
    samples = 100_000
    groups = np.where(np.arange(samples) % 2, 0, np.arange(samples))
    plan = _plan([500] * 200, batch=16, groups=groups)
    assert plan.steps_per_epoch == 50_000 // 15
    for step in (0, 1000, plan.steps_per_epoch - 1):
        assert len({int(groups[500 * row.shard + row.row]) for row in plan.global_batch(step)}) == 16
