"""Strips against the dense definition in float64: values, gradients, memory, bits."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from imitate_ds.ops import contrastive_strips
from imitate_ds.ops.contrastive import Pair, clinical_contrastive_loss, clinical_contrastive_losses

ROWS, WIDTH, TEXT = 97, 24, 31
TOLERANCES = {"fp32": 1e-6, "fp16": 5e-3}


@pytest.fixture(params=["one strip", "kept", "again"])
def strips(request, monkeypatch):
    """Strips of every kind: a single one, several that stay between the sweeps, several computed again."""
    if request.param != "one strip":
        monkeypatch.setattr(contrastive_strips, "STRIP_ROWS", (20, 20))
    if request.param == "again":
        monkeypatch.setattr(contrastive_strips, "BUFFER_BYTES", 0)


def samples(rows: int = ROWS, width: int = WIDTH) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(width: int, centre: float) -> Tensor:
        return torch.randn(rows, width, generator=generator, dtype=torch.float64) + centre

    sides = [normalize(draw(width, 0.5), dim=1) for _ in range(3)]  # a cone, as early training has it
    prior, valid = draw(TEXT, 0), torch.rand(rows, generator=generator) > 0.25
    valid[20:40] = False  # one whole strip
    return sides, prior, valid


def group(dtype=torch.float64, *, backend="strips", tau=0.07, masked=True, with_prior=True, size=1.0, **options):
    """Losses of the impression group and its gradients: of three sides and of the temperature."""
    sides, prior, valid = samples()
    first, second, text = leaves = [(size * side).to(dtype).requires_grad_() for side in sides]
    temperature = torch.tensor([tau], dtype=dtype, requires_grad=True)
    pairs = [Pair(first, text, temperature), Pair(second, text, temperature), Pair(first, second, 0.2)]
    options |= {"valid": valid if masked else None, "backend": backend}
    losses = clinical_contrastive_losses(pairs, prior.to(dtype) if with_prior else None, **options)
    weights = losses.new_tensor([1.0, 0.5, 2.0])  # the loss is not the last operation
    return [losses.detach(), *torch.autograd.grad(losses @ weights, [*leaves, temperature])]


def assert_close(ours: list[Tensor], definition: list[Tensor], tolerance: float) -> None:
    for one, other in zip(ours, definition, strict=True):
        assert float((one.double() - other).norm() / other.norm()) < tolerance


CASES = [
    {"target_norm": "none"},
    {"target_norm": "row"},
    {"target_norm": "ref"},
    {"masked": False},
    {"with_prior": False},
    {"prior_strength": 5.0},
    {"prior_strength": 0.0},
    {"target_norm": "row", "masked": False},
]


@pytest.mark.usefixtures("strips")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_definition(case):
    definition = group(backend="dense", **case)
    assert_close(group(**case), definition, 1e-12)
    for operands, tolerance in TOLERANCES.items():
        assert_close(group(torch.float32, operands=operands, **case), definition, tolerance)


@pytest.mark.usefixtures("strips")
@pytest.mark.parametrize("tau", [0.01, 0.02, 1.0])
def test_temperatures_from_one_down_to_its_floor(tau):
    definition = group(backend="dense", tau=tau)
    assert_close(group(tau=tau), definition, 1e-12)
    # A float32 logit near 1 / 0.01 is off by 4e-6, the dense form's like ours.
    assert_close(group(torch.float32, tau=tau), definition, 1e-6 if tau > 0.02 else 4e-6)


@pytest.mark.usefixtures("strips")
@pytest.mark.parametrize("size", [0.001, 3.0])
def test_rows_that_are_not_unit_vectors_are_exact_all_the_same(size):
    assert_close(group(size=size), group(backend="dense", size=size), 1e-12)


def test_bits_are_those_of_the_run_before_kept_or_not(monkeypatch):
    monkeypatch.setattr(contrastive_strips, "STRIP_ROWS", (20, 20))
    for operands in TOLERANCES:
        first = group(torch.float32, operands=operands)
        again = group(torch.float32, operands=operands)
        with monkeypatch.context() as patch:
            patch.setattr(contrastive_strips, "BUFFER_BYTES", 0)
            recomputed = group(torch.float32, operands=operands)
        for tensors in zip(first, again, recomputed, strict=True):
            assert torch.equal(tensors[0], tensors[1])
            assert torch.equal(tensors[0], tensors[2])


@pytest.mark.usefixtures("strips")
def test_mask_is_the_same_as_leaving_out():
    (query, keys, _), prior, valid = samples()
    masked, dropped = (
        clinical_contrastive_loss(query, keys, prior, temperature=0.07, valid=v, target_norm="ref", backend="strips")
        if v is not None
        else clinical_contrastive_loss(
            query[valid], keys[valid], prior[valid], temperature=0.07, target_norm="ref", backend="strips"
        )
        for v in (valid, None)
    )
    torch.testing.assert_close(masked, dropped, rtol=1e-13, atol=0)


@pytest.mark.parametrize("target_norm", ["none", "row", "ref"])
@pytest.mark.parametrize("operands", TOLERANCES)
def test_all_masked_is_zero_with_a_zero_gradient(target_norm, operands):
    (query, keys, _), prior, _ = samples()
    query, keys = (side.float().requires_grad_() for side in (query, keys))
    loss = clinical_contrastive_loss(
        query,
        keys,
        prior.float(),
        temperature=0.07,
        valid=torch.zeros(ROWS, dtype=torch.bool),
        target_norm=target_norm,
        operands=operands,
        backend="strips",
    )
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, (query, keys)):
        assert not gradient.any()


def test_nan_in_one_row_is_nan_in_the_loss():
    (query, keys, _), prior, _ = samples()
    query[5, 0] = torch.nan
    assert clinical_contrastive_loss(query, keys, prior, temperature=0.07, backend="strips").isnan()


def test_constant_text_rows_correlate_with_none():
    (query, keys, _), prior, _ = samples()
    prior[3:6] = 0.25
    losses = [clinical_contrastive_loss(query, keys, prior, temperature=0.07, backend=b) for b in ("dense", "strips")]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)


def test_half_precision_embeddings_and_autocast_are_computed_in_float32():
    (query, keys, _), prior, _ = samples()
    expected = clinical_contrastive_loss(query, keys, prior, temperature=0.07)
    half = clinical_contrastive_loss(query.half(), keys.half(), prior.half(), temperature=0.07, backend="strips")
    with torch.autocast("cpu", torch.bfloat16):
        autocast = clinical_contrastive_loss(query.float(), keys.float(), prior, temperature=0.07, backend="strips")
    assert half.dtype == autocast.dtype == torch.float32
    torch.testing.assert_close(half.double(), expected, rtol=1e-2, atol=0)
    torch.testing.assert_close(autocast.double(), expected, rtol=1e-6, atol=0)


def test_there_is_no_second_derivative():
    (query, keys, _), prior, _ = samples()
    query.requires_grad_()
    loss = clinical_contrastive_loss(query, keys, prior, temperature=0.07, backend="strips")
    with pytest.raises(RuntimeError, match="no second derivative; use backend='dense'"):
        torch.autograd.grad(loss, query, create_graph=True)


class Allocations(TorchDispatchMode):
    """The largest tensor that any operation makes, in elements."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.numel() == tensor.untyped_storage().nbytes() // tensor.itemsize:
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("backend", ["strips", "dense"])
def test_memory_is_linear_in_the_batch(monkeypatch, backend):
    monkeypatch.setattr(contrastive_strips, "STRIP_ROWS", (8, 8))
    monkeypatch.setattr(contrastive_strips, "BUFFER_BYTES", 0)
    rows, saved = 512, []
    (query, keys, _), prior, _ = samples(rows)
    query.requires_grad_()
    keys.requires_grad_()
    with (
        Allocations() as made,
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t),
    ):
        clinical_contrastive_loss(query, keys, prior, temperature=0.07, backend=backend).backward()
    linear = rows * max(WIDTH, TEXT)
    assert (made.largest <= linear) == (backend == "strips")
    assert (sum(saved) <= 3 * linear) == (backend == "strips")


