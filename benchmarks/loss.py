"""The contrastive loss against its alternatives: time, memory and error of forward + backward, side by side in one run.

    python benchmarks/loss.py                        # on a GPU where there is one, in about --minutes 8
    python benchmarks/loss.py --memory               # on a CPU: peak memory too, every form in a process of its own
    python benchmarks/loss.py --rss 4096 8192 16384  # on a CPU: how the peak memory of strips grows

Prints tables and writes benchmarks/results/loss-<device>.json. Needs torch, nothing else; open_clip_torch, memeff and
siglip-kernel (pip install 'imitate-ds[bench]') are measured where they are installed.

B x N: one rank's share of a step, B rows of its own against the N columns of all N / B ranks. What is timed is what that
rank computes. Nothing is sent: every other rank is taken to hold the same rows as this one.

pair: one loss with a clinical prior. step: the six losses of a training step, in three groups that share a prior.
"""

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import (
    REPOSITORY,
    device_slug,
    forget_peak,
    installed_version,
    machine,
    provenance,
    resident_bytes,
    table,
    total_memory,
)
from loss_forms import (
    FORMS,
    KINDS,
    Case,
    Form,
    Run,
    Width,
    counted_flops,
    flops_of_products,
    make_case,
    reference_gradient,
)
from torch import Tensor

REPEATS = (3, 20)  # at least; at most, while there is time
CUDA_ONLY = "CUDA only"
REFERENCE_ROWS = 2048  # up to here, gradients are compared with those of float64
# What a time is divided by, for 32-bit and 16-bit operands.
BASELINES = {"over_strips": ("strips", "strips_fp16"), "over_gemm": ("gemm", "gemm_fp16")}

SIZES = {
    "cpu": {"pair": "1024x1024 2048x2048 2048x8192 4096x4096 8192x8192", "step": "2048x2048 2048x8192"},
    "cuda": {
        "pair": "128x128 2048x2048 4096x4096 8192x8192 16384x16384 4096x32768 8192x65536 16384x131072",
        "step": "2048x2048 4096x32768 8192x65536 16384x131072",
    },
}


def gradient_error(case: Case, form: Form, gradient: Tensor, references: dict[str, Tensor]) -> float:
    """Relative, by norm."""
    if form.objective not in references:
        references[form.objective] = reference_gradient(case, form.objective)
    expected = references[form.objective]
    return ((gradient.double() / form.gradient_scale - expected).norm() / expected.norm()).item()


class Sample(NamedTuple):
    seconds: float
    peak: int | None  # bytes beyond inputs and gradients; a CPU does not tell
    gradients: Sequence[Tensor]


def timed(run: Run, device: torch.device) -> Sample:
    if device.type != "cuda":
        start = time.perf_counter()
        gradients = run()
        return Sample(time.perf_counter() - start, None, gradients)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    gradients = run()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return Sample(seconds, torch.cuda.max_memory_allocated() - before - byte_size(gradients), gradients)


