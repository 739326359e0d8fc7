"""Frozen text embeddings beside each shard: the text encoder never runs during training.

The encoder is frozen in this method, so that embedding every section once is exact (method: IMITATE, 2023). A file
holds the rows of one tar in the order of its members, and says which encoder and which tar it belongs to.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from imitate_ds.batch import is_missing
from imitate_ds.data.progress import shown
from imitate_ds.data.shard_index import (
    ShardEntry,
    ShardIndex,
    file_sha256,
    load_index,
    read_samples,
    read_shard,
    write_atomic,
)
from imitate_ds.data.shard_store import File

FORMAT = "imitate_ds.text/2"
SIDECAR = "imitate_ds.text/1"  # of one shard's file
TEXT_INDEX = "text.json"
ENCODER_FOLDER = "text_encoder"
ENCODER_FILE = "imitate_text_encoder.json"  # in that folder, as models.text_encoder writes it
INFO = {"kind": str, "encoder": str, "width": int, "build_id": str, "files": dict}  # what text.json holds
AGAIN = "run 'imitate-ds shards embed'"


class Encoder(Protocol):
    """What embed_shards asks of a text encoder (models.text_encoder has them)."""

    @property
    def kind(self) -> str: ...

    @property
    def width(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, texts: Sequence[str], batch_size: int = 64) -> Tensor: ...

    def save(self, folder: Path) -> None: ...


class TextCache(NamedTuple):
    """Embeddings of one shard's samples, n rows in the order of its members; rows of missing text are zero."""

    findings: Tensor  # float16 [n, E]
    impression: Tensor  # float16 [n, E]
    report: Tensor  # float16 [n, E], both sections in one text
    has_findings: Tensor  # bool [n]
    has_impression: Tensor  # bool [n]


def fit_texts(root: Path) -> list[str]:
    """Every section of the training reports, each study's once: what a text encoder may be fitted on."""
    index = load_index(root)
    texts = {member.study: (meta["findings"], meta["impression"]) for member, _, meta in read_samples(index, "train")}
    return [text for sections in texts.values() for text in sections if not is_missing(text)]


def embed_shards(root: Path, encoder: Encoder, batch_size: int = 64, *, progress: bool = True) -> dict:
    """Embed the reports of every shard, replacing what another encoder left, and return what text.json says."""
    index = load_index(root)
    (root / TEXT_INDEX).unlink(missing_ok=True)  # first, so that a killed run is seen as not embedded
    for stale in root.glob(".*.text.safetensors.*.tmp"):
        stale.unlink()
    for shard in shown(index.shards, len(index.shards), "embedding reports", progress):
        _embed_shard(index, shard, encoder, batch_size)
    _save_encoder(encoder, root / ENCODER_FOLDER)
    values = {"format": FORMAT, "kind": encoder.kind, "encoder": encoder.fingerprint, "width": encoder.width}
    values |= {"build_id": index.build_id, "synthetic": index.synthetic, "files": _files(root)}
    write_atomic(root / TEXT_INDEX, json.dumps(values).encode())
    return values


def load_text_cache(root: Path, shard: ShardEntry, info: dict | None = None, *, verify: bool = False) -> TextCache:
    """The embeddings of one shard, mapped from their file; info: what text.json says, where it is known.

    verify compares the file with its checksum. Raises FileNotFoundError where there are none, ValueError where they are
    damaged, or of another encoder or build.
    """
    info = info or _read_info(root)
    path = root / shard.text_name
    if not path.is_file():
        raise FileNotFoundError(f"no text embeddings: {path}; {AGAIN}")
    if verify and file_sha256(path) != sidecar_file(info, shard).sha256:
        raise ValueError(
            f"text embeddings differ from their checksum in {TEXT_INDEX}: {path}; copy it again, or {AGAIN}"
        )
    metadata, cache = _read_sidecar(path)
    if metadata.get("format") != SIDECAR or metadata.get("shard_sha256") != shard.sha256:
        raise ValueError(f"text embeddings of another build of the shards: {path}; {AGAIN}")
    if metadata.get("encoder") != info["encoder"]:
        raise ValueError(f"text embeddings of another encoder than {TEXT_INDEX} names: {path}; {AGAIN}")
    if [tensor.dtype for tensor in cache] != 3 * [torch.float16] + 2 * [torch.bool]:
        raise ValueError(f"text embeddings of another type than float16: {path}; {AGAIN}")
    shapes = [tuple(tensor.shape) for tensor in cache]
    if shapes != 3 * [(shard.samples, info["width"])] + 2 * [(shard.samples,)]:
        raise ValueError(
            f"text embeddings of another shape: {path}: {shapes}, not {shard.samples} x {info['width']}; {AGAIN}"
        )
    return cache


def sections_of(meta: Mapping[str, Any]) -> dict[str, str]:
    """Findings, impression, and both in one text as `report`, of the JSON values of a sample; "" where absent."""
    findings, impression = (_clean(meta[name]) for name in ("findings", "impression"))
    report = " ".join(text for text in (findings, impression) if text)
    return {"findings": findings, "impression": impression, "report": report}


