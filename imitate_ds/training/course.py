"""A run from its start, or from its last checkpoint, to its end: pre-training and fine-tuning alike.

It resumes, steps, validates, saves, stops where it is asked to, and tells in files how it stands. What is learned, and from
what, is the Plan's.
"""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from torch import nn

from imitate_ds.distributed import from_main, gather_objects, init_world, max_over_ranks, training_device, world
from imitate_ds.flight import flight
from imitate_ds.run_file import dump_settings, flat_settings
from imitate_ds.training.batch_norm import average_batch_norm_statistics, set_training_mode
from imitate_ds.training.checkpoint import Checkpoints, find_checkpoint, load_checkpoint, read_state
from imitate_ds.training.checkpoint_files import Keep, checkpoint_folders
from imitate_ds.training.counters import Counters
from imitate_ds.training.drain import Drain
from imitate_ds.training.engine import Step, build_engine, sharded_build
from imitate_ds.training.health import BadSteps
from imitate_ds.training.heart import Heart
from imitate_ds.training.identity import check_ranks_agree, check_same_run
from imitate_ds.training.loop import Calls, LoopSettings, Movable, StepOutput, Stopped, stopped_by, train_steps
from imitate_ds.training.monitor import Monitor
from imitate_ds.training.run_state import read_run_state, write_run_state
from imitate_ds.training.timeline import Timeline

# Raised by ourselves at the door and in the loop; their subclasses come from libraries, and get their traceback.
EXPECTED = {ValueError, FileNotFoundError, FileExistsError, PermissionError, OSError, FloatingPointError}


class Horizon(NamedTuple):
    """How long a run is, in optimizer steps."""

    samples: int
    global_batch_size: int
    steps_per_epoch: int
    total_steps: int


class Batches(Protocol):
    """A rank's batches, in the order of the steps; how many samples were passed over, by reason."""

    skipped: Counter[str]

    def __iter__(self) -> Iterator[Movable]: ...


@dataclass(frozen=True, kw_only=True)
class Plan(ABC):
    """What is learned in a run, opened and checked. Methods that take the engine are collectives."""

    config: Any  # a run file: name, run_dir, seed, train, optim
    horizon: Horizon
    batch_norm: str  # resolved policy
    nodes: int
    validates: bool  # is there anything to validate on
    best_metric: str  # of validation; more is better
    patience: int = 0  # validations without a better one, after which training ends; 0: it does not
    lowest_temperature: float = 0.0  # of a temperature that is learned; 0: none is

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What must be the same when the run goes on, as JSON values."""

    @abstractmethod
    def describe(self) -> str:
        """One line for people."""

    @abstractmethod
    def build_model(self) -> nn.Module:
        """With what must not train frozen."""

    def loss_flops(self) -> float:
        """Of a study, forward and backward: what of the step's products no module of the model computes."""
        return 0.0

    def rate_share(self, parameter: str) -> float:
        """Of the learning rate of the step, for a parameter by name."""
        return 1.0

    @abstractmethod
    def batches(self, start_step: int) -> Batches: ...

    @abstractmethod
    def step(self, engine: Any, batch: Any) -> StepOutput:
        """Forward and backward."""

    @abstractmethod
    def learning_rate(self, step: int) -> float: ...

    @abstractmethod
    def validate(self, engine: Any, stop: Callable[[], bool]) -> dict[str, float] | None:
        """None where `stop`, which must be asked on all ranks alike, said True."""

    @abstractmethod
    def finish(self, engine: Any, checkpoints: Path) -> dict[str, float]:
        """Leave what the run was for; figures, where it ends in some."""


class Run(NamedTuple):
    """All that the steps of a run need."""

    plan: Plan
    engine: Any
    checkpoints: Checkpoints
    monitor: Monitor
    drain: Drain
    metrics: dict[str, float]  # of the last validation
    waited: list[float]  # the best figure so far, and how many validations ago it was; empty before the first
    due: set[int]  # steps after which a validation was broken off
    reached: list[int]  # steps at which the run was looked at; the last is where it ends, early or not


def take_course(
    config: Any, open_plan: Callable[[Any, Path | None], Plan], drain: Drain | None = None
) -> dict[str, float]:
    """Run what the run file says, to its end; returns the last figures.

    open_plan: config and the checkpoint to go on from -> Plan. Everything of the run lies in config.run_dir: config.yaml,
    state.json, checkpoints/, tensorboard/, metrics.jsonl. Where a rank was asked to end (drain), all stop after the same step,
    with a checkpoint of it and nothing finished.
    """
    here = init_world(config.train.timeout_s)
    _check_name_is_free(config)
    checkpoint = find_checkpoint(_checkpoint_folder(config)) if config.train.resume else None
    plan = open_plan(config, checkpoint)
    check_ranks_agree(plan.config, plan.identity())
    if checkpoint:
        check_same_run(plan.identity(), read_state(checkpoint)["identity"], checkpoint)
    heart = Heart(config.run_dir, config.train.timeout_s)
    try:
        start_step = read_state(checkpoint)["step"] if checkpoint else 0
        _tell(plan, "running", start_step)
        flight.begin("building the model", start_step)
        engine = start_engine(plan)
        state = load_checkpoint(engine, checkpoint) if checkpoint else {"step": 0}
        if here.is_main:
            _write_atomically(config.run_dir / "config.yaml", dump_settings(plan.config))
        return _train(plan, engine, state, drain or Drain())
    except BaseException as error:
        status = 2 if type(error) in EXPECTED else 1
        reason = re.sub(r"^\[\S*\] ", "", str(error).partition("\n")[0])  # without the place in a library's C++
        _tell(plan, "failed", flight.step, reason=reason, status=status)
        of_collective = here.size > 1 and isinstance(error, RuntimeError)  # whose partner may have died
        if of_collective and (silent := heart.report_failure(error)):
            _tell(plan, "failed", flight.step, reason="; ".join(silent), status=status)
        raise
    finally:
        heart.stop()


