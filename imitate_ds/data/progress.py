"""How far a long pass over shards has come: a bar on a terminal, plain lines in a log."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import track

T = TypeVar("T")


def shown(items: Iterable[T], total: int, what: str, progress: bool = True) -> Iterator[T]:
    """The items, as they come, with progress on standard error unless it is switched off."""
    if progress and sys.stderr.isatty():
        yield from track(items, what, total=total, console=Console(stderr=True))
        return
    for done, item in enumerate(items, 1):
        yield item
        if progress:
            print(f"{what}: {done}/{total}", file=sys.stderr, flush=True)
