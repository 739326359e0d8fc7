"""How the contrastive loss scales over ranks: what is sent, how long a step takes, what memory it needs.

    python benchmarks/scaling.py            # about two minutes on two quiet CPU cores
    python benchmarks/scaling.py --quick    # a tiny run: says nothing about speed

Measured here, on 1, 2 and 4 CPU ranks under gloo, one thread each: every message of a step, checked against a closed
formula; how much of the gather of texts a forward pass hides; the time of a step under both exchanges. The step is the
impression group of imitate_ds/objective.py, three pairs that share a prior, forward and backward.

Calculated: memory against N, checked against the peak of one process; and a *model* of all three groups of a training
step on 8 to 1024 GPUs, from stated link speeds. Nothing was run on more than one GPU: whatever says "model" is not measured.

Prints tables, writes benchmarks/results/scaling-<device>.json and scaling.png beside it.
"""

import argparse
import ctypes
import json
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from common import REPOSITORY, device_slug, machine, provenance, table
from loss_forms import PRIOR_STRENGTH, counted_flops, one_rank_of
from scaling_model import (
    CPU,
    EXCHANGES,
    GPU_ROWS,
    GPUS,
    IMPRESSION,
    RATIO_ROWS,
    Message,
    Share,
    Width,
    cpu_model,
    flops_of,
    gpu_constants,
    memory_of,
    messages_of,
    model_of,
    text_messages,
)
from torch import Tensor
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import normalize

from imitate_ds import distributed
from imitate_ds.batch import Batch
from imitate_ds.config import ObjectiveConfig
from imitate_ds.distributed import RankRows, barrier, count_rows, gather_rows, init_world, leave_world, mean_over_ranks
from imitate_ds.objective import exchange_texts
from imitate_ds.ops.contrastive import Pair, clinical_contrastive_losses

RESULTS = REPOSITORY / "benchmarks" / "results"
MIB = 2**20
TITLES = {"reduce_scatter": "reduce-scatter", "owner": "owner"}


class Sent(NamedTuple):
    kind: str
    size: int
    wire: int  # bytes that this process wrote to its sockets
    waited: float  # seconds until the last rank came
    seconds: float  # from then on


class _Done:
    def wait(self) -> None:
        """It has ended."""


@contextmanager
def traced() -> Iterator[list[Sent]]:
    """Every collective while this lasts, none beside another, behind a barrier that tells waiting from sending."""
    seen: list[Sent] = []

    def watched(module: Any, name: str, whole: int) -> Any:
        original = getattr(module, name)

        def call(*tensors: Tensor, async_op: bool = False, **options: Any) -> _Done:
            start = time.perf_counter()
            barrier()
            arrived, before = time.perf_counter(), _written()
            original(*tensors, **options)
            ended = time.perf_counter()
            kind = name.strip("_")
            seen.append(Sent(kind, tensors[whole].nbytes, _written() - before, arrived - start, ended - arrived))
            return _Done()

        return mock.patch.object(module, name, call)

    with (
        watched(distributed, "_all_gather", 0),
        watched(distributed, "_reduce_scatter", 1),
        watched(distributed.dist, "all_reduce", 0),
    ):
        yield seen


def _written() -> int:
    """Bytes this process has written so far; gloo's sockets count as files (Linux only)."""
    return _numbers("/proc/self/io")["wchar"]


def _numbers(path: str) -> dict[str, int]:
    lines = (line.split() for line in Path(path).read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}


def checked(seen: Sequence[Sent], expected: Sequence[Message]) -> None:
    found = [(sent.kind, sent.size) for sent in seen]
    formula = [(message.kind, message.size) for message in expected]
    if found != formula:
        raise RuntimeError(f"sent {found}, but the closed formula says {formula}: mend messages_of")


class Inputs(NamedTuple):
    sides: dict[str, Tensor]  # [B, D] by name
    prior: Tensor  # [N, E]
    rows: RankRows


def make_inputs(rows: RankRows, width: Width, prior: Tensor) -> Inputs:
    generator = torch.Generator().manual_seed(rows.rank)
    names = sorted({name for link in IMPRESSION.links for name in (link.query, link.keys)})
    mine = rows.counts[rows.rank]
    sides = {name: normalize(torch.randn(mine, width.joint, generator=generator), dim=1) for name in names}
    return Inputs({name: side.requires_grad_() for name, side in sides.items()}, prior, rows)


