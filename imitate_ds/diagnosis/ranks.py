"""The lines between ranks: how long a collective takes, over which network, and whether the clocks agree.

Every rank has a helper process that takes part, on the way that training takes into the world. What it does next it says
before, so that a hang has a name.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from imitate_ds.diagnosis.finding import Check, Finding, Options, absent, broken, ok, slow
from imitate_ds.diagnosis.helper import Helper
from imitate_ds.diagnosis.machine import connected_interfaces, host_name

LARGE = 64 * 2**20  # bytes
ROUNDS = 50  # of the small all-reduce
GRADIENT = 100e6  # bytes: float32, of a ResNet-50
# Bytes/s below which something is wrong: loopback gives gloo about 1 GB/s, 10 Gbit Ethernet 1, a PCIe 3 slot 10.
SLOW_GLOO, SLOW_NODES, SLOW_GPUS = 0.1e9, 0.5e9, 5e9
SLOW_LATENCY_S = 5e-3
SKEW_SLOW_S, SKEW_BROKEN_S = 2.0, 60.0
COLLECTIVES = "collectives"

Tell = Callable[[dict[str, Any]], None]


class Place(NamedTuple):
    """Where a rank is, and what its clock says just after a barrier, in seconds since 1970."""

    host: str
    time: float
    interfaces: list[str]


def under_launcher(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several ranks. In a batch script Slurm names many tasks, but there is one process."""
    if "RANK" in environment:
        return int(environment.get("WORLD_SIZE", "1")) > 1
    return "SLURM_PROCID" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def rank_here() -> int:
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "0"))


def local_rank_here() -> int:
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID", "0"))


