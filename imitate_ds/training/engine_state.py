"""The engine's state as named pieces, whatever the ZeRO stage: what a checkpoint holds, and how it goes back.

DeepSpeed keeps float32 weights and Adam's moments in flat buffers, cut up by rank in a way that differs between stages, and
saves them as they lie; its universal checkpoints, which do not, lose buffers and frozen parameters (0.19.8). Here each rank
says which elements of which parameter it holds, so any number of ranks at any stage can take up what any other one wrote.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from imitate_ds.distributed import world
from imitate_ds.training.engine import persistent_buffers, whole_parameter
from imitate_ds.training.tensor_files import TensorFiles, piece_name, whole_name

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of every optimizer that optim.name offers


class Piece(NamedTuple):
    """Consecutive elements of one trainable parameter as the optimizer computes with them: float32, flat."""

    name: str
    start: int
    numel: int
    read: Callable[[str], Tensor]  # WEIGHT or one of MOMENTS -> [numel]
    write: Callable[[str, Tensor], None]


def snapshot(engine: Any) -> dict[str, Tensor]:
    """What this rank writes into a checkpoint, copied to the CPU; no two ranks write the same, all of them everything.

    A collective at ZeRO-3. Rank 0 adds buffers and frozen parameters, whole.
    """
    _initialise_moments(engine)
    tensors: dict[str, Tensor] = {}
    for number, piece in enumerate(_pieces(engine)):
        if engine.zero_optimization_stage() == 0 and _is_plain(engine) and number % world().size != world().rank:
            continue  # without ZeRO every rank holds all of them
        for kind in (WEIGHT, *MOMENTS):
            tensors[piece_name(kind, piece.name, piece.start)] = piece.read(kind).detach().to("cpu", copy=True)
    for name, tensor in _whole_tensors(engine):
        if world().is_main:
            tensors[whole_name(name)] = tensor.detach().to("cpu", copy=True)
    return tensors


def restore(engine: Any, stored: TensorFiles, *, step: int) -> None:
    """Give the engine what was snapshot, by any number of ranks at any stage. A collective.

    step: how many steps the optimizer has made. Raises ValueError where it was another model's.
    """
    _check_same_model(engine.module, stored)
    for name, parameter in engine.module.named_parameters():
        with whole_parameter(parameter, written=True), torch.no_grad():
            if parameter.requires_grad:
                parameter.copy_(stored.read(WEIGHT, name, 0, parameter.numel()).view_as(parameter))
            else:
                parameter.copy_(stored.whole(name))
    for name, buffer in persistent_buffers(engine.module).items():
        buffer.copy_(stored.whole(name))
    _initialise_moments(engine)
    for piece in _pieces(engine):
        for kind in (WEIGHT, *MOMENTS):
            piece.write(kind, stored.read(kind, piece.name, piece.start, piece.numel))
    _set_optimizer_steps(engine.basic_optimizer, step)


def optimizer_steps(engine: Any) -> int:
    """How many steps the optimizer has made: those that were skipped do not count."""
    optimizer = engine.basic_optimizer
    found = [group["step"] for group in optimizer.param_groups if "step" in group]
    found += [state["step"] for state in optimizer.state.values() if "step" in state]
    return max((int(step) for step in found), default=0)


def _pieces(engine: Any) -> Iterator[Piece]:
    """Those that this rank holds, in the order of the model."""
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):
            if (piece := _piece_of_zero_3(name, parameter)).numel:  # of a short one some ranks hold padding only
                yield piece
        elif not hasattr(parameter, "_hp_mapping"):
            yield _piece_of_plain(name, parameter, engine.basic_optimizer)
        elif parameter._hp_mapping is not None:
            yield _piece_of_flat(name, parameter._hp_mapping)


def _piece_of_plain(name: str, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> Piece:
    def tensor(kind: str) -> Tensor:
        return (parameter.data if kind == WEIGHT else optimizer.state[parameter][kind]).view(-1)

    return Piece(name, 0, parameter.numel(), tensor, lambda kind, values: _copy(tensor(kind), values))


def _piece_of_flat(name: str, mapping: Any) -> Piece:
    """ZeRO 1 and 2, and DeepSpeed's own bf16 optimizer."""

    def tensor(kind: str) -> Tensor:
        return mapping.get_hp_fragment(None if kind == WEIGHT else kind)

    address = mapping.lp_fragment_address
    return Piece(name, address.start, address.numel, tensor, lambda kind, values: _copy(tensor(kind), values))


