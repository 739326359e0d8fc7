"""A scaling sweep, an entrance: pre-training at every size that the axes of a sweep name, and the laws in what comes of it.

How its runs are gone on with, planned_runs.py says. `--slurm` trains nothing: it writes the run files, a list of them for an
array of jobs (launch/pretrain.sbatch), and the page of those that have finished; it says the line that submits what is left.
"""

import math
import os
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from imitate_ds.config import RunConfig
from imitate_ds.data.shard_index import ShardIndex
from imitate_ds.data.shard_urls import is_remote
from imitate_ds.data.train_plan import build_train_plan, open_train_folders
from imitate_ds.evaluate import evaluate_probe
from imitate_ds.evaluation.scaling_page import write_scaling
from imitate_ds.evaluation.scaling_rows import Planned, ScalingRow, probe_figure, read_row
from imitate_ds.models.image_encoder import ImageEncoder
from imitate_ds.planned_runs import (
    LIST,
    Say,
    first_twin,
    has_finished,
    run_planned,
    write_list,
    write_run_files,
)
from imitate_ds.scale_config import ScaleConfig, ScaleProbe, load_scale_config
from imitate_ds.status import GOES_ON, read_statuses
from imitate_ds.training.run_state import read_run_state

SCRIPT = "launch/pretrain.sbatch"


class Cell(NamedTuple):
    planned: Planned
    config: RunConfig


def scale(
    path: Path, overrides: list[str] | None = None, *, jobs: int = 1, slurm: bool = False, say: Say = print
) -> list[str]:
    """Run what is left of a sweep and write its page; the runs that failed, by name.

    jobs: runs at once, each a process of its own. Raises FileNotFoundError or ValueError naming the key, before anything runs.
    """
    config = load_scale_config(path, overrides)
    os.umask(0o077 if config.share == "private" else 0o027)
    folders = _check_encoders_and_open(config)
    cells = list(_cells(config, folders))
    runs = [cell.config for cell in cells]
    if twin := first_twin(runs):
        raise ValueError(f"axes.encoders: two runs would be called {twin}; rename one of the encoders")
    say(_size(config, cells))
    write_run_files(runs, plan="sweep")
    failed: dict[str, str] = {}
    if slurm:
        say(write_list(runs, _left(runs), config.folder / LIST, SCRIPT, "--set", "train.resume=true"))
    else:
        failed = run_planned(runs, "pretrain", jobs=jobs, say=say)
    if config.probe and not slurm:
        failed |= _probe(config, runs, say)
    write_scaling(config.folder, config.name, _rows(config, cells, failed), synthetic=all(f.synthetic for f in folders))
    say(f"written: {config.folder / 'scaling.html'}, scaling.csv, scaling.json")
    return list(failed)


def _check_encoders_and_open(config: ScaleConfig) -> list[ShardIndex]:
    """What every run reads, opened. Raises what a run would raise of its encoder and its shards, before the first is begun."""
    runs = [config.run_of(encoder) for encoder in config.axes.encoders]
    for encoder, run in zip(config.axes.encoders, runs, strict=True):
        try:
            with torch.device("meta"):  # its shapes alone
                ImageEncoder(run.model.model_copy(update={"weights": "none"}), run.data.input_size)
        except ValueError as error:
            raise ValueError(f"axes.encoders.{encoder}: {error}") from None
    folders = open_train_folders(runs[0].data)
    for encoder, run in zip(config.axes.encoders, runs, strict=True):
        if run.data.shards != runs[0].data.shards or run.data.train_split != runs[0].data.train_split:
            raise ValueError(
                f"axes.encoders.{encoder}.data.shards: all runs of a sweep must read the same; set it in `run`"
            )
    if config.probe:
        _check_probe(config.probe, runs[0].data.shards[0].shards, folders[0])
    return folders


def _check_probe(probe: ScaleProbe, place: str, folder: ShardIndex) -> None:
    """Now, and not when the first run has been trained."""
    if is_remote(place):
        raise ValueError(
            f"probe: {place} is not on this machine, where a probe reads its samples; set probe: null, or copy them"
        )
    if not folder.labels:
        raise ValueError(f"probe: {place} has no labels to probe for; set probe: null, or build shards with labels")
    for name, split in zip(("split", "train_split"), probe.splits, strict=True):
        if split not in folder.splits:
            raise ValueError(f"probe.{name} = {split!r}: {place} has {', '.join(folder.splits)}; name one of them")


