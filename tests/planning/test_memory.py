"""Bytes of a rank by ZeRO stage, against numbers worked out by hand."""

import numpy as np
import pytest

from imitate_ds.planning.assumptions import Machine, Rates
from imitate_ds.planning.loss import LossCost
from imitate_ds.planning.memory import KINDS, Placed, Precision, Size, Stage, Work, place, read_stage
from imitate_ds.planning.trace import Trace, Traces

MILLION = 10**6
SIZE = Size(trained=100 * MILLION, lowered=0, largest=MILLION, frozen=0, each=(), buffers=0, batch_norms=0, modules=10)
FULL, HALF = Precision(4, autocast=False), Precision(2, autocast=False)
NO_LOSS = LossCost("dense", 0, 0, 0, 0, 0, 0, 0, 0)


def traces(bytes_of_a_study: float) -> Traces:
    """Four operations: two of forward, the worst of backward, and its last, after which all gradients are there."""

    def at(studies: int) -> Trace:
        live = np.array([1.0, 1.9, 2.0, 0.0]) * bytes_of_a_study * studies
        nothing = np.zeros(4)
        return Trace(studies, live, np.array([0.0, 0.0, 0.0, 4.0 * SIZE.trained]), nothing, nothing, np.full(4, 3), 2)

    return Traces(at(1), at(2))


def machine(ranks: int, *, on_cuda: bool = True) -> Machine:
    rates = Rates(1, 1, 1, 1, 1, 1, 1)
    return Machine("test", 1, ranks, 80e9, on_cuda, {"likely": rates})


def stage_of(number: int, *, bucket: int = 0, overlap: bool = False, offload: bool = False) -> Stage:
    return Stage(f"zero{number}", number, bucket, overlap, offload, False, 10**9, 10**5, 0)


def placed(
    stage: Stage,
    ranks: int,
    precision: Precision = FULL,
    *,
    study: float = 1e9,
    studies: int = 10,
    chunk: int = 0,
    size: Size = SIZE,
    **options,
) -> Placed:
    here = machine(ranks, **options)
    sizes = {"batch_bytes": 100.0, "features_bytes": 10.0}
    work = Work(traces(study), NO_LOSS, size, precision, stage, here)
    return place(work, studies=studies, chunk=chunk or studies, **sizes)


@pytest.mark.parametrize(
    ("number", "ranks", "precision", "parameters", "optimizer"),
    [
        (0, 8, FULL, 400, 800),  # weights; both moments
        (1, 8, FULL, 400, 1200 / 8),  # and DeepSpeed's copy of weights that are float32 already
        (2, 8, FULL, 400, 1200 / 8),
        (3, 8, FULL, 400 / 8 + 400, 800 / 8),  # its part, and all of it gathered; no copy
        (0, 8, HALF, 200, 1200),  # float32 copy and both moments
        (1, 8, HALF, 200, 1200 / 8),
        (3, 8, HALF, 200 / 8 + 200, 1200 / 8),
        (3, 1, HALF, 200, 1200),  # alone nothing has to be gathered
    ],
)
def test_states_by_hand(number: int, ranks: int, precision: Precision, parameters: float, optimizer: float) -> None:
    found = placed(stage_of(number), ranks, precision)
    assert found.moment == "backward"  # 20 GB of activations
    assert found.kinds["activations"] == 2 * 10 * 1e9
    assert found.kinds["parameters"] == pytest.approx(parameters * MILLION)
    assert found.kinds["optimizer states"] == pytest.approx(optimizer * MILLION)
    assert set(found.kinds) == set(KINDS)


def test_frozen_weights_are_shared_out_and_gathered_at_zero_3_alone() -> None:
    size = SIZE._replace(frozen=300 * MILLION, buffers=7)
    for number, expected in ((0, 1600), (2, 1600), (3, 1600 / 8 + 1600)):
        found = placed(stage_of(number), 8, size=size)
        assert found.kinds["parameters"] == pytest.approx(expected * MILLION + 7), number
    far = placed(stage_of(3, offload=True)._replace(offloads_parameters=True), 8, size=size)
    assert far.kinds["parameters"] == pytest.approx(1600 * MILLION + 7)  # gathered; its own part lies on the host
    assert far.host == pytest.approx((100 * (8 + 4 + 4 + 4) + 1600) / 8 * MILLION)


def test_zero_3_fetches_ahead_in_the_forward_pass() -> None:
    ahead = stage_of(3)._replace(ahead=50 * MILLION)
    found = placed(ahead, 8, study=1.0)
    assert found.moment == "forward"
    assert found.kinds["parameters"] == pytest.approx((400 / 8 + 400) * MILLION)
    assert found.kinds["communication buckets"] == 4 * 50 * MILLION
    assert (
        placed(ahead._replace(ahead=500 * MILLION), 8, study=1.0).kinds["communication buckets"] == 400 * MILLION
    )  # all there is
    assert placed(ahead, 1, study=1.0).moment != "forward"  # alone nothing has to be fetched
    far = placed(ahead._replace(offloads_optimizer=True, offloads_parameters=True), 1, study=1.0)
    assert far.kinds["communication buckets"] == 0  # from the host, each into memory of its own


