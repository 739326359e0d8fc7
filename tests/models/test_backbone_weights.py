"""Weights made for another input size or other channels: brought to this encoder as timm does it; all else is refused."""

import re

import pytest
import timm
import torch
from safetensors.torch import save_file

from imitate_ds.config import AggregationConfig, ModelConfig
from imitate_ds.models.image_encoder import ImageEncoder
from imitate_ds.models.timm_network import outline, plain_name, timm_names

# name, size the weights were made at, size of the encoder, what is interpolated
MADE_ELSEWHERE = [
    ("vit_tiny_patch16_224", 64, 48, r"pos_embed \[1, 17, 192\] to \[1, 10, 192\]"),
    (
        "vit_small_patch14_reg4_dinov2",
        56,
        70,
        r"pos_embed \[1, 16, 384\] to \[1, 25, 384\]",
    ),  # its registers have no place
    ("eva02_tiny_patch14_224", 56, 42, r"pos_embed \[1, 17, 192\] to \[1, 10, 192\]"),
    ("swin_tiny_patch4_window7_224", 224, 96, r"relative_position_bias_table \[169, 12\] to \[121, 12\]"),
]


def encoder(name: str, size: int, **settings) -> ImageEncoder:
    return ImageEncoder(ModelConfig(image_encoder=name, **settings), size).eval()


def pixels(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 1, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "made_at", "size", "said"), MADE_ELSEWHERE)
def test_positions_of_another_input_size_are_interpolated_as_timm_does_it(name, made_at, size, said, tmp_path):
    state = timm.create_model(name, num_classes=0, img_size=made_at).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    ours = encoder(name, size, weights=str(tmp_path / "weights.safetensors"))
    options = {"num_classes": 0, "img_size": size, "pretrained": True, "pretrained_cfg_overlay": {"state_dict": state}}
    theirs = {plain_name(k): v for k, v in timm.create_model(name, **options).state_dict().items()}
    for key, tensor in ours.backbone.state_dict().items():
        torch.testing.assert_close(tensor, theirs[plain_name(key)], rtol=0, atol=0)
    assert re.search(rf"weights.safetensors': made at another input size; interpolated: .*{said}", ours.remark)
    with torch.no_grad():
        assert all(level.isfinite().all() for level in ours(pixels(size)))


def test_tables_that_do_not_depend_on_the_size_are_left_alone(tmp_path):
    """SwinV2 computes its biases from coordinates."""
    state = timm.create_model("swinv2_tiny_window8_256", num_classes=0, img_size=128).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    ours = encoder("swinv2_tiny_window8_256", 64, weights=str(tmp_path / "weights.safetensors"))
    assert ours.remark == ""
    given = {plain_name(name): tensor for name, tensor in state.items()}
    assert all(torch.equal(tensor, given[plain_name(name)]) for name, tensor in ours.backbone.state_dict().items())


def test_an_encoder_takes_the_weights_of_another_input_size_and_other_channels():
    small, large = encoder("test_vit3", 64), encoder("test_vit3", 96, in_chans=1)
    large.take_weights(small.state_dict(), given_by="data.input_size = 96: test_vit3, pre-trained at 64")
    assert large.remark == (
        "data.input_size = 96: test_vit3, pre-trained at 64: made at another input size; interpolated: pos_embed "
        "[1, 17, 96] to [1, 37, 96]"
    )
    block = "backbone.model.blocks.8.mlp.fc2.weight"
    assert torch.equal(large.state_dict()[block], small.state_dict()[block])
    stem = "backbone.model.patch_embed.proj.weight"
    torch.testing.assert_close(large.state_dict()[stem], small.state_dict()[stem].sum(dim=1, keepdim=True))


