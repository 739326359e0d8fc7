"""Memory by what it is for: the bytes that this rank holds, a storage counted once, however many tensors look at it."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from imitate_ds.flight import flight


def held_bytes(engine: Any, device: torch.device) -> dict[str, int]:
    """What lies on the device now, and as "offloaded" what of it lies elsewhere.

    parameters: with buffers, under ZeRO-3 this rank's part. gradients. buckets: of gradients on their way to other ranks.
    optimizer: its state, and of mixed precision the float32 weights; under ZeRO this rank's part.
    """
    model, seen, held = engine.module, set(), Counter(parameters=0, gradients=0, buckets=0, optimizer=0)
    for kind, where in _by_kind(model, engine.optimizer).items():
        for tensor in _tensors(where):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                held[kind if tensor.device.type == device.type else "offloaded"] += storage.nbytes()
    return dict(held)


def _by_kind(model: nn.Module, optimizer: Any) -> dict[str, list[Any]]:
    """Where to look, in this order: what was found before is not counted again. DeepSpeed's optimizers tell by their names."""
    parameters = list(model.parameters())
    driven = vars(getattr(optimizer, "optimizer", optimizer))  # torch's, where DeepSpeed has put its own around it
    named = {name: "buckets" if "ipg" in name else "gradients" if "grad" in name else "" for name in vars(optimizer)}
    kinds = {
        "parameters": [[getattr(p, "ds_tensor", p) for p in parameters], parameters, list(model.buffers())],
        "gradients": [p.grad for p in parameters],
        "buckets": [],
        "optimizer": [driven["state"], driven["param_groups"]],
    }
    for name, kind in named.items():
        kinds[kind or "optimizer"].append(vars(optimizer)[name])
    return kinds


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.layout == torch.strided and not value.is_meta and value.untyped_storage().nbytes():
            yield value
        return
    inside: Iterable[Any] = ()
    if isinstance(value, Mapping):
        inside = value.values()
    elif isinstance(value, list | tuple | set):
        inside = value
    elif is_dataclass(value) and not isinstance(value, type):
        inside = vars(value).values()
    for item in inside:
        yield from _tensors(item)


@dataclass
class Saved:
    """Bytes that forward passes keep for their backward passes, now and at the most, by kind: activations, loss."""

    now: Counter[str] = field(default_factory=Counter)
    most: Counter[str] = field(default_factory=Counter)
    times: Counter[int] = field(default_factory=Counter)  # storages, by how many saved tensors look at them


@contextmanager
def count_saved(model: nn.Module) -> Iterator[Saved]:
    """What is saved in here for backward passes, weights left out. What they compute stays what it is.

    Nor is counted what activation checkpointing computes again: torch keeps one part's worth of it outside of these hooks.
    """
    saved, weights = Saved(), {id(parameter) for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Any:
        root = tensor._base if tensor._base is not None else tensor
        return tensor if id(root) in weights else _Kept(tensor, saved)

    def unpack(kept: Any) -> Tensor:
        return kept.tensor if isinstance(kept, _Kept) else kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield saved


class _Kept:
    """A tensor that the graph keeps; it ends with the node that keeps it."""

    __slots__ = ("bytes", "kind", "saved", "storage", "tensor")

    def __init__(self, tensor: Tensor, saved: Saved):
        storage = tensor.untyped_storage()
        self.tensor, self.saved = tensor, saved
        self.storage, self.bytes = storage.data_ptr(), storage.nbytes()
        self.kind = "loss" if flight.doing.startswith("loss") else "activations"
        if not saved.times[self.storage]:
            saved.now[self.kind] += self.bytes
            if saved.now.total() > saved.most.total():
                saved.most = saved.now.copy()
        saved.times[self.storage] += 1

    def __del__(self) -> None:
        self.saved.times[self.storage] -= 1
        if not self.saved.times[self.storage]:
            self.saved.now[self.kind] -= self.bytes
