"""The index of a shard folder: which tars there are, and where in them every sample lies.

A reader needs nothing else: with a member's offset and size a sample is one seek and one read, in any order. The format
is written down in shards/README.md. An index may come from a stranger: nothing in it is trusted before it is checked.
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

from imitate_ds.data.member_table import MEMBERS, Member, MemberTable, map_table
from imitate_ds.data.shard_store import File, ShardStore, open_store
from imitate_ds.data.shard_urls import is_remote

FORMAT = "imitate_ds.shards/2"
INDEX = "index.json"
BUILDING = ".building"  # notes of an unfinished build, inside the shard folder; gone when index.json is written
MAX_MEMBER_BYTES = 64 * 2**20  # of one file in a tar; a stored radiograph has a thousandth of it
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.tar")


@dataclass(frozen=True)
class ShardEntry:
    name: str
    split: str
    samples: int
    bytes: int
    sha256: str
    members: MemberTable = field(repr=False, compare=False)

    @property
    def file(self) -> File:
        return File(self.name, self.bytes, self.sha256)

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
    fingerprint: str = ""  # of what the build was made from
    masks: tuple[str, ...] = ()  # names of the masks that samples have
    boxes: tuple[str, ...] = ()  # labels of their boxes
    store: ShardStore | None = field(
        default=None, repr=False, compare=False
    )  # where missing files come from, if remote

    def fetch(self, file: File) -> Path:
        """Where a file of this folder lies on this machine, once it is there."""
        return self.store.fetch(file) if self.store else self.root / file.name

    def prefetch(self, files: Iterable[File]) -> None:
        """Have files fetched in the background, where they are not here."""
        if self.store:
            self.store.prefetch(files)

    def describe(self, split: str, keys: Sequence[str], patients: Collection[str]) -> dict:
        """What a result file says about samples of a split: enough to tell whether two results are of the same ones."""
        return {
            "source": self.source,
            "synthetic": self.synthetic,
            "build_id": self.build_id,
            "split": split,
            "split_hash": hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:16],
            "samples": len(keys),
            "patients": len(set(patients)),
        }

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


def load_index(root: Path, *, unchecked: Collection[str] | None = ()) -> ShardIndex:
    """Read the index of a shard folder and check that its tars are there, at their full size.

    unchecked: splits whose tars may be missing or cut; None: all.

    Raises FileNotFoundError where there is no folder or no index, ValueError where the build or the copy is unfinished.
    """
    values = _read_values(root)
    index = _index(root, values, _members(root, values))
    if unchecked is not None:
        _check_files(index, unchecked)
    return index


def open_index(
    location: str, *, cache: Path | None = None, max_bytes: int = 100 * 2**30, unchecked: Collection[str] | None = ()
) -> ShardIndex:
    """The index of a shard folder at a path, or at a URL, whose files are then fetched into a cache as they are needed.

    Raises what load_index raises, and OSError where the server cannot be reached.
    """
    if not is_remote(location):
        return load_index(Path(location), unchecked=unchecked)
    store = open_store(location, cache=cache, max_bytes=max_bytes)
    store.fetch(File(INDEX), fresh=True)
    members = _read_values(store.root)["members"]
    store.fetch(File(MEMBERS, members.get("bytes"), members.get("sha256")))
    return replace(load_index(store.root, unchecked=None), store=store)


def load_report(root: Path) -> dict:
    """What the build of a shard folder kept and dropped."""
    load_index(root)
    return json.loads((root / INDEX).read_text(encoding="utf-8"))["report"]


def build_id(shards: tuple[ShardEntry, ...]) -> str:
    """One id for the content of all shards."""
    return hashlib.sha256("".join(f"{shard.name} {shard.sha256}\n" for shard in shards).encode()).hexdigest()


def read_metas(index: ShardIndex, shard: ShardEntry) -> Iterator[tuple[Member, dict]]:
    """The JSON values of every sample of one shard, in order. Raises ValueError where the tar ends before them."""
    with index.fetch(shard.file).open("rb") as file:
        for member in shard.members:
            yield member, json.loads(read_at(file, shard, member.meta_offset, member.meta_size))


def read_samples(index: ShardIndex, split: str) -> Iterator[tuple[Member, bytes, dict]]:
    """Every sample of a split in index order: its member, its JPEG bytes, and its JSON values."""
    for shard in index.of_split(split):
        yield from read_shard(index.root, shard)


def read_shard(root: Path, shard: ShardEntry) -> Iterator[tuple[Member, bytes, dict]]:
    """Every sample of one shard, in order."""
    with (root / shard.name).open("rb") as file:
        for member in shard.members:
            image = read_at(file, shard, member.image_offset, member.image_size)
            yield member, image, json.loads(read_at(file, shard, member.meta_offset, member.meta_size))


def read_at(file: BinaryIO, shard: ShardEntry, offset: int, size: int, crc: int | None = None) -> bytes:
    """A member's bytes from an open tar, compared with their checksum where it is given. Raises ValueError."""
    if size > MAX_MEMBER_BYTES:
        raise ValueError(f"member too large: {size:,} bytes, more than {MAX_MEMBER_BYTES:,}")
    data = os.pread(file.fileno(), size, offset) if offset < shard.bytes else b""
    if len(data) != size:
        raise ValueError(
            f"shard ends too early: {shard.name} before byte {offset + size}; see 'imitate-ds shards verify'"
        )
    if crc is not None and crc32(data) != crc:
        raise ValueError("checksum differs from the index")
    return data


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


