"""Seconds of a step, against sums done by hand and against published images per second."""

from functools import cache

import numpy as np
import pytest
import timm
import torch
from torch import nn

from imitate_ds.config import TrainConfig
from imitate_ds.devices import DEVICES
from imitate_ds.planning.assumptions import ASSUMED, Machine, Rates, gpu_machine
from imitate_ds.planning.loss import LossCost
from imitate_ds.planning.memory import Precision, Size, Stage, Work
from imitate_ds.planning.step_time import StepTime, step_time
from imitate_ds.planning.trace import KINDS, Trace, Traces, trace_pair

SIZE = Size(trained=10**8, lowered=0, largest=10**6, frozen=0, each=(), buffers=0, batch_norms=0, modules=10)
NO_LOSS = LossCost("dense", 0, 0, 0, 0, 0, 0, 0, 0)
RATES = Rates(matmul=1e12, convolution=1e12, depthwise=1e12, bandwidth=1e11, link=1e10, host_bandwidth=1, host_link=1)
FULL = Precision(4, autocast=False)


def machine(ranks: int, rates: Rates = RATES, *, on_cuda: bool = True) -> Machine:
    return Machine("test", 1, ranks, 80e9, on_cuda, {"likely": rates})


def stage_of(number: int, *, bucket: int = 5 * 10**8, overlap: bool = False) -> Stage:
    return Stage(f"zero{number}", number, bucket, overlap, False, False, 10**9, 10**5, 0)


def steady() -> Traces:
    """Forward: 1 s of arithmetic; backward: 2 s of it, and 1 s of memory; at any number of studies."""
    flops, moved = np.array([1e12, 2e12, 0.0]), np.array([1e9, 1e9, 1e11])
    kind = np.array([KINDS.index("matmul"), KINDS.index("convolution"), KINDS.index("other")])
    both = (Trace(n, np.ones(3), np.zeros(3), flops, moved, kind, 1) for n in (1, 2))
    return Traces(*both)


def test_parts_by_hand() -> None:
    found = step_time(Work(steady(), NO_LOSS, SIZE, FULL, stage_of(1), machine(4)), studies=8, chunk=8)
    assert found.compute == pytest.approx(3)
    assert found.memory_bound == pytest.approx(1)
    # a ring: 2 (W - 1) / W of 400 MB over 10 GB/s, and half of it for the weights that come back
    assert found.gradients == pytest.approx(2 * 0.75 * 0.04)
    assert found.parameters == pytest.approx(0.75 * 0.04)
    assert found.total == pytest.approx(sum(found))


def test_only_whole_buckets_hide_behind_the_backward_pass() -> None:
    args = (steady(), NO_LOSS, SIZE, FULL)
    one = step_time(Work(*args, stage_of(2, overlap=True), machine(4)), studies=8, chunk=8)
    ten = step_time(Work(*args, stage_of(2, overlap=True, bucket=10**7), machine(4)), studies=8, chunk=8)
    assert one.gradients == pytest.approx(0.06)
    assert ten.gradients == pytest.approx(0.006)


def test_on_a_cpu_messages_hide_behind_nothing() -> None:
    def time_of(stage: Stage, *, on_cuda: bool) -> StepTime:
        work = Work(steady(), NO_LOSS, SIZE, FULL, stage, machine(4, on_cuda=on_cuda))
        return step_time(work, studies=8, chunk=8)

    early = stage_of(3, overlap=True, bucket=10**7)
    assert time_of(early, on_cuda=False) == time_of(early._replace(overlap=False), on_cuda=True)
    assert time_of(early, on_cuda=True).parameters == 0


