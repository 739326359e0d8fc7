"""imitate_ds.pretrain under observation: `ENTRANCE=tests.cluster.witness`. Every rank writes down what it is given to train on.

CONSUMED names the folder, STEP_SECONDS makes every step so much longer, so that a fault can hit a run of few steps in its middle.
"""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from imitate_ds import pretrain
from imitate_ds.distributed import world


class Watched:
    """The batches of a rank: each is written down before it is trained on."""

    def __init__(self, batches, path: Path):
        self.batches, self.path = batches, path

    def __iter__(self) -> Iterator:
        with self.path.open("a") as file:
            for batch in self.batches:
                time.sleep(float(os.environ.get("STEP_SECONDS", "0")))
                file.write(json.dumps({"step": batch.step, "keys": batch.keys}) + "\n")
                file.flush()
                yield batch

    def __getattr__(self, name: str):
        return getattr(self.batches, name)


def consumed_file(folder: Path, start: int, rank: int) -> Path:
    """start: how often the job had been put back before."""
    return folder / f"{start:04d}.{rank:04d}.jsonl"


def main() -> None:
    build = pretrain.build_train_loader
    folder, start = Path(os.environ["CONSUMED"]), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    pretrain.build_train_loader = lambda *given, **options: Watched(
        build(*given, **options), consumed_file(folder, start, world().rank)
    )
    pretrain.main()


if __name__ == "__main__":
    main()
