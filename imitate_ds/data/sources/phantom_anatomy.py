"""Draws the normal chest of a phantom: soft tissue, lungs, heart, vessels, ribs, clavicles, spine.

Everything is drawn in the body frame on an N x N canvas that spans [-SPAN, SPAN]², a little more than the film, as
absorption between 0 (air, black) and 1 (bone, white). Every edge is a function of the row or of the column alone, so that
a shape costs two or three broadcast operations; the pose of the patient is one affine warp at the end (`warp`).
"""

from dataclasses import dataclass
from functools import lru_cache
from math import cos, sin

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from imitate_ds.data.sources.phantom_case import Anatomy, Case

SPAN = 1.15  # half width of the canvas; the film shows about [-1, 1]
VESSEL_TEMPLATES = 6


@dataclass(frozen=True)
class Canvas:
    """Coordinates of an N x N canvas: x [1, N] to the right, y [N, 1] down, half: first column right of the midline."""

    x: np.ndarray
    y: np.ndarray
    half: int

    def columns(self, side: str) -> slice:
        """The columns of the patient's right (the left of the image) or left side."""
        return slice(0, self.half) if side == "right" else slice(self.half, None)

    def rows(self, top: float, bottom: float) -> slice:
        low, high = np.searchsorted(self.y[:, 0], (top, bottom))
        return slice(int(low), int(high))


