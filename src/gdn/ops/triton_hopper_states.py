"""The recurrence over chunks on Hopper, forward and backward: `triton_forward._states` and `triton_backward._d_states` with
asynchronous copies and tensor cores. Same algebra, same names.

A program owns 128 values of one head of one sequence. Two groups of four warps hold 64 rows of the transposed state each, [64,
K] float32 in registers, and share what a single further warp copies from memory two chunks ahead. The groups never wait for
each other: while one rounds and scales, the other's products run.
"""

from functools import cache

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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gdn.ops.triton_forward import LIFT

RING = gl.constexpr(2)  # chunks in flight
# Tensor-core results [64, 64], and the operand in registers with a result's places. Rows are values, columns tokens or keys.
_SQUARE = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
_OPERAND = gl.constexpr(gl.DotOperandLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]), 2))
_TOKEN = gl.constexpr(gl.SliceLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])))


_VECTOR = gl.NVMMASharedLayout(0, 32, 2)
_ELEMENT = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@cache
def _layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), _ELEMENT[dtype])


def tokens(x: Tensor, columns: int) -> TensorDescriptor:
    """[B, T, heads, D] in tiles of 64 tokens by `columns` of one head; beyond T a tile reads as zero and is not written."""
    (B, T), D = x.shape[:2], x.shape[2] * x.shape[3]
    return TensorDescriptor(x, [B, T, D], [T * D, D, 1], [1, 64, columns], _layout((1, 64, columns), x.dtype))


