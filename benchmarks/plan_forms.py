"""Two forms of a data plan that any number of ranks may resume, and how each reads a disk whose cache is cold.

    python benchmarks/plan_forms.py [--shards 64] [--ranks 1 8]

window slices: a global batch is drawn from a window of shards, and a rank takes a slice of it; in random order, or in the
order of the shards, as imitate_ds.data.shard_plan does. canonical streams (MosaicML Streaming's form): the shards are
divided among eight fixed streams, each batch takes as much from every stream, and a rank reads whole streams, so that the
number of ranks must divide eight. Rank 0 reads the radiographs of its batches from tars of random bytes (512 samples of
20 KB), whose pages the kernel was told to forget. Writes benchmarks/results/plan_forms.json.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import REPOSITORY, machine, provenance, table

from imitate_ds.data.shard_plan import Folder, ShardPlan

SAMPLES, SIZE, STREAMS, SPACING = (
    512,
    20_000,
    8,
    22 * 1024,
)  # a shard; bytes of a radiograph; bytes from one to the next
Order = Callable[[int, int, int], list[tuple[int, int]]]  # step, rank, ranks -> (shard, row)


def shard_order(plan: ShardPlan) -> Order:
    return lambda step, rank, ranks: [(row.shard, row.row) for row in plan.rank_batch(step, rank, ranks)]


def random_order(plan: ShardPlan) -> Order:
    def rows(step: int, rank: int, ranks: int) -> list[tuple[int, int]]:
        batch = plan.global_batch(step)
        order = np.random.default_rng(step).permutation(len(batch)).reshape(ranks, -1)[rank]
        return [(batch[place].shard, batch[place].row) for place in order]

    return rows


def canonical_streams(shards: int, batch: int, window: int) -> Order:
    """Stream i holds every eighth part of the permuted shards, mixed in blocks of its share of the window."""
    random = np.random.default_rng(0)
    streams = []
    for part in np.array_split(random.permutation(shards), STREAMS):
        rows = [(int(shard), row) for shard in part for row in range(SAMPLES)]
        block = window // STREAMS
        mixed = [random.permutation(len(rows[i : i + block])) + i for i in range(0, len(rows), block)]
        streams.append([rows[place] for place in np.concatenate(mixed)])

    def rows(step: int, rank: int, ranks: int) -> list[tuple[int, int]]:
        mine, share = streams[rank * STREAMS // ranks : (rank + 1) * STREAMS // ranks], batch // STREAMS
        return [row for stream in mine for row in stream[step * share : (step + 1) * share]]

    return rows


def read(folder: Path, rows: list[list[tuple[int, int]]], ahead: bool) -> dict:
    """Read the members of some batches with a cold cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    opened: OrderedDict[int, int] = OrderedDict()
    before, began, count = disk_bytes(), time.perf_counter(), 0
    for shard, row in (place for batch in rows for place in batch):
        if shard not in opened:
            if len(opened) >= 64:
                os.close(opened.popitem(last=False)[1])
            opened[shard] = os.open(folder / f"{shard}.tar", os.O_RDONLY)
            if ahead:
                os.posix_fadvise(opened[shard], 0, 0, os.POSIX_FADV_WILLNEED)
        opened.move_to_end(shard)
        count += len(os.pread(opened[shard], SIZE, row * SPACING)) == SIZE
    seconds, transferred = time.perf_counter() - began, disk_bytes() - before
    for handle in opened.values():
        os.close(handle)
    return {"samples_per_second": count / seconds, "disk_bytes_per_byte": transferred / (count * SIZE)}


def disk_bytes() -> int:
    """What this process had fetched from the disk, so far."""
    return int(
        next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes")).split()[
            1
        ]
    )


def measure(folder: Path, shards: int, ranks: int, batch: int, steps: int) -> dict[str, dict]:
    plan = ShardPlan([Folder([SAMPLES] * shards, np.arange(shards * SAMPLES))], seed=0, global_batch_size=batch)
    streams = canonical_streams(shards, batch, window=8 * SAMPLES)
    forms = {
        "window slices, random order": (random_order(plan), False),
        "window slices, random order, read ahead": (random_order(plan), True),
        "window slices, shard order": (shard_order(plan), False),
        "window slices, shard order, read ahead (ours)": (shard_order(plan), True),
        "canonical streams": (streams, False),
        "canonical streams, read ahead": (streams, True),
    }
    cells: dict[str, dict] = {}
    for name, (order, ahead) in forms.items():
        rows = [order(step, 0, ranks) for step in range(steps)]
        touched = len({shard for batch_rows in rows for shard, _ in batch_rows})
        cells[name] = {**read(folder, rows, ahead), "shards_opened": touched, "samples_read": sum(map(len, rows))}
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / "plan_forms.json")
    given = parser.parse_args()
    steps = given.shards * SAMPLES // given.batch // 2  # half an epoch
    with tempfile.TemporaryDirectory(dir=REPOSITORY / "shards") as name:
        folder = Path(name)
        for shard in range(given.shards):
            (folder / f"{shard}.tar").write_bytes(np.random.default_rng(shard).bytes(SAMPLES * SPACING))
        os.sync()
        cells = {
            str(ranks): [measure(folder, given.shards, ranks, given.batch, steps) for _ in range(given.repeats)]
            for ranks in given.ranks
        }
    record = {
        **provenance(),
        "machine": machine(torch.device("cpu")),
        "batch": given.batch,
        "steps": steps,
        "cells": cells,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    rows = []
    for ranks, runs in cells.items():
        for form in runs[0]:
            rate = sorted(run[form]["samples_per_second"] for run in runs)[len(runs) // 2]
            middle = runs[0][form]
            disk = f"{middle['disk_bytes_per_byte']:.2f}"
            rows.append([ranks, form, f"{rate:,.0f}", disk, str(middle["shards_opened"]), str(middle["samples_read"])])
    print(table(["ranks", "form", "samples/s (median)", "disk bytes per byte", "shards opened", "samples"], rows))


if __name__ == "__main__":
    sys.exit(main())
