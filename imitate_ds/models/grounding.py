"""Which places of an image answer a text, read from the features of the levels.

s is the cosine of the embedding of a branch and of the text. With the features A_l of a level (channel c, cell x) and what is
usual there, U_l, the part that a cell has in s is to first order

    m_l(x) = sum_c  ds/dA_lc(x) (A_lc(x) - U_lc(x)),

gradient times activation, as Grad-CAM has it, but with the gradient of each cell, and against a baseline. m_l times the number
of cells is drawn out to the size of the image; the map is the sum over the levels that the branch reads, negative values cut off.
Before the cut its mean over the pixels is about s(A) - s(U). The findings branch reads all levels, through the aggregation block
with its fixed draws of channels; the impression branch the last.

U matters: anatomy that every chest has draws most of a plain gradient times activation. On phantoms the maximum lies in a box of
the lesion 0.43 of the time with the mean over other radiographs as U, and 0.22 without (README, Real data).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate, relu

from imitate_ds.models.imitate import ImitateModel


@torch.no_grad()
def sum_levels(model: ImitateModel, images: Tensor) -> list[Tensor]:
    """The features of every level, added up over images uint8 [B, 1, H, W]: S tensors float32 [C_s, H_s, W_s]."""
    return [level.float().sum(dim=0) for level in model.image_encoder(images)]


def grounding_maps(
    model: ImitateModel,
    images: Tensor,
    texts: Tensor,
    branch: Literal["impression", "findings"],
    usual: Sequence[Tensor] | None = None,
) -> Tensor:
    """Images uint8 [B, 1, H, W] and a unit row of text for each [B, D] -> maps float32 [B, H, W], not negative.

    usual: what to compare with, S tensors [C_s, H_s, W_s]; None compares with nothing (0). Call it in evaluation mode: no
    map then depends on what else is in the batch.
    """
    with torch.no_grad():
        levels = model.image_encoder(images)
    return relu(contributions(model, levels, texts, branch, usual, tuple(images.shape[-2:])))


def contributions(
    model: ImitateModel,
    levels: Sequence[Tensor],
    texts: Tensor,
    branch: Literal["impression", "findings"],
    usual: Sequence[Tensor] | None,
    size: tuple[int, ...],
) -> Tensor:
    """What a map is before negative values are cut off, from the features [B, C_s, H_s, W_s]: float32 [B, *size]."""
    levels = [level.detach().requires_grad_() for level in levels]
    with torch.enable_grad():
        cosines = (model.embed_levels(levels, branch) * texts).sum()
        gradients = torch.autograd.grad(cosines, levels, allow_unused=True)  # no gradient: the branch does not read it
    total = torch.zeros(len(texts), 1, *size, device=texts.device)
    for place, (level, gradient) in enumerate(zip(levels, gradients, strict=True)):
        if gradient is not None:
            change = level.detach().float() - (0 if usual is None else usual[place].to(level.device))
            parts = (gradient.float() * change).sum(dim=1, keepdim=True) * level.shape[-2] * level.shape[-1]
            total += interpolate(parts, size=size, mode="bilinear")
    return total[:, 0]