def step(inputs: Inputs, exchange: str) -> None:
    """Forward and backward of the loss of the impression group."""
    pairs = [Pair(inputs.sides[link.query], inputs.sides[link.keys], link.temperature) for link in IMPRESSION.links]
    losses = clinical_contrastive_losses(
        pairs,
        inputs.prior,
        prior_strength=PRIOR_STRENGTH,
        backend="strips",
        rows=inputs.rows,
        exchange=exchange,
    )
    weighted = [link.weight * loss for link, loss in zip(IMPRESSION.links, losses.unbind(), strict=True)]
    torch.autograd.grad(torch.stack(weighted).sum(), list(inputs.sides.values()))


def seconds_of(repeats: int, *runs: Callable[[], object]) -> list[float]:
    """Median over repeats and mean over ranks, who begin together. By turns, so that a drift of the machine favours none."""
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(1 + repeats):
        for run, times in zip(runs, taken, strict=True):
            barrier()
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return [_mean(statistics.median(times[1:])) for times in taken]


def _mean(value: float) -> float:
    return mean_over_ranks(torch.tensor(value, dtype=torch.float64)).item()


def measure_texts(share: Share, forward_seconds: float, repeats: int) -> dict:
    """The gather of texts alone, and beside a forward pass: one that keeps this core busy, one that runs elsewhere."""
    width = share.width.text
    texts = torch.randn(share.rows, width, generator=torch.Generator().manual_seed(distributed.world().rank))
    images, mask = torch.zeros(share.rows, 2, 1, 1, 1, dtype=torch.uint8), torch.ones(share.rows, dtype=torch.bool)
    batch = Batch([""] * share.rows, images, texts, texts, mask, mask, step=0)
    start_gather = partial(exchange_texts, batch, ObjectiveConfig())
    with traced() as seen:
        start_gather()()
    checked(seen, text_messages(share))

    square = torch.randn(256, 256)
    (one,) = seconds_of(20, lambda: torch.mm(square, square))
    products = max(1, round(forward_seconds / one))

    def busy() -> None:
        for _ in range(products):
            torch.mm(square, square)

    def beside(forward: Callable[[], None]) -> None:
        texts = start_gather()
        forward()
        texts()

    found: dict[str, Any] = {
        "ring_bytes": sum(message.sent(share.ranks) for message in text_messages(share)),
        "wire_bytes": sum(sent.wire for sent in seen),
    }
    for name, forward in {"busy": busy, "elsewhere": partial(time.sleep, forward_seconds)}.items():
        alone, apart, together = seconds_of(repeats, lambda: start_gather()(), forward, partial(beside, forward))
        hidden = min(1.0, max(0.0, (apart + alone - together) / alone))
        found[name] = {"alone_s": alone, "forward_s": apart, "together_s": together, "hidden_share": hidden}
    return found


def measure_step(share: Share, inputs: Inputs, repeats: int) -> dict:
    """Time of a step as it runs; then message by message, with what waits and what is left as computing."""
    run = partial(step, inputs, share.exchange)
    (plain,) = seconds_of(repeats, run)
    with counted_flops() as flops:
        run()
    expected = messages_of(IMPRESSION, share)
    formula = flops_of(IMPRESSION, share)
    if sum(flops) != formula:
        raise RuntimeError(f"{sum(flops)} FLOPs were issued, but the closed formula says {formula}: mend products_of")
    runs = []
    for _ in range(repeats):
        barrier()
        with traced() as seen:
            start = time.perf_counter()
            run()
            whole = time.perf_counter() - start
        checked(seen, expected)
        waited, sending = sum(sent.waited for sent in seen), sum(sent.seconds for sent in seen)
        runs.append((waited, sending, whole - waited - sending, seen))
    record = {"step_s": plain, "flops": formula}
    for n, name in enumerate(("waiting_s", "sending_s", "computing_s")):
        record[name] = _mean(statistics.median(one[n] for one in runs))
    record["messages"] = [
        {
            "title": message.title,
            "kind": message.kind,
            "bytes": message.size,
            "ring_bytes": message.sent(share.ranks),
            "wire_bytes": runs[0][3][n].wire,
            "seconds": _mean(statistics.median(one[3][n].seconds for one in runs)),
        }
        for n, message in enumerate(expected)
    ]
    return record


