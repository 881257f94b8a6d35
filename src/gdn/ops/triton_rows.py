"""GPU kernels' parts around decoding's products, for rows, one token of each sequence: what norms are made of, and what a
product does with its sums at its end; and the launch of a token's first kernel, the embedding.

A norm has no kernel of its own. Whoever writes to the residual stream leaves sums of squares of 16 columns each, and the rows
times the norm's weight; the product that reads them multiplies its sums by 1 / rms, at its end or a head at a time (rows in
float32 before it). Such a sum of squares is the same tree of additions in every kernel: a row has the same bits whatever tile
it is in.
"""

# mypy: disable-error-code=assignment
# Tuples grow in kernels.

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn.ops.triton_chain import begin, link, wait
from gdn.ops.triton_short_conv import sigmoid

SQUARES = 16  # columns of the residual stream for each sum of squares
PARTS = 4  # into which a product that goes to the residual stream is cut at most, over K


class Normed(NamedTuple):
    """Rows [B, K] that are yet to be multiplied by 1 / rms: of the whole row, or of each of its heads."""

    h: Tensor  # float32 for weights in float16, where rows that are not yet scaled may overflow; else the weights' dtype
    squares: Tensor  # [B, heads, parts] float32, whose sum over parts is that of the squares


class Residual(NamedTuple):
    """The residual stream of a token's rows, updated in place."""

    x: Tensor  # [B, hidden] float32
    normed: Normed  # x times the weight of the next norm; heads is 1
    parts: Tensor  # [PARTS, B, hidden] float32: room for products not yet summed
    arrived: Tensor  # int32, 0: how many parts of a tile are there


def operand_dtype(weight: Tensor) -> torch.dtype:
    """Of rows that are not yet scaled."""
    return torch.float32 if weight.dtype == torch.float16 else weight.dtype


def embed(ids: Tensor, embeddings: Tensor, position: Tensor, norm: Tensor) -> Residual:
    """The rows' vectors, and one more token at position [B] int64, in place; norm: the first layer's. The start of a chain."""
    B, K = len(ids), embeddings.shape[1]
    if K % SQUARES or len(position) != B:
        raise ValueError(f"{B} ids of {K} columns at {len(position)} positions; expected as many, of a multiple of {SQUARES}")
    count = K // SQUARES  # of sums of squares; and at least of tiles, for each row
    x, h = torch.empty(B, K, device=ids.device), torch.empty(B, K, dtype=operand_dtype(embeddings), device=ids.device)
    squares, parts = x.new_empty(B, 1, count), x.new_empty(PARTS, B, K)
    arrived = torch.empty(B, count, dtype=torch.int32, device=ids.device)
    _embed[(B,)](
        ids, embeddings, position, norm, x, h, squares, arrived, K=K, WIDTH=triton.next_power_of_2(K), SIZE=SQUARES,
        num_warps=4, **link(x.device, start=True, rows=B),
    )  # fmt: skip
    return Residual(x, Normed(h, squares), parts, arrived)


