"""GPU kernels of the rule's forward: what is independent of the state chunk by chunk, then the recurrence over chunks.

Per chunk of C = 64 tokens, with gc the running sum of g from the chunk's start, S the state before the chunk, X what each token
writes before its write strength (`chunked` has the algebra, docs/derivation.md every step as code):

    A = G * (I + tril(k k^T, -1) diag(beta))^-1    P = scale G * (q k^T) diag(beta)    G_ij = exp(gc_i - gc_j), i >= j
    X = A (v - exp(gc) k S)        o = scale exp(gc) q S + P X        S' = exp(gc_C) S + k^T (beta exp(gc_C - gc) X)

`_intra` makes A, P and the gate vectors for all chunks at once; `_states` carries S, transposed to [V, K]: its rows then are
the rows of every product, S and X go from one product to the next in registers, and V splits over programs with no sum across.
Launchers only; autograd and checks are elsewhere. Sums of every output are in a fixed order: docs/numerics.md.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn.ops.triton_configs import configuration
from gdn.ops.triton_segments import Segments, chain, segments_of

C = 64  # tokens a chunk: the M of one Hopper tensor-core instruction, and the grid that prefill splits keep bits on
LIFT = tl.constexpr(16.0)  # P is kept so many times larger: float16 has few digits for what beta and scale make small
_MIN_G = -104.0  # exp of it is 0 in float32: smaller ones, -inf too, mean the same, and sums of them stay finite


class Chunks(NamedTuple):
    """Where each chunk of 64 tokens lies. A grid starts with each sequence: packed, a document has the bits it has alone."""

    total: int  # chunks at most: grids and buffers have this size, whatever lies in cu_seqlens
    per_row: int  # chunks a row of a batch; unused if packed
    sequences: int
    cu_seqlens: Tensor | None  # int32 [N + 1]
    first: Tensor | None  # int32 [N + 1]: the number of each sequence's first chunk
    sequence: Tensor | None  # int32 [total]: the sequence of each chunk, N for the unused ones at the end


def chunks_of(B: int, T: int, cu_seqlens: Tensor | None) -> Chunks:
    """The layout; packed, made on the device without waiting for it."""
    if cu_seqlens is None:
        per_row = triton.cdiv(T, C)
        return Chunks(B * per_row, per_row, B, None, None, None)
    N = len(cu_seqlens) - 1
    total = N + (T - N) // C  # each sequence adds at most one chunk to what whole ones hold: so many if each begins one
    first = torch.zeros_like(cu_seqlens)
    torch.cumsum((cu_seqlens.diff() + (C - 1)) // C, 0, dtype=torch.int32, out=first[1:])
    numbers = torch.arange(total, device=cu_seqlens.device, dtype=torch.int32)
    sequence = torch.searchsorted(first[1:], numbers, right=True, out_int32=True)
    return Chunks(total, 0, N, cu_seqlens, first, sequence)


class Intra(NamedTuple):
    """What does not depend on the state: A, P [chunks, HV, C, C] in v's dtype, and vectors of each token."""

    A: Tensor
    P: Tensor  # times LIFT
    gates: Tensor  # [chunks, HV, 7, C] float32: exp(gc); beta * exp(gc_C - gc); exp(gc_C - gc); beta; gc as a sum of two, which
    # keeps the digits of differences after strong decay; q . k of each token


class Forward(NamedTuple):
    o: Tensor  # [B, T, HV, V]
    final_state: Tensor | None  # [N, HV, K, V] float32
    X: Tensor | None  # [B, T, HV, V]: what each token writes, before beta
    states: Tensor | None  # [chunks, HV, V, K]: the state before each chunk, in v's dtype
    intra: Intra


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    chunks: Chunks,
    *,
    with_final_state: bool,
    for_backward: bool,
    initial_rows: Tensor | None = None,
) -> Forward:
    """All tensors contiguous, q, k, v of one dtype; shapes as in `gated_delta_rule`.

    initial_rows [N] int64: the row of initial_state [M, HV, K, V] that each packed sequence begins from; not with
    `for_backward`.
    """
    T, K, (HV, V) = q.shape[1], q.shape[3], v.shape[2:]
    intra = _run_intra(q, k, g, beta, scale, chunks)
    o = torch.empty_like(v)
    X = torch.empty_like(v) if for_backward else None
    states = v.new_empty(chunks.total, HV, V, K) if for_backward else None
    final_state = v.new_empty(chunks.sequences, HV, K, V, dtype=torch.float32) if with_final_state else None
    segments = segments_of(T, chunks.cu_seqlens is not None) if for_backward else Segments(1, T)
    if segments.parts == 1:
        carry(q, k, v, intra, initial_state, o, X, states, final_state, scale, chunks, initial_rows)
        return Forward(o, final_state, X, states, intra)
    q, k, v = (segments.cut(x) for x in (q, k, v))
    chunks = chunks_of(v.shape[0], v.shape[1], None)
    ends = v.new_empty(len(v), HV, K, V, dtype=torch.float32)
    carry(q, k, v, intra, None, segments.cut(o), None, None, ends, scale, chunks)
    starts = chain(transitions(q, k, intra, scale, chunks), ends, initial_state, segments, reverse=False)
    assert X is not None
    carry(q, k, v, intra, starts, segments.cut(o), segments.cut(X), states, ends, scale, chunks)
    if final_state is not None:
        final_state.copy_(ends[segments.parts - 1 :: segments.parts])
    return Forward(o, final_state, X, states, intra)


