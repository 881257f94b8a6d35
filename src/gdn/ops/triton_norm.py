"""GPU kernels of RMSNorm, behind a residual's sum or before a gate: each tensor is read once and written once, either way.

Launchers, and RMSNorm alone as an operator. Rows are computed in float32 and do not depend on each other; gradients of a
weight are summed over each program's rows, then over programs, in a fixed order. The backwards make the forward's output once
more on the way, its very bits: the gradient of the weight behind it is a product with it, and so it need not be kept.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn.ops.triton_float8 import Float8Rows, empty_rows, row_scale

# Rows a program (they set the order of sums of weights' gradients; a backward has fewer where rows are few), and warps: on an
# H200 the best of a dozen (docs/log.md); rows in flight, of which only one has been timed.
FORWARD_ROWS, FORWARD_WARPS = 1, 2
BACKWARD_ROWS, BACKWARD_WARPS, BACKWARD_STAGES = 32, 4, 1
GATED_FORWARD_ROWS, GATED_FORWARD_WARPS = 1, 2
GATED_BACKWARD_ROWS, GATED_BACKWARD_WARPS, GATED_BACKWARD_STAGES = 16, 4, 1
PROGRAMS = 1024  # of a backward at least, where its rows are enough: a program takes its rows one after another
LARGEST = 8192  # elements of a row: a program holds all of it


def norm_forward(x: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """rms_norm(x + branch), and with a branch x + branch itself, twice: one to keep, one for others to add to.

    x, branch [..., D] of one dtype, contiguous; weight [D]; D <= LARGEST. The sum is rounded before it is normalised.
    """
    D = x.shape[-1]
    normed, sums = torch.empty_like(x), None if branch is None else (torch.empty_like(x), torch.empty_like(x))
    rows = x.numel() // D
    if rows:
        _norm_forward[(triton.cdiv(rows, FORWARD_ROWS),)](
            x, branch, weight.contiguous(), normed, None, *(sums or (None, None)), rows, D, eps,
            BLOCK=triton.next_power_of_2(D), ROWS=FORWARD_ROWS, num_warps=_warps(D, FORWARD_WARPS),
        )  # fmt: skip
    return normed, *(sums or (None, None))


def norm_forward_float8(x: Tensor, branch: Tensor, weight: Tensor, eps: float) -> tuple[Float8Rows, Tensor]:
    """rms_norm(x + branch) in float8, and x + branch itself; arguments as of `norm_forward`."""
    D = x.shape[-1]
    normed, total = empty_rows(x.shape, x.device), torch.empty_like(x)
    rows = x.numel() // D
    if rows:
        _norm_forward[(triton.cdiv(rows, FORWARD_ROWS),)](
            x, branch, weight.contiguous(), *normed, total, None, rows, D, eps,
            BLOCK=triton.next_power_of_2(D), ROWS=FORWARD_ROWS, num_warps=_warps(D, FORWARD_WARPS),
        )  # fmt: skip
    return normed, total


def norm_backward(d: Tensor, x: Tensor, weight: Tensor, eps: float, d_residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of x, to which d_residual is added, and of weight [D], float32, for d, that of rms_norm(x).

    All [..., D] of one dtype, contiguous. d is overwritten with rms_norm(x).
    """
    D = x.shape[-1]
    rows = x.numel() // D
    each = _rows_of_each(rows, BACKWARD_ROWS)
    programs = triton.cdiv(rows, each)
    dx, partials = torch.empty_like(x), x.new_empty(programs, D, dtype=torch.float32)
    if rows:
        _norm_backward[(programs,)](
            d, x, weight.contiguous(), d_residual, dx, partials, rows, D, eps,
            BLOCK=triton.next_power_of_2(D), ROWS=each, STAGES=BACKWARD_STAGES, num_warps=_warps(D, BACKWARD_WARPS),
        )  # fmt: skip
    return dx, partials.sum(0)


