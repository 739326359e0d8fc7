"""Draws what is abnormal in a phantom: the soft shape of each lesion, what it does to the picture, and devices.

A lesion acts on the aeration of the lung (1 air, 0 none): fluid and consolidation take it away, a pneumothorax has more.
"""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from imitate_ds.data.sources.phantom_anatomy import SPAN, Canvas, dome, soft
from imitate_ds.data.sources.phantom_case import Case, Lesion

MASKED_KINDS = ("effusion", "pneumothorax", "consolidation", "nodule", "atelectasis")
_ZONE_Y = {"upper": (-0.52, -0.34), "mid": (-0.18, 0.02), "lower": (0.16, 0.30)}


def lesion_shape(case: Case, index: int, grid: Canvas) -> np.ndarray:
    """The soft shape of lesion `index` in 0..1 on its side's half of the canvas [N, N / 2], not cut where the lung ends."""
    lesion = case.lesions[index]
    draw = {
        "effusion": _effusion,
        "pneumothorax": _pneumothorax,
        "consolidation": _consolidation,
        "nodule": _nodule,
        "atelectasis": _atelectasis,
    }[lesion.kind]
    return draw(case, lesion, grid, case.stream(f"lesion{index}"))


def apply_lesion(lesion: Lesion, shape: np.ndarray, aeration: np.ndarray, vessels: np.ndarray) -> None:
    """Changes the aeration and the vessels of the lesion's side in place; all three are [N, N / 2]."""
    if lesion.kind == "pneumothorax":
        aeration += 0.30 * shape * aeration
        # the visceral pleura: a thin bright line where the shape falls off inside the lung
        aeration -= 1.1 * (shape * (1 - shape)) * aeration
        vessels *= 1 - shape
        return
    opacity = {
        "effusion": (0.85, 0.92, 0.96),
        "consolidation": (0.60, 0.70, 0.80),
        "nodule": (0.50, 0.58, 0.66),
        "atelectasis": (0.52, 0.60, 0.68),
    }[lesion.kind][lesion.severity]
    aeration *= 1 - opacity * shape


def _across(grid: Canvas, lesion: Lesion) -> np.ndarray:
    return np.abs(grid.x[:, grid.columns(lesion.side)])


