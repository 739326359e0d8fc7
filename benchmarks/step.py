"""Our training step beside the published one: studies a second, peak memory, and where the time goes, in one run.

    python benchmarks/step.py                                   # ResNet-18 at 64 px on a CPU
    python benchmarks/step.py --encoder resnet50 --size 224     # what is published, on a CPU
    python benchmarks/step.py --device cuda                     # the same on a GPU, in under --minutes 9

Data are left out: images are random bytes of the right shape, texts random tokens as long as reports are, and both lie on the
device. `published` is benchmarks/published_step.py; the rows after it take over one of our savings each; `ours` is the
program itself: recipe, objective, DeepSpeed engine and loop as `imitate_ds.pretrain` runs them. Every row is measured in
fresh processes, by turns, so that a drift of the machine favours none. On a CPU with other work beside, seconds on the wall say
little; busy seconds are those in which the CPU worked for the step, best with --threads 1 (threads that wait are busy too),
and speedups are by them; on CUDA they are the same.

Peak memory: on CUDA what torch had allocated; on a CPU what the process grew by once everything was imported.
Prints tables and writes benchmarks/results/step_<encoder>_<device>.json; parts that --only leaves out stay there as they are.
"""

import argparse
import io
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from common import REPOSITORY, device_name, forget_peak, machine, provenance, resident_bytes, table
from published_step import DTYPES, SECTIONS, PublishedNetwork, Savings, Studies, build_step, published_losses
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_backward_flop, sdpa_flop
from transformers import BertConfig, BertModel

from imitate_ds.batch import Batch, Features
from imitate_ds.config import RunConfig, build_run_config
from imitate_ds.devices import find_device
from imitate_ds.distributed import init_world, leave_world, training_device, world
from imitate_ds.models.image_encoder import ImageEncoder
from imitate_ds.objective import imitate_loss
from imitate_ds.pretrain import Pretraining
from imitate_ds.recipe import Inputs, with_operands
from imitate_ds.run_file import merged
from imitate_ds.training.batch_norm import batch_norm_policy
from imitate_ds.training.course import Horizon
from imitate_ds.training.drain import Drain
from imitate_ds.training.engine import build_engine
from imitate_ds.training.loop import Calls, LoopSettings, train_steps
from imitate_ds.training.monitor import Monitor

GIB = 2**30
# Without these the C library keeps what was freed, and a peak is of the order in which things were allocated.
EXACT_PEAKS = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
STEP, LONGEST, TEXT_WIDTH = "step", 256, 768
# Tokens of a section, log-normal: median and deviation of the logarithm. Words and punctuation marks of 2,843 findings and 3,257
# impressions of Open-i were counted: 35 (.42) and 9 (.80). Of MIMIC-CXR, which the method is published on, findings are 1.41
# times as long (53.0 against 37.6 words: Chen et al., EMNLP 2020, table 1). A word is taken to be 1.25 word pieces, and every
# text has two special tokens. The last two numbers are assumptions: no tokenizer and no report of MIMIC-CXR were at hand.
TOKENS = {"findings": (64, 0.42), "impression": (18, 0.80)}


# FlopCounterMode knows the attention of CUDA only; that of CPUs multiplies the same matrices.
flop_registry[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu] = sdpa_flop
flop_registry[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward] = sdpa_backward_flop


class Row(NamedTuple):
    title: str
    savings: Savings | None = None  # None: ours
    gathers: bool = False
    padded: bool = False  # every text to LONGEST tokens
    options: Mapping[str, Any] = MappingProxyType({})  # of our run file


ROWS = {
    "published": Row("published", Savings()),
    "published_gathered": Row("published, negatives gathered", Savings(), gathers=True),
    "published_padded": Row("published, texts padded to 256 tokens", Savings(), padded=True),
    "one_pass": Row("+ one backbone pass a view", Savings(one_pass=True)),
    "cached_text": Row("+ cached text", Savings(cached_text=True)),
    "single_losses": Row("+ losses not doubled", Savings(single_losses=True)),
    "strips": Row("+ strips, no matrices", Savings(strips=True)),
    "no_sync": Row("+ no loss read in the step", Savings(no_sync=True)),
    "channels_last": Row("+ channels last", Savings(channels_last=True)),
    "cls_query": Row("+ one query in the attention", Savings(cls_query=True)),
    "ours": Row("ours, all of them"),
    "ours_vit_large": Row(
        "ours, ViT-L/16",
        options={
            "model": {
                "image_encoder": "vit_large_patch16_224",
                "projection_norm": "layer",
                "aggregation": {"keep": [0.12, 0.12, 0.12, 0.12]},
            },
        },
    ),
}
PARTS = ("memory", "loss", "many", "vit_large", "rows")
TABLE = [name for name in ROWS if name != "ours_vit_large"]