def gated_norm_forward(o: Tensor, proj: Tensor, column: int, weight: Tensor, eps: float) -> Tensor:
    """rms_norm(o) * silu(gate): o [B, T, HV, V] contiguous; gate: proj's [B, T, P] columns from `column` on, contiguous too."""
    (B, T, HV, V), y = o.shape, torch.empty_like(o)
    if B * T:
        _gated_norm_forward[(triton.cdiv(B * T, GATED_FORWARD_ROWS),)](
            o, proj, weight.contiguous(), y, B * T, *_in_units(proj.shape[-1], column), eps,
            **_heads(HV, V), ROWS=GATED_FORWARD_ROWS, num_warps=_warps(HV * V, GATED_FORWARD_WARPS),
        )  # fmt: skip
    return y


def gated_norm_backward(
    dy: Tensor, o: Tensor, proj: Tensor, column: int, weight: Tensor, eps: float, dproj: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of o and, float32, of weight [V]; writes that of the gate into dproj's columns. Arguments as of the forward.

    dy is overwritten with rms_norm(o) * silu(gate).
    """
    B, T, HV, V = o.shape
    each = _rows_of_each(B * T, GATED_BACKWARD_ROWS)
    programs = triton.cdiv(B * T, each)
    do, partials = torch.empty_like(o), o.new_empty(programs, V, dtype=torch.float32)
    if programs:
        _gated_norm_backward[(programs,)](
            dy, o, proj, weight.contiguous(), do, dproj, partials, B * T, *_in_units(proj.shape[-1], column), eps,
            **_heads(HV, V), ROWS=each, STAGES=GATED_BACKWARD_STAGES,
            num_warps=_warps(HV * V, GATED_BACKWARD_WARPS),
        )  # fmt: skip
    return do, partials.sum(0)


def _rows_of_each(rows: int, most: int) -> int:
    return min(most, triton.next_power_of_2(max(1, triton.cdiv(rows, PROGRAMS))))


def _warps(D: int, for_1024: int) -> int:
    return min(16, for_1024 * max(1, triton.next_power_of_2(D) // 1024))


def _heads(HV: int, V: int) -> dict[str, int]:
    return {"HV": HV, "V": V, "BLOCK_HV": triton.next_power_of_2(HV), "BLOCK_V": triton.next_power_of_2(V)}


def _in_units(stride: int, column: int) -> tuple[int, int, int]:
    """Both in units of 8 elements, and 8, if they are multiples of it: why, `triton_short_conv.in_units` tells."""
    unit = 1 if stride % 8 or column % 8 else 8
    return stride // unit, column // unit, unit


@triton.jit
def _inverse_root(x, D, eps):
    """rsqrt of the mean of squares + eps over the last axis of x, whose masked elements are 0."""
    return tl.rsqrt(tl.sum(x * x, -1) / D + eps)


@triton.jit(do_not_specialize=["rows"])
def _norm_forward(
    x, branch, weight, normed, scales, total, total_again, rows, D, eps, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < D
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for i in tl.static_range(ROWS):
        place, mask = (first + i) * D + column, inside & (first + i < rows)
        value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        if branch is not None:
            value += tl.load(branch + place, mask=mask, other=0.0).to(tl.float32)
            rounded = value.to(total.dtype.element_ty)
            tl.store(total + place, rounded, mask=mask)
            if total_again is not None:
                tl.store(total_again + place, rounded, mask=mask)
            value = rounded.to(tl.float32)
        value = value * _inverse_root(value, D, eps) * w
        if scales is not None:
            scale, inverse = row_scale(tl.max(tl.abs(value), 0))
            tl.store(scales + first + i, scale, mask=first + i < rows)
            value *= inverse
        tl.store(normed + place, value.to(normed.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _norm_backward(
    d, x, weight, d_residual, dx, partials, rows, D, eps, BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < D
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for i in tl.range(0, ROWS, num_stages=STAGES):
        place, mask = (first + i) * D + column, inside & (first + i < rows)
        value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.load(d + place, mask=mask, other=0.0).to(tl.float32)
        scale = _inverse_root(value, D, eps)
        tl.store(d + place, (value * scale * w).to(d.dtype.element_ty), mask=mask)  # as the forward computes it
        hat = value * scale
        d_weight += gradient * hat
        gradient = gradient * w
        value = scale * (gradient - hat * (tl.sum(gradient * hat, 0) / D))
        if d_residual is not None:
            value += tl.load(d_residual + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + place, value.to(dx.dtype.element_ty), mask=mask)
    tl.store(partials + tl.program_id(0).to(tl.int64) * D + column, d_weight, mask=inside)


@triton.jit
def _gate(gate):
    """sigmoid and silu."""
    s = tl.sigmoid(gate)
    return s, gate * s


@triton.jit(do_not_specialize=["rows", "stride", "start"])
def _gated_norm_forward(
    o, proj, weight, y, rows, stride, start, UNIT: tl.constexpr, eps,
    HV: tl.constexpr, V: tl.constexpr, BLOCK_HV: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head, column = tl.arange(0, BLOCK_HV)[:, None], tl.arange(0, BLOCK_V)[None, :]
    inside, own = (head < HV) & (column < V), head * V + column
    w = tl.load(weight + column, mask=column < V, other=0.0).to(tl.float32)
    gates = proj + start.to(tl.int64) * UNIT + own
    first = tl.program_id(0).to(tl.int64) * ROWS
    for i in tl.static_range(ROWS):
        row = first + i
        mask = inside & (row < rows)
        value = tl.load(o + row * (HV * V) + own, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gates + row * stride * UNIT, mask=mask, other=0.0).to(tl.float32)
        _, silu = _gate(gate)
        value = value * _inverse_root(value, V, eps)[:, None] * w * silu
        tl.store(y + row * (HV * V) + own, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "stride", "start"])
def _gated_norm_backward(
    dy, o, proj, weight, do, dproj, partials, rows, stride, start, UNIT: tl.constexpr, eps,
    HV: tl.constexpr, V: tl.constexpr, BLOCK_HV: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    head, column = tl.arange(0, BLOCK_HV)[:, None], tl.arange(0, BLOCK_V)[None, :]
    inside, own = (head < HV) & (column < V), head * V + column
    w = tl.load(weight + column, mask=column < V, other=0.0).to(tl.float32)
    gate_column = start.to(tl.int64) * UNIT + own
    d_weight = tl.zeros([BLOCK_HV, BLOCK_V], tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for i in tl.range(0, ROWS, num_stages=STAGES):
        row = first + i
        mask, place = inside & (row < rows), row * (HV * V) + own
        value = tl.load(o + place, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(proj + row * stride * UNIT + gate_column, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.load(dy + place, mask=mask, other=0.0).to(tl.float32)
        scale = _inverse_root(value, V, eps)[:, None]
        s, silu = _gate(gate)
        hat = value * scale
        tl.store(dy + place, (hat * w * silu).to(dy.dtype.element_ty), mask=mask)
        d_weight += gradient * hat * silu
        d_gate = gradient * hat * w * (s + silu * (1.0 - s))
        tl.store(dproj + row * stride * UNIT + gate_column, d_gate.to(dproj.dtype.element_ty), mask=mask)
        gradient = gradient * silu * w
        value = scale * (gradient - hat * (tl.sum(gradient * hat, 1) / V)[:, None])
        tl.store(do + place, value.to(do.dtype.element_ty), mask=mask)
    tl.store(
        partials + tl.program_id(0).to(tl.int64) * V + tl.arange(0, BLOCK_V),
        tl.sum(d_weight, 0),
        mask=tl.arange(0, BLOCK_V) < V,
    )


@torch.library.custom_op("gdn::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`norm.rms_norm`, differentiable once; x is contiguous."""
    return norm_forward(x, None, weight, eps)[0]


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("gdn::rms_norm_backward", mutates_args=())
def _rms_norm_backward(d: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return norm_backward(d.clone(), x, weight, eps, None)


@_rms_norm_backward.register_fake
def _(d: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), weight.new_empty(weight.shape, dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.eps = inputs[2]


def _differentiate(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight = ctx.saved_tensors
    dx, d_weight = _rms_norm_backward(d.contiguous(), x, weight, ctx.eps)
    return dx, d_weight.to(weight.dtype), None


rms_norm.register_autograd(_differentiate, setup_context=_save)
