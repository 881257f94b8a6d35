"""GPU kernel of a layer's middle for one token of each row, in one launch: convolution, SiLU, L2 norm, gates, the rule's step.

As `triton_step` with what `triton_short_conv.conv_step` does before it: every program that needs a head's q and k convolves
them itself, which costs less than a launch. Nothing between is rounded. The window of the convolution is read and not moved:
other programs read it too (`triton_rows` moves it). The state and the window are read before the projection is there. Launcher
only.
"""

# mypy: disable-error-code=assignment
# Tuples grow in kernels.

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn.ops.triton_chain import begin, link, wait
from gdn.ops.triton_gates import log_decay, write_strength
from gdn.ops.triton_rows import Window, projected
from gdn.ops.triton_short_conv import EPS, sigmoid
from gdn.ops.triton_step import CONFIG, SMALL, SMALL_BYTES


def layer_step(
    window: Window,
    conv: Tensor,
    bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    H: int,
    allow_neg_eigval: bool,
    scale: float,
) -> Tensor:
    """o [B, HV, V] in the window's dtype, of a projection with columns q | k | v | a | b; `state` is updated in place.

    conv [W, D], bias [D], A_log, dt_bias [HV]; state [B, HV, K, V] float32, contiguous, K a power of 2, V a multiple of 32.
    """
    (B, HV, K, V), parts = state.shape, window.projected.parts
    if not state.is_contiguous() or state.data_ptr() % 16 or not window.window.is_contiguous():
        raise ValueError(f"state has strides {state.stride()}, the window {window.window.stride()}; expected contiguous ones")
    config = SMALL if state.nbytes <= SMALL_BYTES else CONFIG
    columns = min(config.columns, V & -V)
    o = torch.empty(B, HV, V, dtype=window.window.dtype, device=state.device)
    _layer_step[(B * HV * (V // columns),)](
        parts, window.window, conv, bias, A_log, dt_bias, state, o, scale, B, parts.shape[2],
        PARTS=len(parts), H=H, HV=HV, K=K, V=V, BV=columns, W=len(conv), DOUBLE=allow_neg_eigval,
        EVICT_FIRST=config.evict_first, num_warps=config.num_warps, **link(o.device),
    )  # fmt: skip
    return o


@triton.jit
def _taps(weight, bias, channel, W: tl.constexpr, D: tl.constexpr):
    taps = ()
    for i in tl.static_range(W):
        taps = taps + (tl.load(weight + i * D + channel).to(tl.float32),)
    if bias is not None:
        taps = taps + (tl.load(bias + channel).to(tl.float32),)
    return taps


@triton.jit
def _earlier(window, channel, W: tl.constexpr, D: tl.constexpr):
    inputs = ()
    for i in tl.static_range(W - 1):
        inputs = inputs + (tl.load(window + i * D + channel).to(tl.float32),)
    return inputs


@triton.jit
def _activated(earlier, newest, taps, W: tl.constexpr):
    """silu of the convolution, from the latest input to the oldest."""
    y = newest * taps[W - 1]
    for i in tl.static_range(W - 1):
        y = tl.fma(earlier[W - 2 - i], taps[W - 2 - i], y)
    if len(taps) > W:
        y = y + taps[W]
    return y * sigmoid(y)


@triton.jit(do_not_specialize=["rows", "stride"])
def _layer_step(
    parts, window, conv, bias, A_log, dt_bias, state, o, scale, rows, stride,
    PARTS: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    W: tl.constexpr, DOUBLE: tl.constexpr, EVICT_FIRST: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    begin(CHAINED)
    D: tl.constexpr = 2 * H * K + HV * V
    part = tl.program_id(0) % (V // BV)  # neighbours in time share rows of one state
    matrix = tl.program_id(0) // (V // BV)
    row, head = (matrix // HV).to(tl.int64), matrix % HV
    policy: tl.constexpr = "evict_first" if EVICT_FIRST else ""
    dtype: tl.constexpr = window.dtype.element_ty

    channels = tl.arange(0, K)
    columns = part * BV + tl.arange(0, BV)
    q_channel = head // (HV // H) * K + channels
    k_channel = H * K + q_channel
    v_channel = 2 * H * K + head * V + columns
    pointers = state + (row * HV + head) * (K * V) + channels[:, None] * V + columns[None, :]
    S = tl.load(pointers, eviction_policy=policy)
    inputs = window + row * ((W - 1) * D)
    q_before = _earlier(inputs, q_channel, W, D)
    k_before = _earlier(inputs, k_channel, W, D)
    v_before = _earlier(inputs, v_channel, W, D)
    q_taps = _taps(conv, bias, q_channel, W, D)
    k_taps = _taps(conv, bias, k_channel, W, D)
    v_taps = _taps(conv, bias, v_channel, W, D)
    rate, offset = tl.load(A_log + head).to(tl.float32), tl.load(dt_bias + head).to(tl.float32)
    wait(CHAINED)

    here, apart = parts + row * stride, rows.to(tl.int64) * stride
    q = projected(here, q_channel, apart, channels < K, PARTS, dtype)
    k = projected(here, k_channel, apart, channels < K, PARTS, dtype)
    v = projected(here, v_channel, apart, columns < V, PARTS, dtype)
    a, b = projected(here, D + head, apart, True, PARTS, dtype), projected(here, D + HV + head, apart, True, PARTS, dtype)
    q, k, v = _activated(q_before, q, q_taps, W), _activated(k_before, k, k_taps, W), _activated(v_before, v, v_taps, W)
    q = q * tl.rsqrt(tl.sum(q * q, 0) + EPS)
    k = k * tl.rsqrt(tl.sum(k * k, 0) + EPS)
    decay, beta, qk = tl.exp(log_decay(a, rate, offset)), write_strength(b, DOUBLE), tl.sum(q * k, 0)

    # Joined, both sums cross lanes and warps together.
    Sk, Sq = tl.split(tl.sum(tl.join(S * k[:, None], S * q[:, None]), 0))
    w = beta * (v - decay * Sk)
    tl.store(pointers, decay * S + k[:, None] * w[None, :], eviction_policy=policy)
    out = scale * (decay * Sq + qk * w)
    tl.store(o + (row * HV + head) * V + columns, out.to(o.dtype.element_ty))
