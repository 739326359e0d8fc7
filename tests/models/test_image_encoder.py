import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from imitate_ds.config import AggregationConfig, ModelConfig
from imitate_ds.models.aggregation import HierarchicalAggregation
from imitate_ds.models.image_encoder import ImageEncoder, synchronise_batch_norm

PIXELS = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def encoder(name="resnet10t", input_size=64, **settings) -> ImageEncoder:
    return ImageEncoder(ModelConfig(image_encoder=name, **settings), input_size).eval()


# name, input size that is not its own, width and cell of each level
FAMILIES = [
    ("resnet10t", 96, [64, 128, 256, 512], [4, 8, 16, 32]),
    ("resnet18", 96, [64, 128, 256, 512], [4, 8, 16, 32]),
    ("convnext_atto", 96, [40, 80, 160, 320], [4, 8, 16, 32]),
    ("swin_tiny_patch4_window7_224", 96, [96, 192, 384, 768], [4, 8, 16, 32]),  # gives its maps channels last
    ("mobilenetv3_small_100", 96, [16, 24, 48, 576], [4, 8, 16, 32]),
    ("vit_tiny_patch16_224", 96, [192] * 4, [16] * 4),
    ("eva02_tiny_patch14_224", 70, [192] * 4, [14] * 4),
    ("vit_small_patch14_reg4_dinov2", 70, [384] * 4, [14] * 4),
]


