"""Boxes, by the head of YOLOv3 on the last three levels of an encoder: the detector of the reference protocol.

"YOLOv3: An Incremental Improvement" (Redmon and Farhadi, 2018), sections 2.1 to 2.3; what is matched with what, terms and
weights as in the protocol of MGCA ("Multi-Granularity Cross-modal Alignment for Generalized Medical Visual Representation
Learning", Wang et al., 2022). As there, and not as in the paper, a box has an anchor on every level. Not as there, an anchor
with a box is never background too, and IoU is of the boxes as they are, not of boxes one cell larger.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate, softplus
from torchvision.ops import batched_nms

from imitate_ds.batch import LabeledBatch
from imitate_ds.heads.detection import Found
from imitate_ds.heads.pyramid import Pyramid

# Width and height, in pixels of a square of 416, from the coarsest level to the finest; found on COCO.
ANCHORS = (
    ((116, 90), (156, 198), (373, 326)),
    ((30, 61), (62, 45), (59, 119)),
    ((10, 13), (16, 30), (33, 23)),
)
SQUARE = 416
BOX = 5  # outputs of an anchor before its classes: x, y, width, height, objectness
IGNORED_FROM = 0.5  # an anchor that is not a box's best, but overlaps it by more, is no background
BACKGROUND = 0.5  # weight of an anchor without box in the term of objectness
WEIGHTS = {"xy": 2.5, "wh": 2.5, "objectness": 1.0, "classes": 1.0}
LARGEST = 4.0  # of log(side / anchor's side): e**4 times the smallest anchor is more than the image
SLOPE = 0.1  # of LeakyReLU
LEAST_WIDTH = 16
LEAST_SCORE = 0.02  # as the other detectors; objectness times class
CANDIDATES = 1000  # of an image, the surest, that suppression looks at
SUPPRESSED_FROM = 0.5  # IoU with a surer box of the same class
MOST = 100


class _Outputs(NamedTuple):
    size: tuple[int, int]
    maps: list[Tensor]  # float32 [B, 3, h, w, BOX + classes], from the coarsest level to the finest


class _Matches(NamedTuple):
    """Of n boxes on one level: the anchor each has, what it is to say, and the anchors that are near."""

    cells: Tensor  # int64 [n, 2]: column, row
    best: Tensor  # int64 [n]
    xy: Tensor  # [n, 2]: of the centre, from the cell's corner, in cells
    wh: Tensor  # [n, 2]: log(side / anchor's side)
    near: Tensor  # bool [n, 3]: anchors of that cell that the box overlaps by more than IGNORED_FROM


class YoloHead(nn.Module):
    """An image without boxes is one in which everything is background.

    width: channels between the convolutions of the coarsest level; the next has half of it, the finest a quarter. 0 is a quarter
    of the encoder's last level: for a ResNet-50 the 512 of the reference.
    """

    anchors: Tensor

    def __init__(self, channels: Sequence[int], reductions: Sequence[int], classes: int, *, width: int = 0):
        super().__init__()
        count = len(ANCHORS)
        if len(channels) < count:
            raise ValueError(
                f"task.head = 'yolov3': needs {count} levels, the encoder has {len(channels)}; take retinanet"
            )
        width = width or max(LEAST_WIDTH, channels[-1] // 4)
        widths = [width // 2**i for i in range(count)]
        self.pyramid = Pyramid(channels[-count:], reductions[-count:])
        above = [0, *(each // 2 for each in widths[:-1])]  # channels that come down from the coarser level
        inputs = [own + more for own, more in zip(reversed(self.pyramid.channels), above, strict=True)]
        self.necks = nn.ModuleList(map(_neck, inputs, widths))
        self.down = nn.ModuleList(_block(one, more, 1) for one, more in zip(widths, above[1:], strict=False))
        outputs = len(ANCHORS[0]) * (BOX + classes)
        self.answers = nn.ModuleList(
            nn.Sequential(_block(each, 2 * each, 3), nn.Conv2d(2 * each, outputs, kernel_size=1)) for each in widths
        )
        # Whole pixels: a cast of the model to 16 bits leaves them as they are.
        self.register_buffer("anchors", torch.tensor(ANCHORS), persistent=False)

    def forward(self, levels: list[Tensor], size: tuple[int, int]) -> _Outputs:
        maps: list[Tensor] = []
        coarser: list[Tensor] = []
        for i, level in enumerate(reversed(self.pyramid(levels[-len(ANCHORS) :]))):
            # To the size that the level has: of sides that do not divide by 32 it is not twice the coarser one.
            above = [interpolate(self.down[i - 1](x), size=level.shape[-2:], mode="nearest") for x in coarser]
            coarser = [self.necks[i](torch.cat([*above, level], dim=1))]
            said = self.answers[i](coarser[0]).float()
            maps.append(said.unflatten(1, (len(ANCHORS[0]), -1)).permute(0, 1, 3, 4, 2))
        return _Outputs(size, maps)

    def sums(self, outputs: _Outputs, batch: LabeledBatch) -> dict[str, Tensor]:
        """Of each term, over levels, the mean over the anchors of an image, summed over images; the number of images.

        So the mean over images is the reference's mean over all anchors of the batch, and no image's share depends on another.
        """
        images = torch.cat([labels.new_full((len(labels),), i) for i, labels in enumerate(batch.box_labels)])
        boxes = torch.cat(batch.boxes).to(outputs.maps[0].dtype)
        terms = []
        for said, anchors in zip(outputs.maps, self._anchors(outputs), strict=True):
            matches = _match(boxes, anchors, tuple(said.shape[2:4]), outputs.size)
            terms.append(_terms(said, images, matches, torch.cat(batch.box_labels)))
        sums = {name: torch.stack([each[name] for each in terms]).sum() for name in WEIGHTS}
        return {**sums, "images": boxes.new_tensor(len(batch.boxes))}

    def combine(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean over images of each term, and their weighted sum."""
        terms = {name: sums[name] / sums["images"] for name in WEIGHTS}
        return {"loss": torch.stack([WEIGHTS[name] * value for name, value in terms.items()]).sum(), **terms}

    def predict(self, outputs: _Outputs) -> list[Found]:
        """Boxes of each image, the surest first, MOST at most."""
        pairs = zip(outputs.maps, self._anchors(outputs), strict=True)
        boxes = torch.cat([_decode(said, anchors, outputs.size).flatten(1, 3) for said, anchors in pairs], dim=1)
        said = torch.cat([each.flatten(1, 3) for each in outputs.maps], dim=1).sigmoid()
        scores = said[..., BOX - 1 : BOX] * said[..., BOX:]
        return [_surest(*each) for each in zip(boxes, scores, strict=True)]

    def _anchors(self, outputs: _Outputs) -> list[Tensor]:
        """Of each level [3, 2], as shares of the image's width and height."""
        return list(self.anchors.to(outputs.maps[0].dtype) / SQUARE)


