"""GPU kernel of a layer's middle for one token of each row, in one launch: L2 norm, gates, the rule's step, the output's gate.

As `triton_step`, on a projection whose convolution is done (`triton_linear.project`). Nothing between is rounded. What it
leaves are heads that are yet to be multiplied by 1 / rms, with partial sums of their squares: a program has some columns only.
The state is read before the projection is there. Launcher only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn.ops.triton_chain import begin, link, wait
from gdn.ops.triton_gates import log_decay, write_strength
from gdn.ops.triton_rows import Normed, silu
from gdn.ops.triton_short_conv import EPS
from gdn.ops.triton_step import CONFIG, SMALL, SMALL_BYTES


def layer_step(
    projected: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm: Tensor,
    state: Tensor,
    H: int,
    gated: bool,
    allow_neg_eigval: bool,
    dtype: torch.dtype,
) -> Normed:
    """o * norm * silu(gate) [B, HV * V] in dtype, and sums of o's squares, of a projection with columns q | k | v | a | b |
    gate, q, k and v of them convolved and activated, float32; `state` is updated in place. Without `gated` there is no gate.

    A_log, dt_bias [HV], norm [V]; state [B, HV, K, V] float32, contiguous, K a power of 2, V a multiple of 32.
    """
    B, HV, K, V = state.shape
    if not state.is_contiguous() or state.data_ptr() % 16 or not projected.is_contiguous():
        raise ValueError(f"state has strides {state.stride()}, the projection {projected.stride()}; expected contiguous ones")
    config = SMALL if state.nbytes <= SMALL_BYTES else CONFIG
    columns = min(config.columns, V & -V)
    h = torch.empty(B, HV * V, dtype=dtype, device=state.device)
    squares = torch.empty(B, HV, V // columns, device=state.device)
    _layer_step[(B * HV * (V // columns),)](
        projected, A_log, dt_bias, norm, state, h, squares, K**-0.5, STRIDE=projected.shape[1],
        H=H, HV=HV, K=K, V=V, BV=columns, GATED=gated, DOUBLE=allow_neg_eigval,
        EVICT_FIRST=config.evict_first, num_warps=config.num_warps, **link(h.device, rows=B, beside_states=True),
    )  # fmt: skip
    return Normed(h, squares)


@triton.jit
def _layer_step(
    projected, A_log, dt_bias, norm, state, h, squares, scale,
    STRIDE: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    GATED: tl.constexpr, DOUBLE: tl.constexpr, EVICT_FIRST: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    begin(CHAINED)
    D: tl.constexpr = 2 * H * K + HV * V
    part = tl.program_id(0) % (V // BV)  # neighbours in time share rows of one state
    matrix = tl.program_id(0) // (V // BV)
    row, head = (matrix // HV).to(tl.int64), matrix % HV
    policy: tl.constexpr = "evict_first" if EVICT_FIRST else ""

    channels = tl.arange(0, K)
    columns = part * BV + tl.arange(0, BV)
    pointers = state + (row * HV + head) * (K * V) + channels[:, None] * V + columns[None, :]
    S = tl.load(pointers, eviction_policy=policy)
    rate, offset = tl.load(A_log + head).to(tl.float32), tl.load(dt_bias + head).to(tl.float32)
    weight = tl.load(norm + columns).to(tl.float32)
    wait(CHAINED)

    # All loads before the first use of one: what each waits for is waited for once.
    here = projected + row * STRIDE
    q = tl.load(here + head // (HV // H) * K + channels)
    k = tl.load(here + (H + head // (HV // H)) * K + channels)
    v = tl.load(here + 2 * H * K + head * V + columns)
    a, b = tl.load(here + D + head), tl.load(here + D + HV + head)
    if GATED:
        gate = tl.load(here + D + 2 * HV + head * V + columns)
    decay, beta = tl.exp(log_decay(a, rate, offset)), write_strength(b, DOUBLE)

    # Joined, sums cross lanes and warps together.
    of_each, of_both = tl.split(tl.sum(tl.join(tl.join(q * q, k * k), tl.join(q * k, q * k)), 0))
    qq, kk = tl.split(of_each)
    qk, _ = tl.split(of_both)
    q_scale, k_scale = tl.rsqrt(qq + EPS), tl.rsqrt(kk + EPS)
    q, k, qk = q * q_scale, k * k_scale, qk * q_scale * k_scale
    Sk, Sq = tl.split(tl.sum(tl.join(S * k[:, None], S * q[:, None]), 0))
    w = beta * (v - decay * Sk)
    tl.store(pointers, decay * S + k[:, None] * w[None, :], eviction_policy=policy)
    o = scale * (decay * Sq + qk * w)
    tl.store(squares + (row * HV + head) * (V // BV) + part, tl.sum(o * o, 0))
    y = o * weight
    if GATED:
        y *= silu(gate)
    tl.store(h + (row * HV + head) * V + columns, y.to(h.dtype.element_ty))
