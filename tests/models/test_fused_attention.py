"""Attention goes through torch's fused kernel, not through a matrix of weights; seen by a profiler, in training."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from imitate_ds.config import AggregationConfig, ModelConfig
from imitate_ds.models.aggregation import HierarchicalAggregation
from imitate_ds.models.image_encoder import ImageEncoder


def operations(work) -> dict[str, int]:
    """How often each operation was called, of all that is called on the way."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    return {event.key: event.count for event in seen.key_averages()}


@pytest.mark.parametrize("mask_padding", [True, False])
def test_aggregation(mask_padding):
    block = HierarchicalAggregation([8, 8], AggregationConfig(keep=(1, 1), pool=4, slots=32, mask_padding=mask_padding))
    levels = [torch.rand(2, 8, 4, 4), torch.rand(2, 8, 4, 4)]
    called = operations(lambda: block(levels, 0).sum().backward())
    assert called["aten::scaled_dot_product_attention"] == 1
    assert "aten::softmax" not in called
    assert "aten::_softmax" not in called


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_224"])
def test_image_encoders(name):
    model = ImageEncoder(ModelConfig(image_encoder=name), 64).train()
    pixels = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    called = operations(lambda: model(pixels))
    blocks = sum(type(module).__name__.endswith("Attention") for module in model.modules())
    assert called["aten::scaled_dot_product_attention"] == blocks > 0
    assert "aten::softmax" not in called


def test_layer_norm_is_one_kernel():
    model = ImageEncoder(ModelConfig(image_encoder="test_vit"), 64).train()
    called = operations(lambda: model(torch.zeros(1, 1, 64, 64, dtype=torch.uint8)))
    norms = sum(isinstance(module, torch.nn.LayerNorm) for module in model.modules())
    assert called["aten::native_layer_norm"] == norms > 0
