"""Tensors in safetensors files, of which any run of elements can be read back: what makes a checkpoint fit any number of ranks.

A file holds flat pieces, named KIND/PARAMETER@START: elements from START on of one parameter's weights or moments; what is not
cut up is named whole/NAME. The pieces of all files together are everything.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from imitate_ds.training.checkpoint_files import WrittenFile, sha256_of, sync

WHOLE = "whole"


def piece_name(kind: str, name: str, start: int) -> str:
    return f"{kind}/{name}@{start}"


def whole_name(name: str) -> str:
    return f"{WHOLE}/{name}"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> WrittenFile:
    """Write CPU tensors to the disk. Raises OSError where that cannot be done."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(f"{path.name}: {error}") from None
    path.chmod(0o666 & ~_umask())  # safetensors writes files that only their owner reads, whatever the umask says
    sync(path)
    return WrittenFile(path.name, path.stat().st_size, sha256_of(path))


class _Piece(NamedTuple):
    start: int
    numel: int
    file: Any  # an open file of safetensors
    name: str


class TensorFiles:
    """The tensors of all files of a checkpoint, mapped; use it in a `with`."""

    def __init__(self, paths: Sequence[Path]):
        self._open = ExitStack()
        self._pieces: dict[tuple[str, str], list[_Piece]] = {}
        for path in paths:
            file = self._open.enter_context(safe_open(path, "pt"))
            for key in file.keys():  # noqa: SIM118  # no mapping
                kind, _, rest = key.partition("/")
                name, _, start = (rest, "", "0") if kind == WHOLE else rest.rpartition("@")
                numel = 0 if kind == WHOLE else file.get_slice(key).get_shape()[0]
                self._pieces.setdefault((kind, name), []).append(_Piece(int(start), numel, file, key))
        for pieces in self._pieces.values():
            pieces.sort(key=lambda piece: piece.start)

    def __enter__(self) -> "TensorFiles":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def names(self, kind: str) -> set[str]:
        return {name for of, name in self._pieces if of == kind}

    def whole(self, name: str) -> Tensor:
        (piece,) = self._pieces[WHOLE, name]
        return piece.file.get_tensor(piece.name)

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements start .. start + numel - 1 of a cut-up tensor. Raises ValueError where the files do not hold them all."""
        parts, place = [], start
        for piece in self._pieces.get((kind, name), []):
            first, stop = max(place, piece.start), min(start + numel, piece.start + piece.numel)
            if first < stop and first == place:
                parts.append(piece.file.get_slice(piece.name)[first - piece.start : stop - piece.start])
                place = stop
        if place != start + numel:
            raise ValueError(f"{kind} of {name}: elements {place} to {start + numel - 1} are in none of its files")
        return torch.cat(parts) if len(parts) != 1 else parts[0]


def _umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current
