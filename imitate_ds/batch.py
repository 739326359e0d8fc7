"""What travels through the house: Batch -> Features -> Losses.

One legend of shape letters for the whole program: B studies on this rank, N on all ranks, V views, C H W,
S encoder levels, D joint width, E text width.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = 2  # a pixel of a mask that nobody has said to be inside or outside
MISSING_TEXT = frozenset({"", "nan", "none", "n/a", "na", "null", "-", "."})


def is_missing(text: object) -> bool:
    """True for what people write where a report section is absent: nothing, blanks, NaN, a placeholder."""
    return not isinstance(text, str) or text.strip().lower() in MISSING_TEXT


class Tokens(NamedTuple):
    """The sections of B reports as a text encoder reads them, end to end: findings and impression of the first, and so on."""

    ids: Tensor  # int32 [T]; T is the sum of lengths
    lengths: Tensor  # int64 [B, 2], of findings and impression; 0 where missing. On the CPU: shapes follow from them

    def to(self, device: torch.device) -> "Tokens":
        return self._replace(ids=self.ids.to(device, non_blocking=True))

    def of_reports(self, start: int, stop: int) -> "Tokens":
        """Those of the reports start .. stop - 1."""
        ends = [0, *self.lengths.sum(dim=1).cumsum(dim=0).tolist()]
        return Tokens(self.ids[ends[start] : ends[stop]], self.lengths[start:stop])


class Batch(NamedTuple):
    """One micro-batch, born complete in the loader."""

    keys: list[str]
    images: Tensor  # uint8 [B, V, 1, H, W]: grey, normalised by the image encoder, so no NaN can reach a BatchNorm
    findings: Tensor  # float32 [B, E], frozen text embedding; zeros where absent
    impression: Tensor  # float32 [B, E]
    has_findings: Tensor  # bool [B]
    has_impression: Tensor  # bool [B]
    step: int  # the global step this batch belongs to: seeds the channel draws alike on every rank
    # float32 [B, V, draws] where images are whole radiographs [B, 1, 1, H, W], of which the device is to make the views
    draws: Tensor | None = None
    tokens: Tokens | None = (
        None  # for a text encoder that runs in training; findings and impression stay the clinical prior
    )

    def to(self, device: torch.device) -> "Batch":
        moved = {name: v.to(device, non_blocking=True) for name, v in self._asdict().items() if isinstance(v, Tensor)}
        tokens = self.tokens and self.tokens.to(device)
        # what draws say of the views is worked out on the CPU
        return self._replace(**{**moved, "draws": self.draws, "tokens": tokens})

    def split(self, parts: int) -> list["Batch"]:
        """So many consecutive parts, as equal as they can be, all of the same step."""
        rows = {name: v for name, v in self._asdict().items() if isinstance(v, (list, Tensor))}
        ends = [len(self.keys) * part // parts for part in range(parts + 1)]
        return [
            self._replace(
                **{name: v[start:stop] for name, v in rows.items()},
                tokens=self.tokens and self.tokens.of_reports(start, stop),
            )
            for start, stop in pairwise(ends)
        ]


class Features(NamedTuple):
    """What the model makes of a batch; every embedding has unit norm and is float32."""

    image_impression: Tensor  # [B, V, D]
    image_findings: Tensor | None  # [B, V, D], first channel draw; None where the model has no findings branch
    view_findings: Tensor | None  # [B, V, D], second channel draw, for the view-to-view term
    text_impression: Tensor  # [B, D]
    text_findings: Tensor  # [B, D]
    temperature: Tensor | None = None  # [1], of images against texts; None where it is a constant

    @staticmethod
    def join(parts: Sequence["Features"]) -> "Features":
        """The whole batch from its parts. Each part's temperature has an equal share in the gradient."""
        columns = zip(*parts, strict=True)
        whole = Features(*(None if column[0] is None else torch.cat(column) for column in columns))  # type: ignore[arg-type]
        if whole.temperature is None:
            return whole
        return whole._replace(temperature=whole.temperature.mean(dim=0, keepdim=True))


class Losses(NamedTuple):
    """Float32 scalars; total is the weighted sum of the four others."""

    total: Tensor
    image_impression: Tensor
    image_findings: Tensor
    views_impression: Tensor
    views_findings: Tensor


class LabeledBatch(NamedTuple):
    """One micro-batch of a labelled collection, for fine-tuning and its measurement. L labels, M masks."""

    keys: list[str]
    images: Tensor  # uint8 [B, 1, H, W]
    labels: Tensor  # int8 [B, L]: 1, 0, or -1, which no loss and no metric counts
    masks: Tensor  # uint8 [B, M, H, W]: 1 inside, 0 outside, IGNORED where nobody says; M = 0 where the task needs none
    boxes: list[Tensor]  # of each image, float32 [n, 4]: x1, y1, x2, y2 in pixels of `images`
    box_labels: list[Tensor]  # of each image, int64 [n], counted from 0
    step: int

    def to(self, device: torch.device) -> "LabeledBatch":
        images, labels, masks = (v.to(device, non_blocking=True) for v in (self.images, self.labels, self.masks))
        boxes, box_labels = ([v.to(device) for v in several] for several in (self.boxes, self.box_labels))
        return self._replace(images=images, labels=labels, masks=masks, boxes=boxes, box_labels=box_labels)
