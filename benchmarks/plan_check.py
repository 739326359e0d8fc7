"""What `imitate-ds plan` says of a step, against real steps on this machine's CPU: peak memory and time.

    python benchmarks/plan_check.py [--out benchmarks/results/plan_check_cpu.json] [--only resnet18]

First the machine is calibrated: a linear layer, the convolutions of ResNet's four stages, a depthwise one, norms and
activations, what memory taken anew costs, the launch of an operation, an all-reduce between two processes, ZeRO-3's hooks on a
stack of linear layers; and what a process needs besides tensors, on timm's tiny test_resnet. Then every case is predicted, then
it is run: DeepSpeed, real model, real loss, real optimizer, one process a rank, two processes a case.

Memory is the peak of a rank's resident set (VmHWM, which is set back after imports and the start of the process group) above what
was resident then. glibc keeps what is freed, so for this every block above 64 KiB is a mapping of its own
(MALLOC_MMAP_THRESHOLD_), which goes back when freed. Time is that of another process with malloc as it is: the CPU seconds of
the fastest of a few steps, for the machine is shared and one thread computes; the wall clock is written down beside it. Data
loading is no part of either. Rank 0 is reported.
"""

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from common import REPOSITORY, machine, provenance, table

TEXT_WIDTH = 256
STRICT_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TOP_PAD_": "0",
}


class Case(NamedTuple):
    encoder: str
    pixels: int
    studies: int  # of a rank
    zero: str
    ranks: int
    chunk: int = 0
    text: int = 0  # layers that learn of a BERT-base in the step; 0: there is none

    @property
    def name(self) -> str:
        chunk = f", chunks of {self.chunk}" if self.chunk else ""
        text = f", BERT-base with {self.text} layers that learn" if self.text else ""
        return (
            f"{self.encoder} {self.pixels} px, {self.studies} studies, {self.zero}, {self.ranks} rank(s){chunk}{text}"
        )


# What each kind of run needs besides tensors: DeepSpeed imports more for some stages than for others.
TINY = [
    Case("test_resnet", 64, 4, zero, ranks)
    for zero, ranks in (("zero0", 1), ("zero1", 1), ("zero2", 1), ("zero1", 2), ("zero2", 2), ("zero3", 2))
]
CASES = [
    Case("resnet18", 128, 8, "zero0", 1),
    Case("resnet18", 128, 16, "zero1", 1),
    Case("resnet50", 128, 8, "zero1", 1),
    Case("vit_tiny_patch16_224", 128, 8, "zero1", 1),
    Case("convnext_atto", 128, 8, "zero1", 1),
    Case("resnet18", 128, 8, "zero2", 2),
    Case("resnet50", 128, 8, "zero2", 1, 2),  # passes of four images: see _convolution
    Case("resnet50", 128, 16, "zero2", 1, 8),
    Case("resnet18", 128, 8, "zero3", 2),
    Case("resnet50", 128, 8, "zero0", 1),
    Case("convnext_atto", 128, 16, "zero1", 2),
    Case("resnet18", 128, 16, "zero1", 1, 4),
    Case("vit_tiny_patch16_224", 128, 16, "zero2", 2),
    Case("resnet18", 128, 8, "zero1", 1, text=2),
    Case("resnet18", 128, 8, "zero3", 2, text=2),
]


def config_of(case: Case):
    from imitate_ds.config import build_run_config

    model = {"image_encoder": case.encoder}
    if case.encoder.startswith(("vit", "convnext")):
        model |= {"aggregation": {"keep": [0.25, 0.25, 0.25, 0.25], "slots": 1024}}
    train = {"micro_batch_size": case.studies, "deepspeed": case.zero, "grad_cache_chunk": case.chunk}
    online = {"mode": "online", "encoder": os.environ["PLAN_CHECK_BERT"], "trainable_layers": case.text}
    text = online if case.text else {}
    return build_run_config(
        {
            "name": "check",
            "data": {"shards": "none", "input_size": case.pixels},
            "model": model,
            "text": text,
            "train": train,
        }
    )


