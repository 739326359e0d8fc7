"""Does a training run care which form of the loss it uses? A hundred steps on Open-i, two ranks, float32.

    python benchmarks/backends.py --shards shards/iu_xray [--only NAME ...]

The dense form is the run to follow. Beside the strips, whose rounding differs in the seventh digit, stands the dense run
itself with one temperature changed in the seventh digit: what it drifts by is the sensitivity of the training, not an
error of a backend. A ViT without BatchNorm at two rates, and the ResNet-18 of launch/runs/iu_xray_cpu.yaml. Prints a table
and writes benchmarks/results/backends-<device>.json; encoders that --only leaves out stay there as they are.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import REPOSITORY, device_slug, machine, provenance, table

RUN_FILE = "launch/runs/iu_xray_cpu.yaml"
ALWAYS = ["train.precision=fp32", "train.log_every=1", "train.images_every=0", "data.val_split=", "data.input_size=64"]
VIT = ["model.image_encoder=vit_tiny_patch16_224", "model.projection_norm=layer", "model.aggregation.pool=8"]
ENCODERS = {
    "vit_tiny, LayerNorm, rate 5e-5": [*VIT, "optim.lr=5e-5", "optim.warmup_share=0.26"],
    "vit_tiny, LayerNorm": [*VIT, "optim.lr=2e-4", "optim.warmup_share=0.26"],
    "resnet18, BatchNorm": ["optim.lr=1e-4", "optim.warmup_share=0.26"],
}
DENSE = ["objective.backend=dense"]
FOLLOWERS = {
    "strips, reduce_scatter": ["objective.backend=strips", "objective.negatives={exchange: reduce_scatter}"],
    "strips, owner": ["objective.backend=strips", "objective.negatives={exchange: owner}"],
    "dense, views_temperature 0.2000001": [*DENSE, "objective.views_temperature=0.2000001"],
}
MARKS = (10, 25, 50, 100)


def losses_of(settings: list[str], shards: Path, steps: int) -> list[float]:
    """The loss of every step of one run, read from its metrics."""
    with tempfile.TemporaryDirectory() as folder:
        here = ["name=run", f"output_dir={folder}", f"data.shards={shards}", f"train.max_steps={steps}"]
        arguments = [part for setting in here + ALWAYS + settings for part in ("--set", setting)]
        launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"]
        command = [*launcher, "--module", "imitate_ds.pretrain", "--config", RUN_FILE, *arguments]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if entry["split"] == "train"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, default=Path("shards/iu_xray"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", nargs="+", choices=ENCODERS, default=list(ENCODERS), metavar="NAME")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    device = torch.device("cpu")
    out = given.out or REPOSITORY / "benchmarks" / "results" / f"backends-{device_slug(device)}.json"
    rows, runs = [], json.loads(out.read_text())["runs"] if out.is_file() else {}
    marks = [mark for mark in MARKS if mark < given.steps] + [given.steps]
    for encoder in given.only:
        settings = ENCODERS[encoder]
        dense = losses_of(settings + DENSE, given.shards, given.steps)
        runs[encoder] = {**provenance(), "settings": settings, "dense": dense, "followers": {}}
        for name, change in FOLLOWERS.items():
            losses = losses_of(settings + change, given.shards, given.steps)
            drift = [abs(loss - other) / abs(other) for loss, other in zip(losses, dense, strict=True)]
            runs[encoder]["followers"][name] = {"losses": losses, "largest_drift": max(drift)}
            rows.append([encoder, name, *(f"{max(drift[:mark]):.0e}" for mark in marks)])
    record = {"machine": machine(device), "steps": given.steps, "runs": runs}
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(["encoder", "run", *(f"{mark} steps" for mark in marks)], rows))


if __name__ == "__main__":
    main()