def gemm_rate(share: Share, repeats: int) -> float:
    """FLOPs a second of the products that a strip is made of, and nothing else."""
    strip, columns = torch.randn(min(512, share.rows), share.width.joint), torch.randn(share.columns, share.width.joint)
    out = torch.empty(len(strip), len(columns))
    (taken,) = seconds_of(max(repeats, 5), lambda: torch.mm(strip, columns.T, out=out))
    return 2 * out.numel() * share.width.joint / taken


def run_rank(rank: int, share: Share, port: int, given: argparse.Namespace, results: Any) -> None:
    """One of the processes; the first tells what was found."""
    where = {"RANK": rank, "WORLD_SIZE": share.ranks, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in where.items()}, MASTER_PORT=str(port), DS_ACCELERATOR="cpu")
    init_world()
    torch.set_num_threads(1)
    rows = count_rows(share.rows)
    texts = torch.randn(share.rows, share.width.text, generator=torch.Generator().manual_seed(100 + rank))
    inputs = make_inputs(rows, share.width, gather_rows(texts, rows))
    found: dict[str, Any] = {"exchanges": {}}
    for exchange in EXCHANGES:
        found["exchanges"][exchange] = measure_step(share._replace(exchange=exchange), inputs, given.repeats)
    if share.ranks > 1:
        found["texts"] = measure_texts(share, given.forward_ms / 1000, given.repeats)
    else:
        found["gemm_rate"] = gemm_rate(share, given.repeats)
    if rank == 0:
        results.put(found)
    leave_world()


def on_ranks(share: Share, given: argparse.Namespace) -> dict:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return _in_processes(run_rank, share.ranks, share, port, given)


def _in_processes(work: Callable, count: int, *arguments: Any) -> Any:
    """What the first of these processes puts into the queue that all are given last."""
    results = get_context("spawn").SimpleQueue()  # a pipe, which must hold all of it until the processes have ended
    spawn(work, (*arguments, results), nprocs=count)
    return results.get()


def peak_of_one(_: int, share: Share, results: Any) -> None:
    """How far the memory of this process grows in a step of one rank among many, to whom nothing is sent."""
    torch.set_num_threads(1)

    def run(share: Share) -> int:
        rows = RankRows((share.rows,) * share.ranks, 0)
        inputs = make_inputs(rows, share.width, torch.randn(share.columns, share.width.text))
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = _numbers("/proc/self/status")["VmRSS"]
        with one_rank_of(rows):
            step(inputs, share.exchange)
        return 1024 * (_numbers("/proc/self/status")["VmHWM"] - before)

    run(share._replace(rows=16))  # threads and libraries are there from now on
    results.put(run(share))


def ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{1000 * seconds:,.0f} ms"


def tables(record: dict) -> str:
    parts = [message_table(record), step_table(record)]
    if any("texts" in cell for cell in record["measured"].values()):
        parts.append(text_table(record))
    return "\n\n".join([*parts, *memory_tables(record), model_table(record), ratio_table(record)])


def message_table(record: dict) -> str:
    lines = []
    for ranks, cell in record["measured"].items():
        for exchange, found in cell["exchanges"].items():
            lines += [
                [
                    ranks,
                    TITLES[exchange],
                    m["title"],
                    m["kind"],
                    f"{m['bytes']:,}",
                    f"{m['ring_bytes']:,.0f}",
                    f"{m['wire_bytes']:,}",
                    ms(m["seconds"]),
                ]
                for m in found["messages"]
            ]
    header = ["ranks", "exchange", "message", "kind", "bytes", "sent by a ring", "sent by gloo", "time"]
    return f"measured: the messages of a step, as the closed formula has them\n\n{table(header, lines)}"


