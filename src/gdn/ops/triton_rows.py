"""GPU kernels of decoding around its products: for rows, one token of each sequence, the embedding, norms and gates.

The residual stream is float32, and products leave for the next kernel to add what they have not summed themselves (`Sum`), so
that every sum has one order. The root mean squares are summed by `rms` in one layout everywhere. Launchers only; the products
are in `triton_linear`.
"""

# mypy: disable-error-code=assignment
# Tuples grow in kernels.

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn.ops.triton_chain import begin, link, wait

_NUM_WARPS = 4


class Sum(NamedTuple):
    """A product not yet summed: parts [S, B, N] float32, added in their order within `group` at a time, then the groups."""

    parts: Tensor
    group: int


class Residual(NamedTuple):
    """The residual stream: x [B, hidden] float32 and, still to be added, a product."""

    x: Tensor
    more: Sum | None = None


class Window(NamedTuple):
    """The convolution's last inputs [B, W - 1, D], to be moved on by a kernel after the one that reads them."""

    window: Tensor
    projected: Sum  # whose first D columns are the newest


def segment(K: int) -> int:
    """Columns of one sum from 0 on, for a weight of K columns, a multiple of 64."""
    return next(size for size in (256, 128, 64) if K % size == 0)


def group(segments: int) -> int:
    """Segments added before their sum is, where a product that goes to the residual stream is left as a sum: of four."""
    return triton.cdiv(segments, 4)


