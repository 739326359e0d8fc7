"""Linear layers in 8 bits (trained with DeepSpeed: benchmarks/speedups.py and its test)."""

import sys

import pytest
import torch
from torch import Tensor

from imitate_ds.config import ModelConfig, build_run_config
from imitate_ds.models.float8 import use_float8
from imitate_ds.models.image_encoder import ImageEncoder

pytest.importorskip("torchao", reason="train.fp8 needs the extra fp8: pip install torchao")

CPU = torch.device("cpu")
PIXELS = torch.randint(0, 256, (3, 1, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def encoder(name: str, *, float8: bool, dtype: torch.dtype = torch.bfloat16) -> ImageEncoder:
    torch.manual_seed(0)
    model = ImageEncoder(ModelConfig(image_encoder=name), 64).to(dtype)
    if float8:
        use_float8(model.backbone, CPU)
    return model


def gradients(model: ImageEncoder) -> Tensor:
    sum(level.float().square().mean() for level in model(PIXELS)).backward()  # type: ignore[union-attr]
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", ["test_vit3", "test_convnext"])
def test_gradients_are_those_of_bf16_to_three_bits_of_mantissa(name):
    exact = gradients(encoder(name, float8=False, dtype=torch.float32))
    off = {float8: (gradients(encoder(name, float8=float8)) - exact).norm() / exact.norm() for float8 in (False, True)}
    assert off[False] < off[True] < 0.15  # e4m3 rounds to 1 in 16, and gradients to 1 in 8


def test_weights_keep_their_names_and_values():
    plain, float8 = (encoder("test_vit3", float8=asked).state_dict() for asked in (False, True))
    assert list(plain) == list(float8)
    assert all(torch.equal(plain[name], float8[name]) for name in plain)


def test_layers_that_float8_cannot_have_stay():
    class_names = [
        type(m).__name__ for m in encoder("test_vit3", float8=True).modules() if isinstance(m, torch.nn.Linear)
    ]
    assert set(class_names) == {"Float8Linear"}
    odd = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Linear(32, 16))
    assert use_float8(odd, CPU) == 1
    assert type(odd[0]) is torch.nn.Linear


def test_what_it_needs_is_said(monkeypatch):
    with pytest.raises(ValueError, match=r"train\.fp8 = True: this image encoder has no linear layers.*must be false"):
        use_float8(encoder("resnet10t", float8=False).backbone, CPU)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(
        ValueError, match=r"train\.fp8 = True: torchao is not installed: pip install 'imitate-ds\[fp8\]'"
    ):
        use_float8(encoder("test_vit3", float8=False).backbone, CPU)
    with pytest.raises(ValueError, match=r"train\.precision = 'fp32': must be bf16 with train\.fp8: true"):
        build_run_config({"name": "run", "data": {"shards": "here"}, "train": {"fp8": True}})
