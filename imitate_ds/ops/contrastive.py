"""The clinical contrastive loss: the one door to every form of it. Checks the arguments and picks a backend."""

import importlib.util
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from imitate_ds.distributed import RankRows, gather_rows_keep_gradient, node_count, scale_gradient
from imitate_ds.ops.contrastive_reference import TARGET_NORMS, Pair, dense_contrastive_losses, embedding_dtype
from imitate_ds.ops.contrastive_strips import TORCH_STAGES, Task, strip_contrastive_losses

BACKENDS = ("dense", "strips", "triton")
EXCHANGES = ("reduce_scatter", "owner")
OPERANDS = ("fp32", "fp16")
LOWEST_TEMPERATURE = 0.01  # below, float32 logits have lost the digits that the loss is made of
# Up to here the dense form is about as fast: measured on a CPU (benchmarks/results/loss-small-*), an estimate for CUDA.
DENSE_LOGITS = {"cpu": 2**18, "cuda": 2**22}


def clinical_contrastive_losses(
    pairs: Sequence[Pair],
    prior: Tensor | None = None,
    *,
    prior_strength: float = 0.2,
    valid: Tensor | None = None,
    target_norm: str = "none",
    backend: str = "auto",
    operands: str = "fp32",
    rows: RankRows | None = None,
    exchange: str = "auto",
) -> Tensor:
    """For every pair, the cross entropy of both directions of query @ keys.T / temperature against softened targets.

    The sides of a pair are [B, D] with unit norm; row i of one belongs to row i of the other. Its temperature is a
    number of at least 0.01, or a tensor of one element, which gets its gradient through the logits. prior [N, E] are the
    frozen text embeddings whose Pearson correlation says how alike two studies are; None leaves plain InfoNCE.
    valid [N], bool, takes samples out as rows and as columns. target_norm says what large batches do to the soft
    targets: "none", "row" or "ref" (contrastive_reference.softness).

    `rows` (distributed.count_rows) says how many rows every rank holds: the loss is then that of all N rows, equal on
    all ranks, prior and valid are those of all ranks, and every gradient is of the whole loss with respect to what this
    rank owns; of a temperature, a share whose sum over ranks is the whole. `exchange` says how ranks meet under
    "strips" and "triton", to the same result. All ranks must come with the same D, E and dtype: what may differ, give to
    count_rows, which then raises on all of them. Without `rows`, N = B.

    backend "dense" holds [N, N] matrices; "strips" and "triton" are linear in memory and compute their gradient in
    forward, so that a second derivative is an error. operands "fp16" rounds what their matrix products read; "fp32" is
    what torch.backends.cuda.matmul makes of it (not TF32, unless you allowed that).

    Returns [len(pairs)]: mean over valid rows, sum of the two directions; float64 for float64 embeddings, else float32.
    An embedding of a valid sample that is not finite makes the loss NaN. Unit norm is meant, but any norm is computed
    exactly, with fp16 operands any near 1.
    Raises ValueError for shapes that do not fit and for a value that is none of those above.
    """
    if not pairs:
        raise ValueError("pairs: must hold at least one pair")
    rows = rows or RankRows((len(pairs[0].query),), 0)
    for pair in pairs:
        _check_shapes(pair, prior, valid, rows)
        _check_temperature(pair.temperature)
    if not prior_strength >= 0:
        raise ValueError(f"prior_strength = {prior_strength}: must be at least 0")
    _check_choice("target_norm", target_norm, TARGET_NORMS)
    _check_choice("operands", operands, OPERANDS)
    _check_choice("exchange", exchange, ("auto", *EXCHANGES))
    device = pairs[0].query.device
    backend = choose_backend(backend, device, rows.total, embedding_dtype(pairs))
    if operands == "fp16" and embedding_dtype(pairs) == torch.float64:
        raise ValueError("operands = 'fp16': must be fp32 for float64 embeddings, which are computed in float64")
    if valid is None:
        valid = torch.ones(rows.total, dtype=torch.bool, device=device)
    if backend == "dense":
        pairs = [_whole(pair, rows) for pair in pairs]
        options: dict[str, Any] = {"prior_strength": prior_strength, "valid": valid, "target_norm": target_norm}
        return dense_contrastive_losses(pairs, prior, **options)
    exchange = choose_exchange(exchange, rows)
    stages = TORCH_STAGES
    if backend == "triton":
        from imitate_ds.ops.contrastive_triton import TRITON_STAGES as stages
    return strip_contrastive_losses(
        pairs, Task(prior, valid, prior_strength, target_norm, operands, rows, exchange, stages)
    )