def test_stages_that_need_no_spare_strip_hold_none():
    buffers = contrastive_strips._Buffers(64, 64, torch.float32, torch.device("cpu"))
    buffers.do_without("spare")
    assert buffers.scratch("spare", slice(0, 64)).untyped_storage().nbytes() == 0


@pytest.mark.parametrize(("centre", "tolerance"), [(0.0, 5e-3), (6.0, 5e-3), (30.0, 2e-2)])
def test_fp16_operands_hold_while_the_embeddings_are_not_all_one(centre, tolerance):
    """Mean cosines 0, .97 and .999. In a narrow cone logits differ by less than fp16 tells apart (README, The loss)."""
    generator = torch.Generator().manual_seed(5)
    query, keys = (
        normalize(torch.randn(ROWS, 64, generator=generator, dtype=torch.float64) + centre, dim=1) for _ in "qk"
    )
    prior = samples()[1]
    gradients = []
    for dtype, backend, operands in ((torch.float64, "dense", "fp32"), (torch.float32, "strips", "fp16")):
        leaves = [side.to(dtype, copy=True).requires_grad_() for side in (query, keys)]
        loss = clinical_contrastive_loss(*leaves, prior.to(dtype), temperature=0.07, backend=backend, operands=operands)
        gradients.append(torch.autograd.grad(loss, leaves))
    assert_close(gradients[1], gradients[0], tolerance)


def test_products_of_half_operands_are_float32():
    """On a CUDA device; its rules of types are checked without one."""
    left, right = (torch.empty(4, 8, dtype=torch.float16, device="meta") for _ in "lr")
    out = torch.empty(4, 4, device="meta")
    contrastive_strips._product(left, right.T, out=out)
    contrastive_strips._add_product(out, left, right.T)
    assert out.dtype == torch.float32
