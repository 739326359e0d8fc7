"""A batch larger than memory holds, with the gradient of the whole: the encoder twice in chunks, the loss once.

"Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (Gao et al., 2021). A contrastive loss needs the
embeddings of the whole batch, but only its gradient with respect to them has to come back to the encoder.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from imitate_ds.flight import flight
from imitate_ds.training.batch_norm import hold_batch_norm_statistics
from imitate_ds.training.engine import one_reduction

Losses = TypeVar("Losses")


class RandomState(NamedTuple):
    """What dropout and stochastic depth draw from."""

    cpu: Tensor
    cuda: Tensor | None

    @staticmethod
    def now() -> "RandomState":
        return RandomState(torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


def chunk_count(counts: Sequence[int], chunk: int) -> int:
    """In how many parts ranks that hold so many studies pass their batches: the same number on all of them.

    A part holds `chunk` studies at the most, but two at the least on every rank, for BatchNorm refuses a single one: where
    shares are odd, or differ by one, it may hold one or two more.
    """
    return max(1, min(math.ceil(max(counts) / chunk), min(counts) // 2))


def backward_in_chunks(
    engine: Any,
    chunks: Sequence[Any],
    join: Callable[[Sequence[Any]], Any],
    loss_of: Callable[[Any], tuple[Tensor, Losses]],
) -> tuple[Any, Losses]:
    """Leave the gradient of loss_of(join(features of every chunk)) in the engine, as one backward pass would.

    The engine makes a NamedTuple of float tensors (or None) of a chunk; loss_of gives the scalar to learn from, and
    whatever else of it is wanted. Returns the joined features, detached, and that. Both passes of a chunk draw alike, and
    BatchNorm learns its statistics in the second one only; it normalises each chunk by itself.
    """
    states: list[RandomState] = []
    cached: list[Any] = []
    with torch.no_grad(), hold_batch_norm_statistics(engine.module):
        for chunk in chunks:
            states.append(RandomState.now())
            cached.append(engine(chunk))
    leaves = [_mapped(Tensor.requires_grad_, _mapped(Tensor.detach, features)) for features in cached]
    whole = join(leaves)
    flight.begin("loss")
    loss, losses = loss_of(whole)
    gradients = _gradients(loss, leaves)
    with one_reduction(engine):
        for chunk, state, gradient in zip(chunks, states, gradients, strict=True):
            state.restore()
            flight.begin("forward")
            product = _inner_product(engine(chunk), gradient)
            flight.begin("backward")
            # the whole gradient counts: chunks are parts of one batch, not batches to be averaged
            engine.backward(product, scale_wrt_gas=False)
    return _mapped(Tensor.detach, whole), losses


def _gradients(loss: Tensor, leaves: Sequence[Any]) -> list[list[Tensor | None]]:
    """Of the loss with respect to every tensor of every chunk; None for what is no tensor, or has no part in it."""
    tensors = [tensor for features in leaves for tensor in features if tensor is not None]
    found = iter(torch.autograd.grad(loss, tensors, allow_unused=True))
    return [[None if tensor is None else next(found) for tensor in features] for features in leaves]


def _inner_product(features: Any, gradients: Sequence[Tensor | None]) -> Tensor:
    """Its gradient with respect to the features is what `gradients` holds."""
    pairs = zip(features, gradients, strict=True)
    return torch.stack([(rows * gradient).sum() for rows, gradient in pairs if gradient is not None]).sum()


def _mapped(function: Callable[[Tensor], Tensor], features: Any) -> Any:
    return type(features)(*(None if tensor is None else function(tensor) for tensor in features))
