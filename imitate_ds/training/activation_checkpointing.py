"""Activations computed a second time in the backward pass instead of being kept: less memory for one more forward pass.

"Training Deep Nets with Sublinear Memory Cost" (Chen et al., 2016), by torch.utils.checkpoint. The second pass is the first one
again: it draws what that drew, under the same autocast, and BatchNorm takes no notice of it.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from imitate_ds.training.batch_norm import batch_norm_statistics, restore_batch_norm_statistics


def checkpoint_activations(parts: Iterable[nn.Module]) -> None:
    """From now on these modules keep what goes in, not what they compute on the way. No weight changes its name."""
    for part in parts:
        part.forward = partial(_checkpointed, part, part.forward)


def _checkpointed(part: nn.Module, forward: Any, *inputs: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **named)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=partial(_passes, part), **named)


def _passes(part: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of the first pass and of the second."""
    return nullcontext(), _statistics_put_back(part)


@contextmanager
def _statistics_put_back(part: nn.Module) -> Iterator[None]:
    """Not held off: the second pass must save for backward what the first did, and BatchNorm saves its statistics."""
    copies = batch_norm_statistics(part)
    try:
        yield
    finally:
        restore_batch_norm_statistics(part, copies)
