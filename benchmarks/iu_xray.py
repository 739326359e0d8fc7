"""The README's results table: four ways to an encoder on Open-i, same budget, measured alike.

    python benchmarks/iu_xray.py --shards shards/iu_xray --out benchmarks/results/iu_xray_cpu.json

Every row is launch/runs/iu_xray_cpu.yaml with a few settings changed, on two DeepSpeed ranks; a row whose export is there
is not trained again. Writes the metrics of all rows with machine, date and settings, and prints the table.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

RUN_FILE = "launch/runs/iu_xray_cpu.yaml"
INFONCE = [
    "data.impression_text=report",
    "model.aggregation.enabled=false",
    "objective.prior_strength=0.0",
    "objective.weights={image_impression: 1.0, image_findings: 0.0, views_impression: 0.0, views_findings: 0.0}",
]
ROWS = {
    "random": ("random initialisation", ["train.epochs=0"]),
    "infonce": ("InfoNCE, whole report, one level", INFONCE),
    "paper": ("preset `paper`", ["preset=paper"]),
    "default": ("preset `default`", []),
}
TASKS = ("retrieval", "zero-shot", "probe")
COLUMNS = {
    "image→report R@5": ("retrieval", "report/image_to_text_R@5"),
    "report→image R@5": ("retrieval", "report/text_to_image_R@5"),
    "zero-shot AUROC": ("zero-shot", "auroc_macro"),
    "probe AUROC, 1 %": ("probe", "1%/auroc_macro"),
    "probe AUROC, 10 %": ("probe", "10%/auroc_macro"),
    "probe AUROC, 100 %": ("probe", "100%/auroc_macro"),
}
FLOOR = {"cardiomegaly": 0.84, "effusion": 0.75, "atelectasis": 0.75, "normal": 0.69}  # raw pixels, PCA of 48 x 48


def train(row: str, shards: Path, runs: Path, extra: list[str]) -> Path:
    """The export of one row, trained unless it is there."""
    export = runs / f"iu_xray_{row}" / "export"
    if not export.is_dir():
        settings = [f"name=iu_xray_{row}", f"output_dir={runs}", f"data.shards={shards}", "train.resume=true"]
        arguments = [part for item in settings + ROWS[row][1] + extra for part in ("--set", item)]
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"]
        command = [*launcher, "--module", "imitate_ds.pretrain", "--config", RUN_FILE, *arguments]
        subprocess.run(command, check=True, env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"})
    return export


def evaluate(export: Path, shards: Path) -> dict[str, dict]:
    """Every task's metrics on the val split, through the command line a user has."""
    cli = str(Path(sys.executable).with_name("imitate-ds"))
    for task in TASKS:
        options = ["--model", str(export), "--shards", str(shards), "--out", str(export.parent)]
        subprocess.run([cli, "evaluate", task, *options], check=True, env={**os.environ, "COLUMNS": "120"})
    results = json.loads((export.parent / "results.json").read_text())["results"]
    return {result["task"]: result["metrics"] for result in results}


def figure(metrics: dict[str, dict], task: str, name: str) -> str:
    found = metrics[task].get(name)
    if not found or found["value"] is None:
        return "-"
    interval = "" if found.get("low") is None else f" [{found['low']:.3f}, {found['high']:.3f}]"
    return f"{found['value']:.3f}{interval}"


def baselines(metrics: dict[str, dict]) -> list[str]:
    """What a random order and the best fixed answer reach, for the retrieval columns."""
    names = [name for task, name in COLUMNS.values() if task == "retrieval"]
    rows = []
    for kind, title in (("chance", "random order"), ("blind", "best fixed answer")):
        cells = [figure(metrics, "retrieval", name.replace("_R@", f"_{kind}_R@")) for name in names]
        cells += ["0.500" if kind == "chance" else ""] * (len(COLUMNS) - len(names))
        rows.append("| " + " | ".join([title, *cells]) + " |")
    return rows


def table(rows: dict[str, dict]) -> str:
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row, record in rows.items():
        cells = [figure(record["metrics"], task, name) for task, name in COLUMNS.values()]
        lines.append("| " + " | ".join([ROWS[row][0], *cells]) + " |")
    lines += baselines(next(iter(rows.values()))["metrics"])
    lines += ["", "| probe, 100 % of labels | " + " | ".join(FLOOR) + " |", "|---" * (len(FLOOR) + 1) + "|"]
    for row, record in rows.items():
        cells = [figure(record["metrics"], "probe", f"100%/auroc/{label}") for label in FLOOR]
        lines.append("| " + " | ".join([ROWS[row][0], *cells]) + " |")
    lines.append(
        "| raw pixels (another part of the collection) | " + " | ".join(f"{v:.2f}" for v in FLOOR.values()) + " |"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, default=Path("shards/iu_xray"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/iu_xray_cpu.json"))
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--set", action="append", default=[], help="one more setting for every row")
    given = parser.parse_args()
    known = json.loads(given.out.read_text())["rows"] if given.out.exists() else {}
    for row in given.rows:
        export = train(row, given.shards, given.runs, given.set)
        known[row] = {"title": ROWS[row][0], "changed": ROWS[row][1], "metrics": evaluate(export, given.shards)}
        known[row]["model"] = json.loads((export / "config.json").read_text())
        rows = {name: known[name] for name in ROWS if name in known}
        machine = (
            f"{platform.machine()}, {os.cpu_count()} cores, torch {version('torch')}, deepspeed {version('deepspeed')}"
        )
        record = {"date": datetime.date.today().isoformat(), "machine": machine, "run_file": RUN_FILE, "rows": rows}
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table({name: known[name] for name in ROWS if name in known}))


if __name__ == "__main__":
    main()
