"""Every head on the levels of real encoders: shapes, what does not count, losses by their definition, and that it learns."""

import math
from typing import Any

import pytest
import torch

from imitate_ds.batch import IGNORED, LabeledBatch
from imitate_ds.config import ModelConfig
from imitate_ds.heads.classification import ClassificationHead
from imitate_ds.heads.detection import DetectionHead
from imitate_ds.heads.pyramid import Pyramid
from imitate_ds.heads.segmentation import SegmentationHead
from imitate_ds.heads.yolo import YoloHead
from imitate_ds.models.image_encoder import ImageEncoder

pytestmark = pytest.mark.slow

SIZE = 64


def encoder(name: str = "resnet10t", size: int = SIZE) -> ImageEncoder:
    torch.manual_seed(0)
    return ImageEncoder(ModelConfig(image_encoder=name), size).eval()


def batch(size: tuple[int, int] = (SIZE, SIZE), count: int = 2, **given) -> LabeledBatch:
    """Plain and striped squares on black: of each image one mask, one box, and one of two labels, by its stripes."""
    images = torch.zeros(count, 1, *size, dtype=torch.uint8)
    masks = torch.zeros(count, 1, *size, dtype=torch.uint8)
    boxes, box_labels = [], []
    for i in range(count):
        top, left = 8 + 16 * (i % 2), 8
        images[i, :, top : top + 24, left : left + 24] = 200
        images[i, :, top : top + 24 * (i % 2) : 4, left : left + 24] = 0
        masks[i, :, top : top + 24, left : left + 24] = 1
        boxes.append(torch.tensor([[left, top, left + 24, top + 24]], dtype=torch.float32))
        box_labels.append(torch.tensor([i % 2]))
    labels = torch.tensor([[1, 0], [0, 1]], dtype=torch.int8).repeat(-(-count // 2), 1)[:count]
    made = LabeledBatch([str(i) for i in range(count)], images, labels, masks, boxes, box_labels, 0)
    return made._replace(**given)


def detector(kind: str, backbone: ImageEncoder, classes: int = 2, width: int = 32) -> DetectionHead | YoloHead:
    if kind == "yolov3":
        return YoloHead(backbone.channels, backbone.reductions, classes, width=width)
    return DetectionHead(backbone.channels, backbone.reductions, classes, kind=kind, width=width)


def loss_of(head, outputs, made: LabeledBatch) -> dict[str, torch.Tensor]:
    return head.combine(head.sums(outputs, made))


def learn(head, made: LabeledBatch, backbone: ImageEncoder, steps: int, lr: float) -> tuple[float, float, Any]:
    """The first and the last loss, and what is then predicted, with a frozen encoder."""
    with torch.no_grad():
        levels = backbone(made.images)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        loss = loss_of(head, head(levels, tuple(made.images.shape[-2:])), made)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    head.eval()
    with torch.no_grad():
        return losses[0], losses[-1], head.predict(head(levels, tuple(made.images.shape[-2:])))


@pytest.mark.parametrize("hidden", [0, 16])
@pytest.mark.parametrize("exclusive", [False, True])
def test_classification_learns(hidden, exclusive):
    backbone = encoder()
    head = ClassificationHead(backbone.channels, 2, hidden=hidden, exclusive=exclusive)
    first, last, shares = learn(head, batch(), backbone, steps=300, lr=5e-3)
    assert last < first
    assert torch.equal(shares > 0.5, batch().labels == 1)


def test_labels_that_are_not_known_do_not_count():
    torch.manual_seed(0)
    head = ClassificationHead([4], 3)
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, -1, 0], [-1, -1, 0]], dtype=torch.int8)
    loss = loss_of(head, logits, batch(labels=labels))["loss"]
    known = [(0, 0, 1), (0, 2, 0), (1, 2, 0)]
    by_hand = [-math.log(torch.sigmoid(logits[i, j] if y else -logits[i, j]).item()) for i, j, y in known]
    assert loss.item() == pytest.approx(sum(by_hand) / 3, rel=1e-6)
    loss.backward()
    assert logits.grad is not None
    assert (logits.grad[labels < 0] == 0).all()
    assert (logits.grad[labels >= 0] != 0).all()


