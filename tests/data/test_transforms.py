import hashlib
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from imitate_ds.config import PRESETS, AugmentConfig, build_run_config
from imitate_ds.data import transforms
from imitate_ds.data.transforms import TrainViews, eval_view

OFF = AugmentConfig(crop_scale=(1.0, 1.0), rotation=0.0, autocontrast=0.0, brightness=0.0, contrast=0.0)
MIDDLE = torch.full((1, 1, transforms.DRAWS), 0.5)  # no angle, no jitter, no flip at p = 0.5


def off(**changes: object) -> AugmentConfig:
    """Everything switched off but this."""
    return OFF.model_copy(update=changes)


def smooth_images(count: int, height: int, width: int) -> Tensor:
    """Smooth pictures without symmetry, uint8 [count, 1, height, width]."""
    noise = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 255
    return torch.nn.functional.interpolate(noise, size=(height, width), mode="bicubic").clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def image() -> Tensor:
    """uint8 [1, 96, 96]."""
    return smooth_images(1, 96, 96)[0]


def views_of(image: Tensor, config: AugmentConfig, size: int, seed: int = 0) -> Tensor:
    """The views [V, 1, size, size] of one image [1, H, W]."""
    make = TrainViews(config, size)
    return make(image[None], make.draw([seed]))[0]


def paper() -> AugmentConfig:
    assert "paper" in PRESETS
    return build_run_config({"name": "x", "preset": "paper", "data": {"shards": "x"}}).data.augment


def everything() -> AugmentConfig:
    return paper().model_copy(update={"crop_scale": (0.3, 0.9), "brightness": 0.3, "contrast": 0.4})


@pytest.mark.parametrize("config", [AugmentConfig(), paper(), everything(), OFF])
@pytest.mark.parametrize("size", [31, 64, 128])
def test_two_views_of_the_right_shape(config, size):
    make = TrainViews(config, size)
    views = make(smooth_images(3, 96, 70), make.draw([1, 2, 3]))
    assert views.shape == (3, 2, 1, size, size)
    assert views.dtype == torch.uint8


@pytest.mark.parametrize("config", [AugmentConfig(), paper()])
def test_a_view_is_a_function_of_its_seed(image, config):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = views_of(image, config, 48, seed=2**63 - 1)
    assert torch.equal(torch.get_rng_state(), before), "the process's own generator must not move"
    torch.manual_seed(9)
    assert torch.equal(views_of(image, config, 48, seed=2**63 - 1), first)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(views_of(image, config, 48, seed=2), first)


@pytest.mark.parametrize("config", [AugmentConfig(), paper(), everything(), off(contrast=0.3)])
@pytest.mark.parametrize("size", [29, 64])
def test_a_view_does_not_depend_on_its_batch(config, size, monkeypatch):
    images, make = smooth_images(23, 150, 157), TrainViews(config, size)
    draws = make.draw(range(23))
    whole = make(images, draws)
    rng = torch.Generator().manual_seed(0)
    for count in (1, 2, 3, 7, 16, 22):
        some = torch.randperm(23, generator=rng)[:count]
        assert torch.equal(make(images[some], make.draw(some.tolist())), whole[some])
    for pixels in (1, 3 * 2 * size**2, 2**30):
        monkeypatch.setattr(transforms, "CHUNK_PIXELS", pixels)
        assert torch.equal(make(images, draws), whole), "nor on the chunks a batch is worked on in"
    for column in (0, 1):
        assert torch.equal(make(images, draws[:, column : column + 1]), whole[:, column : column + 1])


def test_a_view_does_not_depend_on_the_process_or_its_threads():
    text = """
import hashlib, torch
from imitate_ds.data.transforms import TrainViews
from tests.data.test_transforms import everything, smooth_images
torch.set_num_threads(torch.get_num_threads() + 1)
make = TrainViews(everything(), 57)
views = make(smooth_images(9, 90, 90), make.draw(range(9)))
print(hashlib.sha256(views.numpy().tobytes()).hexdigest())
"""
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-c", text], check=True, capture_output=True, text=True, cwd=root)
    make = TrainViews(everything(), 57)
    views = make(smooth_images(9, 90, 90), make.draw(range(9)))
    assert run.stdout.split()[-1] == hashlib.sha256(views.numpy().tobytes()).hexdigest()