@lru_cache(maxsize=4)
def canvas(size: int) -> Canvas:
    # glibc hands the memory of every freed array back to the kernel and faults it in again for the next, a third of the
    # time of a phantom. Freeing one large block, once in a process, raises its threshold (mallopt(3), M_MMAP_THRESHOLD).
    np.empty(16 << 20, np.uint8)
    axis = np.linspace(-SPAN, SPAN, size, dtype=np.float32)
    return Canvas(axis[None, :], axis[:, None], size // 2)


def soft(distance: np.ndarray, width: float) -> np.ndarray:
    """A soft step: 0 below -width/2, 1 above width/2, straight in between. Distance is positive inside."""
    out = distance * np.float32(1 / width)
    out += np.float32(0.5)
    return np.clip(out, 0, 1, out=out)


def ellipse(grid: Canvas, x: float, y: float, width: float, height: float, edge: float) -> tuple[tuple, np.ndarray]:
    """A soft ellipse of the given half axes, and the window (rows, columns) of the canvas that it lies in."""
    rows = grid.rows(y - height * 1.1, y + height * 1.1)
    low, high = np.searchsorted(grid.x[0], (x - width * 1.1, x + width * 1.1))
    columns = slice(int(low), int(high))
    square = ((grid.x[:, columns] - x) / width) ** 2 + ((grid.y[rows] - y) / height) ** 2
    return (rows, columns), soft(1 - square, edge)


def dome(case: Case, side: str, across: np.ndarray) -> np.ndarray:
    """The y of the diaphragm, given the distance from the midline: flat to the middle, steep to the costophrenic angle."""
    top = (
        (case.anatomy.right_dome if side == "right" else case.anatomy.left_dome) + case.inspiration - case.lifted(side)
    )
    lateral, medial = np.maximum(across - 0.36, 0), np.maximum(0.36 - across, 0)
    return top + 1.9 * lateral**2 + 1.1 * medial**2


def chest_wall(anatomy: Anatomy, y: np.ndarray) -> np.ndarray:
    """Distance of the inner chest wall from the midline, by row."""
    depth = np.clip((y - anatomy.apex) / (0.15 - anatomy.apex), 0, 1)
    return anatomy.lung_width * (0.44 + 0.56 * (1 - (1 - depth) ** 2.6) ** 0.62)


def _medial_border(anatomy: Anatomy, side: str, y: np.ndarray) -> np.ndarray:
    """Distance of the mediastinal border from the midline, by row: wide at the apex, with the aortic knob on the left."""
    border = anatomy.mediastinum + 0.16 * np.clip((-0.45 - y) / 0.4, 0, 1) ** 1.5
    if side == "left":
        border = border + 0.07 * np.exp(-(((y + 0.36) / 0.09) ** 2)) + 0.05 * np.exp(-(((y + 0.12) / 0.1) ** 2))
    return border


def lung_depth(case: Case, grid: Canvas, side: str) -> np.ndarray:
    """Signed distance into the lung of one side, its half of the canvas: [N, N / 2], positive inside, heart not cut out."""
    across = np.abs(grid.x[:, grid.columns(side)])
    depth = chest_wall(case.anatomy, grid.y) - across
    np.minimum(depth, across - _medial_border(case.anatomy, side, grid.y), out=depth)
    np.minimum(depth, dome(case, side, across) - grid.y, out=depth)
    return np.minimum(depth, (grid.y - case.anatomy.apex) * 0.8, out=depth)


def lungs_depth(case: Case, grid: Canvas) -> np.ndarray:
    return np.concatenate([lung_depth(case, grid, side) for side in ("right", "left")], axis=1)


def heart(case: Case, grid: Canvas) -> tuple[slice, np.ndarray]:
    """The rows that the heart lies in, and its soft shadow there [rows, N].

    Two leaning ellipses: the right atrium, and the left ventricle, which reaches far into the patient's left.
    """
    width = case.heart_ratio * 2 * case.anatomy.lung_width
    base = 0.5 * (case.anatomy.right_dome + case.anatomy.left_dome) + case.inspiration
    rows = grid.rows(base - 0.46 - 0.24 * width, base + 0.22 * width + 0.06)
    y = grid.y[rows] - base + 0.2
    ventricle_x = (grid.x - 0.20 * width) / (0.47 * width)
    ventricle = (ventricle_x - 0.35 / (0.47 * width) * y) ** 2 + (y / (0.24 + 0.22 * width)) ** 2
    atrium = ((grid.x + 0.10 * width) / (0.24 * width)) ** 2 + ((y - 0.02) / (0.17 + 0.2 * width)) ** 2
    return rows, soft(1 - np.minimum(ventricle, atrium), 0.16)


def tissue(case: Case, grid: Canvas) -> np.ndarray:
    """Absorption of the body without its lungs [N, N]: shoulders, flanks, spine, mediastinum, upper abdomen; air around."""
    x, y = grid.x, grid.y
    out = (0.66 + 0.08 * soft(y - 0.6, 0.5)) + 0.07 * np.exp(-((x / 0.24) ** 2))
    low, high = np.searchsorted(x[0], (-0.2, 0.2))
    middle = x[:, low:high]
    vertebrae = 0.05 + 0.02 * np.sin(y * np.float32(2 * np.pi / 0.13))
    out[:, low:high] += np.exp(-((middle / 0.085) ** 4)) * vertebrae
    trachea = 0.13 * soft(-0.33 - y, 0.12)  # down to the carina
    out[:, low:high] -= np.exp(-((middle / 0.045) ** 2)) * trachea
    outline_y, outline_x = (-1.2, -1.0, -0.86, -0.70, -0.3, 0.3, 1.2), (0.30, 0.36, 0.72, 1.16, 1.02, 0.95, 1.0)
    outline = np.interp(y, outline_y, outline_x).astype(np.float32) * case.anatomy.body_width
    out *= np.maximum(soft(outline - np.abs(x), 0.10), np.float32(0.06))
    return out


def add_ribs(picture: np.ndarray, case: Case, grid: Canvas, aeration: np.ndarray) -> None:
    """Adds the rear ribs, which fall outwards, and fainter front ribs, which fall inwards; clearest over aerated lung."""
    anatomy = case.anatomy
    rows = grid.rows(anatomy.apex - 0.05, 0.95)
    y, across = grid.y[rows], np.abs(grid.x[:, grid.half :])
    cage = np.minimum(chest_wall(anatomy, y) + 0.03 - across, (across - 0.1) * 0.5)
    ribs = _stripes(y, -anatomy.rib_slope * (0.62 * across**2.2 - 0.05 * across), anatomy)
    front = _stripes(y, 0.62 * anatomy.rib_slope * across + 0.3, anatomy)
    front *= soft(across - 0.38, 0.2) * np.float32(0.4)
    ribs += front
    ribs *= soft(cage, 0.05)
    ribs *= np.float32(anatomy.rib_contrast)
    weight = aeration[rows] * np.float32(0.8)
    weight += np.float32(0.2)
    right = picture.shape[1] - grid.half
    weight[:, grid.half :] *= ribs
    weight[:, : grid.half] *= ribs[:, ::-1][:, right - grid.half :]
    picture[rows] += weight


def _stripes(y: np.ndarray, shift: np.ndarray, anatomy: Anatomy) -> np.ndarray:
    """Ribs [rows, columns]: one profile repeated down y, moved by a shift that depends on the column."""
    steps = np.float32(256 / anatomy.rib_spacing)
    phase = y * steps + (shift * steps + np.float32(256 * (anatomy.rib_offset + 64)))
    index = phase.astype(np.intp)
    index &= 255
    return _rib_profile().take(index)


@lru_cache(maxsize=1)
def _rib_profile() -> np.ndarray:
    """One rib and one gap across: a band with denser edges (the cortex), the lower edge sharper."""
    t = np.arange(256) / 256
    band = np.clip((t - 0.05) / 0.1, 0, 1) * np.clip((0.52 - t) / 0.06, 0, 1)
    cortex = np.exp(-(((t - 0.13) / 0.05) ** 2)) * 0.4 + np.exp(-(((t - 0.46) / 0.04) ** 2)) * 0.6
    return (band * 0.75 + cortex).astype(np.float32)


def add_clavicles(picture: np.ndarray, case: Case, grid: Canvas) -> None:
    rows = grid.rows(-0.85, -0.4)
    for side, lift in (("right", 0.015), ("left", -0.015)):
        across = np.abs(grid.x[:, grid.columns(side)])
        middle = -0.60 + lift - case.anatomy.clavicle_slope * across - 0.05 * np.sin(across * 5.5)
        thickness = 0.034 + 0.02 * np.maximum(0.3 - across, 0) + 0.012 * np.maximum(across - 0.5, 0)
        off = np.abs(grid.y[rows] - middle)
        bone = soft(thickness - off, 0.02) - 0.35 * soft(thickness - 0.016 - off, 0.02)  # a cortex and a softer core
        picture[rows, grid.columns(side)] += np.float32(0.13) * bone * soft(across - 0.1, 0.06)


def add_soft_parts(picture: np.ndarray, case: Case, grid: Canvas) -> None:
    """Breast shadows and the gas bubble of the stomach, where this patient shows them."""
    anatomy = case.anatomy
    for sign in (-1, 1) if anatomy.breast else ():
        window, breast = ellipse(grid, sign * 0.5, 0.36, 0.40, 0.36, 0.5)
        picture[window] += anatomy.breast * breast
    if anatomy.stomach_bubble:
        top = anatomy.left_dome + case.inspiration - case.lifted("left") + 0.15
        window, bubble = ellipse(grid, 0.40, top, 0.17, 0.09, 0.7)
        picture[window] -= anatomy.stomach_bubble * bubble


@lru_cache(maxsize=4)
def vessel_templates(size: int) -> np.ndarray:
    """Branching vessels that leave both hila, drawn once per process: float32 [VESSEL_TEMPLATES, N, N] in 0..1."""
    return np.stack([_draw_vessels(size, np.random.default_rng(1000 + i)) for i in range(VESSEL_TEMPLATES)])


def _draw_vessels(size: int, rng: np.random.Generator) -> np.ndarray:
    image = Image.new("L", (2 * size, 2 * size))
    draw = ImageDraw.Draw(image)
    for sign in (-1, 1):
        hilum = (sign * 0.2, -0.06 if sign < 0 else -0.10)
        for angle in np.linspace(-1.35, 1.45, 9) + rng.normal(0, 0.08, 9):
            _branch(draw, size, hilum, sign, angle, 0.20, 0.021, rng)
        for _ in range(4):  # the hilum itself: a knot of vessels seen end on
            x, y = hilum[0] + rng.normal(0, 0.025), hilum[1] + rng.normal(0, 0.05)
            corners = [(p + SPAN) * size / SPAN for p in (x - 0.045, y - 0.06, x + 0.045, y + 0.06)]
            draw.ellipse(corners, fill=170)
    small = image.filter(ImageFilter.GaussianBlur(size / 160)).resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255


def _branch(draw, size: int, start, sign: int, angle: float, length: float, width: float, rng) -> None:
    """One vessel as a short straight piece, then two thinner ones; ends where it would be thinner than a pixel."""
    if width < 0.0035:
        return
    end = (start[0] + sign * length * cos(angle), start[1] + length * sin(angle))
    points = [(p + SPAN) * size / SPAN for p in (*start, *end)]
    draw.line(points, fill=int(80 + 5500 * width), width=max(1, round(width * size)))
    for turn in (-0.3, 0.3):
        _branch(
            draw,
            size,
            end,
            sign,
            angle + turn + rng.normal(0, 0.25),
            length * rng.uniform(0.55, 0.95),
            width * 0.62,
            rng,
        )


def warp(picture: np.ndarray, case: Case, size: int) -> np.ndarray:
    """Body frame to film: turns, zooms and shifts a float32 canvas [N, N] to what is exposed, [size, size]."""
    n = picture.shape[0]
    scale = n / (2 * SPAN) * 2 / size / case.zoom
    a, b = scale * cos(case.rotation), scale * sin(case.rotation)
    dx, dy = (n / 2 + shift * n / (2 * SPAN) for shift in case.shift)
    coefficients = (a, b, dx - (a + b) * size / 2, -b, a, dy + (b - a) * size / 2)
    image = Image.fromarray(np.ascontiguousarray(picture, np.float32))
    return np.asarray(image.transform((size, size), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR))
