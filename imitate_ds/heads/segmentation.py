"""Masks, by a decoder of segmentation_models_pytorch over the encoder's levels.

Loss of the protocol of MGCA ("Multi-Granularity Cross-modal Alignment for Generalized Medical Visual Representation Learning",
Wang et al., 2022): 10 focal - log Dice.
"""

from collections.abc import Sequence

import torch
from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate

from imitate_ds.batch import IGNORED, LabeledBatch
from imitate_ds.heads.pyramid import Pyramid

FOCAL_WEIGHT, GAMMA, SMOOTH = 10.0, 2.0, 1.0
UNET_WIDTHS = (256, 128, 64, 32, 16)
FPN_LEVELS = 4


class SegmentationHead(nn.Module):
    """One channel for each mask; masks may overlap. decoder: unet or fpn."""

    def __init__(self, channels: Sequence[int], reductions: Sequence[int], masks: int, *, decoder: str = "unet"):
        super().__init__()
        self.pyramid = Pyramid(channels, reductions)
        if decoder == "unet":
            # Its first entry stands for the image: what is decoded comes at half of its size.
            widths = UNET_WIDTHS[: len(channels)]
            self.decoder = UnetDecoder([0, *channels], widths, n_blocks=len(channels))
            width = widths[-1]
        elif len(channels) != FPN_LEVELS:
            raise ValueError(
                f"task.head = 'fpn': needs {FPN_LEVELS} levels, the encoder has {len(channels)}; take unet"
            )
        else:
            self.decoder = FPNDecoder(list(channels))
            width = self.decoder.out_channels
        self.classifier = nn.Conv2d(width, masks, kernel_size=1)

    def forward(self, levels: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Logits [B, masks, H, W] of the image's size."""
        levels = self.pyramid(levels)
        if isinstance(self.decoder, FPNDecoder):
            levels = _halving(levels)
        half = (
            levels[0].new_zeros(()).expand(1, 1, *(-(-side // 2) for side in size))
        )  # of which only the shape is read
        logits = self.classifier(self.decoder([half, *levels]))
        return interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)

    def sums(self, logits: Tensor, batch: LabeledBatch) -> dict[str, Tensor]:
        """Of known pixels; what is IGNORED does not count."""
        known, inside = batch.masks != IGNORED, (batch.masks == 1).float()
        share, inside = torch.where(known, logits.sigmoid(), 0.0), torch.where(known, inside, 0.0)
        focal = torch.where(known, _focal(logits, inside), 0.0).sum()
        common, sizes = (x.sum(dim=(0, 2, 3)) for x in (share * inside, share + inside))
        return {"focal": focal, "known": known.sum().float(), "common": common, "sizes": sizes}

    def combine(self, sums: dict[str, Tensor]) -> dict[str, Tensor]:
        """10 focal(gamma 2) - log soft Dice: the mean over pixels, and over masks of their Dice in the whole batch."""
        focal = sums["focal"] / sums["known"].clamp(min=1)
        log_dice = -((2 * sums["common"] + SMOOTH) / (sums["sizes"] + SMOOTH)).log().mean()
        return {"loss": FOCAL_WEIGHT * focal + log_dice, "focal": focal, "log_dice": log_dice}

    def predict(self, logits: Tensor) -> Tensor:
        """Probabilities [B, masks, H, W]."""
        return logits.sigmoid()


def _halving(levels: list[Tensor]) -> list[Tensor]:
    """The same, resized where a level is not twice as large as the next: of sides that do not divide by 32."""
    fitted = [levels[-1]]
    for level in levels[-2::-1]:
        size = [2 * side for side in fitted[0].shape[-2:]]
        same = list(level.shape[-2:]) == size
        fitted.insert(0, level if same else interpolate(level, size=size, mode="bilinear", align_corners=False))
    return fitted


def _focal(logits: Tensor, inside: Tensor) -> Tensor:
    """Of each pixel: "Focal Loss for Dense Object Detection" (Lin et al., 2017), eq. 4, without weights of classes."""
    entropy = binary_cross_entropy_with_logits(logits, inside, reduction="none")
    return (1 - (-entropy).exp()) ** GAMMA * entropy
