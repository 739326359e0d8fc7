"""How a training run is started, on every rank: arguments, the run file, signals, and how the process ends."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imitate_ds.distributed import leave_world
from imitate_ds.training.course import EXPECTED
from imitate_ds.training.drain import Drain, listening


def run_entrance(
    name: str,
    about: str | None,
    load: Callable[[Path, list[str]], Any],
    run: Callable[[Any, Drain], object],
    arguments: list[str] | None = None,
) -> None:
    """load reads the run file, run does what it says. What is wrong with the input is one clear message and status 2; a bug
    is a traceback.

    Either way the process ends at once: a rank that lingers would leave the others waiting in a collective.
    """
    parser = argparse.ArgumentParser(prog=f"imitate_ds.{name}", description=about)
    parser.add_argument("--config", type=Path, required=True, help="run file (YAML)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    given = parser.parse_args(arguments)
    rank, status = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0"), 1
    try:
        config = load(given.config, given.set)
        os.umask(0o077 if config.share == "private" else 0o027)  # for all that the run writes
        with listening() as drain:
            run(config, drain)
        status = 0
    except (ValueError, OSError, FloatingPointError) as error:
        if type(error) in EXPECTED and not os.environ.get("IMITATE_DS_TRACEBACK"):
            status = 2
            print(f"imitate_ds.{name}: rank {rank}: {error}\n(IMITATE_DS_TRACEBACK=1 shows where)", file=sys.stderr)
        else:
            raise
    finally:
        if status == 1:
            traceback.print_exc()
        leave_world(status)
