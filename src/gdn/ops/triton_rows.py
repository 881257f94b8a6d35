"""GPU kernels of decoding: a few rows, one token of each sequence, times a weight, with the norm or gate that comes before it.

What a token costs is reading the weights once. A program takes 64 rows of the weight, the M of one Hopper tensor-core
instruction, and up to 128 rows of activations as its columns. The sum over K goes in fixed segments, each from 0 on, added in
their order, whether one program takes all of them or each a program of its own, whose results the next kernel adds: so a row
has the same bits beside any number of others. The root mean squares are summed by `_rms` in one layout everywhere.
Launchers only; `generation.gpu_decoder` is what calls them.
"""

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

Before = Literal["nothing", "norm", "gated_norm", "swiglu"]
FUSED_ROWS = 4  # so many rows at most are normed by every program that needs them; more, once, by a kernel before it
_ROWS = 128  # of activations a program at most
_NUM_WARPS = 4
_KEYS = 64  # columns of the weight a loop step


class Residual(NamedTuple):
    """The residual stream as a sum not yet made: x [B, hidden] float32 and parts [S, B, hidden] float32, added in order."""

    x: Tensor
    parts: Tensor | None = None


def norm_linear(residual: Residual, norm: Tensor, eps: float, weight: Tensor, out: Tensor, x_out: Tensor) -> None:
    """out [B, N] = rms_norm(sum of the residual) @ weight^T, and the sum itself to x_out [B, hidden] float32, another tensor.

    weight [N, hidden], norm [hidden]; hidden a multiple of 64. Products in weight's dtype, sums in float32.
    """
    B, K = residual.x.shape
    if B <= FUSED_ROWS:
        _launch("norm", residual.x, weight, out, 1, parts=residual.parts, norm=norm, eps=eps, x_out=x_out)
        return
    h = torch.empty(B, K, dtype=weight.dtype, device=weight.device)
    parts = 0 if residual.parts is None else len(residual.parts)
    _norm_rows[(B,)](
        residual.x,
        residual.parts,
        norm,
        h,
        x_out,
        B,
        eps,
        K=K,
        WIDTH=triton.next_power_of_2(K),
        PARTS=parts,
        num_warps=_NUM_WARPS,
    )
    _launch("nothing", h, weight, out, 1)


def gated_norm_linear(o: Tensor, gate: Tensor | None, norm: Tensor, eps: float, weight: Tensor, parts: Tensor) -> None:
    """parts [HV, B, N] float32, whose sum is gated_rms_norm(o, gate) @ weight^T (rms_norm if there is no gate).

    o [B, HV, V], contiguous; gate [B, HV * V], last stride 1; norm [V]; weight [N, HV * V]; V a power of two, at least 64.
    """
    B, HV, V = o.shape
    if B <= FUSED_ROWS:
        _launch("gated_norm", o.view(B, HV * V), weight, parts, HV, gate=gate, norm=norm, eps=eps)
        return
    h = torch.empty(B, HV * V, dtype=weight.dtype, device=weight.device)
    stride = 0 if gate is None else gate.stride(0)
    _gated_norm_rows[(B * HV,)](o, gate, norm, h, stride, eps, HV=HV, V=V, num_warps=_NUM_WARPS)
    _launch("nothing", h, weight, parts, HV)


def swiglu_linear(gate_up: Tensor, weight: Tensor, parts: Tensor) -> None:
    """parts [S, B, N] float32, whose sum is (silu(gate) * up) @ weight^T; gate_up [B, 2 F]; weight [N, F], 64 S divides F."""
    _launch("swiglu", gate_up, weight, parts, len(parts))


def exponential_noise(seeds: Tensor, position: Tensor, columns: int) -> Tensor:
    """[B, columns] float32, each exponentially distributed, above 0; a function of the row's seed and position, int64 [B]."""
    noise = torch.empty(len(seeds), columns, device=seeds.device)
    _noise[(len(seeds), triton.cdiv(columns, 1024))](seeds, position, noise, columns, num_warps=_NUM_WARPS)
    return noise


