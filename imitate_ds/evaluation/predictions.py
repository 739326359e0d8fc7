"""What a model said of every sample, as a Parquet table: keys and hashes, no ids and no text. The only import of pyarrow."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from imitate_ds.data.labeled import LabeledSplit
from imitate_ds.evaluation.task_scores import dice_scores

BOX = ("x1", "y1", "x2", "y2", "score")


def write_predictions(path: Path, kind: str, split: LabeledSplit, answers: np.ndarray) -> None:
    """One row a sample, in the order of the split: key, patient (a hash), and by kind of task

    classification: label/NAME (1, 0, null where it does not count) and score/NAME; segmentation: dice/NAME, pixels/NAME and
    predicted_pixels/NAME; detection: detections, a list of {label, x1, y1, x2, y2, score} in pixels of the stored square.
    """
    columns = {"key": pa.array(split.keys), "patient": pa.array(split.patients.tolist())}
    make = {"classification": _labels, "segmentation": _masks, "detection": _boxes}[kind]
    _write(path, pa.table({**columns, **make(split, answers)}))


def join_predictions(path: Path, runs: Mapping[str, Path]) -> None:
    """One table of many, with the name of the run in the first column; a column that a run has not is null there."""
    tables = []
    for name, source in runs.items():
        table = pq.read_table(source)
        tables.append(table.add_column(0, "run", pa.array([name] * table.num_rows)))
    _write(path, pa.concat_tables(tables, promote_options="default") if tables else pa.table({"run": pa.array([])}))


def _write(path: Path, table: pa.Table) -> None:
    beside = path.with_name(f".{path.name}")
    pq.write_table(table, beside)
    beside.replace(path)


def _labels(split: LabeledSplit, scores: np.ndarray) -> dict[str, pa.Array]:
    columns = {}
    for i, name in enumerate(split.targets):
        labels = split.labels[:, i]
        columns[f"label/{name}"] = pa.array(labels, mask=labels < 0)
        columns[f"score/{name}"] = pa.array(scores[:, i])
    return columns


def _masks(split: LabeledSplit, counts: np.ndarray) -> dict[str, pa.Array]:
    dice, columns = dice_scores(counts), {}
    for i, name in enumerate(split.masks):
        unknown = np.isnan(dice[:, i])
        for title, values in (("dice", dice[:, i]), ("pixels", counts[:, i, 2]), ("predicted_pixels", counts[:, i, 1])):
            columns[f"{title}/{name}"] = pa.array(values, mask=unknown)
    return columns


def _boxes(split: LabeledSplit, answers: np.ndarray) -> dict[str, pa.Array]:
    rows = [
        [
            {"label": split.targets[int(row[5])], **dict(zip(BOX, row[:5].tolist(), strict=True))}
            for row in found[found[:, 4] > 0]
        ]
        for found in answers
    ]
    kind = pa.list_(pa.struct([("label", pa.string()), *((name, pa.float64()) for name in BOX)]))
    return {"detections": pa.array(rows, type=kind)}
