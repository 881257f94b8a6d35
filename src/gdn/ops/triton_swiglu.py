"""GPU kernels of SwiGLU behind one joined product of gate and up. Launchers only; computed in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn.ops.triton_float8 import Float8Rows, empty_rows, row_scale

# Rows and columns a program, warps; where a program has a whole row for its scale, warps alone: these were not timed.
ROWS, COLUMNS, NUM_WARPS = 4, 256, 4
FLOAT8_WARPS = 8


def swiglu_forward(joined: Tensor) -> Tensor:
    """silu(gate) * up [..., F] of joined [..., 2 F] = gate | up, contiguous."""
    F = joined.shape[-1] // 2
    out = joined.new_empty(*joined.shape[:-1], F)
    if out.numel():
        rows = out.numel() // F
        _swiglu_forward[_grid(rows, F)](joined, out, rows, F, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=NUM_WARPS)
    return out


def swiglu_backward(d: Tensor, joined: Tensor) -> Tensor:
    """The gradient of joined [..., 2 F] for d [..., F], that of the output; d is overwritten with the output."""
    F = d.shape[-1]
    d_joined = torch.empty_like(joined)
    if d.numel():
        rows = d.numel() // F
        _swiglu_backward[_grid(rows, F)](d, joined, d_joined, rows, F, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=NUM_WARPS)
    return d_joined


def swiglu_forward_float8(joined: Tensor) -> Float8Rows:
    """`swiglu_forward` in float8."""
    F = joined.shape[-1] // 2
    out = empty_rows(joined.shape[:-1] + (F,), joined.device)
    if joined.numel():
        _swiglu_forward_float8[(len(out.scales),)](joined, *out, F, BLOCK=triton.next_power_of_2(F), num_warps=FLOAT8_WARPS)
    return out


def swiglu_backward_float8(d: Tensor, joined: Tensor) -> tuple[Tensor, Float8Rows]:
    """`swiglu_backward`, and its result in float8 too."""
    F = d.shape[-1]
    d_joined, narrow = torch.empty_like(joined), empty_rows(joined.shape, joined.device)
    if d.numel():
        _swiglu_backward_float8[(len(narrow.scales),)](
            d, joined, d_joined, *narrow, F, BLOCK=triton.next_power_of_2(F), num_warps=FLOAT8_WARPS
        )
    return d_joined, narrow


def _grid(rows: int, F: int) -> tuple[int]:
    return (triton.cdiv(rows, ROWS) * triton.cdiv(F, COLUMNS),)


@triton.jit
def _place(rows, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of this program's tile: its rows, its columns, and what of it exists."""
    across = tl.cdiv(F, COLUMNS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < rows) & (column < F)


@triton.jit
def _gradients(gate, up, gradient):
    """silu(gate) * up, and what of its gradient is gate's and up's."""
    s = tl.sigmoid(gate)
    silu = gate * s
    return silu * up, gradient * up * (s + silu * (1.0 - s)), gradient * silu


@triton.jit(do_not_specialize=["rows"])
def _swiglu_forward(joined, out, rows, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, mask = _place(rows, F, ROWS, COLUMNS)
    gate = tl.load(joined + row * (2 * F) + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(joined + row * (2 * F) + F + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * F + column, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _swiglu_backward(d, joined, d_joined, rows, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, mask = _place(rows, F, ROWS, COLUMNS)
    place = row * (2 * F) + column
    gate = tl.load(joined + place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(joined + place + F, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.load(d + row * F + column, mask=mask, other=0.0).to(tl.float32)
    out, d_gate, d_up = _gradients(gate, up, gradient)
    tl.store(d + row * F + column, out.to(d.dtype.element_ty), mask=mask)
    tl.store(d_joined + place, d_gate.to(d_joined.dtype.element_ty), mask=mask)
    tl.store(d_joined + place + F, d_up.to(d_joined.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_forward_float8(joined, values, scales, F, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask = column < F
    gate = tl.load(joined + row * (2 * F) + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(joined + row * (2 * F) + F + column, mask=mask, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    scale, inverse = row_scale(tl.max(tl.abs(out), 0))
    tl.store(scales + row, scale)
    tl.store(values + row * F + column, (out * inverse).to(tl.float8e4nv), mask=mask)


@triton.jit
def _swiglu_backward_float8(d, joined, d_joined, values, scales, F, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    mask, place = column < F, row * (2 * F) + column
    gate = tl.load(joined + place, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(joined + place + F, mask=mask, other=0.0).to(tl.float32)
    gradient = tl.load(d + row * F + column, mask=mask, other=0.0).to(tl.float32)
    out, d_gate, d_up = _gradients(gate, up, gradient)
    tl.store(d + row * F + column, out.to(d.dtype.element_ty), mask=mask)
    tl.store(d_joined + place, d_gate.to(d_joined.dtype.element_ty), mask=mask)
    tl.store(d_joined + place + F, d_up.to(d_joined.dtype.element_ty), mask=mask)
    scale, inverse = row_scale(tl.max(tl.maximum(tl.abs(d_gate), tl.abs(d_up)), 0))
    tl.store(scales + row, scale)
    tl.store(values + place, (d_gate * inverse).to(tl.float8e4nv), mask=mask)
    tl.store(values + place + F, (d_up * inverse).to(tl.float8e4nv), mask=mask)
