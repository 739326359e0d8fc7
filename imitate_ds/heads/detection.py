"""Boxes, by torchvision's RetinaNet or FCOS over a feature pyramid of the encoder's levels.

"Focal Loss for Dense Object Detection" (Lin et al., 2017); "FCOS: Fully Convolutional One-Stage Object Detection" (Tian et
al., 2019).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from imitate_ds.batch import LabeledBatch
from imitate_ds.heads.pyramid import Pyramid

OCTAVE = (1.0, 2 ** (1 / 3), 2 ** (2 / 3))  # anchors of a level, as in RetinaNet
FINEST = 8  # pixels of a cell of the finest level that is searched


class Found(NamedTuple):
    """What a detector says of one image: boxes float32 [n, 4], x1 y1 x2 y2 in its pixels, scores [n], labels int64 [n]."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


class _Outputs(NamedTuple):
    size: tuple[int, int]
    maps: list[Tensor]
    heads: dict[str, Tensor]


class DetectionHead(nn.Module):
    """kind: retinanet or fcos. An image without boxes is one in which everything is background."""

    def __init__(
        self,
        channels: Sequence[int],
        reductions: Sequence[int],
        classes: int,
        *,
        kind: str = "retinanet",
        width: int = 128,
    ):
        super().__init__()
        self.pyramid = Pyramid(channels, reductions, finest=FINEST)
        strides = [*self.pyramid.reductions, 2 * self.pyramid.reductions[-1]]
        self.fpn = FeaturePyramidNetwork(self.pyramid.channels, width, extra_blocks=LastLevelMaxPool())
        self.detector = _detector(kind, strides, classes, width)

    def forward(self, levels: list[Tensor], size: tuple[int, int]) -> _Outputs:
        maps = list(self.fpn({str(i): level for i, level in enumerate(self.pyramid(levels))}).values())
        return _Outputs(size, maps, {name: value.float() for name, value in self.detector.head(maps).items()})

    def sums(self, outputs: _Outputs, batch: LabeledBatch) -> dict[str, Tensor]:
        """The terms of the detector, each normalised within its image, and the number of images."""
        anchors = self._anchors(outputs)
        more = (self._anchors_by_level(outputs),) if isinstance(self.detector, FCOS) else ()
        each = []
        for i, (boxes, labels) in enumerate(zip(batch.boxes, batch.box_labels, strict=True)):
            heads = {name: value[i : i + 1] for name, value in outputs.heads.items()}
            target: dict[str, Any] = {"boxes": boxes.float(), "labels": labels}
            each.append(self.detector.compute_loss([target], heads, anchors[i : i + 1], *more))
        # Without boxes a term reaches no parameter, but all ranks must have all gradients.
        nothing = sum(0 * value.sum() for value in outputs.heads.values())
        sums = {name: torch.stack([terms[name] for terms in each]).sum() + nothing for name in each[0]}
        return {**sums, "images": nothing.new_tensor(len(each))}  # type: ignore[union-attr]

    def combine(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean over images of each term, and their sum."""
        terms = {name: value / sums["images"] for name, value in sums.items() if name != "images"}
        return {"loss": torch.stack(list(terms.values())).sum(), **terms}

    def predict(self, outputs: _Outputs) -> list[Found]:
        """Boxes of each image, the surest first."""
        counts = self._anchors_by_level(outputs)
        heads = {name: list(value.split(counts, dim=1)) for name, value in outputs.heads.items()}
        anchors = [list(each.split(counts)) for each in self._anchors(outputs)]
        sizes = [outputs.size] * len(anchors)
        found = self.detector.postprocess_detections(heads, anchors, sizes)
        return [Found(each["boxes"], each["scores"], each["labels"]) for each in found]

    def _anchors(self, outputs: _Outputs) -> list[Tensor]:
        count, (height, width) = len(outputs.maps[0]), outputs.size
        nothing = outputs.maps[0].new_zeros((), dtype=torch.float32)  # bfloat16 would round anchors by pixels
        maps = [
            nothing.expand(level.shape) for level in outputs.maps
        ]  # of which only the shape is read, and so of images
        images = ImageList(nothing.expand(count, 1, height, width), [outputs.size] * count)
        return self.detector.anchor_generator(images, maps)

    def _anchors_by_level(self, outputs: _Outputs) -> list[int]:
        each = self.detector.anchor_generator.num_anchors_per_location()
        return [one * level.shape[2] * level.shape[3] for one, level in zip(each, outputs.maps, strict=True)]


def _detector(kind: str, strides: list[int], classes: int, width: int) -> RetinaNet | FCOS:
    """Its backbone and its own resizing are never called: levels come from outside, in the image's pixels."""
    backbone = nn.Identity()
    backbone.out_channels = width  # type: ignore[assignment]
    if kind == "fcos":
        anchors = AnchorGenerator(tuple((stride,) for stride in strides), ((1.0,),) * len(strides))
        return FCOS(backbone, classes, anchor_generator=anchors, score_thresh=0.02)
    sizes = tuple(tuple(4 * stride * share for share in OCTAVE) for stride in strides)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(strides))  # type: ignore[arg-type]
    return RetinaNet(backbone, classes, anchor_generator=anchors, score_thresh=0.02)