def carry(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    intra: Intra,
    initial_state: Tensor | None,
    o: Tensor,
    X: Tensor | None,
    states: Tensor | None,
    final_state: Tensor | None,
    scale: float,
    chunks: Chunks,
    initial_rows: Tensor | None = None,
) -> None:
    """Run the recurrence over chunks from initial_state on; fills o and whichever of X, states and final_state are given."""
    (_, T, H, K), (HV, V) = q.shape, v.shape[2:]
    if on_hopper(v, chunks):
        from gdn.ops.triton_hopper_states import run_states

        run_states(q, k, v, *intra, o, X, states, initial_state, final_state, scale, reverse=False)
        return
    config = configuration("states", q, V)
    _states[(chunks.sequences * HV * (V // config.block),)](
        q, k, v, *intra, initial_state, initial_rows, o, X, states, final_state, chunks.cu_seqlens, chunks.first, scale, T,
        chunks.per_row, H=H, HV=HV, K=K, V=V, BK=min(K, 128), BV=config.block, PRECISION=precision(v), **config.launch(),
    )  # fmt: skip


def transitions(q: Tensor, k: Tensor, intra: Intra, scale: float, chunks: Chunks) -> Tensor:
    """[B, HV, K, K] float32: what each row makes of a state, apart from what its values add."""
    (B, T, _, K), HV = q.shape, intra.gates.shape[1]
    values = q.new_zeros(B, T, HV, K)
    identity = torch.eye(K, dtype=torch.float32, device=q.device).expand(B, HV, K, K).contiguous()
    result = torch.empty_like(identity)
    carry(q, k, values, intra, identity, torch.empty_like(values), None, None, result, scale, chunks)
    return result


def _run_intra(q: Tensor, k: Tensor, g: Tensor, beta: Tensor, scale: float, chunks: Chunks) -> Intra:
    (_, T, H, K), HV = q.shape, g.shape[2]
    A, P = (q.new_empty(chunks.total, HV, C, C) for _ in "AP")
    gates = q.new_empty(chunks.total, HV, 7, C, dtype=torch.float32)
    config = configuration("intra", q, K)
    _intra[(chunks.total * HV,)](
        q, k, g, beta, A, P, gates, chunks.cu_seqlens, chunks.first, chunks.sequence, scale, T, chunks.per_row,
        chunks.sequences, H=H, HV=HV, K=K, BK=config.block, MIN_G=_MIN_G,
        **config.launch(),
    )  # fmt: skip
    return Intra(A, P, gates)


def on_hopper(v: Tensor, chunks: Chunks) -> bool:
    """Whether the kernels for Hopper serve: by device, dtype and size alone, so that a row's bits hang on nothing beside it."""
    fits = v.dtype != torch.float32 and v.shape[-1] % 128 == 0 and chunks.cu_seqlens is None
    return fits and v.is_cuda and torch.cuda.get_device_capability(v.device)[0] == 9


def precision(x: Tensor) -> str:
    """Of products of float32 tiles: what lies between 16-bit products may be tf32, float32 input is computed as such."""
    return "ieee" if x.dtype == torch.float32 else "tf32"


@triton.jit
def place(c, cu_seqlens, first, sequence, T, per_row, N):
    """Chunk c -> its first token and the end of its sequence in the flattened [B * T] tokens; equal if it is unused."""
    if sequence is None:
        start = (c // per_row).to(tl.int64) * T
        begin, end = start + (c % per_row) * 64, start + T
    else:
        n = tl.load(sequence + c)
        used = n < N
        n = tl.where(used, n, 0)
        begin = tl.load(cu_seqlens + n).to(tl.int64) + (c - tl.load(first + n)) * 64
        end = tl.where(used, tl.load(cu_seqlens + n + 1).to(tl.int64), begin)
    return begin, end


@triton.jit
def sequence_at(n, cu_seqlens, first, T, per_row):
    """Sequence n -> its first token in the flattened [B * T] tokens, its length, and its first chunk."""
    if cu_seqlens is None:
        begin, length, c0 = n.to(tl.int64) * T, T, n * per_row
    else:
        begin = tl.load(cu_seqlens + n).to(tl.int64)
        length, c0 = (tl.load(cu_seqlens + n + 1) - begin).to(tl.int32), tl.load(first + n)
    return begin, length, c0


@triton.jit(do_not_specialize=["N"])  # a batch of one would be compiled apart
def _intra(
    q, k, g, beta, A, P, gates, cu_seqlens, first, sequence, scale, T, per_row, N,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, MIN_G: tl.constexpr,
):  # fmt: skip
    c, hv = tl.program_id(0) // HV, tl.program_id(0) % HV
    begin, end = place(c, cu_seqlens, first, sequence, T, per_row, N)
    if begin >= end:
        return
    rows = tl.arange(0, 64)
    token = begin + rows
    valid = token < end
    i, j = rows[:, None], rows[None, :]

    tile = (c.to(tl.int64) * HV + hv) * 64
    square = tile * 64 + i * 64 + j
    g_ = tl.load(g + token * HV + hv, mask=valid, other=0.0).to(tl.float32)
    beta_ = tl.load(beta + token * HV + hv, mask=valid, other=0.0).to(tl.float32)
    kk = tl.zeros([64, 64], tl.float32)
    qk = tl.zeros([64, 64], tl.float32)
    for start in tl.range(0, K, BK):
        columns = start + tl.arange(0, BK)
        offsets = (token * H + hv // (HV // H))[:, None] * K + columns[None, :]
        k_ = tl.load(k + offsets, mask=valid[:, None], other=0.0)
        q_ = tl.load(q + offsets, mask=valid[:, None], other=0.0)
        kk = tl.dot(k_, tl.trans(k_), kk, input_precision="ieee")
        qk = tl.dot(q_, tl.trans(k_), qk, input_precision="ieee")

    gc = tl.cumsum(tl.maximum(g_, MIN_G).to(tl.float64), 0)
    high = gc.to(tl.float32)
    low = (gc - high.to(tl.float64)).to(tl.float32)
    last = rows == 63
    after = tl.exp((tl.sum(tl.where(last, high, 0.0), 0) - high) + (tl.sum(tl.where(last, low, 0.0), 0) - low))
    vector = gates + tile * 7 + rows
    tl.store(vector, tl.exp(high))
    tl.store(vector + 64, beta_ * after)
    tl.store(vector + 128, after)
    tl.store(vector + 192, beta_)
    tl.store(vector + 256, high)
    tl.store(vector + 320, low)
    tl.store(vector + 384, tl.sum(tl.where(i == j, qk, 0.0), 1))
    difference = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    decay = tl.exp(tl.minimum(difference, 0.0)) * beta_[None, :]
    dtype = A.dtype.element_ty
    tl.store(P + square, tl.where(i >= j, qk * decay * (scale * LIFT), 0.0).to(dtype))

    # Inverse of I + lower by doubling: right on diagonal blocks of s tokens, then of 2 s. No powers of `lower` are formed,
    # which repeated keys would let grow. Its entries are of order 1: float16 serves as well as tf32 between 16-bit products.
    narrow = tl.float32 if dtype == tl.float32 else tl.float16
    apart = i ^ j
    lower = tl.where(i > j, kk * decay, 0.0)
    inverse = tl.where(i == j, 1.0, 0.0) - tl.where(apart < 2, lower, 0.0)
    lower = lower.to(narrow)
    if dtype == tl.float32:
        for level in tl.range(1, 6):  # not unrolled: its products would be most of what there is to compile
            inverse = _doubled(inverse, lower, apart, level)
        # One step of refinement, for digits that 16-bit results have no place for.
        residual = tl.where(i == j, 1.0, 0.0) - inverse - tl.dot(lower, inverse, input_precision="ieee")
        inverse += tl.dot(inverse, residual, input_precision="ieee")
    else:
        for level in tl.static_range(1, 6):
            inverse = _doubled(inverse, lower, apart, level)
    tl.store(A + square, inverse.to(dtype))


@triton.jit
def _doubled(inverse, lower, apart, level):
    """The inverse, right on diagonal blocks of 2^level tokens, made right on those twice as large."""
    rounded = inverse.to(lower.dtype)
    product = tl.dot(rounded, lower, input_precision="ieee")
    between = tl.where(apart >> level == 1, product, 0.0).to(lower.dtype)
    return inverse - tl.dot(between, rounded, input_precision="ieee")


@triton.jit
def _states(
    q, k, v, A, P, gates, initial_state, initial_rows, o, X, states, final_state, cu_seqlens, first, scale, T, per_row,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = V // BV
    pid = tl.program_id(0)
    n, hv = pid // (NV * HV), pid // NV % HV
    begin, length, c0 = sequence_at(n, cu_seqlens, first, T, per_row)
    dtype = v.dtype.element_ty
    rows, columns = tl.arange(0, 64), tl.arange(0, BK)
    values = pid % NV * BV + tl.arange(0, BV)
    state_offsets = (n.to(tl.int64) * HV + hv) * K * V + values[:, None] + columns[None, :] * V  # of [K, V], read as [BV, BK]
    S0 = tl.zeros([BV, BK], tl.float32)
    S1 = tl.zeros([BV, BK], tl.float32)
    if initial_state is not None:
        source = initial_state + state_offsets
        if initial_rows is not None:
            source += (tl.load(initial_rows + n) - n) * (HV * K * V)
        S0 = tl.load(source).to(tl.float32)
        if K > BK:
            S1 = tl.load(source + BK * V).to(tl.float32)

    for i in tl.range(0, tl.cdiv(length, 64)):
        position = i * 64 + rows
        token, valid = begin + position, position < length
        keys = (token * H + hv // (HV // H))[:, None] * K + columns[None, :]
        tile = ((c0 + i).to(tl.int64) * HV + hv) * 64
        square = tile * 64 + rows[:, None] * 64 + rows[None, :]
        own = (token * HV + hv)[None, :] * V + values[:, None]
        k0 = tl.load(k + keys, mask=valid[:, None], other=0.0)
        q0 = tl.load(q + keys, mask=valid[:, None], other=0.0)
        if states is not None:
            saved = (c0 + i).to(tl.int64) * HV * K * V + hv * K * V + values[:, None] * K + columns[None, :]
            tl.store(states + saved, S0.to(dtype))
            if K > BK:
                tl.store(states + saved + BK, S1.to(dtype))
        before = tl.load(gates + tile * 7 + rows)

        # U and the outputs' share of the state before the chunk, both [BV, 64]
        narrow = S0.to(dtype)
        U = tl.dot(narrow, tl.trans(k0), input_precision=PRECISION)
        o_ = tl.dot(narrow, tl.trans(q0), input_precision=PRECISION)
        if K > BK:
            k1 = tl.load(k + keys + BK, mask=valid[:, None], other=0.0)
            q1 = tl.load(q + keys + BK, mask=valid[:, None], other=0.0)
            narrow = S1.to(dtype)
            U = tl.dot(narrow, tl.trans(k1), U, input_precision=PRECISION)
            o_ = tl.dot(narrow, tl.trans(q1), o_, input_precision=PRECISION)
        v_ = tl.load(v + own, mask=valid[None, :], other=0.0).to(tl.float32)
        W = v_ - before[None, :] * U
        narrow = W.to(dtype)
        A_ = tl.trans(tl.load(A + square))
        X_ = tl.dot(narrow, A_, input_precision=PRECISION)
        if dtype == tl.float16:  # what rounding took from W would be a third of d_beta's error
            X_ = tl.dot((W - narrow.to(tl.float32)).to(dtype), A_, X_, input_precision=PRECISION)
        if X is not None:
            tl.store(X + own, X_.to(dtype), mask=valid[None, :])
        o_ = tl.dot(
            X_.to(dtype), tl.trans(tl.load(P + square)), o_ * (before * (scale * LIFT))[None, :], input_precision=PRECISION
        )
        tl.store(o + own, (o_ / LIFT).to(dtype), mask=valid[None, :])
        over = tl.load(gates + tile * 7 + 63)
        wrote = (X_ * tl.load(gates + tile * 7 + 64 + rows)[None, :]).to(dtype)
        S0 = tl.dot(wrote, k0, S0 * over, input_precision=PRECISION)
        if K > BK:
            S1 = tl.dot(wrote, k1, S1 * over, input_precision=PRECISION)

    if final_state is not None:
        tl.store(final_state + state_offsets, S0)
        if K > BK:
            tl.store(final_state + state_offsets + BK * V, S1)
