"""The hierarchical aggregation block: channels of every level become tokens, a CLS token sums them up.

"IMITATE: Clinical Prior Guided Hierarchical Vision-Language Pre-training" (Liu et al., 2025). A token is one channel of
one level, pooled to a small grid, so the block takes levels of any resolution and any backbone.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from imitate_ds.config import AggregationConfig


def draw_seed(*parts: int | str) -> int:
    """A seed for one draw of channels, from what names the draw; the same on every rank and machine."""
    digest = hashlib.blake2b("/".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class HierarchicalAggregation(nn.Module):
    """Levels [B, C_s, H_s, W_s] -> rows [B, pool^2], by attention over a random share of every level's channels."""

    def __init__(self, channels: Sequence[int], config: AggregationConfig):
        super().__init__()
        self.config = config
        self.channels = list(channels)
        self.width = config.pool**2
        self.kept = _kept_channels(self.channels, config)
        if self.width % config.heads:
            raise ValueError(f"model.aggregation.heads = {config.heads}: must divide pool^2 = {self.width}")
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.width))
        self.positions = nn.Parameter(torch.zeros(1, config.slots + 1, self.width))  # the first is that of CLS
        self.attention = nn.MultiheadAttention(self.width, config.heads, batch_first=True)

    def forward(self, levels: Sequence[Tensor], seed: int) -> Tensor:
        """`seed` decides which channels are looked at: one draw for the whole batch."""
        return self.attend(levels, self.draw_channels(seed))

    def attend(self, levels: Sequence[Tensor], draw: Sequence[Tensor]) -> Tensor:
        """Levels and the channels that were drawn of each -> rows [B, pool^2]."""
        tokens = self._tokens(levels, draw)
        tokens = torch.cat([self.cls_token.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = tokens + self.positions[:, : tokens.shape[1]]
        # Only the CLS row of the result is used, so only its query is asked: the same row for 1/513 of the cost.
        cls = tokens[:, :1]
        attended, _ = self.attention(cls, tokens, tokens, need_weights=False)
        return (cls + attended)[:, 0]

    def draw_channels(self, seed: int) -> list[Tensor]:
        """Which channels of each level: S index tensors on the CPU, from their own generator."""
        generator = torch.Generator().manual_seed(seed)
        pairs = zip(self.channels, self.kept, strict=True)
        if self.config.with_replacement:
            return [torch.randint(width, (kept,), generator=generator) for width, kept in pairs]
        return [torch.randperm(width, generator=generator)[:kept] for width, kept in pairs]

    def _tokens(self, levels: Sequence[Tensor], draw: Sequence[Tensor]) -> Tensor:
        """One token per drawn channel [B, T, pool^2]; filled up with zeros to all slots when padding is not masked."""
        device = levels[0].device
        indices = torch.cat(list(draw)).to(device, non_blocking=True).split(self.kept)
        pooled = [
            adaptive_avg_pool2d(level.index_select(1, index), self.config.pool).flatten(2)
            for level, index in zip(levels, indices, strict=True)
        ]
        tokens = torch.cat(pooled, dim=1)
        if self.config.mask_padding:  # what is not there needs no mask
            return tokens
        empty = tokens.new_zeros(len(tokens), self.config.slots - tokens.shape[1], self.width)
        return torch.cat([tokens, empty], dim=1)


def _kept_channels(channels: Sequence[int], config: AggregationConfig) -> list[int]:
    keep = list(config.keep)
    if len(keep) != len(channels) or not all(0 < share <= 1 for share in keep):
        raise ValueError(
            f"model.aggregation.keep = {keep}: must be one share in (0, 1] for each of the {len(channels)} levels"
        )
    kept = [max(1, int(width * share)) for width, share in zip(channels, keep, strict=True)]
    if sum(kept) > config.slots:
        raise ValueError(
            f"model.aggregation.slots = {config.slots}: must be at least {sum(kept)}, the channels kept of levels "
            f"{list(channels)}; raise it, or lower model.aggregation.keep"
        )
    return kept
