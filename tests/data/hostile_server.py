"""A real HTTP server over a folder that breaks down as told: what the tests of shard_store download from."""

import base64
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit


class Fault(NamedTuple):
    """What goes wrong in the answer to one request."""

    status: int = 0  # answer with this, and no body
    cut: float = 1.0  # the connection ends after this part of the body
    stall: float = 0.0  # pause in mid-body, seconds
    flip: bool = False  # one bit of the body is wrong
    keep: float = 1.0  # this part of the file is all there is, and Content-Length says so
    endless: bool = False  # zeros follow for ever
    junk_range: bool = False  # a range is answered with another one


DROP = Fault(cut=0.5)
BUSY = Fault(status=503)
STALL = Fault(stall=60.0)
SHORT = Fault(keep=0.5)
FLIP = Fault(flip=True)
ENDLESS = Fault(endless=True)


class HostileServer(ThreadingHTTPServer):
    """Faults are used up request by request, by the name of the file; `always` has those that never end."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.faults: defaultdict[str, list[Fault]] = defaultdict(list)
        self.always: dict[str, Fault] = {}
        self.ranges = True
        self.password = ""  # "user:password" that a request must bring
        self.requests: Counter[str] = Counter()
        self.starts: defaultdict[str, list[int]] = defaultdict(list)  # where each request wanted to begin
        self.stopping = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def next_fault(self, name: str, start: int) -> Fault:
        with self.lock:
            self.requests[name] += 1
            self.starts[name].append(start)
            return self.faults[name].pop(0) if self.faults[name] else self.always.get(name, Fault())

    def handle_error(self, request, client_address) -> None:
        """Clients hang up in these tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HostileServer

    def do_GET(self) -> None:
        path = self.server.folder / urlsplit(self.path).path.lstrip("/")
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        fault = self.server.next_fault(path.name, start)
        credentials = "Basic " + base64.b64encode(self.server.password.encode()).decode()
        if self.server.password and self.headers.get("Authorization") != credentials:
            fault = Fault(status=401)
        status = fault.status or (200 if path.is_file() else 404)
        if status != 200:
            self._send(status, b"", Fault())
            return
        body = path.read_bytes()
        body = body[: int(len(body) * fault.keep)]
        if not wanted or not self.server.ranges:
            self._send(200, body, fault)
        elif start >= len(body):
            self._send(416, b"", Fault())
        else:
            part = body[start : int(wanted[2]) + 1 if wanted[2] else None]
            shown = start + 1 if fault.junk_range else start
            self._send(206, part, fault, {"Content-Range": f"bytes {shown}-{start + len(part) - 1}/{len(body)}"})

    def _send(self, status: int, body: bytes, fault: Fault, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if not fault.endless:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault.flip:
            body = body[:-1] + bytes([body[-1] ^ 1])
        body = body[: int(len(body) * fault.cut)]
        middle = len(body) // 2
        self._write(body[:middle])
        if fault.stall:
            self.server.stopping.wait(fault.stall)
        self._write(body[middle:])
        while fault.endless and not self.server.stopping.is_set():
            self._write(bytes(2**20))
        self.close_connection = self.close_connection or fault.cut < 1 or fault.endless

    def _write(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()

    def log_message(self, format: str, *args) -> None:
        """Quiet."""


@contextmanager
def serve(folder: Path) -> Iterator[HostileServer]:
    server = HostileServer(folder)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.shutdown()
        server.server_close()