def _read_values(root: Path) -> dict:
    path = root / INDEX
    if not path.is_file():
        raise FileNotFoundError(_why_no_index(root))
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not valid JSON; build again with 'imitate-ds shards build'") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{path}: format must be {FORMAT}; build again with 'imitate-ds shards build'")
    try:
        _check_values(values)
    except (KeyError, TypeError):
        raise ValueError(f"{path}: not a complete index; build again with 'imitate-ds shards build'") from None
    return values


def _check_values(values: dict) -> None:
    """Raises KeyError or TypeError for an incomplete index, ValueError for names that could lead out of its folder."""
    for shard in values["shards"]:
        if not isinstance(shard["name"], str) or not SHARD_NAME.fullmatch(shard["name"]):
            raise ValueError(
                f"{INDEX}: a shard is called {shard['name']!r}; a name is letters, digits, '.', '_' and '-', and ends in .tar"
            )
        wrong = [name for name in ("samples", "bytes") if type(shard[name]) is not int or not 0 <= shard[name] < 2**62]
        if wrong or not isinstance(shard["split"], str) or not isinstance(shard["sha256"], str):
            raise TypeError("samples and bytes are whole numbers, split and sha256 texts")
    if len({shard["name"] for shard in values["shards"]}) < len(values["shards"]):
        raise ValueError(f"{INDEX}: names a shard twice; build again with 'imitate-ds shards build'")
    header = {"source": str, "synthetic": bool, "image_size": int, "build_id": str, "labels": list, "members": dict}
    if not all(isinstance(values[name], kind) for name, kind in header.items()):
        raise TypeError("the header is not what it should be")
    if not all(isinstance(name, str) for kind in ("labels", "masks", "boxes") for name in values.get(kind, ())):
        raise TypeError("names of labels, masks and boxes are texts")


def _members(root: Path, values: dict) -> MemberTable:
    path = root / MEMBERS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; copy it again, or build in an empty folder")
    if file_sha256(path) != values["members"].get("sha256"):
        raise ValueError(f"{path}: of another build than {INDEX}; copy both again, or build in an empty folder")
    try:
        return map_table(path, sum(shard["samples"] for shard in values["shards"]))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; build again with 'imitate-ds shards build'") from None


def _index(root: Path, values: dict, members: MemberTable) -> ShardIndex:
    shards: list[ShardEntry] = []
    first = 0
    for shard in values["shards"]:
        rows = members[first : first + shard["samples"]]
        facts = {name: shard[name] for name in ("name", "split", "samples", "bytes", "sha256")}
        shards.append(ShardEntry(**facts, members=rows))
        first += shard["samples"]
    return ShardIndex(
        root=root,
        source=values["source"],
        synthetic=values["synthetic"],
        image_size=values["image_size"],
        build_id=values["build_id"],
        labels=tuple(values["labels"]),
        shards=tuple(shards),
        fingerprint=values.get("fingerprint", ""),
        masks=tuple(values.get("masks", ())),  # older builds do not say
        boxes=tuple(values.get("boxes", ())),
    )


def _why_no_index(root: Path) -> str:
    if not root.is_dir():
        return f"{root}: no such folder; build one with 'imitate-ds shards build'"
    if (root / BUILDING).is_dir():
        return f"{root}: the build is unfinished; run 'imitate-ds shards build' again with the same arguments"
    return f"{root}: no {INDEX}; build one with 'imitate-ds shards build'"


def _check_files(index: ShardIndex, unchecked: Collection[str]) -> None:
    for shard in (shard for shard in index.shards if shard.split not in unchecked):
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
