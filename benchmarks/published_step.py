"""The published training step of IMITATE, written afresh from what it does, and switches that take its costs away one by one.

"IMITATE: Clinical Prior Guided Hierarchical Vision-Language Pre-training" (Liu et al., IEEE TMI 2025), as its program behaves:
four backbone passes a study (two views x two draws of channels), the frozen language model in the loop, eight losses that
each make their own matrices. No code of the authors is in here. Where their behaviour is not known, the faster way is taken:
texts are padded to the longest of the batch, not to 256; nothing is computed that no loss reads; attention keeps no weights.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package need not be installed

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, normalize
from torch.nn.parallel import DistributedDataParallel

from imitate_ds.batch import Features
from imitate_ds.ops.contrastive import Pair, clinical_contrastive_losses

KEEP = (0.25, 0.15, 0.10, 0.10)  # share of the channels of each level that become tokens
POOL, SLOTS, HEADS = 16, 512, 4
JOINT, TEXT_HIDDEN = 512, 1024
TEXT_TEMPERATURE, VIEWS_TEMPERATURE, PRIOR_STRENGTH = 0.07, 0.2, 0.2
RESTART_STEPS = 33_341
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Savings(NamedTuple):
    """What of our step the published one takes over; all False is the published one."""

    one_pass: bool = False  # of the backbone for each view; both draws look at it
    cached_text: bool = False  # embeddings come with the batch
    single_losses: bool = False  # six, two of them with weight 2
    strips: bool = False  # instead of matrices that autograd keeps
    no_sync: bool = False  # losses stay on the device
    channels_last: bool = False  # layout of the pixels, which convolutions keep
    cls_query: bool = False  # only the row of the attention that is used is asked for


class Studies(NamedTuple):
    """A batch before the language model."""

    images: Tensor  # uint8 [B, 2, 1, H, W]
    tokens: dict[str, dict[str, Tensor]]  # of each section: input_ids and attention_mask [B, T]
    texts: dict[str, Tensor]  # of each section: what the cache holds, [B, E]


SECTIONS = ("impression", "findings")


class AggregationBlock(nn.Module):
    """A share of the channels of every level as tokens, filled up to 512 with zeros, and one attention over all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, POOL**2))
        self.positions = nn.Parameter(torch.zeros(1, SLOTS + 1, POOL**2))
        self.attention = nn.MultiheadAttention(POOL**2, HEADS, batch_first=True)

    def forward(self, levels: Sequence[Tensor], draw: Sequence[Tensor], *, cls_query: bool) -> Tensor:
        """Levels [B, C_s, H_s, W_s] -> [B, 256]."""
        pooled = (adaptive_avg_pool2d(level[:, kept], POOL) for level, kept in zip(levels, draw, strict=True))
        tokens = torch.cat([grid.flatten(2) for grid in pooled], dim=1)
        empty = tokens.new_zeros(len(tokens), SLOTS - tokens.shape[1], POOL**2)
        cls = self.cls_token.to(tokens.dtype).expand(len(tokens), -1, -1)
        tokens = torch.cat([cls, tokens, empty], dim=1) + self.positions
        query = tokens[:, :1] if cls_query else tokens
        attended, _ = self.attention(query, tokens, tokens, need_weights=False)
        return (query + attended)[:, 0]


def projection(width: int, hidden: int, out: int = JOINT) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, out),
        nn.BatchNorm1d(out, affine=False),
    )


class PublishedNetwork(nn.Module):
    """Studies -> Features, and the text embeddings that are the clinical prior, by section.

    The backbone gives levels [B, C_s, H_s, W_s] of three-channel pixels; the text model is frozen, in evaluation mode.
    """

    def __init__(
        self, backbone: nn.Module, channels: Sequence[int], text: nn.Module | None, text_width: int, savings: Savings
    ):
        """text: None where embeddings come with the batch."""
        super().__init__()
        self.channels, self.savings = list(channels), savings
        self.backbone = backbone
        self.impression_head = projection(self.channels[-1], self.channels[-1])
        self.block = AggregationBlock()
        self.findings_head = projection(POOL**2, POOL**2)
        self.text_head = projection(text_width, TEXT_HIDDEN)
        self.text = None if text is None else text.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "PublishedNetwork":
        super().train(mode)
        if self.text is not None:
            self.text.eval()
        return self

    def forward(self, studies: Studies, draws: Sequence[Sequence[Tensor]]) -> tuple[Features, dict[str, Tensor]]:
        """draws: two of channels, each as draw_channels gives it."""
        priors = self._read(studies)
        views = [self._pixels(view) for view in studies.images.unbind(dim=1)]
        seen = [self.backbone(view) for view in views] if self.savings.one_pass else None
        concluded, described, other = [], [], []
        for view, pixels in enumerate(views):
            levels = seen[view] if seen else self.backbone(pixels)
            concluded.append(unit(self.impression_head(levels[-1].mean(dim=(2, 3)))))
            described.append(self._findings(levels, draws[0]))
        for view, pixels in enumerate(views):
            levels = seen[view] if seen else self.backbone(pixels)
            other.append(self._findings(levels, draws[1]))
        images = (torch.stack(rows, dim=1) for rows in (concluded, described, other))
        texts = (unit(self.text_head(priors[section])) for section in SECTIONS)
        return Features(*images, *texts), priors

    def _findings(self, levels: Sequence[Tensor], draw: Sequence[Tensor]) -> Tensor:
        return unit(self.findings_head(self.block(levels, draw, cls_query=self.savings.cls_query)))

    def _pixels(self, view: Tensor) -> Tensor:
        """uint8 [B, 1, H, W] -> float [B, 3, H, W] of deviation about one."""
        pixels = ((view.float() / 255 - 0.5) / 0.25).expand(-1, 3, -1, -1)
        layout = torch.channels_last if self.savings.channels_last else torch.contiguous_format
        return pixels.contiguous(memory_format=layout)

    @torch.no_grad()
    def _read(self, studies: Studies) -> dict[str, Tensor]:
        """The last layer's vector at the first token."""
        if self.text is None:
            return studies.texts
        return {name: self.text(**studies.tokens[name]).last_hidden_state[:, 0].float() for name in SECTIONS}