@triton.jit
def _embed(
    ids, embeddings, position, norm, x, h, squares, arrived,
    K: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    begin(CHAINED)
    wait(CHAINED)
    row, column, block = tl.program_id(0), tl.arange(0, WIDTH), tl.arange(0, WIDTH // SIZE)
    vector = tl.load(embeddings + tl.load(ids + row) * K + column, mask=column < K, other=0.0).to(tl.float32)
    weight = tl.load(norm + column, mask=column < K, other=0.0).to(tl.float32)
    tl.store(x + row * K + column, vector, mask=column < K)
    tl.store(h + row * K + column, (vector * weight).to(h.dtype.element_ty), mask=column < K)
    of_blocks = tl.reshape(squares_of(tl.reshape(vector, [1, WIDTH]), 1, WIDTH), [WIDTH // SIZE])
    tl.store(squares + row * (K // SIZE) + block, of_blocks, mask=block < K // SIZE)
    tl.store(arrived + row * (K // SIZE) + block, 0, mask=block < K // SIZE)
    tl.store(position + row, tl.load(position + row) + 1)


@triton.jit
def squares_of(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of squares of 16 neighbours each: [ROWS, COLUMNS] to [ROWS, COLUMNS / 16], by pairs: no layout changes the order."""
    a, b = tl.split(tl.reshape(x, [ROWS, COLUMNS // 2, 2]))
    a, b = tl.split(tl.reshape(tl.fma(a, a, b * b), [ROWS, COLUMNS // 4, 2]))
    a, b = tl.split(tl.reshape(a + b, [ROWS, COLUMNS // 8, 2]))
    a, b = tl.split(tl.reshape(a + b, [ROWS, COLUMNS // 16, 2]))
    return a + b


@triton.jit
def sum_of_squares(squares, place, mask, COUNT: tl.constexpr):
    """Of each place [ROWS, COLUMNS] its COUNT sums of squares to four [ROWS, COLUMNS, 4], which `inverse_rms` takes."""
    ROWS: tl.constexpr = place.shape[0]
    COLUMNS: tl.constexpr = place.shape[1]
    four = tl.arange(0, 4)[None, None, :]
    total = tl.zeros([ROWS, COLUMNS, 4], tl.float32)
    for first in tl.static_range(0, COUNT, 4):
        there = mask[:, :, None] & (four < COUNT - first)
        total += tl.load(squares + place[:, :, None] * COUNT + first + four, mask=there, other=0.0)
    return total


@triton.jit
def inverse_rms(total, SIZE: tl.constexpr, eps):
    """1 / root mean square of SIZE columns [ROWS, COLUMNS]."""
    ROWS: tl.constexpr = total.shape[0]
    COLUMNS: tl.constexpr = total.shape[1]
    evens, odds = tl.split(tl.reshape(total, [ROWS, COLUMNS, 2, 2]))
    a, c = tl.split(evens)
    b, d = tl.split(odds)
    return tl.rsqrt(((a + b) + (c + d)) / SIZE + eps)


@triton.jit
def silu(x):
    return x * sigmoid(x)


@triton.jit
def add_to_residual(total, before, weight, x, h, squares, row, n, rows, N: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr):
    """A tile of a finished product to the residual stream, `before` it, with what the norm of that weight wants of it."""
    there = (row < rows)[:, None] & (n < N)[None, :]
    place = row[:, None] * N + n[None, :]
    total = before + total
    tl.store(x + place, total, mask=there)
    tl.store(h + place, (total * weight[None, :]).to(h.dtype.element_ty), mask=there)
    block = tl.program_id(1) * (BN // 16) + tl.arange(0, BN // 16)
    target = squares + row[:, None] * (N // 16) + block[None, :]
    tl.store(target, squares_of(total, BB, BN), mask=(row < rows)[:, None] & (block < N // 16)[None, :])


@triton.jit
def window_inputs(window, row, n, rows, W: tl.constexpr, D: tl.constexpr):
    """The last inputs of the convolution of a tile's channels, the first D of all columns."""
    place = window + row.to(tl.int64)[:, None] * ((W - 1) * D) + n[None, :]
    inputs = ()
    for i in tl.static_range(W - 1):
        inputs = inputs + (tl.load(place + i * D, mask=(row < rows)[:, None] & (n < D)[None, :], other=0.0),)
    return inputs


@triton.jit
def window_taps(conv, bias, n, W: tl.constexpr, D: tl.constexpr):
    taps = ()
    for i in tl.static_range(W):
        taps = taps + (tl.load(conv + i * D + n, mask=n < D, other=0.0).to(tl.float32)[None, :],)
    if bias is not None:
        taps = taps + (tl.load(bias + n, mask=n < D, other=0.0).to(tl.float32)[None, :],)
    return taps


@triton.jit
def convolved(newest, inputs, taps, window, row, n, rows, W: tl.constexpr, D: tl.constexpr):
    """silu of the convolution, and the window moved on: no other program has these channels of these rows. Columns beyond the
    channels are rounded alone."""
    inputs = inputs + (newest.to(window.dtype.element_ty),)
    newest = inputs[W - 1].to(tl.float32)
    y = newest * taps[W - 1]  # from the latest input to the oldest
    for i in tl.static_range(W - 1):
        y = tl.fma(inputs[W - 2 - i].to(tl.float32), tl.broadcast_to(taps[W - 2 - i], y.shape), y)
    if len(taps) > W:
        y = y + taps[W]
    if W > 1:
        tl.debug_barrier()  # all are read before any is written, whichever threads do it
        place = window + row.to(tl.int64)[:, None] * ((W - 1) * D) + n[None, :]
        for i in tl.static_range(W - 1):
            tl.store(place + i * D, inputs[i + 1], mask=(row < rows)[:, None] & (n < D)[None, :])
    return tl.where((n < D)[None, :], silu(y), newest)
