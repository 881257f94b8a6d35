"""GPU kernel of a layer's middle for one token of each row, in one launch: L2 norm, gates, the rule's step, the output's gate.

As `triton_step`, on a projection whose convolution is done (`triton_linear.project`), and with the state written once in
`pending.SLOTS` tokens. Nothing between is rounded. What it leaves are heads that are yet to be multiplied by 1 / rms, with
partial sums of their squares: a program has some columns only. The state is read before the projection is there. Launcher only.
"""

# mypy: disable-error-code=assignment
# Tuples grow in kernels.

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn.ops.pending import SLOTS, slot_size
from gdn.ops.triton_chain import begin, link, wait
from gdn.ops.triton_gates import log_decay, write_strength
from gdn.ops.triton_rows import Normed, silu
from gdn.ops.triton_short_conv import EPS

# The sums' order hangs on these: the same at any number of rows. Of twelve pairs the fastest at 64 and more (docs/log.md).
COLUMNS, NUM_WARPS = 32, 2
# Bytes of states of which the L2 cache is told that they are not needed again soon: no bits change; others take longer by it.
LEAST_EVICTED, MOST_EVICTED = 32 << 20, 96 << 20


def layer_step(
    projected: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm: Tensor,
    state: Tensor,
    pending: Tensor,
    position: Tensor,
    layer: int,
    H: int,
    gated: bool,
    allow_neg_eigval: bool,
    dtype: torch.dtype,
) -> Normed:
    """o * norm * silu(gate) [B, HV * V] in dtype, and sums of o's squares, of a projection with columns q | k | v | a | b |
    gate, q, k and v of them convolved and activated, float32; `state` and `pending` are updated in place. Without `gated` there
    is no gate.

    A_log, dt_bias [HV], norm [V]; state [B, HV, K, V] float32, contiguous, K a power of 2, V a multiple of 32; pending
    [B, HV, SLOTS, slot_size(K, V)]; position [B] int64: tokens read, this one included; layer: which of the model's.
    """
    B, HV, K, V = state.shape
    slots, wanted = pending.shape[2], (B, HV, SLOTS, slot_size(K, V))
    if pending.shape != wanted or not pending.is_contiguous() or pending.data_ptr() % 16:
        raise ValueError(f"slots are {tuple(pending.shape)}, strides {pending.stride()}; expected {wanted}, contiguous")
    if not state.is_contiguous() or state.data_ptr() % 16 or not projected.is_contiguous():
        raise ValueError(f"state has strides {state.stride()}, the projection {projected.stride()}; expected contiguous ones")
    columns = min(COLUMNS, V & -V)
    h = torch.empty(B, HV * V, dtype=dtype, device=state.device)
    squares = torch.empty(B, HV, V // columns, device=state.device)
    _layer_step[(B * HV * (V // columns),)](
        projected, A_log, dt_bias, norm, state, pending, position, h, squares, K**-0.5, layer * HV, STRIDE=projected.shape[1],
        H=H, HV=HV, K=K, V=V, BV=columns, P=pending.shape[3], SLOTS=slots, GATED=gated, DOUBLE=allow_neg_eigval,
        EVICT_FIRST=LEAST_EVICTED <= state.nbytes <= MOST_EVICTED, num_warps=NUM_WARPS, **link(h.device, rows=B, states=True),
    )  # fmt: skip
    return Normed(h, squares)


@triton.jit(do_not_specialize=["first"])
def _layer_step(
    projected, A_log, dt_bias, norm, state, pending, position, h, squares, scale, first,
    STRIDE: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    P: tl.constexpr, SLOTS: tl.constexpr, GATED: tl.constexpr, DOUBLE: tl.constexpr,
    EVICT_FIRST: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    begin(CHAINED)
    D: tl.constexpr = 2 * H * K + HV * V
    PIECE: tl.constexpr = 16  # of a key: few columns of each slot a thread, so that few of its sums cross threads
    part = tl.program_id(0) % (V // BV)  # neighbours in time share rows of one state
    matrix = tl.program_id(0) // (V // BV)
    row, head = (matrix // HV).to(tl.int64), matrix % HV

    channels, slot, piece = tl.arange(0, K), tl.arange(0, SLOTS), tl.arange(0, PIECE)[None, :]
    columns = part * BV + tl.arange(0, BV)
    pointers = state + (row * HV + head) * (K * V) + channels[:, None] * V + columns[None, :]
    slots = pending + (row * HV + head) * (SLOTS * P)
    keys_at, updates_at = slots + slot[:, None] * P + piece, slots + slot[:, None] * P + K + columns[None, :]
    logs_at = slots + slot * P + (K + V)
    policy: tl.constexpr = "evict_first" if EVICT_FIRST else ""
    S = tl.load(pointers, eviction_policy=policy)
    keys = ()
    if CHAINED:  # all slots, as the position is yet to be written
        for i in tl.static_range(0, K, PIECE):
            keys = keys + (tl.load(keys_at + i),)
        updates, logs = tl.load(updates_at), tl.load(logs_at)
    rate, offset = tl.load(A_log + head).to(tl.float32), tl.load(dt_bias + head).to(tl.float32)
    weight = tl.load(norm + columns).to(tl.float32)
    wait(CHAINED)

    # All loads before the first use of one: what each waits for is waited for once.
    index = ((tl.load(position + row) - 1 + first + head) % SLOTS).to(tl.int32)  # of this token's slot; those below are filled
    here = projected + row * STRIDE
    q_here, k_here = here + head // (HV // H) * K, here + (H + head // (HV // H)) * K
    q, k = tl.load(q_here + channels), tl.load(k_here + channels)
    v = tl.load(here + 2 * H * K + head * V + columns)
    a, b = tl.load(here + D + head), tl.load(here + D + HV + head)
    if GATED:
        gate = tl.load(here + D + 2 * HV + head * V + columns)
    filled = slot < index
    if CHAINED:
        updates, logs = tl.where(filled[:, None], updates, 0.0), tl.where(filled, logs, 0.0)
    else:
        for i in tl.static_range(0, K, PIECE):
            keys = keys + (tl.load(keys_at + i, mask=filled[:, None], other=0.0),)
        updates = tl.load(updates_at, mask=filled[:, None], other=0.0)
        logs = tl.load(logs_at, mask=filled, other=0.0)
    log = log_decay(a, rate, offset)
    decay, beta = tl.exp(log), write_strength(b, DOUBLE)

    # Norms of q and k, by a warp's threads each; then the slots' keys by them, and their decays since.
    qq, kk, qk = tl.zeros([32], tl.float32), tl.zeros([32], tl.float32), tl.zeros([32], tl.float32)
    for i in tl.static_range(0, K, 32):
        q_, k_ = tl.load(q_here + i + tl.arange(0, 32)), tl.load(k_here + i + tl.arange(0, 32))
        qq, kk, qk = qq + q_ * q_, kk + k_ * k_, qk + q_ * k_
    q_scale, k_scale, qk = tl.rsqrt(tl.sum(qq, 0) + EPS), tl.rsqrt(tl.sum(kk, 0) + EPS), tl.sum(qk, 0)
    by_k, by_q = tl.zeros([SLOTS, PIECE], tl.float32), tl.zeros([SLOTS, PIECE], tl.float32)
    for i in tl.static_range(K // PIECE):
        every = tl.zeros([SLOTS, 1], tl.int32) + i * PIECE + piece
        by_k += keys[i] * tl.load(k_here + every)
        by_q += keys[i] * tl.load(q_here + every)
    by_k, by_q = tl.sum(by_k, 1), tl.sum(by_q, 1)
    since = tl.exp(tl.sum(tl.where(slot[None, :] > slot[:, None], logs[None, :], 0.0), 1))
    by_k, by_q = tl.where(filled, since * by_k, 0.0), tl.where(filled, since * by_q, 0.0)
    kept = tl.exp(tl.sum(logs, 0))

    # S^T k and S^T q, up to their scales: every SLOTS-th row by one thread, so that what is pending is added there too.
    Sk = kept * tl.sum(tl.reshape(S * k[:, None], [K // SLOTS, SLOTS, BV]), 0) + by_k[:, None] * updates
    Sq = kept * tl.sum(tl.reshape(S * q[:, None], [K // SLOTS, SLOTS, BV]), 0) + by_q[:, None] * updates
    Sk, Sq = tl.split(tl.sum(tl.join(Sk, Sq), 0))  # joined, both cross threads together
    w = beta * (v - decay * k_scale * Sk)
    o = scale * q_scale * (decay * Sq + qk * k_scale * w)
    tl.store(squares + (row * HV + head) * (V // BV) + part, tl.sum(o * o, 0))
    y = o * weight
    if GATED:
        y *= silu(gate)
    tl.store(h + (row * HV + head) * V + columns, y.to(h.dtype.element_ty))

    if index == SLOTS - 1:
        S = decay * kept * tl.load(pointers, eviction_policy=policy)  # once more: kept, it would take registers of every token
        S += (k * k_scale)[:, None] * w[None, :]
        for i in tl.static_range(SLOTS - 1):  # from the last filled slot to the first
            own = slots + (SLOTS - 2 - i) * P
            S += tl.load(own + channels)[:, None] * (decay * tl.load(own + K + columns))[None, :]
            decay *= tl.exp(tl.load(own + K + V))
        tl.store(pointers, S, eviction_policy=policy)
    else:
        tl.store(slots + index * P + K + columns, w)
        if part == 0:  # others read this slot at most before they know that it is not filled
            tl.store(slots + index * P + channels, k * k_scale)
            tl.store(slots + index * P + K + V, log)