def clinical_contrastive_loss(
    query: Tensor, keys: Tensor, prior: Tensor | None = None, *, temperature: float | Tensor, **options: Any
) -> Tensor:
    """The loss of one pair, a scalar; options as in clinical_contrastive_losses."""
    return clinical_contrastive_losses([Pair(query, keys, temperature)], prior, **options)[0]


def choose_backend(backend: str, device: torch.device, samples: int, dtype: torch.dtype = torch.float32) -> str:
    """What "auto" means for so many samples on this device; raises ValueError for what cannot run there."""
    _check_choice("backend", backend, ("auto", *BACKENDS))
    problem = _triton_problem(device, dtype)
    if backend == "triton" and problem:
        raise ValueError(f"backend = 'triton': {problem}; use auto, or strips")
    if backend != "auto":
        return backend
    if samples**2 <= DENSE_LOGITS.get(device.type, DENSE_LOGITS["cpu"]):
        return "dense"
    return "strips" if problem or device.type != "cuda" else "triton"


def choose_exchange(exchange: str, rows: RankRows) -> str:
    """What "auto" means: between nodes no gradient should travel, inside one a product is the dearer part."""
    if exchange != "auto":
        return exchange
    return "owner" if len(rows.counts) > 1 and node_count() > 1 else "reduce_scatter"


def _triton_problem(device: torch.device, dtype: torch.dtype) -> str:
    if dtype == torch.float64:
        return "its kernels compute in float32, and the embeddings are float64"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton; it comes with torch on Linux)"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":  # set, its interpreter runs them on a CPU
        return f"its kernels need a CUDA device, and the embeddings lie on {device.type}"
    return ""


def _whole(pair: Pair, rows: RankRows) -> Pair:
    """The pair of all ranks, own rows with gradient: every rank computes the whole loss, so 1/W of it is its share."""
    if len(rows.counts) == 1:
        return pair
    tau = pair.temperature
    if isinstance(tau, Tensor):
        tau = scale_gradient(tau, 1 / len(rows.counts))
    return Pair(gather_rows_keep_gradient(pair.query, rows), gather_rows_keep_gradient(pair.keys, rows), tau)


def _check_shapes(pair: Pair, prior: Tensor | None, valid: Tensor | None, rows: RankRows) -> None:
    query, keys, _ = pair
    if query.ndim != 2 or query.shape != keys.shape:
        found = f"{list(query.shape)} and {list(keys.shape)}"
        raise ValueError(f"query, keys: must both be [B, D], row by row of the same samples, found {found}")
    if len(query) != rows.counts[rows.rank]:
        raise ValueError(f"query, keys: must hold the {rows.counts[rows.rank]} rows of this rank, found {len(query)}")
    if not rows.total:
        raise ValueError("query, keys: must hold at least one row")
    if prior is not None and (prior.ndim != 2 or len(prior) != rows.total):
        raise ValueError(f"prior: must be [N, E] with N = {rows.total}, found {list(prior.shape)}")
    if valid is not None and (valid.shape != (rows.total,) or valid.dtype != torch.bool):
        raise ValueError(f"valid: must be bool [N] with N = {rows.total}, found {valid.dtype} {list(valid.shape)}")


def _check_temperature(temperature: float | Tensor) -> None:
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            raise ValueError(f"temperature: a tensor must hold one number, found shape {list(temperature.shape)}")
        if temperature.is_cuda:
            return  # to look would wait for the device; LearnableTemperature cannot leave its range
        temperature = temperature.item()
    if not LOWEST_TEMPERATURE * (1 - 1e-6) <= temperature < math.inf:  # 0.01 in float32 is less
        raise ValueError(f"temperature = {temperature}: must be at least {LOWEST_TEMPERATURE}, and finite")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} = {value!r}: must be one of {', '.join(choices)}")
