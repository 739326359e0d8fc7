"""Activation checkpointing: the same gradients, statistics and draws, from less that is kept (with DeepSpeed: test_engine.py)."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from imitate_ds.batch import Features
from imitate_ds.config import ModelConfig, ObjectiveConfig
from imitate_ds.models.encoder_parts import encoder_parts
from imitate_ds.models.image_encoder import ImageEncoder
from imitate_ds.models.imitate import ImitateModel
from imitate_ds.objective import imitate_loss
from imitate_ds.training.activation_checkpointing import checkpoint_activations
from imitate_ds.training.batch_norm import set_training_mode
from imitate_ds.training.grad_cache import backward_in_chunks
from tests.training.test_grad_cache import PlainEngine
from tests.training.zero_worker import MODEL, SIZE, TEXT_WIDTH, global_batch

PIXELS = torch.randint(0, 256, (2, 1, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
KINDS = ["none", "stage", "block"]


def encoder(name: str, kind: str, **settings) -> ImageEncoder:
    torch.manual_seed(0)
    model = ImageEncoder(ModelConfig(image_encoder=name, **settings), 64).train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # timm's zeros silence the branches
    if kind != "none":
        checkpoint_activations(encoder_parts(model, kind))  # type: ignore[arg-type]
    return model


def backward(model: ImageEncoder) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients and buffers after one step, and the bytes that the graph has kept."""
    kept: dict[int, int] = {}

    def keep(tensor):
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(5)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = sum(level.square().mean() for level in model(PIXELS))
    held = sum(kept.values())
    loss.backward()  # type: ignore[union-attr]
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {**found, **dict(model.named_buffers())}, held


@pytest.mark.parametrize(
    ("name", "kinds", "most"),
    [
        ("resnet26", ["stage", "block"], 0.5),
        ("convnext_atto", ["stage", "block"], 0.4),
        ("swin_tiny_patch4_window7_224", ["stage", "block"], 0.4),
        ("vit_tiny_patch16_224", ["block"], 0.25),
        ("mobilenetv3_small_100", ["stage", "block"], 0.75),
    ],
)
def test_same_gradients_and_statistics_from_less_that_is_kept(name, kinds, most):
    drop_path = 0.2 if name != "mobilenetv3_small_100" else 0.0
    expected, whole = backward(encoder(name, "none", drop_path=drop_path))
    names = [n for n, _ in encoder(name, "none").named_parameters()]
    for kind in kinds:
        model = encoder(name, kind, drop_path=drop_path)
        found, held = backward(model)
        assert list(dict(model.named_parameters())) == names
        assert held < most * whole, (kind, held / whole)
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            assert torch.equal(tensor, expected[key]), (kind, key)


def test_batch_norm_counts_a_step_once_and_evaluation_is_plain():
    model = encoder("resnet10t", "stage")
    backward(model)
    counters = [b for n, b in model.named_buffers() if n.endswith("num_batches_tracked")]
    assert counters
    assert all(counter == 1 for counter in counters)
    model.eval()
    plain = encoder("resnet10t", "none").eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(PIXELS), plain(PIXELS), strict=True))


@pytest.mark.parametrize("kind", ["stage", "block"])
def test_grad_cache_over_checkpoints_leaves_the_same_gradient(kind):
    batch, found = global_batch(0), []
    for checkpoints in ("none", kind):
        torch.manual_seed(0)
        config = ModelConfig.model_validate({**MODEL.model_dump(), "drop_path": 0.3, "projection_norm": "batch"})
        network = ImitateModel(config, TEXT_WIDTH, input_size=SIZE)
        if checkpoints != "none":
            checkpoint_activations(encoder_parts(network.image_encoder, checkpoints))
        set_training_mode(network, "mean")
        torch.manual_seed(3)

        def loss_of(features):
            losses = imitate_loss(features, batch, ObjectiveConfig())
            return losses.total, losses

        backward_in_chunks(PlainEngine(network), batch.split(2), Features.join, partial(loss_of))
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        found.append({**gradients, **dict(network.named_buffers())})
    plain, other = found
    assert plain.keys() == other.keys()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in other.items())


def test_parts_are_in_the_order_of_the_forward_pass():
    resnet = encoder("resnet26", "none")
    assert encoder_parts(resnet, "stage") == [getattr(resnet.backbone, f"layer{i}") for i in range(1, 5)]
    assert len(encoder_parts(resnet, "block")) == 8
    vit = encoder("vit_tiny_patch16_224", "none")
    assert len(encoder_parts(vit, "block")) == 12


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("vit_tiny_patch16_224", "stage", r"'stage': .* take block"),
        ("vgg11_bn", "stage", r"'stage': .* must be none"),
        ("vgg11_bn", "block", r"'block': .* must be none"),
    ],
)
def test_a_backbone_without_such_parts_is_refused(name, kind, message):
    settings = {"aggregation": {"keep": [0.1]}} if name.startswith("vgg") else {}
    config = ModelConfig.model_validate({"image_encoder": name, **settings})
    with torch.device("meta"):
        backbone = ImageEncoder(config, 64)
    with pytest.raises(ValueError, match=rf"train\.activation_checkpointing = {message}"):
        encoder_parts(backbone, kind)