class Job(NamedTuple):
    """What one process measures. Everything in it is JSON."""

    row: str
    encoder: str
    size: int  # pixels
    batch: int  # studies of a rank
    precision: str
    device: str
    warm: int
    steps: int
    chunk: int = 0  # of ours: train.grad_cache_chunk
    loss_only: bool = False  # of features that are given


# What was expected, written down on 2026-11-25 before anything was run, from operations counted by hand; factors of `published`.
PREDICTED: dict[str, dict[str, Any]] = {
    "resnet50 at 224 px, cpu, fp32": {
        "pairs_per_second": {
            "published_gathered": 1.0,
            "published_padded": 0.7,
            "one_pass": 1.6,
            "cached_text": 1.3,
            "single_losses": 1.0,
            "strips": 1.0,
            "no_sync": 1.0,
            "channels_last": 1.15,
            "cls_query": 1.03,
            "ours": 3.3,
        },
        "peak_memory": {"ours at the same batch": 0.45, "ours at 1024 in one piece": 0.5, "ours at 1024, chunks": 0.02},
    },
    "resnet18 at 64 px, cpu, fp32": {
        "pairs_per_second": {
            "published_gathered": 1.0,
            "published_padded": 0.5,
            "one_pass": 1.05,
            "cached_text": 4.0,
            "single_losses": 1.0,
            "strips": 1.0,
            "no_sync": 1.0,
            "channels_last": 1.0,
            "cls_query": 1.1,
            "ours": 10.0,
        },
        "peak_memory": {"ours at the same batch": 0.3, "ours at 1024 in one piece": 0.2, "ours at 1024, chunks": 0.03},
    },
}