def segments(F: int) -> int:
    """Parts for a product over F: of 512 to 1,023 where 64 divides them."""
    return max((S for S in range(1, F // 512 + 1) if F % (64 * S) == 0), default=1)


def stages(block: int) -> int:
    """Loop steps in flight, for so many rows of activations: what 99 KB of shared memory hold."""
    return 4 if block <= 64 else 2


def _launch(
    before: Before,
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    parts_out: int,
    *,
    parts: Tensor | None = None,
    gate: Tensor | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    x_out: Tensor | None = None,
) -> None:
    """out [B, N] if parts_out is 1, else [parts_out, B, N]."""
    (N, K), B = weight.shape, len(x)
    if K % (parts_out * _KEYS):
        raise ValueError(f"weight is {tuple(weight.shape)}; expected a multiple of {parts_out * _KEYS} columns")
    block = min(max(triton.next_power_of_2(B), 16), _ROWS)
    _rows_linear[(triton.cdiv(N, 64), parts_out, triton.cdiv(B, block))](
        x, parts, gate, norm, weight, out, x_out, B, N, x.stride(0), 0 if gate is None else gate.stride(0), out.stride(-2), eps,
        K=K, SEGMENT=K // parts_out, PARTS=0 if parts is None else len(parts), BEFORE=before, WIDTH=triton.next_power_of_2(K),
        ROWS=FUSED_ROWS, BB=block, BK=_KEYS, num_warps=_NUM_WARPS, num_stages=stages(block),
    )  # fmt: skip


@triton.jit
def _rms(x, SIZE: tl.constexpr, eps):
    """1 / root mean square of a vector whose places beyond SIZE are 0."""
    return tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)


@triton.jit
def _residual(x, parts, row, rows, column, mask, K: tl.constexpr, PARTS: tl.constexpr):
    total = tl.load(x + row * K + column, mask=mask, other=0.0)
    for part in tl.static_range(PARTS):
        total += tl.load(parts + (part * rows + row) * K + column, mask=mask, other=0.0)
    return total


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit(do_not_specialize=["rows"])
def _norm_rows(x, parts, norm, h, x_out, rows, eps, K: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, WIDTH)
    total = _residual(x, parts, row, rows, column, column < K, K, PARTS)
    tl.store(x_out + row * K + column, total, mask=column < K)
    weight = tl.load(norm + column, mask=column < K, other=0.0).to(tl.float32)
    tl.store(h + row * K + column, (total * _rms(total, K, eps) * weight).to(h.dtype.element_ty), mask=column < K)


@triton.jit
def _gated_norm_rows(o, gate, norm, h, gate_stride, eps, HV: tl.constexpr, V: tl.constexpr):
    row, head, column = tl.program_id(0) // HV, tl.program_id(0) % HV, tl.arange(0, V)
    place = row * HV * V + head * V + column
    o_ = tl.load(o + place).to(tl.float32)
    y = o_ * _rms(o_, V, eps) * tl.load(norm + column).to(tl.float32)
    if gate is not None:
        y *= _silu(tl.load(gate + row * gate_stride + head * V + column).to(tl.float32))
    tl.store(h + place, y.to(h.dtype.element_ty))


@triton.jit
def _noise(seeds, position, noise, columns):
    row = tl.program_id(0)
    column = tl.program_id(1) * 1024 + tl.arange(0, 1024)
    place = tl.load(position + row) * 4294967296 + column  # a token's columns never meet another's
    uniform = tl.maximum(tl.rand(tl.load(seeds + row), place), 2.0**-32)
    # -log(1 - u), where u is small by its series: 1 - u would round to 1, and noise of 0 wins whatever the token's score.
    small = uniform * (1.0 + uniform * (0.5 + uniform * (1.0 / 3.0)))
    exponential = tl.where(uniform < 2.0**-8, small, -tl.log(1.0 - uniform))
    tl.store(noise + row.to(tl.int64) * columns + column, exponential, mask=column < columns)


@triton.jit(do_not_specialize=["rows"])
def _rows_linear(
    x, parts, gate, norm, weight, out, x_out, rows, N, x_stride, gate_stride, out_stride, eps,
    K: tl.constexpr, SEGMENT: tl.constexpr, PARTS: tl.constexpr, BEFORE: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, BB: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(1)
    n = tl.program_id(0) * 64 + tl.arange(0, 64)
    place = tl.arange(0, BB)
    row = tl.program_id(2) * BB + place
    there = row < rows
    dtype = weight.dtype.element_ty

    scale = tl.zeros([BB], tl.float32)
    if BEFORE == "norm":
        column = tl.arange(0, WIDTH)
        for r in tl.static_range(ROWS):
            total = _residual(x, parts, r, rows, column, (column < K) & (r < rows), K, PARTS)
            scale = tl.where(place == r, _rms(total, K, eps), scale)
            tl.store(x_out + r * K + column, total, mask=(column < K) & (r < rows) & (tl.program_id(0) == 0))
    elif BEFORE == "gated_norm":
        column = tl.arange(0, SEGMENT)
        for r in tl.static_range(ROWS):
            o_ = tl.load(x + r * x_stride + segment * SEGMENT + column, mask=(column < K) & (r < rows), other=0.0)
            scale = tl.where(place == r, _rms(o_.to(tl.float32), SEGMENT, eps), scale)

    acc = tl.zeros([64, BB], tl.float32)
    for start in tl.range(0, SEGMENT, BK):
        within = start + tl.arange(0, BK)
        k = segment * SEGMENT + within
        w = tl.load(weight + n[:, None] * K + k[None, :], mask=n[:, None] < N, other=0.0)
        at = row[:, None] * x_stride + k[None, :]
        if BEFORE == "norm":
            h = _residual(x, parts, row[:, None], rows, k[None, :], there[:, None], K, PARTS)
            h = h * scale[:, None] * tl.load(norm + k).to(tl.float32)[None, :]
        else:
            h = tl.load(x + at, mask=there[:, None], other=0.0).to(tl.float32)
        if BEFORE == "gated_norm":
            h = h * scale[:, None] * tl.load(norm + within).to(tl.float32)[None, :]
            if gate is not None:
                h *= _silu(
                    tl.load(gate + row[:, None] * gate_stride + k[None, :], mask=there[:, None], other=0.0).to(tl.float32)
                )
        elif BEFORE == "swiglu":
            h = _silu(h) * tl.load(x + at + K, mask=there[:, None], other=0.0).to(tl.float32)
        acc = tl.dot(w, tl.trans(h.to(dtype)), acc, input_precision="ieee")
    target = out + segment * rows * out_stride + row[None, :] * out_stride + n[:, None]
    tl.store(target, acc.to(out.dtype.element_ty), mask=there[None, :] & (n[:, None] < N))