def test_texts_are_gathered_from_the_forward_pass_on() -> None:
    loss = NO_LOSS._replace(gathered=7e6)
    here, ahead = machine(8), stage_of(3)._replace(ahead=50 * MILLION)
    work = Work(traces(1.0), loss, SIZE, FULL, ahead, here)
    found = place(work, studies=10, chunk=10, batch_bytes=0.0, features_bytes=0.0)
    assert (found.moment, found.kinds["gathered embeddings"]) == ("forward", 7e6)


@pytest.mark.parametrize(("threshold", "whole"), [(0, 0), (999, 0), (1000, 1000), (10 * MILLION, 10 * MILLION + 1000)])
def test_weights_that_zero_3_leaves_whole_are_those_up_to_its_threshold(threshold: int, whole: int) -> None:
    size = SIZE._replace(each=(90 * MILLION - 1000, 10 * MILLION, 1000))
    found = placed(stage_of(3)._replace(persistent=threshold), 8, size=size)
    expected = 4 * ((100 * MILLION - whole) * (1 / 8 + 1) + whole * (1 + 1 / 8))
    assert found.kinds["parameters"] == pytest.approx(expected)


def test_buckets_by_hand() -> None:
    """2 GB of float32 each: one at ZeRO-1, a second to overlap, one of each dtype under autocast."""
    half_a_billion = 500 * MILLION
    autocast = Precision(4, autocast=True)
    cases = [
        (stage_of(0, bucket=half_a_billion), FULL, 0),
        (stage_of(1, bucket=half_a_billion), FULL, 2e9),
        (stage_of(2, bucket=half_a_billion, overlap=True), FULL, 4e9),
        (stage_of(2, bucket=half_a_billion, overlap=True), autocast, 8e9),
        (stage_of(2, bucket=half_a_billion, overlap=True), HALF, 2e9),
        (stage_of(3, bucket=half_a_billion, overlap=True), autocast, 3e9),
    ]
    for stage, precision, expected in cases:
        assert placed(stage, 8, precision).kinds["communication buckets"] == expected, (stage, precision)
    on_cpu = placed(stage_of(3, bucket=half_a_billion), 8, on_cuda=False)
    assert on_cpu.kinds["communication buckets"] == 400 * MILLION, "all gradients are in it"


def test_a_bucket_of_zero_3_that_is_full_in_mid_backward_is_copied() -> None:
    found = placed(stage_of(3, bucket=10 * MILLION), 8)
    assert found.moment == "backward"
    assert found.kinds["communication buckets"] == 2 * 40 * MILLION
    assert found.kinds["gradients"] == 400 * MILLION / 8


def test_without_activations_the_worst_is_where_gradients_meet() -> None:
    """ZeRO-1 on a CPU, where an untouched bucket is no memory: gradients, a flat copy of them, and this rank's part of it."""
    found = placed(stage_of(1, bucket=500 * MILLION), 2, study=1.0, on_cuda=False)
    assert found.moment == "reduction"
    assert found.total == pytest.approx((400 + 1200 / 2 + 400 + 400 + 400 / 2) * MILLION)


def test_offloading_moves_the_optimizer_to_the_host() -> None:
    found = placed(stage_of(2, offload=True), 8, HALF)
    assert found.kinds["optimizer states"] == 0
    assert found.host == pytest.approx(100 * MILLION / 8 * (12 + 4 + 2))


def test_a_chunk_takes_the_activations_of_a_chunk() -> None:
    whole, cached = placed(stage_of(1), 8), placed(stage_of(1), 8, chunk=2)
    assert whole.kinds["activations"] == 20e9
    assert cached.kinds["activations"] == pytest.approx(
        4e9 + 8 * 100 + 3 * 10 * 10
    )  # images of the others, and embeddings
    assert cached.kinds["gradients"] == 400 * MILLION, "of the chunks before"
    assert cached.total < whole.total


def test_more_ranks_never_need_more_at_zero_3() -> None:
    totals = [placed(stage_of(3), ranks, HALF).total for ranks in (1, 2, 4, 8, 16, 64, 512)]
    assert totals == sorted(totals, reverse=True)


def test_files_that_ship_are_read_with_deepspeeds_defaults() -> None:
    first, second, offloaded = read_stage("zero1"), read_stage("zero2"), read_stage("zero3_offload")
    assert (first.stage, first.bucket, first.overlap) == (1, 10 * MILLION, True)
    assert second.overlap
    assert not second.offloads_optimizer
    assert (offloaded.label, offloaded.offloads_parameters) == ("ZeRO-3 + offload", True)
