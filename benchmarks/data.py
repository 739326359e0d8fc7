"""The data layer against its limit and its peers, and how it starts with a million samples: one run on two cores.

    imitate-ds shards build phantom --out shards/phantom --option studies=2000 --option val_share=0.15
    imitate-ds shards embed shards/phantom --text-encoder lsa
    python benchmarks/data.py [--shards shards/phantom] [--only throughput|start]     # about 20 minutes

throughput: samples per second of two processes with one thread each, two views of a sample, disk cache warm. Rows take turns,
and a ratio is the median of those within a round, so that a machine that slows down slows both sides. The limit is decode +
views from memory. Peers (data_peers.py) get the fastest of torchvision's forms of the same augmentation.

start: a folder of 1,000,000 samples is one real tar of phantoms and its embeddings, linked under 1,954 names, with an index
and a members.npy in which every sample is another one of another study. Each figure comes from a process of its own.

Prints tables and writes benchmarks/results/data.json.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
from common import REPOSITORY, installed_version, machine, provenance, table
from data_peers import (
    FORMS,
    WORKERS,
    loose_files,
    memory_mapped,
    open_image,
    torchvision_views,
    webdataset,
    webdataset_with_ours,
    write_array,
    write_loose_files,
)
from torch import Tensor

from imitate_ds.config import RunConfig, build_run_config
from imitate_ds.data.loader import build_train_loader
from imitate_ds.data.member_table import MEMBERS, Member, MemberTable, table_bytes
from imitate_ds.data.shard_index import INDEX, ShardEntry, ShardIndex, build_id, file_sha256, load_index, read_at
from imitate_ds.data.stored_images import decode_stored
from imitate_ds.data.text_cache import TEXT_INDEX
from imitate_ds.data.train_plan import build_train_plan, open_train_folders
from imitate_ds.data.transforms import VIEWS, TrainViews

WARM_UP = 2 * WORKERS  # batches of a loader that are not counted: it starts its workers, and they open their files
MEMORY_BATCHES = 20  # after which the memory of the workers is read
SPLIT = "train"
MB = 1e6

READ, DECODE, LIMIT = "raw tar read, CRC-32", "decode", "decode + views alone"
OURS, SAMPLED, UNCHECKED = "ours", "ours, data.verify = sampled", "ours, data.verify = off"
WEBDATASET, LOOSE, MAPPED = (
    "WebDataset, torchvision",
    "loose JPEG files, torchvision",
    "memory-mapped .npy, torchvision",
)
WEBDATASET_ITEMS, WEBDATASET_BATCHES = "WebDataset, our decode and views", "WebDataset, ours a batch at once"
PEERS = "embeddings, keys, exact resume, studies kept apart, checksums"
RESAMPLED = f"{PEERS}, every sample once"
LEAVES_OUT = {
    READ: "decode, views, batches",
    DECODE: "reading, views, batches",
    LIMIT: "reading, embeddings, handing over",
    OURS: "",
    SAMPLED: "15 of 16 checksums of radiographs",
    UNCHECKED: "checksums",
    WEBDATASET: RESAMPLED,
    WEBDATASET_ITEMS: RESAMPLED,
    WEBDATASET_BATCHES: RESAMPLED,
    LOOSE: PEERS,
    MAPPED: f"{PEERS}, decoding (3 times the bytes)",
}

Work = Callable[[int], Iterator[int]]  # a worker's number -> how many samples it has just done, again and again


class Case(NamedTuple):
    index: ShardIndex
    config: RunConfig
    seconds: float
    rounds: int

    @property
    def batch(self) -> int:
        return self.config.train.micro_batch_size


def run_config(root: Path, image_size: int, batch: int, preset: str = "default", **data) -> RunConfig:
    """Views keep 7/8 of the stored side: 224 of 256 pixels."""
    data = {"shards": str(root), "input_size": image_size * 7 // 8, "workers": WORKERS, **data}
    return build_run_config({"name": "benchmark", "preset": preset, "data": data, "train": {"micro_batch_size": batch}})


# Throughput


def in_processes(work: Work, seconds: float) -> float:
    """Samples per second of all workers together; each is a fork that first does one piece that does not count."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(WORKERS)
    pipes = [context.Pipe(duplex=False) for _ in range(WORKERS)]
    processes = [
        context.Process(target=_be_timed, args=(work, worker, seconds, barrier, answer), daemon=True)
        for worker, (_, answer) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for _, answer in pipes:
        answer.close()  # so that the end of a process is the end of its pipe
    rates = [results.recv() for results, _ in pipes]
    for process in processes:
        process.join()
    return sum(rates)


def _be_timed(work: Work, worker: int, seconds: float, barrier, answer: Connection) -> None:
    pieces = work(worker)
    next(pieces)
    barrier.wait(timeout=60)
    answer.send(rate(pieces, seconds))


def from_loader(open_loader: Callable[[], Iterator[Tensor]], seconds: float) -> float:
    """Samples per second that arrive in this process, which does nothing with them."""
    batches = open_loader()
    for _ in range(WARM_UP):
        next(batches)
    return rate(map(len, batches), seconds)


def rate(pieces: Iterator[int], seconds: float) -> float:
    began, done = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds:
        done += next(pieces)
    return done / spent


def share_of(case: Case, worker: int) -> list[list[tuple[ShardEntry, Member]]]:
    """The batches of the first epoch that one of the workers makes: every other one."""
    config, shards = case.config, case.index.of_split(SPLIT)
    plan = build_train_plan(config.data, [case.index], seed=config.seed, global_batch_size=case.batch)
    steps = range(worker, max(plan.steps_per_epoch, WORKERS), WORKERS)
    return [
        [(shards[row.shard], shards[row.shard].members[row.row]) for row in plan.global_batch(step)] for step in steps
    ]


def read_only(case: Case) -> Work:
    def work(worker: int) -> Iterator[int]:
        files = {shard.name: (case.index.root / shard.name).open("rb") for shard in case.index.of_split(SPLIT)}
        for batch in itertools.cycle(share_of(case, worker)):
            for shard, member in batch:
                read_at(files[shard.name], shard, member.image_offset, member.image_size, member.image_crc)
            yield len(batch)

    return work


def in_memory(case: Case, make: Callable[[list[bytes], int], Any]) -> Work:
    """make(the JPEG files of a batch, a seed), over and over."""

    def work(worker: int) -> Iterator[int]:
        batches = [
            [read_member(case.index, shard, member) for shard, member in batch] for batch in share_of(case, worker)
        ]
        for step, batch in enumerate(itertools.cycle(batches)):
            make(batch, step)
            yield len(batch)

    return work


def read_member(index: ShardIndex, shard: ShardEntry, member: Member) -> bytes:
    with (index.root / shard.name).open("rb") as file:
        return read_at(file, shard, member.image_offset, member.image_size)


def ours(case: Case, verify: str) -> Iterator[Tensor]:
    config = case.config.model_copy(update={"data": case.config.data.model_copy(update={"verify": verify})})
    loader = build_train_loader(config, rank=0, world_size=1, stop_step=10**9)
    return (batch.images for batch in loader)


def open_rows(case: Case, form: str, files: list[Path], array: Path) -> dict[str, Callable[[], float]]:
    """What is measured, each as a function that measures it once."""
    data = case.config.data
    views, peers = TrainViews(data.augment, data.input_size), torchvision_views(data.augment, data.input_size, form)
    urls = [str(case.index.root / shard.name) for shard in case.index.of_split(SPLIT)]

    def decode(jpegs: list[bytes], _: int) -> list[Tensor]:
        return [decode_stored(jpeg, at_least=views.decode_side) for jpeg in jpegs]

    made = torch.empty(case.batch, VIEWS, 1, data.input_size, data.input_size, dtype=torch.uint8)

    def decode_and_view(jpegs: list[bytes], step: int) -> Tensor:
        return views(torch.stack(decode(jpegs, step)), views.draw(range(step, step + len(jpegs))), out=made)

    processes = {
        READ: read_only(case),
        DECODE: in_memory(case, decode),
        LIMIT: in_memory(case, decode_and_view),
    }
    loaders = {
        OURS: partial(ours, case, "full"),
        SAMPLED: partial(ours, case, "sampled"),
        UNCHECKED: partial(ours, case, "off"),
        WEBDATASET: partial(webdataset, urls, peers, case.batch),
        WEBDATASET_ITEMS: partial(webdataset_with_ours, urls, views, case.batch, at_once=False),
        WEBDATASET_BATCHES: partial(webdataset_with_ours, urls, views, case.batch, at_once=True),
        LOOSE: partial(loose_files, files, peers, case.batch),
        MAPPED: partial(memory_mapped, array, peers, case.batch),
    }
    timed = {name: partial(in_processes, work, case.seconds) for name, work in processes.items()}
    return timed | {name: partial(from_loader, loader, case.seconds) for name, loader in loaders.items()}


def in_turns(rows: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Every row once, then every row again: [rounds] figures each."""
    rates: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(rounds):
        for name, measure in rows.items():
            rates[name].append(measure())
            print(f"round {number + 1}: {name}: {rates[name][-1]:,.0f}", file=sys.stderr, flush=True)
    return rates


def compared(rates: dict[str, list[float]]) -> dict[str, dict]:
    def over(one: str, other: str) -> float:
        return round(statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True)), 3)

    return {
        name: {
            "of_the_limit": over(name, LIMIT),
            "ours_over_it": over(OURS, name),
            "samples_per_second": round(statistics.median(found), 1),
            "samples_per_second_and_core": round(statistics.median(found) / WORKERS, 1),
            "rounds": [round(value, 1) for value in found],
            "leaves_out": LEAVES_OUT[name],
        }
        for name, found in rates.items()
    }


def fastest_form(case: Case) -> dict:
    """Which of torchvision's forms a peer should use: samples per second of one process, from a Pillow image to two views."""
    data = case.config.data
    jpegs = [read_member(case.index, *place) for place in share_of(case, 0)[0]]
    images = [open_image(jpeg) for jpeg in jpegs]

    def pieces(form: str) -> Iterator[int]:
        views = torchvision_views(data.augment, data.input_size, form)
        for image in itertools.cycle(images):
            views(image)
            yield 1

    timed = {form: partial(rate, pieces(form), case.seconds / len(FORMS)) for form in FORMS}
    rates = {form: round(statistics.median(found), 1) for form, found in in_turns(timed, case.rounds).items()}
    return {"samples_per_second_and_core": rates, "fastest": max(rates, key=rates.__getitem__)}


def cost_of_checks(case: Case, samples_per_second: float) -> dict:
    """What data.verify = full adds to a sample, timed by itself: it is too little to be seen among the rows.

    Embeddings are compared once for every opening of their file, and each worker opens it.
    """
    shard = case.index.of_split(SPLIT)[0]
    jpegs = [read_member(case.index, shard, member) for member in shard.members]
    radiographs = quickest(lambda: [crc32(jpeg) for jpeg in jpegs]) / len(jpegs)
    texts = quickest(lambda: file_sha256(case.index.root / shard.text_name)) * WORKERS / shard.samples
    return {
        "radiographs_us": round(radiographs * 1e6, 1),
        "embeddings_us": round(texts * 1e6, 1),
        "share_of_a_sample": round((radiographs + texts) * samples_per_second / WORKERS, 4),
    }


def quickest(work: Callable[[], Any], times: int = 9) -> float:
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def throughput(index: ShardIndex, folder: Path, batch: int, seconds: float, rounds: int) -> dict:
    (folder / "loose").mkdir()
    files, array = write_loose_files(index, SPLIT, folder / "loose"), folder / "radiographs.npy"
    write_array(index, SPLIT, array)
    blocks = {}
    for preset in ("paper", "default"):
        config = run_config(index.root, index.image_size, batch, preset)
        case = Case(index, config, seconds, rounds)
        forms = fastest_form(case)
        cells = compared(in_turns(open_rows(case, forms["fastest"], files, array), rounds))
        checks = cost_of_checks(case, cells[OURS]["samples_per_second"])
        augment = config.data.augment.model_dump(mode="json")
        blocks[preset] = {"augment": augment, "torchvision": forms, "rows": cells, "data_verify_full": checks}
    sizes = [int(shard.members.column("image_size").sum()) for shard in index.of_split(SPLIT)]
    return {
        "stored_pixels": index.image_size,
        "input_pixels": index.image_size * 7 // 8,
        "samples": len(files),
        "bytes_of_a_radiograph": round(sum(sizes) / len(files)),
        "batch": batch,
        "workers": WORKERS,
        "seconds": seconds,
        "blocks": blocks,
    }


# Start and resume


def link_samples(given: ShardIndex, folder: Path, samples: int) -> int:
    """A shard folder of at least so many samples, made of one shard under many names. How many they are."""
    shard = max(given.of_split(SPLIT), key=lambda shard: shard.samples)
    entries = tuple(replace(shard, name=f"{SPLIT}-{number:06d}.tar") for number in range(-(-samples // shard.samples)))
    for entry in entries:
        os.link(given.root / shard.name, folder / entry.name)
        os.link(given.root / shard.text_name, folder / entry.text_name)
    members = table_bytes([distinct(shard.members, len(entries))])
    (folder / MEMBERS).write_bytes(members)
    facts = ("name", "split", "samples", "bytes", "sha256")
    index = json.loads((given.root / INDEX).read_text())
    index |= {"build_id": build_id(entries), "shards": [{fact: getattr(e, fact) for fact in facts} for e in entries]}
    index["members"] = {"bytes": len(members), "sha256": file_sha256(folder / MEMBERS)}
    (folder / INDEX).write_text(json.dumps(index))
    text = json.loads((given.root / TEXT_INDEX).read_text())
    files = {entry.text_name: text["files"][shard.text_name] for entry in entries}
    (folder / TEXT_INDEX).write_text(json.dumps(text | {"build_id": index["build_id"], "files": files}))
    return len(entries) * shard.samples


def distinct(members: MemberTable, times: int) -> MemberTable:
    """The places of the members again and again, as samples of a study and a patient of their own."""
    columns = np.stack([np.tile(members.column(name), times) for name in Member._fields])
    numbers = np.arange(columns.shape[1], dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # odd, so all are different
    columns[0] = numbers
    columns[1:3] = numbers & np.uint64(2**48 - 1)
    return MemberTable(columns)


def alone(probe: Callable[..., dict], *arguments) -> dict:
    """What a probe finds in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(probe, *arguments).result()


def probe_plan(config: RunConfig) -> dict:
    """Time and memory to open the index, and to draw the first order."""
    torch.set_num_threads(1)
    folders, opening = measured(lambda: open_train_folders(config.data))

    def draw():
        plan = build_train_plan(config.data, folders, seed=config.seed, global_batch_size=config.train.micro_batch_size)
        plan.global_batch(0)
        return plan

    plan, planning = measured(draw)
    return {"open_index": opening, "plan": planning, "steps_per_epoch": plan.steps_per_epoch}


def measured(work: Callable[[], Any]) -> tuple[Any, dict]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = memory_of("self", "status")
    began = time.perf_counter()
    result = work()
    seconds, after = time.perf_counter() - began, memory_of("self", "status")
    return result, {
        "seconds": round(seconds, 3),
        "peak_extra_mb": round(after["VmHWM"] - before["VmRSS"], 1),
        "kept_anonymous_mb": round(after["RssAnon"] - before["RssAnon"], 1),
    }


def memory_of(process: str, file: str) -> dict[str, float]:
    """The sizes in a file of /proc, in MB."""
    lines = (line.split() for line in Path(f"/proc/{process}/{file}").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 / MB for words in lines if words[-1] == "kB"}


def probe_first_batch(config: RunConfig, step: int) -> dict:
    torch.set_num_threads(1)
    began = time.perf_counter()
    folders = open_train_folders(config.data)
    opened = time.perf_counter()
    loader = build_train_loader(
        config, rank=0, world_size=1, start_step=step, stop_step=step + 2 * WORKERS, folders=folders
    )
    built = time.perf_counter()
    batch = next(iter(loader))
    arrived = time.perf_counter()
    if batch.step != step:
        raise RuntimeError(f"the first batch is that of step {batch.step}, not {step}")
    return {"seconds": arrived - began, "open_index": opened - began, "build": built - opened, "batch": arrived - built}


def probe_memory(config: RunConfig) -> dict:
    """Memory of the larger worker after some batches: private is what the machine needs more for it."""
    torch.set_num_threads(1)
    batches = iter(build_train_loader(config, rank=0, world_size=1, stop_step=10**9))
    for _ in range(MEMORY_BATCHES):
        next(batches)
    workers = [memory_of(str(process.pid), "smaps_rollup") for process in multiprocessing.active_children()]
    private = [worker["Private_Clean"] + worker["Private_Dirty"] for worker in workers]
    found = {"private_mb": private, "pss_mb": [w["Pss"] for w in workers], "resident_mb": [w["Rss"] for w in workers]}
    return {name: round(max(values), 1) for name, values in found.items()}


def start(index: ShardIndex, scratch: Path, batch: int, sizes: tuple[int, int], rounds: int) -> dict:
    configs, counts = {}, {}
    for name, samples in zip(("small", "large"), sizes, strict=True):
        (scratch / name).mkdir()
        counts[name] = link_samples(index, scratch / name, samples)
        configs[name] = run_config(scratch / name, index.image_size, batch)
    plans = [alone(probe_plan, configs["large"]) for _ in range(rounds)]
    steps = plans[0]["steps_per_epoch"]
    positions = {"step 0": 0, "mid-epoch": steps // 2, "last step of epoch 3": 3 * steps - 1}
    first = {name: [] for name in positions}
    memory = {name: [] for name in configs}
    for _ in range(rounds):
        for name, step in positions.items():
            first[name].append(alone(probe_first_batch, configs["large"], step))
        for name, config in configs.items():
            memory[name].append(alone(probe_memory, config))
    return {
        "samples": counts["large"],
        "batch": batch,
        "workers": WORKERS,
        "linked": "one tar and its embeddings under many names, so the disk cache is warm",
        "steps_per_epoch": steps,
        "open_index": medians([plan["open_index"] for plan in plans]),
        "plan": medians([plan["plan"] for plan in plans]),
        "first_batch": {name: {"step": positions[name], **medians(found)} for name, found in first.items()},
        "memory_per_worker": {str(counts[name]): medians(found) for name, found in memory.items()},
    }


def medians(records: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(record[name] for record in records), 3) for name in records[0]}


# What is written down


def targets(record: dict) -> list[dict]:
    found: list[tuple[str, float, bool]] = []
    if "throughput" in record:
        rows = record["throughput"]["blocks"]["paper"]["rows"]
        limit = rows[OURS]["of_the_limit"]
        found.append(("ours, of decode + views: at least 0.9", limit, limit >= 0.9))
        for name in (WEBDATASET, LOOSE):
            ratio = rows[name]["ours_over_it"]
            found.append((f"ours over {name}: at least 1.5", ratio, ratio >= 1.5))
    if "start" in record:
        values = record["start"]
        plan, memory = values["plan"], [cell["private_mb"] for cell in values["memory_per_worker"].values()]
        slowest = max(cell["seconds"] for cell in values["first_batch"].values())
        found.append(("planning: under 2 seconds", plan["seconds"], plan["seconds"] < 2))
        found.append(("planning: under 100 MB", plan["peak_extra_mb"], plan["peak_extra_mb"] < 100))
        found.append(("first batch, any position: under 1 second", slowest, slowest < 1))
        growth = round(memory[-1] / memory[0], 3)
        found.append(("memory per worker, large over small: at most 1.1", growth, growth <= 1.1))
    return [{"target": name, "measured": value, "met": met} for name, value, met in found]


def print_throughput(record: dict) -> None:
    for preset, block in record["blocks"].items():
        forms = ", ".join(
            f"{form} {value:,.0f}" for form, value in block["torchvision"]["samples_per_second_and_core"].items()
        )
        print(f"\n{preset} augmentation; two views by torchvision, samples/s and core: {forms}\n")
        rows = [
            [
                *(f"{cell[ratio]:.2f}" for ratio in ("of_the_limit", "ours_over_it")),
                *(f"{cell[speed]:,.0f}" for speed in ("samples_per_second", "samples_per_second_and_core")),
                *(name, cell["leaves_out"]),
            ]
            for name, cell in block["rows"].items()
        ]
        print(table(["of the limit", "ours over it", "samples/s", "and core", "pipeline", "leaves out"], rows))
        checks = block["data_verify_full"]
        print(
            f"\nchecksums by themselves: {checks['share_of_a_sample']:.2%} of a sample "
            f"({checks['radiographs_us']} us radiograph, {checks['embeddings_us']} us embeddings)"
        )


def print_start(record: dict) -> None:
    rows = [
        [
            name.replace("_", " "),
            f"{record[name]['seconds']:.2f} s",
            f"{record[name]['peak_extra_mb']:,.0f} MB at the peak",
        ]
        for name in ("open_index", "plan")
    ]
    for name, cell in record["first_batch"].items():
        parts = f"index {cell['open_index']:.2f}, loader {cell['build']:.2f}, batch {cell['batch']:.2f}"
        rows.append([f"first batch, {name}", f"{cell['seconds']:.2f} s", parts])
    for samples, cell in record["memory_per_worker"].items():
        rest = f"Pss {cell['pss_mb']:,.0f}, resident {cell['resident_mb']:,.0f}"
        rows.append([f"a worker, {int(samples):,} samples", f"{cell['private_mb']:,.0f} MB private", rest])
    print(f"\n{record['samples']:,} samples\n\n{table(['what', 'measured', ''], rows)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, default=Path("shards/phantom"))
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / "data.json")
    parser.add_argument("--seconds", type=float, default=10, help="of each row in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--only", choices=["throughput", "start"])
    parser.add_argument("--quick", action="store_true", help="sizes that take seconds, and say nothing about speed")
    given = parser.parse_args()
    if given.quick:
        given.seconds, given.rounds, given.batch = 0.2, 1, 16
    given.sizes = (500, 2_000) if given.quick else (10_000, 1_000_000)
    return given


def main() -> None:
    given = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the temporary folder goes, whatever ends the run
    torch.set_num_threads(1)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:WORKERS])
    index = load_index(given.shards)
    record: dict[str, Any] = {**provenance(), "machine": machine(torch.device("cpu"))}
    record["versions"] = {
        name: installed_version(name) for name in ("torchvision", "pillow", "webdataset", "simplejpeg")
    }
    record["load_average_before"] = [round(value, 2) for value in os.getloadavg()]
    with tempfile.TemporaryDirectory(dir=given.shards.resolve().parent, prefix=".benchmark-") as name:  # for hard links
        if given.only != "start":
            record["throughput"] = throughput(index, Path(name), given.batch, given.seconds, given.rounds)
        if given.only != "throughput":
            record["start"] = start(index, Path(name), given.batch, given.sizes, given.rounds)
    record["targets"] = targets(record)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(record, indent=1) + "\n")
    if "throughput" in record:
        print_throughput(record["throughput"])
    if "start" in record:
        print_start(record["start"])
    rows = [["yes" if cell["met"] else "no", f"{cell['measured']:g}", cell["target"]] for cell in record["targets"]]
    print("\n" + table(["met", "measured", "target"], rows))


if __name__ == "__main__":
    main()
