"""Worker processes that make batches: how they start, what they do not hear, how they end."""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

PREFETCHED_BY_WORKER = 2  # batches asked of a worker before the first is wanted


def in_workers(batches: Dataset, workers: int, requests: Iterable) -> DataLoader:
    """Make batches in worker processes, or here where there are none.

    By fork: the first batch came after 1.4 s, with forkserver after 6 s and with spawn after 24 s (two workers, two busy
    cores), since those import the trainer's main module, DeepSpeed included, in every worker, and again for each
    evaluation. A worker may be forked beside the threads of gloo or NCCL because it never calls them, and computes on
    one thread; 160 forks beside busy all-reduces were tried.
    """
    if workers:
        _register_end()
        # Threads of the tokenizers library do not survive a fork; it would say so in every worker.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return DataLoader(
        batches,
        batch_size=None,
        sampler=requests,  # in this process, and lazily: the plan is drawn here
        num_workers=workers,
        prefetch_factor=PREFETCHED_BY_WORKER if workers else None,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        multiprocessing_context="fork" if workers else None,
    )


@cache
def _register_end() -> None:
    atexit.register(_end_workers)


def _end_workers() -> None:
    """At exit multiprocessing sends SIGTERM to its daemons and waits; workers whose loader lives on do not hear it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would take their end for a fault
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _start_worker(worker: int) -> None:
    """Signals are the trainer's business: a drained run still wants the batches its workers hold."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _as_it_is(batch: Any) -> Any:
    return batch
