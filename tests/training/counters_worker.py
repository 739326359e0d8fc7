"""One rank of test_counters.py: counts a step in which ranks have neither as many studies nor texts of the same length.

Run as `python -m tests.training.counters_worker RUN_DIR` under RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from imitate_ds.distributed import init_world, leave_world
from imitate_ds.training.counters import Counters
from imitate_ds.training.loop import StepOutput

STUDIES, WORDS = (2, 3), (8, 0)  # of each rank


def main(run_dir: Path) -> None:
    here = init_world()
    model = nn.ModuleDict({"image": nn.Linear(4, 6), "text": nn.Linear(4, 6)})
    engine = SimpleNamespace(module=model, optimizer=torch.optim.AdamW(model.parameters()))

    def step(batch: Any) -> StepOutput:
        loss = model["image"](torch.ones(len(batch.keys), 4)).sum()
        if words := WORDS[here.rank]:
            loss = loss + model["text"](torch.ones(words, 4)).sum()
        loss.backward()
        return StepOutput(loss.detach(), {}, dict)

    counters = Counters(run_dir, engine, "fp32", loss_flops=10.0)
    counters.around(step)(SimpleNamespace(keys=["x"] * STUDIES[here.rank]))
    print(counters.rates(1.0)["tflops"])
    leave_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