def draw_channels(channels: Sequence[int], device: torch.device) -> list[Tensor]:
    """Which channels of each level, with replacement, for the whole batch."""
    return [
        torch.randint(width, (int(width * share),), device=device) for width, share in zip(channels, KEEP, strict=True)
    ]


def unit(rows: Tensor) -> Tensor:
    return normalize(rows, dim=1)


def softness(texts: Tensor) -> Tensor:
    """P [N, N] of text embeddings [N, E]."""
    correlation = torch.corrcoef(texts).clamp(min=0).fill_diagonal_(0)
    return 1 - torch.exp(-PRIOR_STRENGTH * correlation)


def materialised_loss(x: Tensor, y: Tensor, texts: Tensor | None, temperature: float) -> Tensor:
    """CE(S, Y) + CE(S^T, Y), S = x y^T / temperature, Y = I + temperature P, every one of them a matrix [N, N]."""
    logits = x @ y.T / temperature
    targets = torch.eye(len(x), dtype=logits.dtype, device=x.device)
    if texts is not None:
        targets = targets + temperature * softness(texts).to(targets.dtype)
    return cross_entropy(logits, targets) + cross_entropy(logits.T, targets)


def strip_loss(x: Tensor, y: Tensor, texts: Tensor | None, temperature: float) -> Tensor:
    """The same by strips of rows."""
    (loss,) = clinical_contrastive_losses(
        [Pair(x, y, temperature)], texts, prior_strength=PRIOR_STRENGTH, backend="strips"
    )
    return loss


def published_losses(features: Features, priors: dict[str, Tensor], savings: Savings) -> list[Tensor]:
    """The eight, two of them exact doubles of their neighbours; their sum is the loss."""
    (d1, d2), (r1, r2), (s1, s2) = (rows.unbind(dim=1) for rows in features[:3] if rows is not None)
    concluded, described = (priors[section] for section in SECTIONS)
    one = strip_loss if savings.strips else materialised_loss
    losses = [
        one(d1, features.text_impression, concluded, TEXT_TEMPERATURE),
        one(d2, features.text_impression, concluded, TEXT_TEMPERATURE),
        one(r1, features.text_findings, described, TEXT_TEMPERATURE),
        one(r2, features.text_findings, described, TEXT_TEMPERATURE),
    ]
    if savings.single_losses:
        return [*losses, 2 * one(d1, d2, concluded, VIEWS_TEMPERATURE), 2 * one(s1, s2, None, VIEWS_TEMPERATURE)]
    return [
        *losses,
        one(d1, d2, concluded, VIEWS_TEMPERATURE),
        one(d2, d1, concluded, VIEWS_TEMPERATURE),
        one(s1, s2, None, VIEWS_TEMPERATURE),
        one(s2, s1, None, VIEWS_TEMPERATURE),
    ]


def gather(features: Features, priors: dict[str, Tensor]) -> tuple[Features, dict[str, Tensor]]:
    """The rows of all ranks, with gradient; the priors without. A collective."""
    everyone = Features(*(torch.cat(all_gather(rows)) for rows in features if rows is not None))  # type: ignore[arg-type]
    with torch.no_grad():
        return everyone, {name: torch.cat(all_gather(rows)) for name, rows in priors.items()}


def build_step(
    network: PublishedNetwork, precision: str, *, gathers: bool, enter: Callable[[str], None] = lambda _: None
) -> Callable[[Studies], Tensor]:
    """One optimizer step as published: DDP, autocast, AdamW over all weights, the frozen ones too. Needs a process group.

    enter: told when the optimizer begins.
    """
    device, savings = next(network.parameters()).device, network.savings
    wrapped = DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-4, weight_decay=5e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, RESTART_STEPS)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")  # pyright: ignore[reportPrivateImportUsage]
    autocast: dict[str, Any] = {"dtype": DTYPES[precision], "enabled": precision != "fp32"}

    def step(studies: Studies) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, **autocast):
            features, priors = wrapped(studies, [draw_channels(network.channels, device) for _ in range(2)])
            if gathers:
                features, priors = gather(features, priors)
            losses = published_losses(features, priors, savings)
            total = torch.stack(losses).sum()
        scaler.scale(total).backward()
        enter("optimizer")
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        if not savings.no_sync:  # every loss is read in every step
            for loss in losses:
                loss.item()
        return total.detach()

    return step
