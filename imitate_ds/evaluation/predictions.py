"""What a model said of every sample, as a Parquet table: keys and hashes, no ids and no text. The only import of pyarrow."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from imitate_ds.data.labeled import Annotations
from imitate_ds.evaluation.task_scores import MOST, detections_of, dice_scores

CORNERS = ("x1", "y1", "x2", "y2")
COUNTS = ("dice", "pixels", "predicted_pixels")


def write_predictions(path: Path, kind: str, known: Annotations, answers: np.ndarray) -> None:
    """One row a sample, in the order of the split: key, patient (a hash), and by kind of task

    classification: label/NAME (1, 0, null where it does not count) and score/NAME; segmentation: dice/NAME, pixels/NAME and
    predicted_pixels/NAME; detection: detections, a list of {label, x1, y1, x2, y2, score} in pixels of the stored square, and
    boxes, what is there, the same without score.
    """
    columns = {"key": pa.array(known.keys), "patient": pa.array(known.patients.tolist())}
    make = {"classification": _labels, "segmentation": _masks, "detection": _boxes}[kind]
    _write(path, pa.table({**columns, **make(known, answers)}))


def join_predictions(path: Path, runs: Mapping[str, Path]) -> None:
    """One table of many, with the name of the run in the first column; a column that a run has not is null there."""
    tables = []
    for name, source in runs.items():
        table = pq.read_table(source)
        tables.append(table.add_column(0, "run", pa.array([name] * table.num_rows)))
    _write(path, pa.concat_tables(tables, promote_options="default") if tables else pa.table({"run": pa.array([])}))


def read_predictions(path: Path, kind: str, targets: tuple[str, ...]) -> tuple[Annotations, np.ndarray]:
    """What is known and what was answered, in the order of the keys: as `measure` takes them. Raises ValueError."""
    table = pq.read_table(path).sort_by("key")
    wanted = {
        "classification": [f"{what}/{name}" for name in targets for what in ("label", "score")],
        "segmentation": [f"{what}/{name}" for name in targets for what in COUNTS],
        "detection": ["detections", "boxes"],
    }[kind]
    if missing := [name for name in ("key", "patient", *wanted) if name not in table.column_names]:
        raise ValueError(
            f"{path}: has no column {missing[0]!r}; a newer version writes it when the run is scored again"
        )
    labels, box_labels = np.zeros((len(table), 0), np.int8), [np.zeros(0, np.int64)] * len(table)
    boxes = [np.zeros((0, 4))] * len(table)
    if kind == "classification":
        labels = np.stack([table[f"label/{name}"].fill_null(-1).to_numpy() for name in targets], axis=1)
        answers = np.stack([table[f"score/{name}"].to_numpy() for name in targets], axis=1)
    elif kind == "segmentation":
        answers = np.stack([_counts(*(table[f"{what}/{name}"] for what in COUNTS)) for name in targets], axis=1)
    else:
        there = _rows(table["boxes"], CORNERS, targets)
        boxes, box_labels = [rows[:, :4] for rows in there], [rows[:, 4].astype(np.int64) for rows in there]
        answers = np.zeros((len(table), MOST, 6))
        for padded, rows in zip(answers, _rows(table["detections"], (*CORNERS, "score"), targets), strict=True):
            padded[: len(rows)] = rows
    known = Annotations(
        targets=targets,
        keys=table["key"].to_pylist(),
        patients=np.array(table["patient"].to_pylist()),
        labels=labels,
        boxes=boxes,
        box_labels=box_labels,
    )
    return known, answers


def _write(path: Path, table: pa.Table) -> None:
    beside = path.with_name(f".{path.name}")
    pq.write_table(table, beside)
    beside.replace(path)


def _labels(known: Annotations, scores: np.ndarray) -> dict[str, pa.Array]:
    columns = {}
    for i, name in enumerate(known.targets):
        labels = known.labels[:, i]
        columns[f"label/{name}"] = pa.array(labels, mask=labels < 0)
        columns[f"score/{name}"] = pa.array(scores[:, i])
    return columns


def _masks(known: Annotations, counts: np.ndarray) -> dict[str, pa.Array]:
    dice, columns = dice_scores(counts), {}
    for i, name in enumerate(known.targets):
        unknown = np.isnan(dice[:, i])
        for title, values in (("dice", dice[:, i]), ("pixels", counts[:, i, 2]), ("predicted_pixels", counts[:, i, 1])):
            columns[f"{title}/{name}"] = pa.array(values, mask=unknown)
    return columns


def _boxes(known: Annotations, answers: np.ndarray) -> dict[str, pa.Array]:
    there = [np.c_[boxes, labels] for boxes, labels in zip(known.boxes, known.box_labels, strict=True)]
    said = _lists(detections_of(answers), (*CORNERS, "score"), known.targets)
    return {"detections": said, "boxes": _lists(there, CORNERS, known.targets)}


def _lists(images: list[np.ndarray], names: tuple[str, ...], targets: tuple[str, ...]) -> pa.Array:
    """Of each image rows of numbers, the last of which is the place of the label among the targets."""
    rows = [
        [{"label": targets[int(row[-1])], **dict(zip(names, row[:-1], strict=True))} for row in image.tolist()]
        for image in images
    ]
    return pa.array(rows, type=pa.list_(pa.struct([("label", pa.string()), *((name, pa.float64()) for name in names)])))


def _rows(column: pa.ChunkedArray, names: tuple[str, ...], targets: tuple[str, ...]) -> list[np.ndarray]:
    """The same back."""
    lists = column.combine_chunks()
    each, ends = lists.flatten(), np.cumsum(lists.value_lengths().to_numpy())
    labels = np.array([targets.index(label) for label in each.field("label").to_pylist()], dtype=np.float64)
    rows = np.stack([*(each.field(name).to_numpy() for name in names), labels], axis=1)
    return np.split(rows, ends[:-1])


def _counts(dice: pa.ChunkedArray, true: pa.ChunkedArray, said: pa.ChunkedArray) -> np.ndarray:
    """[n, 3]: pixels in both, predicted, true; NaN where nobody has drawn the mask."""
    score, there, predicted = (column.to_numpy() for column in (dice, true, said))
    return np.stack([np.round(score * (there + predicted) / 2), predicted, there], axis=1)
