"""Any CSV of images, with reports or annotations, as a source."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from imitate_ds.batch import is_missing
from imitate_ds.data.radiographs import load_radiograph
from imitate_ds.data.reports import parse_report
from imitate_ds.data.sources.annotations import Box, one_hot, read_mask
from imitate_ds.data.sources.base import RadiographRef, Study
from imitate_ds.data.sources.rows import (
    Row,
    check_patient_splits,
    check_patients,
    parse_split,
    parse_view,
    read_labels,
    read_rows,
    require_columns,
    section_text,
    shown_columns,
    split_by_hash,
)
from imitate_ds.data.sources.table_annotations import (
    MASK_PREFIX,
    class_values,
    columns_of,
    mask_columns,
    parse_boxes,
    read_box_file,
)

ROLES = (
    *("image", "patient", "study", "findings", "impression", "report", "view", "split"),
    *("labels", "class", "masks", "boxes"),
)
TEXT_ROLES = ("findings", "impression", "report")
# Roles that take a list of columns, or the prefix of their names, which is this unless told otherwise
LIST_ROLES = {"labels": "label_", "masks": MASK_PREFIX}


class TableSource:
    """One row per image of any CSV or TSV; rows with the same patient and study are one study.

    root is the file, or a folder that holds one; paths in it start from the folder of the file. columns names, by role,
    the columns that are not called as the role is: image, patient (both needed), study (else every row is its own),
    findings, impression, report (the whole text, from which the sections that have no column are parsed), view (else all
    are frontal) and split (else drawn by patient).

    Annotations: labels (1, 0, -1 or blank), class (its values become labels, one of them 1), masks (paths of images of the
    radiograph's size: grey levels above 191 are inside, up to 63 outside, between nobody says) and boxes (JSON). labels and
    masks are lists of columns, or the prefix of their names; without them that is "label_" and "mask_". The option boxes
    names another CSV, of file, class, x1, y1, x2, y2, file as in the column of images. A blank cell, or an image that is not
    in that CSV, is not annotated. A table of annotations needs no text.
    """

    name = "table"
    synthetic = False

    def __init__(
        self,
        root: str | Path,
        columns: Mapping[str, str | Sequence[str]] | None = None,
        *,
        style: str = "tolerant",
        boxes: str | None = None,
    ):
        self._path = _table_file(Path(root))
        self._style = style
        rows = list(read_rows(self._path))
        if not rows:
            raise ValueError(f"{self._path}: no rows")
        header = list(rows[0])
        lists, single = _split_roles(dict(columns or {}))
        self._columns = _resolve_columns(self._path, header, single)
        self._labels = columns_of(self._path, header, lists["labels"])
        self._masks = mask_columns(self._path, header, lists["masks"])
        self._classes = class_values(rows, self._columns["class"], self._path) if "class" in self._columns else []
        self._boxes = self._read_box_file(boxes, rows)
        self.has_reports = any(role in self._columns for role in TEXT_ROLES)
        self._check_content(header)
        check_patients((self._cell(row, "patient") for row in rows), self._columns["patient"], self._path)
        if "split" in self._columns:
            pairs = ((self._cell(row, "patient"), self._split(self._cell(row, "patient"), row)) for row in rows)
            check_patient_splits(pairs, self._path)
        self._studies: dict[tuple[str, str], list[Row]] = defaultdict(list)
        for row in rows:
            self._studies[self._cell(row, "patient"), self._study_id(row)].append(row)

    def __len__(self) -> int:
        return len(self._studies)

    def __iter__(self) -> Iterator[Study]:
        for (patient_id, study_id), rows in self._studies.items():
            findings, impression = self._sections(rows)
            yield Study(
                patient_id=patient_id,
                study_id=study_id,
                split=self._split(patient_id, rows[0]),
                findings=findings,
                impression=impression,
                radiographs=tuple(self._radiograph(row) for row in rows),
                labels={name: value for row in rows for name, value in self._row_labels(row).items()},
                **self._drawn(rows),
            )

    def _cell(self, row: Row, role: str) -> str:
        return row[self._columns[role]].strip() if role in self._columns else ""

    def _study_id(self, row: Row) -> str:
        """Names such as study1 come back with every patient, so the patient is part of the id."""
        return f"{self._cell(row, 'patient')}/{self._cell(row, 'study') or self._cell(row, 'image')}"

    def _split(self, patient_id: str, row: Row) -> str:
        column = self._columns.get("split")
        return parse_split(row, column, self._path) if column else split_by_hash(patient_id)

    def _sections(self, rows: list[Row]) -> tuple[str, str]:
        """The first of each section that any row of the study has."""
        cells = {
            role: next((t for row in rows if (t := section_text(self._cell(row, role)))), "") for role in TEXT_ROLES
        }
        parsed = parse_report(cells["report"], self._style)
        return cells["findings"] or parsed.findings, cells["impression"] or parsed.impression

    def _radiograph(self, row: Row) -> RadiographRef:
        image = self._cell(row, "image")
        return RadiographRef(image, self._view(row), partial(load_radiograph, self._path.parent / image))

    def _view(self, row: Row) -> str:
        return parse_view(self._cell(row, "view")) if "view" in self._columns else "frontal"

    def _row_labels(self, row: Row) -> dict[str, int]:
        labels = {self._labels[name]: value for name, value in read_labels(row, self._labels, self._path).items()}
        named = self._cell(row, "class")
        return labels if is_missing(named) else labels | one_hot(named, self._classes)

    def _drawn(self, rows: list[Row]) -> dict:
        """Masks and boxes of a study: those of its one frontal row, for a sample has the annotations of its study."""
        frontal = [row for row in rows if self._view(row) == "frontal"]
        drawn = [(row, self._row_masks(row), self._row_boxes(row)) for row in frontal]
        found = [(row, masks, boxes) for row, masks, boxes in drawn if masks or boxes is not None]
        if found and len(frontal) > 1:
            rule = "a study with masks or boxes must have one frontal image; name no study column, and every row is one"
            raise ValueError(
                f"{self._path}, line {found[0][0].line}: one of {len(frontal)} frontal images of its study: {rule}"
            )
        _, masks, boxes = found[0] if found else (None, {}, None)
        return {"masks": masks, "extra": {} if boxes is None else {"boxes": boxes}}

    def _row_masks(self, row: Row) -> dict[str, partial]:
        files = {name: row[column].strip() for column, name in self._masks.items()}
        return {
            name: partial(read_mask, self._path.parent / file) for name, file in files.items() if not is_missing(file)
        }

    def _row_boxes(self, row: Row) -> list[Box] | None:
        if column := self._columns.get("boxes"):
            return parse_boxes(row, column, self._path)
        return self._boxes.get(self._cell(row, "image"))

    def _read_box_file(self, boxes: str | None, rows: list[Row]) -> dict[str, list[Box]]:
        if boxes is None:
            return {}
        if "boxes" in self._columns:
            raise ValueError(f"boxes = {boxes!r}: {self._path} has a column of boxes too; leave one of them out")
        return read_box_file(self._path.parent / boxes, {self._cell(row, "image") for row in rows})

    def _check_content(self, header: list[str]) -> None:
        annotated = self._labels or self._masks or self._boxes or {"class", "boxes"} & self._columns.keys()
        if not (self.has_reports or annotated):
            raise ValueError(
                f"{self._path}: no column for findings, impression or report, nor for labels, class, masks or boxes; "
                f"{shown_columns(header)}"
            )


def _table_file(root: Path) -> Path:
    if root.is_file():
        return root
    found = sorted(path for suffix in ("csv", "csv.gz", "tsv", "tsv.gz") for path in root.glob(f"*.{suffix}"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise FileNotFoundError(f"{root}: expected one CSV or TSV file, found: {names}; give the file itself as --root")
    return found[0]


def _split_roles(columns: dict) -> tuple[dict[str, str | Sequence[str]], dict[str, str]]:
    """Roles that take several columns, and roles that take one. Raises ValueError for what is no role or no column."""
    unknown = columns.keys() - set(ROLES)
    if unknown:
        raise ValueError(
            f"columns: {', '.join(sorted(map(str, unknown)))} is not a role; the roles are {', '.join(ROLES)}"
        )
    lists = {role: columns.pop(role, prefix) for role, prefix in LIST_ROLES.items()}
    wrong = [(role, value) for role, value in lists.items() if not isinstance(value, Sequence)]
    for role, column in [*((role, value) for role, value in columns.items() if not isinstance(value, str)), *wrong]:
        rule = f"must be the name of a column ({' and '.join(LIST_ROLES)}: or a list of them)"
        raise ValueError(f"columns: {role} = {column!r}: {rule}")
    return lists, columns


def _resolve_columns(path: Path, header: list[str], columns: dict[str, str]) -> dict[str, str]:
    """The column of each role that the table has."""
    require_columns(path, header, columns.values())
    found = {role: role for role in ROLES if role in header and role not in LIST_ROLES} | columns
    if "patient" not in found:
        raise ValueError(
            f"{path}: no column for patient; {shown_columns(header)}. Name it with columns={{'patient': ...}}; where "
            "every image is another patient that is the image column"
        )
    require_columns(path, header, [found.get("image", "image")])
    return found
