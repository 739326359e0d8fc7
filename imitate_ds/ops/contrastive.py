"""The clinical contrastive loss: the one door to every form of it. Checks the arguments and picks a backend."""

from collections.abc import Callable

import torch
from torch import Tensor

from imitate_ds.ops.contrastive_reference import TARGET_NORMS, dense_contrastive_loss

BACKENDS: dict[str, Callable[..., Tensor]] = {"dense": dense_contrastive_loss}


def clinical_contrastive_loss(
    query: Tensor,
    keys: Tensor,
    prior: Tensor | None = None,
    *,
    temperature: float | Tensor,
    prior_strength: float = 0.2,
    valid: Tensor | None = None,
    target_norm: str = "none",
    backend: str = "auto",
) -> Tensor:
    """Cross entropy of both directions of query @ keys.T / temperature against targets softened by the prior.

    query and keys [N, D] have unit norm; row i of one belongs to row i of the other. prior [N, E] are the frozen text
    embeddings whose Pearson correlation says how alike two studies are; None leaves plain InfoNCE. valid [N], bool,
    takes samples out as rows and as columns. temperature is a positive number, or a tensor of one element, which gets
    its gradient through the logits. target_norm says what large batches do to the soft targets: "none", "row" or "ref"
    (contrastive_reference.soft_targets).

    Returns a scalar: mean over valid rows, sum of the two directions; float64 for float64 embeddings, else float32.
    Raises ValueError for shapes that do not fit and for a value that is none of those above.
    """
    _check_shapes(query, keys, prior, valid)
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature = {temperature}: must be greater than 0")
    if isinstance(temperature, Tensor) and temperature.numel() != 1:
        raise ValueError(f"temperature: a tensor must hold one number, found shape {list(temperature.shape)}")
    if not prior_strength >= 0:
        raise ValueError(f"prior_strength = {prior_strength}: must be at least 0")
    if target_norm not in TARGET_NORMS:
        raise ValueError(f"target_norm = {target_norm!r}: must be one of {', '.join(TARGET_NORMS)}")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend = {backend!r}: must be one of auto, {', '.join(BACKENDS)}")
    return BACKENDS["dense" if backend == "auto" else backend](
        query,
        keys,
        prior,
        temperature=temperature,
        prior_strength=prior_strength,
        valid=valid,
        target_norm=target_norm,
    )


def _check_shapes(query: Tensor, keys: Tensor, prior: Tensor | None, valid: Tensor | None) -> None:
    if query.ndim != 2 or query.shape != keys.shape:
        found = f"{list(query.shape)} and {list(keys.shape)}"
        raise ValueError(f"query, keys: must both be [N, D], row by row of the same samples, found {found}")
    rows = len(query)
    if not rows:
        raise ValueError("query, keys: must hold at least one row")
    if prior is not None and (prior.ndim != 2 or len(prior) != rows):
        raise ValueError(f"prior: must be [N, E] with N = {rows}, found {list(prior.shape)}")
    if valid is not None and (valid.shape != (rows,) or valid.dtype != torch.bool):
        raise ValueError(f"valid: must be bool [N] with N = {rows}, found {valid.dtype} {list(valid.shape)}")
