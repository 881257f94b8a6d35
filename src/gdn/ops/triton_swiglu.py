"""GPU kernels of SwiGLU behind one joined product of gate and up. Launchers only; computed in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows and columns a program, warps.
ROWS, COLUMNS, NUM_WARPS = 4, 256, 4


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


def _grid(rows: int, F: int) -> tuple[int]:
    return (triton.cdiv(rows, ROWS) * triton.cdiv(F, COLUMNS),)


@triton.jit
def _place(rows, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Of this program's tile: its rows, its columns, and what of it exists."""
    across = tl.cdiv(F, COLUMNS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < rows) & (column < F)


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
    s = tl.sigmoid(gate)
    silu = gate * s
    tl.store(d + row * F + column, (silu * up).to(d.dtype.element_ty), mask=mask)
    tl.store(d_joined + place, (gradient * up * (s + silu * (1.0 - s))).to(d_joined.dtype.element_ty), mask=mask)
    tl.store(d_joined + place + F, (gradient * silu).to(d_joined.dtype.element_ty), mask=mask)