def test_everything_off_is_the_evaluation_view(image):
    for size in (40, 96, 120):
        views = views_of(image, OFF, size, seed=5)
        assert torch.equal(views[0], eval_view(image, size))
        assert torch.equal(views[1], views[0])
    assert torch.equal(views_of(image, OFF, 96)[0], image), "and at its own size the image itself"


def test_a_crop_of_its_own_size_is_the_images_own_pixels():
    image = torch.randint(0, 256, (1, 256, 256), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    view = views_of(image, off(crop_scale=(0.7656, 0.7656)), 224)[0]
    windows = image[0].unfold(0, 224, 1).unfold(1, 224, 1)
    assert (windows == view[0]).all(dim=-1).all(dim=-1).sum() == 1, "the published 224 crop of 256 pixels"


def test_each_amount_does_its_own_thing(image):
    assert torch.equal(views_of(image, off(horizontal_flip=1.0), 96)[0], image.flip(-1))
    assert torch.equal(views_of(image, off(vertical_flip=1.0), 96)[0], image.flip(-2))
    stretched = views_of(image // 2 + 20, off(autocontrast=1.0), 96)[0]
    assert (stretched.amin().item(), stretched.amax().item()) == (0, pytest.approx(255, abs=1))
    for name in ("brightness", "contrast", "rotation", "perspective"):
        change = {name: 0.5 if name != "rotation" else 20.0, "perspective_p": 1.0}
        assert not torch.equal(views_of(image, off(**change), 96)[0], image), name
    assert torch.equal(views_of(image, off(perspective=0.5, perspective_p=0.0), 96)[0], image)


def test_a_setting_leaves_the_draws_of_others_alone(image):
    crop = off(crop_scale=(0.3, 0.6))
    both = crop.model_copy(update={"horizontal_flip": 1.0})
    assert torch.equal(views_of(image, both, 64, seed=4), views_of(image, crop, 64, seed=4).flip(-1))


def test_crop_keeps_the_share_and_the_aspect_asked_for():
    """Seen in ramps: two rows and two columns of a view tell where its crop begins and ends."""
    height, width, size = 200, 100, 100
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ramps = torch.stack((rows, columns))[:, None].to(torch.uint8)
    make = TrainViews(off(crop_scale=(0.2, 0.4)), size)
    draws = make.draw(range(100))
    down = torch.cat([make(ramps[:1], draw[None])[0, :, 0, :, 50] for draw in draws]).double()
    across = torch.cat([make(ramps[1:], draw[None])[0, :, 0, 50] for draw in draws]).double()
    tall, wide = ((places[:, -6] - places[:, 5]) * size / (size - 11) for places in (down, across))
    top, left = (places[:, 5] + 0.5 - side * 5.5 / size for places, side in ((down, tall), (across, wide)))
    share, aspect = tall * wide / (height * width), wide / tall
    assert 0.19 < share.min() < 0.21
    assert 0.39 < share.max() < 0.41
    assert share.mean() == pytest.approx(0.3, abs=0.015)
    assert 0.87 < aspect.min() < 0.93
    assert 1.07 < aspect.max() < 1.13
    assert top.min() < 5
    assert left.min() < 5
    assert (top + tall).max() > height - 5
    assert (left + wide).max() > width - 5
    assert (top + tall).max() <= height + 1
    assert (left + wide).max() <= width + 1


@pytest.mark.parametrize(
    "change", [{"horizontal_flip": 0.3}, {"vertical_flip": 0.3}, {"autocontrast": 0.3}, {"perspective": 0.5}]
)
def test_what_happens_by_chance_happens_to_that_share_of_views(image, change):
    dull = (image // 2 + 20)[None].expand(200, -1, -1, -1)
    make = TrainViews(off(perspective_p=0.3, **change), 96)
    changed = (make(dull, make.draw(range(200))) != dull[:, None]).flatten(2).any(dim=-1)
    assert changed.double().mean() == pytest.approx(0.3, abs=0.07)


@pytest.mark.parametrize(("name", "low", "high"), [("brightness", 60, 140), ("contrast", 60, 140)])
def test_jitter_is_even_around_one(name, low, high):
    half = torch.zeros(1, 32, 32, dtype=torch.uint8)
    half[:, 16:] = 200  # contrast moves both levels around their mean of 100
    image = half if name == "contrast" else torch.full_like(half, 100)
    make = TrainViews(off(**{name: 0.4}), 32)
    views = make(image.expand(300, 1, 32, 32), make.draw(range(300))).flatten(0, 1).double()
    amount = (views[:, 0, -1, 0] - views[:, 0, 0, 0]).div(2) if name == "contrast" else views[:, 0, 0, 0]
    inside = amount[amount < 100]  # above, the light half is clipped at 255
    assert low - 1 <= amount.min() < low + 3
    assert inside.mean() == pytest.approx((low + 100) / 2, abs=2)
    if name == "brightness":
        assert high - 4 < amount.max() <= high


def test_rotation_is_even_within_its_degrees():
    image = torch.zeros(1, 101, 101, dtype=torch.uint8)
    image[:, 49:52, 88:93] = 255  # right of the middle
    make = TrainViews(off(rotation=30.0), 101)
    views = make(image.expand(150, 1, 101, 101), make.draw(range(150))).flatten(0, 1)[:, 0].double()
    places = torch.arange(101) - 50.0
    x = (views.sum(dim=1) * places).sum(dim=1)
    y = (views.sum(dim=2) * places).sum(dim=1)
    degrees = torch.atan2(-y, x).rad2deg()
    assert -30.5 < degrees.min() < -28
    assert 28 < degrees.max() < 30.5
    assert degrees.mean() == pytest.approx(0, abs=3)
    assert degrees.abs().mean() == pytest.approx(15, abs=1.5)


def test_rotation_is_torchvisions(image):
    draws = MIDDLE.clone()
    draws[..., transforms.ANGLE] = 0.8
    mine = TrainViews(off(rotation=30.0), 96)(image[None], draws)[0, 0].int()
    theirs = F.rotate(image, 30.0 * 0.6, interpolation=InterpolationMode.BILINEAR, fill=0).int()
    assert (mine - theirs)[:, 20:76, 20:76].abs().max() <= 1
    assert (mine[0, 0, 0], mine[0, -1, -1]) == (0, 0), "outside is black"


def test_perspective_is_torchvisions(image):
    inward = [n / 48 for n in (5, 14, 10, 2, 19, 5, 12, 7)]  # whole pixels, which is what torchvision takes
    draws = MIDDLE.clone()
    draws[..., transforms.CORNERS] = torch.tensor(inward)
    mine = TrainViews(off(perspective=1.0, perspective_p=1.0), 96)(image[None], draws)[0, 0].int()
    corners = [[0, 0], [96, 0], [96, 96], [0, 96]]
    signs = [(1, 1), (-1, 1), (-1, -1), (1, -1)]
    moved = [
        [round(x + 48 * sx * dx), round(y + 48 * sy * dy)]
        for (x, y), (sx, sy), dx, dy in zip(corners, signs, inward[::2], inward[1::2], strict=True)
    ]
    theirs = F.perspective(image, corners, moved, interpolation=InterpolationMode.BILINEAR, fill=0).int()
    assert (mine - theirs)[:, 30:66, 30:66].abs().max() <= 1


def test_perspective_of_unmoved_corners_is_the_identity():
    assert torch.equal(torch.stack(transforms._perspective(torch.zeros(8, dtype=torch.float64))), torch.eye(3).double())


def reference_matrix(config: AugmentConfig, draw: list[float], height: int, width: int) -> np.ndarray:
    """From a pixel of a view to its place in the image, both with edges at -1 and 1: float64 [3, 3]."""
    low, high = config.crop_scale
    pixels = (low + (high - low) * draw[transforms.AREA]) * height * width
    ratio = 0.9 * (1.1 / 0.9) ** draw[transforms.SHAPE] if high > low else 1.0
    tall, wide = min(round(math.sqrt(pixels / ratio)), height), min(round(math.sqrt(pixels * ratio)), width)
    top = math.floor(draw[transforms.TOP] * (height - tall + 1))
    left = math.floor(draw[transforms.LEFT] * (width - wide + 1))
    crop = np.array(
        [
            [wide / width, 0, (2 * left + wide) / width - 1],
            [0, tall / height, (2 * top + tall) / height - 1],
            [0, 0, 1],
        ]
    )
    mirror = -1 if draw[transforms.MIRROR] < config.horizontal_flip else 1
    overturn = -1 if draw[transforms.OVERTURN] < config.vertical_flip else 1
    angle = math.radians(config.rotation * (2 * draw[transforms.ANGLE] - 1))
    turn = np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])
    tilt = np.eye(3)
    if draw[transforms.TILT] < config.perspective_p:
        corners = [(-1, -1), (1, -1), (1, 1), (-1, 1)]
        inward = np.array(draw[transforms.CORNERS]).reshape(4, 2) * config.perspective
        rows, places = [], []
        for (u, v), (dx, dy) in zip(corners, inward, strict=True):
            x, y = u * (1 - dx), v * (1 - dy)
            rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
            places += [u, v]
        tilt = np.append(np.linalg.solve(rows, places), 1).reshape(3, 3)
    return crop @ np.diag([mirror, overturn, 1]) @ turn @ tilt


def reference_view(image: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """Every pixel of the view looked up in image [H, W] between its four neighbours; black outside. float64."""
    height, width = image.shape
    framed = np.zeros((height + 2, width + 2))
    framed[1:-1, 1:-1] = image
    centres = (np.arange(size) + 0.5) / size * 2 - 1
    x, y, w = np.tensordot(matrix, np.stack((*np.meshgrid(centres, centres), np.ones((size, size)))), axes=1)
    column = np.clip(((x / w + 1) * width - 1) / 2, -1, width) + 1
    row = np.clip(((y / w + 1) * height - 1) / 2, -1, height) + 1
    i, j = (np.minimum(place.astype(int), side) for place, side in ((row, height), (column, width)))
    down, right = row - i, column - j
    above = framed[i, j] * (1 - right) + framed[i, j + 1] * right
    below = framed[i + 1, j] * (1 - right) + framed[i + 1, j + 1] * right
    return above * (1 - down) + below * down


@pytest.mark.parametrize("config", [AugmentConfig(), paper(), everything()])
@pytest.mark.parametrize(("height", "width", "size"), [(61, 61, 37), (64, 53, 65), (33, 47, 96)])
def test_the_look_up_is_that_of_a_plain_reference(config, height, width, size):
    config = config.model_copy(update={"autocontrast": 0.0, "brightness": 0.0, "contrast": 0.0})
    make, images = TrainViews(config, size), smooth_images(12, height, width)
    if min(height, width) > make.decode_side * transforms.SLACK:
        images = F.resize(images, [make.decode_side, make.decode_side * max(height, width) // min(height, width)])
    draws = make.draw(range(12))
    views = make(images, draws)
    wrong = 0
    for image, found, draw in zip(images, views, draws.tolist(), strict=True):
        for k in range(2):
            expected = reference_view(image[0].numpy(), reference_matrix(config, draw[k], *image.shape[1:]), size)
            difference = np.abs(found[k, 0].numpy() - expected)
            assert difference.max() < 0.6
            wrong += (difference > 0.51).sum()
    assert wrong < 1e-4 * views.numel()


def test_shading_is_torchvisions(image):
    config = off(autocontrast=1.0, brightness=0.4, contrast=0.4)
    make = TrainViews(config, 96)
    images = torch.stack((image // 2 + 20, image, torch.full_like(image, 7))).repeat(10, 1, 1, 1)
    draws = make.draw(range(30))
    differences = []
    for source, views, pair in zip(images, make(images, draws), draws.tolist(), strict=True):
        for view, draw in zip(views, pair, strict=True):
            expected = F.adjust_brightness(F.autocontrast(source), 1 + 0.4 * (2 * draw[transforms.BRIGHTNESS] - 1))
            expected = F.adjust_contrast(expected, 1 + 0.4 * (2 * draw[transforms.CONTRAST] - 1))
            differences.append((view.int() - expected.int()).abs())
    found = torch.stack(differences).view(10, 3, -1)
    assert found.max() <= 1, "theirs multiplies and adds with one rounding"
    assert found[:, :2].double().mean() < 1e-3


def test_a_constant_image_stays_finite():
    assert (views_of(torch.full((1, 40, 40), 7, dtype=torch.uint8), off(autocontrast=1.0), 32) == 7).all()


def test_the_wildest_perspective_stays_finite():
    """Corners moved to the middle put the horizon across the view."""
    make = TrainViews(off(perspective=1.0, perspective_p=1.0), 16)
    white = torch.full((2000, 1, 16, 16), 255, dtype=torch.uint8)
    draws = make.draw(range(2000))
    assert make._move(white, make._plans(draws, 16, 16)).isfinite().all()


def test_a_large_image_is_shrunk_before_it_is_looked_up():
    stripes = torch.zeros(1, 1, 512, 512, dtype=torch.uint8)
    stripes[..., ::2] = 255
    make = TrainViews(off(crop_scale=(0.6, 1.0), rotation=10.0), 64)
    middle = make(stripes, make.draw([0]))[..., 20:44, 20:44].double()
    assert middle.std() < 3, "stripes finer than a pixel average out"
    assert middle.mean() == pytest.approx(127.5, abs=3)


@pytest.mark.parametrize(
    ("crop_scale", "side"), [((1.0, 1.0), 224), ((0.7656, 0.7656), 256), ((0.6, 1.0), 289), ((0.1, 1.0), 448)]
)
def test_decode_side_holds_the_smallest_crop(crop_scale, side):
    assert TrainViews(off(crop_scale=crop_scale), 224).decode_side == side


def test_eval_view_shows_the_whole_image_antialiased():
    stripes = torch.zeros(1, 128, 128, dtype=torch.uint8)
    stripes[:, ::2] = 255
    small = eval_view(stripes, 32)
    assert small.shape == (1, 32, 32)
    assert small[:, 2:-2].float().std() < 3, "stripes finer than a pixel average out"
    assert eval_view(torch.zeros(1, 90, 40, dtype=torch.uint8), 32).shape == (1, 32, 32)


@pytest.mark.parametrize("config", [AugmentConfig(), paper(), everything(), OFF])
@pytest.mark.parametrize("side", [96, 300])
def test_all_work_is_done_where_the_images_are(config, side):
    """On a device without data, which refuses to meet tensors of another."""
    make = TrainViews(config, 64)
    views = make(torch.empty(5, 1, side, side, dtype=torch.uint8, device="meta"), make.draw(range(5)))
    assert (views.device.type, views.shape, views.dtype) == ("meta", (5, 2, 1, 64, 64), torch.uint8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("config", [AugmentConfig(), paper(), everything(), OFF])
@pytest.mark.parametrize(("side", "size"), [(96, 65), (300, 64)])
def test_views_of_a_gpu_are_those_of_the_cpu(config, side, size):
    images, make = smooth_images(9, side, side), TrainViews(config, size)
    draws = make.draw(range(9))
    mine, theirs = make(images, draws), make(images.cuda(), draws)
    assert theirs.is_cuda
    difference = (mine.int() - theirs.cpu().int()).abs()
    assert (difference > 2).double().mean() < 1e-3, "a level apart before autocontrast is more behind it"
    some = torch.tensor([7, 2, 5])
    assert torch.equal(make(images[some].cuda(), draws[some]), theirs[some.cuda()])
