"""The definition itself, against the formula written out once more, and what masks and normalisations must mean."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from imitate_ds.ops.contrastive import clinical_contrastive_loss
from imitate_ds.ops.contrastive_reference import pearson, soft_targets, softness

ROWS, WIDTH, TEXT = 13, 8, 21


def targets_of(prior, valid, *, temperature, prior_strength, target_norm):
    shared = softness(prior, valid, prior.dtype, prior_strength=prior_strength, target_norm=target_norm)
    return soft_targets(shared, valid, prior.dtype, temperature=temperature, target_norm=target_norm)


@pytest.fixture
def samples():
    generator = torch.Generator().manual_seed(3)
    query, keys = (normalize(torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64), dim=1) for _ in "xy")
    prior = torch.randn(ROWS, TEXT, generator=generator, dtype=torch.float64)
    prior[5] = prior[2]  # two studies with one report
    return query.requires_grad_(), keys.requires_grad_(), prior


def formula(query, keys, prior, temperature, strength):
    """method.md section 3 with numpy, one scalar at a time."""
    x, y = query.detach().numpy(), keys.detach().numpy()
    n = len(x)
    logits = x @ y.T / temperature
    targets = np.eye(n)
    if prior is not None:
        correlation = np.maximum(np.corrcoef(prior.numpy()), 0)
        np.fill_diagonal(correlation, 0)
        targets = targets + temperature * (1 - np.exp(-strength * correlation))
    total = 0.0
    for matrix in (logits, logits.T):
        for i in range(n):
            log_sum = math.log(sum(math.exp(value) for value in matrix[i]))
            total += sum(targets[i, j] * (log_sum - matrix[i, j]) for j in range(n)) / n
    return total


@pytest.mark.parametrize("temperature", [0.07, 0.2])
@pytest.mark.parametrize("strength", [0.0, 0.2, 3.0])
def test_formula(samples, temperature, strength):
    query, keys, prior = samples
    for given in (prior, None):
        loss = clinical_contrastive_loss(query, keys, given, temperature=temperature, prior_strength=strength)
        assert loss.dtype == torch.float64
        assert loss.shape == ()
        assert loss.item() == pytest.approx(formula(query, keys, given, temperature, strength), rel=1e-13)


def test_without_prior_it_is_the_clip_loss(samples):
    query, keys, _ = samples
    logits = query @ keys.T / 0.07
    own = torch.arange(ROWS)
    clip = torch.nn.functional.cross_entropy(logits, own) + torch.nn.functional.cross_entropy(logits.T, own)
    torch.testing.assert_close(clinical_contrastive_loss(query, keys, temperature=0.07), clip, rtol=1e-13, atol=0)


def test_gradient_is_that_of_the_closed_form(samples):
    query, keys, prior = samples
    clinical_contrastive_loss(query, keys, prior, temperature=0.07).backward()
    x, y = query.detach(), keys.detach()
    z = x @ y.T / 0.07
    everyone = torch.ones(ROWS, dtype=torch.bool)
    t = targets_of(prior, everyone, temperature=0.07, prior_strength=0.2, target_norm="none")
    mass = t.sum(dim=1)
    g = (mass[:, None] * z.softmax(dim=1) + mass[None, :] * z.softmax(dim=0) - 2 * t) / ROWS
    torch.testing.assert_close(query.grad, g @ y / 0.07, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(keys.grad, g.T @ x / 0.07, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("target_norm", ["none", "row", "ref"])
def test_mask_equals_dropping_the_samples(samples, target_norm):
    query, keys, prior = samples
    valid = torch.ones(ROWS, dtype=torch.bool)
    valid[[0, 4, 12]] = False
    options = {"temperature": 0.07, "target_norm": target_norm}
    masked = clinical_contrastive_loss(query, keys, prior, valid=valid, **options)
    dropped = clinical_contrastive_loss(query[valid], keys[valid], prior[valid], **options)
    torch.testing.assert_close(masked, dropped, rtol=1e-13, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(masked, (query, keys)), torch.autograd.grad(dropped, (query, keys)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
        assert not ours[~valid].any()


@pytest.mark.parametrize("target_norm", ["none", "row", "ref"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_masked_is_zero_with_a_zero_gradient(samples, target_norm, dtype):
    query, keys, prior = (tensor.detach().to(dtype) for tensor in samples)
    query.requires_grad_()
    keys.requires_grad_()
    valid = torch.zeros(ROWS, dtype=torch.bool)
    loss = clinical_contrastive_loss(query, keys, prior, temperature=0.07, valid=valid, target_norm=target_norm)
    loss.backward()
    assert loss.item() == 0
    assert query.grad is not None
    assert keys.grad is not None
    assert not query.grad.any()
    assert not keys.grad.any()


def test_one_valid_sample_has_nothing_to_tell_apart(samples):
    query, keys, prior = samples
    valid = torch.arange(ROWS) == 3
    assert clinical_contrastive_loss(query, keys, prior, temperature=0.07, valid=valid).item() == 0


def test_row_norm_divides_both_directions_by_the_same_sums(samples):
    query, keys, prior = samples
    valid = torch.arange(ROWS) != 7
    everyone = {"temperature": 0.2, "prior_strength": 5.0}
    targets = targets_of(prior, valid, target_norm="none", **everyone)
    torch.testing.assert_close(targets, targets.T)
    kept = targets[valid][:, valid]
    shares = kept / kept.sum(dim=1, keepdim=True)
    logits = (query @ keys.T / 0.2)[valid][:, valid]
    expected = -(shares * logits.log_softmax(1)).sum() - (shares * logits.T.log_softmax(1)).sum()
    loss = clinical_contrastive_loss(query, keys, prior, valid=valid, target_norm="row", **everyone)
    torch.testing.assert_close(loss, expected / valid.sum(), rtol=1e-13, atol=0)


def test_ref_norm_is_the_published_loss_at_128_rows():
    generator = torch.Generator().manual_seed(0)
    for rows in (128, 256):
        prior = torch.randn(rows, TEXT, generator=generator, dtype=torch.float64)
        valid = torch.ones(rows, dtype=torch.bool)
        none, ref = (
            targets_of(prior, valid, temperature=0.07, prior_strength=0.2, target_norm=norm) for norm in ("none", "ref")
        )
        identity = torch.eye(rows, dtype=prior.dtype)
        torch.testing.assert_close(ref - identity, (none - identity) * 128 / rows, rtol=1e-13, atol=0)


def test_ref_norm_counts_valid_rows(samples):
    valid = torch.arange(ROWS) < 4
    options = {"temperature": 0.07, "prior_strength": 0.2}
    none, ref = (targets_of(samples[2], valid, target_norm=n, **options) for n in ("none", "ref"))
    off = ~torch.eye(ROWS, dtype=torch.bool)
    torch.testing.assert_close(ref[off], none[off] * 32, rtol=1e-13, atol=0)


def test_pearson_is_numpys_and_constant_rows_correlate_with_none():
    rows = torch.randn(6, 9, dtype=torch.float64)
    torch.testing.assert_close(pearson(rows), torch.from_numpy(np.corrcoef(rows.numpy())), rtol=1e-12, atol=1e-13)
    for dtype in (torch.float32, torch.float64):
        constant = torch.full((3, 9), 0.1, dtype=dtype)
        constant[0] = 0
        matrix = pearson(torch.cat([rows.to(dtype), constant]))
        assert matrix.isfinite().all()
        assert not matrix[6:].any()


def test_temperature_may_be_a_tensor_with_a_gradient(samples):
    query, keys, prior = samples
    temperature = torch.tensor([0.07], dtype=torch.float64, requires_grad=True)
    loss = clinical_contrastive_loss(query, keys, prior, temperature=temperature)
    assert loss.shape == ()
    torch.testing.assert_close(loss, clinical_contrastive_loss(query, keys, prior, temperature=0.07))
    loss.backward()
    # targets are constants: dL/dlog(tau) = -<X, dX>
    expected = -(query * query.grad).sum() / temperature.detach()
    torch.testing.assert_close(temperature.grad, expected, rtol=1e-12, atol=0)


def test_half_precision_and_autocast_compute_in_float32(samples):
    query, keys, prior = (tensor.detach().float() for tensor in samples)
    expected = clinical_contrastive_loss(query, keys, prior, temperature=0.07)
    with torch.autocast("cpu", torch.bfloat16):
        loss = clinical_contrastive_loss(query, keys, prior, temperature=0.07)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    half = clinical_contrastive_loss(query.half(), keys.half(), prior.half(), temperature=0.07)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=1e-2, atol=0)
