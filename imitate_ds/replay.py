"""`imitate-ds replay RUN --step N`: one step of a run again, from the weights it began with, to see what went wrong in it.

A step whose gradient was not finite leaves those weights in RUN/bad_steps. Any step that a checkpoint begins with can be done
again too. Nothing of the run is changed. What the run had compiled runs as it was written: inside compiled towers nothing can be
watched.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from imitate_ds.batch import Batch
from imitate_ds.config import load_run_config
from imitate_ds.data.loader import build_train_loader
from imitate_ds.distributed import gather_objects, init_world, leave_world, mean_over_ranks, training_device, world
from imitate_ds.pretrain import Pretraining, open_plan
from imitate_ds.recipe import with_operands
from imitate_ds.training.batch_norm import set_training_mode
from imitate_ds.training.checkpoint import load_checkpoint, read_state
from imitate_ds.training.checkpoint_files import checkpoint_folders, folder_of, verify_checkpoint
from imitate_ds.training.course import start_engine
from imitate_ds.training.engine import take_step
from imitate_ds.training.health import BAD_STEPS
from imitate_ds.training.identity import check_same_run
from imitate_ds.training.loop import seed_step


class Replayed(NamedTuple):
    """One step, done again."""

    step: int
    losses: dict[str, float]  # of the global batch
    gradient_norm: float
    keys: list[str]
    outputs: list[str]  # modules whose output was not finite, in the order they were computed
    gradients: list[str]  # parameters whose gradient was not finite
    uncompiled: Sequence[str] = ()  # towers that the run had compiled


def replay(run_dir: Path, step: int, *, precision: str = "") -> Replayed:
    """Do step `step` (counted from 0) of a run again, on as many ranks as there are now. A collective.

    precision: another one than the run's. Raises FileNotFoundError or ValueError where there are no weights of that step.
    """
    init_world()
    path = run_dir / "config.yaml"
    as_it_was = load_run_config(path)
    checkpoint = _weights_of(run_dir, step)
    plan = open_plan(as_it_was, checkpoint)
    check_same_run(plan.identity(), read_state(checkpoint)["identity"], checkpoint)
    overrides = ["train.compile=[]", *([f"train.precision={precision}"] if precision else [])]
    plan = replace(plan, config=with_operands(load_run_config(path, overrides)))
    engine = start_engine(plan)
    load_checkpoint(engine, checkpoint)
    return _one_step(engine, plan, _batch_of(plan, step))._replace(uncompiled=as_it_was.train.compile)


def _batch_of(plan: Pretraining, step: int) -> Batch:
    """Not plan.batches(step), which keeps the run's own list of what it skipped."""
    here = world()
    (batch,) = build_train_loader(
        plan.config,
        rank=here.rank,
        world_size=here.size,
        start_step=step,
        stop_step=step + 1,
        global_batch_size=plan.horizon.global_batch_size,
        folders=plan.inputs.folders,
        tokenize=plan.tokenize,
    )
    return batch


def main(run_dir: Path, step: int, precision: str) -> NoReturn:
    """Print what came of it, and end this process with its process group."""
    found = replay(run_dir, step, precision=precision)
    if world().is_main:
        print(f"step {found.step}, {len(found.keys)} studies: {' '.join(found.keys)}")
        if found.uncompiled:
            print(f"  uncompiled here, compiled in the run: {', '.join(found.uncompiled)}")
        for name, value in found.losses.items():
            print(f"  {name} {value:.6g}")
        print(f"  gradient norm {found.gradient_norm:.6g}")
        print(f"  outputs that are not finite, as computed: {_shown(found.outputs)}")
        print(f"  gradients that are not finite: {_shown(found.gradients)}")
    leave_world()


def _shown(names: list[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest or "none"


def _one_step(engine: Any, plan: Pretraining, batch: Batch) -> Replayed:
    set_training_mode(engine.module, plan.batch_norm)
    seed_step(plan.config.seed, batch.step)
    with _watched(engine.module) as (outputs, gradients):
        output = plan.step(engine, batch.to(training_device()))
    norm = take_step(engine).norm
    names = sorted(output.scalars)
    losses = mean_over_ranks(torch.stack([output.scalars[name].float() for name in names])).tolist()
    ranks = gather_objects((batch.keys, outputs, gradients))
    return Replayed(
        batch.step,
        dict(zip(names, losses, strict=True)),
        float(norm),
        sorted(key for keys, _, _ in ranks for key in keys),
        list(dict.fromkeys(name for _, found, _ in ranks for name in found)),
        list(dict.fromkeys(name for _, _, found in ranks for name in found)),
    )


@contextmanager
def _watched(model: nn.Module) -> Iterator[tuple[list[str], list[str]]]:
    """Names of the modules that computed, and of the parameters that got, something that is not finite."""
    outputs: list[str] = []
    gradients: list[str] = []

    def look_at_output(name: str, module: nn.Module, given: Any, made: Any) -> None:
        if isinstance(made, Tensor) and made.is_floating_point() and not made.isfinite().all():
            outputs.append(name)

    def look_at_gradient(name: str, gradient: Tensor) -> None:
        if not gradient.isfinite().all():
            gradients.append(name)

    hooks = [m.register_forward_hook(partial(look_at_output, name)) for name, m in model.named_modules()]
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    hooks += [parameter.register_hook(partial(look_at_gradient, name)) for name, parameter in trained]
    try:
        yield outputs, gradients
    finally:
        for hook in hooks:
            hook.remove()


def _weights_of(run_dir: Path, step: int) -> Path:
    """The checkpoint that a step began with."""
    folders = [run_dir / BAD_STEPS, run_dir / "checkpoints"]
    for folder in folders:
        found = folder_of(folder, step)
        if found.is_dir():
            if wrong := verify_checkpoint(found):
                raise ValueError(f"{found}: {wrong}; another step can be replayed")
            return found
    steps = sorted(int(path.name.removeprefix("step-")) for folder in folders for path in checkpoint_folders(folder))
    if not steps:
        raise FileNotFoundError(f"{run_dir}: neither checkpoints nor bad steps in it; name the folder of a run")
    raise ValueError(
        f"--step {step}: {run_dir} has the weights of steps {', '.join(map(str, steps))}; name one of them"
    )
