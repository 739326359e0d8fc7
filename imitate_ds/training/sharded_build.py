"""A model built by several ranks that never hold more of it than their shares and a few whole parameters.

Weights are drawn by the constructors and initialisers of timm and torch, which know nothing of ranks. zero.Init of DeepSpeed
0.19.8 cuts a parameter up as soon as its module is made, and what timm writes into it once the whole network stands fails on a
tensor without elements. Here a parameter that is touched again is put together again first. All ranks draw alike, so the weights
are, to the last bit, those of a model built whole.
"""

from collections import OrderedDict
from collections.abc import Iterator
from math import ceil, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from imitate_ds.distributed import gather_on_cpu, world

WHOLE = 8  # parameters that a rank holds whole at a time: more than one initialiser has in hand

# What asks a parameter for nothing that its share would not tell
_TELLS_NOTHING = {
    *(Tensor.requires_grad.__get__, Tensor.requires_grad.__set__, Tensor.requires_grad_),  # type: ignore[attr-defined]
    *(Tensor.dtype.__get__, Tensor.device.__get__, Tensor.is_meta.__get__),  # type: ignore[attr-defined]
}


class Share(NamedTuple):
    """What a rank keeps of a parameter that is cut up: equally long on every rank, the last one's filled up with zeros."""

    rows: Tensor
    shape: torch.Size


class ShardedBuild(TorchFunctionMode):
    """Parameters made in here are cut up over the ranks. A collective: all ranks must build the same."""

    def __init__(self) -> None:
        super().__init__()
        self._whole: OrderedDict[int, nn.Parameter] = OrderedDict()  # by id, the one touched last at the end

    def __enter__(self) -> "ShardedBuild":
        self._hook = register_module_parameter_registration_hook(self._made)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._hook.remove()
        if error[0] is None:  # another rank may not have got as far
            self._cut_all_but(0)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function not in _TELLS_NOTHING:
            for parameter in _parameters_among([args, kwargs]):
                self._touched(parameter)
        result = function(*args, **kwargs)
        self._cut_all_but(WHOLE)
        return result

    def _made(self, module: nn.Module, name: str, parameter: nn.Parameter) -> None:
        """torch calls this with every parameter that becomes part of a module."""
        with torch._C.DisableTorchFunction():
            if share_of(parameter) is None and not parameter.is_meta:
                self._whole[id(parameter)] = parameter
                self._cut_all_but(WHOLE)

    def _touched(self, parameter: nn.Parameter) -> None:
        if share_of(parameter):
            join(parameter)
            self._whole[id(parameter)] = parameter
        if id(parameter) in self._whole:  # else it is part of no module yet
            self._whole.move_to_end(id(parameter))

    def _cut_all_but(self, kept: int) -> None:
        while len(self._whole) > kept:
            _cut(self._whole.popitem(last=False)[1])


def share_of(parameter: nn.Parameter) -> Share | None:
    """None where the parameter is whole."""
    return parameter.__dict__.get("_share")


def join(parameter: nn.Parameter) -> None:
    """Make a parameter whole again, on the CPU. A collective, where it is cut up."""
    if share := share_of(parameter):
        del parameter._share  # type: ignore[attr-defined]
        parameter.data = gather_on_cpu(share.rows)[: prod(share.shape)].view(share.shape)


def _cut(parameter: nn.Parameter) -> None:
    here, flat = world(), parameter.detach().reshape(-1)
    length = ceil(len(flat) / here.size)
    rows = flat.new_zeros(length)
    mine = flat[here.rank * length : (here.rank + 1) * length]
    rows[: len(mine)] = mine
    parameter._share = Share(rows, parameter.shape)  # type: ignore[attr-defined]
    parameter.data = flat.new_empty(0)


def _parameters_among(values: Any) -> Iterator[nn.Parameter]:
    """In arguments, and in lists and mappings of arguments."""
    if isinstance(values, nn.Parameter):
        yield values
    elif isinstance(values, list | tuple | dict):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _parameters_among(value)
