"""What every evaluation starts from and ends with: a model, a split it was not trained on, and a result written down."""

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch

from imitate_ds.data.shard_index import ShardIndex, file_sha256, load_index
from imitate_ds.evaluation.embedded import SplitRecords, embed_radiographs, read_split
from imitate_ds.evaluation.report import open_out, write_result
from imitate_ds.export_folder import WEIGHTS
from imitate_ds.hub import ImageEmbeddings, PretrainedImitate, load_model
from imitate_ds.metrics import DRAWS, SEED, Figures

Protocol = Literal["strict", "reference"]


class Task(NamedTuple):
    """What every task starts from."""

    model: PretrainedImitate
    records: SplitRecords
    images: ImageEmbeddings


def open_task(model: Path, shards: Path, out: Path, split: str, protocol: str) -> Task:
    return embed_task(*open_split(model, shards, out, split, protocol))


def embed_task(model: PretrainedImitate, records: SplitRecords) -> Task:
    return Task(model, records, embed_radiographs(model, records, workers=worker_count()))


def open_split(
    model: Path, shards: Path, out: Path, split: str, protocol: str
) -> tuple[PretrainedImitate, SplitRecords]:
    if protocol not in get_args(Protocol):
        raise ValueError(f"protocol = {protocol!r}: must be 'strict' or 'reference'")
    open_out(Path(out))
    pretrained = load_model(model, "cuda" if torch.cuda.is_available() else "cpu")
    index = load_index(Path(shards))
    if protocol == "strict":
        _refuse_training_split(pretrained, index, split)
    return pretrained, read_split(index, split)


def _refuse_training_split(model: PretrainedImitate, index: ShardIndex, split: str) -> None:
    """Older exports do not say what they were trained on, and pass. One trained on several folders names them all."""
    trained_on = (model.settings.get("build_id") or "").split()
    if index.build_id in trained_on and model.settings.get("train_split") == split:
        raise ValueError(
            f"split = {split!r}: {model.folder} was trained on it; name another split, or ask for --protocol reference"
        )


def worker_count() -> int:
    return min(8, os.cpu_count() or 1)


def require_labels(records: SplitRecords) -> None:
    known = (records.labels == 0) | (records.labels == 1)
    if not known.any():
        raise ValueError(
            f"shards = '{records.index.root}': no labels in split {records.split!r}; build them from a source with labels "
            "(the table source takes label columns), or evaluate retrieval, which needs none"
        )


def write_task(
    name: str,
    out: Path,
    protocol: str,
    model: PretrainedImitate,
    records: SplitRecords,
    metrics: Figures,
    settings: dict[str, Any],
    curves: dict[str, Any],
) -> dict[str, Any]:
    bootstrap = {"draws": DRAWS, "seed": SEED, "unit": "patient", "interval": "95 % percentile"}
    result = {
        "task": name,
        "protocol": protocol,
        "model": {
            "path": str(model.folder),
            "weights_sha256": file_sha256(model.folder / WEIGHTS)[:16],
            "preset": model.settings["preset"],
            "image_encoder": model.settings["model"]["image_encoder"],
            "impression_text": model.settings["impression_text"],
            "trained_on": model.settings["data"],
            "synthetic": model.settings["synthetic"],
        },
        "data": records.describe(),
        "settings": {**settings, "bootstrap": bootstrap},
        "metrics": metrics,
        "curves": curves,
    }
    write_result(Path(out), result)
    return result
