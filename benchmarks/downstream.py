"""The README's table of downstream tasks: every encoder for every task, at the same budget, on real radiographs.

    python benchmarks/downstream.py --config launch/runs/benchmark.yaml --jobs 2 --out benchmarks/results/downstream_cpu.json

What `imitate-ds benchmark` does, which goes on where it was stopped. Writes its figures, hashes of splits and settings, with
machine, date and commit, and nothing of a sample; prints the tables as Markdown.
"""

import argparse
import json
from pathlib import Path

import torch
from common import machine, provenance

from imitate_ds.benchmark import benchmark
from imitate_ds.benchmark_config import load_benchmark_config

MAIN = {
    "dice_macro": "Dice",
    "ap_macro": "AP",
    "ap50_macro": "AP50",
    "auroc_macro": "AUROC",
    "accuracy": "accuracy",
}
EVALUATED = (
    "report/image_to_text_R@5",
    "report/text_to_image_R@5",
    "impression/image_to_text_R@5",
    "findings/image_to_text_R@5",
    "auroc_macro",
    "ap_macro",
)


def with_interval(figure: dict | None) -> str:
    if not figure or figure["value"] is None:
        return ""
    low, high = figure["low"], figure["high"]
    return f"{figure['value']:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


def rows_of(values: dict) -> list[str]:
    """One line for each task, figure, part that learns and label share; an encoder in each column."""
    encoders = list(dict.fromkeys(row["encoder"] for row in values["rows"]))
    places = dict.fromkeys((row["task"], row["train"], row["share"]) for row in values["rows"])
    lines = [
        "| task | figure | training images | test images | " + " | ".join(encoders) + " | difference, p |",
        "|---" * (5 + len(encoders)) + "|",
    ]
    for task, train, share in places:
        mine = {r["encoder"]: r for r in values["rows"] if (r["task"], r["train"], r["share"]) == (task, train, share)}
        first = next(iter(mine.values()))
        for metric in [name for name in MAIN if name in first["metrics"]]:
            cells = [with_interval(mine[encoder]["metrics"][metric]) if encoder in mine else "" for encoder in encoders]
            size = f"{first['training']['samples']} ({share:.0%})"
            about = [f"{task}, {train}", MAIN[metric], size, str(first["test"]["samples"])]
            lines.append("| " + " | ".join([*about, *cells, difference_of(values, task, train, share, metric)]) + " |")
    return lines


def difference_of(values: dict, task: str, train: str, share: float, metric: str) -> str:
    found = [d for d in values["differences"] if (d["task"], d["train"], d["share"]) == (task, train, share)]
    if len(found) != 1 or found[0]["metrics"][metric]["value"] is None:
        return ""
    figure = found[0]["metrics"][metric]
    return f"{figure['value']:+.3f} [{figure['low']:+.3f}, {figure['high']:+.3f}], {figure['p']:.3f}"


def evaluation_rows(values: dict) -> list[str]:
    lines = ["| evaluation | figure | value | chance | best fixed answer |", "|---|---|---|---|---|"]
    for one in values["evaluations"]:
        metrics = one["metrics"]
        for name in [name for name in EVALUATED if name in metrics]:
            beside = [with_interval(metrics.get(name.replace("_R@", f"_{kind}_R@"))) for kind in ("chance", "blind")]
            beside = beside if "_R@" in name else ["", ""]
            lines.append(
                f"| {one['evaluation']}, {one['encoder']} | {name} | {with_interval(metrics[name])} | {' | '.join(beside)} |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("launch/runs/benchmark.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/downstream_cpu.json"))
    given = parser.parse_args()
    failed = benchmark(given.config, given.set, jobs=given.jobs)
    if failed:
        raise SystemExit(f"failed, and so not in a table that is worth printing: {', '.join(failed)}")
    config = load_benchmark_config(given.config, given.set)
    values = json.loads((config.folder / "results.json").read_text())
    evaluations = [
        {
            "evaluation": one["evaluation"],
            "encoder": one["encoder"],
            **{k: one["result"][k] for k in ("data", "metrics")},
        }
        for one in values["evaluations"]
    ]
    values |= {"evaluations": evaluations, "settings": config.model_dump(mode="json")}
    record = {**provenance(), "machine": machine(torch.device("cpu")), **values}
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join([*rows_of(record), "", *evaluation_rows(record)]))


if __name__ == "__main__":
    main()
