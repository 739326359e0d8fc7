"""Radiographs under what is true and what was predicted: patient data, made only where the run file asks for them."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from imitate_ds.batch import IGNORED, LabeledBatch
from imitate_ds.distributed import from_main, training_device
from imitate_ds.evaluation.task_scores import SURE

TRUE, PREDICTED = (0, 200, 255), (255, 140, 0)  # cyan and orange, which colour-blind people tell apart
WIDTHS = {TRUE: 3, PREDICTED: 1}  # of lines, so that where both agree both are seen
SIDE = 768  # pixels that a picture may have after it was enlarged, by a whole number


@torch.no_grad()
def draw_overlays(
    folder: Path,
    forward: Callable[[LabeledBatch], Any],
    predict: Callable[[Any], Any],
    batches: Iterable[LabeledBatch],
) -> None:
    """folder/KEY.png of every sample of the batches, which must be the same on all ranks; the main one writes. A collective.

    The answers of a run keep no pixels, so the model is asked once more: on all ranks, since at ZeRO-3 each holds a part of it.
    The folder is its owner's alone, whatever `share` says, and holds nothing from before.
    """
    device = training_device()
    from_main(lambda: _empty(folder))
    for batch in batches:
        answer = predict(forward(batch.to(device)))
        from_main(lambda batch=batch, answer=answer: _write(folder, batch, answer))


def overlay(image: np.ndarray, true: np.ndarray, predicted: np.ndarray) -> Image.Image:
    """A radiograph uint8 [H, W] with outlines of masks bool [M, H, W], or with boxes [n, 4] in its pixels."""
    zoom = max(1, SIDE // max(image.shape))
    picture = Image.fromarray(image).convert("RGB").resize([side * zoom for side in image.shape[::-1]])
    for shapes, colour in ((true, TRUE), (predicted, PREDICTED)):
        if shapes.ndim == 3:
            for mask in shapes:
                edge = _edge(mask.repeat(zoom, axis=0).repeat(zoom, axis=1), WIDTHS[colour])
                picture.paste(colour, mask=Image.fromarray(edge))
        else:
            draw = ImageDraw.Draw(picture)
            for box in (shapes * zoom).tolist():
                draw.rectangle(box, outline=colour, width=WIDTHS[colour])
    return picture


def _empty(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    for old in folder.glob("*.png"):
        old.unlink()


def _write(folder: Path, batch: LabeledBatch, answer: Any) -> None:
    for i, key in enumerate(batch.keys):
        true, predicted = (
            _masks(batch.masks[i], answer[i]) if batch.masks.shape[1] else _boxes(batch.boxes[i], answer[i])
        )
        overlay(batch.images[i, 0].numpy(), true, predicted).save(folder / f"{key}.png")


def _masks(mask: Tensor, share: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """As the Dice counts them: nothing of pixels of which nobody says anything."""
    return (mask == 1).numpy(), ((share.cpu() >= SURE) & (mask != IGNORED)).numpy()


def _boxes(boxes: Tensor, found: Any) -> tuple[np.ndarray, np.ndarray]:
    return boxes.numpy(), found.boxes[found.scores >= SURE].cpu().numpy()


def _edge(mask: np.ndarray, width: int) -> np.ndarray:
    """Pixels of a mask bool [H, W] that are at most so far from its outside; the border of the image is no outside."""
    inner = mask
    for _ in range(width):
        there = np.pad(inner, 1, mode="edge")
        inner = inner & there[:-2, 1:-1] & there[2:, 1:-1] & there[1:-1, :-2] & there[1:-1, 2:]
    return mask & ~inner