@pytest.mark.parametrize(
    ("name", "made_with", "in_chans"),
    [
        ("resnet10t", 3, 1),
        ("test_convnext", 1, 3),
        ("test_vit3", 3, 1),
        ("test_vit3", 1, 1),
        ("fastvit_t8", 3, 1),  # two convolutions read the pixels
    ],
)
@torch.no_grad()
def test_one_channel_gives_what_three_equal_ones_give(name, made_with, in_chans, tmp_path):
    torch.manual_seed(0)
    made = encoder(name, 64, in_chans=made_with)
    save_file(made.backbone.state_dict(), tmp_path / "weights.safetensors")
    read = encoder(name, 64, in_chans=in_chans, weights=str(tmp_path / "weights.safetensors"))
    assert read.remark == ""
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.float64, 1e-5)):  # kernels are summed in float32
        for level, other in zip(read.to(dtype)(pixels(64)), made.to(dtype)(pixels(64)), strict=True):
            torch.testing.assert_close(level, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


def test_what_no_interpolation_brings_together_is_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit3", num_classes=0, img_size=64, embed_dim=48).state_dict(), path)
    with pytest.raises(ValueError, match=r"weights of another shape \(.*cls_token|.*pos_embed \[1, .*, 48\], not"):
        encoder("test_vit3", 96, weights=str(path))
    state = timm.create_model("test_vit3", num_classes=0, img_size=64).state_dict()
    lacking = {name: tensor for name, tensor in state.items() if name != "blocks.3.norm1.weight"}
    save_file(lacking, path)
    with pytest.raises(ValueError, match=r"1 of \d+ weights are missing \(model.blocks.3.norm1.weight\)"):
        encoder("test_vit3", 96, weights=str(path))
    save_file(state | {"pos_embed": torch.zeros(1, 12, 96)}, path)  # of no square
    with pytest.raises(
        ValueError, match=r"1 weights of another shape \(model.pos_embed \[1, 12, 96\], not \[1, 37, 96\]"
    ):
        encoder("test_vit3", 96, weights=str(path))


@pytest.mark.parametrize(("name", "made_at", "size"), [("hiera_tiny_224", 224, 448), ("convit_tiny", 224, 96)])
def test_positions_that_timm_cannot_interpolate_are_refused_with_what_to_do(name, made_at, size, tmp_path):
    save_file(encoder(name, made_at).backbone.state_dict(), tmp_path / "weights.safetensors")
    rule = (
        r"weights.safetensors': 1 weights of another shape \(model.pos_embed \[.*\], not \[.*\]\), which timm cannot fit to "
        r"this backbone; set data.input_size to what they were made at"
    )
    with pytest.raises(ValueError, match=rule):
        encoder(name, size, weights=str(tmp_path / "weights.safetensors"))


def test_pretrained_positions_that_timm_cannot_interpolate_are_refused_with_their_size(tmp_path, monkeypatch):
    cached = tmp_path / "models--timm--convit_tiny.fb_in1k"
    (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    save_file(timm.create_model("convit_tiny").state_dict(), cached / "snapshots" / ("0" * 40) / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert encoder("convit_tiny", 224, weights="timm").remark == ""
    rule = r"model.weights = 'timm': timm cannot fit those of convit_tiny to 96 pixels; set data.input_size to 224"
    with pytest.raises(ValueError, match=rule):
        encoder("convit_tiny", 96, weights="timm")


# one with hooks in the whole network, one whose own body is flattened, one whose features are in an outer list
@pytest.mark.parametrize("name", ["pit_ti_224", "tresnet_m", "densenet121"])
def test_extractors_of_every_make_take_the_weights_of_the_network_and_of_one_another(name, tmp_path):
    settings = {"aggregation": AggregationConfig(keep=(0.1, 0.1, 0.1))}
    network = timm.create_model(name)
    save_file(network.state_dict(), tmp_path / "network.safetensors")
    first = encoder(name, 224, weights=str(tmp_path / "network.safetensors"), **settings)
    state = first.state_by_timm_name()
    assert all(torch.equal(tensor, network.state_dict()[key]) for key, tensor in state.items())
    assert not network.load_state_dict(state, strict=False).unexpected_keys
    second = encoder(name, 224, **settings)
    second.take_weights(first.state_dict(), given_by="x")
    assert all(torch.equal(tensor, state[key]) for key, tensor in second.state_by_timm_name().items())
    lacking = {key: tensor for key, tensor in network.state_dict().items() if key != next(iter(state))}
    save_file(lacking, tmp_path / "network.safetensors")
    with pytest.raises(ValueError, match=r"1 of \d+ weights are missing"):
        encoder(name, 224, weights=str(tmp_path / "network.safetensors"), **settings)


def test_a_feature_extractor_of_another_network_has_no_names():
    with pytest.raises(RuntimeError, match=r"such as stem_0.weight, have no name in the network"):
        timm_names(encoder("convnext_atto", 64).backbone, outline(ModelConfig(image_encoder="resnet10t"), 64))


def test_a_backbone_that_cannot_read_one_channel_is_refused():
    with pytest.raises(ValueError, match=r"model.in_chans = 1: csatv2 has no first convolution .* must be 3"):
        encoder("csatv2", 64, in_chans=1)
    name = "naflexvit_base_patch16_gap"
    with pytest.raises(ValueError, match=rf"model.in_chans = 1: {name} reads pixels by no convolution"):
        encoder(name, 64, in_chans=1, weights="timm")
