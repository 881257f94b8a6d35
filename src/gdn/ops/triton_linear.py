"""GPU kernels of decoding's products: a few rows, one token of each sequence, times a weight.

What a token costs is reading the weights once. The sum over K goes in fixed segments, each from 0 on, added in a fixed order
(`triton_rows.Sum`), whichever kernel takes them: with few rows each segment is a program of its own, whose 64 rows of the
weight are on the chip before what it multiplies exists, and the next kernel adds; with more, a program takes several segments
one after another. So a row has the same bits beside any number of others. Launchers only.
"""

# mypy: disable-error-code=assignment
# Tuples grow in kernels.

from functools import cache
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn.ops.triton_chain import begin, link, prefetch, wait
from gdn.ops.triton_rows import (
    Sum,
    Window,
    as_whole,
    group,
    move_window,
    rms,
    segment,
    share_window,
    silu,
    summed,
    window_inputs,
)

FEW = 16  # so many rows at most are multiplied a segment a program, by `few_linear`
FUSED = 4  # and so many are gated by every program that needs them; more, once, by a kernel before it
_NUM_WARPS = 4


class Tile(NamedTuple):
    """What a program of `many_linear` takes at once; no bits hang on it."""

    weight_rows: int  # 64, or 128 for many rows
    rows: int  # of activations
    columns: int
    stages: int
    num_warps: int


@cache
def tile(rows: int, device: torch.device) -> Tile:
    return tile_for(rows, device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9)


def tile_for(rows: int, hopper: bool) -> Tile:
    """What fits the shared memory, twice on Hopper but for many rows: the next kernel's programs begin beside these."""
    block = min(max(triton.next_power_of_2(rows), 16), 128)
    if block == 128:
        return Tile(128, 128, 64, 4 if hopper else 3, 8)
    return Tile(64, block, 128 if hopper else 64, 4 if block <= 32 else 3, _NUM_WARPS)


def few_linear(x: Tensor, weight: Tensor, size: int, to_residual: bool) -> Sum:
    """x [B, K], at most FEW rows, times weight [N, K], by segments of `size` columns; x's last stride is 1."""
    return _few("nothing", x, None, None, 0.0, weight, size, to_residual)


def gated_norm_linear(
    o: Tensor, gate: Sum | None, gate_at: int, norm: Tensor, eps: float, weight: Tensor, window: Window
) -> Sum:
    """gated_norm_rows times weight [N, HV * V] in one launch, for at most FUSED rows; the window is moved on."""
    return _few("gated_norm", o, gate, norm, eps, weight, o.shape[2], True, gate_at, window)


def swiglu_linear(gate_up: Sum, weight: Tensor) -> Sum:
    """swiglu_rows times weight [N, F] in one launch, for at most FUSED rows."""
    return _few("swiglu", gate_up.parts[0], gate_up, None, 0.0, weight, segment(weight.shape[1]), True)