@pytest.mark.parametrize(("name", "size", "channels", "reductions"), FAMILIES)
@torch.inference_mode()
def test_levels_from_fine_to_coarse(name, size, channels, reductions):
    """Of one channel and three alike, with 4 levels and with the last 2 or 3 of them."""
    images = torch.randint(0, 256, (2, 1, size, size), dtype=torch.uint8)
    for levels, in_chans in ((4, 3), (3, 1), (2, 1)):
        aggregation = AggregationConfig(keep=(0.2, 0.1, 0.1, 0.1)[-levels:], pool=4, heads=1)
        model = encoder(name, size, in_chans=in_chans, aggregation=aggregation)
        assert (model.channels, model.reductions) == (channels[-levels:], reductions[-levels:])
        found = model(images)
        assert [list(level.shape) for level in found] == [
            [2, c, size // r, size // r] for c, r in zip(model.channels, model.reductions, strict=True)
        ]
        rows = HierarchicalAggregation(model.channels, aggregation)(found, seed=0)
        assert rows.shape == (2, 16)


def test_one_grid_gives_blocks_at_even_distances():
    backbone = encoder("vit_tiny_patch16_224").backbone
    assert list(backbone.out_indices) == [2, 5, 8, 11]
    two = encoder("vit_tiny_patch16_224", aggregation=AggregationConfig(keep=(0.1, 0.1)))
    assert list(two.backbone.out_indices) == [5, 11]


@torch.inference_mode()
def test_pixels_are_scaled_to_one_and_then_normalised():
    model = encoder(image_mean=0.4, image_std=0.3)
    expected = model.backbone(((PIXELS.float() / 255 - 0.4) / 0.3).repeat(1, 3, 1, 1))
    for level, other in zip(model(PIXELS), expected, strict=True):
        torch.testing.assert_close(level, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("in_chans", [1, 3])
@torch.inference_mode()
def test_channels_last_gives_the_same_in_its_own_layout(in_chans):
    model = encoder(in_chans=in_chans)
    levels = model(PIXELS)
    assert levels[0].is_contiguous(memory_format=torch.channels_last)
    assert all(weight.is_contiguous() for weight in model.parameters())  # DeepSpeed broadcasts no others
    plain = model.backbone(((PIXELS.float() / 255 - 0.5) / 0.25).repeat(1, in_chans, 1, 1))
    for level, other in zip(levels, plain, strict=True):
        assert other.is_contiguous()
        torch.testing.assert_close(level, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("images", [PIXELS.float(), PIXELS[0], PIXELS.repeat(1, 3, 1, 1)])
def test_only_grey_bytes_are_taken(images):
    with pytest.raises(ValueError, match=re.escape("must be grey uint8 [B, 1, H, W], found")):
        encoder()(images)


@pytest.mark.parametrize("name", ["convnext_atto", "test_vit", "swin_tiny_patch4_window7_224"])
@torch.no_grad()
def test_drop_path_reaches_the_backbone_and_is_off_in_evaluation(name):
    model = encoder(name, drop_path=0.5)
    paths = [m for m in model.modules() if type(m).__name__ == "DropPath"]
    assert max(path.drop_prob for path in paths) == pytest.approx(0.5)
    assert torch.equal(model(PIXELS)[-1], model(PIXELS)[-1])
    paths[-1].train()  # alone: nothing else that varies
    assert not all(torch.equal(model(PIXELS)[-1], model(PIXELS)[-1]) for _ in range(8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "resnet_50"},
            r"model.image_encoder = 'resnet_50': not a backbone of timm .* did you mean .*resnet50",
        ),
        ({"name": "resnet18.nobody"}, r"model.image_encoder = 'resnet18.nobody': .*Invalid pretrained tag"),
        ({"name": "vgg11", "drop_path": 0.1}, r"model.drop_path = 0.1: vgg11 has no stochastic depth; must be 0"),
        (
            {"name": "convnext_atto", "aggregation": AggregationConfig(keep=(0.1,) * 6)},
            r"model.aggregation.keep = .*: convnext_atto has fewer than 6 levels",
        ),
    ],
)
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        encoder(**settings)


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@torch.inference_mode()
def test_weights_from_a_file_of_timms_classifier(name, suffix, tmp_path):
    size = {"img_size": 64} if name.startswith("vit") else {}
    state = timm.create_model(name, **size).state_dict()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    else:
        save_file(state, path)
    model = encoder(name, weights=str(path))
    loaded = {
        key.removeprefix("model.").replace(".", "_"): tensor for key, tensor in model.backbone.state_dict().items()
    }
    given = {key.replace(".", "_"): tensor for key, tensor in state.items()}
    assert all(torch.equal(tensor, given[key]) for key, tensor in loaded.items())


@torch.inference_mode()
def test_weights_from_the_feature_extractor_itself(tmp_path):
    model = encoder("convnext_atto")
    save_file(model.backbone.state_dict(), tmp_path / "own.safetensors")
    again = encoder("convnext_atto", weights=str(tmp_path / "own.safetensors"))
    assert torch.equal(model(PIXELS)[-1], again(PIXELS)[-1])


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    state = timm.create_model("resnet10t").state_dict()
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    with pytest.raises(
        ValueError, match=r"of another backbone: \d+ of \d+ weights are missing \(stem_0.weight, .*unknown"
    ):
        encoder("convnext_atto", weights=str(path))
    save_file(state | {"conv1.0.weight": torch.zeros(24, 2, 3, 3)}, path)
    shapes = r"1 weights of another shape \(conv1.0.weight \[24, 2, 3, 3\], not \[24, 3, 3, 3\]\)"
    with pytest.raises(ValueError, match=shapes):
        encoder(weights=str(path))
    with pytest.raises(FileNotFoundError, match=r"model.weights = 'none.pth': no such file"):
        encoder(weights="none.pth")


def test_a_file_that_is_more_than_tensors_is_not_opened(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": nn.Linear(2, 2)}, path)
    with pytest.raises(ValueError, match="more than plain tensors"):
        encoder(weights=str(path))
    path.write_bytes(b"not a file of weights")
    with pytest.raises(ValueError, match="damaged"):
        encoder(weights=str(path))
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="must map names to tensors"):
        encoder(weights=str(path))


def test_pretrained_weights_out_of_reach_say_what_to_do(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"model.weights = 'timm': no pretrained weights of resnet10t .* download"):
        encoder(weights="timm")


def test_synchronised_batch_norm_keeps_the_activations_fused_into_it():
    encoder = ImageEncoder(ModelConfig(image_encoder="mobilenetv3_small_050"))
    before = sum(isinstance(module, nn.Hardswish | nn.ReLU) for module in encoder.modules())
    encoder = synchronise_batch_norm(encoder)
    assert sum(isinstance(module, nn.Hardswish | nn.ReLU) for module in encoder.modules()) == before > 0
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in encoder.modules()) > 0