def text_info(index: ShardIndex, *, fresh: bool = True) -> dict:
    """What text.json says: kind and fingerprint of the encoder, its width, the build it embedded, and the files.

    fresh=False is content with what was fetched of a remote folder before. Raises FileNotFoundError where nothing was
    embedded, ValueError where it was another build than the index names.
    """
    if index.store:
        index.store.fetch(File(TEXT_INDEX), fresh=fresh)
    values = _read_info(index.root)
    if values["build_id"] != index.build_id:
        raise ValueError(f"{index.root / TEXT_INDEX}: embeddings of another build of the shards; {AGAIN}")
    return values


def sidecar_file(info: dict, shard: ShardEntry) -> File:
    """The file with the embeddings of a shard, as text.json names it."""
    return File(shard.text_name, *info["files"].get(shard.text_name, (None, None)))


def fetch_encoder(index: ShardIndex) -> Path:
    """The folder of the text encoder, on this machine."""
    for name, facts in text_info(index)["files"].items():
        if name.startswith(f"{ENCODER_FOLDER}/"):
            index.fetch(File(name, *facts))
    return index.root / ENCODER_FOLDER


def verify_text(root: Path, index: ShardIndex) -> list[str]:
    """One line per problem of the embeddings; an empty list where all is well, or where nothing was embedded yet."""
    sidecars = [shard.text_name for shard in index.shards if (root / shard.text_name).is_file()]
    if not (root / TEXT_INDEX).is_file():
        unfinished = f"{root}: {len(sidecars)} text sidecars, but no {TEXT_INDEX}: unfinished; {AGAIN}"
        return [unfinished] if sidecars else []
    try:
        info = text_info(index)
    except ValueError as error:
        return [str(error)]
    problems = []
    if _saved_fingerprint(root / ENCODER_FOLDER) != info["encoder"]:
        problems.append(f"{root / ENCODER_FOLDER}: missing, or another encoder than {TEXT_INDEX} names; {AGAIN}")
    for shard in index.shards:
        try:
            load_text_cache(root, shard, info, verify=True)
        except (ValueError, FileNotFoundError) as error:
            problems.append(str(error))
    return problems


def _read_info(root: Path) -> dict:
    path = root / TEXT_INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{root}: no {TEXT_INDEX}, so no text embeddings; {AGAIN}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not valid JSON; {AGAIN}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{path}: format must be {FORMAT}; {AGAIN}")
    if wrong := [name for name, kind in INFO.items() if not isinstance(values.get(name), kind)]:
        raise ValueError(f"{path}: lacks {', '.join(wrong)}; {AGAIN}")
    if not all(
        isinstance(facts, list) and [type(fact) for fact in facts] == [int, str] for facts in values["files"].values()
    ):
        raise ValueError(f"{path}: files must be name: [bytes, sha256]; {AGAIN}")
    return values


def _read_sidecar(path: Path) -> tuple[dict[str, str], TextCache]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in TextCache._fields}
            metadata = file.metadata() or {}
    except SafetensorError:
        raise ValueError(f"damaged text embeddings: {path}; {AGAIN}") from None
    has = {name: tensors[name].bool() for name in ("has_findings", "has_impression")}
    return metadata, TextCache(**{**tensors, **has})


def _saved_fingerprint(folder: Path) -> str | None:
    try:
        return json.loads((folder / ENCODER_FILE).read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _embed_shard(index: ShardIndex, shard: ShardEntry, encoder: Encoder, batch_size: int) -> None:
    metas = [meta for _, _, meta in read_shard(index.root, shard)]
    reports = [sections_of(meta) for meta in metas]
    sections = {name: [report[name] for report in reports] for name in ("findings", "impression", "report")}
    rows = _embed(encoder, [text for texts in sections.values() for text in texts], batch_size)
    tensors = dict(zip(sections, rows.split(len(metas)), strict=True))
    for name in ("findings", "impression"):
        tensors[f"has_{name}"] = torch.tensor([bool(text) for text in sections[name]])
    metadata = {"format": SIDECAR, "encoder": encoder.fingerprint, "shard_sha256": shard.sha256}
    metadata["synthetic"] = str(index.synthetic).lower()
    data = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    write_atomic(index.root / shard.text_name, data)


def _files(root: Path) -> dict[str, tuple[int, str]]:
    """Bytes and SHA-256 of all that was written: what a copy, or a remote reader, is checked against."""
    written = [
        *root.glob("*.text.safetensors"),
        *(path for path in (root / ENCODER_FOLDER).rglob("*") if path.is_file()),
    ]
    return {str(path.relative_to(root)): (path.stat().st_size, file_sha256(path)) for path in sorted(written)}


def _save_encoder(encoder: Encoder, folder: Path) -> None:
    """Replace the encoder that was there, which may be this very one with its weights still mapped from the files."""
    scratch = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    encoder.save(scratch)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


def _embed(encoder: Encoder, texts: list[str], batch_size: int) -> Tensor:
    """float16 [n, E]. Many reports read alike: each distinct text is encoded once."""
    distinct = list(dict.fromkeys(texts))
    place = {text: row for row, text in enumerate(distinct)}
    rows = encoder.encode(distinct, batch_size=batch_size).half()
    if not bool(rows.isfinite().all()):
        raise ValueError("the text encoder gave numbers that float16 cannot hold (NaN or above 65504)")
    return rows[[place[text] for text in texts]]


def _clean(text: object) -> str:
    return "" if is_missing(text) else str(text)
