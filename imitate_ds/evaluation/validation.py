"""Validation during training: retrieval on a split, shared out over the ranks, the same figure on any number of them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from imitate_ds.batch import Batch, Features
from imitate_ds.config import ObjectiveConfig, RunConfig
from imitate_ds.data.loader import Tokenize, build_eval_loader
from imitate_ds.data.shard_index import ShardIndex
from imitate_ds.distributed import gather_rows, training_device, world
from imitate_ds.metrics import recall_at_k
from imitate_ds.ops.contrastive import clinical_contrastive_loss

KS = (1, 5, 10)
LOSS_CHUNK = 128  # studies that are compared with each other; what target_norm `ref` refers to


@torch.no_grad()
def validate(
    engine: Any,
    config: RunConfig,
    folders: list[ShardIndex],
    text_encoder: str = "",
    *,
    batch_size: int = 0,
    tokenize: Tokenize | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """R@1/5/10 in both directions at both levels, duplicate texts grouped, and image_text_loss. Leaves the model in eval mode.

    A collective. engine: called with a Batch, gives Features; its `module` is the model. A level that no study has is left out.
    batch_size: studies at once on a rank; 0: train.micro_batch_size. tokenize: for a model with a text tower, which then
    embeds every text as it is now; the embeddings in the shards only say which texts are equal. stop: asked after every
    batch, must answer alike on all ranks; where it says True, nothing is measured and None comes back.
    """
    here, device = world(), training_device()
    engine.module.eval()
    loader = build_eval_loader(
        [folder for folder in folders if config.data.val_split in folder.splits],
        config.data.val_split,
        input_size=config.data.input_size,
        batch_size=batch_size or config.train.micro_batch_size,
        workers=config.data.workers,
        impression_text=config.data.impression_text,
        rank=here.rank,
        world_size=here.size,
        text_encoder=text_encoder,
        tokenize=tokenize,
    )
    parts: dict[str, list[Tensor]] = {}
    temperature: float | Tensor = config.objective.temperature.init
    for batch in loader:
        features = engine(batch.to(device))
        temperature = temperature if features.temperature is None else features.temperature.cpu()
        rows = retrieval_rows(features, batch) | {"key": key_numbers(batch.keys)}
        for name, tensor in rows.items():
            parts.setdefault(name, []).append(gather_rows(tensor.to(device)).cpu())
        if stop():
            return None
    whole = {name: torch.cat(tensors) for name, tensors in parts.items()}
    first = first_of_each(whole.pop("key"))  # ranks fill up their last batch with repeats
    metrics: dict[str, float] = {}
    for level in ("impression", "findings"):
        if f"{level}/image" in whole:
            metrics |= _recalls(level, lambda name, level=level: whole[f"{level}/{name}"][first])
    rows = {name: tensor[first] for name, tensor in whole.items()}
    return metrics | image_text_loss(rows, config.objective, temperature)


def image_text_loss(
    rows: dict[str, Tensor], objective: ObjectiveConfig, temperature: float | Tensor
) -> dict[str, float]:
    """`loss`: the objective's terms between images and texts, one view of each image, mean over chunks of LOSS_CHUNK studies.

    Whatever the batch size of a run and its number of ranks, so runs can be compared. Chance is 2 log LOSS_CHUNK a term, and
    more with a prior. rows: of a whole split, as retrieval_rows has them, in an order that says nothing of what they show. The
    last studies, fewer than a chunk, are left out; a smaller split is one chunk. Empty where no term has a weight.
    """
    weights = {"impression": objective.weights.image_impression, "findings": objective.weights.image_findings}
    levels = {level: weight for level, weight in weights.items() if weight and f"{level}/image" in rows}
    studies = len(rows["impression/image"])
    size = min(LOSS_CHUNK, studies)
    chunks = [slice(start, start + size) for start in range(0, studies - size + 1, size)]
    losses = [
        weight * torch.stack([_level_loss(rows, level, chunk, objective, temperature) for chunk in chunks]).mean()
        for level, weight in levels.items()
    ]
    return {"loss": float(torch.stack(losses).sum())} if losses else {}


def _level_loss(
    rows: dict[str, Tensor], level: str, chunk: slice, objective: ObjectiveConfig, temperature: float | Tensor
) -> Tensor:
    image, text, prior, valid = (rows[f"{level}/{name}"][chunk] for name in ("image", "text", "prior", "valid"))
    return clinical_contrastive_loss(
        image.float(),
        text.float(),
        prior.float(),
        temperature=temperature,
        valid=valid,
        prior_strength=objective.prior_strength,
        target_norm=objective.target_norm,
        backend="dense",
    )


def retrieval_rows(features: Features, batch: Batch) -> dict[str, Tensor]:
    """level/{image, text, prior, valid} -> rows [B, ...] of one batch of single views."""
    rows = {
        "impression/image": features.image_impression[:, 0],
        "impression/text": features.text_impression,
        "impression/prior": batch.impression,
        "impression/valid": batch.has_impression,
    }
    if features.image_findings is not None:
        rows |= {
            "findings/image": features.image_findings[:, 0],
            "findings/text": features.text_findings,
            "findings/prior": batch.findings,
            "findings/valid": batch.has_findings,
        }
    return rows


def key_numbers(keys: list[str]) -> Tensor:
    """Keys are 16 hexadecimal digits: one signed 64-bit integer each, so that they can be gathered."""
    return torch.tensor([int(key, 16) - 2**63 for key in keys], dtype=torch.int64)


def first_of_each(values: Tensor) -> Tensor:
    """Positions of the first occurrence of every value, ordered by value."""
    unique, inverse = values.unique(return_inverse=True)
    first = torch.full_like(unique, len(values))
    return first.scatter_reduce_(0, inverse, torch.arange(len(values)), reduce="amin")


def _recalls(level: str, rows: Callable[[str], Tensor]) -> dict[str, float]:
    valid = rows("valid")
    if not valid.any():
        return {}
    image, text, prior = (rows(name)[valid].float() for name in ("image", "text", "prior"))
    groups = prior.unique(dim=0, return_inverse=True)[1]  # equal texts have equal frozen embeddings
    similarity = image @ text.T
    recalls = {f"{level}/image_to_text_R@{k}": recall_at_k(similarity, groups, groups, k=k) for k in KS}
    return recalls | {f"{level}/text_to_image_R@{k}": recall_at_k(similarity.T, groups, groups, k=k) for k in KS}