class Phases:
    """When what began: on CUDA by events in the stream, which no one waits for; on a CPU by the time that it worked for us."""

    def __init__(self, device: torch.device):
        self.device = device
        self.clock: list[float] = []  # at the beginning of every step, on the wall
        self._marks: list[tuple[str, Any]] = []

    def enter(self, name: str) -> None:
        """From here on it is `name`; STEP is the beginning of a step."""
        if name == STEP or self._marks[-1][0] != name:
            self._marks.append((name, self._now()))
        if name == STEP:
            self.clock.append(time.perf_counter())

    def steps(self) -> list[dict[str, float]]:
        """Seconds of every part, step by step; what lies between STEP and the first part is "other"."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        found: list[dict[str, float]] = []
        for (name, start), (_, end) in pairwise(self._marks):
            if name == STEP:
                found.append({})
                name = "other"
            found[-1][name] = found[-1].get(name, 0.0) + self._seconds(start, end)
        return found

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - start


def watch(phases: Phases, network: nn.Module, backbone: nn.Module, text: nn.Module | None) -> None:
    """Tell forward from backward: a part begins with its module, and with the gradient of what the module gave.

    The network returns Features, or a tuple that begins with them; the loss follows it.
    """

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: phases.enter(name)

    def gave(name: str, then: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            features = output if isinstance(output, (list, Features)) else output[0]
            for tensor in features:
                if tensor is not None and tensor.requires_grad:
                    tensor.register_hook(enter(name))
            phases.enter(then)

        return hook

    network.register_forward_pre_hook(enter("heads"))
    backbone.register_forward_pre_hook(enter("backbone"))
    backbone.register_forward_hook(gave("backbone", then="heads"))
    if text is not None:
        text.register_forward_pre_hook(enter("text"))
        text.register_forward_hook(enter("heads"))
    network.register_forward_hook(gave("heads", then="loss"))


def counted(wanted: bool) -> Any:
    """A context that counts the operations of matrix products, convolutions and attention, where that is wanted."""
    return FlopCounterMode(display=False) if wanted else nullcontext()


def make_studies(job: Job, device: torch.device) -> Studies:
    """The same for every row."""
    generator = torch.Generator().manual_seed(world().rank)
    images = torch.randint(256, (job.batch, 2, 1, job.size, job.size), generator=generator, dtype=torch.uint8)
    tokens, texts = {}, {}
    for section in SECTIONS:
        median, spread = TOKENS[section]
        lengths = median * torch.exp(spread * torch.randn(job.batch, 1, generator=generator))
        lengths = lengths.round().clamp(3, LONGEST)
        longest = LONGEST if ROWS[job.row].padded else int(lengths.max())
        ids = torch.randint(1000, 28_000, (job.batch, longest), generator=generator)
        tokens[section] = {
            "input_ids": ids.to(device),
            "attention_mask": (torch.arange(longest) < lengths).long().to(device),
        }
        shared = torch.randn(TEXT_WIDTH, generator=generator)  # reports are alike
        texts[section] = (torch.randn(job.batch, TEXT_WIDTH, generator=generator) + shared).to(device)
    return Studies(images.to(device), tokens, texts)


def as_batch(studies: Studies) -> Batch:
    present = torch.ones(len(studies.images), dtype=torch.bool, device=studies.images.device)
    texts = studies.texts["findings"], studies.texts["impression"]
    return Batch([""] * len(present), studies.images, *texts, present, present, step=0)


def run_published(job: Job, phases: Phases) -> int:
    """Take all steps; operations of the first one."""
    row, device = ROWS[job.row], training_device()
    assert row.savings is not None
    config = our_config(job)
    encoder = ImageEncoder(config.model, job.size)
    # BERT-base, as Bio_ClinicalBERT is; random weights take as long
    text = None if row.savings.cached_text else BertModel(BertConfig(), add_pooling_layer=False)
    network = PublishedNetwork(encoder.backbone, encoder.channels, text, TEXT_WIDTH, row.savings).to(device)
    watch(phases, network, network.backbone, network.text)
    step = build_step(network, job.precision, gathers=row.gathers, enter=phases.enter)
    studies = make_studies(job, device)
    operations = 0
    for number in range(job.warm + job.steps):
        phases.enter(STEP)
        with counted(number == 0) as counter:
            step(studies)
        operations = counter.get_total_flops() if counter else operations
    phases.enter(STEP)
    return operations


def run_ours(job: Job, phases: Phases) -> int:
    """The same through the loop of a real run, with batches from here."""
    config, device, total = our_config(job), training_device(), job.warm + job.steps
    batches, counts = as_batch(make_studies(job, device)), []
    plan = our_plan(config, total)
    engine = build_engine(plan.build_model(), config.train, config.optim)
    watch(phases, engine.module, engine.module.image_encoder, None)

    def step(batch: Batch) -> Any:
        with counted(batch.step == 0) as counter:
            output = plan.step(engine, batch)
        counts.append(counter.get_total_flops() if counter else 0)
        phases.enter("optimizer")
        return output

    def numbered() -> Iterator[Batch]:
        for number in range(total):
            phases.enter(STEP)
            yield batches._replace(step=number)
        phases.enter(STEP)

    settings = LoopSettings(
        seed=config.seed,
        total_steps=total,
        global_batch_size=job.batch * world().size,
        batch_norm=plan.batch_norm,
        skips_overflow=config.train.precision == "fp16",
        log_every=config.train.log_every,
        images_every=0,
        lowest_temperature=plan.lowest_temperature,
    )
    calls = Calls(lambda _: False, lambda _: "go on", lambda _: {}, lambda *_: None)
    with tempfile.TemporaryDirectory() as folder:
        console = Console(file=io.StringIO())
        monitor = Monitor(Path(folder), start_step=0, total_steps=total, speaks=world().rank == 0, console=console)
        train_steps(engine, numbered(), step, plan.learning_rate, monitor, settings, calls, Drain())
        monitor.close()
    return counts[0]


def our_config(job: Job) -> RunConfig:
    """The default run file with the encoder, batch and precision of the job."""
    values = {
        "name": "step",
        "data": {"shards": "none: the benchmark makes its batches", "input_size": job.size, "val_split": ""},
        "model": {"image_encoder": job.encoder},
        "train": {
            "micro_batch_size": job.batch,
            "grad_cache_chunk": job.chunk,
            "precision": job.precision,
            "deepspeed": "zero0" if job.precision == "fp16" else "zero1",  # fp16 with BatchNorm has no other way
        },
    }
    return with_operands(build_run_config(merged(values, dict(ROWS[job.row].options))))


def our_plan(config: RunConfig, steps: int) -> Pretraining:
    batch = config.train.studies_of(world().size)
    horizon = Horizon(samples=batch * steps, global_batch_size=batch, steps_per_epoch=steps, total_steps=steps)
    policy = batch_norm_policy(config.train, training_device())
    inputs = Inputs([], "", TEXT_WIDTH, horizon, policy, nodes=1)
    return Pretraining(
        config=config,
        inputs=inputs,
        horizon=horizon,
        batch_norm=policy,
        nodes=1,
        validates=False,
        best_metric=config.train.best_metric,
    )


def run_loss(job: Job, phases: Phases) -> int:
    """Forward and backward of all losses, of features that are given. No engine, and nothing gathered."""
    device, config = training_device(), our_config(job)
    studies, generator = make_studies(job._replace(size=1), device), torch.Generator(device).manual_seed(1)

    def rows(*shape: int) -> Tensor:
        given = torch.randn(job.batch, *shape, 512, device=device, generator=generator)
        return normalize(given, dim=-1).requires_grad_()

    features, batch = Features(rows(2), rows(2), rows(2), rows(), rows()), as_batch(studies)
    savings = ROWS[job.row].savings
    autocast = torch.autocast(device.type, DTYPES[job.precision], enabled=job.precision != "fp32")
    for _ in range(job.warm + job.steps):
        phases.enter(STEP)
        if savings is None:
            total = imitate_loss(features, batch, config.objective).total
        else:
            with autocast:
                total = torch.stack(published_losses(features, studies.texts, savings)).sum()
        torch.autograd.grad(total, [side for side in features if side is not None])
    phases.enter(STEP)
    return 0


def measure_here(job: Job) -> dict[str, Any]:
    """All steps of one row in this process."""
    init_world()
    device = training_device()
    before = 0
    if device.type == "cpu":
        forget_peak()
        before = resident_bytes("VmRSS")
    phases = Phases(device)
    run = run_loss if job.loss_only else run_published if ROWS[job.row].savings is not None else run_ours
    operations = run(job, phases)
    steps = phases.steps()[job.warm :]
    peak = resident_bytes("VmHWM") - before if device.type == "cpu" else torch.cuda.max_memory_allocated()
    names = dict.fromkeys(name for parts in steps for name in parts)
    busy = [sum(parts.values()) for parts in steps]
    clock = [after - before for before, after in pairwise(phases.clock)][job.warm :]
    return {
        "seconds": statistics.median(busy if device.type == "cuda" else clock),
        "busy_seconds": statistics.median(busy),
        "parts": {name: statistics.median(parts.get(name, 0.0) for parts in steps) for name in names},
        "peak_bytes": peak,
        "operations": operations,
    }


def measure(job: Job, ranks: int, threads: int, extra: Mapping[str, str]) -> dict[str, Any]:
    """The same in fresh processes, one a rank; of rank 0. {"note": why} where it does not fit."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": job.device,
    }
    common["OMP_NUM_THREADS"] = str(threads)
    running = []
    for rank in range(ranks):
        environment = {**os.environ, **common, **extra, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, __file__, "--job", json.dumps(job._asdict())]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        running.append(subprocess.Popen(command, env=environment, **pipes))
    ended = [(*process.communicate(), process.returncode) for process in running]
    out, errors, status = ended[0]
    if any(status for *_, status in ended):
        if "OutOfMemoryError" in errors or status == -9:
            return {"note": "out of memory"}
        raise RuntimeError(f"{job}: ended with {status}\n{errors[-3000:]}")
    return json.loads(out.splitlines()[-1])


