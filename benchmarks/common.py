"""What the benchmarks share: the machine they ran on, and a table."""

import ctypes
import datetime
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch

REPOSITORY = Path(__file__).resolve().parents[1]


def machine(device: torch.device) -> dict:
    """What a figure depends on besides the code."""
    return {
        "device": device_name(device),
        "memory_gib": round(total_memory(device) / 2**30, 1),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed_version("triton"),
    }


def provenance() -> dict:
    """When, from which commit and by which command."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "command": " ".join(["python", *sys.argv]),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def device_slug(device: torch.device) -> str:
    """A short name for files: h100, cpu-amd-epyc-2 (its cores)."""
    name = re.sub(r"\((r|tm)\)|@.*|\d+-core.*", "", device_name(device).lower())
    plain = r"nvidia|geforce|tesla|cpu|processor|graphics|\d+gb|hbm\w*|pcie|sxm\d*|nvl"
    words = [word for word in re.findall(r"[a-z0-9]+", name) if not re.fullmatch(plain, word)]
    if device.type == "cuda":
        return "-".join(words)
    return "-".join(["cpu", *words, str(len(os.sched_getaffinity(0)))])


def total_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resident_bytes(name: Literal["VmRSS", "VmHWM"]) -> int:
    """Memory of this process: now, or at most since it began or forget_peak was called (Linux only)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def forget_peak() -> None:
    """VmHWM begins anew. What was freed goes back to the system first, so that it is not taken for room to grow in."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown, with columns of equal width."""
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)


def _commit() -> str | None:
    """The commit of this repository, with a + where tracked files differ from it; None where git cannot tell."""
    try:
        commit, changes = (
            subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changes else "")
