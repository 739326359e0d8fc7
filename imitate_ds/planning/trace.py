"""One step of the real program, run on tensors that hold nothing: what is alive after every operation, and what it computes.

Forward and backward pass under torch's FakeTensorMode, which knows shapes but no numbers, so that a step of any model and
any batch takes a second and no memory. Every operation is linear in the micro batch, so two steps say what any other needs.
"""

import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry, sdpa_backward_flop_count, sdpa_flop_count

KINDS = ("matmul", "convolution", "depthwise", "other")
aten = torch.ops.aten

# CUDA's autocast computes them in float32, a CPU's does not; tensors here are those of a CPU, whatever is planned for.
WIDENED = (nn.LayerNorm, nn.GroupNorm)
# They give a tensor, and neither read nor write what is in it.
_UNTOUCHED = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten._unsafe_view,
}


class Trace(NamedTuple):
    """Columns [n], one entry for each of n operations, of a step at a micro batch of so many studies."""

    studies: float
    live: np.ndarray  # bytes alive after it, besides parameters and finished gradients
    finished: np.ndarray  # bytes of the gradients that are finished by then
    flops: np.ndarray
    moved: np.ndarray  # bytes that it reads and writes
    kind: np.ndarray  # which of KINDS
    forward: int  # how many of the operations are the forward pass

    @property
    def saved(self) -> float:
        """Bytes kept for the backward pass."""
        return float(self.live[self.forward - 1])

    def peak(self, gradients: float = 0.0) -> float:
        """Bytes at the worst moment. gradients: the share of a finished gradient that stays where it is."""
        return float((self.live + gradients * self.finished).max())


class Traces(NamedTuple):
    """The same step at two micro batches."""

    small: Trace
    large: Trace

    def at(self, studies: float) -> Trace:
        """At any micro batch, on the line through both."""
        return _on_polynomial(studies, {trace.studies: trace for trace in self})._replace(studies=studies)


class CrowdedTraces(NamedTuple):
    """The same step where rows of tokens are the longer the fewer studies there are; attention grows with their square."""

    by_length: dict[int, Traces]  # of a row; three are exact, two say too much between them
    length_of: Callable[[float], float]  # of a row, at a micro batch

    def at(self, studies: float) -> Trace:
        """At any micro batch, on the parabola through those at three lengths."""
        traces = {float(length): pair.at(studies) for length, pair in self.by_length.items()}
        return _on_polynomial(self.length_of(studies), traces)


def _on_polynomial(x: float, points: dict[float, Trace]) -> Trace:
    """Of the lowest degree through traces of the same operations (Lagrange)."""
    shares = {at: math.prod((x - other) / (at - other) for other in points if other != at) for at in points}
    parts = [(points[at], share) for at, share in shares.items() if share]
    columns = {
        name: np.sum([getattr(trace, name) * share for trace, share in parts], axis=0)
        for name in ("live", "flops", "moved")
    }
    return parts[0][0]._replace(**columns)


def trace_pair(
    model: nn.Module, step: Callable[[nn.Module, int], Tensor], studies: tuple[int, int], **options: Any
) -> Traces:
    """The step at two micro batches; raises RuntimeError where it is not the same operations, so not on one line."""
    small, large = (trace_step(model, step, count, **options) for count in studies)
    if len(small.live) != len(large.live):
        raise RuntimeError(
            f"a step of {studies[0]} studies is {len(small.live)} operations, one of {studies[1]} is {len(large.live)}: the "
            "model does something else for another batch, and what it needs is not on one line"
        )
    return Traces(small, large)