class Bench(NamedTuple):
    """The settings of this run of the benchmark."""

    base: Job
    ranks: int
    threads: int
    end: float  # of the time there is, by time.monotonic
    environment: Mapping[str, str] = MappingProxyType({})  # of the processes, besides ours

    def run(self, row: str, **changes: Any) -> dict[str, Any]:
        if time.monotonic() > self.end:
            return {"note": "no time left"}
        job = self.base._replace(row=row, **changes)
        start = time.monotonic()
        found = measure(job, self.ranks, self.threads, self.environment)
        said = (
            found.get("note")
            or f"{found['seconds']:.3g} s a step, {found['busy_seconds']:.3g} of work, {found['peak_bytes'] / GIB:.2f} GiB"
        )
        print(f"{row} {changes or ''}: {said} ({time.monotonic() - start:.0f} s)", file=sys.stderr, flush=True)
        return found


def measure_rows(bench: Bench, rows: Sequence[str], repeats: int) -> dict[str, dict[str, Any]]:
    """By turns, each round beginning elsewhere. A speedup is the median over rounds of published over this row."""
    runs: dict[str, list[dict]] = {row: [] for row in rows}
    for repeat in range(repeats):
        shift = repeat * len(rows) // repeats
        for row in [*rows[shift:], *rows[:shift]]:
            runs[row].append(bench.run(row))
    found = {row: summary(several, bench) for row, several in runs.items()}
    for row, cell in found.items():
        if "pairs_per_second" not in cell or "pairs_per_second" not in found.get("published", {}):
            continue
        ratios = [
            base["busy_seconds"] / run["busy_seconds"]
            for base, run in zip(runs["published"], runs[row], strict=True)
            if "note" not in base and "note" not in run
        ]
        cell |= {"speedup": statistics.median(ratios), "speedup_range": [min(ratios), max(ratios)]}
        cell["peak_share"] = cell["peak_bytes"] / found["published"]["peak_bytes"]
    return found


