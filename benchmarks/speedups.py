"""Does what makes a step faster or smaller leave the run what it is? The loss curves of every such setting beside a plain run's.

    python benchmarks/speedups.py [--steps 100] [--ranks 2] [--only stage bf16 ...] [--out FILE]

Pre-trains two tiny networks on phantoms, one with BatchNorm and one without, on CPU ranks under gloo, once for every setting, by
the same entrance as every run. Channels last is always on. What a change of rounding alone does is measured beside: a rate that
differs in its last bit, and the compiled network in float64, where a curve that is another one would stay another one. Writes the
largest relative difference of the loss at any step, the difference that the precision allows, and seconds a step (of a network so
small that they say nothing about speed) to benchmarks/results/speedups_cpu.json; stops with status 1 where a curve leaves its
plain one.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from common import REPOSITORY, machine, provenance, table
from deepspeed.accelerator import get_accelerator

from imitate_ds.config import build_run_config
from imitate_ds.data.shards import build_shards
from imitate_ds.data.sources.phantom import PhantomSource
from imitate_ds.data.text_cache import embed_shards, fit_texts
from imitate_ds.distributed import barrier, init_world, leave_world
from imitate_ds.models.lsa_encoder import LsaEncoder
from imitate_ds.pretrain import Pretraining, pretrain
from imitate_ds.run_file import merged

LR = 1e-4
FP32, BF16 = 1e-3, 5e-2  # a loss that is a hundred steps of rounding apart
FP64 = 1e-6  # losses are logged in float32
BATCH_NORM = {"image_encoder": "test_resnet", "projection_norm": "batch"}
NO_BATCH_NORM = {"image_encoder": "test_convnext", "projection_norm": "layer"}


class Switch(NamedTuple):
    settings: dict
    tolerance: float = FP32
    network: str = "resnet"
    plain: str = "plain"  # which run it must equal
    float64: bool = False


COMPILED = {"train": {"compile": ["image_encoder", "findings_branch", "projections"]}}
WIDE = {"deepspeed": "zero0"}  # the one stage at which DeepSpeed leaves float64 as it is
SWITCHES = {
    "plain": Switch({}),
    # no speed-up: how far runs come apart by rounding alone, told so that the others can be read beside it
    "rate, a bit more": Switch({"optim": {"lr": LR * (1 + 2**-23)}}),
    "strips": Switch({"objective": {"backend": "strips"}}),
    "stage": Switch({"train": {"activation_checkpointing": "stage"}}),
    "block": Switch({"train": {"activation_checkpointing": "block"}}),
    # every operation rounds otherwise, and BatchNorm over eight small images amplifies that; in float64 it is the plain curve
    "compile": Switch(COMPILED, 5e-3),
    "plain float64": Switch({"train": WIDE}, FP64, "resnet", "plain float64", float64=True),
    "compile float64": Switch(merged(COMPILED, {"train": WIDE}), FP64, "resnet", "plain float64", float64=True),
    "bf16": Switch({"train": {"precision": "bf16"}}, BF16),
    "views on device": Switch({"data": {"augment_on": "device"}}),
    "zero0": Switch({"train": {"deepspeed": "zero0"}}),
    "zero2": Switch({"train": {"deepspeed": "zero2"}}),
    "zero2 offload": Switch({"train": {"deepspeed": "zero2_offload"}}),
    "plain convnext": Switch({}, FP32, "convnext", "plain convnext"),
    "compile convnext": Switch(COMPILED, FP32, "convnext", "plain convnext"),
    "grad cache": Switch({"train": {"grad_cache_chunk": 4}}, FP32, "convnext", "plain convnext"),
    "grad cache, block": Switch(
        {"train": {"grad_cache_chunk": 4, "activation_checkpointing": "block"}}, FP32, "convnext", "plain convnext"
    ),
    "bf16 convnext": Switch({"train": {"precision": "bf16"}}, BF16, "convnext", "plain convnext"),
    # last: from its first use on, ZeRO-3 has its own linear layers
    "zero3": Switch({"train": {"deepspeed": "zero3"}}),
    "zero3, block": Switch({"train": {"deepspeed": "zero3", "activation_checkpointing": "block"}}),
    "zero3 offload": Switch({"train": {"deepspeed": "zero3_offload"}}),
}


def settings_of(name: str, folder: Path, steps: int) -> dict:
    switch = SWITCHES[name]
    network = BATCH_NORM if switch.network == "resnet" else NO_BATCH_NORM
    plain = {
        "name": name.replace(" ", "_").replace(",", ""),
        "output_dir": str(folder / "runs"),
        "data": {"shards": str(folder / "shards"), "input_size": 32, "workers": 0, "val_split": ""},
        "model": {
            **network,
            "joint_dim": 32,
            "text_hidden": 32,
            "image_hidden": 32,
            "aggregation": {"pool": 4, "heads": 2, "slots": 64},
        },
        "optim": {"lr": LR},
        "train": {"micro_batch_size": 8, "epochs": steps, "max_steps": steps, "log_every": 1, "images_every": 0},
    }
    return merged(plain, switch.settings)


def be_a_rank(folder: Path, names: list[str], steps: int) -> None:
    """All runs, one after the other: what takes longest is to import the libraries."""
    init_world()
    for name in names:
        torch.compiler.reset()  # else the run after hits the limit on how often a function is compiled
        began = time.perf_counter()
        with in_float64() if SWITCHES[name].float64 else nullcontext():
            pretrain(build_run_config(settings_of(name, folder, steps)))
        if init_world().is_main:
            (folder / f"{name}.seconds").write_text(str((time.perf_counter() - began) / steps))
        barrier()
    leave_world()


@contextmanager
def in_float64() -> Iterator[None]:
    """The same entrance with a network in float64, which no run file can ask for; DeepSpeed reduces it once told that it may."""
    build, accelerator = Pretraining.build_model, type(get_accelerator())
    supported = accelerator.supported_dtypes
    with (
        patch.object(Pretraining, "build_model", lambda plan: build(plan).double()),
        patch.object(accelerator, "supported_dtypes", lambda cpu: [torch.float64, *supported(cpu)]),
    ):
        yield


def build_phantoms(folder: Path) -> None:
    shards = folder / "shards"
    source = PhantomSource(studies=120, seed=7, val_share=0.2)
    build_shards(source, shards, image_size=40, workers=1, samples_per_shard=48, progress=False)
    embed_shards(shards, LsaEncoder.fit(fit_texts(shards), dim=32, seed=0))


def run_ranks(folder: Path, names: list[str], steps: int, ranks: int) -> str:
    """What the ranks said; stops where one of them failed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, __file__, "--rank-in", str(folder), "--steps", str(steps), "--only", *names]
    processes = []
    for rank in range(ranks):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(
                command, env=env, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    said = [process.communicate()[0] for process in processes]
    for process, text in zip(processes, said, strict=True):
        if process.returncode:
            raise SystemExit(text[-4000:])
    return "".join(said)


def losses_of(name: str, folder: Path) -> list[float]:
    settings = settings_of(name, folder, 1)
    lines = (folder / "runs" / settings["name"] / "metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["split"] == "train"]


def compared(name: str, folder: Path) -> dict:
    switch, ours = SWITCHES[name], losses_of(name, folder)
    plain = losses_of(switch.plain, folder)
    apart = [abs(a - b) / abs(b) for a, b in zip(ours, plain, strict=True)]
    return {
        "settings": switch.settings,
        "beside": switch.plain,
        "steps": len(ours),
        "first_loss": ours[0],
        "last_loss": ours[-1],
        "relative_difference_at_step": {step: apart[step - 1] for step in (1, 10, 30, 100) if step <= len(apart)},
        "largest_relative_difference": max(apart),
        "at_step": apart.index(max(apart)) + 1,
        "tolerance": switch.tolerance,
        "seconds_a_step": round(float((folder / f"{name}.seconds").read_text()), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=SWITCHES, default=list(SWITCHES), metavar="SWITCH")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / "speedups_cpu.json")
    parser.add_argument("--rank-in", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_in:
        be_a_rank(options.rank_in, options.only, options.steps)
    wanted = {*options.only, *(SWITCHES[name].plain for name in options.only)}
    names = [name for name in SWITCHES if name in wanted]
    record = {**provenance(), "machine": machine(torch.device("cpu")), "ranks": options.ranks, "kind": "measured"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build_phantoms(folder)
        said = run_ranks(folder, names, options.steps, options.ranks)
        found = {name: compared(name, folder) for name in names}
    warnings = sorted({line for line in said.splitlines() if line.startswith("warning: rank 0")})
    record |= {"warnings": warnings, "switches": found}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    rows = [
        [name, f"{one['largest_relative_difference']:.1e}", f"{one['tolerance']:.0e}"] for name, one in found.items()
    ]
    print(table(["setting", "largest difference", "allowed"], rows), *warnings, sep="\n")
    wrong = [name for name, one in found.items() if not one["largest_relative_difference"] <= one["tolerance"]]
    if wrong:
        raise SystemExit(f"{', '.join(wrong)}: not the curve of the plain run")


if __name__ == "__main__":
    main()
