"""How the bytes of a remote file come: fsspec's file systems, opened afresh in every process, and what goes wrong with them.

Knows nothing of the cache. An attempt gives bytes, or raises a Fault, whose text never shows a URL with its credentials.
"""

import os
import sys
from collections.abc import Iterator
from typing import Any

import fsspec
import fsspec.asyn
import fsspec.config

from imitate_ds.data.shard_urls import is_http

BLOCK = 8 * 2**20  # bytes of one request, where a protocol has no streams; and the progress that earns new attempts
CONNECT_S = 15.0  # a machine that answers at all does so sooner
WITHOUT_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound")

os.register_at_fork(after_in_child=fsspec.asyn.reset_lock)  # fsspec's own hook resets another name


class Fault(Exception):
    """Why an attempt failed. fatal: raise this at once; restart: what has arrived is worthless; cut: the line failed."""

    def __init__(self, reason: str, *, fatal: type[OSError] | None = None, restart: bool = False, cut: bool = False):
        super().__init__(reason)
        self.reason = reason
        self.fatal = fatal
        self.restart = restart
        self.cut = cut


def remote_bytes(
    file_system: Any, url: str, start: int, limit: int, *, sized: bool, timeout_s: float
) -> Iterator[bytes]:
    """The bytes of a remote file from `start` on, as they come; no more than a few beyond `limit`. Raises Fault."""
    try:
        if is_http(url):
            yield from _http_chunks(file_system, url, start)
        else:
            yield from _blocks(file_system, type(file_system)._strip_protocol(url), start, limit, sized=sized)
    except _transfer_errors() as error:
        raise _fault_of(error, timeout_s) from None


def require_protocol(location: str) -> Any:
    """The fsspec class for a URL. Raises ModuleNotFoundError or ValueError where there is none."""
    protocol = location.partition("://")[0]
    try:
        return fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        needs = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs"}.get(protocol)
        how = f"{needs}: pip install 'imitate-ds[remote]'" if needs else f"one more package: {error}"
        raise ModuleNotFoundError(f"data.shards: {protocol}:// needs {how}") from None
    except ValueError:
        raise ValueError(f"data.shards: {protocol}:// is unknown; use a folder, http://, https:// or s3://") from None


def open_file_system(location: str, timeout_s: float) -> Any:
    """A file system of its own: an instance that fsspec shares may belong to the parent of this process."""
    kind = require_protocol(location)
    protocol = "http" if is_http(location) else location.partition("://")[0]
    options = kind._get_kwargs_from_urls(location)
    for name, values in _transfer_options(protocol, timeout_s).items():
        options[name] = values | fsspec.config.conf.get(protocol, {}).get(name, {})  # the user's own have precedence
    if protocol == "http" and "%" in location:
        options["encoded"] = True  # a signed query holds only as it was signed
    file_system = kind(skip_instance_cache=True, **options)
    if protocol == "s3":
        file_system.retries = 1  # attempts are counted here
    _close_here_only(file_system)
    return file_system


def _close_here_only(file_system: Any) -> None:
    """Garbage may be collected in a child that a fork gave it to, where closing waits a second for a loop that is not."""
    if close := getattr(file_system, "close_session", None):
        owner = os.getpid()
        file_system.close_session = lambda *session: close(*session) if os.getpid() == owner else None


def _transfer_options(protocol: str, timeout_s: float) -> dict[str, dict[str, Any]]:
    connect_s = min(timeout_s, CONNECT_S)
    if protocol == "http":
        import aiohttp  # an optional dependency

        timeout = aiohttp.ClientTimeout(total=None, connect=connect_s, sock_read=timeout_s)
        return {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    if protocol == "s3":
        retries = {"total_max_attempts": 1}
        return {"config_kwargs": {"connect_timeout": connect_s, "read_timeout": timeout_s, "retries": retries}}
    return {}


def _http_chunks(file_system: Any, url: str, start: int) -> Iterator[bytes]:
    """A body from byte `start` on. fsspec's own readers would hold in memory all that a server without ranges sends."""
    loop = file_system.loop
    response: Any = fsspec.asyn.sync(loop, _get, file_system, url, start)
    try:
        if response.status >= 300:
            raise _fault_of_status(response.status)
        if response.status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise Fault("another range came than was asked for", restart=True)
        skip = start if response.status == 200 else 0  # a server without ranges begins at the beginning
        while chunk := fsspec.asyn.sync(loop, response.content.readany):
            yield chunk[skip:]
            skip = max(0, skip - len(chunk))
    finally:
        loop.call_soon_threadsafe(response.close)  # keeps the connection where the body was read to its end


async def _get(file_system: Any, url: str, start: int) -> Any:
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    session = await file_system.set_session()
    return await session.get(file_system.encode_url(url), headers=headers)


def _blocks(file_system: Any, path: str, start: int, limit: int, *, sized: bool) -> Iterator[bytes]:
    if not sized:  # one request, for nobody knows where a second one would begin
        yield file_system.cat_file(path, start=0, end=limit + 1)
        return
    while start < limit and (block := file_system.cat_file(path, start=start, end=min(start + BLOCK, limit))):
        yield block
        start += len(block)


def _transfer_errors() -> tuple[type[Exception], ...]:
    """What file systems raise when a transfer fails; of the optional packages, those that were imported."""
    kinds: list[type[Exception]] = [OSError, EOFError]
    if aiohttp := sys.modules.get("aiohttp"):
        kinds.append(aiohttp.ClientError)
    if botocore := sys.modules.get("botocore.exceptions"):
        kinds += [botocore.BotoCoreError, botocore.ClientError]
    return tuple(kinds)


def _fault_of(error: Exception, timeout_s: float) -> Fault:
    """What an error of a transfer means. Its own text is not used: it may show a URL with its credentials."""
    status, name = _status(error), type(error).__name__
    if status is not None:
        return _fault_of_status(status)
    if isinstance(error, FileNotFoundError):
        return Fault(name, fatal=FileNotFoundError)
    if isinstance(error, PermissionError) or name in WITHOUT_CREDENTIALS:
        return Fault(name, fatal=PermissionError)
    if isinstance(error, TimeoutError) or "Timeout" in name:
        return Fault(f"{name}: nothing came in time ({timeout_s:g} s)", cut=True)
    number = error.errno if isinstance(error, OSError) else None
    return Fault(f"{name}: {os.strerror(number)}" if number and number > 0 else name, cut=True)


def _fault_of_status(status: int) -> Fault:
    if status in (404, 410):
        return Fault(f"status {status}", fatal=FileNotFoundError)
    if status in (401, 403):
        return Fault(f"status {status}", fatal=PermissionError)
    if status == 416:
        return Fault("status 416: the file is shorter than the index says", restart=True)
    passing = status >= 500 or status in (408, 429)
    return Fault(f"status {status}", fatal=None if passing else OSError, cut=True)


def _status(error: BaseException | None) -> int | None:
    """The HTTP status behind an error of aiohttp, or of botocore, which s3fs wraps in another."""
    if error is None:
        return None
    if isinstance(status := getattr(error, "status", None), int):
        return status
    if isinstance(response := getattr(error, "response", None), dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return _status(error.__cause__)
