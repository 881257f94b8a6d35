"""Long sequences in training: cut exactly, so that few of them fill a GPU. docs/derivation.md has the algebra.

The state at the end of a segment is affine in that at its start: M S + L, with L what the segment makes of nothing, and M what
it makes of the identity if its values are zero. Both come from the kernels that carry the state, all segments side by side; the
states at the segments' starts then follow one from another here. Backward is the same with M transposed.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SEGMENT = 2048  # tokens
# Tokens from which on a sequence is cut: by its length alone, so that a row's bits do not hang on the batch beside it. Measured
# on an H200: docs/log.md.
LONG = 16384


class Segments(NamedTuple):
    parts: int  # of a sequence; 1: it is not cut
    tokens: int

    def cut(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [B * parts, tokens, ...]"""
        return x.view(x.shape[0] * self.parts, self.tokens, *x.shape[2:])


def segments_of(T: int, packed: bool) -> Segments:
    """How a training sequence of T tokens is cut; one whose length is no multiple of a segment, and packed ones, are not."""
    whole = packed or T < LONG or T % SEGMENT
    return Segments(1, T) if whole else Segments(T // SEGMENT, SEGMENT)


def chain(M: Tensor, L: Tensor, first: Tensor | None, segments: Segments, *, reverse: bool) -> Tensor:
    """Float32 [B * parts, HV, K, V]: x of each segment, `first` (or zeros) for the first, then M x + L of the one before it.

    M [B * parts, HV, K, K], L [B * parts, HV, K, V], first [B, HV, K, V]; reverse: from the last segment on, M transposed.
    """
    n, HV, K, V = L.shape
    out = torch.empty_like(L)
    _chain[(n // segments.parts * HV * (V // 16),)](
        M, L, first, out, segments.parts, HV=HV, K=K, V=V, REVERSE=reverse, num_warps=4
    )  # fmt: skip
    return out


@triton.jit
def _chain(M, L, first, out, count, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, REVERSE: tl.constexpr):
    b, hv = tl.program_id(0) // (HV * (V // 16)), tl.program_id(0) // (V // 16) % HV
    rows, part = tl.arange(0, K), tl.arange(0, 32)
    columns = tl.program_id(0) % (V // 16) * 16 + tl.arange(0, 16)
    block = rows[:, None] * V + columns[None, :]
    x = tl.zeros([K, 16], tl.float32)
    if first is not None:
        x = tl.load(first + (b.to(tl.int64) * HV + hv) * K * V + block)
    for step in range(count):
        s = count - 1 - step if REVERSE else step
        head = (b.to(tl.int64) * count + s) * HV + hv
        tl.store(out + head * K * V + block, x)
        tl.debug_barrier()  # what other threads wrote of x is read below
        x = tl.load(L + head * K * V + block)
        for start in tl.static_range(0, K, 32):
            if REVERSE:
                m = tl.load(M + head * K * K + rows[:, None] + (start + part)[None, :] * K)
            else:
                m = tl.load(M + head * K * K + rows[:, None] * K + (start + part)[None, :])
            y = tl.load(out + head * K * V + (start + part)[:, None] * V + columns[None, :])
            x = tl.dot(m, y, x, input_precision="tf32x3")
