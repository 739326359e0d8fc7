"""From an export of pre-training to a model for a task, at another input size, and whatever was frozen on the way."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from imitate_ds.config import ModelConfig, RunConfig, build_run_config
from imitate_ds.finetune_config import EncoderConfig, TaskConfig, build_finetune_config
from imitate_ds.hub import load_model, save_pretrained
from imitate_ds.models.image_encoder import ImageEncoder
from imitate_ds.models.imitate import ImitateModel
from imitate_ds.predictor import Origin, build_task_model, read_origin

CARD = {"data": "phantom", "synthetic": True, "image_size": 64}
KINDS = {
    "classification": TaskConfig(kind="classification"),
    "unet": TaskConfig(kind="segmentation"),
    "fpn": TaskConfig(kind="segmentation", head="fpn"),
    "retinanet": TaskConfig(kind="detection"),
    "yolov3": TaskConfig(kind="detection", head="yolov3"),
}


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> tuple[Path, RunConfig]:
    """A ViT for 64 pixels that reads one channel, whose stem was frozen."""
    model = {
        "image_encoder": "test_vit3",
        "in_chans": 1,
        "freeze": ["patch_embed.*"],
        "joint_dim": 16,
        "text_hidden": 16,
        "projection_norm": "layer",
        "aggregation": {"pool": 4},
    }
    config = build_run_config({"name": "t", "data": {"shards": "x", "input_size": 64}, "model": model})
    torch.manual_seed(0)
    network = ImitateModel(config.model, 24, input_size=64)
    assert {name for name, p in network.named_parameters() if not p.requires_grad} == {
        "image_encoder.backbone.model.patch_embed.proj.weight",
        "image_encoder.backbone.model.patch_embed.proj.bias",
    }
    folder = tmp_path_factory.mktemp("predictor") / "export"
    save_pretrained(network, folder, config=config, text_encoder_folder=None, card=CARD)
    return folder, config


def test_one_channel_is_written_and_comes_back(export):
    folder, _ = export
    assert json.loads((folder / "config.json").read_text())["model"]["in_chans"] == 1
    assert "`timm.create_model`, with `in_chans=1`" in (folder / "README.md").read_text()
    network = timm.create_model("test_vit3", in_chans=1, img_size=64)
    missing, unexpected = network.load_state_dict(load_file(folder / "image_encoder.safetensors"), strict=False)
    assert unexpected == []
    assert all(name.startswith(("norm.", "attn_pool.", "fc_norm.", "head.")) for name in missing)
    model = load_model(folder)
    pixels = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    rows = torch.nn.functional.normalize(torch.randn(2, 16), dim=1)
    assert model.encode_image(pixels, branch="findings").shape == (2, 16)
    assert model.ground_rows(pixels, rows, "findings").shape == (2, 64, 64)
    assert all(parameter.requires_grad for parameter in model.model.parameters())


def test_an_export_from_before_these_settings_reads_three_channels(export, tmp_path):
    _, config = export
    old = config.model_copy(update={"model": config.model.model_copy(update={"in_chans": 3, "freeze": ()})})
    network = ImitateModel(old.model, 24, input_size=64).eval()
    save_pretrained(network, tmp_path / "old", config=old, text_encoder_folder=None, card=CARD)
    settings = json.loads((tmp_path / "old" / "config.json").read_text())
    for added in ("in_chans", "freeze"):
        del settings["model"][added]
    (tmp_path / "old" / "config.json").write_text(json.dumps(settings))
    pixels = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8)
    assert torch.equal(load_model(tmp_path / "old").model.encode_image(pixels)[0], network.encode_image(pixels)[0])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_every_head_takes_an_export_at_another_input_size(export, kind):
    encoder = EncoderConfig(init=str(export[0]), train="full")
    model = build_task_model(read_origin(encoder), encoder, KINDS[kind], 2, input_size=96).eval()
    assert "pre-trained at 64: made at another input size; interpolated: pos_embed [1, 17, 96]" in model.encoder.remark
    assert all(parameter.requires_grad for parameter in model.parameters())
    images = torch.randint(0, 256, (2, 1, 96, 96), dtype=torch.uint8)
    model.head.predict(model.head(model.encoder(images), (96, 96)))


def test_an_export_whose_positions_timm_cannot_interpolate_is_refused_at_another_input_size():
    model = ModelConfig(image_encoder="convit_tiny")
    origin = Origin(model, 64, ImageEncoder(model, 64).state_dict(), {})
    rule = (
        r"data.input_size = 96: convit_tiny, pre-trained at 64: 1 weights of another shape \(model.pos_embed \[1, 16, 192\], "
        r"not \[1, 36, 192\]\), .* set data.input_size to what they were made at"
    )
    with pytest.raises(ValueError, match=rule):
        build_task_model(origin, EncoderConfig(init="x"), KINDS["classification"], 2, input_size=96)


def test_what_is_for_pre_training_is_refused_in_fine_tuning():
    values = {"name": "x", "data": {"shards": "s"}, "task": {"kind": "classification"}}
    model = {"image_encoder": "resnet10t", "freeze": ["conv1*"]}
    with pytest.raises(ValueError, match=r"model\.freeze = \['conv1\*'\]: is for pre-training"):
        build_finetune_config({**values, "encoder": {"model": model}})
    with pytest.raises(ValueError, match=r"optim\.layer_decay = 0\.5: is for pre-training; .* encoder\.layer_decay"):
        build_finetune_config(
            {**values, "encoder": {"model": {"image_encoder": "resnet10t"}}, "optim": {"layer_decay": 0.5}}
        )
