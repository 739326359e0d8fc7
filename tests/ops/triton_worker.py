"""The Triton kernels against the torch stages and against the dense definition in float64.

Run by test_contrastive_triton.py in a process of its own: with TRITON_INTERPRET=1, in Triton's interpreter on a CPU;
without it, on a CUDA device.
"""

import os

import pytest
import torch
from torch import Tensor

from imitate_ds.ops import contrastive_strips, contrastive_triton
from imitate_ds.ops.contrastive import Pair, clinical_contrastive_loss, clinical_contrastive_losses
from imitate_ds.ops.contrastive_strips import NEVER, Direction
from tests.ops.test_contrastive_strips import CASES, ROWS, TOLERANCES, assert_close, samples

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SHAPES = [(41, 70, 0), (41, 70, 29), (1, 1, 0), (32, 128, 64), (33, 131, 98)]  # rows, columns, column of the first row
MASKS = ["all", "some", "no row", "none"]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles in both directions, and a remainder."""
    monkeypatch.setattr(contrastive_triton, "INTERPRETER_TILE", contrastive_triton.Tile(32, 64, 1))


@pytest.fixture
def several_strips(monkeypatch):
    monkeypatch.setattr(contrastive_strips, "STRIP_ROWS", (20, 20))


class Strip:
    """A strip in a larger buffer, whose other numbers must stay, and vectors that are columns of a matrix."""

    def __init__(self, shape: tuple[int, int, int], mask: str = "some"):
        self.generator = torch.Generator().manual_seed(7)
        self.height, self.width, self.first = shape
        valid = torch.rand(self.width, generator=self.generator) > 0.3
        own = slice(self.first, self.first + self.height)
        if mask in ("all", "none"):
            valid[:] = mask == "all"
        if mask == "no row":
            valid[own] = False
        self.valid = valid.to(DEVICE)
        self.logits = self.buffer(14 * self.draw(self.height, self.width))
        q = self.draw(self.height, self.width).abs() * (self.valid[own, None] & self.valid)
        q.diagonal(self.first).zero_()
        self.q = self.buffer(q)
        self.columns = self.direction(self.valid)
        self.rows = self.direction(self.valid[own])
        self.rows = self.rows._replace(weight=self.columns.weight[own])

    def draw(self, *shape: int) -> Tensor:
        return (2 * torch.rand(*shape, generator=self.generator) - 1).to(DEVICE)

    def buffer(self, strip: Tensor) -> Tensor:
        whole = strip.new_full((self.height + 2, self.width + 3), 99.0)
        whole[: self.height, : self.width] = strip
        return whole[: self.height, : self.width]

    def direction(self, valid: Tensor) -> Direction:
        numbers = self.draw(len(valid), 4).abs() * valid[:, None]
        maximum = (14 + 6 * numbers[:, 0]) * valid  # no logit is above
        return Direction(maximum, numbers[:, 1], numbers[:, 2], (~valid).float() * NEVER)

    def g(self, stages, dtype=None, *, prior=True, scale=1.0, out=None) -> tuple[Tensor, Tensor]:
        def copy(tensor: Tensor) -> Tensor:
            return tensor.to(dtype) if dtype else self.buffer(tensor)

        logits = copy(self.logits)
        out = logits if out is None else out
        agreement = stages.g_strip(
            logits,
            copy(self.q) if prior else None,
            torch.empty_like(logits),
            out,
            rows=Direction(*map(copy, self.rows)) if dtype else self.rows,
            columns=Direction(*map(copy, self.columns)) if dtype else self.columns,
            softness=torch.tensor(0.07, device=DEVICE, dtype=dtype),
            scale=torch.tensor(scale, device=DEVICE, dtype=dtype),
            first=self.first,
        )
        return out, agreement


def untouched(strip: Tensor) -> bool:
    """Whether the buffer beyond the strip is as Strip.buffer made it."""
    height, width = strip.shape
    whole = strip.as_strided((height + 2, width + 3), strip.stride())
    return bool((whole[height:] == 99).all() and (whole[:, width:] == 99).all())


TORCH, TRITON = contrastive_strips.TORCH_STAGES, contrastive_triton.TRITON_STAGES


@pytest.mark.parametrize("strength", [0.2, 5.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_q(shape, strength):
    strip = Strip(shape)
    correlation = strip.draw(strip.height, strip.width)
    correlation.view(-1)[::3] = torch.logspace(-4, 0, len(correlation.view(-1)[::3]), device=DEVICE)
    q, expected = strip.buffer(correlation), correlation.double()
    sums = TRITON.q_strip(q, torch.empty(0), prior_strength=strength, first=strip.first)
    expected_sums = TORCH.q_strip(expected, torch.empty_like(expected), prior_strength=strength, first=strip.first)
    torch.testing.assert_close(q.double(), expected, rtol=3e-7, atol=0)
    torch.testing.assert_close(sums.double(), expected_sums, rtol=1e-6, atol=0)
    assert untouched(q)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_sumexp(shape, mask):
    strip = Strip(shape, mask)
    before, biases = strip.logits.clone(), {"row_bias": strip.rows.bias, "column_bias": strip.columns.bias}
    sums = TRITON.sumexp_strip(strip.logits, torch.empty(0), **biases)
    assert torch.equal(strip.logits, before)
    assert untouched(strip.logits)
    wide = {name: bias.double() for name, bias in biases.items()}
    expected = TORCH.sumexp_strip(before.double(), torch.empty_like(before, dtype=torch.float64), **wide)
    for ours, theirs in zip(sums, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prior", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_g(shape, mask, prior):
    strip = Strip(shape, mask)
    g, agreement = strip.g(TRITON, prior=prior)
    expected, expected_agreement = strip.g(TORCH, torch.float64, prior=prior)
    largest = float(strip.rows.share.max() + strip.columns.share.max())
    torch.testing.assert_close(g.double(), expected, rtol=0, atol=3e-7 * largest)
    torch.testing.assert_close(agreement.double(), expected_agreement, rtol=1e-6, atol=3e-6 * largest)
    assert untouched(g)
    own = strip.valid[strip.first : strip.first + strip.height]
    assert not g[~own].any()
    assert not g[:, ~strip.valid].any()
    assert not agreement[~own].any()


@pytest.mark.parametrize("shape", SHAPES)
def test_g_in_place_or_not_and_rounded_once(shape):
    strip = Strip(shape)
    in_place, _ = strip.g(TRITON, scale=4.0)
    for dtype in (torch.float32, torch.float16):
        out = strip.buffer(torch.zeros(strip.height, strip.width, device=DEVICE)).to(dtype)
        apart, _ = strip.g(TRITON, scale=4.0, out=out)
        assert torch.equal(apart, in_place.to(dtype))


def group(dtype=torch.float32, *, backend="triton", tau=0.07, masked=True, with_prior=True, **options) -> list[Tensor]:
    """Losses of the impression group and its gradients: of three sides and of the temperature."""
    sides, prior, valid = samples()
    first, second, text = leaves = [side.to(DEVICE, dtype).requires_grad_() for side in sides]
    temperature = torch.tensor([tau], dtype=dtype, device=DEVICE, requires_grad=True)
    pairs = [Pair(first, text, temperature), Pair(second, text, temperature), Pair(first, second, 0.2)]
    prior, valid = prior.to(DEVICE, dtype), valid.to(DEVICE)
    options |= {"valid": valid if masked else None, "backend": backend}
    losses = clinical_contrastive_losses(pairs, prior if with_prior else None, **options)
    weights = losses.new_tensor([1.0, 0.5, 2.0])
    return [losses.detach(), *torch.autograd.grad(losses @ weights, [*leaves, temperature])]


@pytest.mark.usefixtures("several_strips")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_definition(case):
    definition = group(torch.float64, backend="dense", **case)
    for operands, tolerance in TOLERANCES.items():
        assert_close(group(operands=operands, **case), definition, tolerance)


@pytest.mark.parametrize("tau", [0.01, 0.02, 1.0])
def test_temperatures_from_one_down_to_its_floor(tau):
    definition = group(torch.float64, backend="dense", tau=tau)
    # A float32 logit near 1 / 0.01 is off by 4e-6, whoever sums it.
    assert_close(group(tau=tau), definition, 1e-6 if tau > 0.02 else 4e-6)


@pytest.mark.usefixtures("several_strips")
@pytest.mark.parametrize("operands", TOLERANCES)
def test_bits_are_those_of_the_run_before_kept_or_not(monkeypatch, operands):
    first, again = group(operands=operands), group(operands=operands)
    monkeypatch.setattr(contrastive_strips, "BUFFER_BYTES", 0)
    recomputed = group(operands=operands)
    for tensors in zip(first, again, recomputed, strict=True):
        assert torch.equal(tensors[0], tensors[1])
        assert torch.equal(tensors[0], tensors[2])


def loss_and_gradients(dtype=torch.float32, **options) -> tuple[Tensor, tuple[Tensor, ...]]:
    (query, keys, _), prior, _ = samples()
    leaves = [side.to(DEVICE, dtype).requires_grad_() for side in (query, keys)]
    options = {"temperature": 0.07, "backend": "triton"} | options
    loss = clinical_contrastive_loss(*leaves, prior.to(DEVICE, dtype), **options)
    return loss, torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("operands", TOLERANCES)
def test_all_masked_is_zero_with_a_zero_gradient(operands):
    nobody = torch.zeros(ROWS, dtype=torch.bool, device=DEVICE)
    loss, gradients = loss_and_gradients(valid=nobody, operands=operands)
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.filterwarnings("ignore:All-NaN")  # numpy, in the interpreter
@pytest.mark.parametrize("what", ["embedding", "prior"])
def test_nan_in_one_row_is_nan_in_the_loss(what):
    (query, keys, _), prior, _ = samples()
    query, keys, prior = (tensor.to(DEVICE, torch.float32) for tensor in (query, keys, prior))
    (query if what == "embedding" else prior)[5, 0] = torch.nan
    assert clinical_contrastive_loss(query, keys, prior, temperature=0.07, backend="triton").isnan()


def test_float64_is_refused_by_name():
    with pytest.raises(ValueError, match=r"backend = 'triton': its kernels compute in float32"):
        loss_and_gradients(torch.float64)
