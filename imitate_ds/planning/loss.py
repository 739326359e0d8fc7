"""What the contrastive loss costs a rank: by the sizes that ops/contrastive_strips.py works with, or, dense, by a trace."""

import math
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from imitate_ds.batch import Batch, Features
from imitate_ds.config import ObjectiveConfig, RunConfig
from imitate_ds.objective import imitate_loss
from imitate_ds.ops.contrastive import choose_backend
from imitate_ds.ops.contrastive_strips import BUFFER_BYTES, BUFFER_ROWS, SCRATCH, STRIP_BYTES, STRIP_ROWS
from imitate_ds.planning.trace import trace_step

FLOAT = 4
DENSE_TRACED = (256, 512, 1024)
# Bytes read and written for a logit of one pair in both sweeps: the torch stages by a trace of them, the fused
# kernels by their loads and stores.
STRIP_TRAFFIC = {"strips": 260, "triton": 30}
PRIOR_TRAFFIC = {"strips": 80, "triton": 12}


class LossCost(NamedTuple):
    """Of one step on one rank."""

    backend: str
    gathered: float  # bytes of text embeddings of all ranks, held for the whole step
    peak: float  # bytes beside them while it is computed
    saved: float  # bytes that its backward pass finds
    flops: float
    moved: float  # bytes read and written
    wire: float  # bytes a rank receives that nothing hides: embeddings, and their gradients
    hidden_wire: float  # bytes of the texts, which travel while the encoder runs
    messages: int


class _Group(NamedTuple):
    """Pairs under one prior."""

    pairs: int
    sides: int  # distinct
    keys: int  # distinct
    prior: bool


def loss_cost(config: RunConfig, *, studies: int, ranks: int, nodes: int, text_width: int, on_cuda: bool) -> LossCost:
    """studies: of one rank. With `negatives: local` a rank compares its own."""
    alone = ranks == 1 or config.objective.negatives.scope == "local"
    columns = studies if alone else studies * ranks
    device = torch.device("cuda" if on_cuda else "cpu")
    backend = choose_backend(config.objective.backend, device, columns)
    texts = columns * (2 * text_width * FLOAT + 2)
    others = 0.0 if alone else texts * (1 - 1 / ranks)
    if backend == "dense":
        cost = _dense(config, columns, text_width)
        sides = 0 if alone else sum(group.sides for group in _groups(config))
        wire = sides * columns * config.model.joint_dim * FLOAT
        return cost._replace(gathered=texts, wire=2 * wire, hidden_wire=others, messages=3 * sides)
    owner = not alone and _owner(config, nodes)
    cost = _strips(
        config, backend, studies, columns, text_width, owner=owner, half=_half(config, on_cuda=on_cuda), on_cuda=on_cuda
    )
    return cost._replace(
        gathered=texts, wire=0.0 if alone else cost.wire, hidden_wire=others, messages=0 if alone else cost.messages
    )


def _half(config: RunConfig, *, on_cuda: bool) -> bool:
    """As recipe.with_operands resolves it."""
    if config.objective.operands == "auto":
        return on_cuda and config.train.precision != "fp32"
    return config.objective.operands == "fp16"


def _owner(config: RunConfig, nodes: int) -> bool:
    """As ops.contrastive.choose_exchange does on so many nodes."""
    exchange = config.objective.negatives.exchange
    return nodes > 1 if exchange == "auto" else exchange == "owner"


def _groups(config: RunConfig) -> list[_Group]:
    """As objective.imitate_loss forms them: two views, of which each meets the text and they meet each other."""
    weights = config.objective.weights
    text, views = bool(weights.image_impression), bool(weights.views_impression)
    groups = [_Group(2 * text + views, 2 + text, text + views, True)] if text or views else []
    if weights.image_findings:
        groups.append(_Group(2, 3, 1, True))
    if weights.views_findings:
        groups.append(_Group(1, 2, 1, False))
    return groups