def test_of_exclusive_classes_a_sample_without_one_does_not_count():
    head = ClassificationHead([4], 3, exclusive=True)
    logits = torch.randn(2, 3, requires_grad=True)
    labels = torch.tensor([[0, 1, 0], [0, 0, 0]], dtype=torch.int8)
    loss = loss_of(head, logits, batch(labels=labels))["loss"]
    assert loss.item() == pytest.approx(-logits[0].log_softmax(0)[1].item(), rel=1e-5)
    loss.backward()
    assert logits.grad is not None
    assert (logits.grad[1] == 0).all()


@pytest.mark.parametrize("kind", ["linear", "exclusive", "masks"])
def test_a_batch_that_says_nothing_gives_zero_with_a_graph(kind):
    nothing = batch(
        labels=torch.full((2, 2), -1, dtype=torch.int8), masks=torch.full((2, 1, 8, 8), IGNORED, dtype=torch.uint8)
    )
    if kind == "masks":
        head, outputs = SegmentationHead([8] * 4, [4, 8, 16, 32], 1), torch.randn(2, 1, 8, 8, requires_grad=True)
    else:
        head, outputs = ClassificationHead([4], 2, exclusive=kind == "exclusive"), torch.randn(2, 2, requires_grad=True)
    loss = loss_of(head, outputs, nothing)["loss"]
    loss.backward()
    assert loss.item() == 0
    assert outputs.grad is not None
    assert (outputs.grad == 0).all()


@pytest.mark.parametrize("decoder", ["unet", "fpn"])
@pytest.mark.parametrize(("name", "size"), [("resnet10t", (97, 131)), ("test_vit", (160, 160))])
def test_masks_have_the_size_of_the_image(decoder, name, size):
    backbone = encoder(name, size[0])
    head = SegmentationHead(backbone.channels, backbone.reductions, 3, decoder=decoder).eval()
    with torch.no_grad():
        shares = head.predict(head(backbone(batch(size).images), size))
    assert shares.shape == (2, 3, *size)
    assert shares.min() >= 0
    assert shares.max() <= 1


def test_segmentation_learns():
    backbone = encoder()
    head = SegmentationHead(backbone.channels, backbone.reductions, 1)
    first, last, shares = learn(head, batch(), backbone, steps=60, lr=3e-3)
    inside = batch().masks == 1
    dice = 2 * (inside & (shares > 0.5)).sum() / (inside.sum() + (shares > 0.5).sum())
    assert last < 0.5 * first
    assert dice > 0.9


def test_the_loss_of_masks_is_the_published_one_where_it_is_known():
    torch.manual_seed(0)
    head = SegmentationHead([8] * 4, [4, 8, 16, 32], 2)
    logits = torch.randn(2, 2, 5, 7, dtype=torch.float64, requires_grad=True)
    masks = torch.randint(0, 3, (2, 2, 5, 7), dtype=torch.uint8)
    terms = loss_of(head, logits, batch(masks=masks))
    known = masks != IGNORED
    share = logits.detach().sigmoid()
    right = torch.where(masks == 1, share, 1 - share)
    focal = ((1 - right) ** 2 * -right.log())[known].mean()
    dices = []
    for i in range(2):
        p, t = share[:, i][known[:, i]], (masks[:, i][known[:, i]] == 1).double()
        dices.append((2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1))
    log_dice = -torch.stack(dices).log().mean()
    assert terms["loss"].item() == pytest.approx((10 * focal + log_dice).item(), rel=1e-6)
    terms["loss"].backward()
    assert logits.grad is not None
    assert (logits.grad[~known] == 0).all()