def step_table(record: dict) -> str:
    lines = []
    for ranks, cell in record["measured"].items():
        for exchange, found in cell["exchanges"].items():
            model = record["cpu_model"]["cells"][ranks][exchange]
            columns = [found["step_s"], found["computing_s"], found["sending_s"], found["waiting_s"]]
            models = [model["step_s"], model["computing_s"], model["sending_s"]]
            use = "fitted" if int(ranks) in record["cpu_model"]["fitted_on_ranks"] else "predicted"
            error = f"{100 * model['error']:+.0f} %, {use}"
            lines.append([ranks, TITLES[exchange], *map(ms, columns), *map(ms, models), error])
    header = ["ranks", "exchange", "step", "computing", "sending", "waiting"]
    header += ["*model*: step", "computing", "sending", "error of the step"]
    rows, cores = record["rows"], record["machine"]["cores"]
    constants = record["cpu_model"]["constants"]
    fit = f"{constants['flops_per_s_alone'] / 1e9:.0f} GFLOP/s alone, "
    fit += f"{constants['flops_per_s_beside_others'] / 1e9:.0f} beside others, {ms(constants['round_s'])} a round, "
    fit += f"{constants['bytes_per_s'] / 1e6:.0f} MB/s"
    title = f"measured: a step, {rows} rows a rank, {cores} cores; and the *model* of it ({fit})"
    return f"{title}\n\n{table(header, lines)}"


def text_table(record: dict) -> str:
    lines = []
    for ranks, cell in record["measured"].items():
        for name in ("busy", "elsewhere") if "texts" in cell else ():
            texts, beside = cell["texts"], cell["texts"][name]
            times = [ms(value) for value in (beside["alone_s"], beside["forward_s"], beside["together_s"])]
            lines.append([ranks, f"{texts['wire_bytes']:,}", name, *times, f"{100 * beside['hidden_share']:.0f} %"])
    header = ["ranks", "bytes sent", "forward pass", "gather alone", "forward alone", "together", "hidden"]
    title = "measured: the gather of texts beside a forward pass that keeps the core busy, or runs elsewhere"
    return f"{title}\n\n{table(header, lines)}"


def memory_tables(record: dict) -> list[str]:
    checks = [
        [f"{c['columns']:,}", TITLES[c["exchange"]], *(f"{c[k] / MIB:,.0f} MiB" for k in ("measured", "formula"))]
        for c in record["memory"]["check"]
    ]
    parts = list(record["memory"]["cells"][0]["reduce_scatter"])
    lines = [
        [f"{cell['columns']:,}", TITLES[exchange], *(f"{cell[exchange].get(part, 0) / MIB:,.0f}" for part in parts)]
        for cell in record["memory"]["cells"]
        for exchange in EXCHANGES
    ]
    rows = record["rows"]
    return [
        f"measured: peak memory of a step beyond inputs, {rows} rows a rank, beside the formula\n\n"
        + table(["N", "exchange", "measured", "formula"], checks),
        f"by formula: the same for more columns, MiB, fp32\n\n{table(['N', 'exchange', *parts], lines)}",
    ]


def model_table(record: dict) -> str:
    lines = []
    for cell in record["model"]["cells"]:
        line = [str(cell["rows_per_gpu"]), str(cell["gpus"]), f"{cell['columns']:,}"]
        for exchange in EXCHANGES:
            found = cell[exchange]
            line += [
                f"{ms(found['step_s'])} ({ms(found['computing_s'])} + {ms(found['sending_s'])})",
                f"{found['memory_bytes'] / 2**30:.2f} GiB",
            ]
        ratio = cell["owner"]["step_s"] / cell["reduce_scatter"]["step_s"]
        agrees = "" if cell["auto"] == cell["faster"] else " (not the faster)"
        lines.append([*line, f"{ratio:.2f}", TITLES[cell["auto"]] + agrees, ms(cell["owner"]["texts_s"])])
    header = ["rows", "GPUs", "N"]
    for exchange in EXCHANGES:
        header += [f"{TITLES[exchange]} (computing + sending)", "memory"]
    header += ["owner / reduce-scatter", "auto takes", "texts, meanwhile"]
    gpu = record["model"]["gpu"]
    rate, other = gpu["gemm_flops_per_s"], gpu["other_s_per_flop"]
    constants = f"products at {rate / 1e12:.0f} TFLOP/s, {rate * other:.2f} times that between them ({gpu['source']})"
    return f"*model*: the loss of a training step on H100 nodes; {constants}\n\n{table(header, lines)}"


def ratio_table(record: dict) -> str:
    lines = [
        [str(e["gpus"]), e["network"], *(f"{ratio:.2f}" for ratio in e["by_rows"].values()), TITLES[e["auto"]]]
        for e in record["model"]["owner_over_reduce_scatter"]
    ]
    header = ["GPUs", "network", *(f"{rows:,} rows" for rows in RATIO_ROWS), "auto takes"]
    return f"*model*: time of owner over that of reduce-scatter, by rows a GPU\n\n{table(header, lines)}"


