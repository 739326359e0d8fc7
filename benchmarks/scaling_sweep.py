"""What a scaling sweep comes to on this machine, and how long it takes (benchmarks/scaling.py is about the loss alone).

    python benchmarks/scaling_sweep.py --jobs 2

What `imitate-ds scale` does, which goes on where it was stopped: `seconds` are those of this call, and tell how long a sweep
takes only where `runs_before` is 0. Writes what scaling.json says, with machine, date and commit, and nothing of a sample;
prints the laws.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import REPOSITORY, machine, provenance, table

from imitate_ds.scale import scale
from imitate_ds.scale_config import load_scale_config


def law_rows(lines: list[dict]) -> list[list[str]]:
    return [
        [
            line["measure"],
            line["axis"],
            line["line"],
            str(len(line["runs"])),
            *map(law_of(line), ("floor", "scale", "exponent")),
        ]
        for line in lines
    ]


def law_of(line: dict) -> Callable[[str], str]:
    """The name of a parameter -> its value, with its interval."""
    law = line["law"] or {}

    def shown(name: str) -> str:
        interval = (law.get("intervals") or {}).get(name)
        value = f"{law[name]:.3g}" if law.get(name) else ""
        return value + (f" [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else "")

    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("launch/runs/scale_phantom.yaml"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks/results/scaling_phantom_cpu.json")
    given = parser.parse_args()
    folder = load_scale_config(given.config, given.set).folder
    path = folder / "scaling.json"
    before = (
        [run for run in json.loads(path.read_text())["runs"] if run["state"] == "finished"] if path.is_file() else []
    )
    began = time.perf_counter()
    scale(given.config, given.set, jobs=given.jobs)
    took = {"seconds": round(time.perf_counter() - began), "jobs": given.jobs, "runs_before": len(before)}
    found = json.loads(path.read_text())
    print(table(["figure", "against", "line", "runs", "a", "b", "c"], law_rows(found["lines"])))
    values = {"machine": machine(torch.device("cpu")), **provenance(), **took, **found}
    given.out.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