def start_engine(plan: Plan) -> Any:
    """The model of a run in the engine that trains it. A collective."""
    with sharded_build(plan.config.train):
        model = plan.build_model()
    return build_engine(model, plan.config.train, plan.config.optim, plan.rate_share)


def loop_settings(plan: Plan) -> LoopSettings:
    config, train = plan.config, plan.config.train
    return LoopSettings(
        seed=config.seed,
        total_steps=plan.horizon.total_steps,
        global_batch_size=plan.horizon.global_batch_size,
        batch_norm=plan.batch_norm,
        skips_overflow=train.precision == "fp16",
        log_every=train.log_every,
        images_every=train.images_every,
        lowest_temperature=plan.lowest_temperature,
    )


def _train(plan: Plan, engine: Any, state: dict[str, Any], drain: Drain) -> dict[str, float]:
    """The steps that are left after those of a checkpoint, and the end."""
    here, horizon, start_step, train = world(), plan.horizon, state["step"], plan.config.train
    run_dir = plan.config.run_dir
    monitor = Monitor(run_dir, start_step=start_step, total_steps=horizon.total_steps, speaks=here.is_main)
    checkpoints = Checkpoints(_checkpoint_folder(plan.config), _keep(plan), in_background=train.save_in_background)
    run = Run(plan, engine, checkpoints, monitor, drain, {}, list(state.get("waited", [])), set(), [start_step])
    monitor.say(plan.describe() + (f", resuming at step {start_step}" if start_step else ""))
    bad_steps = BadSteps(run_dir, train.max_bad_steps, start_step=start_step)
    batches = plan.batches(start_step)
    counters = Counters(run_dir, engine, train.precision, plan.loss_flops())
    timeline = Timeline(training_device())

    def between(rate: float) -> dict[str, float]:
        checkpoints.poll()
        counts = {"bad_steps": bad_steps.count, "skipped_samples": batches.skipped.total()}
        return counts | counters.rates(rate) | timeline.shares()

    def skipped(step: int, batch: Movable, output: StepOutput, taken: Step) -> None:
        at = {"step": step, "identity": plan.identity()}
        bad_steps.note(engine, step, batch.keys, output.scalars, taken.norm, at)
        monitor.warn(step + 1, "the gradient is not finite; the step was skipped")

    calls = Calls(
        pauses_at=lambda done: _saves_at(done, plan) or _validates_at(done, plan),
        pause=partial(_pause, run),
        between=between,
        skipped=skipped,
    )
    try:
        had_ended = start_step == horizon.total_steps and _validates_at(start_step, plan)
        stopped = None
        if state.get("validation_due"):  # it was stopped before it could
            if _validate(run, start_step):
                _save(run, start_step)  # with its figures, so that it can be the best
            else:
                run.due.add(start_step)
                stopped = stopped_by(start_step, gather_objects(drain.signal))
        elif had_ended:  # say again how it stands
            _validate(run, start_step)
        if stopped is None and not _waited_long_enough(run):
            step = counters.around(partial(plan.step, engine))
            with timeline:
                stopped = train_steps(
                    engine, batches, step, plan.learning_rate, monitor, loop_settings(plan), calls, drain
                )
        if stopped is None:
            _finish(run)
        else:
            _drain(run, stopped)
    finally:
        monitor.close()
    return run.metrics


def _finish(run: Run) -> None:
    run.checkpoints.finish()
    flight.begin("export")
    run.metrics.update(run.plan.finish(run.engine, run.checkpoints.folder))
    run.monitor.hyperparameters(flat_settings(run.plan.config.model_dump(mode="json")), run.metrics)
    run.monitor.say(f"export: {run.plan.config.run_dir / 'export'}")
    _tell(run.plan, "finished", run.reached[-1])


def _drain(run: Run, stopped: Stopped) -> None:
    """Leave a checkpoint of exactly this step, and say so."""
    done = stopped.done
    if not _saves_at(done, run.plan):
        average_batch_norm_statistics(run.engine.module)
        _save(run, done)
    run.checkpoints.finish()
    reason = f"{stopped.signal} on rank {stopped.rank}"
    run.monitor.say(f"step {done}: stopped by {reason}; --set train.resume=true goes on from here")
    _tell(run.plan, "drained", done, reason=reason)


