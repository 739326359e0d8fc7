"""Ranks: who we are and how tensors meet. The only place that names torch.distributed.

Which process group: the data-parallel one, which the engine names with `use_group`; until then the default one.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from imitate_ds.flight import flight

T = TypeVar("T")

# torch 2.14 warns of the names that torch 2.11 has.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_group: dist.ProcessGroup | None = None
_control: dist.ProcessGroup | None = None  # gloo, so that numbers of the host cost the device no wait
_at_end: list[Callable[[], None]] = []
_nodes: dict[dist.ProcessGroup | None, int] = {}


class World(NamedTuple):
    rank: int
    size: int
    local_rank: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def world() -> World:
    """Where this process stands; a single process when no group was started."""
    if not dist.is_initialized():
        return World(rank=0, size=1, local_rank=0)
    return World(dist.get_rank(_group), dist.get_world_size(_group), int(os.environ.get("LOCAL_RANK", "0")))


def use_group(group: dist.ProcessGroup | None) -> None:
    """From now on `world()` and every exchange below mean this group: the ranks that average their gradients."""
    global _group
    _group = group


def node_count() -> int:
    """On how many machines the ranks live. A collective at the first call, so all ranks make it in the same place."""
    if _group not in _nodes:
        _nodes[_group] = len(set(gather_objects(socket.gethostname())))
    return _nodes[_group]


def init_world(timeout_s: float = 600) -> World:
    """Join the process group that the launcher described, or make a group of one.

    Reads the variables of `deepspeed` and torchrun (RANK, WORLD_SIZE, ...); under plain `srun`, one task per rank, maps
    SLURM_* to them. NCCL on CUDA, gloo elsewhere or when DS_ACCELERATOR=cpu. Ranks meet at MASTER_ADDR, and rank 0
    listens on that address alone. timeout_s: how long a rank waits for another one, here and in a collective.
    """
    if dist.is_initialized():
        return world()
    _describe_world()
    device = training_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        ranks_here = int(_first_of("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "WORLD_SIZE") or 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))
    backend = "nccl" if device.type == "cuda" else "gloo"
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = timedelta(seconds=timeout_s)
    store = _meeting_place(rank, size, timeout) if "MASTER_ADDR" in os.environ else HashStore()
    flight.begin("meeting the other ranks")
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    global _control
    _control = dist.new_group(backend="gloo", timeout=timeout) if size > 1 else None  # type: ignore[assignment]
    return world()


def _meeting_place(rank: int, size: int, timeout: timedelta) -> Store:
    """The store through which ranks find each other. torch's own listens on every address of the machine."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun listens there already
        return TCPStore(host, port, size, is_master=False, timeout=timeout)
    if rank:
        return TCPStore(host, port, size, is_master=False, timeout=timeout)
    listener = _listen(host, port, size)
    return TCPStore(
        host, port, size, is_master=True, timeout=timeout, master_listen_fd=listener.detach(), wait_for_workers=False
    )


def _listen(host: str, port: int, size: int) -> socket.socket:
    """A listening socket on the address that MASTER_ADDR means here. Raises ValueError where other machines cannot reach it."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"MASTER_ADDR = {host!r}: no such machine ({error.strerror})") from None
    ranks_here = int(_first_of("LOCAL_WORLD_SIZE", "LOCAL_SIZE") or size)
    several_machines = ranks_here < size or int(_first_of("SLURM_STEP_NUM_NODES") or 1) > 1
    if str(address[0]).startswith("127.") and several_machines:
        raise ValueError(
            f"MASTER_ADDR = {host!r}: is {address[0]} on its own machine, where the ranks of other machines cannot reach it; set "
            "MASTER_ADDR to an address of the cluster's network, or mend /etc/hosts"
        )
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(
            f"MASTER_ADDR = {host!r}, MASTER_PORT = {port}: rank 0 cannot listen there ({error.strerror}); rank 0 must "
            "run on that machine, and the port must be free"
        ) from None
    listener.listen(socket.SOMAXCONN)
    return listener


def training_device() -> torch.device:
    """This rank's device: its CUDA device, or the CPU where there is none or DS_ACCELERATOR=cpu asks for it."""
    if os.environ.get("DS_ACCELERATOR", "") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # srun --gpus-per-task=1 shows each rank a single device, index 0; --gpus-per-node shows all of them.
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _describe_world() -> None:
    """Fill in RANK and its companions where the launcher did not."""
    env = os.environ
    # Of the step, not of the job: a batch script has SLURM_NTASKS too, and would wait for ranks that nobody starts.
    if "RANK" not in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        env.update(RANK=env["SLURM_PROCID"], WORLD_SIZE=env["SLURM_STEP_NUM_TASKS"], LOCAL_RANK=env["SLURM_LOCALID"])
        if "MASTER_ADDR" not in env:
            env["MASTER_ADDR"] = _first_host(env["SLURM_JOB_NODELIST"])
        env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))
    if "RANK" not in env:
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")


