"""Kernels launched as a chain: each begins while the one before it runs, reads what no kernel of the chain writes, and waits.

Hopper's programmatic dependent launch; elsewhere, and in the interpreter, a chain is kernels one after another. Every kernel of
a chain calls `begin`, and `wait` before it touches anything that a kernel of the chain wrote; the first is launched as a start.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gdn.ops.triton_configs import hopper

# Rows of a token whose kernels are chained; and those for which the states' kernel is too.
MOST_ROWS, MOST_ROWS_OF_STATES = 64, 16


def link(device: torch.device, start: bool = False, rows: int = 1, states: bool = False) -> dict[str, Any]:
    """Options of a launch that calls `begin` and `wait`: of a chain's link, or of its start, before which all is done.

    states: whether it is the kernel of the states. What of it waits takes room and bytes from the product before it, which
    costs more than an early begin saves where rows are many (docs/log.md).
    """
    if rows > (MOST_ROWS_OF_STATES if states else MOST_ROWS) or not hopper(device):
        return {"CHAINED": False}
    return {"CHAINED": True} if start else {"CHAINED": True, "launch_pdl": True}


@triton.jit
def begin(CHAINED: tl.constexpr):
    """First thing: the next kernel may begin as soon as all programs of this one have."""
    if CHAINED:
        gdc_launch_dependents()


@triton.jit
def wait(CHAINED: tl.constexpr):
    """Until all that kernels before this one wrote can be read."""
    if CHAINED:
        gdc_wait()


@triton.jit
def prefetch(weight, row, column, K, WIDE: tl.constexpr, ROWS: tl.constexpr):
    """Ask for WIDE columns from `column` on, of rows [ROWS] of weight [N, K], to be brought to the L2 cache; Hopper only."""
    size: tl.constexpr = WIDE * weight.dtype.element_ty.primitive_bitwidth // 8
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [(weight + row * K + column).to(tl.int64), tl.full([ROWS], size, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
