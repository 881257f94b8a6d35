"""Matrices in float8 with a scale for each row, and their products, which `triton_block` can compute an FFN with.

A row's scale comes from the row alone, at each call: no history that a checkpoint would have to hold, no order of rows or
steps that a result could depend on, no word to the host. Rows are computed in float32. The values are e4m3 for gradients too:
with a scale of its own a row needs no more range (2^-9 to 448; what is below a 200,000th of its largest is lost), and e5m2 has
a digit less.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 2  # for a row of 1,024, as a norm's forward has them; not timed


class Float8Rows(NamedTuple):
    """values [..., D] e4m3, contiguous, times scales [rows] float32, each for a row of D."""

    values: Tensor
    scales: Tensor


def empty_rows(shape: torch.Size, device: torch.device) -> Float8Rows:
    values = torch.empty(shape, dtype=torch.float8_e4m3fn, device=device)
    return Float8Rows(values, torch.empty(shape[:-1].numel(), dtype=torch.float32, device=device))


def warps(D: int) -> int:
    return min(16, WARPS * max(1, triton.next_power_of_2(D) // 1024))


def cast_rows(x: Tensor) -> Float8Rows:
    """x [..., D], contiguous: the nearest float8 to each row by its own scale."""
    D, out = x.shape[-1], empty_rows(x.shape, x.device)
    if x.numel():
        _cast_rows[(x.numel() // D,)](x, *out, D, BLOCK=triton.next_power_of_2(D), num_warps=warps(D))
    return out


def product(a: Float8Rows, b: Float8Rows, dtype: torch.dtype) -> Tensor:
    """a b^T: [..., K] and [N, K] to [..., N] in dtype, which on a GPU is bfloat16; K and N multiples of 16.

    Sums move to float32 every 128 columns; with those of some 14 bits that stay in Hopper's tensor cores the loss was higher.
    """
    K, N = a.values.shape[-1], len(b.values)
    out = torch._scaled_mm(a.values.view(-1, K), b.values.t(), a.scales[:, None], b.scales[None], out_dtype=dtype)
    return out.view(*a.values.shape[:-1], N)


@triton.jit
def row_scale(largest):
    """What a row's float8 is multiplied with, and what the row is, so that `largest`, of its magnitudes, becomes 448.

    Rows of zeros stay zeros; inf becomes nan, as it must to be noticed.
    """
    largest = tl.maximum(largest, 1e-30)
    return largest / 448.0, 448.0 / largest


@triton.jit
def _cast_rows(x, values, scales, D, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    value = tl.load(x + row * D + column, mask=column < D, other=0.0).to(tl.float32)
    scale, inverse = row_scale(tl.max(tl.abs(value), 0))
    tl.store(scales + row, scale)
    tl.store(values + row * D + column, (value * inverse).to(tl.float8e4nv), mask=column < D)
