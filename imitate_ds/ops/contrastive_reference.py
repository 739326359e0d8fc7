"""The clinical contrastive loss in plain PyTorch: the definition that every other form is held to.

"IMITATE: Clinical Prior Guided Hierarchical Vision-Language Pre-training" (Liu et al., 2025), the clinical-informed
contrastive loss, in the form of the authors' program: Y = I + temperature * P is not normalised.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

TARGET_NORMS = ("none", "row", "ref")
REFERENCE_ROWS = 128  # the published batch: "ref" keeps the balance of I and P that it had there


def dense_contrastive_loss(
    query: Tensor,
    keys: Tensor,
    prior: Tensor | None,
    *,
    temperature: float | Tensor,
    prior_strength: float,
    valid: Tensor | None,
    target_norm: str,
) -> Tensor:
    """CE(S, Y) + CE(S^T, Y) with S = query @ keys.T / temperature, all [N, N] in memory.

    Arguments as in contrastive.clinical_contrastive_loss, already checked.
    """
    dtype = torch.promote_types(torch.promote_types(query.dtype, keys.dtype), torch.float32)
    if valid is None:
        valid = torch.ones(len(query), dtype=torch.bool, device=query.device)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(dtype).reshape(())
    with torch.autocast(query.device.type, enabled=False):
        logits = query.to(dtype) @ keys.to(dtype).T / temperature
        targets = soft_targets(
            prior, valid, dtype, temperature=temperature, prior_strength=prior_strength, target_norm=target_norm
        )
        # A finite floor, not -inf: a row without any valid column would turn into NaN, forward and backward.
        logits = logits.masked_fill(~_pairs(valid), torch.finfo(dtype).min / 2)
        rows = valid.sum().clamp(min=1)
        return (_cross_entropy(logits, targets) + _cross_entropy(logits.T, targets)) / rows


@torch.no_grad()
def soft_targets(
    prior: Tensor | None,
    valid: Tensor,
    dtype: torch.dtype,
    *,
    temperature: float | Tensor,
    prior_strength: float,
    target_norm: str,
) -> Tensor:
    """Y = I + temperature * P [N, N], constants to autograd; rows and columns that are not valid are zero.

    P = 1 - exp(-prior_strength * C), C the Pearson correlation of the prior's rows, clamped at 0 and without its
    diagonal. The mass of P in a row grows with the batch, hence `target_norm`: "none" leaves it so, as published;
    "row" divides every row by its sum; "ref" scales P by 128 / (number of valid rows), and leaves I as it is.
    """
    identity = torch.diag(valid.to(dtype))
    if prior is None:
        return identity
    correlation = pearson(prior.to(dtype)).clamp(min=0).fill_diagonal_(0)
    softness = temperature * -torch.expm1(-prior_strength * correlation) * _pairs(valid)
    if target_norm == "ref":
        softness *= REFERENCE_ROWS / valid.sum().clamp(min=1)
    targets = identity + softness
    if target_norm == "row":
        targets /= targets.sum(dim=1, keepdim=True).clamp(
            min=1
        )  # a valid row holds its 1, so only empty rows are clamped
    return targets


def pearson(rows: Tensor, eps: float = 1e-12) -> Tensor:
    """Pearson correlation of every pair of rows [N, E] -> [N, N]; a constant row correlates with none."""
    centred = rows - rows.mean(dim=1, keepdim=True)
    # The mean of a constant row is off by a rounding, which the norm would blow up to a unit vector.
    spread = centred.abs().amax(dim=1, keepdim=True)
    floor = 4 * torch.finfo(rows.dtype).eps * rows.abs().amax(dim=1, keepdim=True)
    unit = normalize(centred.masked_fill(spread <= floor, 0), dim=1, eps=eps)
    return unit @ unit.T


def _pairs(valid: Tensor) -> Tensor:
    return valid[:, None] & valid[None, :]


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return (targets * -logits.log_softmax(dim=1)).sum()
