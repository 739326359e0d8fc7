"""profile.html: where the time, the operations and the memory of a step go, on one page that needs no other file."""

import json
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from imitate_ds.data.shard_index import write_atomic
from imitate_ds.evaluation.report import PAGE, html_table
from imitate_ds.evaluation.report_pictures import picture

PROFILE = "profile.html"

FLAG = (
    "Shares are of the time of a step, as rank 0 saw it. On a CPU the clock of the process counts, on CUDA the device's: what it "
    "waits for is there with whoever it waits for. What DeepSpeed sends to other ranks is in backward and step; communication is "
    "what the loss and the loop send. trace.json.gz beside this page opens in Perfetto, or in chrome://tracing."
)
OPERATIONS = (
    "Model FLOPs: matrix products and convolutions, forward and backward, once each, of the first batch of every rank. What "
    "activation checkpointing and GradCache compute again is not in them, nor in MFU."
)
MEMORY = (
    "What a rank holds, a storage counted once. optimizer: its state, and the float32 weights of mixed precision. buckets: of "
    "gradients on their way. activations and loss: the most that the first step, which is never compiled, kept for its backward "
    "pass, with autocast's copies of weights. peak, on CUDA: of everything, since the second step. Not in activations: what "
    "activation checkpointing computes again for a moment, what libraries keep for themselves, and what an operator needs while "
    "it runs, as do the strips of the loss."
)


def write_profile_page(out: Path, found: dict[str, Any]) -> Path:
    """Draw out/profile.html from what profile.json holds."""
    run = found["run"]
    title = f"imitate_ds: a step of {escape(run['name'])}"
    parts = [
        html_table(["", ""], [[escape(name), escape(value)] for name, value in profile_summary(found)]),
        _pictures(found),
        f"<h2>Time</h2>{_time_table(found)}",
        f"<h2>Operations</h2>{_operations_table(found)}<p><small>{OPERATIONS}</small></p>",
        f"<h2>Memory</h2>{_memory_table(found)}<p><small>{MEMORY}</small></p>",
        f"<h2>Operators</h2>{_operators_table(found)}",
        f"<details><summary>Settings</summary><pre>{escape(json.dumps(run, indent=1))}</pre></details>",
    ]
    path = out / PROFILE
    write_atomic(path, PAGE.format(title=title, flag=FLAG, body="\n".join(parts)).encode())
    return path


def profile_summary(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What a person asks first, as names and values."""
    run = found["run"]
    what = f"{run['image_encoder']}, {run['input_size']} px, batch {run['global_batch_size']}"
    speed = f"{found['tflops']:.3g} TFLOP/s" + (f", MFU {found['mfu']:.1%}" if "mfu" in found else "")
    largest = max(found["memory_mib"], key=lambda memory: sum(memory.values()))
    kinds = ", ".join(f"{kind} {mib:.0f}" for kind, mib in largest.items() if mib >= 1)
    shares = sorted(found["time"].items(), key=lambda item: -item[1]["share"])
    return [
        ("step", f"{what}, {run['precision']}, {run['deepspeed']}, {run['ranks']} rank(s) on {found['device']}"),
        ("time of a step", f"{1000 * found['seconds_per_step']:.1f} ms, {found['studies_per_second']:.1f} studies/s"),
        ("of it", ", ".join(f"{kind} {part['share']:.1%}" for kind, part in shares)),
        ("accounted for", f"{found['time_accounted_for']:.1%} of the time"),
        ("our own lines", f"{found['own_lines_share']:.1%} (data, loss, other)"),
        ("model FLOPs", f"{found['flops_per_study'] / 1e9:.3g} GFLOP a study"),
        ("speed of a rank", speed),
        ("memory of a rank, MiB", kinds),
    ]


def _pictures(found: dict[str, Any]) -> str:
    time = {kind: 100 * part["share"] for kind, part in found["time"].items()}
    flops = {part: count / 1e9 for part, count in found["flops_by_part"].items()}
    panels = {
        "Time of a step, %": time,
        "Operations, GFLOP a study": flops,
        "Memory of rank 0, MiB": found["memory_mib"][0],
    }
    return picture(
        {title: partial(_bars, values=values) for title, values in panels.items()}, "Time, operations, memory"
    )


def _bars(axes: Axes, values: dict[str, float]) -> None:
    names = list(values)[::-1]
    axes.barh(names, [values[name] for name in names])
    axes.tick_params(axis="y", labelsize=8)
    for row, name in enumerate(names):
        axes.text(values[name], row, f" {values[name]:.3g}", va="center", fontsize=7)
    axes.margins(x=0.2)


def _time_table(found: dict[str, Any]) -> str:
    rows = [[escape(k), f"{part['milliseconds']:.2f}", f"{part['share']:.1%}"] for k, part in found["time"].items()]
    return html_table(["", "ms a step", "share"], rows)


def _operations_table(found: dict[str, Any]) -> str:
    whole = found["flops_per_study"]
    rows = [[escape(k), f"{count / 1e9:.4g}", f"{count / whole:.1%}"] for k, count in found["flops_by_part"].items()]
    rows.append(["computed again", f"{found['recomputed_flops_per_study'] / 1e9:.4g}", ""])
    return html_table(["part", "GFLOP a study", "share"], rows)


def _memory_table(found: dict[str, Any]) -> str:
    kinds = list(dict.fromkeys(kind for memory in found["memory_mib"] for kind in memory))
    rows = [
        [str(rank), *(f"{memory.get(kind, 0):.1f}" for kind in kinds)]
        for rank, memory in enumerate(found["memory_mib"])
    ]
    return html_table(["rank, MiB", *kinds], rows)


def _operators_table(found: dict[str, Any]) -> str:
    rows = [
        [
            f"<code>{escape(one['name'])}</code>",
            f"{one['calls']:.0f}",
            f"{one['milliseconds']:.2f}",
            f"{one['share']:.1%}",
        ]
        for one in found["operators"]
    ]
    return html_table(["operator, by its own time", "calls a step", "ms a step", "share"], rows)
