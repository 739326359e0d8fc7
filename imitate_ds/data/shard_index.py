"""The index of a shard folder: which tars there are, and where in them every sample lies.

A reader needs nothing else: with a member's offset and size a sample is one seek and one read, in any order. The format
is written down in shards/README.md.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

FORMAT = "imitate_ds.shards/1"
INDEX = "index.json"
BUILDING = ".building"  # notes of an unfinished build, inside the shard folder; gone when index.json is written


class Member(NamedTuple):
    """One sample: its key, hashes that group samples by study and by patient, and the bytes of its two files."""

    key: str
    study: str
    patient: str
    image_offset: int
    image_size: int
    meta_offset: int
    meta_size: int


@dataclass(frozen=True)
class ShardEntry:
    name: str
    split: str
    samples: int
    bytes: int
    sha256: str
    members: tuple[Member, ...]

    @property
    def text_name(self) -> str:
        """The file with this shard's text embeddings."""
        return self.name.removesuffix(".tar") + ".text.safetensors"


@dataclass(frozen=True)
class ShardIndex:
    root: Path
    source: str
    synthetic: bool
    image_size: int  # pixels of a side
    build_id: str
    labels: tuple[str, ...]
    shards: tuple[ShardEntry, ...]
    fingerprint: str = ""  # of what the build was made from; "" in folders of earlier versions

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(shard.split for shard in self.shards))

    def of_split(self, split: str) -> tuple[ShardEntry, ...]:
        """The shards of one split, in order. Raises ValueError naming the splits there are."""
        found = tuple(shard for shard in self.shards if shard.split == split)
        if not found:
            raise ValueError(f"split = {split!r}: {self.root} has no such split; it has: {', '.join(self.splits)}")
        return found


def sample_key(source: str, study_id: str, image_id: str) -> str:
    """The name of a sample outside its tar: 16 hex characters, a pseudonym as group_hash makes them."""
    return _hash(source, study_id, image_id, size=8)


def group_hash(source: str, identifier: str) -> str:
    """The name of a patient or a study outside its tar: 12 hex characters, enough to group by.

    A pseudonym, not an anonym: whoever knows what the ids look like can hash all of them and find the one it stands for.
    """
    return _hash(source, identifier, size=6)


def load_index(root: Path) -> ShardIndex:
    """Read the index of a shard folder and check that its tars are there, at their full size.

    Raises FileNotFoundError where there is no folder or no index, ValueError where the build or the copy is unfinished.
    """
    path = root / INDEX
    if not path.is_file():
        raise FileNotFoundError(_why_no_index(root))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path}: not valid JSON; build again with 'imitate-ds shards build'") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{path}: format must be {FORMAT}; build again with 'imitate-ds shards build'")
    try:
        index = _index(root, values)
    except (KeyError, TypeError):
        raise ValueError(f"{path}: not a complete index; build again with 'imitate-ds shards build'") from None
    _check_files(index)
    return index


def load_report(root: Path) -> dict:
    """What the build of a shard folder kept and dropped."""
    load_index(root)
    return json.loads((root / INDEX).read_text(encoding="utf-8"))["report"]


def build_id(shards: tuple[ShardEntry, ...]) -> str:
    """One id for the content of all shards."""
    return hashlib.sha256("".join(f"{shard.name} {shard.sha256}\n" for shard in shards).encode()).hexdigest()


def read_member(path: Path, offset: int, size: int) -> bytes:
    """The bytes of one file inside a tar. Raises ValueError where the tar ends before them."""
    with path.open("rb") as file:
        return _read_at(file, path.name, offset, size)


def read_samples(index: ShardIndex, split: str) -> Iterator[tuple[Member, bytes, dict]]:
    """Every sample of a split in index order: its member, its JPEG bytes, and its JSON values."""
    for shard in index.of_split(split):
        yield from read_shard(index.root, shard)


def read_shard(root: Path, shard: ShardEntry) -> Iterator[tuple[Member, bytes, dict]]:
    """Every sample of one shard, in order."""
    with (root / shard.name).open("rb") as file:
        for member in shard.members:
            image = _read_at(file, shard.name, member.image_offset, member.image_size)
            yield member, image, json.loads(_read_at(file, shard.name, member.meta_offset, member.meta_size))


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is either there whole or not at all."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")  # two nodes may write the same file
    with scratch.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash(*parts: str, size: int) -> str:
    return hashlib.blake2b("\x1f".join(parts).encode(), digest_size=size).hexdigest()


def _read_at(file, name: str, offset: int, size: int) -> bytes:
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise ValueError(f"{name}: ends before byte {offset + size}; check it with 'imitate-ds shards verify'")
    return data


def _index(root: Path, values: dict) -> ShardIndex:
    return ShardIndex(
        root=root,
        source=values["source"],
        synthetic=values["synthetic"],
        image_size=values["image_size"],
        build_id=values["build_id"],
        labels=tuple(values["labels"]),
        shards=tuple(_entry(shard) for shard in values["shards"]),
        fingerprint=values.get("fingerprint", ""),
    )


def _entry(values: dict) -> ShardEntry:
    entry = ShardEntry(**{**values, "members": tuple(Member(*member) for member in values["members"])})
    if type(entry.samples) is not int or type(entry.bytes) is not int:
        raise TypeError("samples and bytes are whole numbers")
    return entry


def _why_no_index(root: Path) -> str:
    if not root.is_dir():
        return f"{root}: no such folder; build one with 'imitate-ds shards build'"
    if (root / BUILDING).is_dir():
        return f"{root}: the build is unfinished; run 'imitate-ds shards build' again with the same arguments"
    return f"{root}: no {INDEX}; build one with 'imitate-ds shards build'"


def _check_files(index: ShardIndex) -> None:
    for shard in index.shards:
        path = index.root / shard.name
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: named in {INDEX}, but missing; copy it again, or build in an empty folder"
            )
        if path.stat().st_size != shard.bytes:
            raise ValueError(
                f"{path}: has {path.stat().st_size} bytes, {INDEX} says {shard.bytes}; copy it again, or build in an "
                "empty folder"
            )