def _block(channels: int, width: int, kernel: int) -> nn.Sequential:
    convolution = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.LeakyReLU(SLOPE))


def _neck(channels: int, width: int) -> nn.Sequential:
    """The five convolutions before a level's answer; the finer level takes what comes out of them."""
    pairs = [block for _ in range(2) for block in (_block(width, 2 * width, 3), _block(2 * width, width, 1))]
    return nn.Sequential(_block(channels, width, 1), *pairs)


def _match(boxes: Tensor, anchors: Tensor, grid: tuple[int, ...], size: tuple[int, int]) -> _Matches:
    """boxes [n, 4] in pixels, anchors [3, 2]. The anchor is the one of most IoU, both laid on the same centre."""
    places = _scaled((boxes[:, :2] + boxes[:, 2:]) / 2, grid[1] / size[1], grid[0] / size[0])
    last = torch.cat([places.new_full((len(boxes), 1), side - 1) for side in (grid[1], grid[0])], dim=1)
    cells = places.floor().clamp(min=0).minimum(last)  # a centre on the image's far edge is in the last cell
    sides = _scaled(boxes[:, 2:] - boxes[:, :2], 1 / size[1], 1 / size[0])[:, None]
    common = sides.minimum(anchors).prod(dim=2)
    overlaps = common / (sides.prod(dim=2) + anchors.prod(dim=1) - common)
    best = overlaps.argmax(dim=1)
    logs = (sides[:, 0] / anchors[best]).log()
    return _Matches(cells.long(), best, places - cells, logs, overlaps > IGNORED_FROM)


