"""What the strips of contrastive_strips do between two matrix products, as Triton kernels: each reads its strip once.

The same stages with the same signatures; float32, on a CUDA device, or anywhere in Triton's interpreter
(TRITON_INTERPRET=1). `spare` is not touched. sumexp_strip leaves the logits as they are: g_strip adds the biases itself.

Two runs give the same bits: no atomics, sums of tiles are added up by torch in one order, and a tile's shape comes from a
table, because autotuning picks another winner on another rank. The products stay with cuBLAS.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (in a kernel it takes tl.constexpr at its word, and it does not know num_warps)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from imitate_ds.ops.contrastive_strips import NEVER, Direction, Stages


class Tile(NamedTuple):
    """What one program computes; rows and columns are powers of two."""

    rows: int
    columns: int
    warps: int


# By major compute capability; any other takes the last. A warp reads 128 numbers of a row at once, and with 16 numbers a
# thread no register is spilled, as ptxas counts them, even where N is odd. Not tuned on a device.
TILES = {8: Tile(32, 128, 8), 9: Tile(32, 128, 8), 10: Tile(32, 128, 8)}
INTERPRETER_TILE = Tile(128, 512, 1)  # it pays for every program, hardly for its size

OUTSIDE = tl.constexpr(4 * NEVER)  # in place of a logit beyond the strip: less than any that is biased twice


def q_strip(correlation: Tensor, spare: Tensor, *, prior_strength: float, first: int) -> Tensor:
    """contrastive_strips.q_strip in one kernel: the softness in place, its row sums [R]."""
    tile, (height, width) = _tile(correlation), correlation.shape
    sums = correlation.new_empty(triton.cdiv(width, tile.columns), height)
    with torch.cuda.device_of(correlation):
        _q_kernel[_grid(correlation, tile)](
            correlation,
            sums,
            prior_strength / 2,
            first,
            height,
            width,
            _row_stride(correlation),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
        )
    return sums.sum(dim=0)


def sumexp_strip(
    logits: Tensor, spare: Tensor, *, row_bias: Tensor, column_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """contrastive_strips.sumexp_strip, but the logits stay without their biases."""
    tile, (height, width) = _tile(logits), logits.shape
    row_max, row_sum = logits.new_empty(2, triton.cdiv(width, tile.columns), height)
    column_max, column_sum = logits.new_empty(2, triton.cdiv(height, tile.rows), width)
    with torch.cuda.device_of(logits):
        _sumexp_kernel[_grid(logits, tile)](
            logits,
            row_bias.contiguous(),
            column_bias.contiguous(),
            row_max,
            row_sum,
            column_max,
            column_sum,
            height,
            width,
            _row_stride(logits),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
        )
    return *_merged(row_max, row_sum), *_merged(column_max, column_sum)


def g_strip(
    logits: Tensor,
    q: Tensor | None,
    spare: Tensor,
    out: Tensor,
    *,
    rows: Direction,
    columns: Direction,
    softness: Tensor,
    scale: Tensor,
    first: int,
) -> Tensor:
    """contrastive_strips.g_strip in one kernel; logits without biases, overwritten only where they are `out`."""
    tile, (height, width) = _tile(logits), logits.shape
    agreement = logits.new_empty(triton.cdiv(width, tile.columns), height)
    with torch.cuda.device_of(logits):
        _g_kernel[_grid(logits, tile)](
            logits,
            q,
            out,
            agreement,
            torch.stack(rows),
            torch.stack(columns),
            softness,
            scale,
            first,
            height,
            width,
            _row_stride(logits),
            0 if q is None else _row_stride(q),
            _row_stride(out),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            num_warps=tile.warps,
        )
    return agreement.sum(dim=0)


TRITON_STAGES = Stages(q_strip, sumexp_strip, g_strip, spare=False)


def _tile(strip: Tensor) -> Tile:
    if strip.dtype != torch.float32:
        raise ValueError(f"backend = 'triton': computes in float32, found {strip.dtype}; use strips, or dense")
    if strip.is_cuda:
        major, _ = torch.cuda.get_device_capability(strip.device)
        return TILES.get(major, TILES[max(TILES)])
    if isinstance(tl.sum, triton.JITFunction):
        raise RuntimeError("TRITON_INTERPRET = 1: triton was imported before it was set; set it in the environment")
    return INTERPRETER_TILE


def _grid(strip: Tensor, tile: Tile) -> tuple[int, int]:
    """Programs over columns, then over rows: the second is the axis that CUDA limits to 65,535."""
    height, width = strip.shape
    return triton.cdiv(width, tile.columns), triton.cdiv(height, tile.rows)


def _row_stride(strip: Tensor) -> int:
    assert strip.stride(1) == 1
    return strip.stride(0)


def _merged(maxima: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Maxima and sums of exp(logit - maximum) over all tiles, from those of each, [tiles, M]; overwrites them."""
    largest = maxima.amax(dim=0)
    return largest, maxima.sub_(largest).exp_().mul_(sums).sum(dim=0)


