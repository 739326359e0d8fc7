"""Features -> Losses: gathers the embeddings of all ranks and adds up the four clinical contrastive terms.

Equations: "IMITATE: Clinical Prior Guided Hierarchical Vision-Language Pre-training" (Liu et al., 2025). The program of
its authors computes eight losses per step, two of which are exact doubles of their neighbours: here they are weights.
"""

from functools import partial

from torch import Tensor

from imitate_ds.batch import Batch, Features, Losses
from imitate_ds.config import ObjectiveConfig
from imitate_ds.distributed import gather_rows, gather_rows_keep_gradient, scale_gradient, world
from imitate_ds.ops.contrastive import clinical_contrastive_loss

TERMS = ("image_impression", "image_findings", "views_impression", "views_findings")
PRIORS = ("findings", "impression", "has_findings", "has_impression")


def imitate_loss(features: Features, batch: Batch, config: ObjectiveConfig) -> Losses:
    """The weighted sum of the four terms, and the terms; one whose weight is 0 is not computed and reported as 0.

    `negatives: global` compares with the samples of every rank: the losses are those of the global batch, equal on all
    ranks, and the backward pass is scaled by the number of ranks, because DeepSpeed averages gradients. A collective
    then; all ranks must hold equally many samples. `negatives: local` is this rank's own loss, as published.
    """
    weights = config.weights.model_dump()
    _check(features, weights)
    if config.negatives == "global":
        features, batch = gather_batch(features, batch)
    zero = features.image_impression.new_zeros(())
    terms = {name: _term(name, features, batch, config) if weights[name] else zero for name in TERMS}
    total = zero
    for name, term in terms.items():
        total = total + weights[name] * term if weights[name] else total
    if config.negatives == "global" and world().size > 1:
        total = scale_gradient(total, world().size)
    return Losses(total, **terms)


def gather_batch(features: Features, batch: Batch) -> tuple[Features, Batch]:
    """Every rank's features (this rank's own keep their graph), priors and masks; images and keys stay behind."""
    if world().size == 1:
        return features, batch
    embeddings = {
        name: gather_rows_keep_gradient(rows.contiguous())
        for name, rows in features._asdict().items()
        if rows is not None
    }
    priors = {name: gather_rows(getattr(batch, name)) for name in PRIORS}
    return features._replace(**embeddings), batch._replace(**priors)


def _term(name: str, features: Features, batch: Batch, config: ObjectiveConfig) -> Tensor:
    loss = partial(
        clinical_contrastive_loss,
        prior_strength=config.prior_strength,
        target_norm=config.target_norm,
        backend=config.backend,
    )
    if name == "image_impression":
        loss = partial(loss, temperature=config.temperature, valid=batch.has_impression)
        return _over_views(partial(loss, prior=batch.impression), features.image_impression, features.text_impression)
    if name == "image_findings":
        assert features.image_findings is not None
        loss = partial(loss, temperature=config.temperature, valid=batch.has_findings)
        return _over_views(partial(loss, prior=batch.findings), features.image_findings, features.text_findings)
    loss = partial(loss, temperature=config.views_temperature)
    if name == "views_impression":  # the prior is that of the impressions, so it exists where they do
        first, second = features.image_impression.unbind(dim=1)
        return loss(first, second, batch.impression, valid=batch.has_impression)
    assert features.view_findings is not None
    first, second = features.view_findings.unbind(dim=1)
    return loss(first, second, valid=batch.has_findings)


def _over_views(loss, images: Tensor, texts: Tensor) -> Tensor:
    return sum((loss(view, texts) for view in images.unbind(dim=1)), start=images.new_zeros(()))


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