@pytest.mark.parametrize(
    ("number", "ranks", "own", "passes", "copies"),
    [
        (0, 1, 1, 4, 1),
        (0, 4, 1, 4, 1),
        (1, 1, 1, 7, 2),
        (2, 4, 1 / 4, 7, 2),
        (3, 1, 1, 4, 1),
        (3, 4, 1 / 4, 7, 2),
    ],
)
def test_the_optimizer_steps_its_part_and_copies_all(
    number: int, ranks: int, own: float, passes: float, copies: float
) -> None:
    size, rates = SIZE._replace(frozen=SIZE.trained // 2), RATES._replace(pages=1e-9)
    work = Work(steady(), NO_LOSS, size, FULL, stage_of(number), machine(ranks, rates))
    found = step_time(work, studies=8, chunk=8)
    assert found.optimizer == pytest.approx((40 * own * 1e8 + passes * 4e8) / 1e11 + copies * 4e8 * 1e-9)
    assert found.memory_bound == pytest.approx(1 + 1e-9)  # a byte is alive at the worst moment


def test_gradcache_goes_forward_twice_and_adds_up_gradients() -> None:
    found = step_time(Work(steady(), NO_LOSS, SIZE, FULL, stage_of(1), machine(1)), studies=8, chunk=2)
    assert found.recomputed == pytest.approx(4)  # four chunks
    assert found.memory_bound == pytest.approx(4 + 3 * 12 * 1e8 / 1e11)
    assert found.gradients == found.parameters == 0


def test_zero_3_gathers_in_every_pass_and_from_the_host() -> None:
    def seconds(stage: Stage, studies: int, chunk: int) -> float:
        return step_time(
            Work(steady(), NO_LOSS, SIZE, FULL, stage, machine(4)), studies=studies, chunk=chunk
        ).parameters

    plain, once = stage_of(3), 0.75 * 0.04 + 5 * 4e8 / 1e11  # and the passes over what comes
    assert seconds(plain, 8, 8) == pytest.approx(once)
    assert seconds(plain, 8, 2) == pytest.approx(8 * once)  # both passes of four chunks
    assert seconds(plain._replace(live=10**6), 8, 2) == pytest.approx(12 * once)  # and the backward passes
    far = plain._replace(offloads_parameters=True)
    assert seconds(far, 8, 8) == pytest.approx(once + 1e8 / RATES.host_link)  # its own


def test_zero_3_gathers_what_does_not_train_too() -> None:
    size = SIZE._replace(frozen=10**8)
    for number, times in ((1, 1), (3, 2)):
        found = step_time(Work(steady(), NO_LOSS, size, FULL, stage_of(number), machine(4)), studies=8, chunk=8)
        passes = 5 * 8e8 / 1e11 * (number == 3)
        assert found.parameters == pytest.approx(times * 0.75 * 0.04 + passes), number


def test_a_host_that_is_slower_than_the_device_shows() -> None:
    slow = RATES._replace(launch=2.0)
    on_gpu, on_cpu = (
        step_time(Work(steady(), NO_LOSS, SIZE, FULL, stage_of(0), machine(1, slow, on_cuda=gpu)), studies=8, chunk=8)
        for gpu in (True, False)
    )
    assert on_gpu.launching == pytest.approx(2)  # 6 s of launching, 4 s of which are hidden
    assert on_cpu.launching == pytest.approx(6)


@cache
def _resnet50() -> Traces:
    with torch.device("meta"):
        model = timm.create_model("resnet50").train()

    def step(network: nn.Module, images: int) -> torch.Tensor:
        return network(torch.empty(images, 3, 224, 224).contiguous(memory_format=torch.channels_last)).sum()

    return trace_pair(model, step, (32, 64), autocast=torch.float16, as_cuda=True)


@pytest.mark.parametrize(("gpu", "published"), [("a100-80", 2470), ("v100-16", 1200)])
def test_resnet50_trains_as_fast_as_published(gpu: str, published: float) -> None:
    """NVIDIA's DeepLearningExamples, PyTorch, mixed precision, one device: images a second."""
    here = gpu_machine(gpu, DEVICES[gpu], TrainConfig(precision="fp16"), nodes=1, per_node=1)
    nothing = SIZE._replace(trained=25 * 10**6)
    rates = {
        end: 256
        / step_time(Work(_resnet50(), NO_LOSS, nothing, FULL, stage_of(0), here), studies=256, chunk=256, end=end).total
        for end in ("low", "likely", "high")
    }
    assert rates["likely"] == pytest.approx(published, rel=0.15)
    assert rates["low"] < published < rates["high"]


def test_every_constant_has_a_range_and_a_source() -> None:
    for name, span in ASSUMED.items():
        assert span.low != span.high, name
        assert min(span.low, span.high) < span.likely < max(span.low, span.high), name
        assert span.source.startswith("assumed: "), name
