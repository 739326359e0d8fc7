"""One rank of test_meeting.py: writes down where the ranks meet, what a pulse brings, and what rank 0 raises for all.

Run as `python -m tests.meeting_worker OUT` under RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
"""

import json
import os
import socket
import struct
import sys
from pathlib import Path

from imitate_ds.distributed import Pulse, from_main, init_world, leave_world


def listening_addresses(port: int) -> list[str]:
    """On which IPv4 addresses of this machine someone listens on a port; `::` stands for an IPv6 listener."""
    found = []
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        address, state = line.split()[1], line.split()[3]
        if state == "0A" and int(address.split(":")[1], 16) == port:
            found.append(socket.inet_ntoa(struct.pack("<I", int(address.split(":")[0], 16))))
    lines = [line.split() for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]]
    found += ["::" for line in lines if line[3] == "0A" and int(line[1].split(":")[1], 16) == port]
    return found


def fail() -> None:
    raise OSError("the disk of rank 0")


def main(out: Path) -> None:
    here = init_world(timeout_s=60)
    pulse = Pulse()
    record: dict = {"addresses": listening_addresses(int(os.environ["MASTER_PORT"]))}
    record["pulses"] = [pulse.exchange(here.rank, 10 * step) for step in range(3)] + [pulse.last(), pulse.last()]
    record["pulses"] = [None if table is None else table.tolist() for table in record["pulses"]]
    record["from_main"] = from_main(lambda: f"rank {here.rank} says")
    try:
        from_main(fail)
    except OSError as error:
        record["raised"] = str(error)
    (out / f"rank{here.rank}.json").write_text(json.dumps(record))
    leave_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
