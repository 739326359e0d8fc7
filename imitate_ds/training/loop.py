"""The loop, once, for pre-training and fine-tuning: it knows batches, steps and an engine, not what is learned."""

import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from imitate_ds.distributed import Pulse, gather_objects, max_over_ranks, mean_over_ranks, training_device, world
from imitate_ds.flight import flight
from imitate_ds.training.batch_norm import batch_norm_statistics, restore_batch_norm_statistics, set_training_mode
from imitate_ds.training.drain import Drain
from imitate_ds.training.engine import Step, set_learning_rate, take_step
from imitate_ds.training.health import Watch, straggler
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
    global_batch_size: int
    batch_norm: str  # resolved policy
    skips_overflow: bool  # fp16: a step without a finite gradient only lowers the loss scale
    log_every: int
    images_every: int
    lowest_temperature: float  # of a temperature that is learned; 0: it is not


class Stopped(NamedTuple):
    """After how many steps the ranks stopped, and which of them was asked to end by which signal."""

    done: int
    rank: int
    signal: str


class Calls(NamedTuple):
    """What the loop asks of whoever runs it. All are called on every rank, in the same order."""

    pauses_at: Callable[[int], bool]  # after how many steps `pause` is called
    # Evaluates and saves after so many steps; whether training has gone on long enough, or the ranks, asked to end, have broken
    # the evaluation off
    pause: Callable[[int], Literal["go on", "enough", "broken off"]]
    between: Callable[[float], Mapping[str, float]]  # at every logged step, of studies per second; more numbers to log
    skipped: Callable[[int, Movable, StepOutput, Step], None]  # a step that was not applied; may raise


def train_steps(
    engine: Any,
    batches: Iterable[Movable],
    step_fn: Callable[[Any], StepOutput],
    learning_rate: Callable[[int], float],
    monitor: Monitor,
    settings: LoopSettings,
    calls: Calls,
    drain: Drain,
) -> Stopped | None:
    """Run one optimizer step for every batch: step_fn goes forward and backward, the engine steps.

    Where some rank was asked to end (drain), all stop after the same step, and it is returned; None where all steps are done, or
    a pause says that they were enough.
    A step whose gradient is not finite is skipped on all ranks.

    Raises FloatingPointError for a loss that is not finite though its gradient is: found when logged, and before any pause,
    so that nothing is saved after one.
    """
    device = training_device()
    set_training_mode(engine.module, settings.batch_norm)
    clock, pulse = _Clock(), Pulse()
    log = _Log(monitor, settings, clock, calls.between)
    unsound = torch.zeros((), dtype=torch.bool, device=device)  # stays on the device between logged steps
    flight.begin("waiting for data")
    for batch in clock.waiting_for(batches):
        step = batch.step
        flight.begin("forward", step)
        seed_step(settings.seed, step)
        set_learning_rate(engine, learning_rate(step))
        statistics = batch_norm_statistics(engine.module)
        output = step_fn(batch.to(device))
        flight.begin("optimizer step")
        taken = take_step(engine)
        flight.begin("between steps")
        done = step + 1
        clock.samples += settings.global_batch_size
        if taken.applied:
            unsound |= ~output.loss.isfinite()
        else:
            restore_batch_norm_statistics(engine.module, statistics)
            if not settings.skips_overflow:
                calls.skipped(step, batch, output, taken)
        told = pulse.exchange(drain.signal, flight.waited, clock.waited_for_data)
        pauses = calls.pauses_at(done)
        if pauses or done % settings.log_every == 0:
            _check_sound(unsound, done, output)
        if done % settings.log_every == 0 or done == settings.total_steps:
            log.write(done, output, {"learning_rate": learning_rate(step), "gradient_norm": float(taken.norm)}, told)
        if settings.images_every and (step == 0 or done % settings.images_every == 0) and world().is_main:
            monitor.pictures(done, output.pictures())
        if pauses:
            with clock.paused():
                verdict = calls.pause(done)
            if verdict == "enough":
                break
            if verdict == "broken off":  # here and now: what is due is the evaluation of exactly this step
                pulse.last()
                return stopped_by(done, gather_objects(drain.signal))
        if told is not None and told[:, 0].any() and done < settings.total_steps:
            pulse.last()
            return stopped_by(done, told[:, 0].tolist())
        flight.begin("waiting for data")
    pulse.last()
    return None