def trace_step(
    model: nn.Module,
    step: Callable[[nn.Module, int], Tensor],
    studies: int,
    *,
    autocast: torch.dtype | None = None,
    as_cuda: bool = False,
) -> Trace:
    """Trace the forward and backward pass of step(model, studies) -> scalar.

    model: on any device, "meta" for one; its weights are lost. autocast: the dtype of torch.autocast, if the run uses it;
    as_cuda: with the rules of a GPU's.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        _empty_weights(model)
        tally = _Tally()
        handles = [p.register_post_accumulate_grad_hook(tally.finish) for p in model.parameters() if p.requires_grad]
        tally.know(*model.parameters(), *model.buffers())
        if autocast and as_cuda:
            norms = (module for module in model.modules() if isinstance(module, WIDENED))
            handles += [module.register_forward_pre_hook(_widen) for module in norms]
        with tally:
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                total = step(model, studies)
            forward = len(tally.rows)
            total.backward()
        del total
        # The last gradient is finished after the last operation.
        tally.rows.append((tally.live, tally.finished, 0, 0, KINDS.index("other")))
        for handle in handles:
            handle.remove()
    live, finished, flops, moved, kind = (np.array(column, dtype=float) for column in zip(*tally.rows, strict=True))
    return Trace(float(studies), live, finished, flops, moved, kind.astype(int), forward)


def _empty_weights(model: nn.Module) -> None:
    """Give the model weights of the mode that is on; Module.to_empty cannot, from one mode to another."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            setattr(module, name, nn.Parameter(empty, requires_grad=parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu"))


def _widen(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return inputs[0].float(), *inputs[1:]


class _Tally(TorchDispatchMode):
    """Counts the bytes of every storage that an operation makes, until it is freed, and what the operations do."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.finished = 0, 0
        self.rows: list[tuple[int, int, int, int, int]] = []
        self._known: set[int] = set()

    def know(self, *tensors: Tensor) -> None:
        """These were there before, and stay."""
        self._permanent = [tensor.untyped_storage() for tensor in tensors]
        self._known |= {id(storage) for storage in self._permanent}

    def finish(self, parameter: Tensor) -> None:
        """A gradient is complete: what becomes of it depends on the ZeRO stage, so it is counted by itself."""
        assert parameter.grad is not None
        self.finished += parameter.grad.nbytes
        parameter.grad = None

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for output in outputs:
            self._watch(output.untyped_storage())
        schema = function._schema
        is_view = not schema.is_mutable and any(found.alias_info for found in schema.returns)
        if is_view or not outputs:
            return result
        flops, kind = _work(function.overloadpacket, args, kwargs or {}, result)
        touches = function.overloadpacket not in _UNTOUCHED
        moved = touches * sum(tensor.numel() * tensor.itemsize for tensor in (*inputs, *outputs))
        self.rows.append((self.live, self.finished, flops, moved, KINDS.index(kind)))
        return result

    def _watch(self, storage: Any) -> None:
        if id(storage) in self._known:
            return
        name, size = id(storage), storage.nbytes()
        self._known.add(name)
        self.live += size
        weakref.finalize(storage, self._freed, name, size)

    def _freed(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.live -= size


def _work(operation: Any, args: tuple, kwargs: dict, result: Any) -> tuple[int, str]:
    """Floating-point operations of one operation, a multiplication and an addition being two, and its kind."""
    if operation is aten.convolution:
        flops = conv_flop_count(args[0].shape, args[1].shape, result.shape, transposed=args[6])
        return flops, _convolution(args[1], groups=args[8])
    if operation is aten.convolution_backward:
        # By input and by weights, each as much as forward. torch's own formula counts weights of groups as if they had none.
        once = conv_flop_count(args[1].shape, args[2].shape, args[0].shape, transposed=args[7])
        return once * sum(args[10][:2]), _convolution(args[2], groups=args[9])
    if operation is aten._scaled_dot_product_flash_attention_for_cpu:
        return sdpa_flop_count(*(tensor.shape for tensor in args[:3])), "matmul"
    if operation is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])), "matmul"
    if operation is aten.addmm_:
        operation = aten.addmm
    if operation in flop_registry:
        return flop_registry[operation](*args, **kwargs, out_val=result), "matmul"
    return 0, "other"


def _convolution(weight: Tensor, *, groups: int) -> str:
    return "depthwise" if groups > 1 and weight.shape[1] == 1 else "convolution"