def _first_host(nodes: str) -> str:
    listed = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True)
    if listed.returncode or not listed.stdout.strip():
        raise RuntimeError(f"scontrol show hostnames failed: {listed.stderr.strip()}; set MASTER_ADDR yourself")
    return listed.stdout.split()[0]


def _first_of(*names: str) -> str:
    return next((os.environ[name] for name in names if os.environ.get(name, "").isdigit()), "")


def at_end(do: Callable[[], None]) -> None:
    """Do this in leave_world, where Python's own atexit is passed over."""
    _at_end.append(do)


def leave_world(status: int = 0) -> NoReturn:
    """End this process in an orderly way, all ranks together.

    Without it gloo aborts with -6 at exit in about half of the runs (measured: barrier, destroy, flush, _exit gave
    none in 44).
    """
    if dist.is_initialized() and status == 0:
        dist.barrier()
        dist.destroy_process_group()
    for do in _at_end:
        do()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Pulse:
    """A few numbers of every rank, told after every step and read after the next: between them nobody waits."""

    def __init__(self) -> None:
        self._under_way: tuple[Any, Tensor] | None = None

    def exchange(self, *numbers: float) -> Tensor | None:
        """Tell the others mine; float64 [ranks, n] is what all told in the call before, None in the first call."""
        before, mine = self.last(), torch.tensor(numbers, dtype=torch.float64)
        table = torch.empty(world().size * len(numbers), dtype=torch.float64)
        if _control is None:
            self._under_way = None, table.copy_(mine)
        else:
            self._under_way = _all_gather(table, mine, group=_control, async_op=True), table
        return before

    def last(self) -> Tensor | None:
        """What was told in the last exchange, now; None where nothing is under way."""
        if self._under_way is None:
            return None
        work, table = self._under_way
        self._under_way = None
        if work is not None:
            with flight.collective("pulse"):
                work.wait()
        return table.view(world().size, -1)


class RankRows(NamedTuple):
    """How many rows every rank holds. The rows of all ranks, in rank order, are the whole: N = sum of counts."""

    counts: tuple[int, ...]
    rank: int

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def own(self) -> slice:
        """Where this rank's rows lie in the whole."""
        first = sum(self.counts[: self.rank])
        return slice(first, first + self.counts[self.rank])


def count_rows(rows: int, **alike: int) -> RankRows:
    """Tell every rank how many rows this one holds. `alike` are numbers, such as widths, that must not differ.

    A collective. Raises ValueError on all ranks where `alike` differs on one, so that none is left waiting.
    """
    here = world()
    if here.size == 1:
        return RankRows((rows,), 0)
    mine = torch.tensor([rows, *alike.values()], dtype=torch.int64, device=_device_of_group())
    table = torch.empty(here.size * len(mine), dtype=torch.int64, device=mine.device)
    with flight.collective("count rows"):
        _all_gather(table, mine, group=_group)
    counts, *columns = zip(*table.view(here.size, -1).tolist(), strict=True)
    for name, values in zip(alike, columns, strict=True):
        if len(set(values)) > 1:
            found = ", ".join(map(str, values))
            raise ValueError(f"{name} = {found} on ranks 0 to {here.size - 1}: must not differ between ranks")
    return RankRows(counts, here.rank)


def start_gather(rows: Tensor, held: RankRows) -> Callable[[], Tensor]:
    """Begin to concatenate rows [B, ...] of every rank, in rank order; the function that comes back waits for [N, ...].

    Call it once. Ranks may hold different numbers of rows. No gradient.
    """
    rows = rows.detach()
    if len(held.counts) == 1:
        return lambda: rows
    most = max(held.counts)
    sent = _padded(rows, most)
    under_way = [(sent, sent.new_empty(most * len(held.counts), *rows.shape[1:]))]
    work: Any = _all_gather(under_way[0][1], sent, group=_group, async_op=True)
    del sent  # both live until the wait, for the collective's sake, and no longer: backward needs the memory

    def finish() -> Tensor:
        with flight.collective("gather rows"):
            work.wait()
        _, whole = under_way.pop()
        if min(held.counts) == most:
            return whole
        return torch.cat([part[:count] for part, count in zip(whole.split(most), held.counts, strict=True)])

    return finish