def _tell(plan: Plan, state: str, step: int, reason: str = "", status: int = 0) -> None:
    """Write state.json, on rank 0. A failure of any rank ends the run, so rank 0 comes to tell it too.

    status: how the process will exit; 2 says that to start it again as it is would not help.
    """
    if not world().is_main:
        return
    run_dir, started = plan.config.run_dir, {}
    if state == "running":
        restarts = read_run_state(run_dir).get("restarts", -1) + 1 if step else 0
        started = {"restarts": restarts, "ranks": world().size, "nodes": plan.nodes}
    try:
        totals = {"total_steps": plan.horizon.total_steps, "global_batch_size": plan.horizon.global_batch_size}
        write_run_state(run_dir, state, step=step, reason=reason, status=status, **totals, **started)  # type: ignore[arg-type]
    except OSError:
        if state != "failed":  # there, what went wrong is on its way to the user already
            raise


def _checkpoint_folder(config: Any) -> Path:
    return config.run_dir / "checkpoints"


def _keep(plan: Plan) -> Keep:
    train = plan.config.train
    return Keep(train.keep_last, train.keep_every, train.keep_best, plan.best_metric)


def _check_name_is_free(config: Any) -> None:
    """Raise ValueError on all ranks where a new run would write into the folder of another one."""
    if not config.train.resume and from_main(lambda: bool(checkpoint_folders(_checkpoint_folder(config)))):
        raise ValueError(
            f"name = {config.name!r}: {config.run_dir} already holds checkpoints; go on with "
            "--set train.resume=true, or choose another name"
        )


def _saves_at(done: int, plan: Plan) -> bool:
    """Every save_every steps, at the end of the run, and where a checkpoint may turn out to be the best."""
    horizon, train = plan.horizon, plan.config.train
    due = done % (train.save_every or horizon.steps_per_epoch) == 0 or done == horizon.total_steps
    return due or bool(train.keep_best and _validates_at(done, plan))


def _validates_at(done: int, plan: Plan) -> bool:
    """At the end of every eval_every-th epoch and of the run."""
    horizon, every = plan.horizon, plan.config.train.eval_every
    if not plan.validates or not every:
        return False
    epochs, rest = divmod(done, horizon.steps_per_epoch)
    return done == horizon.total_steps or (rest == 0 and epochs % every == 0)


def _pause(run: Run, done: int) -> Literal["go on", "enough", "broken off"]:
    """Validate and save, where `done` steps are the time for it."""
    run.reached.append(done)
    average_batch_norm_statistics(run.engine.module)
    if _validates_at(done, run.plan) and not _validate(run, done):
        run.due.add(done)
    if _saves_at(done, run.plan):
        _save(run, done)
    if done in run.due:
        return "broken off"
    return "enough" if _waited_long_enough(run) else "go on"


def _validate(run: Run, done: int) -> bool:
    """Validate, unless some rank is asked to end: the time that is left is for the checkpoint. Whether it was done.

    After the last step it goes on to the end, for no checkpoint is then due that would say it was not done.
    """
    last = done == run.plan.horizon.total_steps

    def asked_to_end() -> bool:
        return bool(max_over_ranks(run.drain.signal)) and not last

    flight.begin("validation")
    found = run.plan.validate(run.engine, asked_to_end)
    set_training_mode(run.engine.module, run.plan.batch_norm)
    if found is None:
        return False
    run.metrics.clear()
    run.metrics.update(found)
    _count(run, found.get(run.plan.best_metric))
    run.monitor.scalars(done, found, split="val")
    shown = {name: value for name, value in found.items() if name.endswith("R@5") or name == run.plan.best_metric}
    run.monitor.say(f"step {done}: " + "  ".join(f"{name} {value:.3f}" for name, value in shown.items()))
    return True


def _count(run: Run, figure: float | None) -> None:
    """How many validations ago the best one was."""
    if figure is None:
        return
    if not run.waited or figure > run.waited[0]:
        run.waited[:] = [figure, 0]
    else:
        run.waited[1] += 1


def _waited_long_enough(run: Run) -> bool:
    return bool(run.plan.patience and run.waited and run.waited[1] >= run.plan.patience)


def _save(run: Run, done: int) -> None:
    flight.begin("saving")
    validated_now = _validates_at(done, run.plan) and done not in run.due
    state = {
        "step": done,
        "samples_seen": done * run.plan.horizon.global_batch_size,
        "metrics": dict(run.metrics) if validated_now else {},
        "validation_due": done in run.due,
        "waited": list(run.waited),
        # No random states: every random number is a function of config.seed and the step (loop.py, data/loader.py).
        "config": run.plan.config.model_dump(mode="json"),
        "identity": run.plan.identity(),
    }
    run.checkpoints.save(run.engine, done, state)


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(path.name + ".tmp")
    partial_path.write_text(text)
    partial_path.rename(path)
