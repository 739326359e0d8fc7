"""One rank of test_nvme.py: trains with what train.deepspeed names, saves half-way, and another engine goes on from there.

Run as `python -m tests.training.nvme_worker DEEPSPEED FOLDER` under RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from imitate_ds.config import OptimConfig, TrainConfig
from imitate_ds.distributed import init_world, leave_world, world
from imitate_ds.training.checkpoint import Checkpoints, find_checkpoint, load_checkpoint
from imitate_ds.training.checkpoint_files import Keep
from imitate_ds.training.engine import build_engine, take_step

HALF, END = 3, 6
WIDTH = 1024  # the share of each rank is above DeepSpeed's MiB, below which nothing goes to the disk


def build(deepspeed: str, seed: int) -> Any:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
    return build_engine(model, TrainConfig(micro_batch_size=4, deepspeed=deepspeed), OptimConfig(lr=1e-3))


def losses(engine: Any, steps: range) -> list[float]:
    found = []
    for step in steps:
        inputs = torch.randn(4, 32, generator=torch.Generator().manual_seed(world().size * step + world().rank))
        loss = (engine(inputs) - inputs.mean()).square().mean()
        engine.backward(loss)
        assert take_step(engine).applied
        found.append(loss.item())
    return found


def main(deepspeed: str, folder: Path) -> None:
    init_world()
    engine = build(deepspeed, seed=0)
    found = losses(engine, range(HALF))
    Checkpoints(folder, Keep(last=1)).save(engine, HALF, {"step": HALF})
    undisturbed = losses(engine, range(HALF, END))
    other = build(deepspeed, seed=1)
    load_checkpoint(other, find_checkpoint(folder))  # type: ignore[arg-type]
    went_on = losses(other, range(HALF, END))
    on_disk = sorted({path.name.partition("-")[0] for path in folder.parent.glob("imitate_ds-*/**/*.swp")})
    if world().is_main:
        record = {"losses": [*found, *undisturbed], "went on": [*found, *went_on], "on disk": on_disk}
        (folder.parent / "losses.json").write_text(json.dumps(record))
    leave_world()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
