"""`imitate-ds profile --config RUN`: a few real steps of a run file on this machine, and where time, operations and memory go.

Steps are taken by the loop that trains, without checkpoints, validation or anything in the run's own folder. Some are measured as
they are; a few more come after under torch.profiler, which slows them down.
On several ranks: `deepspeed --module imitate_ds.profiling --config RUN.yaml`.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from imitate_ds.config import RunConfig, load_run_config
from imitate_ds.data.shard_index import write_atomic
from imitate_ds.distributed import init_world, training_device, world
from imitate_ds.evaluation.profile_page import profile_summary, write_profile_page
from imitate_ds.flight import flight
from imitate_ds.pretrain import open_plan
from imitate_ds.training.counters import Counters
from imitate_ds.training.course import loop_settings, start_engine
from imitate_ds.training.drain import Drain
from imitate_ds.training.entrance import run_entrance
from imitate_ds.training.loop import Calls, StepOutput, train_steps
from imitate_ds.training.monitor import Monitor
from imitate_ds.training.timeline import Timeline

WARM = 3  # steps before those that are measured: the first is counted, and what is compiled is compiled in the second
TRACED = 2  # steps under the profiler
OPERATORS = 15
OWN = (
    "data",
    "loss",
    "other",
)  # the time of the lines of this program; the rest is the towers', DeepSpeed's and the network's
FORMAT = "imitate_ds.profile/1"


def profile(
    config: RunConfig, drain: Drain | None = None, *, steps: int = 5, out: Path | None = None
) -> dict[str, Any]:
    """Write profile.html, profile.json and trace.json.gz to `out`; returns what profile.json holds. A collective.

    Where a rank was asked to end (drain), all stop after the same step, write nothing, and it returns nothing.
    """
    if steps < 1:
        raise ValueError(f"--steps {steps}: must be at least 1")
    out = out or config.output_dir / f"{config.name}.profile"
    if out.resolve() == config.run_dir.resolve():
        raise ValueError(f"--out {out}: must not be the folder of the run, output_dir/name; name another one")
    with TemporaryDirectory(prefix="imitate_ds-profile-") as scratch:
        found = _take_steps(_short(config, Path(scratch), steps), steps, out, drain or Drain())
    if found and world().is_main:
        write_atomic(out / "profile.json", (json.dumps(found, indent=1) + "\n").encode())
        write_profile_page(out, found)
        _show(found, out)
    return found


def _short(config: RunConfig, folder: Path, steps: int) -> RunConfig:
    """The run, in another folder, and as long as is needed here."""
    total = WARM + steps + TRACED
    shorter = {"max_steps": total, "epochs": total, "log_every": total, "images_every": 0, "resume": False}
    return config.model_copy(update={"output_dir": folder, "train": config.train.model_copy(update=shorter)})


def _take_steps(config: RunConfig, steps: int, out: Path, drain: Drain) -> dict[str, Any]:
    init_world(config.train.timeout_s)
    plan = open_plan(config, None)
    if world().is_main:
        out.mkdir(parents=True, exist_ok=True)
    config.run_dir.mkdir(parents=True)
    engine = start_engine(plan)
    counters = Counters(config.run_dir, engine, config.train.precision, plan.loss_flops())
    monitor = Monitor(config.run_dir, start_step=0, total_steps=plan.horizon.total_steps, speaks=False)
    calls = Calls(
        pauses_at=lambda done: False,
        pause=lambda done: "go on",
        between=lambda rate: {},
        skipped=lambda step, batch, output, taken: None,
    )
    with Timeline(training_device()) as timeline:
        window = _Window(timeline, range(WARM, WARM + steps))
        step = window.around(counters.around(partial(plan.step, engine)))
        settings = loop_settings(plan)
        stopped = train_steps(engine, plan.batches(0), step, plan.learning_rate, monitor, settings, calls, drain)
        window.close()
    if stopped is not None:
        if world().is_main:
            print(f"stopped by {stopped.signal} on rank {stopped.rank}; nothing is written: start it again", flush=True)
        return {}
    if world().is_main:
        window.profiler.export_chrome_trace(str(out / "trace.json.gz"))
    studies = plan.horizon.global_batch_size * steps / window.wall
    return {
        "format": FORMAT,
        "run": _about(config, plan.horizon.global_batch_size),
        "steps": steps,
        "seconds_per_step": window.wall / steps,
        "studies_per_second": studies,
        **counters.speed(studies),
        "time": _by_kind(window),
        "time_accounted_for": sum(window.spent.values()) / window.wall,
        "own_lines_share": sum(window.spent[kind] for kind in OWN) / window.wall,
        **{name: value for name, value in counters.record().items() if name != "format"},
        "operators": _operators(window.profiler) if world().is_main else [],
    }


class _Window:
    """The steps that are measured, and after them those under the profiler, whose trace shows what flight says."""

    def __init__(self, timeline: Timeline, measured: range):
        self.timeline, self.measured = timeline, measured
        on_cuda = timeline.device.type == "cuda"
        self.profiler = torch_profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])])
        self.began = self.wall = 0.0
        self.spent: dict[str, float] = {}
        self._label: record_function | None = None

    def around(self, step_fn: Callable[[Any], StepOutput]) -> Callable[[Any], StepOutput]:
        def step(batch: Any) -> StepOutput:
            if batch.step == self.measured.start:
                self.timeline.read()
                self.began = time.perf_counter()
            elif batch.step == self.measured.stop:
                self.spent = self.timeline.read()
                self.wall = time.perf_counter() - self.began
                self._trace()
            return step_fn(batch)

        return step

    def _trace(self) -> None:
        if not world().is_main:
            return
        self.profiler.start()
        flight.listeners.append(self._begin)
        self._begin("forward", False)

    def close(self) -> None:
        if self._label is None:
            return
        flight.listeners.remove(self._begin)
        self._label.__exit__(None, None, None)
        self.profiler.stop()

    def _begin(self, doing: str, in_collective: bool) -> None:
        if self._label is not None:
            self._label.__exit__(None, None, None)
        self._label = record_function(f"imitate_ds: {doing}{', collective' if in_collective else ''}")
        self._label.__enter__()


def _about(config: RunConfig, batch: int) -> dict[str, Any]:
    return {
        "name": config.name,
        "image_encoder": config.model.image_encoder,
        "input_size": config.data.input_size,
        "global_batch_size": batch,
        "ranks": world().size,
        "precision": config.train.precision,
        "deepspeed": config.train.deepspeed,
        "grad_cache_chunk": config.train.grad_cache_chunk,
        "workers": config.data.workers,
        "versions": {name: version(name) for name in ("torch", "deepspeed", "timm")},
    }


def _by_kind(window: _Window) -> dict[str, dict[str, float]]:
    steps = len(window.measured)
    return {
        kind: {"milliseconds": 1000 * seconds / steps, "share": seconds / window.wall}
        for kind, seconds in window.spent.items()
    }


def _operators(profiler: torch_profile) -> list[dict[str, Any]]:
    """Those that took most time themselves, on the device; a step's mean."""
    on_cuda = training_device().type == "cuda"
    own = {
        event.key: (event.self_device_time_total if on_cuda else event.self_cpu_time_total, event.count)
        for event in profiler.key_averages()
        if not event.key.startswith("imitate_ds: ")
    }
    whole = sum(time for time, _ in own.values()) or 1
    most = sorted(own.items(), key=lambda item: -item[1][0])[:OPERATORS]
    return [
        {"name": name, "calls": count / TRACED, "milliseconds": time / 1000 / TRACED, "share": time / whole}
        for name, (time, count) in most
    ]


def _show(found: dict[str, Any], out: Path) -> None:
    console, table = Console(), Table(show_header=False)
    for name, value in profile_summary(found):
        table.add_row(name, value)
    console.print(table)
    console.print(f"written: {out / 'profile.html'}, profile.json, trace.json.gz", markup=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given, rest = parser.parse_known_args(arguments)
    run_entrance("profiling", __doc__, load_run_config, partial(profile, steps=given.steps, out=given.out), rest)


if __name__ == "__main__":
    main()