def rows(x: Tensor, columns: int) -> TensorDescriptor:
    """[..., R, D] in tiles of 64 rows by `columns`."""
    D = x.shape[-1]
    return TensorDescriptor(x, [x.numel() // D, D], [D, 1], [64, columns], _layout((64, columns), x.dtype))


def vectors(gates: Tensor) -> TensorDescriptor:
    """[chunks, HV, 7, 64] float32, one row at a time."""
    return TensorDescriptor(gates, [gates.numel() // 64, 64], [64, 1], [1, 64], _VECTOR)


def run_states(
    q: Tensor,
    k: Tensor,
    values: Tensor,
    A: Tensor,
    P: Tensor,
    gates: Tensor,
    out: Tensor,
    X: Tensor | None,
    states: Tensor | None,
    first_state: Tensor | None,
    last_state: Tensor | None,
    scale: float,
    *,
    reverse: bool,
) -> None:
    """Forward: v, o, X, the saved states, initial and final state. Reverse: do, dv, -, their gradients; of the final
    state, and of that after the first chunk, which `triton_backward._d_initial` then takes over it."""
    (B, T, H, K), (HV, V) = q.shape, values.shape[2:]
    BK = min(K, 128)
    _states[(B * HV * (V // 128),)](
        tokens(k, BK), tokens(q, BK), rows(A, 64), rows(P, 64), tokens(values, 64), vectors(gates), tokens(out, 64),
        None if X is None else tokens(X, 64), gates, states, first_state, last_state, scale, T, -(-T // 64),
        H=H, HV=HV, K=K, V=V, BK=BK, REVERSE=reverse, num_warps=4, maxnreg=168,
    )  # fmt: skip


@gluon.constexpr_function
def coalesced(BK):
    """[64, BK] with 8 neighbours of a row in each thread, 16 bytes a store; from a result it is reached within each warp."""
    registers = [[0, 1], [0, 2], [0, 4], [8, 0]] + [[0, 1 << n] for n in range(5, BK.bit_length() - 1)]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [64, BK])


@gluon.jit
def _save(pointer, state, K: gl.constexpr, BK: gl.constexpr):
    """Write a [64, BK] part of a state, in registers, to rows K apart."""
    layout: gl.constexpr = coalesced(BK)
    row, column = gl.arange(0, 64, gl.SliceLayout(1, layout)), gl.arange(0, BK, gl.SliceLayout(0, layout))
    gl.store(pointer + row[:, None] * K + column[None, :], gl.convert_layout(state, layout))


@gluon.jit
def _stage(out, x, staging, n, chunk, column):
    """Put x [64 values, 64 tokens] into shared memory, where the last one may still be leaving, and from there into `out`."""
    tma.store_wait(0)
    gl.thread_barrier()
    staging.index(0).reshape([64, 64]).permute((1, 0)).store(x)
    fence_async_shared()
    gl.thread_barrier()
    if out is not None:
        tma.async_copy_shared_to_global(out, [n, chunk * 64, column], staging.index(0))


@gluon.jit
def _state_offsets(K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr):
    """Of a [BK, 64] block of a [K, V] state, as the [64, BK] registers hold it."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BK, 16])
    row, column = gl.arange(0, 64, gl.SliceLayout(1, layout)), gl.arange(0, BK, gl.SliceLayout(0, layout))
    return row[:, None] + column[None, :] * V


@gluon.jit
def _load(
    keys_in, squares_in, values_in, gates_in, keys, squares, values, gates, full, empty, n, hv, block, T, per_row,
    H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    k_in, q_in = keys_in
    A_in, P_in = squares_in
    k, q = keys
    A, P = squares
    NK: gl.constexpr = K // BK
    for step in range(per_row):
        i = per_row - 1 - step if REVERSE else step
        slot = step % RING
        mbarrier.wait(empty.index(slot), (step // RING & 1) ^ 1)
        bar = full.index(slot)
        tile = (n * per_row + i) * HV + hv
        mbarrier.expect(
            bar,
            2 * NK * k_in.block_type.nbytes + 2 * A_in.block_type.nbytes + 2 * values_in.block_type.nbytes
            + 2 * gates_in.block_type.nbytes,
        )  # fmt: skip
        start = i * 64
        column = hv // (HV // H) * K
        for part in gl.static_range(2):
            tma.async_copy_global_to_shared(gates_in, [tile * 7 + part, 0], bar, gates.index(slot * 2 + part))
        for part in gl.static_range(NK):
            tma.async_copy_global_to_shared(k_in, [n, start, column + part * BK], bar, k.index(slot * NK + part))
        for part in gl.static_range(2):
            place = values.index(slot * 2 + part)
            tma.async_copy_global_to_shared(values_in, [n, start, hv * V + block * 128 + part * 64], bar, place)
        tma.async_copy_global_to_shared(A_in, [tile * 64, 0], bar, A.index(slot))
        for part in gl.static_range(NK):
            tma.async_copy_global_to_shared(q_in, [n, start, column + part * BK], bar, q.index(slot * NK + part))
        tma.async_copy_global_to_shared(P_in, [tile * 64, 0], bar, P.index(slot))


@gluon.jit
def _forward(
    o_out, X_out, keys, squares, values, gates, staging, full, empty, gates_pointer, states, initial_state, final_state,
    scale, n, hv, block, per_row,
    HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    k, q = keys
    A, P = squares
    NK: gl.constexpr = K // BK
    dtype: gl.constexpr = k.dtype
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BK, 16])
    first_value = block * 128 + GROUP * 64
    head = n.to(gl.int64) * HV + hv
    offsets = head * K * V + first_value + _state_offsets(K, V, BK)
    S0 = gl.zeros([64, BK], gl.float32, wide)
    S1 = gl.zeros([64, BK], gl.float32, wide)
    if initial_state is not None:
        S0 = gl.load(initial_state + offsets)
        if NK == 2:
            S1 = gl.load(initial_state + offsets + BK * V)
    zeros = gl.zeros([64, 64], gl.float32, _SQUARE)
    for i in range(per_row):
        slot = i % RING
        tile = (n * per_row + i).to(gl.int64) * HV + hv
        over = gl.load(gates_pointer + tile * 448 + 63)
        mbarrier.wait(full.index(slot), i // RING & 1)
        N = gl.convert_layout(S0.to(dtype), _OPERAND)
        U = warpgroup_mma(N, k.index(slot * NK).reshape([64, BK]).permute((1, 0)), zeros, use_acc=False, is_async=True)
        if states is not None:
            saved = states + (tile * V + first_value) * K
            _save(saved, N, K, BK)
        U, N = warpgroup_mma_wait(0, deps=[U, N])
        if NK == 2:
            N = gl.convert_layout(S1.to(dtype), _OPERAND)
            U = warpgroup_mma(N, k.index(slot * NK + 1).reshape([64, BK]).permute((1, 0)), U, is_async=True)
            if states is not None:
                _save(saved + BK, N, K, BK)
            U, N = warpgroup_mma_wait(0, deps=[U, N])
        v = values.index(slot * 2 + GROUP).reshape([64, 64]).permute((1, 0)).load(_SQUARE).to(gl.float32)
        before = gates.index(slot * 2).reshape([64]).load(_TOKEN)
        whole = v - before[None, :] * U
        W = gl.convert_layout(whole.to(dtype), _OPERAND)
        X = warpgroup_mma(W, A.index(slot).permute((1, 0)), zeros, use_acc=False, is_async=True)
        if dtype == gl.float16:  # `triton_forward` says why
            rest = gl.convert_layout((whole - whole.to(dtype).to(gl.float32)).to(dtype), _OPERAND)
            X = warpgroup_mma(rest, A.index(slot).permute((1, 0)), X, is_async=True)
            X, W, rest = warpgroup_mma_wait(0, deps=[X, W, rest])
        else:
            X, W = warpgroup_mma_wait(0, deps=[X, W])
        # X waits in shared memory, not in registers, while the outputs are made.
        _stage(X_out, X.to(dtype), staging, n, i, hv * V + first_value)
        X_ = staging.index(0).reshape([64, 64]).permute((1, 0))

        # Scaled, S is rounded anew here: keeping its operands from above would take more registers than there are.
        N = gl.convert_layout((S0 * scale).to(dtype), _OPERAND)
        o = warpgroup_mma(N, q.index(slot * NK).reshape([64, BK]).permute((1, 0)), zeros, use_acc=False, is_async=True)
        if NK == 2:
            o, N = warpgroup_mma_wait(0, deps=[o, N])
            N = gl.convert_layout((S1 * scale).to(dtype), _OPERAND)
            o = warpgroup_mma(N, q.index(slot * NK + 1).reshape([64, BK]).permute((1, 0)), o, is_async=True)
        o, N = warpgroup_mma_wait(0, deps=[o, N])
        before = gates.index(slot * 2).reshape([64]).load(_TOKEN)
        o *= before[None, :] * LIFT
        o = warpgroup_mma(X_, P.index(slot).permute((1, 0)), o, is_async=True)
        write = gates.index(slot * 2 + 1).reshape([64]).load(_TOKEN)
        wrote = gl.convert_layout((X_.load(_SQUARE).to(gl.float32) * write[None, :]).to(dtype), _OPERAND)
        S0 *= over
        S0 = warpgroup_mma(wrote, k.index(slot * NK).reshape([64, BK]), S0, is_async=True)
        if NK == 2:
            S1 *= over
            S1 = warpgroup_mma(wrote, k.index(slot * NK + 1).reshape([64, BK]), S1, is_async=True)
        o = warpgroup_mma_wait(NK, deps=[o])
        _stage(o_out, (o / LIFT).to(dtype), staging, n, i, hv * V + first_value)
        if NK == 2:
            S0, S1, wrote = warpgroup_mma_wait(0, deps=[S0, S1, wrote])
        else:
            S0, wrote = warpgroup_mma_wait(0, deps=[S0, wrote])
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(empty.index(slot), count=1)
    tma.store_wait(0)
    if final_state is not None:
        gl.store(final_state + offsets, S0)
        if NK == 2:
            gl.store(final_state + offsets + BK * V, S1)


@gluon.jit
def _backward(
    dv_out, keys, squares, values, gates, staging, full, empty, gates_pointer, d_states, d_final_state, d_initial,
    scale, n, hv, block, per_row,
    HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    k, q = keys
    A, P = squares
    NK: gl.constexpr = K // BK
    dtype: gl.constexpr = k.dtype
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BK, 16])
    first_value = block * 128 + GROUP * 64
    head = n.to(gl.int64) * HV + hv
    offsets = head * K * V + first_value + _state_offsets(K, V, BK)
    D0 = gl.zeros([64, BK], gl.float32, wide)
    D1 = gl.zeros([64, BK], gl.float32, wide)
    if d_final_state is not None:
        D0 = gl.load(d_final_state + offsets)
        if NK == 2:
            D1 = gl.load(d_final_state + offsets + BK * V)
    zeros = gl.zeros([64, 64], gl.float32, _SQUARE)
    parts: gl.constexpr = 1 if d_initial is None else 2  # of the sequence: all of it, or all but the first chunk, and that
    for part in gl.static_range(parts):
        if part == 1:
            gl.store(d_initial + offsets, D0)
            if NK == 2:
                gl.store(d_initial + offsets + BK * V, D1)
        for step in range(part * (per_row - 1), per_row - parts + 1 + part):
            i = per_row - 1 - step
            slot = step % RING
            tile = (n * per_row + i).to(gl.int64) * HV + hv
            over = gl.load(gates_pointer + tile * 448 + 63)
            mbarrier.wait(full.index(slot), step // RING & 1)
            do = values.index(slot * 2 + GROUP).reshape([64, 64]).permute((1, 0))
            N = gl.convert_layout(D0.to(dtype), _OPERAND)
            d = warpgroup_mma(N, k.index(slot * NK).reshape([64, BK]).permute((1, 0)), zeros, use_acc=False, is_async=True)
            saved = d_states + (tile * V + first_value) * K
            _save(saved, N, K, BK)
            if NK == 2:
                d, N = warpgroup_mma_wait(0, deps=[d, N])
                N = gl.convert_layout(D1.to(dtype), _OPERAND)
                d = warpgroup_mma(N, k.index(slot * NK + 1).reshape([64, BK]).permute((1, 0)), d, is_async=True)
                _save(saved + BK, N, K, BK)
            write = gates.index(slot * 2 + 1).reshape([64]).load(_TOKEN)
            d, N = warpgroup_mma_wait(0, deps=[d, N])
            d *= write[None, :] * LIFT
            d = warpgroup_mma(do, P.index(slot), d, is_async=True)
            before = gates.index(slot * 2).reshape([64]).load(_TOKEN)
            read = gl.convert_layout((do.load(_SQUARE).to(gl.float32) * (before * scale)[None, :]).to(dtype), _OPERAND)
            D0 *= over
            if NK == 2:
                D1 *= over
            d = warpgroup_mma_wait(0, deps=[d])
            d = gl.convert_layout((d / LIFT).to(dtype), _OPERAND)
            dv = warpgroup_mma(d, A.index(slot), zeros, use_acc=False, is_async=True)
            D0 = warpgroup_mma(read, q.index(slot * NK).reshape([64, BK]), D0, is_async=True)
            if NK == 2:
                D1 = warpgroup_mma(read, q.index(slot * NK + 1).reshape([64, BK]), D1, is_async=True)
            dv, d = warpgroup_mma_wait(NK, deps=[dv, d])
            erased = gl.convert_layout((dv * -before[None, :]).to(dtype), _OPERAND)
            D0 = warpgroup_mma(erased, k.index(slot * NK).reshape([64, BK]), D0, is_async=True)
            if NK == 2:
                D1 = warpgroup_mma(erased, k.index(slot * NK + 1).reshape([64, BK]), D1, is_async=True)
            _stage(dv_out, dv.to(dtype), staging, n, i, hv * V + first_value)
            if NK == 2:
                D0, D1, read, erased = warpgroup_mma_wait(0, deps=[D0, D1, read, erased])
            else:
                D0, read, erased = warpgroup_mma_wait(0, deps=[D0, read, erased])
            if d_initial is not None:  # which is D itself: what rounding took from `read` would be most of its error
                whole = do.load(_SQUARE).to(gl.float32) * (before * scale)[None, :]
                rest = gl.convert_layout((whole - whole.to(dtype).to(gl.float32)).to(dtype), _OPERAND)
                D0 = warpgroup_mma(rest, q.index(slot * NK).reshape([64, BK]), D0, is_async=True)
                D0, rest = warpgroup_mma_wait(0, deps=[D0, rest])
                if NK == 2:
                    D1 = warpgroup_mma(rest, q.index(slot * NK + 1).reshape([64, BK]), D1, is_async=True)
                    D1, rest = warpgroup_mma_wait(0, deps=[D1, rest])
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(empty.index(slot), count=1)
    tma.store_wait(0)


@gluon.jit
def _states(
    k_in, q_in, A_in, P_in, values_in, gates_in, out, X_out, gates_pointer, states, first_state, last_state, scale, T, per_row,
    H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, BK: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """Forward: values are v, out is o; the states are saved if `states` is given, X if X_out is. Reverse: do, dv, d_states."""
    NK: gl.constexpr = K // BK
    block = gl.program_id(0) % (V // 128)
    hv = gl.program_id(0) // (V // 128) % HV
    n = gl.program_id(0) // (V // 128 * HV)
    dtype: gl.constexpr = k_in.dtype
    k = gl.allocate_shared_memory(dtype, [RING * NK, 1, 64, BK], k_in.layout)
    q = gl.allocate_shared_memory(dtype, [RING * NK, 1, 64, BK], k_in.layout)
    A = gl.allocate_shared_memory(dtype, [RING, 64, 64], A_in.layout)
    P = gl.allocate_shared_memory(dtype, [RING, 64, 64], A_in.layout)
    values = gl.allocate_shared_memory(dtype, [RING * 2, 1, 64, 64], values_in.layout)
    gates = gl.allocate_shared_memory(gl.float32, [RING * 2, 1, 64], gates_in.layout)
    staging0 = gl.allocate_shared_memory(dtype, [1, 1, 64, 64], values_in.layout)
    staging1 = gl.allocate_shared_memory(dtype, [1, 1, 64, 64], values_in.layout)
    full = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(RING):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    keys, squares = (k, q), (A, P)
    if REVERSE:
        gl.warp_specialize(
            [
                (_backward, (out, keys, squares, values, gates, staging0, full, empty, gates_pointer, states, first_state,
                             last_state, scale, n, hv, block, per_row, HV, K, V, BK, 0)),
                (_backward, (out, keys, squares, values, gates, staging1, full, empty, gates_pointer, states, first_state,
                             last_state, scale, n, hv, block, per_row, HV, K, V, BK, 1)),
                (_load, ((k_in, q_in), (A_in, P_in), values_in, gates_in, keys, squares, values, gates, full, empty, n, hv,
                         block, T, per_row, H, HV, K, V, BK, True)),
            ],
            [4, 1], [240, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_forward, (out, X_out, keys, squares, values, gates, staging0, full, empty, gates_pointer, states, first_state,
                            last_state, scale, n, hv, block, per_row, HV, K, V, BK, 0)),
                (_forward, (out, X_out, keys, squares, values, gates, staging1, full, empty, gates_pointer, states, first_state,
                            last_state, scale, n, hv, block, per_row, HV, K, V, BK, 1)),
                (_load, ((k_in, q_in), (A_in, P_in), values_in, gates_in, keys, squares, values, gates, full, empty, n, hv,
                         block, T, per_row, H, HV, K, V, BK, False)),
            ],
            [4, 1], [240, 24],
        )  # fmt: skip
