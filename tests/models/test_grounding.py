"""Grounding maps: what they add up to, that each stands for itself, and that they are where the change is."""

import pytest
import torch
from torch.nn.functional import normalize

from imitate_ds.config import build_run_config
from imitate_ds.models.grounding import contributions, grounding_maps, sum_levels
from imitate_ds.models.imitate import ImitateModel

SIZE = 64


def _model(backbone="resnet10t", findings=True):
    values = {
        "name": "t",
        "data": {"shards": "none", "input_size": SIZE},
        "model": {
            "image_encoder": backbone,
            "joint_dim": 16,
            "text_hidden": 16,
            "aggregation": {"pool": 4, "eval_draws": 2, "enabled": findings},
        },
    }
    if not findings:
        values["objective"] = {"weights": {"image_findings": 0.0, "views_findings": 0.0}}
    torch.manual_seed(0)
    return ImitateModel(build_run_config(values).model, 8, input_size=SIZE).eval()


@pytest.fixture(scope="module")
def model():
    return _model()


def _images(n, seed=0):
    return torch.randint(0, 256, (n, 1, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def _texts(n, seed=0):
    return normalize(torch.randn(n, 16, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("branch", ["impression", "findings"])
def test_embeddings_of_levels_are_those_of_images(model, branch):
    images = _images(3)
    with torch.no_grad():
        wanted = dict(zip(("impression", "findings"), model.encode_image(images)[:2], strict=True))[branch]
        torch.testing.assert_close(model.embed_levels(model.image_encoder(images), branch), wanted)


@pytest.mark.parametrize("branch", ["impression", "findings"])
def test_the_mean_of_a_map_before_its_cut_is_the_change_of_the_cosine(model, branch):
    """A step from what is usual so small that the first order is all of it."""
    texts = _texts(2)
    with torch.no_grad():
        levels = model.image_encoder(_images(2))
        usual = [level.mean(dim=0) for level in levels]
        levels = [(u + 0.002 * (level - u)) for level, u in zip(levels, usual, strict=True)]
        start = model.embed_levels([u[None].expand(2, -1, -1, -1) for u in usual], branch)
        change = ((model.embed_levels(levels, branch) - start) * texts).sum(dim=1)
    parts = contributions(model, levels, texts, branch, usual, (SIZE, SIZE))
    torch.testing.assert_close(parts.mean(dim=(1, 2)), change, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("branch", ["impression", "findings"])
def test_a_map_does_not_depend_on_the_others_and_leaves_no_gradient(model, branch):
    images, texts = _images(4), _texts(4)
    usual = [level / 3 for level in sum_levels(model, _images(3, seed=9))]
    maps = grounding_maps(model, images, texts, branch, usual)
    assert maps.shape == (4, SIZE, SIZE)
    assert maps.dtype == torch.float32
    assert maps.min() >= 0
    assert maps.max() > 0
    alone = torch.cat([grounding_maps(model, images[i : i + 1], texts[i : i + 1], branch, usual) for i in range(4)])
    torch.testing.assert_close(maps, alone, atol=1e-5, rtol=1e-3)
    assert all(weight.grad is None for weight in model.parameters())
    assert not maps.requires_grad


def test_another_text_gives_another_map(model):
    images = _images(1)
    first, second = (grounding_maps(model, images, _texts(1, seed), "findings") for seed in (1, 2))
    assert (first - second).abs().max() > 1e-3 * first.max()


def test_what_is_as_usual_is_nowhere_on_the_map(model):
    images = _images(1)
    usual = sum_levels(model, images)
    for branch in ("impression", "findings"):
        assert grounding_maps(model, images, _texts(1), branch, usual).max() < 1e-6


def test_what_differs_from_usual_at_one_place_is_found_there(model):
    plain = torch.full((1, 1, SIZE, SIZE), 100, dtype=torch.uint8)
    marked = plain.clone()
    marked[..., 8:20, 40:52] = 250
    usual = sum_levels(model, plain)
    with torch.no_grad():  # the text that the change moves towards
        rows = [model.encode_image(images)[1] for images in (marked, plain)]
    heat = grounding_maps(model, marked, normalize(rows[0] - rows[1], dim=1), "findings", usual)[0]
    y, x = divmod(int(heat.argmax()), SIZE)
    assert 0 <= y < 28
    assert 32 <= x < 60


def test_a_backbone_with_one_grid_and_one_with_channels_last_have_maps_too():
    for backbone in ("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"):
        model = _model(backbone)
        for branch in ("impression", "findings"):
            maps = grounding_maps(model, _images(2), _texts(2), branch)
            assert maps.shape == (2, SIZE, SIZE), backbone
            assert maps.isfinite().all(), backbone
            assert maps.max() > 0, backbone


def test_a_model_without_findings_branch_says_so():
    with pytest.raises(ValueError, match="branch = 'findings': this model has no findings branch"):
        grounding_maps(_model(findings=False), _images(1), _texts(1), "findings")