def summary(runs: Sequence[dict[str, Any]], bench: Bench) -> dict[str, Any]:
    """Median over processes, and the least and the most."""
    done = [run for run in runs if "note" not in run]
    if not done:
        return {"note": runs[0]["note"]}
    studies = bench.base.batch * bench.ranks
    seconds = [run["seconds"] for run in done]
    parts = {name: statistics.median(run["parts"].get(name, 0.0) for run in done) for name in done[0]["parts"]}
    peaks, busy = [run["peak_bytes"] for run in done], [run["busy_seconds"] for run in done]
    return {
        "pairs_per_busy_second": studies / statistics.median(busy),
        "pairs_per_busy_second_range": [studies / max(busy), studies / min(busy)],
        "pairs_per_second": studies / statistics.median(seconds),
        "pairs_per_second_range": [studies / max(seconds), studies / min(seconds)],
        "peak_bytes": int(statistics.median(peaks)),
        "peak_bytes_range": [min(peaks), max(peaks)],
        "share_of_part": {name: value / sum(parts.values()) for name, value in parts.items()},
        "gflop_a_study": done[0]["operations"] / bench.base.batch / 1e9,
        "processes": len(done),
    }


def measure_memory(bench: Bench, given: argparse.Namespace) -> dict[str, Any]:
    """Peaks at several batches and the straight line through them, at given.many studies; ours in chunks, too.

    Batches are such that activations outweigh what is fixed. No share is told of a line that misses one of its points by more
    than 2 %.
    """
    twice = [2 * batch for batch in given.memory]  # ours keeps about half
    in_chunks = [given.chunk * parts for parts in (4, 8, 16)]
    plan = {"published": (given.memory, 0), "ours": (twice, 0), "ours/chunks": (in_chunks, given.chunk)}
    found: dict[str, Any] = {"chunk": given.chunk, "environment": EXACT_PEAKS}
    exact = bench._replace(environment=EXACT_PEAKS)
    for name, (batches, chunk) in plan.items():
        cells = {
            batch: exact.run(name.partition("/")[0], batch=batch, chunk=chunk, warm=0, steps=1) for batch in batches
        }
        peaks = {batch: cell["peak_bytes"] for batch, cell in cells.items() if "note" not in cell}
        found[name] = {"peak_bytes": peaks, "notes": {b: cell["note"] for b, cell in cells.items() if "note" in cell}}
        if len(peaks) > 2:
            found[name]["line"] = line_through(peaks, given.many)
    lines = {name: found[name]["line"] for name in plan if found[name].get("line", {}).get("largest_miss", 1) < 0.02}
    if "published" in lines:
        there = lines["published"]["bytes_there"]
        found["share_of_published"] = {name: line["bytes_there"] / there for name, line in lines.items()}
    return found


def line_through(peaks: dict[int, int], many: int) -> dict[str, Any]:
    """Least squares: bytes = fixed + a_study * studies."""
    studies, values = list(peaks), list(peaks.values())
    slope, fixed = statistics.linear_regression(studies, values)
    misses = [abs(fixed + slope * at - value) / value for at, value in peaks.items()]
    return {
        "fixed_bytes": fixed,
        "bytes_a_study": slope,
        "largest_miss": max(misses),
        "studies": many,
        "bytes_there": fixed + slope * many,
        "kind": "measured" if many in peaks else "extrapolated",
    }