def byte_size(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


class Budget:
    """The time that is left, and what a form is known to cost."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes
        self._costs: dict[str, tuple[float, float]] = {}  # seconds to get ready, and a logit

    def left(self) -> float:
        return self.end - time.monotonic()

    def learn(self, name: str, case: Case, cold: float, warm: float) -> None:
        self._costs[name] = (max(0.0, cold - warm), warm / case.work)

    def expected(self, name: str, case: Case) -> float:
        """Seconds for the first run and the fewest repeats; 0 where nothing is known yet."""
        ready, a_logit = self._costs.get(name, (0.0, 0.0))
        return ready + (1 + REPEATS[0]) * a_logit * case.work


def measure(case: Case, names: Sequence[str], budget: Budget, cases_left: int) -> dict[str, dict]:
    """Every form on one case, by turns, so that a drift of the machine favours none: cells by name."""
    torch._dynamo.reset()  # it gives up after a few shapes, without a word
    cells: dict[str, dict] = {}
    runs: dict[str, Run] = {}
    references: dict[str, Tensor] = {}
    planned = 0.0
    for name in names:
        form, cost = FORMS[name], budget.expected(name, case)
        note = obstacle(form, case)
        if not note and planned + cost > budget.left():
            note = f"skipped: would take ~{cost:.2g} s" if cost else "skipped: no time left"
        cells[name] = {"note": note} if note else first_run(case, form, runs, name, references)
        planned += cost if name in runs else 0
    slot = time.monotonic() + budget.left() / cases_left
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(REPEATS[1]):
        if repeat >= REPEATS[0] and time.monotonic() > slot:
            break
        turns = list(runs)[repeat % len(runs) :] + list(runs)[: repeat % len(runs)] if runs else []
        for name in turns:
            try:
                taken, peak, _ = timed(runs[name], case.device)
            except torch.OutOfMemoryError as problem:  # the inputs of the others are there by now
                cells[name] = {"note": failure(problem, case, FORMS[name])}
                del runs[name], seconds[name]
                continue
            seconds[name].append(taken)
            if peak is not None:
                cells[name]["peak_bytes"] = max(peak, cells[name].get("peak_bytes", 0))
    for name, times in seconds.items():
        budget.learn(name, case, cells[name]["seconds_first"], min(times))
        cells[name] |= {"seconds_min": min(times), "seconds_median": statistics.median(times), "repeats": len(times)}
        for ratio, baselines in BASELINES.items():
            base = seconds.get(baselines[FORMS[name].half])
            if base:  # turn by turn
                cells[name][ratio] = statistics.median(t / b for t, b in zip(times, base, strict=True))
    for name, cell in cells.items():
        gemm = cells.get(BASELINES["over_gemm"][FORMS[name].half], {})
        if "over_gemm" in cell and "flops" in cell:
            cell["over_gemm_as_issued"] = cell["over_gemm"] * gemm["flops"] / cell["flops"]
    return cells


def first_run(case: Case, form: Form, runs: dict[str, Run], name: str, references: dict[str, Tensor]) -> dict:
    """Build a form and warm it up; into `runs` where it can go on. What is known of it then, or why it cannot."""
    try:
        start = time.perf_counter()
        with counted_flops() as flops:
            run = form.build(case)
            gradients = timed(run, case.device).gradients
        cell: dict[str, Any] = {"seconds_first": time.perf_counter() - start}
    except Exception as problem:
        note = failure(problem, case, form)
        if not note:
            raise
        return {"note": note}
    if form.objective == "none":
        cell["flops"] = flops_of_products(case, priors=form.priors)
    elif flops:
        cell["flops"] = sum(flops)
    if form.objective != "none" and case.rows == case.columns <= REFERENCE_ROWS:
        cell["gradient_error"] = gradient_error(case, form, gradients[0], references)
    runs[name] = run
    return cell


def failure(problem: Exception, case: Case, form: Form) -> str:
    """What to write in the cell; nothing where it should stop us. What others compile or ship may fail in any way."""
    if isinstance(problem, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        need = f": needs at least {needed_gib(form, case):.1f} GiB" if form.bytes_a_logit else ""
        return f"out of memory{need}"
    if form.package or form.compiled:
        return f"failed: {type(problem).__name__}: {str(problem).strip().splitlines()[0][:100]}"
    return ""


def obstacle(form: Form, case: Case) -> str:
    """Why a form cannot run here, or nothing."""
    if cuda_is_missing(form, case.device):
        return CUDA_ONLY
    if form.package and importlib.util.find_spec(form.module) is None:
        return "not installed"
    if form.square and case.columns > case.rows:
        return "one process: N = B only"
    if needed_gib(form, case) > 0.9 * total_memory(case.device) / 2**30:
        return f"needs at least {needed_gib(form, case):.1f} GiB"
    return ""


def cuda_is_missing(form: Form, device: torch.device) -> bool:
    return (form.half or form.needs_cuda) and device.type != "cuda"


def needed_gib(form: Form, case: Case) -> float:
    return form.bytes_a_logit * case.work / 2**30


def peak_here(name: str, case: Case, small: Case) -> int:
    """Peak memory of one form beyond inputs and gradients, on a CPU: what this process grows by. Once a process."""
    run = FORMS[name].build(small)
    run()  # threads and libraries are there from now on
    if small is not case:
        run = FORMS[name].build(case)
    forget_peak()
    before = resident_bytes("VmRSS")
    gradients = run()
    return resident_bytes("VmHWM") - before - byte_size(gradients)


def peak_elsewhere(kind: str, name: str, size: str, width: Width) -> int:
    """The same in a process of its own; ru_maxrss would start at what the parent had."""
    command = [sys.executable, __file__, "--peak", kind, name, size, "--device", "cpu"]
    command += ["--width", str(width.joint), "--text-width", str(width.text)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.splitlines()[-1])


def print_peak(kind: str, name: str, size: str, width: Width) -> None:
    rows, columns = parse_size(size)
    case = make_case(kind, rows, columns, width, torch.device("cpu"))
    # A compiled form has to compile this very size first, which takes more memory than it does.
    print(peak_here(name, case, case if FORMS[name].compiled else make_case(kind, 64, 64, width, case.device)))


def add_peaks(cells: dict[str, dict], width: Width) -> None:
    """Peak memory into the cells of all forms that ran and make a gradient."""
    for kind, sizes in cells.items():
        for size, name in ((size, name) for size, found in sizes.items() for name in found):
            if "note" not in sizes[size][name] and FORMS[name].objective != "none":
                print(f"memory of {kind} {size} {name} ...", file=sys.stderr, flush=True)
                sizes[size][name]["peak_bytes"] = peak_elsewhere(kind, name, size, width)


def growth(samples: Sequence[int], width: Width) -> list[dict]:
    """Peak memory of strips, one pair, B = N, for growing N."""
    record = []
    for count in samples:
        peak = peak_elsewhere("pair", "strips", f"{count}x{count}", width)
        record.append({"samples": count, "peak_bytes": peak, "bytes_a_sample": round(peak / count)})
    return record


def parse_size(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal()) or int(rows) < 1 or int(columns) % int(rows):
        raise SystemExit(f"size = {text}: must be BxN, N a multiple of B, such as 2048x8192")
    return int(rows), int(columns)


def describe(names: Sequence[str], device: torch.device) -> dict[str, dict]:
    """What the rows of the tables are."""
    described = {}
    for name in names:
        form = FORMS[name]
        described[name] = {"title": form.title}
        if form.leaves_out:
            described[name]["leaves_out"] = form.leaves_out
        if form.package:
            described[name] |= {"package": form.package, "version": installed_version(form.package)}
        if cuda_is_missing(form, device):
            described[name]["note"] = CUDA_ONLY
    return described


def tables(record: dict) -> str:
    """Times with their ratio to strips, then peak memory and error where they were measured; "pair", then "step"."""
    titles = {
        "over_strips": "median of forward + backward; x times that of strips with operands as wide",
        "over_gemm_as_issued": "times matrix products alone of as many FLOPs as it issues; in brackets, as strips need",
        "peak_bytes": "peak memory beyond inputs and gradients",
        "gradient_error": "relative error of the gradient of the first side, against float64",
    }
    written = []
    for kind, quantity in itertools.product(record["cells"], titles):
        sizes = record["cells"][kind]
        names = [name for name in FORMS if any(name in cells for cells in sizes.values())]
        rows = [[FORMS[n].title, *(shown(sizes[size].get(n, {}), quantity) for size in sizes)] for n in names]
        rows = [row for row in rows if set(row[1:]) - {"", CUDA_ONLY}]
        if rows and (
            quantity == "over_strips" or any(quantity in c for cells in sizes.values() for c in cells.values())
        ):
            written.append(f"{kind}: {titles[quantity]}\n\n{table(['', *sizes], rows)}")
    left_out = [FORMS[n].title for n, about in record["forms"].items() if about.get("note") == CUDA_ONLY]
    return "\n\n".join(written + ([f"{CUDA_ONLY}: {'; '.join(left_out)}"] if left_out else []))


def shown(cell: dict, quantity: str) -> str:
    if quantity == "over_strips" and "note" in cell:
        return cell["note"]
    if quantity == "over_strips" and "seconds_median" in cell:
        ratio = f" x{cell[quantity]:.2f}" if quantity in cell else ""
        return f"{1000 * cell['seconds_median']:.4g} ms{ratio}"
    if quantity not in cell:
        return ""
    if quantity == "peak_bytes":
        return f"{cell[quantity] / 2**20:,.0f} MiB"
    if quantity == "over_gemm_as_issued":
        return f"{cell[quantity]:.2f} ({cell['over_gemm']:.2f})"
    return f"{cell[quantity]:.1e}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--pair", nargs="*", metavar="BxN", help="sizes of one loss")
    parser.add_argument("--step", nargs="*", metavar="BxN", help="sizes of a whole step, six losses")
    parser.add_argument(
        "--forms", nargs="*", choices=list(FORMS), default=list(FORMS), metavar="FORM", help=str([*FORMS])
    )
    parser.add_argument("--minutes", type=float, default=8, help="what would take longer is skipped")
    parser.add_argument("--memory", action="store_true", help="on a CPU: measure peak memory as well")
    parser.add_argument("--rss", nargs="*", type=int, metavar="N", help="only the peak memory of strips at B = N")
    parser.add_argument("--width", type=int, default=512, help="D, of the embeddings")
    parser.add_argument("--text-width", type=int, default=768, help="E, of the prior")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/loss-<device>.json")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = parse_arguments()
    device, width = torch.device(given.device), Width(given.width, given.text_width)
    if given.peak:
        kind, name, size = given.peak
        return print_peak(kind, name, size, width)
    out = given.out or REPOSITORY / "benchmarks" / "results" / f"loss-{device_slug(device)}.json"
    record = json.loads(out.read_text()) if out.exists() else {}

    def write(section: str, values: dict) -> None:
        record[section] = {"machine": machine(device), **provenance(), "D": width.joint, "E": width.text, **values}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=1) + "\n")

    if given.rss:
        grown = growth(given.rss, width)
        write("strips_memory", {"kind": "pair", "peaks": grown})
        lines = [
            [f"{g['samples']:,}", f"{g['peak_bytes'] / 2**20:,.0f} MiB", f"{g['bytes_a_sample']:,}"] for g in grown
        ]
        print(table(["B = N", "peak of strips beyond inputs and gradients", "bytes a sample"], lines))
        return None
    if device.type == "cpu":
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # its worker processes would disturb the clock
    wanted = {kind: getattr(given, kind) for kind in KINDS}
    if not any(wanted.values()):
        wanted = {kind: sizes.split() for kind, sizes in SIZES[device.type].items()}
    plan = [(kind, *parse_size(size)) for kind, sizes in wanted.items() for size in sizes or []]
    budget, cells = Budget(given.minutes), {kind: {} for kind, *_ in plan}
    # From small to large: what a form costs is learnt before it costs much.
    ascending = sorted(plan, key=lambda p: (p[1] * p[2] * (1 if p[0] == "pair" else 6), p[0]))
    for done, (kind, rows, columns) in enumerate(ascending):
        case = make_case(kind, rows, columns, width, device)
        names = [name for name in given.forms if kind in FORMS[name].kinds]
        print(f"{kind} {case.size} ...", file=sys.stderr, flush=True)
        cells[kind][case.size] = measure(case, names, budget, len(plan) - done)
        write("times", {"forms": describe(given.forms, device), "cells": cells})
    if given.memory and device.type == "cpu":
        add_peaks(cells, width)
        write("times", {"forms": describe(given.forms, device), "cells": cells})
    print(tables(record["times"]))
    return None


if __name__ == "__main__":
    main()