def stopped_by(done: int, signals: Sequence[float]) -> Stopped:
    """signals: of each rank, 0 where it was not asked to end."""
    rank = next(rank for rank, number in enumerate(signals) if number)
    return Stopped(done, rank, signal.Signals(int(signals[rank])).name)


def seed_step(seed: int, step: int) -> None:
    """Random state is a function of the step: a resumed run draws what the uninterrupted one would have drawn."""
    torch.manual_seed((seed * 1_000_003 + step) * 4099 + world().rank)


class _Log:
    """What is logged of a step, and what is said of it."""

    def __init__(
        self, monitor: Monitor, settings: LoopSettings, clock: "_Clock", between: Callable[[float], Mapping[str, float]]
    ):
        self.monitor, self.clock, self.between = monitor, clock, between
        self.watch = Watch(settings.lowest_temperature)
        self._told: Tensor | None = None

    def write(self, done: int, output: StepOutput, steady: dict[str, float], told: Tensor | None) -> None:
        """One trip to the host for everything that is logged."""
        names = sorted(output.scalars)
        values = mean_over_ranks(torch.stack([output.scalars[name].float() for name in names])).tolist()
        scalars = dict(zip(names, values, strict=True))
        rate, waiting, seconds = self.clock.read()
        scalars |= {**steady, **memory_mib(training_device())}
        scalars |= {"studies_per_second": rate, "data_wait_share": max_over_ranks(waiting), **self.between(rate)}
        if told is not None:
            if self._told is not None:
                scalars |= straggler(self._told[:, 1:], told[:, 1:], seconds)
            self._told = told
        self.monitor.scalars(done, scalars, split="train")
        for warning in self.watch.warnings(scalars):
            self.monitor.warn(done, warning)
        losses = {
            name: scalars[name] for name in ("loss", *names) if name == "loss" or (scalars[name] and "/" not in name)
        }
        losses.pop("temperature", None)
        self.monitor.progress(done, {**losses, "studies/s": rate, "lr": scalars["learning_rate"]})


def _check_sound(unsound: Tensor, done: int, output: StepOutput) -> None:
    """The same verdict on every rank, so that none waits for one that has stopped."""
    if not max_over_ranks(float(unsound)):
        return
    bad = [name for name, value in output.scalars.items() if not value.isfinite().all()]
    raise FloatingPointError(
        f"step {done}: {', '.join(bad) or 'the loss'} is not finite (or was, since the last look), though its gradient is; "
        "please report this. Every checkpoint is from before it: --set train.resume=true goes on from the newest"
    )


class _Clock:
    """Studies per second and the share of time spent waiting for data since the last reading, pauses left out."""

    def __init__(self) -> None:
        self.waited_for_data = 0.0  # seconds since the start
        self._reset()

    def _reset(self) -> None:
        self.began, self.samples, self.pauses = time.perf_counter(), 0, 0.0
        self.waited_before = self.waited_for_data

    def waiting_for(self, batches: Iterable[Movable]) -> Iterable[Movable]:
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(iterator, None)
            self.waited_for_data += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def paused(self) -> "_Pause":
        return _Pause(self)

    def read(self) -> tuple[float, float, float]:
        """Studies per second, share of the time waiting for data, and how many seconds that was."""
        elapsed = max(1e-9, time.perf_counter() - self.began - self.pauses)
        rate, waiting = self.samples / elapsed, min(1.0, (self.waited_for_data - self.waited_before) / elapsed)
        self._reset()
        return rate, waiting, elapsed


class _Pause:
    def __init__(self, clock: _Clock):
        self.clock = clock

    def __enter__(self) -> None:
        self.since = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.clock.pauses += time.perf_counter() - self.since