def _piece_of_zero_3(name: str, parameter: Any) -> Piece:
    """Every rank holds an equally long part of every parameter; what reaches beyond its end is padding."""
    optimizer, share = parameter._z3_optimizer, parameter.ds_tensor.numel()
    start = min(share * world().rank, parameter.ds_numel)
    numel = min(share, parameter.ds_numel - start)

    def read(kind: str) -> Tensor:
        return optimizer.get_local_fp32_param(parameter, None if kind == WEIGHT else kind)[:numel]

    def write(kind: str, values: Tensor) -> None:
        padded = torch.cat([values, values.new_zeros(share - numel)])
        optimizer.set_local_hp_param(padded, parameter, None if kind == WEIGHT else kind)

    return Piece(name, start, numel, read, write)


def _copy(tensor: Tensor, values: Tensor) -> None:
    tensor.data.copy_(values)


def _is_plain(engine: Any) -> bool:
    return engine.optimizer is engine.basic_optimizer


def _initialise_moments(engine: Any) -> None:
    """What the first step would make: until then there is nothing that could be saved or written to."""
    optimizer, wrapper = engine.basic_optimizer, engine.optimizer
    for number, (group, tensor) in enumerate(_stepped_tensors(engine)):
        if not optimizer.state[tensor]:
            with _read_from_disk(wrapper, number):
                optimizer.state[tensor] = _first_state(optimizer, group, tensor)
    if link := getattr(wrapper, "_lazy_init_hp_params_optimizer_state", None):
        # DeepSpeed 0.19.8 links once, after the first group has stepped: the moments of all other groups are not there yet.
        wrapper._hp_optimizer_states_linked = False
        link()


@contextmanager
def _read_from_disk(wrapper: Any, number: int) -> Iterator[None]:
    """What the optimizer steps as the so-manyth is whole in here, and written back after, where it is offloaded to NVMe."""
    on_disk = hasattr(wrapper, "_swappable_optimizer_subgroup") and wrapper._swappable_optimizer_subgroup(number)
    if on_disk:
        wrapper._optimizer_states_and_gradient_swap_in(number)
    yield
    if on_disk:
        wrapper._optimizer_states_and_gradient_swap_out(number)


def _stepped_tensors(engine: Any) -> list[tuple[dict[str, Any], Tensor]]:
    """What the optimizer steps, with the group of each: parameters, or what is flat of them. ZeRO-3 shows it one at a time."""
    groups, wrapper = engine.basic_optimizer.param_groups, engine.optimizer
    if flat := getattr(wrapper, "fp32_partitioned_groups_flat", None):
        return [(groups[wrapper.sub_group_to_group_id[number]], tensor) for number, tensor in enumerate(flat)]
    return [(group, tensor) for group in groups for tensor in group["params"]]


def _first_state(optimizer: torch.optim.Optimizer, group: dict[str, Any], tensor: Tensor) -> dict[str, Any]:
    state: dict[str, Any] = {kind: torch.zeros_like(tensor, dtype=torch.float32) for kind in MOMENTS}
    if isinstance(optimizer, torch.optim.AdamW):
        return {"step": torch.zeros((), device=tensor.device), **state}
    if "step" in group or type(optimizer).__module__.startswith("apex"):
        group.setdefault("step", 0)  # apex counts by group
        return state
    return {"step": 0, **state}


def _set_optimizer_steps(optimizer: torch.optim.Optimizer, step: int) -> None:
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = step
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = state["step"].fill_(step) if isinstance(state["step"], Tensor) else step


def _whole_tensors(engine: Any) -> Iterator[tuple[str, Tensor]]:
    yield from persistent_buffers(engine.module).items()
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            with whole_parameter(parameter):
                yield name, parameter


def _check_same_model(model: nn.Module, stored: TensorFiles) -> None:
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    for kind, ours in ((WEIGHT, trained), ("whole", frozen | persistent_buffers(model).keys())):
        if differing := sorted(ours ^ stored.names(kind)):
            where = "the model" if differing[0] in ours else "the checkpoint"
            raise ValueError(f"{differing[0]} is in {where} only: the checkpoint is of another model")
