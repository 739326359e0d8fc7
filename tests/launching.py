"""Starting real ranks from a test: processes under gloo, as a launcher would start them."""

import os
import socket
import subprocess
import sys


def start(module: str, *arguments: str, ranks: int = 2) -> list[subprocess.Popen]:
    """Start a module on several CPU ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(ranks):
        env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", module, *arguments]
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    return processes


def finish(processes: list[subprocess.Popen], limit: int = 300) -> list[tuple[int, str]]:
    """Wait for all ranks: exit status and what each printed."""
    outputs = [process.communicate(timeout=limit)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def run(module: str, *arguments: str, ranks: int = 2, limit: int = 300) -> str:
    """Run a module on several ranks to its end, which must be a good one; what rank 0 printed."""
    ended = finish(start(module, *arguments, ranks=ranks), limit)
    for status, output in ended:
        assert status == 0, output[-4000:]
    return ended[0][1]