def sum_like(x: Tensor, K: int, size: int) -> Sum:
    """Room for a product of K columns in segments of `size` that goes to the residual stream x."""
    each = group(K // size)
    return Sum(x.new_empty(triton.cdiv(K // size, each), *x.shape), 1)


def embed(ids: Tensor, embeddings: Tensor, position: Tensor) -> Tensor:
    """The rows' vectors [B, hidden] float32, and one more token at position [B] int64, in place. The first of a chain."""
    B, K = len(ids), embeddings.shape[1]
    x = torch.empty(B, K, device=ids.device)
    _embed[(B,)](
        ids, embeddings, position, x, K=K, WIDTH=triton.next_power_of_2(K), num_warps=_NUM_WARPS, **link(x.device, start=True)
    )
    return x


def norm_rows(residual: Residual, norm: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """rms_norm of the residual's sum [B, hidden] in dtype, and the sum [B, hidden] float32."""
    (B, K), more = residual.x.shape, residual.more
    h, x_out = torch.empty(B, K, dtype=dtype, device=residual.x.device), torch.empty_like(residual.x)
    _norm_rows[(B,)](
        residual.x, None if more is None else more.parts, norm, h, x_out, B, eps, K=K, WIDTH=triton.next_power_of_2(K),
        PARTS=0 if more is None else len(more.parts), GROUP=1 if more is None else more.group,
        num_warps=_NUM_WARPS, **link(h.device),
    )  # fmt: skip
    return h, x_out


def gated_norm_rows(o: Tensor, gate: Sum | None, gate_at: int, norm: Tensor, eps: float, window: Window) -> Tensor:
    """gated_rms_norm(o, gate) [B, HV * V] (rms_norm if there is no gate), and the window moved on in place.

    o [B, HV, V], contiguous; gate's columns from gate_at on are [HV * V]; norm [V], V a power of two.
    """
    B, HV, V = o.shape
    h = torch.empty(B, HV * V, dtype=o.dtype, device=o.device)
    _gated_norm_rows[(B * HV,)](
        o, None if gate is None else gate.parts, norm, h, window.window, window.projected.parts, B, eps,
        gate_at, window.projected.parts.shape[2], PARTS=0 if gate is None else len(gate.parts),
        **share_window(window, B * HV), HV=HV, V=V,
        num_warps=_NUM_WARPS, **link(h.device),
    )  # fmt: skip
    return h


def swiglu_rows(gate_up: Sum, dtype: torch.dtype) -> Tensor:
    """silu(gate) * up of a product with columns gate | up: [B, F] in dtype."""
    _, B, columns = gate_up.parts.shape
    h = torch.empty(B, columns // 2, dtype=dtype, device=gate_up.parts.device)
    _swiglu_rows[(B, triton.cdiv(columns // 2, 512))](
        gate_up.parts, h, B, F=columns // 2, PARTS=len(gate_up.parts), num_warps=_NUM_WARPS, **link(h.device)
    )
    return h


def share_window(window: Window | None, programs: int) -> dict[str, int]:
    """W, D, parts of the projection, and a power of two of channels for each program."""
    if window is None:
        return {"W": 1, "D": 1, "NEWEST": 1, "CHANNELS": 128}
    B, carried, D = window.window.shape
    each = max(triton.next_power_of_2(triton.cdiv(B * D, programs)), 128)
    return {"W": carried + 1, "D": D, "NEWEST": len(window.projected.parts), "CHANNELS": each}


@triton.jit
def rms(x, SIZE: tl.constexpr, eps):
    """1 / root mean square of a vector whose places beyond SIZE are 0."""
    return tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)


@triton.jit
def added(total, parts, place, stride, mask, PARTS: tl.constexpr, GROUP: tl.constexpr):
    """total and what lies at place in PARTS parts that are stride apart, float32: groups summed each, and added in order."""
    for start in tl.static_range(0, PARTS, GROUP):
        group = tl.load(parts + start * stride + place, mask=mask, other=0.0).to(tl.float32)
        for i in tl.static_range(1, GROUP):
            if start + i < PARTS:
                group += tl.load(parts + (start + i) * stride + place, mask=mask, other=0.0).to(tl.float32)
        total += group
    return total


@triton.jit
def summed(parts, place, stride, mask, PARTS: tl.constexpr):
    """What lies at place in PARTS parts, added in their order, float32."""
    value = tl.load(parts + place, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        value += tl.load(parts + part * stride + place, mask=mask, other=0.0)
    return value


@triton.jit
def as_whole(value, PARTS: tl.constexpr, dtype: tl.constexpr):
    """A sum of parts rounded as the whole product is."""
    if PARTS > 1:
        value = value.to(dtype).to(tl.float32)
    return value


@triton.jit
def projected(parts, place, stride, mask, PARTS: tl.constexpr, dtype: tl.constexpr):
    """What lies at place in a projection, float32: of the whole one as it is; the sum of its parts rounded as that is."""
    return as_whole(summed(parts, place, stride, mask, PARTS), PARTS, dtype)


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def window_inputs(
    window, newest, program, rows, columns, W: tl.constexpr, D: tl.constexpr, NEWEST: tl.constexpr, CHANNELS: tl.constexpr
):
    """Of this program's share of the channels all inputs but the oldest, and the newest."""
    place = program * CHANNELS + tl.arange(0, CHANNELS)
    row, channel = (place // D).to(tl.int64), place % D
    inputs = ()
    for i in tl.static_range(1, W - 1):
        inputs = inputs + (tl.load(window + row * ((W - 1) * D) + i * D + channel, mask=row < rows, other=0.0),)
    latest = summed(newest, row * columns + channel, rows.to(tl.int64) * columns, row < rows, NEWEST)
    return inputs + (latest.to(window.dtype.element_ty),)


@triton.jit
def move_window(window, inputs, program, rows, W: tl.constexpr, D: tl.constexpr, NEWEST: tl.constexpr, CHANNELS: tl.constexpr):
    """Those inputs in their new places."""
    place = program * CHANNELS + tl.arange(0, CHANNELS)
    row, channel = (place // D).to(tl.int64), place % D
    tl.debug_barrier()  # all are read before any is written, whichever threads do it
    for i in tl.static_range(W - 1):
        tl.store(window + row * ((W - 1) * D) + i * D + channel, inputs[i], mask=row < rows)


@triton.jit
def _embed(ids, embeddings, position, x, K: tl.constexpr, WIDTH: tl.constexpr, CHAINED: tl.constexpr):
    begin(CHAINED)
    wait(CHAINED)
    row, column = tl.program_id(0), tl.arange(0, WIDTH)
    vector = tl.load(embeddings + tl.load(ids + row) * K + column, mask=column < K)
    tl.store(x + row * K + column, vector.to(tl.float32), mask=column < K)
    tl.store(position + row, tl.load(position + row) + 1)


@triton.jit(do_not_specialize=["rows"])
def _norm_rows(
    x, parts, norm, h, x_out, rows, eps,
    K: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    begin(CHAINED)
    row, column = tl.program_id(0), tl.arange(0, WIDTH)
    weight = tl.load(norm + column, mask=column < K, other=0.0).to(tl.float32)
    wait(CHAINED)
    total = tl.load(x + row * K + column, mask=column < K, other=0.0)
    total = added(total, parts, row * K + column, rows.to(tl.int64) * K, column < K, PARTS, GROUP)
    tl.store(x_out + row * K + column, total, mask=column < K)
    tl.store(h + row * K + column, (total * rms(total, K, eps) * weight).to(h.dtype.element_ty), mask=column < K)


@triton.jit(do_not_specialize=["rows"])
def _swiglu_rows(parts, h, rows, F: tl.constexpr, PARTS: tl.constexpr, CHAINED: tl.constexpr):
    begin(CHAINED)
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * 512 + tl.arange(0, 512)
    place, apart, mask = row * 2 * F + column, rows.to(tl.int64) * 2 * F, column < F
    wait(CHAINED)
    gate, up = summed(parts, place, apart, mask, PARTS), summed(parts, place + F, apart, mask, PARTS)
    tl.store(h + row * F + column, (silu(gate) * up).to(h.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "gate_at", "columns"])
def _gated_norm_rows(
    o, gate, norm, h, window, newest, rows, eps, gate_at, columns,
    PARTS: tl.constexpr, W: tl.constexpr, D: tl.constexpr, NEWEST: tl.constexpr, CHANNELS: tl.constexpr,
    HV: tl.constexpr, V: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    begin(CHAINED)
    row, head, column = tl.program_id(0) // HV, tl.program_id(0) % HV, tl.arange(0, V)
    place = row * HV * V + head * V + column
    weight = tl.load(norm + column).to(tl.float32)
    wait(CHAINED)
    o_ = tl.load(o + place)
    if PARTS:
        at = row.to(tl.int64) * columns + gate_at + head * V + column
        gate_ = summed(gate, at, rows.to(tl.int64) * columns, column < V, PARTS)
    if W > 1:
        moving = window_inputs(window, newest, tl.program_id(0), rows, columns, W, D, NEWEST, CHANNELS)
    o_ = o_.to(tl.float32)
    y = o_ * rms(o_, V, eps) * weight
    if PARTS:
        y *= silu(as_whole(gate_, PARTS, h.dtype.element_ty))
    tl.store(h + place, y.to(h.dtype.element_ty))
    if W > 1:
        move_window(window, moving, tl.program_id(0), rows, W, D, NEWEST, CHANNELS)
