"""Buffers are never written while anything still shows what was in them."""

import gc
import os

import torch

from imitate_ds.data.batch_buffers import BatchBuffers


def test_a_buffer_comes_back_when_the_last_part_of_its_tensor_is_gone():
    buffers = BatchBuffers(2, (3, 4))
    first, second = buffers.take(), buffers.take()
    assert first is not None
    assert {first, second} == {0, 1}
    assert buffers.take() is None
    whole = buffers.lend(first)
    part = whole[2, :2]
    del whole
    gc.collect()
    assert buffers.take() is None, "a row of it lives on"
    del part
    gc.collect()
    assert buffers.take() == first


def test_a_forked_process_fills_what_this_one_reads():
    buffers = BatchBuffers(1, (2, 8))
    number = buffers.take()
    child = os.fork()
    if not child:
        page = buffers.to_fill(number)
        assert page is not None
        page.copy_(torch.arange(16, dtype=torch.uint8).view(2, 8))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert number is not None
    assert buffers.lend(number).flatten().tolist() == list(range(16))


def test_without_a_number_there_is_nothing_to_fill():
    assert BatchBuffers(0, (2, 2)).take() is None
    assert BatchBuffers(1, (2, 2)).to_fill(None) is None