def take_part(tell: Tell, patience_s: float) -> None:
    """One rank's part: tells {"doing": ...} before each thing, a finding after it, and {"measured": true} when all is done.

    Then reads the findings of this machine from standard input, and tells {"machines": [[host, findings], ...]}, all of them.
    patience_s: how long a rank waits for another one.
    """
    tell({"doing": "importing torch"})
    import torch

    from imitate_ds.distributed import gather_objects, init_world, leave_world, training_device

    tell({"doing": "meeting the other ranks"})
    init_world(timeout_s=patience_s)
    device = training_device()
    tell({"doing": "all-reduce of 4 bytes"})
    small_s = _all_reduce_s(torch.ones(1, device=device), ROUNDS)
    tell({"doing": "all-reduce of 64 MiB"})
    large_s = _all_reduce_s(torch.ones(LARGE // 4, device=device), 3)
    tell({"doing": "comparing clocks"})
    places = _places()
    for finding in (_collectives(places, small_s, large_s, on_cuda=device.type == "cuda"), _clocks(places)):
        tell(finding._asdict())
    tell({"measured": True})
    mine = json.loads(sys.stdin.readline())
    tell({"machines": gather_objects((socket.gethostname(), mine))})
    leave_world()


def _all_reduce_s(values: Any, rounds: int) -> float:
    """Seconds of one, on the slowest rank, its copy included; the first one, which makes connections, does not count."""
    from imitate_ds.distributed import max_over_ranks

    _timed_all_reduce(values, 1)
    once = max_over_ranks(_timed_all_reduce(values, 1))
    return once if once * rounds > 10 else max_over_ranks(_timed_all_reduce(values, rounds))


def _timed_all_reduce(values: Any, rounds: int) -> float:
    """Mean seconds of one on this rank. Raises RuntimeError where the sum is wrong."""
    import torch

    from imitate_ds.distributed import sum_over_ranks, world

    wait = torch.cuda.synchronize if values.is_cuda else lambda: None
    wait()
    began, total = time.perf_counter(), values
    for _ in range(rounds):
        total = sum_over_ranks(values)
    wait()
    took = (time.perf_counter() - began) / rounds
    if not bool((total == world().size).all()):
        raise RuntimeError(
            f"an all-reduce of ones over {world().size} ranks gave {total.min().item()} to {total.max().item()}"
        )
    return took


def _places() -> list[Place]:
    from imitate_ds.distributed import barrier, gather_objects

    barrier()
    now = time.time()
    return [Place(*place) for place in gather_objects((socket.gethostname(), now, connected_interfaces()))]


def _collectives(places: list[Place], small_s: float, large_s: float, *, on_cuda: bool) -> Finding:
    ranks, machines = len(places), len({place.host for place in places})
    rate = 2 * (ranks - 1) / ranks * LARGE / large_s  # what each rank sends: comparable between numbers of ranks
    networks = "/".join(sorted({name for place in places for name in place.interfaces}))
    text = (
        f"{ranks} ranks on {machines} machine(s), {'NCCL, its sockets' if on_cuda else 'gloo'} over {networks}: 64 MiB at "
        f"{rate / 1e9:.2f} GB/s, 4 bytes in {1e6 * small_s:.0f} us; 100 MB of gradient in {GRADIENT / LARGE * large_s:.2g} s"
    )
    least = SLOW_GLOO if not on_cuda else SLOW_NODES if machines > 1 else SLOW_GPUS
    if rate < least or small_s > SLOW_LATENCY_S:
        return slow(text, _why_slow(machines, on_cuda=on_cuda))._replace(name=COLLECTIVES)
    return ok(text)._replace(name=COLLECTIVES)


def _why_slow(machines: int, *, on_cuda: bool) -> str:
    if not on_cuda:
        return "another network with GLOO_SOCKET_IFNAME; fewer ranks than cores"
    if machines > 1:
        return "NCCL_DEBUG=INFO says which network NCCL took; NCCL_SOCKET_IFNAME and NCCL_IB_HCA choose another"
    return "nvidia-smi topo -m shows how the GPUs are wired; NCCL_P2P_DISABLE must not be set"


def _clocks(places: list[Place]) -> Finding:
    """Read just after a barrier, which ranks leave within milliseconds of each other."""
    by_host = {place.host: place.time for place in places}
    if len(by_host) == 1:
        return absent("one machine")._replace(name="clocks")
    first, last = min(by_host, key=lambda host: by_host[host]), max(by_host, key=lambda host: by_host[host])
    skew = by_host[last] - by_host[first]
    text = f"{skew:.3f} s between {first} and {last}"
    advice = (
        "run an NTP client (chrony): signs of life and log lines of different machines are compared by their clocks"
    )
    verdict = ok(text) if skew < SKEW_SLOW_S else slow(text, advice) if skew < SKEW_BROKEN_S else broken(text, advice)
    return verdict._replace(name="clocks")


def hear(helper: Helper, timeout_s: float, *, who: str, advice: str) -> list[Finding]:
    """What a rank's helper finds, up to where it waits for this machine's findings; the last one is broken where it never does.

    timeout_s: how long each thing may take. who, advice: what a broken finding says.
    """
    findings: list[Finding] = []
    doing = "starting"
    while True:
        try:
            answer = helper.answer(timeout_s)
            problem = "" if answer else helper.last_words()
        except TimeoutError as error:
            answer, problem = None, str(error)
        if answer is None:
            return [*findings, broken(f"{who}: {doing}: {problem}", advice)._replace(name=COLLECTIVES)]
        if "measured" in answer:
            return findings
        if "doing" in answer:
            doing = answer["doing"]
        else:
            findings.append(Finding(**answer))


def hear_own_rank(helper: Helper, timeout_s: float) -> list[Finding]:
    """What the helper of this rank finds under a launcher. The name of this machine is the usual reason for a hang."""
    master = os.environ.get("MASTER_ADDR", "")
    who = f"rank {rank_here()} on {socket.gethostname()}" + (f", MASTER_ADDR={master}" if master else "")
    usual = "is every rank started, MASTER_ADDR the machine of rank 0, and every port open between machines?"
    advice = "; ".join(filter(None, (usual, host_name(Options()).advice)))
    return hear(helper, timeout_s, who=who, advice=advice)


def ranks_of_this_machine(accelerator: str) -> Check:
    """The check that starts ranks here itself: two under gloo ("cpu"), or one for each GPU under NCCL ("cuda")."""

    def check(options: Options) -> Finding:
        ranks = 2 if accelerator == "cpu" else _gpus()
        if ranks < 2:
            return absent("fewer than two GPUs")
        with ExitStack() as stack:
            worlds = _environments(ranks, accelerator)
            helpers = [stack.enter_context(_rank_helper(options, world, own_session=False)) for world in worlds]
            limits = [0.7 * options.timeout_s] + [1.0] * (
                ranks - 1
            )  # all measure at once; this check has a limit itself
            first, *others = (
                hear(
                    helper,
                    limit,
                    who=f"rank {rank}",
                    advice="so would training; is 127.0.0.1 free for all, GLOO_SOCKET_IFNAME right?",
                )
                for rank, (helper, limit) in enumerate(zip(helpers, limits, strict=True))
            )
        failed = [finding for findings in (*others, first) for finding in findings if finding.verdict == "broken"]
        return failed[0] if failed else first[0]

    return check


def _rank_helper(options: Options, environment: Mapping[str, str] | None = None, *, own_session: bool = True) -> Helper:
    return Helper("ranks", str(options.timeout_s), environment=environment, own_session=own_session)


def _environments(ranks: int, accelerator: str) -> list[dict[str, str]]:
    """As a launcher would set them, for ranks that meet on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": accelerator}
    common.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _gpus() -> int:
    """Asked of torch only where there may be more than one: the import takes seconds."""
    if not Path("/dev/kfd").exists() and len(list(Path("/dev").glob("nvidia[0-9]*"))) < 2:
        return 0
    import torch

    return torch.cuda.device_count()
