"""GPU kernel of decoding's products: a few rows, one token of each sequence, times a weight. Launchers only.

What a token costs is reading the weights once, and what each kernel costs by itself: so a layer has four products, which do
what stands between them too: norms (`triton_rows`), the convolution, SwiGLU and the residual stream.

The sum over K goes in fixed segments, each from 0 on, added in a fixed order: in groups, and then the groups. Few rows have all
segments at once, four beside each other on four warps, with the weight on the chip before what it multiplies exists. More take
one after another, or, where a weight has too few rows to keep the GPU busy, a group a program: the last program to have its
part of a tile adds all parts, in their order. So a row has the same bits beside any number of others.
"""

# mypy: disable-error-code=assignment
# Tuples grow in kernels.

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from gdn.ops.triton_chain import begin, link, prefetch, wait
from gdn.ops.triton_configs import KIB, hopper, shared_memory
from gdn.ops.triton_rows import (
    PARTS,
    SQUARES,
    Normed,
    Residual,
    add_to_residual,
    convolved,
    inverse_rms,
    silu,
    sum_of_squares,
    window_inputs,
    window_taps,
)


class Tile(NamedTuple):
    """What a program takes; no bits hang on it."""

    rows: int  # of activations
    weight_rows: int
    columns: int  # at a time; 0: four segments at a time, for few rows
    stages: int
    num_warps: int
    split: bool = False  # a group of segments each
    copied: bool = False  # as blocks, by the GPU's copy engine, where it has one; else by threads

    def bytes(self, segments: int, size: int, itemsize: int, given: int) -> int:
        """Of shared memory, for so many segments of `size` columns, of which a fourth is a group; bytes of an element of the
        weight and of the rows given, which are rounded to the weight's once more where theirs is another dtype."""
        at_once = -(-(group(segments) if self.split else segments) // 4) * 4
        if not self.columns:
            return (self.rows + self.weight_rows) * at_once * size * itemsize + KIB  # and what sums across warps
        columns = min(self.columns, size)
        rounded = 0 if given == itemsize else self.rows * columns * itemsize
        barriers = 16 * self.stages if self.copied else 0
        return (self.rows * given + self.weight_rows * itemsize) * columns * self.stages + rounded + barriers + KIB


_FEW, _copied = Tile(16, 16, 0, 1, 4), partial(Tile, copied=True)
# By product: up to so many rows, and beyond the last. The best of five to twenty (docs/log.md).
TILES: dict[str, dict[int, Tile]] = {
    "projections": {
        16: _FEW,
        32: _copied(32, 64, 256, 4, 4),
        64: _copied(64, 32, 256, 4, 4),
        128: _copied(64, 64, 256, 3, 4),
        256: _copied(128, 64, 128, 4, 8),
    },
    "output": {16: _FEW, 32: _copied(32, 16, 256, 3, 4), 64: _copied(64, 16, 256, 4, 4), 256: _copied(64, 32, 256, 4, 4)},
    "ffn": {
        16: Tile(16, 32, 0, 1, 4),
        32: Tile(32, 64, 128, 3, 4),
        64: _copied(64, 64, 128, 5, 4),
        128: _copied(128, 64, 128, 4, 8),
        256: _copied(128, 128, 64, 6, 8),
    },
    "down": {
        16: _FEW._replace(split=True),
        32: _copied(32, 16, 256, 4, 4, split=True),
        64: _copied(64, 32, 256, 4, 4, split=True),
        256: _copied(64, 32, 256, 4, 4),
    },
    "head": {16: Tile(16, 128, 128, 4, 4), 64: Tile(64, 128, 64, 4, 4), 256: Tile(128, 256, 64, 3, 8)},
}
_SMALLEST = Tile(16, 16, 64, 2, 4)


def tile_for(product: str, rows: int, segments: int, size: int, itemsize: int, given: int, shared: int) -> Tile:
    """The table's, or what of it fits the shared memory."""
    table = TILES[product]
    tile = table[next((most for most in table if rows <= most), max(table))]
    while tile.bytes(segments, size, itemsize, given) > shared:
        if tile.columns and tile.stages > 2:
            tile = tile._replace(stages=tile.stages - 1)
        elif product in ("output", "down") and not tile.split:
            tile = tile._replace(split=True)
        else:
            tile = _SMALLEST._replace(split=tile.split)
    if itemsize == 4 and not tile.columns:  # each product of a thread is an instruction to compile: a fourth, and none spilled
        tile = tile._replace(num_warps=16)
    return tile


def segment(K: int) -> int:
    """Columns of one sum from 0 on, for a weight of K columns, a multiple of 64."""
    return next((size for size in (256, 128, 64) if K % size == 0), 64)


def group(segments: int) -> int:
    """Segments added before their sum is, in a product that goes to the residual stream: a fourth."""
    return triton.cdiv(segments, PARTS)


def project(
    rows: Normed, weight: Tensor, eps: float, window: Tensor, conv: Tensor, bias: Tensor | None, tile: Tile | None = None
) -> Tensor:
    """The projection [B, N] float32 of normed rows, its first D columns convolved and through SiLU, the others rounded as the
    rows are. window [B, W - 1, D] is moved on, conv [W, D], bias [D]."""
    if not window.is_contiguous():
        raise ValueError(f"the window has strides {window.stride()}; expected a contiguous one")
    out, (W, D) = torch.empty(len(rows.h), len(weight), device=weight.device), conv.shape
    _product("projections", rows, weight, eps, out, tile, window=window, conv=conv, bias=bias, W=W, D=D)
    return out


def feed(rows: Normed, weight: Tensor, eps: float, tile: Tile | None = None) -> Tensor:
    """silu(gate) * up [B, F] in the weight's dtype, of normed rows and weight [gate | up, K]."""
    out = torch.empty(len(rows.h), len(weight) // 2, dtype=weight.dtype, device=weight.device)
    _product("ffn", rows, weight, eps, out, tile)
    return out


def logits(rows: Normed, weight: Tensor, eps: float, tile: Tile | None = None) -> Tensor:
    """[B, N] float32 of normed rows. The sum is one segment, as few rows read such a weight no faster by several."""
    out = torch.empty(len(rows.h), len(weight), device=weight.device)
    _product("head", rows, weight, eps, out, tile)
    return out


def add_output(residual: Residual, heads: Normed, weight: Tensor, eps: float, norm: Tensor, tile: Tile | None = None) -> None:
    """The product of rows normed by heads, [B, HV * V], to the residual stream, whose next norm has the weight `norm`."""
    _product("output", heads, weight, eps, None, tile, residual, norm)


def add_down(residual: Residual, fed: Tensor, weight: Tensor, norm: Tensor, tile: Tile | None = None) -> None:
    """The product of fed [B, F] likewise."""
    _product("down", fed, weight, 0.0, None, tile, residual, norm)


def _product(
    product: str,
    given: Normed | Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor | None,
    tile: Tile | None,
    residual: Residual | None = None,
    norm: Tensor | None = None,
    **convolution: Any,
) -> None:
    h, squares = given if isinstance(given, Normed) else (given, None)
    (B, K), N = h.shape, len(weight)
    heads = 1 if squares is None else squares.shape[1]
    size = K if product == "head" else K // heads if product == "output" else segment(K)
    each = group(K // size) if residual else K // size
    given_bytes, shared = h.element_size(), shared_memory(weight.device)
    tile = tile or tile_for(product, B, K // size, size, weight.element_size(), given_bytes, shared)
    split = tile.split and each < K // size
    grid = (triton.cdiv(B, tile.rows), triton.cdiv(N, tile.weight_rows), triton.cdiv(K // size, each) if split else 1)
    columns = tile.columns and next((some for some in (tile.columns, 64) if size % some == 0), 0)
    whole = weight.shape[1] == K and K % size == 0 and (columns or size & (size - 1) == 0)
    if not (whole and h.is_contiguous() and weight.is_contiguous()):
        raise ValueError(f"{tuple(h.shape)} by {tuple(weight.shape)} in segments of {size}; expected whole ones, contiguous")
    if residual and (residual.x.shape != (B, N) or N % SQUARES):
        raise ValueError(f"a residual stream {tuple(residual.x.shape)} for {(B, N)}; expected that, of a multiple of {SQUARES}")
    if residual:
        x, (next_h, next_squares), parts, arrived = residual
    else:
        x = next_h = next_squares = parts = arrived = None
    blocks: tuple[TensorDescriptor | None, ...] = (None, None)
    if tile.copied and columns and (hopper(h.device) or not h.is_cuda):
        halves = 2 if product == "ffn" else 1
        of_weight = weight.view(halves, N // halves, K), [halves, tile.weight_rows // halves, columns]
        blocks = TensorDescriptor.from_tensor(h, [tile.rows, columns]), TensorDescriptor.from_tensor(*of_weight)
    _linear[grid](
        h, squares, weight, *blocks, out, x, norm, next_h, next_squares, parts, arrived,
        *(convolution.get(name) for name in ("window", "conv", "bias")), B, eps,
        N=N, K=K, SEGMENT=size, GROUP=each,
        HEADS=0 if squares is None else heads, SUMS=0 if squares is None else squares.shape[2],
        TO=product, W=convolution.get("W", 1), D=convolution.get("D", 1), SPLIT=split,
        BB=tile.rows, BN=tile.weight_rows, BK=columns,
        num_warps=tile.num_warps, num_stages=tile.stages, **link(weight.device, rows=B),
    )  # fmt: skip


@triton.jit
def _four(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The four matrices of [4, ROWS, COLUMNS]."""
    evens, odds = tl.split(tl.reshape(tl.permute(x, (1, 2, 0)), [ROWS, COLUMNS, 2, 2]))
    a, c = tl.split(evens)
    b, d = tl.split(odds)
    return a, b, c, d


@triton.jit
def _weights(weight, source, first, K: tl.constexpr, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr):
    """SEGMENTS of all columns from `first` on, four at a time."""
    four = tl.arange(0, 4)
    weights = ()
    for i in tl.static_range(0, SEGMENTS, 4):
        k = first + ((i + four) * SEGMENT)[:, None] + tl.arange(0, SEGMENT)[None, :]
        there = (i + four < SEGMENTS)[:, None] & (k < K)
        weights = weights + (tl.load(weight + source[None, None, :] * K + k[:, :, None], mask=there[:, :, None], other=0.0),)
    return weights


@triton.jit
def _by_fours(
    x, squares, weights, row, rows, eps, first,
    K: tl.constexpr, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, GROUP: tl.constexpr,
    HEADS: tl.constexpr, BY_HEAD: tl.constexpr, SUMS: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The sum over K for few rows, four segments at a time; each is a warp's.

    BY_HEAD: a segment is a head, and multiplied by that head's 1 / rms as it is added.
    """
    dtype: tl.constexpr = weights[0].dtype
    EARLY: tl.constexpr = x.dtype.element_ty != dtype
    four, within, here = tl.arange(0, 4), tl.arange(0, SEGMENT), row < rows
    # All loads before the first use of one: what each waits for is waited for once.
    inputs, scales = (), ()
    for i in tl.static_range(0, SEGMENTS, 4):
        k = first + ((i + four) * SEGMENT)[:, None] + within[None, :]
        there = (i + four < SEGMENTS)[:, None] & (k < K)
        mask = here[None, :, None] & there[:, None, :]
        inputs = inputs + (tl.load(x + row[None, :, None] * K + k[:, None, :], mask=mask, other=0.0),)
    for i in tl.static_range(0, SEGMENTS, 4):
        if BY_HEAD:
            head = first // SEGMENT + i + four[:, None]
            mask = here[None, :] & (head < HEADS)
            total = sum_of_squares(squares, row[None, :] * HEADS + head, mask, SUMS)
            scales = scales + (inverse_rms(total, SEGMENT, eps),)
    if HEADS and not BY_HEAD:
        scale = inverse_rms(sum_of_squares(squares, row[None, :], here[None, :], SUMS), K, eps)
    total, part = tl.zeros([BB, BN], tl.float32), tl.zeros([BB, BN], tl.float32)
    one = tl.full([BB, BN], 1.0, tl.float32)
    for i in tl.static_range((SEGMENTS + 3) // 4):
        if EARLY and HEADS and not BY_HEAD:
            given = inputs[i] * scale[:, :, None]
        elif EARLY and HEADS:
            given = inputs[i] * scales[i][:, :, None]
        else:
            given = inputs[i]
        sums = _four(tl.dot(given.to(dtype), weights[i], input_precision="ieee"), BB, BN)
        if BY_HEAD and not EARLY:
            factors = _four(tl.broadcast_to(scales[i][:, :, None], [4, BB, BN]), BB, BN)
        else:
            factors = (one, one, one, one)
        for j in tl.static_range(4):
            if 4 * i + j < SEGMENTS:
                part = tl.fma(sums[j], factors[j], part)
                if (4 * i + j + 1) % GROUP == 0 or 4 * i + j + 1 == SEGMENTS:
                    total += part
                    part = tl.zeros([BB, BN], tl.float32)
    if HEADS and not BY_HEAD and not EARLY:
        total = total * tl.reshape(scale, [BB, 1])
    return total


@triton.jit
def _by_steps(
    x, squares, weight, x_blocks, weight_blocks, source, row, rows, eps, first,
    K: tl.constexpr, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr, GROUP: tl.constexpr,
    HEADS: tl.constexpr, BY_HEAD: tl.constexpr, PAIRED: tl.constexpr, SUMS: tl.constexpr,
    BB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The sum over K, a step after another.

    PAIRED: a tile's rows of the weight are a gate's and an up's in turn; those of blocks, the gate's and then the up's.
    """
    there = (row < rows)[:, None]  # zeros for the others, nothing read in their place
    row = tl.minimum(row, rows - 1)
    dtype: tl.constexpr = weight.dtype.element_ty
    EARLY: tl.constexpr = x.dtype.element_ty != dtype
    zero, one = tl.zeros([BB, BN], tl.float32), tl.full([BB, BN], 1.0, tl.float32)
    if HEADS:  # 1 / rms of each head, of which one is taken by a sum with zeros
        BLOCK: tl.constexpr = triton.next_power_of_2(HEADS)
        head = tl.arange(0, BLOCK)[None, :]
        squared = sum_of_squares(squares, row[:, None] * HEADS + head, (row >= 0)[:, None] & (head < HEADS), SUMS)
        LATE: tl.constexpr = not EARLY and (SEGMENTS == 1 or not BY_HEAD)  # what is loaded is waited for at the end
        if not LATE:
            scales = inverse_rms(squared, K // HEADS, eps)
    weights, inputs = weight + source[:, None] * K, x + row[:, None] * K
    acc, part, total = zero, zero, zero
    for start in tl.range(first, min(first + SEGMENTS * SEGMENT, K), BK):
        if weight_blocks is not None:
            h = x_blocks.load([tl.program_id(0) * BB, start])
            w = tl.reshape(weight_blocks.load([0, tl.program_id(1) * (BN // 2 if PAIRED else BN), start]), [BN, BK])
        else:
            k = start + tl.arange(0, BK)
            w = tl.load(weights + k[None, :])
            h = tl.load(inputs + k[None, :], mask=there, other=0.0)
        if EARLY and HEADS:
            h = h * tl.sum(tl.where(head == (start // SEGMENT if BY_HEAD else 0), scales, 0.0), 1)[:, None]
        acc = tl.dot(h.to(dtype), tl.trans(w), acc, input_precision="ieee")
        if SEGMENTS > 1:  # noqa: SIM102  known when compiled
            if BK == SEGMENT or (start + BK) % SEGMENT == 0:
                factor = one  # an addition would be joined with the product
                if BY_HEAD and not EARLY:
                    chosen = tl.sum(tl.where(head == start // SEGMENT, scales, 0.0), 1)
                    factor = tl.broadcast_to(chosen[:, None], [BB, BN])
                part = tl.fma(acc, factor, part)
                acc = zero
                if SEGMENTS > GROUP:  # noqa: SIM102
                    if BK == GROUP * SEGMENT or (start + BK) % (GROUP * SEGMENT) == 0:
                        total += part
                        part = zero
    if HEADS:  # noqa: SIM102
        if LATE:
            scales = inverse_rms(squared, K // HEADS, eps)
    if SEGMENTS == 1:
        factor = one
        if BY_HEAD and not EARLY:
            chosen = tl.sum(tl.where(head == first // SEGMENT, scales, 0.0), 1)
            factor = tl.broadcast_to(chosen[:, None], [BB, BN])
        part = tl.fma(acc, factor, part)
    total += part
    if HEADS and not BY_HEAD and not EARLY:
        total = total * tl.reshape(scales, [BB, 1])
    if PAIRED and weight_blocks is not None:
        total = tl.reshape(tl.permute(tl.reshape(total, [BB, 2, BN // 2]), (0, 2, 1)), [BB, BN])
    return total


@triton.jit(do_not_specialize=["rows"])
def _linear(
    x, squares, weight, x_blocks, weight_blocks, out, residual, norm, next_h, next_squares, parts, arrived,
    window, conv, bias, rows, eps,
    N: tl.constexpr, K: tl.constexpr, SEGMENT: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, SUMS: tl.constexpr,
    TO: tl.constexpr, W: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr,
    BB: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    begin(CHAINED)
    SEGMENTS: tl.constexpr = GROUP if SPLIT else K // SEGMENT
    first = tl.program_id(2) * (SEGMENTS * SEGMENT)
    row = tl.program_id(0) * BB + tl.arange(0, BB)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    there = (row < rows)[:, None] & (n < N)[None, :]
    place = row.to(tl.int64)[:, None] * N + n[None, :]
    source = tl.minimum(n, N - 1)
    if TO == "ffn":  # a gate's row, then its up's
        source = source // 2 + (source % 2) * (N // 2)
    if not BK:
        weights = _weights(weight, source, first, K, SEGMENT, SEGMENTS)
    elif CHAINED:
        prefetch(weight, source, min(first, K - SEGMENTS * SEGMENT), K, SEGMENTS * SEGMENT, BN)
    if TO == "projections":  # whose window nothing else of this token writes
        inputs, taps = window_inputs(window, row, n, rows, W, D), window_taps(conv, bias, n, W, D)
    if norm is not None:
        norm_ = tl.load(norm + n, mask=n < N, other=0.0).to(tl.float32)
    wait(CHAINED)
    if norm is not None and not SPLIT:
        before = tl.load(residual + place, mask=there, other=0.0)
    BY_HEAD: tl.constexpr = TO == "output"
    if BK:
        total = _by_steps(
            x, squares, weight, x_blocks, weight_blocks, source, row, rows, eps, first,
            K, SEGMENT, SEGMENTS, GROUP, HEADS, BY_HEAD, TO == "ffn", SUMS, BB, BN, BK,
        )  # fmt: skip
    else:
        total = _by_fours(x, squares, weights, row, rows, eps, first, K, SEGMENT, SEGMENTS, GROUP, HEADS, BY_HEAD, SUMS, BB, BN)

    if SPLIT:
        tl.store(parts + tl.program_id(2) * (rows * N) + place, total, mask=there)
        tl.debug_barrier()  # all of the part before it is told
        counter = arrived + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(2) - 1:
            before = tl.load(residual + place, mask=there, other=0.0)
            total = tl.zeros([BB, BN], tl.float32)
            for i in tl.static_range((K + GROUP * SEGMENT - 1) // (GROUP * SEGMENT)):
                total += tl.load(parts + i * (rows * N) + place, mask=there, other=0.0, cache_modifier=".cg")
            tl.store(counter, 0)
            add_to_residual(total, before, norm_, residual, next_h, next_squares, row, n, rows, N, BB, BN)
    elif norm is not None:
        add_to_residual(total, before, norm_, residual, next_h, next_squares, row, n, rows, N, BB, BN)
    elif TO == "ffn":
        gate, up = tl.split(tl.reshape(total, [BB, BN // 2, 2]))
        n = tl.program_id(1) * (BN // 2) + tl.arange(0, BN // 2)
        target = out + row.to(tl.int64)[:, None] * (N // 2) + n[None, :]
        tl.store(target, (silu(gate) * up).to(out.dtype.element_ty), mask=(row < rows)[:, None] & (n < N // 2)[None, :])
    else:
        if TO == "projections":
            total = convolved(total, inputs, taps, window, row, n, rows, W, D)
        tl.store(out + place, total, mask=there)