def _cells(config: ScaleConfig, folders: Sequence[ShardIndex]) -> Iterator[Cell]:
    axes = config.axes
    for encoder in axes.encoders:
        run = config.run_of(encoder)
        batch_sizes = axes.batch_sizes or (run.train.studies_of(1),)
        negatives, shares = axes.negatives or (run.objective.negatives.scope,), axes.shares or (run.data.share,)
        for at in product(batch_sizes, negatives, shares, axes.studies or (0,), axes.seeds or (run.seed,)):
            yield _cell(config, folders, encoder, *at)


def _cell(
    config: ScaleConfig,
    folders: Sequence[ShardIndex],
    encoder: str,
    batch: int,
    negatives: str,
    share: float,
    studies: int,
    seed: int,
) -> Cell:
    """The run of one place in the sweep; studies: that it sees, 0 where its epochs decide."""
    seen = f"-n{studies}" if studies else ""
    settings: dict[str, Any] = {
        "name": f"{encoder}-b{batch}-{negatives}-d{share:.15g}{seen}-s{seed}",
        "seed": seed,
        "data": {"share": share},
        "objective": {"negatives": {"scope": negatives}},
        "train": {"global_batch_size": batch},
    }
    run = config.run_of(encoder, **settings)
    plan = build_train_plan(run.data, folders, seed=seed, global_batch_size=batch)
    if studies:
        steps = math.ceil(studies / batch)
        settings["train"] |= {"max_steps": steps, "epochs": math.ceil(steps / plan.steps_per_epoch)}
        run = config.run_of(encoder, **settings)
    steps = plan.steps_per_epoch * run.train.epochs
    steps = min(steps, run.train.max_steps or steps)
    return Cell(Planned(encoder, batch, negatives, share, studies, seed, plan.different, steps), run)


def _size(config: ScaleConfig, cells: Sequence[Cell]) -> str:
    finished = sum(has_finished(cell.config) for cell in cells)
    studies = sum(cell.planned.steps * cell.planned.batch for cell in cells)
    left = sum(cell.planned.steps * cell.planned.batch for cell in cells if not has_finished(cell.config))
    done = f"; {finished} have finished, {left:,} studies are left" if finished else ""
    return f"{config.name}: {len(cells)} runs of {studies:,} studies together{done}"


def _left(runs: Sequence[RunConfig]) -> list[RunConfig]:
    """Those that neither have finished nor go on."""
    statuses = read_statuses(run.run_dir for run in runs)
    return [run for run, status in zip(runs, statuses, strict=True) if status.state not in ("finished", *GOES_ON)]


def _probe(config: ScaleConfig, runs: Sequence[RunConfig], say: Say) -> dict[str, str]:
    """Probe the exports that were not yet; those that cannot be, and why."""
    assert config.probe is not None
    failed = {}
    for run in runs:
        if not has_finished(run) or probe_figure(run.run_dir, config.probe.splits):
            continue
        say(f"probe  {run.name}")
        shards = Path(run.data.shards[0].shards)
        try:
            evaluate_probe(
                run.run_dir / "export", shards, run.run_dir, config.probe.split, train_split=config.probe.train_split
            )
        except (ValueError, OSError) as error:  # the page is written all the same
            failed[run.name] = f"probe: {error}"
            say(f"probe  {run.name}: {error}")
    return failed


def _rows(config: ScaleConfig, cells: Sequence[Cell], failed: dict[str, str]) -> list[ScalingRow]:
    rows, splits = [], config.probe.splits if config.probe else None
    for cell in cells:
        state = read_run_state(cell.config.run_dir)
        if reason := failed.get(cell.config.name):
            state = {**state, "reason": reason} | ({} if has_finished(cell.config) else {"state": "failed"})
        rows.append(read_row(cell.planned, cell.config.run_dir, state, splits))
    return rows