def _effusion(case: Case, lesion: Lesion, grid: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Everything below a meniscus that climbs the chest wall."""
    across = _across(grid, lesion)
    angle = float(dome(case, lesion.side, np.array(case.anatomy.lung_width)))
    top = angle - (0.24, 0.50, 0.82)[lesion.severity] - rng.uniform(0, 0.08)  # y where the fluid meets the chest wall
    level = top + (0.17, 0.2, 0.24)[lesion.severity]
    meniscus = level - (level - top) * np.clip((across - 0.3) / (case.anatomy.lung_width - 0.3), 0, 1) ** 2
    return soft(grid.y - meniscus, 0.07)


def _pneumothorax(case: Case, lesion: Lesion, grid: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Between the chest wall and the edge of the shrunken lung, widest at the apex."""
    across = _across(grid, lesion)
    gap = (0.11, 0.19, 0.30)[lesion.severity] + rng.uniform(0, 0.05)
    low = (0.1, 0.45, 0.8)[lesion.severity]  # y where the lung touches the wall again
    apex = case.anatomy.apex + 1.1 * gap
    width = case.anatomy.lung_width - gap * np.clip((low - grid.y) / (low - apex), 0, 1) ** 0.7
    depth = np.clip((grid.y - apex) / (0.15 - apex), 0, 1)
    return soft(across - width * (0.15 + 0.85 * (1 - (1 - depth) ** 2.6) ** 0.62), 0.025)


def _center(lesion: Lesion, rng: np.random.Generator) -> tuple[float, float]:
    """Distance from the midline and y; lower left lesions lie beside the heart, not behind it."""
    behind_heart = lesion.side == "left" and lesion.zone == "lower"
    low, high = (0.52, 0.62) if behind_heart else (0.36, 0.48) if lesion.zone == "upper" else (0.36, 0.56)
    return rng.uniform(low, high), rng.uniform(*_ZONE_Y[lesion.zone])


def _consolidation(case: Case, lesion: Lesion, grid: Canvas, rng: np.random.Generator) -> np.ndarray:
    """A patch with a ragged, cloudy border."""
    across = _across(grid, lesion)
    x, y = _center(lesion, rng)
    radius = (0.17, 0.22, 0.28)[lesion.severity]
    wide, tall = radius * rng.uniform(0.9, 1.3), radius * rng.uniform(0.8, 1.1)
    patch = 1.0 - ((across - x) / wide) ** 2 - ((grid.y - y) / tall) ** 2
    np.maximum(patch, -1.5, out=patch)
    patch += clouds(rng, patch.shape, (10, 5), 0.25) + clouds(rng, patch.shape, (28, 14), 0.28)
    return soft(patch - 0.3, 1.1)


def clouds(rng: np.random.Generator, shape: tuple[int, ...], cells: tuple[int, int], strength: float) -> np.ndarray:
    """Smooth noise of the given standard deviation: a coarse random grid of cells (down, across), enlarged."""
    coarse = Image.fromarray(rng.standard_normal(cells, dtype=np.float32) * np.float32(strength))
    return np.asarray(coarse.resize((shape[1], shape[0]), Image.Resampling.BICUBIC))


def _nodule(case: Case, lesion: Lesion, grid: Canvas, rng: np.random.Generator) -> np.ndarray:
    across = _across(grid, lesion)
    x, y = _center(lesion, rng)
    radius = (0.065, 0.09, 0.125)[lesion.severity] * rng.uniform(0.92, 1.08)
    square = ((across - x) / radius) ** 2 + ((grid.y - y) / (radius * rng.uniform(0.88, 1.12))) ** 2
    return soft(1 - square, 0.5)


def _atelectasis(case: Case, lesion: Lesion, grid: Canvas, rng: np.random.Generator) -> np.ndarray:
    """Plate-like bands across the lung, thicker and more of them with severity."""
    across = _across(grid, lesion)
    x, y = _center(lesion, rng)
    thick = (0.024, 0.032, 0.040)[lesion.severity]
    out = np.zeros((grid.y.size, across.shape[1]), np.float32)
    for i in range((1, 2, 3)[lesion.severity]):
        length, slope, bend = rng.uniform(0.13, 0.21), rng.uniform(-0.35, 0.35), rng.uniform(-1.2, 1.2)
        middle = y + (0.0, -0.12, 0.12)[i] + slope * (across - x) + bend * (across - x) ** 2
        rows = grid.rows(y - 0.35, y + 0.35)
        band = soft(thick - np.abs(grid.y[rows] - middle), 1.8 * thick) * soft(length - np.abs(across - x), 0.14)
        np.maximum(out[rows], band, out=out[rows])
    return out


def add_device(picture: np.ndarray, case: Case, lesion: Lesion, rng: np.random.Generator) -> np.ndarray:
    """The picture [N, N] with a device drawn over it: metal is white, plastic a little brighter than tissue."""
    size = picture.shape[0]
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    sign = -1 if lesion.side == "right" else 1

    def line(points: list[tuple[float, float]], value: float, width: float) -> None:
        pixels = [((x + SPAN) / (2 * SPAN) * size, (y + SPAN) / (2 * SPAN) * size) for x, y in points]
        draw.line(pixels, fill=value, width=max(1, round(width * size / 256)), joint="curve")

    def disc(x: float, y: float, radius: float, value: float) -> None:
        box = [(p + SPAN) / (2 * SPAN) * size for p in (x - radius, y - radius, x + radius, y + radius)]
        draw.ellipse(box, fill=value)

    {
        "pacemaker": _pacemaker,
        "central line": _central_line,
        "ECG leads": _ecg_leads,
        "endotracheal tube": _endotracheal_tube,
    }[lesion.device](line, disc, sign, rng)
    return np.asarray(image)


def _curve(rng: np.random.Generator, points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """A smooth line along jittered points: a cubic over a common parameter, least squares where there are over four."""
    knots = np.array(points) + rng.normal(0, 0.012, (len(points), 2))
    return [(float(x), float(y)) for x, y in _cubic(len(points)) @ knots]


@lru_cache(maxsize=8)
def _cubic(points: int) -> np.ndarray:
    """The matrix [6 * points, points] that takes values at evenly spaced knots to those of their cubic in between."""
    knots, fine = (np.vander(np.linspace(0, 1, count), 4) for count in (points, 6 * points))
    return fine @ np.linalg.pinv(knots)


def _pacemaker(line, disc, sign: int, rng: np.random.Generator) -> None:
    x, y = sign * rng.uniform(0.52, 0.6), rng.uniform(-0.5, -0.4)
    disc(x, y, 0.10, 1.0)
    line([(x - 0.07, y - 0.09), (x + 0.03, y - 0.10)], 0.95, 6)  # the connector block
    line(_curve(rng, [(x, y - 0.09), (sign * 0.3, -0.62), (-0.08, -0.42), (-0.08, 0.05)]), 0.95, 2.0)
    line(_curve(rng, [(-0.09, 0.0), (-0.05, 0.22), (0.12, 0.40), (0.30, 0.42)]), 0.95, 2.0)


def _central_line(line, disc, sign: int, rng: np.random.Generator) -> None:
    if rng.random() < 0.5:  # from the neck, else from the arm
        start = [(sign * 0.25, -1.1), (sign * 0.2, -0.8), (-0.07, -0.45), (-0.10, rng.uniform(-0.15, 0.05))]
    else:
        start = [(sign * 0.95, -0.45), (sign * 0.55, -0.62), (sign * 0.12, -0.5), (-0.10, rng.uniform(-0.15, 0.05))]
    line(_curve(rng, start), 0.97, 2.4)


def _ecg_leads(line, disc, sign: int, rng: np.random.Generator) -> None:
    for x, y in ((-0.55, -0.5), (0.55, -0.5), (0.6, 0.35)):
        x, y = x + rng.normal(0, 0.05), y + rng.normal(0, 0.05)
        disc(x, y, 0.035, 1.0)
        line(_curve(rng, [(x, y), (x * 0.8, y + 0.3), (sign * 0.15, 0.75), (sign * 0.05, 1.2)]), 0.9, 1.6)


def _endotracheal_tube(line, disc, sign: int, rng: np.random.Generator) -> None:
    tip = rng.uniform(-0.5, -0.42)
    line([(0.012, -1.2), (0.0, -0.8), (0.004, tip)], 0.95, 3.4)
    line(_curve(rng, [(0.03, -1.2), (0.03, -0.4), (0.04, 0.2), (0.16, 0.62), (0.34, 0.72)]), 0.95, 2.2)  # gastric tube
