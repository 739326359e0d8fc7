"""The clinical contrastive loss in plain PyTorch: the definition that every other form is held to.

"IMITATE: Clinical Prior Guided Hierarchical Vision-Language Pre-training" (Liu et al., 2025), the clinical-informed
contrastive loss, in the form of the authors' program: Y = I + temperature * P is not normalised.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

TARGET_NORMS = ("none", "row", "ref")
REFERENCE_ROWS = 128  # the published batch: "ref" keeps the balance of I and P that it had there


class Pair(NamedTuple):
    """Two sides of one contrastive loss; row i of one belongs to row i of the other."""

    query: Tensor  # [B, D], unit norm
    keys: Tensor  # [B, D], unit norm
    temperature: float | Tensor  # a tensor of one element gets its gradient


def dense_contrastive_losses(
    pairs: Sequence[Pair], prior: Tensor | None, *, prior_strength: float, valid: Tensor, target_norm: str
) -> Tensor:
    """CE(S, Y) + CE(S^T, Y) with S = query @ keys.T / temperature, for every pair: [len(pairs)]. All [N, N] in memory.

    Arguments as in contrastive.clinical_contrastive_losses, already checked. The pairs share one prior matrix.
    """
    dtype = embedding_dtype(pairs)
    with torch.autocast(pairs[0].query.device.type, enabled=False):
        shared = softness(prior, valid, dtype, prior_strength=prior_strength, target_norm=target_norm)
        return torch.stack([_dense_loss(pair, shared, valid, dtype, target_norm) for pair in pairs])


def embedding_dtype(pairs: Sequence[Pair]) -> torch.dtype:
    """What the losses are computed in: float64 where an embedding is, else float32."""
    wide = any(side.dtype == torch.float64 for pair in pairs for side in (pair.query, pair.keys))
    return torch.float64 if wide else torch.float32


def _dense_loss(pair: Pair, shared: Tensor | None, valid: Tensor, dtype: torch.dtype, target_norm: str) -> Tensor:
    temperature = pair.temperature
    if isinstance(temperature, Tensor):
        temperature = temperature.to(dtype).reshape(())
    targets = soft_targets(shared, valid, dtype, temperature=temperature, target_norm=target_norm)
    logits = pair.query.to(dtype) @ pair.keys.to(dtype).T / temperature
    # A finite floor, not -inf: a row without any valid column would turn into NaN, forward and backward.
    logits = logits.masked_fill(~_pairs(valid), torch.finfo(dtype).min / 2)
    return (_cross_entropy(logits, targets) + _cross_entropy(logits.T, targets)) / valid.sum().clamp(min=1)


@torch.no_grad()
def softness(
    prior: Tensor | None, valid: Tensor, dtype: torch.dtype, *, prior_strength: float, target_norm: str
) -> Tensor | None:
    """P [N, N] = 1 - exp(-prior_strength * C), C the Pearson correlation of the prior's rows, clamped at 0.

    Its diagonal, and rows and columns that are not valid, are zero. None without a prior. The mass of P in a row grows
    with the batch: target_norm "ref" scales it by 128 / (number of valid rows).
    """
    if prior is None:
        return None
    correlation = pearson(prior.to(dtype)).clamp(min=0).fill_diagonal_(0)
    shared = -torch.expm1(-prior_strength * correlation) * _pairs(valid)
    return shared * (REFERENCE_ROWS / valid.sum(dtype=dtype).clamp(min=1)) if target_norm == "ref" else shared


@torch.no_grad()
def soft_targets(
    shared: Tensor | None, valid: Tensor, dtype: torch.dtype, *, temperature: float | Tensor, target_norm: str
) -> Tensor:
    """Y = I + temperature * P [N, N], constants to autograd; rows and columns that are not valid are zero.

    target_norm "none" leaves it so, as published; "row" divides every row by its sum; "ref" is in P already.
    """
    targets = torch.diag(valid.to(dtype))
    if shared is None:
        return targets
    targets = targets + temperature * shared
    if target_norm == "row":  # a valid row holds its 1, so only empty rows are clamped
        targets /= targets.sum(dim=1, keepdim=True).clamp(min=1)
    return targets


def pearson(rows: Tensor) -> Tensor:
    """Pearson correlation of every pair of rows [N, E] -> [N, N]; a constant row correlates with none."""
    unit = standardise(rows)
    return unit @ unit.T


def standardise(rows: Tensor, eps: float = 1e-12) -> Tensor:
    """Rows [N, E] less their mean, of unit norm: their products are Pearson correlations. A constant row becomes 0."""
    centred = rows - rows.mean(dim=1, keepdim=True)
    # The mean of a constant row is off by a rounding, which the norm would blow up to a unit vector.
    spread = centred.abs().amax(dim=1, keepdim=True)
    floor = 4 * torch.finfo(rows.dtype).eps * rows.abs().amax(dim=1, keepdim=True)
    return normalize(centred.masked_fill(spread <= floor, 0), dim=1, eps=eps)


def _pairs(valid: Tensor) -> Tensor:
    return valid[:, None] & valid[None, :]


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return (targets * -logits.log_softmax(dim=1)).sum()