def _terms(said: Tensor, images: Tensor, matches: _Matches, labels: Tensor) -> dict[str, Tensor]:
    """The four terms of one level, each over the number of its anchors in an image; boxes that share an anchor all count."""
    columns, rows = matches.cells.unbind(dim=1)
    mine = said[images, matches.best, rows, columns]
    one = torch.ones_like(matches.xy[:, 0])
    # Counted, not set: the same whatever the order in which boxes of one cell are written.
    taken = torch.zeros_like(said[..., 0]).index_put((images, matches.best, rows, columns), one, accumulate=True) > 0
    each = torch.arange(matches.near.shape[1], device=said.device)
    cells = (images[:, None], each[None], rows[:, None], columns[:, None])
    near = torch.zeros_like(said[..., 0]).index_put(cells, matches.near.to(said.dtype), accumulate=True) > 0
    sure = said[..., BOX - 1]
    objectness = torch.where(taken, softplus(-sure), torch.where(near, 0.0, BACKGROUND * softplus(sure)))
    classes = said.shape[-1] - BOX
    wanted = (labels[:, None] == torch.arange(classes, device=said.device)).to(said.dtype)
    terms = {
        "xy": binary_cross_entropy_with_logits(mine[:, :2], matches.xy, reduction="sum"),
        "wh": (mine[:, 2 : BOX - 1] - matches.wh).square().sum(),
        "objectness": objectness.sum(),
        "classes": binary_cross_entropy_with_logits(mine[:, BOX:], wanted, reduction="sum") / classes,
    }
    return {name: value / said[0, ..., 0].numel() for name, value in terms.items()}


def _decode(said: Tensor, anchors: Tensor, size: tuple[int, int]) -> Tensor:
    """Boxes [B, 3, h, w, 4] in pixels, cut at the image's edges."""
    height, width = said.shape[2:4]
    rows, columns = (torch.arange(side, device=said.device, dtype=said.dtype) for side in (height, width))
    cells = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=2)
    centres = _scaled(said[..., :2].sigmoid() + cells, size[1] / width, size[0] / height)
    sides = anchors[:, None, None] * said[..., 2 : BOX - 1].clamp(max=LARGEST).exp()
    sides = _scaled(sides, size[1], size[0])
    low, high = (_cut(corner, size) for corner in (centres - sides / 2, centres + sides / 2))
    return torch.cat([low, high], dim=-1)


def _scaled(pairs: Tensor, x: float, y: float) -> Tensor:
    return torch.stack([pairs[..., 0] * x, pairs[..., 1] * y], dim=-1)


def _cut(points: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.stack([points[..., 0].clamp(0, size[1]), points[..., 1].clamp(0, size[0])], dim=-1)


def _surest(boxes: Tensor, scores: Tensor) -> Found:
    """Of boxes [n, 4] and scores [n, classes] those that no surer box of the same class suppresses."""
    classes = scores.shape[1]
    values, places = scores.flatten().topk(min(CANDIDATES, scores.numel()))
    values, places = values[values > LEAST_SCORE], places[values > LEAST_SCORE]
    boxes, labels = boxes[places // classes], places % classes
    kept = batched_nms(boxes, values, labels, SUPPRESSED_FROM)[:MOST]
    return Found(boxes[kept], values[kept], labels[kept])
