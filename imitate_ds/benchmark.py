"""A benchmark, an entrance: every encoder tuned for every task, at every label share and seed; one table in the end.

Each cell is a run of fine-tuning in a folder of its own; how runs are gone on with, planned_runs.py says. `--prepare` writes
the run files only, and a list of them for an array of jobs (launch/finetune.sbatch); the same command without it then makes the
table.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from imitate_ds.benchmark_config import BenchmarkConfig, BenchmarkEvaluation, load_benchmark_config
from imitate_ds.data.labeled import open_labeled
from imitate_ds.data.shard_index import open_index
from imitate_ds.data.split_lists import Part, make_split_lists
from imitate_ds.evaluate import Protocol, evaluate_grounding, evaluate_retrieval, evaluate_zero_shot
from imitate_ds.evaluation.benchmark_table import Entry, write_benchmark
from imitate_ds.finetune_config import FinetuneConfig
from imitate_ds.planned_runs import LIST, Say, first_twin, has_finished, run_planned, write_list, write_run_files


class Cell(NamedTuple):
    task: str
    encoder: str
    train: str
    share: float
    seed: int
    config: FinetuneConfig


def benchmark(
    path: Path, overrides: list[str] | None = None, *, jobs: int = 1, prepare: bool = False, say: Say = print
) -> list[str]:
    """Run what is left of a benchmark and write its table; the cells that failed, by name.

    jobs: cells that run at once, each a process of its own.
    Raises FileNotFoundError or ValueError naming the key, before anything is run.
    """
    config = load_benchmark_config(path, overrides)
    os.umask(0o077 if config.share == "private" else 0o027)
    cells = list(_cells(config))
    runs = [cell.config for cell in cells]
    if twin := first_twin(runs):
        raise ValueError(f"tasks, encoders: two cells of the table would be called {twin}; rename one of them")
    write_run_files(runs, plan="benchmark")
    left = [run for run in runs if not has_finished(run)]
    line = write_list(runs, left, config.folder / LIST, "launch/finetune.sbatch")
    if prepare:
        say(line)
        return []
    failed = list(run_planned(runs, "finetune", jobs=jobs, say=say))
    entries = [
        Entry(cell.task, cell.encoder, cell.train, cell.share, cell.seed, cell.config.run_dir)
        for cell in cells
        if cell.config.name not in failed
    ]
    write_benchmark(config.folder, config.name, config.protocol, entries, _evaluations(config, say))
    say(f"written: {config.folder / 'results.json'}, {config.folder / 'report.html'}, predictions.parquet")
    return failed


def _cells(config: BenchmarkConfig) -> Iterator[Cell]:
    for task, plan in config.tasks.items():
        for share in plan.shares:
            for seed in plan.seeds or config.seeds:
                lists = _lists(config, task, share, seed)
                for encoder in config.encoders:
                    for train in plan.train:
                        name = f"{task}-{encoder}-{train}-{share:g}-{seed}"
                        run = config.run_of(task, encoder, train, seed, name=name, data=lists)
                        yield Cell(task, encoder, train, share, seed, run)


def _lists(config: BenchmarkConfig, task: str, share: float, seed: int) -> dict[str, str]:
    """Settings of `data` that make the training part smaller, and take a validation part from it where that is asked for."""
    plan = config.tasks[task]
    if share == 1 and not plan.val_share:
        return {}
    run = config.run_of(task, next(iter(config.encoders)), plan.train[0], seed)
    index, data = open_index(run.data.shards), run.data
    annotated = set(open_labeled(index, data.train_split, run.task, data).keys)
    parts = {f"{share:g}": Part(0, share * (1 - plan.val_share))}
    if plan.val_share:
        parts["val"] = Part(1 - plan.val_share, 1)
    folder = config.folder / "lists" / task / str(seed)
    unit = "patient" if config.protocol == "strict" else "sample"
    make_split_lists(index, data.train_split, parts, folder, seed=seed, unit=unit, among=annotated)
    lists = {"train_list": str(folder / f"{share:g}.txt")}
    return lists | ({"val_split": data.train_split, "val_list": str(folder / "val.txt")} if plan.val_share else {})


def _evaluations(config: BenchmarkConfig, say: Say) -> dict[tuple[str, str], dict[str, Any]]:
    """(evaluation, encoder) -> its result, of encoders that are exports of pre-training."""
    found = {}
    for name, plan in config.evaluations.items():
        for encoder, settings in config.encoders.items():
            if not settings.get("init"):
                continue
            say(f"{name}, {encoder}")
            folder = config.folder / "evaluations" / f"{name}-{encoder}"
            found[name, encoder] = _evaluate(plan, Path(settings["init"]), folder, config.protocol)
    return found


def _evaluate(plan: BenchmarkEvaluation, model: Path, out: Path, protocol: Protocol) -> dict[str, Any]:
    shards, split = Path(plan.shards), plan.split
    if plan.task == "retrieval":
        return evaluate_retrieval(model, shards, out, split, protocol)
    if plan.task == "zero-shot":
        return evaluate_zero_shot(model, shards, out, split, protocol, branch=plan.branch)
    return evaluate_grounding(model, shards, out, split, protocol, branch=plan.branch)