def draw(record: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for rows, color in zip(GPU_ROWS, ("tab:blue", "tab:red"), strict=True):
        cells = [cell for cell in record["model"]["cells"] if cell["rows_per_gpu"] == rows]
        gpus = [cell["gpus"] for cell in cells]
        for exchange, line in {"reduce_scatter": "--", "owner": "-"}.items():
            style = {"color": color, "linestyle": line, "marker": "o", "markersize": 3.5}
            label = f"{rows} rows a GPU, {TITLES[exchange]}"
            left.plot(gpus, [1000 * cell[exchange]["step_s"] for cell in cells], label=label, **style)
            right.plot(gpus, [cell[exchange]["memory_bytes"] / 2**30 for cell in cells], label=label, **style)
    left.set(title="time of the loss, ms a step", ylabel="ms")
    right.set(title="memory of the loss, GiB a GPU", ylabel="GiB")
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(GPUS, [str(count) for count in GPUS])
        axes.set_xlabel("GPUs")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.grid(alpha=0.3)
        axes.axvspan(GPUS[0] / 1.3, 11.3, color="0.9", zorder=0)
        axes.set_xlim(GPUS[0] / 1.3, GPUS[-1] * 1.3)
        axes.text(GPUS[0] / 1.22, 0.95, "one node", transform=axes.get_xaxis_transform(), fontsize=8, color="0.4")
    figure.suptitle(
        "Model, not measured: the contrastive loss of a training step on H100 nodes of eight, fp16 operands"
    )
    figure.savefig(path, dpi=110)


def memory(share: Share, columns: Sequence[int], checked_at: Sequence[int]) -> dict:
    cells = [
        {"columns": count}
        | {
            exchange: memory_of(IMPRESSION, share._replace(ranks=count // share.rows, exchange=exchange))
            for exchange in EXCHANGES
        }
        for count in columns
    ]
    check = []
    for count in checked_at:
        for exchange in EXCHANGES:
            small = share._replace(ranks=count // share.rows, exchange=exchange)
            peak = _in_processes(peak_of_one, 1, small)
            formula = memory_of(IMPRESSION, small)["peak"]
            check.append({"columns": count, "exchange": exchange, "measured": peak, "formula": formula})
    return {"check": check, "cells": cells}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes on 1 and 2 ranks: shows that it runs")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4], help="1 and 2 are needed for the fit")
    parser.add_argument("--rows", type=int, default=512, help="B, of each rank")
    parser.add_argument("--width", type=int, default=512, help="D, of the embeddings")
    parser.add_argument("--text-width", type=int, default=768, help="E, of the prior")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--forward-ms", type=float, default=200, help="of the forward pass beside the gather of texts")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/scaling-<device>.json")
    given = parser.parse_args()
    if given.quick:
        vars(given).update(ranks=[1, 2], rows=48, width=32, text_width=48, repeats=2, forward_ms=5.0)
    if not {1, 2} <= set(given.ranks) or given.rows < 1 or given.repeats < 1:
        parser.error(
            f"--ranks {given.ranks} --rows {given.rows} --repeats {given.repeats}: 1 and 2 ranks, 1 of the others"
        )
    return given


def main() -> None:
    given = parse_arguments()
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    width = Width(given.width, given.text_width)
    share = Share(1, given.rows, width, "reduce_scatter")
    measured = {str(count): on_ranks(share._replace(ranks=count), given) for count in sorted(given.ranks)}
    alone = measured["1"]["exchanges"]["reduce_scatter"]
    overhead = measured["1"]["gemm_rate"] * alone["step_s"] / alone["flops"]
    out = given.out or RESULTS / f"scaling-{device_slug(CPU)}.json"
    columns = [given.rows * 8 * 2**k for k in range(6)]  # 4k to 131k
    record = {
        "machine": machine(CPU),
        **provenance(),
        "rows": given.rows,
        "D": width.joint,
        "E": width.text,
        "measured": measured,
        "cpu_model": cpu_model(measured, share),
        "memory": memory(share, columns, columns[: 1 if given.quick else 2]),
        "model": model_of(gpu_constants(RESULTS, overhead), width),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    draw(record, out.parent / "scaling.png")
    print(tables(record))


if __name__ == "__main__":
    main()
