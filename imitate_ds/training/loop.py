"""The loop, once, for pre-training and fine-tuning: it knows batches, steps and an engine, not what is learned."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from imitate_ds.distributed import max_over_ranks, mean_over_ranks, training_device, world
from imitate_ds.training.engine import set_learning_rate, set_training_mode, take_step
from imitate_ds.training.monitor import Monitor, memory_mib


class Movable(Protocol):
    """A batch: knows which step it belongs to, its keys, and how to go to a device."""

    @property
    def keys(self) -> list[str]: ...

    @property
    def step(self) -> int: ...

    def to(self, device: torch.device) -> Any: ...


class StepOutput(NamedTuple):
    """What the forward and backward passes of one step leave to the loop; the gradients are in the engine."""

    loss: Tensor  # detached scalar
    scalars: dict[str, Tensor]  # detached, on the device; averaged over ranks when logged
    pictures: Callable[[], Mapping[str, Tensor]]  # called only when pictures are due, on rank 0


class LoopSettings(NamedTuple):
    seed: int
    total_steps: int
    batch_norm: str  # resolved policy
    skips_overflow: bool  # fp16: the step of an infinite gradient is skipped, so such a norm is no reason to stop
    log_every: int
    images_every: int
    pauses_at: Callable[[int], bool]  # after how many steps `pause` is called


def train_steps(
    engine: Any,
    batches: Iterable[Movable],
    step_fn: Callable[[Any], StepOutput],
    learning_rate: Callable[[int], float],
    monitor: Monitor,
    settings: LoopSettings,
    pause: Callable[[int], None],
) -> None:
    """Run one optimizer step for every batch: step_fn goes forward and backward, the engine steps.

    `pause(done)` evaluates and saves, where settings.pauses_at says so.

    Raises FloatingPointError for a loss or gradient that is not finite: found when logged, and before any pause, so
    that nothing is saved after one.
    """
    device = training_device()
    set_training_mode(engine.module, settings.batch_norm)
    clock = _Clock()
    unsound = torch.zeros((), dtype=torch.bool, device=device)  # stays on the device between logged steps
    for batch in clock.waiting_for(batches):
        step = batch.step
        # Random state is a function of the step, so a resumed run draws what the uninterrupted one would have drawn.
        torch.manual_seed((settings.seed * 1_000_003 + step) * 4099 + world().rank)
        set_learning_rate(engine, learning_rate(step))
        output = step_fn(batch.to(device))
        norm = take_step(engine)
        done = step + 1
        clock.samples += len(batch.keys) * world().size
        unsound |= ~output.loss.isfinite()
        if not settings.skips_overflow:
            unsound |= ~torch.as_tensor(norm, device=device).isfinite()
        pauses = settings.pauses_at(done)
        if pauses or done % settings.log_every == 0:
            _check_sound(unsound, done, output)
        if done % settings.log_every == 0 or done == settings.total_steps:
            steady = {"learning_rate": learning_rate(step), "gradient_norm": float(norm), **memory_mib(device)}
            _log(output, steady, monitor, done, clock)
        if settings.images_every and (step == 0 or done % settings.images_every == 0) and world().is_main:
            monitor.pictures(done, output.pictures())
        if pauses:
            with clock.paused():
                pause(done)


def _log(output: StepOutput, steady: dict[str, float], monitor: Monitor, done: int, clock: "_Clock") -> None:
    """One trip to the host for everything that is logged."""
    names = sorted(output.scalars)
    values = mean_over_ranks(torch.stack([output.scalars[name].float() for name in names])).tolist()
    scalars = dict(zip(names, values, strict=True))
    rate, waiting = clock.read()
    scalars |= {**steady, "studies_per_second": rate, "data_wait_share": max_over_ranks(waiting)}
    monitor.scalars(done, scalars, split="train")
    losses = {name: scalars[name] for name in ("loss", *names) if name == "loss" or (scalars[name] and "/" not in name)}
    losses.pop("temperature", None)
    monitor.progress(done, {**losses, "studies/s": rate, "lr": scalars["learning_rate"]})


def _check_sound(unsound: Tensor, done: int, output: StepOutput) -> None:
    """The same verdict on every rank, so that none waits for one that has stopped."""
    if not max_over_ranks(float(unsound)):
        return
    bad = [name for name, value in output.scalars.items() if not value.isfinite().all()]
    raise FloatingPointError(
        f"step {done}: {', '.join(bad) or 'the gradient'} is not finite (or was, since the last look); lower optim.lr, or "
        "use train.precision: fp32 to see whether it is the precision. Every checkpoint is from before it: "
        "--set train.resume=true goes on from the newest"
    )


class _Clock:
    """Studies per second and the share of time spent waiting for data since the last reading, pauses left out."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self.began, self.samples, self.waited, self.pauses = time.perf_counter(), 0, 0.0, 0.0

    def waiting_for(self, batches: Iterable[Movable]) -> Iterable[Movable]:
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def paused(self) -> "_Pause":
        return _Pause(self)

    def read(self) -> tuple[float, float]:
        elapsed = max(1e-9, time.perf_counter() - self.began - self.pauses)
        rate, waiting = self.samples / elapsed, min(1.0, self.waited / elapsed)
        self._reset()
        return rate, waiting


class _Pause:
    def __init__(self, clock: _Clock):
        self.clock = clock

    def __enter__(self) -> None:
        self.since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.clock.pauses += time.perf_counter() - self.since