@pytest.mark.parametrize("kind", ["retinanet", "fcos", "yolov3"])
def test_detection_learns(kind):
    backbone = encoder()
    torch.manual_seed(0)
    head = detector(kind, backbone)
    made = batch()
    _, last, found = learn(head, made, backbone, steps=200, lr=1e-3)
    assert math.isfinite(last)
    for i, each in enumerate(found):
        assert each.labels[0] == made.box_labels[i][0]
        assert (each.boxes[0] - made.boxes[i][0]).abs().max() < 4  # pixels


@pytest.mark.parametrize("kind", ["retinanet", "fcos", "yolov3"])
@pytest.mark.parametrize("name", ["resnet10t", "test_vit"])
def test_an_image_without_boxes_is_background(kind, name):
    backbone = encoder(name, 160)
    head = detector(kind, backbone)
    empty = batch((160, 160), boxes=[torch.zeros(0, 4)] * 2, box_labels=[torch.zeros(0, dtype=torch.int64)] * 2)
    with torch.no_grad():
        levels = backbone(empty.images)
    outputs = head(levels, (160, 160))
    terms = loss_of(head, outputs, empty)
    terms["loss"].backward()
    assert terms["loss"] > 0
    assert all(parameter.grad is not None for parameter in head.parameters())
    found = head.predict(outputs)
    assert len(found) == 2
    assert all(((each.boxes >= 0) & (each.boxes <= 160)).all() for each in found)


def test_levels_of_one_grid_become_a_pyramid():
    pyramid = Pyramid([6, 6, 6, 6], [16, 16, 16, 16])
    levels = pyramid([torch.zeros(1, 6, 10, 10) for _ in range(4)])
    assert [level.shape[-1] for level in levels] == [40, 20, 10, 5]
    assert pyramid.reductions == [4, 8, 16, 32]
    halving = Pyramid([6, 6], [8, 16])
    assert halving.reductions == [8, 16]
    assert [*halving.parameters()] == []


@pytest.mark.parametrize("kind", ["linear", "exclusive", "unet", "retinanet", "fcos", "yolov3"])
def test_sums_of_parts_add_up_to_those_of_the_whole(kind):
    """So the loss of ranks that hold different numbers of samples is that of one process."""
    torch.manual_seed(0)
    backbone, made = encoder(), batch(count=3)
    made.labels[0, 0] = -1 if kind == "linear" else made.labels[0, 0]
    made.masks[1, :, :20] = IGNORED
    made = made._replace(
        boxes=[made.boxes[0][:0], *made.boxes[1:]], box_labels=[made.box_labels[0][:0], *made.box_labels[1:]]
    )
    head = {
        "linear": lambda: ClassificationHead(backbone.channels, 2),
        "exclusive": lambda: ClassificationHead(backbone.channels, 2, exclusive=True),
        "unet": lambda: SegmentationHead(backbone.channels, backbone.reductions, 1),
    }.get(kind, lambda: detector(kind, backbone, width=64))().eval()

    def sums(rows: slice) -> dict[str, torch.Tensor]:
        part = LabeledBatch(*(values[rows] for values in made[:-1]), step=made.step)  # type: ignore[arg-type]
        return head.sums(head(backbone(part.images), (SIZE, SIZE)), part)

    with torch.no_grad():
        whole, parts = sums(slice(None)), (sums(slice(0, 1)), sums(slice(1, 3)))
        for name, value in whole.items():
            torch.testing.assert_close(parts[0][name] + parts[1][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
def test_anchors_are_exact_in_half_precision(kind):
    backbone = encoder()
    head = DetectionHead(backbone.channels, backbone.reductions, 2, kind=kind, width=64).eval()
    size = (224, 224)
    with torch.no_grad():
        levels = backbone(batch(size).images)
        exact = head._anchors(head(levels, size))
        with torch.autocast("cpu", torch.bfloat16):
            rounded = head._anchors(head(levels, size))
    for one, other in zip(exact, rounded, strict=True):
        assert other.dtype == torch.float32
        assert torch.equal(one, other)
