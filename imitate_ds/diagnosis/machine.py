"""Checks of this machine: limits of a process, shared memory, names and networks. Needs nothing but Python."""

import fcntl
import os
import resource
import shutil
import socket
import struct
import tempfile
from pathlib import Path

from imitate_ds.diagnosis.finding import Finding, Options, absent, broken, gib, ok, slow

INFINIBAND = Path("/sys/class/infiniband")
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


def open_files(_: Options) -> Finding:
    """Every worker holds tars, pipes and shared memory open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{_limit(soft)}, at most {_limit(hard)}"
    if soft != resource.RLIM_INFINITY and soft < 4096:
        return slow(text, "ulimit -n 65536 in the job script: loader workers hold tars, pipes and shared memory open")
    return ok(text)


def locked_memory(_: Options) -> Finding:
    """InfiniBand registers buffers as locked memory; without it the limit matters to nobody."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    size = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / 2**20:,.0f} MiB"
    if soft != resource.RLIM_INFINITY and INFINIBAND.is_dir() and any(INFINIBAND.iterdir()):
        return broken(
            f"{size}, with InfiniBand",
            "ulimit -l unlimited (Slurm: PropagateResourceLimitsExcept=MEMLOCK, and LimitMEMLOCK=infinity of slurmd)",
        )
    return ok(size)


def processes(_: Options) -> Finding:
    """Threads count too: a rank with its workers has a few hundred."""
    soft, _hard = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY and soft < 4096:
        return slow(_limit(soft), "ulimit -u 65536: ranks, loader workers and their threads all count")
    return ok(_limit(soft))


def shared_memory(_: Options) -> Finding:
    """NCCL and loader workers pass data through /dev/shm; where it ends, they die of SIGBUS."""
    usage = shutil.disk_usage("/dev/shm")
    text = f"/dev/shm has {gib(usage.free)} free of {gib(usage.total)}"
    if usage.free < 256 * 2**20:
        return broken(
            text, "loader workers and NCCL die of SIGBUS there; container: --shm-size=16g; else remove what fills it"
        )
    if usage.free < 2**30:
        return slow(text, "enough for a small batch; container: --shm-size=16g")
    return ok(text)


def temporary_folder(_: Options) -> Finding:
    """TMPDIR holds the kernels that DeepSpeed compiles."""
    folder = Path(tempfile.gettempdir())
    free = shutil.disk_usage(folder).free
    text = f"{folder} has {gib(free)} free, {file_system(folder)}"
    if free < 2**30:
        return broken(text, "make room, or set TMPDIR to a folder on a disk of this machine")
    if is_network(folder):
        return slow(text, "set TMPDIR to a disk of this machine: compiled kernels and their locks lie there")
    return ok(text)


def host_name(_: Options) -> Finding:
    """Gloo tells other ranks the address of GLOO_SOCKET_IFNAME, or else the one that this machine's name means here."""
    name, chosen = socket.gethostname(), os.environ.get("GLOO_SOCKET_IFNAME", "")
    if chosen:
        addresses = [address for address, interface in interfaces().items() if interface == chosen]
        text = f"{name}, GLOO_SOCKET_IFNAME={chosen}: {', '.join(addresses) or 'no such interface with an address'}"
    else:
        addresses = _addresses_of(name)
        text = f"{name} is {', '.join(addresses) or 'no address'}"
    if chosen and not addresses:
        return broken(text, _choose_interface())
    if not addresses or is_loopback(addresses[0]):
        advice = f"other machines cannot reach this one there: {_choose_interface()}"
        return broken(text, advice) if several_machines() else ok(text, f"with several machines, {advice}")
    return ok(text)


def several_machines() -> bool:
    """As far as the launcher tells: whether some ranks are elsewhere."""
    env = os.environ
    ranks = env.get("WORLD_SIZE", "1")
    here = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or ranks
    return int(ranks) > int(here) or int(env.get("SLURM_STEP_NUM_NODES", "1")) > 1


def _addresses_of(name: str) -> list[str]:
    try:
        return sorted({str(found[4][0]) for found in socket.getaddrinfo(name, None)})
    except OSError:
        return []


def infiniband(_: Options) -> Finding:
    ports = sorted(INFINIBAND.glob("*/ports/*")) if INFINIBAND.is_dir() else []
    if not ports:
        return absent("none", "between machines NCCL goes over TCP")
    states = {f"{p.parents[1].name}:{p.name}": (p / "state").read_text().strip().partition(": ")[2] for p in ports}
    active = [port for port, state in states.items() if state == "ACTIVE"]
    text = ", ".join(f"{port} {state}" for port, state in states.items())
    if not active:
        return slow(text, "no port is active, so NCCL goes over TCP: ask who runs the cluster")
    if os.environ.get("NCCL_IB_DISABLE", "0") == "1":
        return slow(f"{text}; NCCL_IB_DISABLE=1", "unset NCCL_IB_DISABLE")
    return ok(text)


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def interfaces() -> dict[str, str]:
    """Address -> name of the network interface that has it: the first IPv4 address of each, and all of IPv6."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:
                continue  # has no IPv4 address
            found[socket.inet_ntoa(answer[20:24])] = name
    for line in _lines(Path("/proc/net/if_inet6")):
        address, *_, name = line.split()
        found[socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address))] = name
    return found


def connected_interfaces() -> list[str]:
    """The network interfaces that the TCP connections of this process go over now."""
    names = interfaces()
    return sorted({names.get(address, address) for address in _connected_addresses()})


def _connected_addresses() -> set[str]:
    own, found = _own_sockets(), set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in _lines(Path("/proc/self/net") / table)[1:]:
            _, local, _, state, *rest = line.split()
            if state == "01" and rest[5] in own:  # established; field 9 is the inode
                found.add(_address(local.partition(":")[0], family))
    return found


def _address(text: str, family: int) -> str:
    """An address of /proc/net/tcp: words of 32 bits, each in this machine's byte order."""
    raw = bytes.fromhex(text)
    words = [raw[at : at + 4][::-1] for at in range(0, len(raw), 4)]
    return socket.inet_ntop(family, b"".join(words)).removeprefix("::ffff:")


def _own_sockets() -> set[str]:
    inodes = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError:
            continue  # that of listdir itself
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    return inodes


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _choose_interface() -> str:
    others = sorted({name for address, name in interfaces().items() if not is_loopback(address)})
    return f"set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (here: {', '.join(others) or 'only loopback'}), or mend /etc/hosts"


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value:,}"


def file_system(path: Path) -> str:
    """The kind of file system that a folder lies on, as the kernel calls it."""
    inside = path.resolve()
    found, longest = "unknown file system", -1
    for line in _lines(Path("/proc/self/mounts")):
        _, mounted, kind, *_ = line.split()
        mounted = Path(mounted.replace("\\040", " "))
        if (inside == mounted or mounted in inside.parents) and len(mounted.parts) >= longest:
            found, longest = kind, len(mounted.parts)
    return found


def is_network(path: Path) -> bool:
    kinds = ("nfs", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb", "fuse.", "9p", "afs", "weka", "panfs")
    return file_system(path).startswith(kinds)
