import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from imitate_ds.config import PRESETS, AugmentConfig, build_run_config
from imitate_ds.data.transforms import TrainViews, _perspective, eval_view

OFF = AugmentConfig(crop_scale=(1.0, 1.0), rotation=0.0, autocontrast=0.0, brightness=0.0, contrast=0.0)


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    """A smooth picture without symmetry, uint8 [1, 96, 96]."""
    noise = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 255
    return torch.nn.functional.interpolate(noise, size=(96, 96), mode="bicubic")[0].clamp(0, 255).to(torch.uint8)


def _paper() -> AugmentConfig:
    assert "paper" in PRESETS
    return build_run_config({"name": "x", "preset": "paper", "data": {"shards": "x"}}).data.augment


@pytest.mark.parametrize("config", [AugmentConfig(), _paper(), OFF])
@pytest.mark.parametrize("size", [32, 64, 128])
def test_two_views_of_the_right_shape(image, config, size):
    views = TrainViews(config, size)(image, seed=1)
    assert views.shape == (2, 1, size, size)
    assert views.dtype == torch.uint8


@pytest.mark.parametrize("config", [AugmentConfig(), _paper()])
def test_a_view_is_a_function_of_its_seed(image, config):
    make = TrainViews(config, 48)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = make(image, seed=2**63 - 1)
    assert torch.equal(torch.get_rng_state(), before), "the process's own generator must not move"
    torch.manual_seed(9)
    assert torch.equal(TrainViews(config, 48)(image, seed=2**63 - 1), first)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(make(image, seed=2), first)


def test_everything_off_is_the_evaluation_view(image):
    views = TrainViews(OFF, 40)(image, seed=5)
    assert torch.equal(views[0], eval_view(image, 40))
    assert torch.equal(views[1], views[0])


def test_each_amount_does_its_own_thing(image):
    plain = eval_view(image, 96)
    flipped = TrainViews(OFF.model_copy(update={"horizontal_flip": 1.0}), 96)(image, seed=0)
    assert torch.equal(flipped[0], plain.flip(-1))
    upside_down = TrainViews(OFF.model_copy(update={"vertical_flip": 1.0}), 96)(image, seed=0)
    assert torch.equal(upside_down[0], plain.flip(-2))
    stretched = TrainViews(OFF.model_copy(update={"autocontrast": 1.0}), 96)(image // 2 + 20, seed=0)
    assert (stretched.amin().item(), stretched.amax().item()) == (0, pytest.approx(255, abs=1))
    for name in ("brightness", "contrast", "rotation", "perspective"):
        change = {name: 0.5 if name != "rotation" else 20.0, "perspective_p": 1.0}
        assert not torch.equal(TrainViews(OFF.model_copy(update=change), 96)(image, seed=0)[0], plain), name


def test_a_setting_leaves_the_draws_of_others_alone(image):
    crop = OFF.model_copy(update={"crop_scale": (0.3, 0.6)})
    both = crop.model_copy(update={"horizontal_flip": 1.0})
    assert torch.equal(TrainViews(both, 64)(image, seed=4), TrainViews(crop, 64)(image, seed=4).flip(-1))


def test_crop_keeps_the_share_and_the_aspect_asked_for(monkeypatch):
    boxes = []
    real = F.resized_crop
    monkeypatch.setattr(F, "resized_crop", lambda image, *box, **kw: boxes.append(box[:4]) or real(image, *box, **kw))
    tall = torch.zeros(1, 200, 100, dtype=torch.uint8)
    for seed in range(100):
        TrainViews(OFF.model_copy(update={"crop_scale": (0.2, 0.4)}), 32)(tall, seed=seed)
    for top, left, height, width in boxes:
        assert 0.19 < height * width / 20000 < 0.41
        assert 0.88 < width / height < 1.12
        assert 0 <= top <= 200 - height
        assert 0 <= left <= 100 - width
    boxes.clear()
    TrainViews(OFF.model_copy(update={"crop_scale": (0.7656, 0.7656)}), 32)(torch.zeros(1, 256, 256).byte(), seed=0)
    assert [box[2:] for box in boxes] == [(224, 224)] * 2, "the published 224 crop of 256 pixels"


def test_rotation_is_torchvisions(image):
    make = TrainViews(OFF.model_copy(update={"rotation": 30.0}), 96)
    mine = make._warp(image, 0.8, 1.0, [0.0] * 8).int()
    theirs = F.rotate(image, 30.0 * 0.6, interpolation=InterpolationMode.BILINEAR, fill=0).int()
    assert (mine - theirs)[:, 20:76, 20:76].abs().max() <= 1
    assert (mine[0, 0, 0], mine[0, -1, -1]) == (0, 0), "outside is black"


def test_perspective_is_torchvisions(image):
    inward = [n / 48 for n in (5, 14, 10, 2, 19, 5, 12, 7)]  # whole pixels, which is what torchvision takes
    make = TrainViews(OFF.model_copy(update={"perspective": 1.0, "perspective_p": 1.0}), 96)
    mine = make._warp(image, 0.5, 0.0, inward).int()
    corners = [[0, 0], [96, 0], [96, 96], [0, 96]]
    signs = [(1, 1), (-1, 1), (-1, -1), (1, -1)]
    moved = [
        [round(x + 48 * sx * dx), round(y + 48 * sy * dy)]
        for (x, y), (sx, sy), dx, dy in zip(corners, signs, inward[::2], inward[1::2], strict=True)
    ]
    theirs = F.perspective(image, corners, moved, interpolation=InterpolationMode.BILINEAR, fill=0).int()
    assert (mine - theirs)[:, 30:66, 30:66].abs().max() <= 1


def test_perspective_of_unmoved_corners_is_the_identity():
    assert torch.allclose(_perspective([0.0] * 8), torch.eye(3), atol=1e-6)


def test_a_constant_image_stays_finite():
    views = TrainViews(AugmentConfig(autocontrast=1.0), 32)(torch.full((1, 40, 40), 7, dtype=torch.uint8), seed=0)
    assert views.dtype == torch.uint8


def test_eval_view_shows_the_whole_image_antialiased():
    stripes = torch.zeros(1, 128, 128, dtype=torch.uint8)
    stripes[:, ::2] = 255
    small = eval_view(stripes, 32)
    assert small.shape == (1, 32, 32)
    assert small[:, 2:-2].float().std() < 3, "stripes finer than a pixel average out"
    assert eval_view(torch.zeros(1, 90, 40, dtype=torch.uint8), 32).shape == (1, 32, 32)
