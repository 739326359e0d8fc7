"""The head of YOLOv3 against its definition, written out anchor by anchor in float64."""

import math

import pytest
import torch
from torch import Tensor

from imitate_ds.batch import LabeledBatch
from imitate_ds.config import ModelConfig
from imitate_ds.finetune_config import TaskConfig
from imitate_ds.heads.yolo import YoloHead, _Outputs
from imitate_ds.models.image_encoder import ImageEncoder
from imitate_ds.predictor import build_head

# of YOLOv3's configuration for COCO at 416 px, from the coarsest level to the finest
COCO = [[(116, 90), (156, 198), (373, 326)], [(30, 61), (62, 45), (59, 119)], [(10, 13), (16, 30), (33, 23)]]
SIZE = (96, 160)
GRIDS = [(3, 5), (6, 10), (12, 20)]


def head_of(classes: int) -> YoloHead:
    return YoloHead([4, 4, 4], [8, 16, 32], classes, width=4)


def batch(boxes: list[list[list[float]]], labels: list[list[int]], size: tuple[int, int] = SIZE) -> LabeledBatch:
    count = len(boxes)
    images, nothing = torch.zeros(count, 1, *size, dtype=torch.uint8), torch.zeros(count, 0)
    there = [torch.tensor(each, dtype=torch.float64).reshape(-1, 4) for each in boxes]
    classes = [torch.tensor(each, dtype=torch.int64) for each in labels]
    return LabeledBatch([""] * count, images, nothing.to(torch.int8), nothing.byte(), there, classes, 0)


def encoded(box: list[float], level: int, grid: tuple[int, int], size: tuple[int, int]) -> tuple:
    """Row, column, IoU with each anchor, and for each anchor x, y, log w, log h."""
    (height, width), (rows, columns) = size, grid
    x, y = (box[0] + box[2]) / 2 / width * columns, (box[1] + box[3]) / 2 / height * rows
    w, h = box[2] - box[0], box[3] - box[1]
    overlaps, wanted = [], []
    for across, down in COCO[level]:
        a, b = across / 416 * width, down / 416 * height
        common = min(w, a) * min(h, b)
        overlaps.append(common / (w * h + a * b - common))
        wanted.append((x - int(x), y - int(y), math.log(w / a), math.log(h / b)))
    return int(y), int(x), overlaps, wanted


def entropy(logit: float, target: float) -> float:
    share = 1 / (1 + math.exp(-logit))
    return -target * math.log(share) - (1 - target) * math.log(1 - share)


def silent(grids: list[tuple[int, int]], classes: int) -> list[Tensor]:
    """Maps of one image in which nothing is found."""
    return [torch.full((1, 3, *grid, 5 + classes), -30.0, dtype=torch.float64) for grid in grids]


@pytest.mark.parametrize("level", [0, 1, 2])
@pytest.mark.parametrize("box", [[3.0, 5.0, 40.0, 81.0], [0.0, 0.0, 155.5, 95.0], [120.25, 60.0, 160.0, 96.0]])
@pytest.mark.parametrize(("size", "grids"), [(SIZE, GRIDS), ((97, 163), [(4, 6), (7, 11), (13, 21)])])
def test_a_box_that_is_encoded_is_decoded_exactly(level, box, size, grids):
    row, column, overlaps, wanted = encoded(box, level, grids[level], size)
    best = overlaps.index(max(overlaps))
    x, y, w, h = wanted[best]
    maps = silent(grids, 2)
    said = [math.log(x / (1 - x)), math.log(y / (1 - y)), w, h, 3.0, -30.0, 2.0]
    maps[level][0, best, row, column] = torch.tensor(said, dtype=torch.float64)
    head = head_of(2)
    (found,) = head.predict(_Outputs(size, maps))
    assert found.labels.tolist() == [1]
    assert found.boxes[0].tolist() == pytest.approx(box, abs=1e-9)
    assert found.scores.item() == pytest.approx(1 / (1 + math.exp(-3.0)) / (1 + math.exp(-2.0)), rel=1e-12)


