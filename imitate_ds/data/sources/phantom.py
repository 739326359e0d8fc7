"""Chest phantoms: synthetic frontal radiographs with reports, labels, masks and boxes, any number of them, from a seed.

The embedded default of the whole program: it needs no download. Everything it yields is marked synthetic; it is a drawing
for exercising and testing the program, and no finding about real patients follows from it.
"""

from collections.abc import Iterator
from functools import lru_cache, partial
from hashlib import blake2b

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from imitate_ds.data.sources import phantom_anatomy as anatomy
from imitate_ds.data.sources import phantom_lesions as lesions
from imitate_ds.data.sources.base import RadiographRef, Study
from imitate_ds.data.sources.phantom_case import Case, patient_of, sample_case
from imitate_ds.data.sources.phantom_reports import write_report

MASKS = ("lungs", "heart", "lesions")
SMALLEST_SIZE = 64


class PhantomSource:
    """`studies` phantoms of size x size pixels; study i depends on (seed, i) alone, the split on its patient.

    The patient's right is on the left of the image. `extra["boxes"]` holds one box per visible lesion in pixels.
    """

    name = "phantom"
    synthetic = True
    has_reports = True

    def __init__(
        self,
        studies: int = 1000,
        seed: int = 0,
        size: int = 256,
        *,
        val_share: float = 0.05,
        test_share: float = 0.05,
    ):
        if studies < 1:
            raise ValueError(f"studies = {studies}: must be at least 1")
        if seed < 0:
            raise ValueError(f"seed = {seed}: must not be negative")
        if size < SMALLEST_SIZE:
            raise ValueError(f"size = {size}: must be at least {SMALLEST_SIZE} pixels; smaller phantoms show no lesion")
        if min(val_share, test_share) < 0 or val_share + test_share >= 1:
            raise ValueError(
                f"val_share = {val_share}, test_share = {test_share}: must not be negative and must leave studies to train on"
            )
        self.studies, self.seed, self.size = studies, seed, size
        self.val_share, self.test_share = val_share, test_share

    def __len__(self) -> int:
        return self.studies

    def __iter__(self) -> Iterator[Study]:
        return (self.study(number) for number in range(self.studies))

    def study(self, number: int) -> Study:
        """Study `number` (0 up to, not including, `studies`)."""
        if not 0 <= number < self.studies:
            raise ValueError(f"study {number}: this source has studies 0 to {self.studies - 1}")
        case = sample_case(self.seed, number)
        patient_id = f"phantom-{self.seed}-p{patient_of(number):06d}"
        study_id = f"phantom-{self.seed}-s{number:06d}"
        findings, impression = write_report(case)
        where = (self.seed, number, self.size)
        return Study(
            patient_id=patient_id,
            study_id=study_id,
            split=self._split(patient_id),
            findings=findings,
            impression=impression,
            radiographs=(RadiographRef(f"{study_id}-1", "frontal", partial(render_radiograph, *where)),),
            labels=case.labels(),
            extra={"synthetic": True, "generator": "imitate_ds phantom", "boxes": lesion_boxes(*where)},
            masks={name: partial(render_mask, *where, name) for name in MASKS},
        )

    def _split(self, patient_id: str) -> str:
        """By a hash of the patient, so that no patient is in two splits and the split outlives a change of `studies`."""
        place = int.from_bytes(blake2b(patient_id.encode(), digest_size=8).digest(), "big") / 2**64
        if place < self.test_share:
            return "test"
        return "val" if place < self.test_share + self.val_share else "train"


def render_radiograph(seed: int, number: int, size: int) -> np.ndarray:
    """The radiograph of one study: uint8 [size, size]."""
    case = sample_case(seed, number)
    grid = anatomy.canvas(size)
    rng = case.stream("noise")
    film = anatomy.warp(_absorption(case, grid), case, size)
    return _expose(film, case, rng)


def _absorption(case: Case, grid: anatomy.Canvas) -> np.ndarray:
    """The chest of one study in the body frame: float32 [N, N], 0 (air) to about 1 (metal)."""
    depth = anatomy.lungs_depth(case, grid)
    lungs = anatomy.soft(depth, 0.035)
    aeration = lungs * (0.82 + 0.18 * anatomy.soft(depth - 0.08, 0.22))
    rows, heart = anatomy.heart(case, grid)
    aeration[rows] *= 1 - 0.93 * heart
    template = case.anatomy.vessel_template % anatomy.VESSEL_TEMPLATES
    vessels = anatomy.vessel_templates(grid.x.size)[template] * np.float32(case.anatomy.vessel_contrast)
    for i, lesion in enumerate(case.lesions):
        if lesion.kind in lesions.MASKED_KINDS:
            side = grid.columns(lesion.side)
            lesions.apply_lesion(lesion, lesions.lesion_shape(case, i, grid), aeration[:, side], vessels[:, side])
    picture = anatomy.tissue(case, grid)
    picture -= np.float32(0.46) * aeration
    vessels *= aeration
    picture += vessels
    anatomy.add_ribs(picture, case, grid, aeration)
    anatomy.add_clavicles(picture, case, grid)
    anatomy.add_soft_parts(picture, case, grid)
    for i, lesion in enumerate(case.lesions):
        if lesion.kind == "device":
            picture = lesions.add_device(picture, case, lesion, case.stream(f"lesion{i}"))
    return picture


