"""Batch -> Features: one image encoder, an impression branch, a findings branch, a text projection."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from imitate_ds.batch import Batch, Features
from imitate_ds.config import ModelConfig, TemperatureConfig
from imitate_ds.models.aggregation import HierarchicalAggregation, draw_seed
from imitate_ds.models.image_encoder import ImageEncoder
from imitate_ds.models.projection import ProjectionHead
from imitate_ds.models.temperature import LearnableTemperature

TEXT_TOWER = "text_tower."  # what the names of its parameters begin with, in a model that has one


class FindingsBranch(nn.Module):
    """All levels -> the joint space: the hierarchical aggregation block and its projection."""

    def __init__(self, channels: list[int], config: ModelConfig):
        super().__init__()
        self.aggregation = HierarchicalAggregation(channels, config.aggregation)
        width = self.aggregation.width
        self.projection = ProjectionHead(width, width, config.joint_dim, config.projection_norm)

    def forward(self, levels: list[Tensor], seed: int) -> Tensor:
        return self.projection(self.aggregation(levels, seed))


class ImitateModel(nn.Module):
    """The highest level meets the impression, channels of all levels meet the findings.

    It does not know how many ranks there are, nor what a loss is. No parameter lies at the root: ZeRO-3 with
    activation checkpointing would fail on it.
    """

    def __init__(
        self,
        config: ModelConfig,
        text_width: int,
        *,
        input_size: int | None = None,
        temperature: TemperatureConfig | None = None,
        text_tower: nn.Module | None = None,
    ):
        """text_width: width of the text embeddings. input_size: pixels, for encoders that must know (ViT).

        temperature: the model learns it if that says so. Only training asks; an export holds the number. text_tower (of
        models.text_tower): embeds the tokens of a batch, in place of the embeddings that came along; of an export it is no part,
        but a folder of its own.
        """
        super().__init__()
        self.config = config
        self.text_width = text_width
        self.image_encoder = ImageEncoder(config, input_size)
        width = self.image_encoder.channels[-1]
        norm, joint = config.projection_norm, config.joint_dim
        self.impression_head = ProjectionHead(width, config.image_hidden or width, joint, norm)
        enabled = config.aggregation.enabled
        self.findings_branch = FindingsBranch(self.image_encoder.channels, config) if enabled else None
        self.text_projection = ProjectionHead(text_width, config.text_hidden, joint, norm)
        self.temperature = LearnableTemperature(temperature) if temperature and temperature.learnable else None
        self.text_tower = text_tower

    def forward(self, batch: Batch) -> Features:
        """All B * V views go through the backbone and each head together, so a BatchNorm sees both views at once.

        In training the findings branch looks at two draws of channels, seeded by the step; in evaluation both results
        are the one mean over the fixed draws.
        """
        studies, views = batch.images.shape[:2]
        levels = self.image_encoder(batch.images.flatten(0, 1))
        impression = _unit(self.impression_head(_pooled(levels)))
        first = second = None
        if self.findings_branch is not None and self.training:
            first, second = (_unit(self.findings_branch(levels, draw_seed("step", batch.step, i))) for i in range(2))
        elif self.findings_branch is not None:
            first = second = self._findings(levels)
        by_study = [rows if rows is None else rows.view(studies, views, -1) for rows in (impression, first, second)]
        text_impression, text_findings = self._texts(batch)
        temperature = None if self.temperature is None else self.temperature()
        return Features(*by_study, text_impression, text_findings, temperature)  # type: ignore[arg-type]

    def encode_image(self, images: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """uint8 [B, 1, H, W] -> impression [B, D] and findings [B, D] (or None) as unit rows, pooled last level [B, C].

        Call it in evaluation mode: no embedding then depends on what else is in the batch.
        """
        levels = self.image_encoder(images)
        pooled = _pooled(levels)
        return _unit(self.impression_head(pooled)), self._findings(levels), _wide(pooled)

    def embed_levels(self, levels: list[Tensor], branch: Literal["impression", "findings"]) -> Tensor:
        """Features of every level -> unit rows [B, D] of one branch, as encode_image has them; differentiable in the levels."""
        rows = _unit(self.impression_head(_pooled(levels))) if branch == "impression" else self._findings(levels)
        if rows is None:
            raise ValueError("branch = 'findings': this model has no findings branch; ask its impression branch")
        return rows

    def encode_text(self, embeddings: Tensor) -> Tensor:
        """Text embeddings [n, E] -> unit rows [n, D]; the same projection serves both sections."""
        if embeddings.ndim != 2 or embeddings.shape[1] != self.text_width:
            raise ValueError(
                f"embeddings: must be [n, {self.text_width}], as wide as the text encoder that this model was trained "
                f"with, found {list(embeddings.shape)}"
            )
        weight = next(self.text_projection.parameters())
        return _unit(self.text_projection(embeddings.to(weight.dtype)))

    def _findings(self, levels: list[Tensor]) -> Tensor | None:
        """The mean over fixed draws of channels, so that an image always has the same embedding."""
        if self.findings_branch is None:
            return None
        seeds = [draw_seed("evaluation", draw) for draw in range(self.config.aggregation.eval_draws)]
        return _unit(torch.stack([_unit(self.findings_branch(levels, seed)) for seed in seeds]).mean(dim=0))

    def _texts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Both sections in one call, so that both are normalised alike, in training as in evaluation.

        A missing section is a row of zeros, which would distort the statistics of a BatchNorm; the study's other
        section stands in. The objective masks such rows, so nothing is ever aligned with them.
        """
        findings, impression = self._sections(batch)
        if self.findings_branch is None:  # nothing is aligned with the findings: they must not shape the statistics
            text = self.encode_text(impression)
            return text, text
        has_impression, has_findings = batch.has_impression[:, None], batch.has_findings[:, None]
        filled = torch.where(has_impression, impression, findings), torch.where(has_findings, findings, impression)
        first, second = self.encode_text(torch.cat(filled)).chunk(2)
        return first, second

    def _sections(self, batch: Batch) -> Sequence[Tensor]:
        """Embeddings of findings and impression [B, E] each, zeros where missing: of the tower, or those that came along."""
        if self.text_tower is None:
            return batch.findings, batch.impression
        assert batch.tokens is not None, "a model with a text tower wants batches with tokens"
        return self.text_tower(batch.tokens, with_findings=self.findings_branch is not None).unbind(dim=1)


def _pooled(levels: list[Tensor]) -> Tensor:
    return levels[-1].mean(dim=(2, 3))


def _unit(rows: Tensor) -> Tensor:
    """Rows of unit norm, in float32 whatever the precision of the network; in float64 of a network that is."""
    return normalize(_wide(rows), dim=1)


def _wide(rows: Tensor) -> Tensor:
    """float32, or float64 in a model of float64."""
    return rows if rows.dtype == torch.float64 else rows.float()
