"""One rank of test_finetune.py: fine-tunes what several run files say, one after the other, for a rank takes seconds to start.

Run as `python -m tests.finetune_worker RUN.yaml...` under RANK, WORLD_SIZE, ...
"""

import sys
from pathlib import Path

from imitate_ds.distributed import leave_world
from imitate_ds.finetune import finetune
from imitate_ds.finetune_config import load_finetune_config

if __name__ == "__main__":
    for path in sys.argv[1:]:
        finetune(load_finetune_config(Path(path)))
    leave_world()