def _strips(
    config: RunConfig, backend: str, rows: int, columns: int, text_width: int, *, owner: bool, half: bool, on_cuda: bool
) -> LossCost:
    width, operand = config.model.joint_dim, 2 if half and on_cuda else FLOAT
    peak = saved = flops = moved = wire = 0.0
    for group in _groups(config):
        gathered = group.sides if owner else group.keys
        held = gathered * columns * width * operand  # what was gathered
        held += group.pairs * rows * width * (operand + FLOAT)  # queries over the temperature, and their gradients
        held += group.pairs * (rows if owner else columns) * width * FLOAT  # gradients of the keys
        held += group.pairs * columns * width * operand if owner else 0
        prior = columns * text_width if group.prior else 0
        buffers, again = _buffers(
            rows, columns, group, half=half and on_cuda, spare=backend == "strips", on_cuda=on_cuda
        )
        standardising = 3 * FLOAT * prior  # centred, masked and normalised, before there is any strip
        peak = max(peak, saved + held + max(standardising, prior * operand + buffers))
        saved += group.pairs * 2 * rows * width * FLOAT
        units = (3 if owner else 2) + again
        flops += 2.0 * rows * columns * (group.pairs * units * width + again * text_width * group.prior)
        moved += rows * columns * (group.pairs * STRIP_TRAFFIC[backend] + group.prior * PRIOR_TRAFFIC[backend])
        wire += columns * width * (gathered * operand + (0 if owner else group.pairs * FLOAT))
    return LossCost(backend, 0.0, peak, saved, flops, moved, wire, 0.0, messages=6 * len(_groups(config)))


def _buffers(rows: int, columns: int, group: _Group, *, half: bool, spare: bool, on_cuda: bool) -> tuple[float, float]:
    """Bytes of strips that are there at once, and how often a strip is computed, 1 to 2 (_Buffers there)."""
    one = columns * FLOAT
    allowed = STRIP_BYTES["cuda" if on_cuda else "cpu"] // one
    height = max(1, min(rows, max(STRIP_ROWS[0], min(STRIP_ROWS[1], allowed))))
    wanted = math.ceil(rows / height) * (group.pairs + group.prior)
    budget = min(BUFFER_ROWS, BUFFER_BYTES // one) // height - SCRATCH + (not spare)
    kept = max(0, min(wanted, budget))
    scratch = spare + (0 if kept == wanted else 1 + group.prior)
    return (kept + scratch + 0.5 * half) * height * one, 1 + (wanted - kept) / wanted


def _dense(config: RunConfig, studies: int, text_width: int) -> LossCost:
    """All ranks' studies meet on every rank, so one process shows what each of them does."""
    at = np.array(DENSE_TRACED, dtype=float)
    trace = partial(_dense_trace, config.objective, config.model.joint_dim, text_width)  # type: ignore[arg-type]  # frozen
    columns = np.array([trace(count) for count in DENSE_TRACED])
    # All of them are sums of what is there once, for every study, and for every pair of studies.
    peak, saved, flops, moved = (float(np.polyval(np.polyfit(at, column, 2), studies)) for column in columns.T)
    return LossCost("dense", 0.0, peak, saved, flops, moved, 0.0, 0.0, 0)


@lru_cache(maxsize=16)
def _dense_trace(objective: ObjectiveConfig, width: int, text_width: int, studies: int) -> tuple[float, ...]:
    """Peak and saved bytes, FLOP and bytes moved."""
    weights = objective.weights
    findings = bool(weights.image_findings or weights.views_findings)
    objective = objective.model_copy(update={"backend": "dense"})

    def step(_: nn.Module, count: int) -> Tensor:
        rows = torch.empty(count, 2, width, requires_grad=True)
        texts, there = torch.empty(count, text_width), torch.ones(count, dtype=torch.bool)
        features = Features(rows, rows if findings else None, rows if findings else None, rows[:, 0], rows[:, 0])
        batch = Batch([""] * count, torch.empty(count, 2, 1, 1, 1), texts, texts, there, there, 0)
        return imitate_loss(features, batch, objective).total

    trace = trace_step(nn.Identity(), step, studies)
    given = studies * (2 * width + text_width) * FLOAT  # the embeddings, which are the encoder's
    return trace.peak() - given, trace.saved - given, float(trace.flops.sum()), float(trace.moved.sum())