@triton.jit
def _span(axis: tl.constexpr, SIZE: tl.constexpr):
    """This program's rows or columns, as int64: places in a strip go beyond 2^31."""
    return tl.program_id(axis).to(tl.int64) * SIZE + tl.arange(0, SIZE)


@triton.jit(do_not_specialize=["first", "height"])
def _q_kernel(
    correlation, sums, half_strength, first, height, width, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    rows, columns = _span(1, ROWS), _span(0, COLUMNS)
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    places = correlation + rows[:, None] * stride + columns[None, :]
    c = tl.load(places, mask=inside, other=0.0)
    half = tl.where(c < 0, 0.0, c) * half_strength  # tl.maximum would turn NaN into 0
    # Of p = 1 - exp(-half), which loses its digits where half is small, there the series; 1 - exp(-2 half) = p (2 - p).
    tail = 1 / 120 - half * (1 / 720 - half * (1 / 5040 - half * (1 / 40320)))
    series = half * (1 - half * (1 / 2 - half * (1 / 6 - half * (1 / 24 - half * tail))))
    p = tl.where(half < 0.5, series, 1 - tl.exp(-half))
    q = p * (2 - p)
    q = tl.where(columns[None, :] == (rows + first)[:, None], 0.0, q)
    tl.store(places, q, mask=inside)
    tl.store(sums + tl.program_id(0) * height + rows, tl.sum(q, axis=1), mask=rows < height)


@triton.jit(do_not_specialize=["height"])
def _sumexp_kernel(
    logits,
    row_bias,
    column_bias,
    row_maxima,
    row_sums,
    column_maxima,
    column_sums,
    height,
    width,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows, columns = _span(1, ROWS), _span(0, COLUMNS)
    here, there = rows < height, columns < width
    z = tl.load(logits + rows[:, None] * stride + columns[None, :], mask=here[:, None] & there[None, :], other=OUTSIDE)
    z += tl.load(column_bias + columns, mask=there, other=0.0)[None, :]
    z += tl.load(row_bias + rows, mask=here, other=0.0)[:, None]

    row_max, row_places = tl.max(z, axis=1), tl.program_id(0) * height + rows
    tl.store(row_maxima + row_places, row_max, mask=here)
    tl.store(row_sums + row_places, tl.sum(tl.exp(z - row_max[:, None]), axis=1), mask=here)

    column_max, column_places = tl.max(z, axis=0), tl.program_id(1) * width + columns
    tl.store(column_maxima + column_places, column_max, mask=there)
    tl.store(column_sums + column_places, tl.sum(tl.exp(z - column_max[None, :]), axis=0), mask=there)


@triton.jit(do_not_specialize=["first", "height"])
def _g_kernel(
    logits,
    q,
    out,
    agreement,
    row_numbers,  # [4, height]: a Direction
    column_numbers,  # [4, width]
    softness,
    scale,
    first,
    height,
    width,
    stride,
    q_stride,
    out_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows, columns = _span(1, ROWS), _span(0, COLUMNS)
    here, there = rows < height, columns < width
    inside = here[:, None] & there[None, :]
    row_maximum, row_share, row_weight, row_bias = _numbers(row_numbers, rows, height)
    column_maximum, column_share, column_weight, column_bias = _numbers(column_numbers, columns, width)

    z = tl.load(logits + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    targets = (columns[None, :] == (rows + first)[:, None]).to(tl.float32)
    if q is not None:
        softnesses = tl.load(q + rows[:, None] * q_stride + columns[None, :], mask=inside, other=0.0)
        targets += tl.load(softness) * softnesses
    targets *= row_weight[:, None] + column_weight[None, :]  # where one of the two is not valid, q is 0
    agrees = tl.sum(targets * z, axis=1)
    tl.store(agreement + tl.program_id(0) * height + rows, agrees, mask=here)

    z += row_bias[:, None] + column_bias[None, :]
    g = tl.exp(z - row_maximum[:, None]) * row_share[:, None]
    g += tl.exp(z - column_maximum[None, :]) * column_share[None, :]
    # The store rounds to what `out` holds: once, after the subtraction.
    tl.store(out + rows[:, None] * out_stride + columns[None, :], (g - targets) * tl.load(scale), mask=inside)


@triton.jit
def _numbers(direction, samples, count):
    """The four rows of a stacked Direction [4, count] at these samples; 0 beyond."""
    there = samples < count
    maximum = tl.load(direction + samples, mask=there, other=0.0)
    share = tl.load(direction + count + samples, mask=there, other=0.0)
    weight = tl.load(direction + 2 * count + samples, mask=there, other=0.0)
    bias = tl.load(direction + 3 * count + samples, mask=there, other=0.0)
    return maximum, share, weight, bias
