"""GPU kernel of the rule's single token: the state is read once and written once, in place, and nothing else costs anything.

With S the state before the token:

    w = beta (v - exp(g) S^T k)        o = scale (exp(g) S^T q + (q . k) w)        S' = exp(g) S + k w^T

so both products take the same registers before the write. A program has all K rows of some columns of V. Launcher only; checks
and defaults are in `gated_delta_rule`.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class StepConfig(NamedTuple):
    columns: int  # of V a program has at most; 8 are 32 bytes of each row
    num_warps: int
    evict_first: bool  # tell the L2 cache that this state is not needed again soon


# One for every batch: the order of the sums over K depends on columns and warps, and a row has the same bits in any batch. The
# hint changes no bits: it helps states up to about the size of the L2 cache and harms larger ones (H200, docs/log.md).
CONFIG = StepConfig(32, 4, False)
SMALL, SMALL_BYTES = StepConfig(32, 4, True), 32 << 20
# What there is to choose from, for whoever tunes: 64 floats of the state a thread at K = 256, 32 in the last three.
CANDIDATES = tuple(
    StepConfig(columns, num_warps, evict_first)
    for columns, num_warps in ((32, 4), (16, 2), (8, 1), (64, 8), (32, 8), (16, 4), (8, 2))
    for evict_first in (False, True)
)


def step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float, config: StepConfig | None = None
) -> Tensor:
    """One token for each row: `state` [B, HV, K, V] float32 is updated in place; returns o [B, HV, V] in v's dtype.

    q, k [B, H, K] and v [B, HV, V] with any strides but the last; g, beta [B, HV]; each matrix of the state is contiguous. K a
    power of 2, V a multiple of 32. One launch: it can be captured in a CUDA graph.
    """
    (B, H, K), (HV, V) = q.shape, v.shape[1:]
    if state.shape != (B, HV, K, V) or state.stride()[2:] != (V, 1):
        raise ValueError(f"state is {tuple(state.shape)}, strides {state.stride()}; expected {(B, HV, K, V)}, contiguous")
    # Anything else is read in narrower pieces, slowly, and summed in another order.
    if state.data_ptr() % 16 or state.stride(0) % 16 or state.stride(1) % 16:
        raise ValueError(f"state starts at {state.data_ptr()}, strides {state.stride()}; expected multiples of 16")
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    config = config or (SMALL if state.nbytes <= SMALL_BYTES else CONFIG)
    o = torch.empty(B, HV, V, dtype=v.dtype, device=v.device)
    columns = min(config.columns, V & -V)
    _step[(B * HV * (V // columns),)](
        q, k, v, g, beta, state, o, scale,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *g.stride(), *beta.stride(), *state.stride()[:2],
        H, HV, K, V, columns, config.evict_first,
        num_warps=config.num_warps,
    )  # fmt: skip
    return o


# Alignment of the small inputs is not looked at: Triton would sum q . k in an order that depends on it.
@triton.jit(
    do_not_specialize=["q_row", "q_head", "k_row", "k_head", "v_row", "v_head", "g_row", "g_head", "beta_row", "beta_head"],
    do_not_specialize_on_alignment=["q", "k", "v", "g", "beta", "o"],
)
def _step(
    q, k, v, g, beta, state, o, scale,
    q_row, q_head, k_row, k_head, v_row, v_head, g_row, g_head, beta_row, beta_head, state_row, state_head,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, EVICT_FIRST: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0) % (V // BV)  # neighbours in time share rows of one state
    matrix = tl.program_id(0) // (V // BV)
    row, head = (matrix // HV).to(tl.int64), matrix % HV
    key_head = head // (HV // H)
    policy: tl.constexpr = "evict_first" if EVICT_FIRST else ""

    channels = tl.arange(0, K)
    columns = part * BV + tl.arange(0, BV)
    pointers = state + row * state_row + head * state_head + channels[:, None] * V + columns[None, :]
    # All loads before the first use of one: what each waits for, the memory, is waited for once.
    S = tl.load(pointers, eviction_policy=policy)
    k = tl.load(k + row * k_row + key_head * k_head + channels)
    q = tl.load(q + row * q_row + key_head * q_head + channels)
    v = tl.load(v + row * v_row + head * v_head + columns)
    g = tl.load(g + row * g_row + head * g_head)
    beta = tl.load(beta + row * beta_row + head * beta_head)
    k, q, v, g, beta = k.to(tl.float32), q.to(tl.float32), v.to(tl.float32), g.to(tl.float32), beta.to(tl.float32)
    decay, qk = tl.exp(g), tl.sum(q * k, 0)

    # Joined, both sums cross lanes and warps together.
    Sk, Sq = tl.split(tl.sum(tl.join(S * k[:, None], S * q[:, None]), 0))
    w = beta * (v - decay * Sk)
    tl.store(pointers, decay * S + k[:, None] * w[None, :], eviction_policy=policy)
    out = scale * (decay * Sq + qk * w)
    tl.store(o + (row * HV + head) * V + columns, out.to(o.dtype.element_ty))