def _expose(film: np.ndarray, case: Case, rng: np.random.Generator) -> np.ndarray:
    """Absorption to grey values: contrast, brightness, uneven exposure, grain, gamma, blur, and the side marker."""
    size = film.shape[0]
    film = film * np.float32(case.contrast)
    film += lesions.clouds(rng, film.shape, (4, 4), 0.02)
    film += np.float32(0.5 + case.brightness - 0.5 * case.contrast)
    top, left = rng.integers(size, size=2)
    film += _grain(size)[top : top + size, left : left + size] * np.float32(case.noise)
    film *= np.float32(1023 / 1.1)
    steps = np.clip(film, 0, 1023, out=film).astype(np.intp)
    image = Image.fromarray(_gamma_table(case.gamma).take(steps))
    if case.blur:
        image = image.filter(ImageFilter.BoxBlur(case.blur * size / 256))
    if case.marker:
        _add_marker(image, case.marker, rng)
    return np.array(image)


@lru_cache(maxsize=4)
def _grain(size: int) -> np.ndarray:
    """A sheet of white noise [2 * size, 2 * size]; a film cuts its own piece out, as fresh noise is the slowest step."""
    return np.random.default_rng(size).standard_normal((2 * size, 2 * size), dtype=np.float32)


def _gamma_table(gamma: float) -> np.ndarray:
    return (np.linspace(0, 1, 1024) ** gamma * 255).astype(np.uint8)


def _add_marker(image: Image.Image, letter: str, rng: np.random.Generator) -> None:
    """The lead letter that the radiographer lays on the film, on its own side."""
    size = image.size[0]
    x = rng.uniform(0.03, 0.08) if letter == "R" else rng.uniform(0.87, 0.92)
    place = (x * size, rng.uniform(0.04, 0.20) * size)
    ImageDraw.Draw(image).text(place, letter, fill=int(rng.uniform(215, 255)), font=_marker_font(max(8, size // 16)))


@lru_cache(maxsize=4)
def _marker_font(height: int):
    return ImageFont.load_default(size=height)


def render_mask(seed: int, number: int, size: int, name: str) -> np.ndarray:
    """A mask of one study, uint8 [size, size], 255 inside: "lungs" (less the heart), "heart" or "lesions" (all of them)."""
    if name not in MASKS:
        raise ValueError(f"mask {name!r}: must be one of {', '.join(MASKS)}")
    case = sample_case(seed, number)
    grid = anatomy.canvas(size)
    if name == "lesions":
        shapes = [mask for _, mask in _lesion_masks(case, grid, size)]
        inside = np.any(shapes, axis=0) if shapes else np.zeros((size, size), bool)
    else:
        rows, heart = anatomy.heart(case, grid)
        shape = (
            anatomy.soft(anatomy.lungs_depth(case, grid), 0.035)
            if name == "lungs"
            else np.zeros((size, size), np.float32)
        )
        shape[rows] = shape[rows] * (1 - heart) if name == "lungs" else heart
        inside = anatomy.warp(shape, case, size) > 0.5
    return inside.astype(np.uint8) * 255


def _lesion_masks(case: Case, grid: anatomy.Canvas, size: int) -> list[tuple[str, np.ndarray]]:
    """(kind, bool [size, size]) of every lesion that has an outline."""
    outlined = [i for i, lesion in enumerate(case.lesions) if lesion.kind in lesions.MASKED_KINDS]
    if not outlined:
        return []
    lungs = anatomy.soft(anatomy.lungs_depth(case, grid), 0.035)
    masks = []
    for i in outlined:
        side = grid.columns(case.lesions[i].side)
        shape = np.zeros_like(lungs)
        shape[:, side] = lesions.lesion_shape(case, i, grid) * lungs[:, side]
        masks.append((case.lesions[i].kind, anatomy.warp(shape, case, size) > 0.5))
    return masks


def lesion_boxes(seed: int, number: int, size: int) -> list[dict[str, object]]:
    """The bounding box, in pixels, of every lesion that has an outline: label, x, y, width, height."""
    case = sample_case(seed, number)
    boxes = []
    for kind, mask in _lesion_masks(case, anatomy.canvas(size), size):
        columns, rows = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
        if columns.size:
            x, y = int(columns[0]), int(rows[0])
            width, height = int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y
            boxes.append({"label": kind, "x": x, "y": y, "width": width, "height": height})
    return boxes