def test_the_loss_is_its_definition():
    """Boxes that share an anchor, one that nearly fits two anchors, an image without any."""
    torch.manual_seed(0)
    classes = 3
    # of the middle level 30 x 61 and 59 x 119 in a square of 416: 42 x 84 overlaps both by more than a half
    between = [50.0, 30.0, 50.0 + 42 / 416 * 160, 30.0 + 84 / 416 * 96]
    boxes = [[between, [20.0, 20.0, 60.0, 60.0], [21.0, 19.0, 62.0, 60.0]], []]
    labels = [[2, 0, 1], []]
    maps = [torch.randn(2, 3, *grid, 5 + classes, dtype=torch.float64, requires_grad=True) for grid in GRIDS]
    head, made = head_of(classes), batch(boxes, labels)
    sums = head.sums(_Outputs(SIZE, maps), made)
    by_hand = dict.fromkeys(("xy", "wh", "objectness", "classes"), 0.0)
    ignored = 0
    for level, grid in enumerate(GRIDS):
        cells = 3 * grid[0] * grid[1]
        for image in range(2):
            taken, near = set(), set()
            for box, label in zip(boxes[image], labels[image], strict=True):
                row, column, overlaps, wanted = encoded(box, level, grid, SIZE)
                best = overlaps.index(max(overlaps))
                taken.add((best, row, column))
                near |= {(i, row, column) for i in range(3) if overlaps[i] > 0.5}
                said = maps[level][image, best, row, column].tolist()
                by_hand["xy"] += sum(entropy(said[i], wanted[best][i]) for i in (0, 1)) / cells
                by_hand["wh"] += sum((said[i] - wanted[best][i]) ** 2 for i in (2, 3)) / cells
                by_hand["classes"] += sum(entropy(said[5 + i], float(i == label)) for i in range(classes)) / 3 / cells
            for anchor in ((i, row, column) for i in range(3) for row in range(grid[0]) for column in range(grid[1])):
                sure = maps[level][(image, *anchor)][4].item()
                if anchor in taken:
                    by_hand["objectness"] += entropy(sure, 1.0) / cells
                elif anchor in near:
                    ignored += 1
                else:
                    by_hand["objectness"] += 0.5 * entropy(sure, 0.0) / cells
    assert ignored > 0
    assert sums["images"] == 2
    for name, value in by_hand.items():
        assert sums[name].item() == pytest.approx(value, rel=1e-12), name
    terms = head.combine(sums)
    weighted = 2.5 * by_hand["xy"] + 2.5 * by_hand["wh"] + by_hand["objectness"] + by_hand["classes"]
    assert terms["loss"].item() == pytest.approx(weighted / 2, rel=1e-12)
    terms["loss"].backward()
    rows, columns, *_ = encoded(between, 1, GRIDS[1], SIZE)
    gradient = maps[1].grad
    assert gradient is not None
    assert (gradient[0, 2, rows, columns] == 0).all()  # the anchor that is near: nothing is asked of it


@pytest.mark.parametrize("name", ["resnet10t", "test_convnext"])
def test_sides_that_do_not_divide_by_32(name):
    """Losses are float32 under autocast too, and every parameter has a finite gradient."""
    size = (97, 131)
    torch.manual_seed(0)
    encoder = ImageEncoder(ModelConfig(image_encoder=name), size[0]).eval()
    head = YoloHead(encoder.channels, encoder.reductions, 2, width=16)
    made = batch([[[101.0, 77.0, 131.0, 97.0]], []], [[1], []], size)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = head(encoder(made.images), size)
        loss = head.combine(head.sums(outputs, made))["loss"]
    assert {said.dtype for said in outputs.maps} == {loss.dtype} == {torch.float32}
    loss.backward()
    assert torch.isfinite(loss)
    assert all(parameter.grad is not None for parameter in head.parameters())
    assert all(torch.isfinite(parameter.grad).all() for parameter in head.parameters())


def test_a_hundred_at_most_the_surest_first_and_no_box_twice():
    torch.manual_seed(0)
    maps = [torch.randn(2, 3, *grid, 6) for grid in GRIDS]
    maps[2][..., 2:4] = -3  # small, so that few overlap
    for found in head_of(1).predict(_Outputs(SIZE, maps)):
        assert len(found.scores) == 100
        assert (found.scores.diff() <= 0).all()
    grids = silent(GRIDS, 2)
    grids[2][0, :, 4, 4, :4], grids[2][0, :, 4, 4, 4:] = 0.0, torch.tensor([2.0, 2.0, 1.0]).double()
    grids[2][0, 2, 4, 4, 2:4] = torch.tensor([10 / 33, 13 / 23]).log()  # as its anchor were the first
    (found,) = head_of(2).predict(_Outputs(SIZE, grids))
    assert found.labels.tolist() == [0, 0, 1, 1]  # two shapes of each class; the third is the first again


def test_it_is_built_by_its_name_as_wide_as_the_encoder():
    encoder = ImageEncoder(ModelConfig(image_encoder="resnet10t"))
    head = build_head(TaskConfig(kind="detection", head="yolov3"), encoder, 2)
    assert isinstance(head, YoloHead)
    with torch.device("meta"):
        widths = [neck[0][0].out_channels for neck in YoloHead([256, 512, 1024, 2048], [4, 8, 16, 32], 1).necks]  # type: ignore[index]
    assert widths == [512, 256, 128]
    assert [neck[0][0].out_channels for neck in head.necks] == [128, 64, 32]  # type: ignore[index]
    with pytest.raises(ValueError, match="needs 3 levels, the encoder has 2"):
        YoloHead([8, 16], [16, 32], 1)
