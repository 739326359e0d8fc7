"""Features -> Losses: gathers the embeddings of all ranks and adds up the four clinical contrastive terms.

Equations: "IMITATE: Clinical Prior Guided Hierarchical Vision-Language Pre-training" (Liu et al., 2025). The program of
its authors computes eight losses per step, two of which are exact doubles of their neighbours: here they are weights.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from imitate_ds.batch import Batch, Features, Losses
from imitate_ds.config import ObjectiveConfig
from imitate_ds.distributed import RankRows, count_rows, scale_gradient, start_gather, world
from imitate_ds.ops.contrastive import Pair, clinical_contrastive_losses

TERMS = ("image_impression", "image_findings", "views_impression", "views_findings")


class Texts(NamedTuple):
    """The frozen text side of the samples that a study is compared with."""

    rows: RankRows  # who holds how many of them
    findings: Tensor  # [N, E]
    impression: Tensor  # [N, E]
    has_findings: Tensor  # bool [N]
    has_impression: Tensor  # bool [N]


def exchange_texts(batch: Batch, config: ObjectiveConfig) -> Callable[[], Texts]:
    """Begin to gather the text embeddings and masks of all ranks; the function that comes back waits for them.

    Called before the image encoder runs, so that the messages travel meanwhile. A collective for `negatives: global`;
    raises ValueError on all ranks where they disagree about the step, the views or the width of the texts.
    """
    sides = {name: getattr(batch, name) for name in Texts._fields[1:]}
    studies, width = batch.findings.shape
    rows = RankRows((studies,), 0)
    if config.negatives.scope == "global":
        alike = {"text width": width, "step of the batch": batch.step, "views of a study": batch.images.shape[1]}
        rows = count_rows(studies, **alike)
    started = {name: start_gather(side, rows) for name, side in sides.items()}
    return lambda: Texts(rows, **{name: finish() for name, finish in started.items()})


def imitate_loss(
    features: Features, batch: Batch, config: ObjectiveConfig, texts: Callable[[], Texts] | None = None
) -> Losses:
    """The weighted sum of the four terms, and the terms; one whose weight is 0 is not computed and reported as 0.

    `negatives.scope: global` compares with the samples of every rank: the losses are those of the global batch, equal on
    all ranks, and the backward pass is scaled by the number of ranks, because DeepSpeed averages gradients. A collective
    then; ranks may hold different numbers of samples. `local` is this rank's own loss, as published. `texts` is what
    exchange_texts gave for this batch. `operands: auto` is fp32 here; pretrain has resolved it.
    """
    weights = config.weights.model_dump()
    _check(features, weights)
    gathered = (texts or exchange_texts(batch, config))()
    terms = dict.fromkeys(TERMS, features.image_impression.new_zeros(()))
    for group in _groups(features, gathered, config):
        wanted = {name: pairs for name, pairs in group.terms.items() if weights[name]}
        if wanted:
            losses = _losses_of(group, [pair for pairs in wanted.values() for pair in pairs], gathered.rows, config)
            parts = losses.split([len(pairs) for pairs in wanted.values()])
            terms |= {name: part.sum() for name, part in zip(wanted, parts, strict=True)}
    total = torch.stack([weights[name] * terms[name] for name in TERMS]).sum()
    if config.negatives.scope == "global" and world().size > 1:
        total = scale_gradient(total, world().size)
    return Losses(total, **terms)


def loss_flops(config: ObjectiveConfig, *, compared: int, views: int, joint: int, text: int) -> int:
    """Of a study that is compared with so many, forward and backward: floating-point operations of the matrix products.

    joint and text are the widths D and E. A pair takes three products of D numbers a logit, itself and its gradient with respect
    to both sides, and terms under one prior share one product of E. What strips compute twice is not counted twice.
    """
    weights = config.weights.model_dump()
    pairs = {name: views - 1 if name.startswith("views") else views for name in TERMS if weights[name]}
    priors = any(name in pairs for name in ("image_impression", "views_impression")) + ("image_findings" in pairs)
    return compared * 2 * (3 * joint * sum(pairs.values()) + text * priors)


class _Group(NamedTuple):
    """Pairs that are compared under the same prior, by the term that they belong to."""

    prior: Tensor | None  # [N, E]
    valid: Tensor  # bool [N]
    terms: dict[str, list[Pair]]


def _groups(features: Features, texts: Texts, config: ObjectiveConfig) -> Iterator[_Group]:
    """Images meet their text, view by view, and two views of a study meet each other."""
    temperature = config.temperature.init if features.temperature is None else features.temperature

    def with_text(views: Sequence[Tensor], text: Tensor) -> list[Pair]:
        return [Pair(view, text, temperature) for view in views]

    def with_each_other(views: Sequence[Tensor]) -> list[Pair]:
        return [Pair(views[0], other, config.views_temperature) for other in views[1:]]

    views = features.image_impression.unbind(dim=1)  # once: a tensor that serves two pairs is gathered once
    text = with_text(views, features.text_impression)
    both = {"image_impression": text, "views_impression": with_each_other(views)}
    yield _Group(texts.impression, texts.has_impression, both)
    if features.image_findings is not None and features.view_findings is not None:
        text = with_text(features.image_findings.unbind(dim=1), features.text_findings)
        yield _Group(texts.findings, texts.has_findings, {"image_findings": text})
        # The published program gives this term no prior.
        views = features.view_findings.unbind(dim=1)
        yield _Group(None, texts.has_findings, {"views_findings": with_each_other(views)})


def _losses_of(group: _Group, pairs: list[Pair], rows: RankRows, config: ObjectiveConfig) -> Tensor:
    return clinical_contrastive_losses(
        pairs,
        group.prior,
        valid=group.valid,
        prior_strength=config.prior_strength,
        target_norm=config.target_norm,
        backend=config.backend,
        operands="fp32" if config.operands == "auto" else config.operands,
        rows=rows,
        exchange=config.negatives.exchange,
    )


def _check(features: Features, weights: dict[str, float]) -> None:
    views = features.image_impression.shape[1]
    for name in TERMS:
        if weights[name] and "findings" in name and features.image_findings is None:
            raise ValueError(
                f"objective.weights.{name} = {weights[name]}: must be 0 for a model without findings branch"
            )
        if weights[name] and name.startswith("views") and views != 2:
            raise ValueError(
                f"objective.weights.{name} = {weights[name]}: must be 0 for batches of {views} view(s), not 2"
            )
