"""What a run file's data section trains on: its folders, opened and checked, and the plan over the samples of their split."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from imitate_ds.config import DataConfig
from imitate_ds.data.shard_index import ShardIndex, open_index
from imitate_ds.data.shard_plan import Folder, ShardPlan, drawn_patients


def open_train_folders(data: DataConfig, *, check_files: bool = True) -> list[ShardIndex]:
    """The indexes of all folders a run reads, local or remote.

    With data.max_skipped > 0 missing and cut tars of the training split are no reason to stop here: their samples are
    skipped and counted. check_files=False asks for no tar at all.
    """
    folder, room = Path(data.cache_dir).expanduser() if data.cache_dir else None, int(data.cache_gib * 2**30)
    unchecked = None if not check_files else (data.train_split,) if data.max_skipped else ()
    folders = [open_index(part.shards, cache=folder, max_bytes=room, unchecked=unchecked) for part in data.shards]
    sizes = {folder.image_size for folder in folders}
    if len(sizes) > 1:
        raise ValueError(f"data.shards: images of {sorted(sizes)} pixels; build all folders with one --image-size")
    return folders


def build_train_plan(
    data: DataConfig, folders: Sequence[ShardIndex], *, seed: int, global_batch_size: int
) -> ShardPlan:
    """The order of the training split, or of a share of it (data.share).

    Samples of one study (or patient: data.apart) never meet in one global batch.
    """
    parts: list[Folder] = []
    for folder, part in zip(folders, data.shards, strict=True):
        sizes = [shard.samples for shard in folder.of_split(data.train_split)]
        parts.append(Folder(sizes, _train_column(folder, data, data.apart), part.weight))
    if data.share < 1:
        parts = _drawn(parts, [_train_column(folder, data, "patient") for folder in folders], data.share, seed)
    return ShardPlan(parts, seed=seed, global_batch_size=global_batch_size)


def _train_column(folder: ShardIndex, data: DataConfig, name: str) -> np.ndarray:
    return np.concatenate([shard.members.column(name) for shard in folder.of_split(data.train_split)])


def _drawn(parts: list[Folder], patients: list[np.ndarray], share: float, seed: int) -> list[Folder]:
    """The folders with a share of the patients: one who is in two of them is drawn in both, or in neither."""
    ends = np.cumsum([len(column) for column in patients])[:-1]
    kept = np.split(drawn_patients(np.concatenate(patients), share, seed), ends)
    for number, rows in enumerate(kept):
        if not rows.any():
            raise ValueError(
                f"data.share = {share}: leaves data.shards[{number}] without a patient; raise it, or leave the folder out"
            )
    return [part.only(rows) for part, rows in zip(parts, kept, strict=True)]