def measure_many(bench: Bench, given: argparse.Namespace) -> dict[str, Any]:
    """The peak of one step at N = given.many negatives on one rank: rows in one piece, where they fit, and ours in chunks."""
    found: dict[str, Any] = {"studies": given.many, "chunk": given.chunk, "environment": EXACT_PEAKS}
    exact = bench._replace(environment=EXACT_PEAKS)
    for name in given.many_rows:
        row, _, chunked = name.partition("/")
        cell = exact.run(row, batch=given.many, chunk=given.chunk if chunked else 0, warm=0, steps=1)
        found[name] = {key: cell[key] for key in ("note", "peak_bytes") if key in cell}
    return found


def measure_loss(bench: Bench, studies: int) -> dict[str, Any]:
    """All losses alone, N x N on one rank."""
    cells = {row: bench.run(row, batch=studies, loss_only=True, warm=1, steps=3) for row in ("published", "ours")}
    return {"studies": studies, **cells}


def add_share_of_loss(rows: dict[str, Any], loss: dict[str, Any]) -> None:
    """What share of a step the loss would have where N / B ranks meet, each with a step as measured here, messages left out.

    Calculated: with gathered negatives, as published, every rank computes all of N x N; ours its B of N rows.
    """
    batch = rows["batch"]
    for name, of_rank in {"published": 1.0, "ours": batch / loss["studies"]}.items():
        row = rows["cells"].get(name, {})
        if "note" in loss[name] or "pairs_per_second" not in row:
            continue
        seconds = loss[name]["busy_seconds"] * of_rank
        rest = (1 - row["share_of_part"].get("loss", 0.0)) * batch / row["pairs_per_busy_second"]
        loss[name]["share_of_a_step_calculated"] = seconds / (seconds + rest)


def utilisation(cell: dict[str, Any], precision: str, name: str) -> float | None:
    """Of the peak of the device, by the operations that were counted; None where no peak is known."""
    device = find_device(name)
    peak = device and device.peak(precision, convolved=1.0)  # type: ignore[arg-type]  # a name of Precision
    if not peak or "note" in cell:
        return None
    return cell["gflop_a_study"] * 1e9 * cell["pairs_per_second"] / peak


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--encoder", help="of timm; resnet18 on a CPU, resnet50 on a GPU")
    parser.add_argument("--size", type=int, help="pixels")
    parser.add_argument("--batch", type=int, help="studies of a rank")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--rows", nargs="*", choices=list(ROWS), default=TABLE, metavar="ROW")
    parser.add_argument("--repeats", type=int, help="processes of each row")
    parser.add_argument("--steps", type=int, help="that are timed in each process")
    parser.add_argument("--warm", type=int, help="steps before them")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--threads", type=int, help="of a rank")
    parser.add_argument("--memory", type=int, nargs="*", metavar="BATCH", help="whose peaks a line is laid through")
    parser.add_argument("--many", type=int, default=1024, help="negatives")
    parser.add_argument(
        "--many-rows", nargs="*", metavar="ROW", help="rows measured at --many; ours/chunks is GradCache"
    )
    parser.add_argument("--vit-batch", type=int, default=64, help="studies of the ViT-L/16")
    parser.add_argument("--chunk", type=int, help="studies that pass the encoder together there")
    parser.add_argument("--loss", type=int, help="studies of the loss alone")
    parser.add_argument("--minutes", type=float, help="what is not begun by then is left out")
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    for name, value in defaults(given).items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    if given.ranks == 1:  # nothing is gathered: the same as published
        given.rows = [row for row in given.rows if row != "published_gathered"]
    return given


