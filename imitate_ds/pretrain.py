"""Pre-training, the main entrance: `deepspeed --module imitate_ds.pretrain --config RUN.yaml [--set key=value ...]`."""

import argparse
import os
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from imitate_ds.config import RunConfig, load_run_config
from imitate_ds.data.loader import build_train_loader
from imitate_ds.data.shard_plan import rank_rows
from imitate_ds.data.transforms import TrainViews
from imitate_ds.distributed import (
    from_main,
    init_world,
    leave_world,
    max_over_ranks,
    world,
)
from imitate_ds.evaluation.validation import validate
from imitate_ds.flight import flight
from imitate_ds.recipe import (
    Horizon,
    Inputs,
    build_model,
    export,
    open_inputs,
    run_identity,
    sources_of,
    train_step,
    with_operands,
)
from imitate_ds.run_file import dump_settings, flat_settings
from imitate_ds.training.checkpoint import Checkpoints, find_checkpoint, load_checkpoint, read_state
from imitate_ds.training.checkpoint_files import Keep, checkpoint_folders
from imitate_ds.training.drain import Drain, listening
from imitate_ds.training.engine import (
    Step,
    average_batch_norm_statistics,
    build_engine,
    set_training_mode,
)
from imitate_ds.training.health import BadSteps
from imitate_ds.training.heart import Heart
from imitate_ds.training.identity import check_ranks_agree, check_same_run
from imitate_ds.training.loop import Calls, LoopSettings, Movable, StepOutput, Stopped, train_steps
from imitate_ds.training.monitor import Monitor
from imitate_ds.training.run_state import read_run_state, write_run_state
from imitate_ds.training.schedule import learning_rate, restart_period

# Raised by ourselves at the door and in the loop; their subclasses come from libraries, and get their traceback.
EXPECTED = {ValueError, FileNotFoundError, FileExistsError, PermissionError, OSError, FloatingPointError}


class Run(NamedTuple):
    """All that the steps of a run need."""

    engine: Any
    config: RunConfig
    inputs: Inputs
    checkpoints: Checkpoints
    monitor: Monitor
    drain: Drain
    metrics: dict[str, float]  # of the last validation


def pretrain(config: RunConfig, drain: Drain | None = None) -> dict[str, float]:
    """Train, validate, save and export as the run file says; returns the last validation metrics.

    Everything of the run lies in config.run_dir: config.yaml, state.json, checkpoints/, tensorboard/, metrics.jsonl, export/.
    Where a rank was asked to end (drain), all stop after the same step, with a checkpoint of it and nothing exported.
    """
    here = init_world(config.train.timeout_s)
    config = with_operands(config)
    _check_name_is_free(config)
    checkpoint = find_checkpoint(_checkpoint_folder(config)) if config.train.resume else None
    inputs = open_inputs(config, checkpoint)
    check_ranks_agree(config, run_identity(config, inputs))
    if checkpoint:
        check_same_run(run_identity(config, inputs), read_state(checkpoint)["identity"], checkpoint)
    heart = Heart(config.run_dir, config.train.timeout_s)
    try:
        start_step = read_state(checkpoint)["step"] if checkpoint else 0
        _tell(config, inputs, "running", start_step)
        flight.begin("building the model", start_step)
        engine = build_engine(build_model(config, inputs), config.train, config.optim)
        state = load_checkpoint(engine, checkpoint) if checkpoint else {"step": 0}
        if here.is_main:
            _write_atomically(config.run_dir / "config.yaml", dump_settings(config))
        metrics = _train(engine, config, inputs, state, drain or Drain())
    except BaseException as error:
        status = 2 if type(error) in EXPECTED else 1
        _tell(config, inputs, "failed", flight.step, reason=str(error).partition("\n")[0], status=status)
        if here.size > 1 and isinstance(error, RuntimeError):  # of a collective, whose partner may have died
            heart.report_failure(error)
        raise
    finally:
        heart.stop()
    return metrics


