"""Memory that workers write batches into and the training process reads, without a copy.

A fresh shared tensor for every batch, as DataLoader makes them, costs a page fault for every 4 KB: 128 studies at 224 pixels
are 3,136 of them, about as much time as decoding the batch takes. These pages stay.
"""

import mmap
import weakref
from collections import deque

import numpy as np
import torch
from torch import Tensor


class BatchBuffers:
    """So many shared buffers, each for one uint8 tensor of one shape. Made before the workers are forked.

    A buffer that was lent is free again once nothing refers to the tensor or to a part of it; whoever keeps all batches
    finds none free, and then they come as DataLoader sends them.
    """

    def __init__(self, count: int, shape: tuple[int, ...]):
        size = int(np.prod(shape))
        self._arrays = [np.frombuffer(mmap.mmap(-1, size), np.uint8).reshape(shape) for _ in range(count)]
        self._free = deque(range(count))

    def take(self) -> int | None:
        """The number of a buffer that nobody uses, if there is one. For the training process."""
        return self._free.popleft() if self._free else None

    def to_fill(self, number: int | None) -> Tensor | None:
        """The buffer, for a worker to write into."""
        return None if number is None else torch.from_numpy(self._arrays[number])

    def lend(self, number: int) -> Tensor:
        """The tensor that a worker wrote; its buffer is taken back when the last part of it is gone."""
        lease = self._arrays[number].view()
        weakref.finalize(lease, self._free.append, number).atexit = False
        return torch.from_numpy(lease)  # its storage, which all parts share, refers to the lease
