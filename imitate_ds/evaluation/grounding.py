"""The pointing game: does the place of the image that answers a label's words most lie in a box of that label?

A hit is a maximum whose pixel has its centre in a box; a map without any positive value points nowhere, and misses. Beside it
stand `chance`, a random pixel, and `blind`, the best pixel that is the same for every radiograph.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image, ImageDraw
from torch import Tensor

from imitate_ds.batch import Batch
from imitate_ds.data.loader import build_eval_loader
from imitate_ds.data.shard_index import ShardIndex, read_metas
from imitate_ds.evaluation.embedded import SplitRecords
from imitate_ds.evaluation.prompt_file import PromptFile
from imitate_ds.evaluation.prompts import prompts_for
from imitate_ds.hub import PretrainedImitate, Section
from imitate_ds.metrics import Figures, bootstrap_by_patient, figure, mean_statistic, nan_mean

REFERENCE = 256  # radiographs whose mean says what is usual; on phantoms 32 do as well, and 8 almost
ZOOM, OPACITY = 4, 0.6  # of an overlay

Boxes = dict[str, list[dict[str, Any]]]  # label -> {x, y, width, height}, in pixels of the stored square


class Pointing(NamedTuple):
    """Of n samples and L labels; NaN where a sample has no box of a label."""

    labels: tuple[str, ...]
    hits: np.ndarray  # float64 [n, L]
    areas: np.ndarray  # float64 [n, L]: share of the pixels that lie in a box
    blind: np.ndarray  # float64 [L]: how often the best fixed pixel lies in a box


def read_boxes(records: SplitRecords) -> list[Boxes]:
    """The boxes of every sample of a split, in index order. Raises ValueError where there is none at all."""
    found: list[Boxes] = []
    for shard in records.index.of_split(records.split):
        for _, meta in read_metas(records.index, shard):
            boxes: Boxes = {}
            for box in meta["extra"].get("boxes") or []:
                boxes.setdefault(box["label"], []).append(box)
            found.append(boxes)
    if not any(found):
        raise ValueError(
            f"shards = '{records.index.root}': no boxes in split {records.split!r}; build them from a source that gives them "
            "(shards/README.md)"
        )
    return found


def box_mask(boxes: list[dict[str, Any]], size: int, stored: int) -> np.ndarray:
    """bool [size, size]: pixels whose centre lies in a box; boxes are in pixels of a square of `stored` pixels a side."""
    centres = (np.arange(size) + 0.5) * stored / size
    mask = np.zeros((size, size), dtype=bool)
    for box in boxes:
        rows = (centres >= box["y"]) & (centres < box["y"] + box["height"])
        columns = (centres >= box["x"]) & (centres < box["x"] + box["width"])
        mask |= rows[:, None] & columns
    return mask


def is_hit(heat: np.ndarray, mask: np.ndarray) -> bool:
    """Whether the maximum of a map [H, W] lies in a mask bool [H, W]; of equal ones the first counts."""
    return bool(heat.max() > 0 and mask.flat[heat.argmax()])


def ask_for(boxes: list[Boxes], file: PromptFile | None, branch: Section) -> dict[str, tuple[str, ...]]:
    """The texts that affirm each label that has boxes; labels that the file does not know are left out."""
    labels = sorted({label for sample in boxes for label in sample})
    if file is None:
        return {label: sides[0] for label, sides in prompts_for(labels, branch).items()}
    prompts = {label: wording[0] for label in labels if (wording := file.wording(label, branch))}
    if not prompts:
        raise ValueError(
            f"--prompts {file.name}: has none of the labels of boxes ({', '.join(labels)}); it has: {', '.join(file.wordings)}"
        )
    return prompts


def usual_levels(model: PretrainedImitate, index: ShardIndex, split: str, workers: int) -> list[Tensor]:
    """The mean features over the first radiographs of a split."""
    images: list[Tensor] = []
    for batch in _batches(model, index, split, workers):
        images.append(batch.images[:, 0])
        if sum(map(len, images)) >= REFERENCE:
            break
    return model.usual_levels(torch.cat(images)[:REFERENCE])


def point(
    model: PretrainedImitate,
    records: SplitRecords,
    boxes: list[Boxes],
    prompts: dict[str, tuple[str, ...]],
    branch: Section,
    usual: list[Tensor] | None,
    *,
    workers: int,
    pictures: Path | None = None,
) -> Pointing:
    """Ask every sample for the labels that it has boxes of. pictures: a folder for an overlay of each, patient data."""
    labels, size = tuple(prompts), model.input_size
    rows = torch.stack([model.encode_ensemble(texts) for texts in prompts.values()])
    place = {key: row for row, key in reversed(list(enumerate(records.keys)))}
    hits, areas = (np.full((len(records.keys), len(labels)), np.nan) for _ in range(2))
    inside = np.zeros((len(labels), size, size))
    for batch in _batches(model, records.index, records.split, workers):
        samples = [place[key] for key in batch.keys]
        asked = [(i, j) for i, s in enumerate(samples) for j, label in enumerate(labels) if label in boxes[s]]
        if not asked:
            continue
        images, columns = (list(numbers) for numbers in zip(*asked, strict=True))
        maps = model.ground_rows(batch.images[images, 0], rows[columns], branch, usual).numpy()
        for (i, j), heat in zip(asked, maps, strict=True):
            mask = box_mask(boxes[samples[i]][labels[j]], size, records.index.image_size)
            hits[samples[i], j] = is_hit(heat, mask)
            areas[samples[i], j] = mask.mean()
            inside[j] += mask
            if pictures:
                name = f"{batch.keys[i]}.{re.sub(r'[^0-9A-Za-z]+', '-', labels[j])}.png"
                overlay(batch.images[i, 0, 0].numpy(), heat, mask).save(pictures / name)
    return Pointing(labels, hits, areas, inside.max(axis=(1, 2)) / (~np.isnan(hits)).sum(axis=0))


def pointing_figures(pointing: Pointing, patients: np.ndarray) -> Figures:
    """The share of hits by label and macro, with intervals by patient; chance and blind beside it."""
    by_label = mean_statistic(pointing.hits)

    def statistic(weights: np.ndarray) -> np.ndarray:
        shares = by_label(weights)
        return np.append(shares, nan_mean(shares))

    ones = np.ones(len(patients))
    values, (low, high) = statistic(ones), bootstrap_by_patient(statistic, patients)
    chance = mean_statistic(pointing.areas)(ones)
    counts = (~np.isnan(pointing.hits)).sum(axis=0).tolist()
    names = ["_macro", *(f"/{label}" for label in pointing.labels)]
    sizes = [sum(counts), *counts]
    figures: Figures = {}
    for i, (name, n) in enumerate(
        zip(names, sizes, strict=True), start=-1
    ):  # the mean stands last in `values`, first here
        figures[f"pointing{name}"] = figure(values[i], low[i], high[i], n=n)
        figures[f"chance_pointing{name}"] = figure(np.append(chance, chance.mean())[i], n=n)
        figures[f"blind_pointing{name}"] = figure(np.append(pointing.blind, pointing.blind.mean())[i], n=n)
    return figures


def overlay(image: np.ndarray, heat: np.ndarray, mask: np.ndarray) -> Image.Image:
    """A radiograph uint8 [H, W] under its map, the outline of the boxes in green, a cross at the maximum."""
    share = heat / max(float(heat.max()), 1e-12)
    colours = colormaps["inferno"](share)[..., :3] * 255
    opacity = (OPACITY * share)[..., None]
    pixels = ((1 - opacity) * image[..., None] + opacity * colours).astype(np.uint8)
    edge = mask & ~(np.roll(mask, 1, 0) & np.roll(mask, -1, 0) & np.roll(mask, 1, 1) & np.roll(mask, -1, 1))
    pixels[edge] = (0, 220, 0)
    picture = Image.fromarray(pixels).resize([side * ZOOM for side in image.shape[::-1]], Image.Resampling.NEAREST)
    y, x = ((np.array(np.unravel_index(heat.argmax(), heat.shape)) + 0.5) * ZOOM).tolist()
    draw = ImageDraw.Draw(picture)
    for ends in ((x - 8, y, x + 8, y), (x, y - 8, x, y + 8)):
        draw.line(ends, fill=(0, 200, 255), width=2)
    return picture


def _batches(model: PretrainedImitate, index: ShardIndex, split: str, workers: int) -> Iterator[Batch]:
    size = model.input_size
    yield from build_eval_loader(index, split, input_size=size, batch_size=32, workers=workers, with_text=False)