def _train(engine: Any, config: RunConfig, inputs: Inputs, state: dict[str, Any], drain: Drain) -> dict[str, float]:
    """The steps that are left after those of a checkpoint, and the export."""
    here, horizon, start_step = world(), inputs.horizon, state["step"]
    monitor = Monitor(config.run_dir, start_step=start_step, total_steps=horizon.total_steps, speaks=here.is_main)
    checkpoints = Checkpoints(_checkpoint_folder(config), _keep(config), in_background=config.train.save_in_background)
    run = Run(engine, config, inputs, checkpoints, monitor, drain, {})
    monitor.say(_describe(config, inputs, start_step))
    bad_steps = BadSteps(config.run_dir, config.train.max_bad_steps, start_step=start_step)
    batches = build_train_loader(
        config,
        rank=here.rank,
        world_size=here.size,
        start_step=start_step,
        stop_step=horizon.total_steps,
        global_batch_size=horizon.global_batch_size,
        folders=inputs.folders,
        record=config.run_dir / f"skipped.rank{here.rank}.jsonl",
    )
    temperature = config.objective.temperature
    settings = LoopSettings(
        seed=config.seed,
        total_steps=horizon.total_steps,
        global_batch_size=horizon.global_batch_size,
        batch_norm=inputs.batch_norm,
        skips_overflow=config.train.precision == "fp16",
        log_every=config.train.log_every,
        images_every=config.train.images_every,
        lowest_temperature=temperature.min if temperature.learnable else 0.0,
    )

    def between() -> dict[str, float]:
        checkpoints.poll()
        return {"bad_steps": bad_steps.count, "skipped_samples": batches.skipped.total()}

    def skipped(step: int, batch: Movable, output: StepOutput, taken: Step) -> None:
        at = {"step": step, "identity": run_identity(config, inputs)}
        bad_steps.note(engine, step, batch.keys, output.scalars, taken.norm, at)
        monitor.warn(step + 1, "the gradient is not finite; the step was skipped")

    calls = Calls(
        pauses_at=lambda done: _saves_at(done, config, horizon) or _validates_at(done, config, horizon),
        pause=partial(_pause, run),
        between=between,
        skipped=skipped,
    )
    period = restart_period(horizon.samples, horizon.global_batch_size, config.optim.restart_epochs)
    rate = partial(learning_rate, total_steps=horizon.total_steps, optim=config.optim, period=period)
    views = TrainViews(config.data.augment, config.data.input_size)
    try:
        had_ended = start_step == horizon.total_steps and _validates_at(start_step, config, horizon)
        if state.get("validation_due") or had_ended:  # it was stopped before it could; or say again how it stands
            _validate(run, start_step)
        stopped = train_steps(
            engine, batches, partial(train_step, engine, config, views), rate, monitor, settings, calls, drain
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
    export(run.engine, run.config, run.inputs)
    run.monitor.hyperparameters(flat_settings(run.config.model_dump(mode="json")), run.metrics)
    run.monitor.say(f"export: {run.config.run_dir / 'export'}")
    _tell(run.config, run.inputs, "finished", run.inputs.horizon.total_steps)


def _drain(run: Run, stopped: Stopped) -> None:
    """Leave a checkpoint of exactly this step, and say so."""
    done = stopped.done
    if not _saves_at(done, run.config, run.inputs.horizon):
        average_batch_norm_statistics(run.engine.module)
        _save(run, done)
    run.checkpoints.finish()
    reason = f"{stopped.signal} on rank {stopped.rank}"
    run.monitor.say(f"step {done}: stopped by {reason}; --set train.resume=true goes on from here")
    _tell(run.config, run.inputs, "drained", done, reason=reason)


def _tell(config: RunConfig, inputs: Inputs, state: str, step: int, reason: str = "", status: int = 0) -> None:
    """Write state.json, on rank 0. A failure of any rank ends the run, so rank 0 comes to tell it too.

    status: how the process will exit; 2 says that to start it again as it is would not help.
    """
    if not world().is_main:
        return
    started = {}
    if state == "running":
        restarts = read_run_state(config.run_dir).get("restarts", -1) + 1 if step else 0
        started = {"restarts": restarts, "ranks": world().size, "nodes": inputs.nodes}
    try:
        horizon = inputs.horizon
        totals = {"total_steps": horizon.total_steps, "global_batch_size": horizon.global_batch_size}
        write_run_state(config.run_dir, state, step=step, reason=reason, status=status, **totals, **started)  # type: ignore[arg-type]
    except OSError:
        if state != "failed":  # there, what went wrong is on its way to the user already
            raise


def _checkpoint_folder(config: RunConfig) -> Path:
    return config.run_dir / "checkpoints"


def _keep(config: RunConfig) -> Keep:
    train = config.train
    return Keep(train.keep_last, train.keep_every, train.keep_best, train.best_metric)


def _check_name_is_free(config: RunConfig) -> None:
    """Raise ValueError on all ranks where a new run would write into the folder of another one."""
    if not config.train.resume and from_main(lambda: bool(checkpoint_folders(_checkpoint_folder(config)))):
        raise ValueError(
            f"name = {config.name!r}: {config.run_dir} already holds checkpoints; go on with "
            "--set train.resume=true, or choose another name"
        )


def _saves_at(done: int, config: RunConfig, horizon: Horizon) -> bool:
    """Every save_every steps, at the end of the run, and where a checkpoint may turn out to be the best."""
    due = done % (config.train.save_every or horizon.steps_per_epoch) == 0 or done == horizon.total_steps
    return due or bool(config.train.keep_best and _validates_at(done, config, horizon))


def _validates_at(done: int, config: RunConfig, horizon: Horizon) -> bool:
    """At the end of every eval_every-th epoch and of the run."""
    if not config.data.val_split or not config.train.eval_every:
        return False
    epochs, rest = divmod(done, horizon.steps_per_epoch)
    return done == horizon.total_steps or (rest == 0 and epochs % config.train.eval_every == 0)


def _pause(run: Run, done: int) -> None:
    """Validate and save, where `done` steps are the time for it."""
    average_batch_norm_statistics(run.engine.module)
    validated = not _validates_at(done, run.config, run.inputs.horizon) or _validate(run, done)
    if _saves_at(done, run.config, run.inputs.horizon):
        _save(run, done, validation_due=not validated)


def _validate(run: Run, done: int) -> bool:
    """Validate, unless some rank is asked to end: the time that is left is for the checkpoint. Whether it was done."""

    def asked_to_end() -> bool:
        return bool(max_over_ranks(run.drain.signal))

    flight.begin("validation")
    found = validate(
        run.engine,
        run.config,
        run.inputs.folders,
        run.inputs.text_encoder,
        batch_size=len(rank_rows(run.inputs.horizon.global_batch_size, 0, world().size)),
        stop=asked_to_end,
    )
    set_training_mode(run.engine.module, run.inputs.batch_norm)
    if found is None:
        return False
    run.metrics.clear()
    run.metrics.update(found)
    run.monitor.scalars(done, found, split="val")
    run.monitor.say(f"step {done}: " + "  ".join(f"{k} {v:.3f}" for k, v in found.items() if k.endswith("R@5")))
    return True


def _save(run: Run, done: int, *, validation_due: bool = False) -> None:
    flight.begin("saving")
    validated_now = _validates_at(done, run.config, run.inputs.horizon) and not validation_due
    state = {
        "step": done,
        "samples_seen": done * run.inputs.horizon.global_batch_size,
        "metrics": dict(run.metrics) if validated_now else {},
        "validation_due": validation_due,
        # No random states: every random number is a function of config.seed and the step (loop.py, data/loader.py).
        "config": run.config.model_dump(mode="json"),
        "identity": run_identity(run.config, run.inputs),
    }
    run.checkpoints.save(run.engine, done, state)


def _describe(config: RunConfig, inputs: Inputs, start_step: int) -> str:
    horizon = inputs.horizon
    kind = " (synthetic)" if all(folder.synthetic for folder in inputs.folders) else ""
    start = f", resuming at step {start_step}" if start_step else ""
    return (
        f"{config.name}: {horizon.samples} studies of {sources_of(inputs)}{kind}, {config.model.image_encoder}, "
        f"{world().size} rank(s) on {inputs.nodes} node(s), batch {horizon.global_batch_size}, "
        f"{horizon.total_steps} steps of {config.train.epochs} epoch(s){start}"
    )


def _write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path = path.with_name(path.name + ".tmp")
    partial_path.write_text(text)
    partial_path.rename(path)


def main(arguments: list[str] | None = None) -> None:
    """Entrance of every rank. What is wrong with the input is one clear message and status 2; a bug is a traceback.

    Either way the process ends at once: a rank that lingers would leave the others waiting in a collective.
    """
    parser = argparse.ArgumentParser(prog="imitate_ds.pretrain", description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="run file (YAML)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    given = parser.parse_args(arguments)
    rank, status = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0"), 1
    try:
        config = load_run_config(given.config, given.set)
        os.umask(0o077 if config.share == "private" else 0o027)  # for all that the run writes
        with listening() as drain:
            pretrain(config, drain)
        status = 0
    except (ValueError, OSError, FloatingPointError) as error:
        if type(error) in EXPECTED and not os.environ.get("IMITATE_DS_TRACEBACK"):
            status = 2
            print(f"imitate_ds.pretrain: rank {rank}: {error}\n(IMITATE_DS_TRACEBACK=1 shows where)", file=sys.stderr)
        else:
            raise
    finally:
        if status == 1:
            traceback.print_exc()
        leave_world(status)


if __name__ == "__main__":
    main()
