"""Towers of the model through torch.compile, one graph each. What ranks exchange and the loss stay outside.

A tower that cannot be compiled, forward or backward, goes on as it is, and says why, once. Dropout and stochastic depth
draw what they draw uncompiled.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._dynamo import config as dynamo
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._functorch import config as autograd_config

from imitate_ds.models.imitate import ImitateModel

# All that the compiler itself raises: no or a broken C++ compiler, a part it cannot trace, more sizes than it compiles for
COMPILER_ERRORS = (TorchDynamoException, FailOnRecompileLimitHit)

# Heads share what is compiled of their class, and torch gives up after eight graphs: three heads, for chunks of two sizes, with
# gradients and without, are twelve.
MOST_GRAPHS = 64


def compile_towers(model: ImitateModel, towers: Sequence[str], warn: Callable[[str], None]) -> None:
    """From now on these towers (train.compile) train compiled, after the first step of each size; evaluation is as before.

    warn: is told, once for a tower, why it goes on uncompiled.
    """
    told: set[str] = set()

    def failed(tower: str, error: BaseException) -> None:
        if tower not in told:
            told.add(tower)
            warn(f"train.compile: {tower} goes on uncompiled: {_reason(error)}")

    dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_GRAPHS)
    for tower in towers:
        for part, method in _parts(model, tower):
            setattr(part, method, _compiled(part, getattr(part, method), partial(failed, tower)))


def _parts(model: ImitateModel, tower: str) -> Iterator[tuple[nn.Module, str]]:
    if tower == "image_encoder":
        yield model.image_encoder, "forward"
    elif tower == "projections":
        yield model.impression_head, "forward"
        yield model.text_projection, "forward"
    elif model.findings_branch is not None:
        yield model.findings_branch.aggregation, "attend"  # not the draw of channels: it has a generator of its own
        yield model.findings_branch.projection, "forward"


def _compiled(
    part: nn.Module, plain: Callable[..., Any], failed: Callable[[BaseException], None]
) -> Callable[..., Any]:
    # One graph or none: where half of a tower had run before the other half fails, BatchNorm would learn from it twice.
    fast = torch.compile(plain, fullgraph=True, dynamic=False, options={"fallback_random": True})
    compiles = True

    def call(*inputs: Any) -> Any:
        nonlocal compiles
        if not (compiles and part.training):
            return plain(*inputs)
        try:
            # The backward pass at once, not when it first runs: there it would be too late to go on uncompiled.
            with autograd_config.patch(force_non_lazy_backward_lowering=True):
                return fast(*inputs)
        except COMPILER_ERRORS as error:
            compiles = False
            failed(error)
            return plain(*inputs)

    return call


def _reason(error: BaseException) -> str:
    """The first line that says something, of what may be pages."""
    lines = (line.strip() for line in str(error).splitlines())
    return f"{type(error).__name__}: {next(filter(None, lines), 'no reason given')}"
