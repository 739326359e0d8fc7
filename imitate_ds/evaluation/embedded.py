"""One split of a shard folder as a trained model sees it: embeddings of every sample, who it is of, what is known of it.

Texts are read to tell which ones are duplicates, and go no further than this module: outside they are group numbers.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from imitate_ds.batch import is_missing
from imitate_ds.data.loader import build_eval_loader
from imitate_ds.data.reports import plain_words
from imitate_ds.data.shard_index import ShardIndex, read_metas
from imitate_ds.data.text_cache import load_text_cache, text_info
from imitate_ds.hub import ImageEmbeddings, PretrainedImitate

Text = Literal["findings", "impression", "report"]
UNKNOWN = -1


@dataclass(frozen=True)
class SplitRecords:
    """What the shards say about the n samples of a split, in index order."""

    index: ShardIndex
    split: str
    keys: list[str]
    patients: np.ndarray  # [n], hashes
    labels: np.ndarray  # int8 [n, L] in the order of index.labels: 1, 0, or -1 (uncertain, or not given)
    findings: list[str]
    impression: list[str]

    def texts(self, name: Text) -> list[str]:
        """One section of each report, or both in one text; "" where absent."""
        if name != "report":
            return self.findings if name == "findings" else self.impression
        pairs = zip(self.findings, self.impression, strict=True)
        return [" ".join(text for text in pair if text) for pair in pairs]

    def has(self, name: Literal["findings", "impression"]) -> np.ndarray:
        return np.array([bool(text) for text in self.texts(name)], dtype=bool)

    def with_labels(self, names: Sequence[str]) -> "SplitRecords":
        """The same samples with some of the labels only. Raises ValueError naming the nearest where there is no such label."""
        for name in names:
            if name not in self.index.labels:
                near = difflib.get_close_matches(name, self.index.labels, n=1, cutoff=0.4)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise ValueError(
                    f"{self.index.root}: has no label {name!r}{hint}; it has: {', '.join(self.index.labels) or 'none'}"
                )
        columns = [self.index.labels.index(name) for name in names]
        return replace(self, index=replace(self.index, labels=tuple(names)), labels=self.labels[:, columns])

    def with_values(self, labels: np.ndarray) -> "SplitRecords":
        """The same samples with other values [n, L] of the same labels."""
        return replace(self, labels=labels)

    def describe(self) -> dict:
        """For a result file (ShardIndex.describe)."""
        return self.index.describe(self.split, self.keys, self.patients.tolist())


class TextEmbeddings(NamedTuple):
    """Unit rows [n, D] per kind of text; rows of missing text mean nothing."""

    findings: Tensor
    impression: Tensor
    report: Tensor


def read_split(index: ShardIndex, split: str) -> SplitRecords:
    """Read ids, labels and texts of a split; no pixels. Raises ValueError naming the splits there are."""
    keys, patients, labels = [], [], []
    findings, impression = [], []
    for shard in index.of_split(split):
        for member, meta in read_metas(index, shard):
            keys.append(member.key)
            patients.append(member.patient)
            labels.append([meta["labels"].get(name, UNKNOWN) for name in index.labels])
            findings.append("" if is_missing(meta["findings"]) else meta["findings"])
            impression.append("" if is_missing(meta["impression"]) else meta["impression"])
    table = np.array(labels, dtype=np.int8).reshape(len(keys), len(index.labels))
    return SplitRecords(index, split, keys, np.array(patients), table, findings, impression)


def embed_radiographs(model: PretrainedImitate, records: SplitRecords, workers: int = 2) -> ImageEmbeddings:
    """Embeddings of every radiograph of a split, in index order. Raises ValueError if one is missing or not finite."""
    loader = build_eval_loader(
        records.index,
        records.split,
        input_size=model.input_size,
        batch_size=64,
        workers=workers,
        with_text=False,
    )
    keys: list[str] = []
    parts: list[ImageEmbeddings] = []
    for batch in loader:
        keys += batch.keys
        parts.append(model.embed_images(batch.images[:, 0]))
    place = {key: row for row, key in reversed(list(enumerate(keys)))}
    lost = [key for key in records.keys if key not in place]
    if lost:
        raise ValueError(
            f"{records.index.root}: {len(lost)} radiographs of split {records.split!r} cannot be read, the first is "
            f"{lost[0]}; check with 'imitate-ds shards verify'"
        )
    order = torch.tensor([place[key] for key in records.keys])
    whole = [None if rows[0] is None else torch.cat(rows)[order] for rows in zip(*parts, strict=True)]
    if not all(bool(rows.isfinite().all()) for rows in whole if rows is not None):
        raise ValueError(f"{model.folder}: gives embeddings that are not finite; the run has diverged, train again")
    return ImageEmbeddings(*whole)  # type: ignore[arg-type]


def embed_reports(model: PretrainedImitate, records: SplitRecords) -> TextEmbeddings:
    """Projected text embeddings of a split, from the cache beside the shards where it is of the model's text encoder."""
    frozen = _cached(records) if _cache_fits(model, records.index) else _encoded(model, records)
    return TextEmbeddings(*(model.project_text(rows) for rows in frozen))


def duplicate_groups(texts: list[str]) -> np.ndarray:
    """Group numbers int64 [n]: equal where texts are equal but for case, punctuation and blanks."""
    plain = [plain_words(text) for text in texts]
    return np.unique(np.array(plain), return_inverse=True)[1].astype(np.int64)


def _cache_fits(model: PretrainedImitate, index: ShardIndex) -> bool:
    try:
        return text_info(index)["encoder"] == model.text_encoder.fingerprint
    except FileNotFoundError:  # never embedded
        return False


def _cached(records: SplitRecords) -> list[Tensor]:
    caches = [load_text_cache(records.index.root, shard) for shard in records.index.of_split(records.split)]
    return [torch.cat([getattr(cache, name) for cache in caches]).float() for name in TextEmbeddings._fields]


def _encoded(model: PretrainedImitate, records: SplitRecords) -> list[Tensor]:
    return [model.text_encoder.encode(records.texts(name)) for name in ("findings", "impression", "report")]