def _few(
    before: Literal["nothing", "gated_norm", "swiglu"],
    x: Tensor,
    more: Sum | None,
    norm: Tensor | None,
    eps: float,
    weight: Tensor,
    size: int,
    to_residual: bool,
    gate_at: int = 0,
    window: Window | None = None,
) -> Sum:
    B, (N, K) = len(x), weight.shape
    most = FEW if before == "nothing" else FUSED
    if most < B or K % size:
        raise ValueError(f"{B} rows, {K} columns in segments of {size}; expected at most {most} rows and whole segments")
    out = torch.empty(K // size, B, N, device=weight.device)
    grid = (triton.cdiv(N, 64), K // size)
    _few_linear[grid](
        x, None if more is None else more.parts, norm, weight, out,
        None if window is None else window.window, None if window is None else window.projected.parts,
        B, N, eps, gate_at, _columns(more), _columns(None if window is None else window.projected),
        **share_window(window, grid[0] * grid[1]), PARTS=0 if more is None else len(more.parts),
        K=K, SEGMENT=size, BEFORE=before,
        ROWS=triton.next_power_of_2(B), BB=16, num_warps=_NUM_WARPS, **link(out.device),
    )  # fmt: skip
    return Sum(out, group(K // size) if to_residual else 1)


def many_linear(
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    size: int,
    *,
    swiglu: bool = False,
    tiles: Tile | None = None,
) -> None:
    """x [B, K] times weight [N, K] to out: [B, N] the whole sum, or [S, B, N] its S groups of segments of `size` columns.

    swiglu: weight is gate | up and out is silu(gate product) * up product [B, N / 2]. x's and out's last stride is 1.
    """
    B, (N, K) = len(x), weight.shape
    block = tiles or tile(B, x.device)
    S = len(out) if out.ndim == 3 else 1
    columns = min(block.columns, size)
    each = triton.cdiv(K // size, S)
    if K % size or triton.cdiv(K // size, each) != S:
        raise ValueError(f"{K} columns to {S} groups of segments of {size}; expected whole segments and no empty group")
    grid = (triton.cdiv(N, block.weight_rows), S, triton.cdiv(B, block.rows))
    _many_linear[grid](
        x, weight, out, B, N, x.stride(0), out.stride(-2),
        K=K, SEGMENT=size, GROUP=each, SWIGLU=swiglu, BN=block.weight_rows, BB=block.rows, BK=columns,
        num_warps=block.num_warps, num_stages=block.stages, **link(out.device),
    )  # fmt: skip


def _columns(more: Sum | None) -> int:
    return 0 if more is None else more.parts.shape[2]


@triton.jit(do_not_specialize=["rows", "gate_at", "columns", "newest_columns"])
def _few_linear(
    x, parts, norm, weight, out, window, newest, rows, N, eps, gate_at, columns, newest_columns,
    PARTS: tl.constexpr, W: tl.constexpr, D: tl.constexpr, NEWEST: tl.constexpr, CHANNELS: tl.constexpr,
    K: tl.constexpr, SEGMENT: tl.constexpr, BEFORE: tl.constexpr, ROWS: tl.constexpr, BB: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    begin(CHAINED)
    segment = tl.program_id(1)
    n = tl.program_id(0) * 64 + tl.arange(0, 64)
    within = tl.arange(0, SEGMENT)
    k = segment * SEGMENT + within
    place = tl.arange(0, BB)
    there = (place < rows)[:, None]
    dtype: tl.constexpr = weight.dtype.element_ty
    w = tl.load(weight + tl.minimum(n, N - 1)[:, None] * K + k[None, :])
    if BEFORE == "gated_norm":
        norm_ = tl.load(norm + within).to(tl.float32)
    wait(CHAINED)

    # All loads before the first use of one: what each waits for is waited for once.
    stride = rows.to(tl.int64) * columns
    program = tl.program_id(0) * (K // SEGMENT) + segment
    if BEFORE == "swiglu":
        at = place[:, None] * columns + k[None, :]
        gate, up = summed(parts, at, stride, there, PARTS), summed(parts, at + K, stride, there, PARTS)
        h = (silu(gate) * up).to(dtype)
    else:
        h = tl.load(x + place[:, None] * K + k[None, :], mask=there, other=0.0)
    if BEFORE == "gated_norm":
        o = ()
        for r in tl.static_range(ROWS):
            o = o + (tl.load(x + r * K + k, mask=r < rows, other=0.0),)
        if PARTS:
            gate = summed(parts, place[:, None] * columns + gate_at + k[None, :], stride, there, PARTS)
        if W > 1:
            moving = window_inputs(window, newest, program, rows, newest_columns, W, D, NEWEST, CHANNELS)
        scale = tl.zeros([BB], tl.float32)
        for r in tl.static_range(ROWS):
            scale = tl.where(place == r, rms(o[r].to(tl.float32), SEGMENT, eps), scale)
        y = h.to(tl.float32) * scale[:, None] * norm_[None, :]
        if PARTS:
            y *= silu(as_whole(gate, PARTS, dtype))
        h = y.to(dtype)
    acc = tl.dot(w, tl.trans(h), input_precision="ieee")
    target = out + (segment * rows + place[None, :]) * N + n[:, None]
    tl.store(target, acc, mask=(place < rows)[None, :] & (n[:, None] < N))
    if W > 1:
        move_window(window, moving, program, rows, W, D, NEWEST, CHANNELS)


@triton.jit(do_not_specialize=["rows"])
def _many_linear(
    x, weight, out, rows, N, x_stride, out_stride,
    K: tl.constexpr, SEGMENT: tl.constexpr, GROUP: tl.constexpr, SWIGLU: tl.constexpr,
    BN: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    begin(CHAINED)
    group = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.program_id(2) * BB + tl.arange(0, BB)
    source = n
    if SWIGLU:  # a gate's row, then its up's
        source = n // 2 + (n % 2) * (N // 2)
    source = tl.where(n < N, source, 0)
    first = group * (GROUP * SEGMENT)
    WIDE: tl.constexpr = GROUP * SEGMENT if GROUP * SEGMENT < K else K
    if CHAINED:
        prefetch(weight, source, min(first, K - WIDE), K, WIDE, BN)
    wait(CHAINED)

    weights = weight + source[:, None] * K
    inputs = x + tl.minimum(row, rows - 1)[:, None] * x_stride
    acc = tl.zeros([BN, BB], tl.float32)
    total = tl.zeros([BN, BB], tl.float32)
    for start in tl.range(first, min(first + GROUP * SEGMENT, K), BK):
        k = start + tl.arange(0, BK)
        w = tl.load(weights + k[None, :])
        h = tl.load(inputs + k[None, :])
        acc = tl.dot(w, tl.trans(h), acc, input_precision="ieee")
        if GROUP > 1:  # noqa: SIM102  known when compiled
            if (start + BK) % SEGMENT == 0:
                total = tl.fma(acc, tl.full([BN, BB], 1.0, tl.float32), total)  # an addition would be joined with the product
                acc = tl.zeros([BN, BB], tl.float32)
    if GROUP == 1:
        total = acc
    if SWIGLU:
        pair = tl.reshape(total, [BN // 2, 2, BB])
        up = (tl.arange(0, 2) == 1)[None, :, None]
        gate = tl.sum(tl.where(up, 0.0, pair), 1)
        total = silu(gate) * tl.sum(tl.where(up, pair, 0.0), 1)
        n = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
        N = N // 2
    target = out + (group * rows + row[None, :]) * out_stride + n[:, None]
    tl.store(target, total.to(out.dtype.element_ty), mask=(row[None, :] < rows) & (n[:, None] < N))
