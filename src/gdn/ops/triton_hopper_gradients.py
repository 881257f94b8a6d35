"""The rule's gradients chunk by chunk on Hopper: `triton_backward._gradients` with asynchronous copies and tensor cores.

One program an SM walks over its tiles; a warp of its own keeps three blocks of the next inputs on their way from memory while
eight warps compute. Same algebra and names as in `triton_backward`; a tile is one chunk, one head and BK columns of the keys.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from gdn.ops.triton_hopper_states import rows, tokens

BV = gl.constexpr(64)  # values a block
RING = gl.constexpr(3)  # blocks in flight


def run_gradients(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    gc: Tensor,
    X: Tensor,
    states: Tensor,
    do: Tensor,
    dv: Tensor,
    d_states: Tensor,
    dq: Tensor,
    dk: Tensor,
    dg: Tensor,
    dbeta: Tensor,
    scale: float,
) -> None:
    """As `triton_backward._gradients`; dq, dk [B, T, HV, K], dg, dbeta [K / BK, B, T, HV]."""
    (B, T, H, K), (HV, V) = q.shape, X.shape[2:]
    BK, per_row = min(K, 128), -(-T // 64)
    tiles = B * per_row * HV * (K // BK)
    programs = torch.cuda.get_device_properties(q.device).multi_processor_count
    _gradients[(min(programs, tiles),)](
        tokens(q, BK), tokens(k, BK), tokens(X, 64), tokens(do, 64), tokens(dv, 64), rows(states, BK), rows(d_states, BK),
        tokens(dq, BK), tokens(dk, BK), beta, gc, dg, dbeta, scale, tiles, T, per_row, B * T * HV,
        H=H, HV=HV, K=K, V=V, BK=BK, num_warps=8, maxnreg=168,
    )  # fmt: skip


@gluon.jit
def _tile(t, per_row, HV: gl.constexpr, NK: gl.constexpr):
    """Number of a tile -> its row of the batch, its first token there, value head, block of key columns, chunk and head in one."""
    kb = t % NK
    chunk = t // NK // HV
    hv = t // NK % HV
    return chunk // per_row, chunk % per_row * 64, hv, kb, chunk * HV + hv


@gluon.jit
def _load(
    inputs, blocks, keys, bars, tiles, per_row,
    H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr,
):  # fmt: skip
    q_in, k_in, X_in, do_in, dv_in, S_in, D_in = inputs
    X, do, dv, S, D = blocks
    q, k = keys
    full, empty, keys_full, keys_empty = bars
    n = 0
    visit = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        b, start, hv, kb, tile = _tile(t, per_row, HV, K // BK)
        for vb in range(V // BV):
            slot = n % RING
            mbarrier.wait(empty.index(slot), (n // RING & 1) ^ 1)
            bar = full.index(slot)
            mbarrier.expect(bar, 3 * X_in.block_type.nbytes + 2 * S_in.block_type.nbytes)
            column = hv * V + vb * BV
            tma.async_copy_global_to_shared(X_in, [b, start, column], bar, X.index(slot))
            tma.async_copy_global_to_shared(D_in, [tile * V + vb * BV, kb * BK], bar, D.index(slot))
            tma.async_copy_global_to_shared(do_in, [b, start, column], bar, do.index(slot))
            tma.async_copy_global_to_shared(S_in, [tile * V + vb * BV, kb * BK], bar, S.index(slot))
            tma.async_copy_global_to_shared(dv_in, [b, start, column], bar, dv.index(slot))
            n += 1
        mbarrier.wait(keys_empty, (visit & 1) ^ 1)
        mbarrier.expect(keys_full, 2 * q_in.block_type.nbytes)
        column = hv // (HV // H) * K + kb * BK
        tma.async_copy_global_to_shared(k_in, [b, start, column], keys_full, k)
        tma.async_copy_global_to_shared(q_in, [b, start, column], keys_full, q)
        visit += 1


@gluon.jit
def _compute(
    outputs, blocks, keys, pairs, bars, beta, gc, dg, dbeta, scale, tiles, T, per_row, partial,
    HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr,
):  # fmt: skip
    dq_out, dk_out = outputs
    X, do, dv, S, D = blocks
    q, k = keys
    first, second = pairs
    full, empty, keys_full, keys_empty = bars
    dtype: gl.constexpr = first.dtype
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BK // 2, 16])
    square: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16])
    plain: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])
    q_, k_ = q.reshape([64, BK]), k.reshape([64, BK])
    n = 0
    visit = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        b, start, hv, kb, tile = _tile(t, per_row, HV, K // BK)
        do_X = gl.zeros([64, 64], gl.float32, square)
        dv_X = gl.zeros([64, 64], gl.float32, square)
        read = gl.zeros([64, BK], gl.float32, wide)
        wrote = gl.zeros([64, BK], gl.float32, wide)
        erased = gl.zeros([64, BK], gl.float32, wide)
        product = gl.zeros([BV, BK], gl.float32, plain)
        for vb in range(V // BV):
            slot = n % RING
            mbarrier.wait(full.index(slot), n // RING & 1)
            X_ = X.index(slot).reshape([64, BV])
            do_ = do.index(slot).reshape([64, BV])
            dv_ = dv.index(slot).reshape([64, BV])
            S_, D_ = S.index(slot), D.index(slot)
            wrote = warpgroup_mma(X_, D_, wrote, is_async=True)
            read = warpgroup_mma(do_, S_, read, is_async=True)
            erased = warpgroup_mma(dv_, S_, erased, is_async=True)
            do_X = warpgroup_mma(do_, X_.permute((1, 0)), do_X, is_async=True)
            dv_X = warpgroup_mma(dv_, X_.permute((1, 0)), dv_X, is_async=True)
            product += S_.load(plain).to(gl.float32) * D_.load(plain).to(gl.float32)
            wrote, read, erased, do_X, dv_X = warpgroup_mma_wait(0, deps=[wrote, read, erased, do_X, dv_X])
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(empty.index(slot), count=1)
            if vb == 0:  # the last tile's results have left the buffers of q and k
                tma.store_wait(0)
                gl.thread_barrier()
                mbarrier.arrive(keys_empty, count=1, pred=visit > 0)
            n += 1
        carried = gl.sum(gl.sum(product, 1), 0)

        i = gl.arange(0, 64, gl.SliceLayout(1, square))
        j = gl.arange(0, 64, gl.SliceLayout(0, square))
        gc_i, gc_j = gl.load(gc + tile * 64 + i), gl.load(gc + tile * 64 + j)
        row = gl.arange(0, 64, gl.SliceLayout(1, wide))
        gc_row = gl.load(gc + tile * 64 + row)
        gc_end = gl.load(gc + tile * 64 + 63)
        own = (b.to(gl.int64) * T + start) * HV + hv
        beta_row = gl.load(beta + own + row * HV, mask=start + row < T, other=0.0).to(gl.float32)
        beta_j = gl.load(beta + own + j * HV, mask=start + j < T, other=0.0).to(gl.float32)
        lower = i[:, None] > j[None, :]
        decay = gl.where(lower, gl.exp(gl.minimum((gc_i[:, None] - gc_j[None, :]).to(gl.float32), 0.0)), 0.0)
        diagonal = gl.sum(gl.where(i[:, None] == j[None, :], do_X, 0.0), 1) * scale
        diagonal = gl.convert_layout(diagonal, gl.SliceLayout(1, wide))
        do_X *= decay * scale
        dv_X *= -decay
        first.store(do_X.to(dtype))
        second.store(dv_X.to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.wait(keys_full, visit & 1)
        within = warpgroup_mma(first.permute((1, 0)), q_, gl.zeros([64, BK], gl.float32, wide), is_async=True)
        within = warpgroup_mma(second.permute((1, 0)), k_, within, is_async=True)
        before = gl.exp(gc_row.to(gl.float32))
        wrote *= gl.exp((gc_end - gc_row).to(gl.float32))[:, None]
        kf = k_.load(wide).to(gl.float32)
        e_after = gl.sum(kf * wrote, 1)
        qk = gl.sum(kf * q_.load(wide).to(gl.float32), 1)
        erased *= -before[:, None]
        read *= (before * scale)[:, None]
        within = warpgroup_mma_wait(0, deps=[within])
        e_within = gl.sum(kf * within, 1)
        gl.thread_barrier()
        first.store((do_X * beta_j[None, :]).to(dtype))
        second.store((dv_X * beta_j[None, :]).to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        read = warpgroup_mma(first, k_, read, is_async=True)
        erased = warpgroup_mma(second, k_, erased, is_async=True)
        after = beta_row * e_after
        dbeta_ = e_after + e_within + diagonal * qk
        wrote = beta_row[:, None] * (wrote + within)
        read, erased = warpgroup_mma_wait(0, deps=[read, erased])
        qf = q_.load(wide).to(gl.float32)
        kf = k_.load(wide).to(gl.float32)
        d_gc = gl.sum(qf * read + kf * erased, 1) - beta_row * e_within
        d_gc_j = gl.convert_layout(d_gc, gl.SliceLayout(0, square))
        after_j = gl.convert_layout(after, gl.SliceLayout(0, square))
        dg_ = gl.sum(gl.where(lower, after_j[None, :], d_gc_j[None, :]), 1) + gl.exp(gc_end.to(gl.float32)) * carried
        shift = kb.to(gl.int64) * partial + own
        gl.store(dg + shift + i * HV, dg_, mask=start + i < T)
        gl.store(dbeta + shift + row * HV, dbeta_, mask=start + row < T)
        direct = (beta_row * diagonal)[:, None]
        read += direct * kf
        wrote += erased + direct * qf
        gl.thread_barrier()
        q_.store(read.to(dtype))
        k_.store(wrote.to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        column = hv * K + kb * BK
        tma.async_copy_shared_to_global(dq_out, [b, start, column], q)
        tma.async_copy_shared_to_global(dk_out, [b, start, column], k)
        visit += 1
    tma.store_wait(0)


@gluon.jit
def _gradients(
    q_in, k_in, X_in, do_in, dv_in, S_in, D_in, dq_out, dk_out, beta, gc, dg, dbeta, scale, tiles, T, per_row, partial,
    H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_in.dtype
    X = gl.allocate_shared_memory(dtype, [RING, 1, 64, BV], X_in.layout)
    do = gl.allocate_shared_memory(dtype, [RING, 1, 64, BV], X_in.layout)
    dv = gl.allocate_shared_memory(dtype, [RING, 1, 64, BV], X_in.layout)
    S = gl.allocate_shared_memory(dtype, [RING, BV, BK], S_in.layout)
    D = gl.allocate_shared_memory(dtype, [RING, BV, BK], S_in.layout)
    q = gl.allocate_shared_memory(dtype, [1, 64, BK], q_in.layout)
    k = gl.allocate_shared_memory(dtype, [1, 64, BK], q_in.layout)
    flat: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], dtype)
    first = gl.allocate_shared_memory(dtype, [64, 64], flat)
    second = gl.allocate_shared_memory(dtype, [64, 64], flat)
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    keys_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    keys_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(RING):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    mbarrier.init(keys_full, count=1)
    mbarrier.init(keys_empty, count=1)
    blocks, keys, bars = (X, do, dv, S, D), (q, k), (full, empty, keys_full, keys_empty)
    inputs = (q_in, k_in, X_in, do_in, dv_in, S_in, D_in)
    gl.warp_specialize(
        [
            (
                _compute,
                ((dq_out, dk_out), blocks, keys, (first, second), bars, beta, gc, dg, dbeta, scale, tiles, T, per_row,
                 partial, HV, K, V, BK),
            ),
            (_load, (inputs, blocks, keys, bars, tiles, per_row, H, HV, K, V, BK)),
        ],
        [1],
        [24],
    )  # fmt: skip
