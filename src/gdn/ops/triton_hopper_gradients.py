"""The rule's gradients chunk by chunk on Hopper: `triton_backward._gradients` with asynchronous copies and tensor cores.

A tile is one chunk, one head and 128 columns of the keys. One program an SM walks over its tiles: two groups of four warps take
64 columns each and, of the two matrices of pairs, one each, which they exchange once a tile; a single further warp keeps three
blocks of the next inputs on their way from memory. Same algebra and names as in `triton_backward`.
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

from gdn.ops.triton_hopper_states import coalesced, rows, tokens, vectors

RING = gl.constexpr(3)  # blocks of 64 values in flight
_SQUARE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))  # every result is [64 tokens, 64]
_OPERAND = gl.constexpr(gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]), 2))
_ROW = gl.constexpr(gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])))
_COLUMN = gl.constexpr(gl.SliceLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])))
_PLAIN = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
LEAST_BETA = gl.constexpr(2.0**-24)  # `triton_backward` says why


def run_gradients(
    q: Tensor,
    k: Tensor,
    gates: Tensor,
    X: Tensor,
    states: Tensor,
    do: Tensor,
    dv: Tensor,
    d_states: Tensor,
    dq: Tensor,
    dk: Tensor,
    partial: Tensor,
    scale: float,
) -> None:
    """As `triton_backward._gradients`; K a multiple of 128; dq, dk [B, T, HV, K]; partial sums [K / 64, chunks, HV, 4, 64]."""
    (B, T, H, K), (HV, V) = q.shape, X.shape[2:]
    per_row = -(-T // 64)
    tiles = B * per_row * HV * (K // 128)
    programs = torch.cuda.get_device_properties(q.device).multi_processor_count
    _gradients[(min(programs, tiles),)](
        tokens(q, 64), tokens(k, 64), tokens(X, 64), tokens(do, 64), tokens(dv, 64), rows(states, 64), rows(d_states, 64),
        vectors(gates), dq, dk, partial, scale, tiles, B * per_row * HV, T, per_row,
        H=H, HV=HV, K=K, V=V, num_warps=4, maxnreg=168,
    )  # fmt: skip


@gluon.jit
def _tile(t, per_row, HV: gl.constexpr, NK: gl.constexpr):
    """Number of a tile -> its row of the batch, first token there, value head, block of keys, and chunk and head in one."""
    kb = t % NK
    chunk = t // NK // HV
    hv = t // NK % HV
    return chunk // per_row, chunk % per_row * 64, hv, kb, chunk * HV + hv


@gluon.jit
def _load(
    q_in, k_in, X_in, do_in, dv_in, S_in, D_in, gates_in, blocks, keys, bars, tiles, per_row,
    H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
):  # fmt: skip
    X, do, dv, S, D = blocks
    q, k, gates = keys
    full, empty, keys_full, keys_empty = bars
    n = 0
    visit = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        b, start, hv, kb, tile = _tile(t, per_row, HV, K // 128)
        for vb in range(V // 64):
            slot = n % RING
            mbarrier.wait(empty.index(slot), (n // RING & 1) ^ 1)
            bar = full.index(slot)
            mbarrier.expect(bar, 3 * X_in.block_type.nbytes + 4 * S_in.block_type.nbytes)
            column = hv * V + vb * 64
            tma.async_copy_global_to_shared(X_in, [b, start, column], bar, X.index(slot))
            for group in gl.static_range(2):
                place = [tile * V + vb * 64, kb * 128 + group * 64]
                tma.async_copy_global_to_shared(D_in, place, bar, D.index(slot * 2 + group))
            tma.async_copy_global_to_shared(do_in, [b, start, column], bar, do.index(slot))
            for group in gl.static_range(2):
                place = [tile * V + vb * 64, kb * 128 + group * 64]
                tma.async_copy_global_to_shared(S_in, place, bar, S.index(slot * 2 + group))
            tma.async_copy_global_to_shared(dv_in, [b, start, column], bar, dv.index(slot))
            n += 1
            if vb == min(RING, V // 64) - 1:  # while the groups end the last tile, the blocks that there is room for come first
                mbarrier.wait(keys_empty, (visit & 1) ^ 1)
                mbarrier.expect(keys_full, 4 * q_in.block_type.nbytes + 7 * gates_in.block_type.nbytes)
                for part in gl.static_range(7):
                    tma.async_copy_global_to_shared(gates_in, [tile * 7 + part, 0], keys_full, gates.index(part))
                for group in gl.static_range(2):
                    column = hv // (HV // H) * K + kb * 128 + group * 64
                    tma.async_copy_global_to_shared(q_in, [b, start, column], keys_full, q.index(group))
                    tma.async_copy_global_to_shared(k_in, [b, start, column], keys_full, k.index(group))
        visit += 1  # noqa: SIM113 (no enumerate in a kernel)


@gluon.jit
def _store_rows(pointer, x, height, stride: gl.constexpr):
    """Write the first `height` rows of x [64, 64] to rows `stride` apart: 16 bytes a thread, regrouped within each warp.

    Not by the copy engine: there it would stand behind the blocks already asked for, and hold up the buffers it reads.
    """
    layout: gl.constexpr = coalesced(64)
    row, column = gl.arange(0, 64, gl.SliceLayout(1, layout)), gl.arange(0, 64, gl.SliceLayout(0, layout))
    gl.store(pointer + row[:, None] * stride + column[None, :], gl.convert_layout(x, layout), mask=row[:, None] < height)


@gluon.jit
def _compute(
    dq, dk, blocks, keys, pairs, bars, partial, scale, tiles, tiles_in_all, T, per_row,
    HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    X, do, dv, S, D = blocks
    q, k, gates = keys
    both, diagonals, exchanged = pairs
    full, empty, keys_full, keys_empty = bars
    dtype: gl.constexpr = both.dtype
    q_, k_ = q.index(GROUP).reshape([64, 64]), k.index(GROUP).reshape([64, 64])
    i, j = gl.arange(0, 64, _ROW), gl.arange(0, 64, _COLUMN)
    zeros = gl.zeros([64, 64], gl.float32, _SQUARE)
    n = 0
    visit = 0
    for t in range(gl.program_id(0), tiles, gl.num_programs(0)):
        b, start, hv, kb, tile = _tile(t, per_row, HV, K // 128)
        pair = zeros
        read = zeros
        wrote = zeros
        erased = zeros
        carried = gl.zeros([64], gl.float32, gl.SliceLayout(1, _PLAIN))
        for _vb in range(V // 64):
            slot = n % RING
            mbarrier.wait(full.index(slot), n // RING & 1)
            X_ = X.index(slot).reshape([64, 64])
            do_ = do.index(slot).reshape([64, 64])
            dv_ = dv.index(slot).reshape([64, 64])
            S_, D_ = S.index(slot * 2 + GROUP), D.index(slot * 2 + GROUP)
            wrote = warpgroup_mma(X_, D_, wrote, is_async=True)
            read = warpgroup_mma(do_, S_, read, is_async=True)
            erased = warpgroup_mma(dv_, S_, erased, is_async=True)
            if GROUP == 0:
                pair = warpgroup_mma(do_, X_.permute((1, 0)), pair, is_async=True)
            else:
                pair = warpgroup_mma(dv_, X_.permute((1, 0)), pair, is_async=True)
            carried += gl.sum(S_.load(_PLAIN).to(gl.float32) * D_.load(_PLAIN).to(gl.float32), 1)
            wrote, read, erased, pair = warpgroup_mma_wait(0, deps=[wrote, read, erased, pair])
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(empty.index(slot), count=1)
            n += 1

        mbarrier.wait(keys_full, visit & 1)
        # The keys are there: so both groups are done with the last tile, and with its pairs.
        high_i, high_j = gates.index(4).reshape([64]).load(_ROW), gates.index(4).reshape([64]).load(_COLUMN)
        low_i, low_j = gates.index(5).reshape([64]).load(_ROW), gates.index(5).reshape([64]).load(_COLUMN)
        difference = (high_i[:, None] - high_j[None, :]) + (low_i[:, None] - low_j[None, :])
        decay = gl.where(i[:, None] > j[None, :], gl.exp(gl.minimum(difference, 0.0)), 0.0)
        floored_j = gl.maximum(gates.index(3).reshape([64]).load(_COLUMN), LEAST_BETA)
        if GROUP == 0:
            diagonals.store(gl.sum(gl.where(i[:, None] == j[None, :], pair, 0.0), 1) * scale)
            pair *= decay * (floored_j * scale)[None, :]
        else:
            pair *= decay * -floored_j[None, :]
        both.index(GROUP).store(pair.to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(exchanged, count=1)
        before = gates.index(0).reshape([64]).load(_ROW)
        read *= (before * scale)[:, None]
        erased *= -before[:, None]
        wrote *= gates.index(2).reshape([64]).load(_ROW)[:, None]
        mbarrier.wait(exchanged, visit & 1)
        first, second = both.index(0), both.index(1)
        within = warpgroup_mma(first.permute((1, 0)), q_, zeros, use_acc=False, is_async=True)
        within = warpgroup_mma(second.permute((1, 0)), k_, within, is_async=True)
        read = warpgroup_mma(first, k_, read, is_async=True)
        erased = warpgroup_mma(second, k_, erased, is_async=True)
        beta = gates.index(3).reshape([64]).load(_ROW)
        e_after = gl.sum(k_.load(_SQUARE).to(gl.float32) * wrote, 1)
        diagonal = diagonals.load(_ROW)
        direct = beta * diagonal
        within, read, erased = warpgroup_mma_wait(0, deps=[within, read, erased])
        qf = q_.load(_SQUARE).to(gl.float32)
        kf = k_.load(_SQUARE).to(gl.float32)
        d_gc = gl.sum(qf * read, 1) + gl.sum(kf * erased, 1)
        e_within = gl.sum(kf * within, 1)
        read += direct[:, None] * kf
        erased += direct[:, None] * qf + (beta[:, None] * wrote + within)
        part = kb * 2 + GROUP
        direct = gl.where(part == 0, diagonal * gates.index(6).reshape([64]).load(_ROW), 0.0)
        sums = partial + (part * tiles_in_all + tile).to(gl.int64) * 256 + i
        gl.store(sums, d_gc - e_within)
        gl.store(sums + 64, beta * e_after)
        gl.store(sums + 128, e_after + e_within / gl.maximum(beta, LEAST_BETA) + direct)
        gl.store(sums + 192, gl.convert_layout(carried, _ROW))
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(keys_empty, count=1)
        place = ((b.to(gl.int64) * T + start) * HV + hv) * K + kb * 128 + GROUP * 64
        _store_rows(dq + place, read.to(dtype), T - start, HV * K)
        _store_rows(dk + place, erased.to(dtype), T - start, HV * K)
        visit += 1  # noqa: SIM113 (no enumerate in a kernel)


@gluon.jit
def _gradients(
    q_in, k_in, X_in, do_in, dv_in, S_in, D_in, gates_in, dq, dk, partial, scale, tiles, tiles_in_all, T, per_row,
    H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_in.dtype
    X = gl.allocate_shared_memory(dtype, [RING, 1, 64, 64], X_in.layout)
    do = gl.allocate_shared_memory(dtype, [RING, 1, 64, 64], X_in.layout)
    dv = gl.allocate_shared_memory(dtype, [RING, 1, 64, 64], X_in.layout)
    S = gl.allocate_shared_memory(dtype, [RING * 2, 64, 64], S_in.layout)
    D = gl.allocate_shared_memory(dtype, [RING * 2, 64, 64], S_in.layout)
    q = gl.allocate_shared_memory(dtype, [2, 1, 64, 64], q_in.layout)
    k = gl.allocate_shared_memory(dtype, [2, 1, 64, 64], q_in.layout)
    gates = gl.allocate_shared_memory(gl.float32, [7, 1, 64], gates_in.layout)
    both = gl.allocate_shared_memory(dtype, [2, 64, 64], S_in.layout)
    diagonals = gl.allocate_shared_memory(gl.float32, [64], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    keys_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    keys_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    exchanged = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(RING):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    mbarrier.init(keys_full, count=1)
    mbarrier.init(keys_empty, count=2)
    mbarrier.init(exchanged, count=2)
    blocks, keys, pairs, bars = (
        (X, do, dv, S, D),
        (q, k, gates),
        (both, diagonals, exchanged),
        (full, empty, keys_full, keys_empty),
    )
    gl.warp_specialize(
        [
            (_compute, (dq, dk, blocks, keys, pairs, bars, partial, scale, tiles, tiles_in_all, T, per_row, HV, K, V, 0)),
            (_compute, (dq, dk, blocks, keys, pairs, bars, partial, scale, tiles, tiles_in_all, T, per_row, HV, K, V, 1)),
            (_load, (q_in, k_in, X_in, do_in, dv_in, S_in, D_in, gates_in, blocks, keys, bars, tiles, per_row, H, HV, K, V)),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip
