"""Labels of the whole image, from the pooled last level."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from imitate_ds.batch import LabeledBatch


class ClassificationHead(nn.Module):
    """A linear layer, or with hidden > 0 one hidden layer of that width.

    exclusive: of the classes one holds, so softmax over them; else each is a question of its own.
    """

    def __init__(self, channels: Sequence[int], classes: int, *, hidden: int = 0, exclusive: bool = False):
        super().__init__()
        self.exclusive = exclusive
        width = channels[-1]
        layers = (
            [nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, classes)] if hidden else [nn.Linear(width, classes)]
        )
        self.layers = nn.Sequential(*layers)

    def forward(self, levels: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Logits [B, classes]."""
        return self.layers(levels[-1].mean(dim=(2, 3)))

    def sums(self, logits: Tensor, batch: LabeledBatch) -> dict[str, Tensor]:
        """Cross entropy over the labels that are known (1 or 0), or over the samples of which one class holds; their number."""
        logits, labels = logits.float(), batch.labels
        if self.exclusive:
            known = (labels == 1).sum(dim=1) == 1
            each = cross_entropy(logits, labels.argmax(dim=1), reduction="none")
        else:
            known = labels >= 0
            each = binary_cross_entropy_with_logits(logits, labels.clamp(min=0).float(), reduction="none")
        return {"entropy": torch.where(known, each, 0.0).sum(), "known": known.sum().float()}

    def combine(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean of them."""
        return {"loss": sums["entropy"] / sums["known"].clamp(min=1)}

    def predict(self, logits: Tensor) -> Tensor:
        """Probabilities [B, classes]."""
        logits = logits.float()
        return logits.softmax(dim=1) if self.exclusive else logits.sigmoid()
