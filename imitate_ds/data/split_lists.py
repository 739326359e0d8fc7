"""Parts of a split as lists of keys with a checksum: label fractions, or a validation part where a collection has none.

A part is a range of shares in a random order of the patients. Ranges that do not meet are parts that share no patient, and
0:0.01 lies within 0:0.1, which lies within 0:1.
"""

import hashlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from imitate_ds.data.shard_index import ShardIndex, write_atomic

FORMAT = "imitate_ds.split/1"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
AGAIN = "make it again with 'imitate-ds splits make'"

Unit = Literal["patient", "sample"]


class Part(NamedTuple):
    """Of the units in their random order, those from `low` up to, not including, `high`; both are shares of all."""

    low: float
    high: float


def parse_part(text: str) -> tuple[str, Part]:
    """NAME=LOW:HIGH. Raises ValueError naming the rule."""
    name, sign, shares = text.partition("=")
    low, _, high = shares.partition(":")
    try:
        part = Part(float(low), float(high))
    except ValueError:
        part = Part(1, 0)
    if not sign or not NAME.fullmatch(name) or not 0 <= part.low < part.high <= 1:
        raise ValueError(
            f"--part {text}: must be NAME=LOW:HIGH with 0 <= LOW < HIGH <= 1, as in --part train=0:0.9 --part val=0.9:1"
        )
    return name, part


def make_split_lists(
    index: ShardIndex,
    split: str,
    parts: Mapping[str, Part],
    out: Path,
    *,
    seed: int = 0,
    unit: Unit = "patient",
    among: Collection[str] | None = None,
) -> dict[str, int]:
    """Write out/NAME.txt for every part; how many samples each has.

    among: keys of samples, such as those that are annotated for a task; None: all of the split. unit: what is drawn.
    Samples, as papers do, put a patient on both sides. Raises ValueError where a part would be empty.
    """
    members = [member for shard in index.of_split(split) for member in shard.members]
    members = members if among is None else [member for member in members if member.key in among]
    units = np.array([member.patient if unit == "patient" else member.key for member in members])
    names = np.unique(units)
    # as in shard_plan.py: raw words of PCG64, which NumPy promises to keep
    place = np.empty(len(names), dtype=np.int64)
    place[np.argsort(np.random.PCG64(seed).random_raw(len(names)), kind="stable")] = np.arange(len(names))
    where = place[np.searchsorted(names, units)]
    counts = {}
    for name, part in parts.items():
        low, high = (round(share * len(names)) for share in part)
        keys = sorted(member.key for member, at in zip(members, where, strict=True) if low <= at < high)
        if not keys:
            raise ValueError(
                f"--part {name}={part.low}:{part.high}: is none of the {len(names)} {unit}s of split {split!r}; widen it"
            )
        about = {
            "build_id": index.build_id,
            "split": split,
            "part": f"{part.low}:{part.high}",
            "unit": unit,
            "seed": seed,
        }
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / f"{name}.txt", _text(about, keys).encode())
        counts[name] = len(keys)
    return counts


def read_split_list(path: Path, *, build_id: str, split: str) -> list[str]:
    """The keys of a list. Raises FileNotFoundError, or ValueError where it was changed or is of other shards."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {AGAIN}")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    about = dict(line[2:].split(" = ", 1) for line in lines if line.startswith("# ") and " = " in line)
    keys = [line for line in lines if line and not line.startswith("#")]
    if not lines or lines[0] != f"# {FORMAT}":
        raise ValueError(f"{path}: its first line must be '# {FORMAT}'; {AGAIN}")
    if about.get("sha256") != _checksum(keys):
        raise ValueError(f"{path}: its keys are not those it was made with (the SHA-256 differs); {AGAIN}")
    for name, wanted in (("build_id", build_id), ("split", split)):
        if about.get(name) != wanted:
            raise ValueError(f"{path}: {name} = {about.get(name)}: must be {wanted}, that of the shards; {AGAIN}")
    return keys


def _text(about: Mapping[str, object], keys: list[str]) -> str:
    header = [f"# {FORMAT}", *(f"# {name} = {value}" for name, value in about.items()), f"# sha256 = {_checksum(keys)}"]
    return "\n".join([*header, *keys]) + "\n"


def _checksum(keys: list[str]) -> str:
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()
