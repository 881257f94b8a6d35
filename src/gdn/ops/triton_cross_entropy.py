"""GPU kernels of cross-entropy: losses of rows of logits, and their gradients in the logits' place; or what scoring wants of a
row. Launchers only."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns a loop step, warps: few enough rows at a time that the second pass over each finds it in the cache.
COLUMNS, NUM_WARPS = 4096, 8


def cross_entropy_in_place(logits: Tensor, labels: Tensor, ignored: int, with_gradients: bool) -> Tensor:
    """-log softmax(logits)[label] of each row [R], float32, 0 where the label is `ignored`; nan for one out of bounds.

    logits [R, V], contiguous, are overwritten with the gradients of the sum of these; labels [R] int64.
    """
    (R, V), losses = logits.shape, logits.new_empty(len(logits), dtype=torch.float32)
    if R:
        _cross_entropy[(R,)](
            logits, labels.contiguous(), losses, V, IGNORED=ignored, GRADIENTS=with_gradients,
            COLUMNS=min(COLUMNS, triton.next_power_of_2(V)), num_warps=NUM_WARPS,
        )  # fmt: skip
    return losses


def row_scores(logits: Tensor) -> tuple[Tensor, Tensor]:
    """log sum exp of each row [R], float32, and the first place where it is largest [R], int64; logits [R, V], contiguous."""
    R, V = logits.shape
    totals, best = logits.new_empty(R, dtype=torch.float32), logits.new_empty(R, dtype=torch.int64)
    if R:
        _row_scores[(R,)](logits, totals, best, V, COLUMNS=min(COLUMNS, triton.next_power_of_2(V)), num_warps=NUM_WARPS)
    return totals, best


@triton.jit
def _largest_and_total(own, V, COLUMNS: tl.constexpr):
    """Of a row, each thread's own: the largest, where it came first, and the sum of exp less the largest; [COLUMNS]."""
    column = tl.arange(0, COLUMNS)
    largest, total = tl.full([COLUMNS], float("-inf"), tl.float32), tl.zeros([COLUMNS], tl.float32)
    where = column
    for start in tl.range(0, V, COLUMNS):
        x = tl.load(own + start + column, mask=start + column < V, other=float("-inf")).to(tl.float32)
        where = tl.where(x > largest, start + column, where)
        larger = tl.maximum(largest, x)
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(largest - shift) + tl.exp(x - shift)
        largest = larger
    return largest, where, total


@triton.jit
def _row_scores(logits, totals, best, V, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest, where, total = _largest_and_total(logits + row * V, V, COLUMNS)
    top = tl.max(largest, 0)
    tl.store(totals + row, top + tl.log(tl.sum(total * tl.exp(largest - top), 0)))
    tl.store(best + row, tl.min(tl.where(largest == top, where, V), 0).to(tl.int64))


@triton.jit
def _cross_entropy(logits, labels, losses, V, IGNORED: tl.constexpr, GRADIENTS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    own = logits + row * V
    column = tl.arange(0, COLUMNS)
    if label == IGNORED:
        tl.store(losses + row, 0.0)
        if GRADIENTS:
            for start in tl.range(0, V, COLUMNS):
                tl.store(own + start + column, tl.zeros([COLUMNS], own.dtype.element_ty), mask=start + column < V)
    else:
        largest, _, total = _largest_and_total(own, V, COLUMNS)
        top = tl.max(largest, 0)
        total = tl.sum(total * tl.exp(largest - top), 0)
        there = (label >= 0) & (label < V)
        chosen = tl.load(own + tl.where(there, label, 0)).to(tl.float32)
        tl.store(losses + row, tl.where(there, top - chosen + tl.log(total), float("nan")))
        if GRADIENTS:
            tl.debug_barrier()  # the label's logit is read before any is overwritten
            for start in tl.range(0, V, COLUMNS):
                x = tl.load(own + start + column, mask=start + column < V, other=0.0).to(tl.float32)
                d = tl.exp(x - top) / total - tl.where(start + column == label, 1.0, 0.0)
                tl.store(own + start + column, d.to(own.dtype.element_ty), mask=start + column < V)
