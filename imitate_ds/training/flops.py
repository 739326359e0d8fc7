"""Floating-point operations of one real step, by part of the model, as torch.utils.flop_counter counts them.

Its own tracker loses its way where a part's inputs need no gradient, as images and frozen texts do: the part would never be
left in backward. Here a node of the backward pass belongs to the part that made it, which its sequence number tells.
"""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

OUTSIDE = "outside"  # of the model: the loss, which is counted by formula, and what is measured beside it
REST = "rest"  # of the model, in none of its parts
AGAIN = "again: "  # what activation checkpointing and GradCache compute a second time

aten = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Without the scores that fused kernels compute again: four products, where torch's own formula has five."""
    return 2 * sdpa_flop_count(query, key, value)


CONVOLUTIONS = (aten.convolution, aten._convolution, aten.convolution_backward)
FORMULAS = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,  # which torch 2.14 has no formula for
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
}


@dataclass
class Flops:
    """Of one step on this rank; filled in when counting ends."""

    by_part: dict[str, int] = field(default_factory=dict)  # forward and backward once, whatever is computed twice
    again: int = 0
    convolutions: int = 0  # of by_part


@contextmanager
def count_flops(model: nn.Module) -> Iterator[Flops]:
    """Count the steps taken in here, whose numbers stay what they are. A part is a direct child of the model.

    Compiled modules run as they were written: what a fused kernel does could not be seen.
    """
    found, parts = Flops(), _Parts(model)
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    counter.mod_tracker = parts  # type: ignore[assignment]
    stance = torch.compiler.set_stance("force_eager")
    with stance, counter:
        yield found
    for name, products in counter.get_flop_counts().items():
        if name.startswith(AGAIN):
            found.again += sum(products.values())
        elif name != OUTSIDE:
            found.by_part[name] = sum(products.values())
            found.convolutions += sum(products.get(product, 0) for product in CONVOLUTIONS)


class _Parts:
    """Which part of the model is at work, in the form in which FlopCounterMode asks for it."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._hooks: list[Any] = []
        self._inside: list[str] = []  # parts whose forward goes on, the innermost last
        self._learning = True  # whether the forward pass that goes on will have a backward pass
        # From which sequence number on nodes belong to which part
        self._numbers, self._parts = [0], [OUTSIDE]

    def __enter__(self) -> None:
        for name, module in self._model.named_modules():
            part = name.partition(".")[0] or REST
            self._hooks.append(module.register_forward_pre_hook(partial(self._enter, part)))
            # always: checkpointing leaves a forward pass that it does again by an exception, once it has what it needs
            self._hooks.append(module.register_forward_hook(self._leave, always_call=True))

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def parents(self) -> set[str]:
        if not _in_backward():
            if not self._inside:
                return {OUTSIDE}
            return {self._inside[-1] if self._learning else AGAIN + self._inside[-1]}
        node = torch._C._current_autograd_node()
        number = node._sequence_nr() if node is not None else 0
        part = self._parts[bisect_right(self._numbers, number) - 1]
        return {AGAIN + part if self._inside else part}

    def _enter(self, part: str, *_: object) -> None:
        if not self._inside:  # not later: custom functions, such as those of ZeRO-3, switch it off within
            self._learning = torch.is_grad_enabled()
        self._inside.append(part)
        self._note(part)

    def _leave(self, *_: object) -> None:
        self._inside.pop()
        self._note(self._inside[-1] if self._inside else OUTSIDE)

    def _note(self, part: str) -> None:
        if not _in_backward() and part != self._parts[-1]:
            self._numbers.append(torch.autograd._get_sequence_nr())  # pyright: ignore[reportPrivateImportUsage]
            self._parts.append(part)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