def save_bert(folder: Path) -> None:
    """A BERT-base with random weights and a tokenizer of as many tokens, as a hub folder has them."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    config = BertConfig()
    words = {"[PAD]": 0, "[UNK]": 1} | {str(number): number for number in range(2, config.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    BertModel(config).save_pretrained(folder)


def tokens_of(studies: int, generator: torch.Generator, *, crowded: bool):
    """Of reports that are as long in the mean as the plan says of so many, and half to one and a half times as long each."""
    from imitate_ds.batch import Tokens
    from imitate_ds.planning.assumptions import USUAL_SPREAD, USUAL_TOKENS
    from imitate_ds.planning.text import Lengths

    usual = Lengths(*USUAL_TOKENS, USUAL_SPREAD * sum(USUAL_TOKENS), 256, 256)
    mean = torch.tensor(usual.of_a_study(studies if crowded else None))
    share = torch.linspace(0.5, 1.5, studies)[torch.randperm(studies, generator=generator)]
    lengths = (share[:, None] * mean).round().long()
    ids = torch.randint(2, 10_000, (int(lengths.sum()),), generator=generator, dtype=torch.int32)
    return Tokens(ids, lengths)


def predict(case: Case, speeds: dict, overhead: float) -> dict:
    from imitate_ds.planning.assumptions import Machine, Rates
    from imitate_ds.planning.memory import read_stage
    from imitate_ds.planning.planner import placed_at, timed_at
    from imitate_ds.planning.subject import Data, study_run

    rates = Rates(**speeds, overhead=overhead)
    here = Machine(
        "cpu", 1, case.ranks, float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), False, {"likely": rates}
    )
    subject = study_run(config_of(case), here, Data(None, None, None, TEXT_WIDTH, ""))
    stage, chunk = read_stage(case.zero), case.chunk or case.studies
    placed = placed_at(subject, here, stage, studies=case.studies, chunk=chunk)
    taken = timed_at(subject, here, stage, chunk=chunk, end="likely")
    return {
        "bytes": placed.total,
        "moment": placed.moment,
        "kinds": placed.kinds,
        "seconds": taken.total,
        "parts": taken._asdict(),
    }


def steps_of_a_rank(case: Case, steps: int) -> dict:
    """In a process of its own: so many real steps; peak memory above what was resident before, and seconds of each step."""
    from imitate_ds.batch import Batch
    from imitate_ds.data.transforms import TrainViews
    from imitate_ds.distributed import init_world, world
    from imitate_ds.models.text_tower import open_text_source
    from imitate_ds.planning.trace import trace_step  # noqa: F401  # so that imports are the same in every process
    from imitate_ds.recipe import Inputs, build_model, train_step
    from imitate_ds.training.batch_norm import set_training_mode
    from imitate_ds.training.course import Horizon
    from imitate_ds.training.engine import build_engine, take_step

    init_world()
    config = config_of(case)
    torch.nn.functional.conv2d(torch.zeros(1, 8, 8, 8), torch.zeros(8, 8, 3, 3))
    before = _resident()
    source = open_text_source(config.text, config.text.encoder) if case.text else None
    model = build_model(config, Inputs([], "", TEXT_WIDTH, Horizon(0, 0, 0, 0), "mean", 1, source))
    engine = build_engine(model, config.train, config.optim)
    set_training_mode(engine.module, "mean")
    views = TrainViews(config.data.augment, case.pixels)
    generator = torch.Generator().manual_seed(world().rank)
    # Building (weights twice while they are flattened, code that is loaded) is no part of a step; nor is it ever its peak.
    Path("/proc/self/clear_refs").write_text("5")
    count, wall, cpu = case.studies, [], []
    for step in range(steps):
        images = torch.randint(0, 255, (count, 2, 1, case.pixels, case.pixels), dtype=torch.uint8, generator=generator)
        findings, impression = torch.randn(2, count, TEXT_WIDTH, generator=generator)
        there = torch.ones(count, dtype=torch.bool)
        tokens = tokens_of(count, generator, crowded=step == 1) if case.text else None  # one for the peak
        keys = [str(k) for k in range(count)]
        batch = Batch(keys, images, findings, impression, there, there, step, tokens=tokens)
        began, used = time.perf_counter(), time.process_time()
        train_step(engine, config, views, batch)
        take_step(engine)
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
    return {
        "bytes": _peak() - before,
        "wall": wall,
        "cpu": cpu,
        "faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt,
    }


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _resident() -> int:
    return _status("VmRSS")


def _peak() -> int:
    return _status("VmHWM")


def run(case: Case, steps: int, **environment: str) -> dict:
    """Rank 0's answer of so many processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {
        "WORLD_SIZE": str(case.ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "PYTHONPATH": str(REPOSITORY),
    }
    shared |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **environment}
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(case.ranks):
            answer = Path(folder) / f"{rank}.json"
            command = [
                sys.executable,
                __file__,
                "--rank-of",
                json.dumps(case),
                "--steps",
                str(steps),
                "--answer",
                str(answer),
            ]
            env = {**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(
                subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            )
        for process in ranks:
            _, errors = process.communicate()
            if process.returncode:
                raise RuntimeError(f"{case.name}: {errors[-2000:]}")
        return json.loads((Path(folder) / "0.json").read_text())


def calibrate() -> dict:
    """Speeds of one thread of this machine, as fields of planning.assumptions.Rates."""
    rows, linear = torch.randn(1024, 256, requires_grad=True), torch.nn.Linear(256, 1024)
    depthwise = torch.nn.Conv2d(128, 128, 7, padding=3, groups=128)
    images = _images(16, 128, 28)
    return {
        "matmul": 3 * 2 * 1024 * 256 * 1024 / _least(lambda: linear(rows).sum().backward()),
        "convolution": _convolution(),
        "depthwise": 3 * 2 * images.numel() * 49 / _least(lambda: depthwise(images).sum().backward()),
        "bandwidth": _bandwidth(),
        "pages": _pages(),
        "launch": _launch(),
        "host_bandwidth": 1.0,
        "host_link": 1.0,
    }


def _convolution() -> float:
    """Operations a second over ResNet's four stages, 1 x 1 and 3 x 3: one shape alone is up to half faster.

    Of sixteen images: for fewer, torch has slower 1 x 1 convolutions where it has one thread.
    """
    operations, seconds = 0, 0.0
    for channels, kernel in product((64, 128, 256, 512), (1, 3)):
        images = _images(16, channels, 56 * 64 // channels)
        layer = torch.nn.Conv2d(channels, channels, kernel, padding=kernel // 2)
        operations += 3 * 2 * images.numel() * channels * kernel**2
        seconds += _least(lambda layer=layer, images=images: layer(images).sum().backward())
    return operations / seconds


def _images(count: int, channels: int, pixels: int) -> torch.Tensor:
    images = torch.randn(count, channels, pixels, pixels)
    return images.contiguous(memory_format=torch.channels_last).requires_grad_()


def _bandwidth() -> float:
    """Bytes a second, as a trace counts them, of norms and activations: of ResNet's four stages, and of a ViT's rows."""
    from imitate_ds.planning.trace import trace_step

    def layers(norm: type[torch.nn.Module], act: type[torch.nn.Module], width: int) -> torch.nn.Sequential:
        return torch.nn.Sequential(*(layer for _ in range(4) for layer in (norm(width), act())))

    cases = [
        (
            torch.nn.BatchNorm2d,
            torch.nn.ReLU,
            channels,
            lambda channels=channels: _images(8, channels, 56 * 64 // channels),
        )
        for channels in (64, 128, 256, 512)
    ]
    cases += [
        (torch.nn.LayerNorm, torch.nn.GELU, width, lambda width=width: torch.randn(8, 196, width).requires_grad_())
        for width in (192, 768)
    ]
    moved, seconds = 0.0, 0.0
    for norm, act, width, rows in cases:
        moved += trace_step(layers(norm, act, width), lambda model, _, rows=rows: model(rows()).sum(), 1).moved.sum()
        model, given = layers(norm, act, width), rows()
        seconds += _least(lambda model=model, given=given: model(given).sum().backward())
    return moved / seconds


def _pages() -> float:
    """CPU seconds, of a byte of memory that the system has to find: of a block too large for malloc to keep."""
    block = torch.ones(2**25)
    return max(0.0, _least(lambda: block + 1.0) - _least(lambda: block.add_(1.0))) / block.nbytes


def _launch() -> float:
    """CPU seconds of an operation that has next to nothing to do, as a trace counts operations."""
    from imitate_ds.planning.trace import trace_step

    def step(model: torch.nn.Module, rows: int) -> torch.Tensor:
        return model(torch.zeros(rows, 8)).sum()

    def layers() -> torch.nn.Module:
        parts = [(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.ReLU()) for _ in range(40)]
        return torch.nn.Sequential(*(layer for part in parts for layer in part))

    model, operations = layers(), len(trace_step(layers(), step, 4).live)
    return _least(lambda: step(model, 4).backward()) / operations


def _least(work, repeats: int = 9) -> float:
    """CPU seconds of the fastest of several times."""
    work()
    found = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found)


def link_of_a_rank() -> dict:
    """Bytes a second that two processes exchange by gloo: of an all-reduce, each rank receives as much as the tensor holds."""
    from imitate_ds.distributed import init_world, sum_over_ranks

    init_world()
    tensor = torch.ones(2**24)
    seconds, used = [], []
    for _ in range(6):
        began, cpu = time.perf_counter(), time.process_time()
        sum_over_ranks(tensor)
        seconds.append(time.perf_counter() - began)
        used.append(time.process_time() - cpu)
    return {"wall": tensor.nbytes / min(seconds), "cpu": tensor.nbytes / min(used)}


def hooks_of_a_rank(zero: str) -> dict:
    """CPU seconds of a step of sixty tiny linear layers."""
    from torch import nn

    from imitate_ds.config import OptimConfig, TrainConfig
    from imitate_ds.distributed import init_world
    from imitate_ds.training.engine import build_engine

    init_world()
    engine = build_engine(
        nn.Sequential(*(nn.Linear(8, 8) for _ in range(60))), TrainConfig(deepspeed=zero), OptimConfig()
    )
    rows, seconds = torch.randn(4, 8), []
    for _ in range(8):
        began = time.process_time()
        engine.backward(engine(rows).sum())
        seconds.append(time.process_time() - began)
        engine.step()
    return {"seconds": min(seconds)}


def compare(cases: list[Case], steps: int, out: Path) -> list[dict]:
    """Writes what there is after every case."""
    speeds = calibrate()
    link = run(Case("link", 0, 0, "", 2), 0)
    speeds |= {"link": link["cpu"]}
    plain, hooked = (run(Case("hooks", 0, 0, zero, 1), 0)["seconds"] for zero in ("zero0", "zero3"))
    speeds |= {"hooks": max(0.0, hooked - plain) / 120}
    overhead = {}
    for tiny in TINY:
        if any(_kind(tiny) == _kind(case) for case in cases):
            overhead[_kind(tiny)] = run(tiny, 3, **STRICT_MALLOC)["bytes"] - predict(tiny, speeds, 0.0)["bytes"]
    constants = speeds | {"overhead": overhead, "link by wall clock": link["wall"]}
    print(json.dumps(constants), flush=True)
    predicted = [predict(case, speeds, overhead[_kind(case)]) for case in cases]  # all of them, before any is run
    rows = []
    for case, said in zip(cases, predicted, strict=True):
        memory, timed = run(case, 3, **STRICT_MALLOC), run(case, steps)
        found = {"bytes": memory["bytes"], "cpu_seconds": min(timed["cpu"][1:]), "wall_seconds": min(timed["wall"][1:])}
        errors = {"memory": said["bytes"] / found["bytes"] - 1, "time": said["seconds"] / found["cpu_seconds"] - 1}
        rows.append({"case": case._asdict(), "name": case.name, "predicted": said, "measured": found, "error": errors})
        print(f"{case.name}: memory {errors['memory']:+.1%}, time {errors['time']:+.1%}", flush=True)
        whole = provenance() | {"machine": machine(torch.device("cpu")), "calibration": constants, "cases": rows}
        out.write_text(json.dumps(whole, indent=1) + "\n")
    return rows


def _kind(case: Case) -> str:
    return f"{case.zero}, {case.ranks} rank(s)"


def show(rows: list[dict]) -> str:
    header = ["case", "MiB predicted", "measured", "", "s predicted", "measured", ""]
    lines = []
    for row in rows:
        said, found, error = row["predicted"], row["measured"], row["error"]
        lines.append(
            [
                row["name"],
                *(f"{said['bytes'] / 2**20:,.0f}", f"{found['bytes'] / 2**20:,.0f}", f"{error['memory']:+.1%}"),
                *(f"{said['seconds']:.2f}", f"{found['cpu_seconds']:.2f}", f"{error['time']:+.1%}"),
            ]
        )
    return table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=REPOSITORY / "benchmarks/results/plan_check_cpu.json")
    parser.add_argument("--only", default="", help="Cases whose name holds this.")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.rank_of:
        from imitate_ds.distributed import leave_world

        case = Case(*json.loads(arguments.rank_of))
        kinds = {"link": link_of_a_rank, "hooks": lambda: hooks_of_a_rank(case.zero)}
        answer = kinds.get(case.encoder, lambda: steps_of_a_rank(case, arguments.steps))()
        arguments.answer.write_text(json.dumps(answer))
        leave_world()  # as every entrance does; gloo's threads, left to the interpreter's end, may abort it
    cases = [case for case in CASES if arguments.only in case.name]
    with tempfile.TemporaryDirectory() as folder:
        if any(case.text for case in cases):
            save_bert(Path(folder))
        os.environ["PLAN_CHECK_BERT"] = folder
        print(show(compare(cases, arguments.steps, arguments.out)))


if __name__ == "__main__":
    main()
