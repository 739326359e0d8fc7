"""What a location of shards is called: in messages, which show no credentials, and as a folder of the cache."""

import hashlib
import re
from urllib.parse import SplitResult, urlsplit, urlunsplit

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")  # two letters at least: C:\ is a drive


def is_remote(location: str) -> bool:
    """Whether a location is a URL (http://, https://, s3://, ...), and not a path."""
    return _SCHEME.match(location) is not None


def is_http(location: str) -> bool:
    return location.startswith(("http://", "https://"))


def lower_scheme(location: str) -> str:
    return _SCHEME.sub(lambda scheme: scheme[0].lower(), location, count=1)


def without_credentials(location: str) -> str:
    """A URL fit for messages. Raises ValueError for one that cannot be read, without showing it."""
    parts = _split(location)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))


def join_url(location: str, name: str) -> str:
    """The URL of a file of a folder. A query, which may hold an access token, stays behind it."""
    if not is_http(location):
        return f"{location.rstrip('/')}/{name}"
    parts = _split(location)
    return urlunsplit((parts.scheme, parts.netloc, f"{parts.path.rstrip('/')}/{name}", parts.query, ""))


def cache_folder_name(location: str) -> str:
    """The same for a location whatever token it is read with, so that a new one finds the files."""
    tail = re.sub(r"[^A-Za-z0-9._-]+", "_", location.rpartition("/")[2])[-60:].lstrip(".")
    return f"{hashlib.sha256(location.encode()).hexdigest()[:12]}-{tail}"


def _split(location: str) -> SplitResult:
    try:
        parts = urlsplit(location)
        _ = parts.port if is_http(location) else None  # raises where a password has a '/'
    except ValueError:
        parts = None
    if parts is None or (not parts.netloc.rpartition("@")[2] and parts.scheme != "file"):
        raise ValueError(
            "data.shards: a URL that cannot be read; write https://host/folder or s3://bucket/folder, and characters such "
            "as / ? # @ in a user name or a password as %2F %3F %23 %40"
        )
    return parts