def defaults(given: argparse.Namespace) -> dict[str, Any]:
    """By device; on a CPU as much as two cores do in an hour, which --only and --repeats make less."""
    cores = len(os.sched_getaffinity(0))
    if given.device == "cuda":
        return {
            "encoder": "resnet50",
            "size": 224,
            "batch": 128,
            "precision": "fp16",  # as published
            "repeats": 2,
            "warm": 3,
            "steps": 10,
            "threads": max(1, cores // given.ranks),
            "memory": [32, 64, 96],
            "many_rows": ["published", "ours/chunks"],
            "chunk": 128,
            "loss": 8192,
            "minutes": 9,
            "only": PARTS,
        }
    small = given.encoder != "resnet50"
    return {
        "encoder": "resnet18",
        "size": 64 if small else 224,
        "batch": 8 if small else 4,
        "precision": "fp32",
        "repeats": 3,
        "warm": 1,
        "steps": 2 if small else 1,
        "threads": max(1, cores // given.ranks),
        "memory": [64, 128, 192] if small else [8, 16, 24],
        "many_rows": ["published", "ours", "ours/chunks"] if small else ["ours/chunks"],
        "chunk": 8,
        "loss": 1024,
        "minutes": 60,
        "only": ["memory", "loss", "many", "rows"],
    }


def print_rows(cells: dict[str, dict[str, Any]]) -> None:
    header = [
        "step",
        "pairs/s",
        "pairs/busy s",
        "x published",
        "GFLOP a study",
        "peak GiB",
        "x published",
    ]
    parts = list(dict.fromkeys(part for cell in cells.values() for part in cell.get("share_of_part", {})))
    lines = []
    for name, cell in cells.items():
        if "note" in cell:
            lines.append([ROWS[name].title, cell["note"], *[""] * (len(header) - 2 + len(parts))])
            continue
        figures = [f"{cell['pairs_per_second']:.3g}", f"{cell['pairs_per_busy_second']:.3g}"]
        least, most = cell.get("speedup_range", (math.nan, math.nan))
        figures += [f"{cell.get('speedup', math.nan):.2f} ({least:.2f} to {most:.2f})"]
        figures += [f"{cell['gflop_a_study']:.1f}", f"{cell['peak_bytes'] / GIB:.2f}"]
        figures += [f"{cell.get('peak_share', math.nan):.2f}"]
        shares = [f"{cell['share_of_part'].get(part, 0):.0%}" for part in parts]
        lines.append([ROWS[name].title, *figures, *shares])
    print(table([*header, *parts], lines))


def measure_vit(bench: Bench, given: argparse.Namespace) -> dict[str, Any]:
    """What share of the device a large encoder without BatchNorm uses."""
    alone = bench._replace(base=bench.base._replace(batch=given.vit_batch))
    cell = summary([alone.run("ours_vit_large")], alone)
    return {
        "batch": given.vit_batch,
        "utilisation": utilisation(cell, bench.base.precision, device_name(torch.device(given.device))),
        **cell,
    }


def main() -> None:
    given = parse()
    if given.job:
        print(json.dumps(measure_here(Job(**json.loads(given.job)))), flush=True)
        leave_world()
    device = torch.device(given.device)
    base = Job("", given.encoder, given.size, given.batch, given.precision, given.device, given.warm, given.steps)
    bench = Bench(base, given.ranks, given.threads, time.monotonic() + 60 * given.minutes)
    setting = f"{given.encoder} at {given.size} px, {given.device}, {given.precision}"
    out = given.out or REPOSITORY / "benchmarks" / "results" / f"step_{given.encoder}_{given.device}.json"
    record: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    record |= {
        "setting": setting,
        "data": "left out: random bytes of the right shape, random tokens; lengths log-normal (median, deviation of the log)",
        "tokens": TOKENS,
        "predicted": PREDICTED.get(setting, "nothing was predicted for this setting"),
        "gpu": "measured" if given.device == "cuda" else "not measured",
        "titles": {name: row.title for name, row in ROWS.items()},
    }
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "memory": lambda: measure_memory(bench, given),
        "loss": lambda: measure_loss(bench, given.loss),
        "many": lambda: measure_many(bench, given),
        "vit_large": lambda: measure_vit(bench, given),
        "rows": lambda: {"batch": given.batch, "cells": measure_rows(bench, given.rows, given.repeats)},
    }
    where = {"machine": machine(device) | {"threads": given.threads, "ranks": given.ranks, "load": os.getloadavg()[0]}}
    for name in (name for name in parts if name in given.only):  # rows last: they take what time is left
        record[name] = {**provenance(), **where, **parts[name]()}
        if "rows" in record and "loss" in record:
            add_share_of_loss(record["rows"], record["loss"])
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")
    if "rows" in record:
        print_rows(record["rows"]["cells"])


if __name__ == "__main__":
    main()