def gather_rows(rows: Tensor, held: RankRows | None = None) -> Tensor:
    """Concatenate rows [B, ...] of every rank, in rank order, to [N, ...]. No gradient.

    Without `held` every rank must hold equally many.
    """
    here = world()
    return start_gather(rows, held or RankRows((len(rows),) * here.size, here.rank))()


def gather_on_cpu(rows: Tensor) -> Tensor:
    """Equally long CPU tensors [n] of every rank, one after the other, without the device having a part in it."""
    if _control is None:
        return rows
    whole = rows.new_empty(world().size * len(rows))
    with flight.collective("gather on the CPU"):
        _all_gather(whole, rows, group=_control)
    return whole


def gather_rows_keep_gradient(rows: Tensor, held: RankRows | None = None) -> Tensor:
    """Like gather_rows, with this rank's own rows still attached to the graph.

    Every rank then computes the same global loss, and its gradient reaches the rows the rank owns: exact, without a
    collective in backward. What belongs to other ranks' rows is their own business.
    """
    here = world()
    held = held or RankRows((len(rows),) * here.size, here.rank)
    if len(held.counts) == 1:
        return rows
    parts = list(gather_rows(rows, held).split(held.counts))
    parts[held.rank] = rows
    return torch.cat(parts)


def sum_to_owner(whole: Tensor, held: RankRows) -> Tensor:
    """Add up [N, ...] over ranks; each gets the sum of the rows [B, ...] that are its own. No gradient."""
    if len(held.counts) == 1:
        return whole
    most = max(held.counts)
    sent = whole
    if min(held.counts) != most:
        sent = torch.cat([_padded(part, most) for part in whole.split(held.counts)])
    mine = torch.empty_like(sent[:most])
    with flight.collective("sum to owner"):
        _reduce_scatter(mine, sent.contiguous(), group=_group)
    return mine[: held.counts[held.rank]]


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over ranks, a new tensor, no gradient."""
    total = values.detach().clone()
    if world().size > 1:
        with flight.collective("sum"):
            dist.all_reduce(total, group=_group)
    return total


def sum_over_ranks_keep_gradient(values: Tensor) -> Tensor:
    """Like sum_over_ranks, with this rank's share still attached to the graph, so that what is made of the sum is one loss.

    Its gradient is scaled as DeepSpeed's mean over ranks wants it (scale_gradient).
    """
    mine = scale_gradient(values, world().size)
    return sum_over_ranks(values) + (mine - mine.detach())


def maximum_over_ranks(values: Tensor) -> Tensor:
    """The largest of each element over ranks, a new tensor, no gradient."""
    largest = values.detach().clone()
    if world().size > 1:
        with flight.collective("maximum"):
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=_group)
    return largest


def _padded(rows: Tensor, count: int) -> Tensor:
    if len(rows) == count:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])


def gather_objects(item: object) -> list:
    """One small Python object of every rank, in rank order, on all ranks. Only our own processes speak here."""
    here = world()
    if here.size == 1:
        return [item]
    items: list = [None] * here.size
    with flight.collective("gather objects"):
        dist.all_gather_object(items, item, group=_group)
    return items


def mean_over_ranks(values: Tensor) -> Tensor:
    """The mean of a tensor over ranks, a new tensor, no gradient."""
    return sum_over_ranks(values) / world().size


def max_over_ranks(value: float) -> float:
    """The largest of one number per rank."""
    if world().size == 1:
        return value
    return maximum_over_ranks(torch.tensor(value, dtype=torch.float64, device=_device_of_group())).item()


def broadcast_object(item: T) -> T:
    """Rank 0's object, on every rank."""
    if world().size == 1:
        return item
    box: list = [item]
    with flight.collective("broadcast object"):
        dist.broadcast_object_list(box, group=_group, group_src=0)
    return box[0]


def from_main(work: Callable[[], T]) -> T:
    """What a function returns on rank 0, on all ranks; an OSError or ValueError it raises there is raised on all alike."""
    answer: Any = None
    if world().is_main:
        try:
            answer = work(), None
        except (OSError, ValueError) as error:
            answer = None, error
    result, error = broadcast_object(answer)
    if error is not None:
        raise error
    return result


def barrier() -> None:
    if world().size > 1:
        with flight.collective("barrier"):
            dist.barrier(group=_group)


def _device_of_group() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return grads[0] * ctx.factor, None


def scale_gradient(tensor: Tensor, factor: float) -> Tensor:
    """The same tensor forward; its gradient times factor backward.

    DeepSpeed averages parameter gradients over ranks, but the loss is one loss of the global batch, whose gradient is
    the sum of what the ranks contribute: the world size goes in here, so that the logged loss stays the true one.
    """
    return _ScaleGradient.apply(tensor, factor)  # type: ignore[return-value]
