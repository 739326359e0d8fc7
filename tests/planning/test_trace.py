"""A traced step says what a real one does: bytes saved, operations, and that both are linear in the micro batch."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from imitate_ds.batch import Batch
from imitate_ds.config import ModelConfig
from imitate_ds.models.huggingface_encoder import TextShape
from imitate_ds.models.imitate import ImitateModel
from imitate_ds.planning.subject import _crowded, _step
from imitate_ds.planning.text import Lengths, PlannedText, PlannedTower
from imitate_ds.planning.trace import KINDS, Traces, trace_pair, trace_step
from tests.tiny_bert import tiny_bert

SMALL = {"image_encoder": "test_resnet", "joint_dim": 16, "text_hidden": 16}
LENGTHS = Lengths(8.0, 4.0, 4.0, 12, 12)
AGGREGATION = {"pool": 4, "slots": 128, "keep": [0.25, 0.25, 0.25, 0.25]}


def small_model(encoder: str = "test_resnet", text_width: int = 24) -> ImitateModel:
    config = ModelConfig(**{**SMALL, "image_encoder": encoder, "aggregation": AGGREGATION})
    return ImitateModel(config, text_width, input_size=32)


step = partial(_step, size=32, text_width=24)


def real_step(model: nn.Module, studies: int) -> torch.Tensor:
    texts, there = torch.randn(studies, 24), torch.ones(studies, dtype=torch.bool)
    images = torch.randint(0, 255, (studies, 2, 1, 32, 32), dtype=torch.uint8)
    features = model(Batch([""] * studies, images, texts, texts.clone(), there, there, 0))
    return torch.stack([rows.sum() for rows in features if rows is not None]).sum()


def test_saved_bytes_are_those_of_a_real_forward_pass() -> None:
    model = small_model().train()
    weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = real_step(model, 64)
    traced = trace_step(small_model().train(), step, 64)
    assert traced.saved == pytest.approx(
        sum(saved.values()), rel=0.02
    )  # the embeddings are alive too, though not saved
    assert total.requires_grad


def test_operations_are_those_that_torch_counts() -> None:
    model = small_model().train()
    with FlopCounterMode(display=False) as counter:
        real_step(model, 4).backward()
    traced = trace_step(small_model().train(), step, 4)
    assert traced.flops.sum() == pytest.approx(counter.get_total_flops(), rel=0.01)  # which knows no attention on a CPU


def test_any_micro_batch_lies_on_the_line_through_two() -> None:
    model = small_model().train()
    expected = trace_step(model, step, 10)
    found = trace_pair(model, step, (4, 8)).at(10)
    assert found.forward == expected.forward
    for column in ("live", "finished", "flops", "moved"):
        np.testing.assert_allclose(getattr(found, column), getattr(expected, column), rtol=1e-9)


def test_gradients_are_counted_apart_and_nothing_is_left() -> None:
    model = small_model().train()
    elements = sum(p.numel() for p in model.parameters())
    traced = trace_step(model, step, 4)
    assert traced.finished[-1] == 4 * elements
    assert traced.live[-1] < 0.02 * traced.live.max()
    assert traced.peak(1.0) > traced.peak() > traced.saved


def test_autocast_halves_what_is_saved_and_a_gpu_keeps_norms_wide() -> None:
    model = small_model("test_convnext").train()
    full = trace_step(model, step, 16)
    half = trace_step(model, step, 16, autocast=torch.bfloat16)
    as_cuda = trace_step(model, step, 16, autocast=torch.bfloat16, as_cuda=True)
    assert 0.45 < half.saved / full.saved < 0.75
    assert as_cuda.saved > half.saved  # layer norms in float32


def test_activations_that_are_computed_again_are_not_saved() -> None:
    def layers() -> nn.Sequential:
        return nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU()) for _ in range(4)))

    def kept(model: nn.Sequential, count: int) -> torch.Tensor:
        return model(torch.empty(count, 32)).sum()

    def again(model: nn.Sequential, count: int) -> torch.Tensor:
        rows = torch.empty(count, 32, requires_grad=True)
        for layer in model:
            rows = checkpoint(layer, rows, use_reentrant=False)
        return rows.sum()

    whole, less = (trace_step(layers(), step, 64, autocast=torch.bfloat16, as_cuda=True) for step in (kept, again))
    assert less.saved < 0.6 * whole.saved
    assert less.flops.sum() > 1.25 * whole.flops.sum()


def test_depthwise_convolutions_are_counted_by_their_groups() -> None:
    plain = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    traced = trace_step(plain, lambda model, count: model(torch.empty(count, 8, 10, 10)).sum(), 2)
    forward = 2 * 2 * 8 * 10 * 10 * 9
    assert traced.flops[traced.kind == KINDS.index("depthwise")].tolist() == [
        forward,
        forward,
    ]  # weights; the input wants none


def test_a_model_that_changes_with_the_batch_is_refused() -> None:
    def changing(model: nn.Module, count: int) -> torch.Tensor:
        rows = torch.empty(count, 4)
        for _ in range(count):
            rows = model(rows)
        return rows.sum()

    with pytest.raises(RuntimeError, match="not on one line"):
        trace_pair(nn.Linear(4, 4), changing, (2, 4))


def test_reports_of_any_length_lie_on_a_parabola_through_three() -> None:
    tower = PlannedTower(
        PlannedText(TextShape(tiny_bert(20).config, 12, None), LENGTHS, ""), "all", on_cuda=False
    ).train()
    model = small_model(text_width=tower.width).train()
    model.text_tower = tower

    def pair() -> Traces:
        return trace_pair(model, step, (16, 32))

    crowded = _crowded(model, pair(), pair, 32)
    assert len(crowded.by_length) == 3
    for studies in (3, 8, 200):
        tower.met = studies
        expected, found = trace_step(model, step, studies), crowded.at(studies)
        for column in ("live", "finished", "flops", "moved"):
            np.testing.assert_allclose(getattr(found, column), getattr(expected, column), rtol=1e-9)
