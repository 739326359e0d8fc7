"""Where every sample lies, as columns of one memory-mapped file: members.npy, beside index.json.

A million samples take 72 MB of page cache that all processes of a machine share, and a reader touches the rows it needs.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np

MEMBERS = "members.npy"


class Member(NamedTuple):
    """One sample: its key, hashes that group samples by study and by patient, and the bytes of its two files."""

    key: str  # 16 hex characters
    study: str  # 12 hex characters
    patient: str
    image_offset: int
    image_size: int
    image_crc: int  # zlib.crc32 of the file
    meta_offset: int
    meta_size: int
    meta_crc: int


HEX_DIGITS = {"key": 16, "study": 12, "patient": 12}


class MemberTable(Sequence[Member]):
    """The members of one or more shards, in order: uint64 [9, n], a row per field of Member."""

    def __init__(self, columns: np.ndarray):
        self._columns = columns

    def __len__(self) -> int:
        return self._columns.shape[1]

    def __iter__(self) -> Iterator[Member]:
        return (self[row] for row in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Member: ...
    @overload
    def __getitem__(self, index: slice) -> "MemberTable": ...
    def __getitem__(self, index: int | slice) -> "Member | MemberTable":
        if isinstance(index, slice):
            return MemberTable(self._columns[:, index])
        values = self._columns[:, index].tolist()
        key, study, patient = (
            f"{value:0{digits}x}" for value, digits in zip(values, HEX_DIGITS.values(), strict=False)
        )
        return Member(key, study, patient, *values[3:])

    def image(self, row: int) -> tuple[str, int, int, int]:
        """Key, offset, size and CRC-32 of one radiograph: what a reader needs of a member, sooner."""
        values = self._columns[:, row].tolist()
        return f"{values[0]:016x}", *values[3:6]

    def column(self, name: str) -> np.ndarray:
        """One field of all members, uint64 [n]; key, study and patient as the numbers that their hex digits write."""
        return self._columns[Member._fields.index(name)]


def table_of(members: Sequence[Member]) -> MemberTable:
    rows = [[int(m.key, 16), int(m.study, 16), int(m.patient, 16), *m[3:]] for m in members]
    return MemberTable(np.array(rows, dtype=np.uint64).reshape(-1, len(Member._fields)).T)


def table_bytes(tables: Sequence[MemberTable]) -> bytes:
    """The file that holds tables one after another."""
    buffer = io.BytesIO()
    columns = [table._columns for table in tables]
    np.save(buffer, np.ascontiguousarray(np.concatenate(columns, axis=1)), allow_pickle=False)
    return buffer.getvalue()


def map_table(path: Path, rows: int) -> MemberTable:
    """Map a file of so many members. Raises ValueError where it is something else."""
    try:
        columns = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError):
        raise ValueError("not a table of members") from None
    if not isinstance(columns, np.ndarray):
        raise ValueError("not a table of members")
    if columns.dtype != np.uint64 or columns.shape != (len(Member._fields), rows):
        raise ValueError(f"{columns.dtype} {list(columns.shape)}, not uint64 [{len(Member._fields)}, {rows}]")
    return MemberTable(columns)
