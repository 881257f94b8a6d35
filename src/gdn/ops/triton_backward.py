"""GPU kernels of the rule's backward: the reverse recurrence over chunks, then every gradient chunk by chunk.

The adjoint of the recurrence, not of the triangular inverse. In the terms of `triton_forward`, with D the gradient of the state
after the chunk, and er = exp(gc_C - gc), per chunk:

    dv = A^T (beta er k D + P^T do)
    D' = exp(gc_C) D + q^T (scale exp(gc) do) - k^T (exp(gc) dv)
    dq = scale exp(gc) do S^T + dP k                  dP = scale G * (do X^T) diag(beta)
    e  = beta er X D^T + dP^T q - Z^T k               Z = tril(G * (dv X^T), -1) diag(beta)
    dk = e - exp(gc) dv S^T - Z k
    dbeta = k . e / beta (over K)

The diagonal of dP, where no decay enters, is kept apart: the gradient of g then sums only what carries a decay, and keeps its
digits when that is strong. In it rows of dP and Z stand against columns, and most of them cancel: both must come from one
rounded matrix. So beta is in it for both, and is divided out of dbeta; a floor of beta, which no float32 sum sees, makes that
exact at 0 (in float16, which has no such numbers, dbeta there lacks what its own chunk adds). `_d_states` is the mirror of
`_states`; `_gradients` reads S and D once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn.ops.triton_configs import configuration
from gdn.ops.triton_forward import LIFT, C, Chunks, Intra, chunks_of, on_hopper, place, precision, sequence_at, transitions
from gdn.ops.triton_segments import chain, segments_of


class Gradients(NamedTuple):
    dq: Tensor
    dk: Tensor
    dv: Tensor
    dg: Tensor  # float32, as dbeta
    dbeta: Tensor
    d_initial_state: Tensor | None  # float32


def backward(
    q: Tensor,
    k: Tensor,
    scale: float,
    intra: Intra,
    X: Tensor,
    states: Tensor,
    do: Tensor,
    d_final_state: Tensor | None,
    chunks: Chunks,
    *,
    with_initial_state: bool,
) -> Gradients:
    """Gradients from those of o and, if not None, of the final state; all tensors contiguous."""
    (B, T, H, K), (HV, V) = q.shape, X.shape[2:]
    dv, d_states = torch.empty_like(X), torch.empty_like(states)
    d_initial = X.new_empty(chunks.sequences, HV, K, V, dtype=torch.float32) if with_initial_state else None
    BK = min(K, 64 if X.dtype == torch.float32 else 128)  # float32: see `triton_configs`, why small
    dq, dk = (q.new_empty(B, T, HV, K) for _ in "qk")
    segments = segments_of(T, chunks.cu_seqlens is not None)
    if segments.parts == 1:
        carry_back(q, k, do, intra, d_final_state, dv, d_states, d_initial, scale, chunks)
    else:
        q_, k_, do_, dv_ = (segments.cut(x) for x in (q, k, do, dv))
        inner = chunks_of(q_.shape[0], q_.shape[1], None)
        starts = X.new_empty(len(q_), HV, K, V, dtype=torch.float32)
        carry_back(q_, k_, do_, intra, None, dv_, d_states, starts, scale, inner)
        ends = chain(transitions(q_, k_, intra, scale, inner), starts, d_final_state, segments, reverse=True)
        carry_back(q_, k_, do_, intra, ends, dv_, d_states, None if d_initial is None else starts, scale, inner)
        if d_initial is not None:
            d_initial.copy_(starts[:: segments.parts])
    if on_hopper(X, chunks) and K >= 128:
        from gdn.ops.triton_hopper_gradients import run_gradients

        partial = X.new_empty(K // 64, chunks.total, HV, 4, C, dtype=torch.float32)
        run_gradients(q, k, intra.gates, X, states, do, dv, d_states, dq, dk, partial, scale)
    else:
        partial = X.new_empty(K // BK, chunks.total, HV, 4, C, dtype=torch.float32)
        config = configuration("gradients", q, V)
        _gradients[(chunks.total * HV * (K // BK),)](
            q, k, intra.gates, X, states, do, dv, d_states, dq, dk, partial, chunks.cu_seqlens, chunks.first,
            chunks.sequence, scale, T, chunks.per_row, chunks.sequences, chunks.total * HV,
            H=H, HV=HV, K=K, V=V, BK=BK, BV=config.block, PRECISION=precision(X), **config.launch(),
        )  # fmt: skip
    dg, dbeta = (X.new_empty(B, T, HV, dtype=torch.float32) for _ in "gb")
    _finish[(chunks.total * HV,)](
        partial, intra.gates, dg, dbeta, chunks.cu_seqlens, chunks.first, chunks.sequence, T, chunks.per_row,
        chunks.sequences, chunks.total * HV, HV=HV, PARTS=len(partial), num_warps=2,
    )  # fmt: skip
    if HV > H:
        dq, dk = (x.view(B, T, H, HV // H, K).sum(3, dtype=torch.float32).to(x.dtype) for x in (dq, dk))
    return Gradients(dq, dk, dv, dg, dbeta, d_initial)


def carry_back(
    q: Tensor,
    k: Tensor,
    do: Tensor,
    intra: Intra,
    d_final_state: Tensor | None,
    dv: Tensor,
    d_states: Tensor,
    d_initial: Tensor | None,
    scale: float,
    chunks: Chunks,
) -> None:
    """The mirror of `carry`: fills dv, d_states, and d_initial if it is given."""
    (_, T, H, K), (HV, V) = q.shape, do.shape[2:]
    sizes = {"H": H, "HV": HV, "K": K, "V": V, "PRECISION": precision(do)}
    if on_hopper(do, chunks):
        from gdn.ops.triton_hopper_states import run_states

        run_states(q, k, do, *intra, dv, None, d_states, d_final_state, d_initial, scale, reverse=True)
    else:
        config = configuration("d_states", q, V)
        _d_states[(chunks.sequences * HV * (V // config.block),)](
            q, k, *intra, do, d_final_state, dv, d_states, d_initial, chunks.cu_seqlens, chunks.first, scale, T,
            chunks.per_row, **sizes, BK=min(K, 128), BV=config.block, **config.launch(),
        )  # fmt: skip
    if d_initial is not None:
        config = configuration("d_initial", q, V)
        _d_initial[(chunks.sequences * HV * (V // config.block),)](
            q, k, *intra, do, d_initial, chunks.cu_seqlens, chunks.first, scale, T, chunks.per_row,
            **sizes, BK=64, BV=config.block, **config.launch(),
        )  # fmt: skip


@triton.jit
def _d_states(
    q, k, A, P, gates, do, d_final_state, dv, d_states, d_initial, cu_seqlens, first, scale, T, per_row,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    NV: tl.constexpr = V // BV
    pid = tl.program_id(0)
    n, hv = pid // (NV * HV), pid // NV % HV
    begin, length, c0 = sequence_at(n, cu_seqlens, first, T, per_row)
    dtype = dv.dtype.element_ty
    rows, columns = tl.arange(0, 64), tl.arange(0, BK)
    values = pid % NV * BV + tl.arange(0, BV)
    state_offsets = (n.to(tl.int64) * HV + hv) * K * V + values[:, None] + columns[None, :] * V
    D0 = tl.zeros([BV, BK], tl.float32)
    D1 = tl.zeros([BV, BK], tl.float32)
    if d_final_state is not None:
        D0 = tl.load(d_final_state + state_offsets).to(tl.float32)
        if K > BK:
            D1 = tl.load(d_final_state + state_offsets + BK * V).to(tl.float32)

    count = tl.cdiv(length, 64)
    for step in tl.range(0, count):
        i = count - 1 - step
        position = i * 64 + rows
        token, valid = begin + position, position < length
        keys = (token * H + hv // (HV // H))[:, None] * K + columns[None, :]
        tile = ((c0 + i).to(tl.int64) * HV + hv) * 64
        square = tile * 64 + rows[:, None] * 64 + rows[None, :]
        own = (token * HV + hv)[None, :] * V + values[:, None]
        k0 = tl.load(k + keys, mask=valid[:, None], other=0.0)
        q0 = tl.load(q + keys, mask=valid[:, None], other=0.0)
        do_ = tl.load(do + own, mask=valid[None, :], other=0.0)
        saved = (c0 + i).to(tl.int64) * HV * K * V + hv * K * V + values[:, None] * K + columns[None, :]
        tl.store(d_states + saved, D0.to(dtype))
        if K > BK:
            tl.store(d_states + saved + BK, D1.to(dtype))
        if d_initial is not None:  # noqa: SIM102 (known to the compiler, the other not)
            if i == 0:
                tl.store(d_initial + state_offsets, D0)
                if K > BK:
                    tl.store(d_initial + state_offsets + BK * V, D1)

        # The gradient of what a token writes, [BV, 64]: from the state after the chunk and from the outputs in it.
        d = tl.dot(D0.to(dtype), tl.trans(k0), input_precision=PRECISION)
        if K > BK:
            k1 = tl.load(k + keys + BK, mask=valid[:, None], other=0.0)
            q1 = tl.load(q + keys + BK, mask=valid[:, None], other=0.0)
            d = tl.dot(D1.to(dtype), tl.trans(k1), d, input_precision=PRECISION)
        d *= (tl.load(gates + tile * 7 + 64 + rows) * LIFT)[None, :]
        d = tl.dot(do_, tl.load(P + square), d, input_precision=PRECISION)
        dv_ = tl.dot((d / LIFT).to(dtype), tl.load(A + square), input_precision=PRECISION)
        tl.store(dv + own, dv_.to(dtype), mask=valid[None, :])

        before = tl.load(gates + tile * 7 + rows)
        over = tl.load(gates + tile * 7 + 63)
        whole = do_.to(tl.float32) * (before * scale)[None, :]
        read = whole.to(dtype)
        erased = (dv_ * -before[None, :]).to(dtype)
        D0 = tl.dot(read, q0, D0 * over, input_precision=PRECISION)
        D0 = tl.dot(erased, k0, D0, input_precision=PRECISION)
        if K > BK:
            D1 = tl.dot(read, q1, D1 * over, input_precision=PRECISION)
            D1 = tl.dot(erased, k1, D1, input_precision=PRECISION)
        if d_initial is not None:  # which is D itself: what rounding took from `read` would be most of its error
            rest = (whole - read.to(tl.float32)).to(dtype)
            D0 = tl.dot(rest, q0, D0, input_precision=PRECISION)
            if K > BK:
                D1 = tl.dot(rest, q1, D1, input_precision=PRECISION)

    if d_initial is not None:  # noqa: SIM102 (as above)
        if count == 0:
            tl.store(d_initial + state_offsets, D0)
            if K > BK:
                tl.store(d_initial + state_offsets + BK * V, D1)


@triton.jit
def _operand(x, PRECISION: tl.constexpr):
    """Float32 x, rounded to the 11 bits of tf32 if that is what a product takes of it: the tensor cores cut the others off,
    always towards zero, which adds up to three times the error.
    """
    if PRECISION == "tf32":
        rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, x)  # a nan's bits may all be ones
    return x


@triton.jit
def _d_initial(
    q, k, A, P, gates, do, d_initial, cu_seqlens, first, scale, T, per_row,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Take d_initial, the gradient of the state after a sequence's first chunk, over that chunk, in place.

    As `_d_states` would, but with float32's range: nothing comes after that would average its errors. What is 16 bits wide in
    memory is exact in tf32, the rest is rounded to it.
    """
    NV: tl.constexpr = V // BV
    pid = tl.program_id(0)
    n, hv = pid // (NV * HV), pid // NV % HV
    begin, length, c0 = sequence_at(n, cu_seqlens, first, T, per_row)
    if length == 0:
        return
    rows, columns = tl.arange(0, 64), tl.arange(0, BK)
    values = pid % NV * BV + tl.arange(0, BV)
    valid = rows < length
    state = d_initial + (n.to(tl.int64) * HV + hv) * K * V + values[:, None] + columns[None, :] * V
    keys = ((begin + rows) * H + hv // (HV // H))[:, None] * K + columns[None, :]
    tile = (c0.to(tl.int64) * HV + hv) * 64
    square = tile * 64 + rows[:, None] * 64 + rows[None, :]
    own = ((begin + rows) * HV + hv)[None, :] * V + values[:, None]

    d = tl.zeros([BV, 64], tl.float32)
    for start in tl.static_range(0, K, BK):
        k_ = tl.load(k + keys + start, mask=valid[:, None], other=0.0).to(tl.float32)
        d = tl.dot(_operand(tl.load(state + start * V), PRECISION), tl.trans(k_), d, input_precision=PRECISION)
    do_ = tl.load(do + own, mask=valid[None, :], other=0.0).to(tl.float32)
    d *= (tl.load(gates + tile * 7 + 64 + rows) * LIFT)[None, :]
    d = tl.dot(do_, tl.load(P + square).to(tl.float32), d, input_precision=PRECISION)
    dv = tl.dot(_operand(d / LIFT, PRECISION), tl.load(A + square).to(tl.float32), input_precision=PRECISION)
    before = tl.load(gates + tile * 7 + rows)
    over = tl.load(gates + tile * 7 + 63)
    read, erased = _operand(do_ * (before * scale)[None, :], PRECISION), _operand(dv * -before[None, :], PRECISION)
    for start in tl.static_range(0, K, BK):
        q_ = tl.load(q + keys + start, mask=valid[:, None], other=0.0).to(tl.float32)
        k_ = tl.load(k + keys + start, mask=valid[:, None], other=0.0).to(tl.float32)
        D = tl.dot(read, q_, tl.load(state + start * V) * over, input_precision=PRECISION)
        tl.store(state + start * V, tl.dot(erased, k_, D, input_precision=PRECISION))


LEAST_BETA = tl.constexpr(2.0**-24)  # beside terms of order 1 less than float32 holds


@triton.jit(do_not_specialize=["N"])  # a batch of one would be compiled apart
def _gradients(
    q, k, gates, X, states, do, dv, d_states, dq, dk, partial,
    cu_seqlens, first, sequence, scale, T, per_row, N, count,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    NK: tl.constexpr = K // BK
    pid = tl.program_id(0)
    c, hv, kb = pid // (NK * HV), pid // NK % HV, pid % NK
    begin, end = place(c, cu_seqlens, first, sequence, T, per_row, N)
    if begin >= end:
        return
    dtype = dq.dtype.element_ty
    rows, columns = tl.arange(0, 64), kb * BK + tl.arange(0, BK)
    token = begin + rows
    valid = token < end
    tile = c.to(tl.int64) * HV + hv

    do_X = tl.zeros([64, 64], tl.float32)  # do X^T and dv X^T, and their transposes as products of their own: transposing a
    X_do = tl.zeros([64, 64], tl.float32)  # tensor-core result is compiled wrongly by Triton 3.4 to 3.7.0 on Hopper
    dv_X = tl.zeros([64, 64], tl.float32)
    X_dv = tl.zeros([64, 64], tl.float32)
    read = tl.zeros([64, BK], tl.float32)  # do S^T
    wrote = tl.zeros([64, BK], tl.float32)  # X D^T
    erased = tl.zeros([64, BK], tl.float32)  # dv S^T
    carried = tl.zeros([BV], tl.float32)  # <S, D>
    for start in tl.range(0, V, BV):
        values = start + tl.arange(0, BV)
        own = (token * HV + hv)[:, None] * V + values[None, :]
        X_ = tl.load(X + own, mask=valid[:, None], other=0.0)
        do_ = tl.load(do + own, mask=valid[:, None], other=0.0)
        dv_ = tl.load(dv + own, mask=valid[:, None], other=0.0)
        saved = (tile * V + values[:, None]) * K + columns[None, :]
        S, D = tl.load(states + saved), tl.load(d_states + saved)
        do_X = tl.dot(do_, tl.trans(X_), do_X, input_precision=PRECISION)
        X_do = tl.dot(X_, tl.trans(do_), X_do, input_precision=PRECISION)
        dv_X = tl.dot(dv_, tl.trans(X_), dv_X, input_precision=PRECISION)
        X_dv = tl.dot(X_, tl.trans(dv_), X_dv, input_precision=PRECISION)
        read = tl.dot(do_, S, read, input_precision=PRECISION)
        wrote = tl.dot(X_, D, wrote, input_precision=PRECISION)
        erased = tl.dot(dv_, S, erased, input_precision=PRECISION)
        carried += tl.sum(S.to(tl.float32) * D.to(tl.float32), 1)

    keys = (token * H + hv // (HV // H))[:, None] * K + columns[None, :]
    q_ = tl.load(q + keys, mask=valid[:, None], other=0.0)
    k_ = tl.load(k + keys, mask=valid[:, None], other=0.0)
    qf, kf = q_.to(tl.float32), k_.to(tl.float32)
    vector = gates + tile * 448 + rows
    before, after, beta = tl.load(vector), tl.load(vector + 128), tl.load(vector + 192)
    high, low = tl.load(vector + 256), tl.load(vector + 320)
    i, j = rows[:, None], rows[None, :]
    difference = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    decay = tl.where(i > j, tl.exp(tl.minimum(difference, 0.0)), 0.0)
    decay_t = tl.where(i < j, tl.exp(tl.minimum(-difference, 0.0)), 0.0)
    diagonal = tl.sum(tl.where(i == j, do_X, 0.0), 1) * scale

    wrote *= after[:, None]
    e_after = tl.sum(kf * wrote, 1)
    floored = tl.maximum(beta, LEAST_BETA)
    within = tl.dot((X_do * decay_t * (floored * scale)[:, None]).to(dtype), q_, input_precision=PRECISION)
    within = tl.dot((X_dv * decay_t * -floored[:, None]).to(dtype), k_, within, input_precision=PRECISION)
    e_within = tl.sum(kf * within, 1)
    erased *= -before[:, None]
    erased = tl.dot((dv_X * decay * -floored[None, :]).to(dtype), k_, erased, input_precision=PRECISION)
    read *= (before * scale)[:, None]
    read = tl.dot((do_X * decay * (floored * scale)[None, :]).to(dtype), k_, read, input_precision=PRECISION)

    sums = partial + (kb.to(tl.int64) * count + tile) * 256 + rows
    tl.store(sums, tl.sum(qf * read, 1) + tl.sum(kf * erased, 1) - e_within)
    tl.store(sums + 64, beta * e_after)
    tl.store(sums + 128, e_after + e_within / floored + tl.where(kb == 0, diagonal * tl.load(vector + 384), 0.0))
    tl.store(sums + 192, tl.where(rows == 0, tl.sum(carried, 0), 0.0))
    own_head = token * HV + hv
    direct = (beta * diagonal)[:, None]
    out = own_head[:, None] * K + columns[None, :]
    tl.store(dq + out, (read + direct * kf).to(dtype), mask=valid[:, None])
    tl.store(dk + out, (beta[:, None] * wrote + within + erased + direct * qf).to(dtype), mask=valid[:, None])


@triton.jit(do_not_specialize=["N", "count"])  # N as above; one chunk of one head would make count a constant, without a dtype
def _finish(
    partial, gates, dg, dbeta, cu_seqlens, first, sequence, T, per_row, N, count, HV: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Add the parts over the keys. g_t decays what goes from tokens j < t, or from the state before, to tokens i >= t or to the
    state after: each part holds, per token, what it gives as i less what as j, what it gives to the state after, dbeta, <S, D>.
    """
    c, hv = tl.program_id(0) // HV, tl.program_id(0) % HV
    begin, end = place(c, cu_seqlens, first, sequence, T, per_row, N)
    if begin >= end:
        return
    rows = tl.arange(0, 64)
    tile = c.to(tl.int64) * HV + hv
    inside = tl.zeros([64], tl.float32)
    after = tl.zeros([64], tl.float32)
    dbeta_ = tl.zeros([64], tl.float32)
    carried = tl.zeros([64], tl.float32)
    for part in tl.static_range(PARTS):
        sums = partial + (part * count.to(tl.int64) + tile) * 256 + rows
        inside += tl.load(sums)
        after += tl.load(sums + 64)
        dbeta_ += tl.load(sums + 128)
        carried += tl.load(sums + 192)
    over = tl.load(gates + tile * 448 + 63)
    dg_ = tl.sum(tl.where(rows[None, :] >= rows[:, None], inside[None, :], after[None, :]), 1) + over * tl.sum(carried, 0)
    out, valid = (begin + rows) * HV + hv, begin + rows < end
    tl.store(dg + out, dg_, mask=valid)
    tl.store(dbeta + out, dbeta_, mask=valid)
