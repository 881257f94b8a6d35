"""GPU kernels of the gradients of `triton_short_conv.conv_forward`: norm, SiLU and convolution backward in one pass over proj.

What came before SiLU is computed again, as forward; nothing but proj is saved. A program walks its strips and W - 1 tokens
beyond their ends: an input's gradient comes from its own token and the next W - 1, so each is written W - 1 tokens later.
Gradients of the taps and the bias stay in registers to the end of the strips: one partial sum a program.
"""

# mypy: disable-error-code=assignment
# Tuples grow in kernels.

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn.ops.triton_short_conv import (
    EPS,
    contiguous,
    convolved,
    count_sequences,
    count_tiles,
    in_units,
    load,
    parameters,
    place_strips,
    restarted,
    sequence_of_tokens,
    sigmoid,
    state_row,
    strips_per_program,
    tokens_unrolled,
    window_before,
)

# Tokens a strip, warps, loads in flight: the fastest of 27 on an H200 (docs/log.md). The first two set the order in which
# gradients of weight and bias are summed; nothing else in the results depends on them.
BACKWARD_TOKENS, BACKWARD_WARPS, BACKWARD_STAGES = 128, 1, 3


def conv_backward(
    proj: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dproj: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Writes the gradient of proj's first D columns into dproj; returns d_weight [D, W], d_bias [D], d_initial_state.

    Arguments as of `conv_forward`; dq, dk [B, T, H, K]; dv [B, T, HV, V]; dproj [B, T, P], last stride 1, its other columns
    stay as they are. d_weight and d_bias are float32, d_initial_state [N, W - 1, D] of initial_state's dtype; without bias or
    initial_state theirs is None. Sums over tokens are in a fixed order: those of each program, then these.
    """
    (B, T, H, K), (HV, V), (D, W) = dq.shape, dv.shape[2:], weight.shape
    S, L = strips_per_program(K, BACKWARD_WARPS), BACKWARD_TOKENS
    per_row, N, tiles = triton.cdiv(T, L), count_sequences(B, cu_seqlens), count_tiles(H, K, HV * V)
    blocks = triton.cdiv(B * per_row, S)
    sequence, initial_state, weight = sequence_of_tokens(cu_seqlens, T), contiguous(initial_state), weight.contiguous()
    bias, dq, dk, dv = contiguous(bias), dq.contiguous(), dk.contiguous(), dv.contiguous()
    partials = proj.new_empty(blocks, W if bias is None else W + 1, D, dtype=torch.float32)
    d_state = None if initial_state is None else torch.empty_like(initial_state)
    if blocks:
        _conv_backward[(blocks * tiles,)](
            proj, weight, bias, initial_state, cu_seqlens, sequence, dq, dk, dv, dproj, partials,
            T, B * per_row, per_row, N, *in_units(*proj.stride()[:2], *dproj.stride()[:2]), H, HV * V,
            K=K, W=W, S=S, L=L, U=tokens_unrolled(W), STAGES=BACKWARD_STAGES, num_warps=BACKWARD_WARPS,
        )  # fmt: skip
    if d_state is not None and d_state.numel():
        _conv_backward_state[(triton.cdiv(N, S) * tiles,)](
            proj, weight, bias, initial_state, cu_seqlens, dq, dk, dv, d_state,
            T, N, *in_units(*proj.stride()[:2]), H, HV * V, K=K, W=W, S=S, num_warps=BACKWARD_WARPS,
        )  # fmt: skip
    d = partials.sum(0)
    return d[:W].t().contiguous(), None if bias is None else d[W].clone(), d_state


@triton.jit
def _activated_backward(y, d, NORMALISE: tl.constexpr):
    """The gradient of y for that of `_activated(y)`, d; zero where d's row is."""
    gate = sigmoid(y)
    s = y * gate
    if NORMALISE:
        scale = tl.rsqrt(tl.sum(s * s, 1) + EPS)
        # Rows too long for float32's squares have scale 0 and a gradient of 0, though their product with d may overflow.
        along = tl.where(scale > 0.0, tl.sum(s * d, 1) * scale, 0.0) * scale
        d = scale[:, None] * (d - s * along[:, None])
    return d * tl.fma(s, 1.0 - gate, gate)


@triton.jit
def _backward_strips(
    proj, weight, bias, initial_state, cu_seqlens, sequence, d_out, out_stride, out_column, dproj, partials, tile, block,
    T, strips, per_row, N, stride_b, stride_t, dproj_stride_b, dproj_stride_t, D,
    K: tl.constexpr, W: tl.constexpr, S: tl.constexpr, L: tl.constexpr, U: tl.constexpr, STAGES: tl.constexpr,
    NORMALISE: tl.constexpr,
):  # fmt: skip
    channel = tile * K + tl.arange(0, K)
    exists = channel < D
    row, first, end, n, start = place_strips(block * S + tl.arange(0, S), strips, per_row, T, cu_seqlens, sequence, N, L)
    row = row.to(tl.int64)
    x = proj + (row * stride_b + first.to(tl.int64) * stride_t)[:, None] + channel[None, :]
    d_out = d_out + ((row * T + first) * out_stride)[:, None] + (out_column + tl.arange(0, K))[None, :]
    dx = dproj + (row * dproj_stride_b + (first - (W - 1)).to(tl.int64) * dproj_stride_t)[:, None] + channel[None, :]
    taps = parameters(weight, bias, channel, exists, W)
    window = window_before(x, stride_t, first, start, end, n, initial_state, channel, exists, D, W)
    d_taps, pending = (), ()  # pending[i]: of the gradient of the input i + 1 tokens ago, what is known by now
    for _i in tl.static_range(W):
        d_taps = d_taps + (tl.zeros([S, K], tl.float32),)
    for _i in tl.static_range(W - 1):
        pending = pending + (tl.zeros([S, K], tl.float32),)
    d_offset = tl.zeros([S, K], tl.float32)
    reach = tl.full([S], W, tl.int32)  # tokens back to the start of the sequence, or more, as far as this strip reaches
    for j in tl.range(0, L + U, U, num_stages=STAGES):
        for u in tl.static_range(U):
            t = j + u
            inside = first + t < end
            current = load(x + u * stride_t, inside, exists)
            d = load(d_out + u * out_stride, inside, exists)
            if sequence is not None:
                now = tl.minimum(tl.load(sequence + first + t, mask=inside, other=0), N - 1)
                restart = inside & (now != n)
                window = restarted(window, restart, initial_state, now, channel, exists, D, W)
                reach = tl.where(restart, 0, reach + 1)
                n = now
            d = _activated_backward(convolved(window, current, taps, W), d, NORMALISE)

            # Tokens after the strip, t >= L, are here for the gradients of its last inputs only.
            counted = tl.where(t < L, d, 0.0)
            sums = ()
            for i in tl.static_range(W - 1):
                sums = sums + (tl.fma(counted, window[i], d_taps[i]),)
            d_taps = sums + (tl.fma(counted, current, d_taps[W - 1]),)
            d_offset += counted

            gradients = (d * taps[W - 1],)
            for i in tl.static_range(W - 1):
                back = d
                if sequence is not None:
                    back = tl.where((reach > i)[:, None], d, 0.0)
                gradients = gradients + (tl.fma(back, taps[W - 2 - i], pending[i]),)
            complete = (t >= W - 1) & (t < L + W - 1) & (first + t - (W - 1) < end)
            tl.store(
                dx + u * dproj_stride_t, gradients[W - 1].to(dx.dtype.element_ty), mask=complete[:, None] & exists[None, :]
            )
            pending = gradients[: W - 1]
            window = (window + (current,))[1:]
        x += U * stride_t
        d_out += U * out_stride
        dx += U * dproj_stride_t

    sums = d_taps
    if bias is not None:
        sums = sums + (d_offset,)
    partial = partials + (block * len(sums)).to(tl.int64) * D + channel
    for i in tl.static_range(len(sums)):
        tl.store(partial + i * D, tl.sum(sums[i], 0), mask=exists)


@triton.jit(do_not_specialize=["T", "strips", "per_row", "N", "stride_b", "stride_t", "dproj_stride_b", "dproj_stride_t"])
def _conv_backward(
    proj, weight, bias, initial_state, cu_seqlens, sequence, dq, dk, dv, dproj, partials,
    T, strips, per_row, N, stride_b, stride_t, dproj_stride_b, dproj_stride_t, UNIT: tl.constexpr, H, values,
    K: tl.constexpr, W: tl.constexpr, S: tl.constexpr, L: tl.constexpr, U: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    stride_b, stride_t = stride_b.to(tl.int64) * UNIT, stride_t.to(tl.int64) * UNIT
    dproj_stride_b, dproj_stride_t = dproj_stride_b.to(tl.int64) * UNIT, dproj_stride_t.to(tl.int64) * UNIT
    tiles = 2 * H + tl.cdiv(values, K)
    tile, block = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    D = 2 * H * K + values
    if tile < 2 * H:
        d_out = dq
        if tile >= H:
            d_out = dk
        _backward_strips(
            proj, weight, bias, initial_state, cu_seqlens, sequence, d_out, H * K, (tile % H) * K, dproj, partials,
            tile, block, T, strips, per_row, N, stride_b, stride_t, dproj_stride_b, dproj_stride_t, D,
            K, W, S, L, U, STAGES, True,
        )  # fmt: skip
    else:
        _backward_strips(
            proj, weight, bias, initial_state, cu_seqlens, sequence, dv, values, (tile - 2 * H) * K, dproj, partials,
            tile, block, T, strips, per_row, N, stride_b, stride_t, dproj_stride_b, dproj_stride_t, D,
            K, W, S, L, U, STAGES, False,
        )  # fmt: skip


@triton.jit
def _state_strips(
    proj, weight, bias, initial_state, cu_seqlens, d_out, out_stride, out_column, d_state, tile, block,
    T, N, stride_b, stride_t, D, K: tl.constexpr, W: tl.constexpr, S: tl.constexpr, NORMALISE: tl.constexpr,
):  # fmt: skip
    channel = tile * K + tl.arange(0, K)
    exists = channel < D
    n = block * S + tl.arange(0, S)
    if cu_seqlens is None:
        row, start, end = n.to(tl.int64), tl.zeros_like(n), tl.where(n < N, T, 0)
    else:
        row = tl.zeros([S], tl.int64)
        start = tl.load(cu_seqlens + n, mask=n < N, other=0)
        end = tl.load(cu_seqlens + n + 1, mask=n < N, other=0)
    x = proj + (row * stride_b + start.to(tl.int64) * stride_t)[:, None] + channel[None, :]
    d_out = d_out + ((row * T + start) * out_stride)[:, None] + (out_column + tl.arange(0, K))[None, :]
    taps = parameters(weight, bias, channel, exists, W)
    window, gradients = (), ()
    for i in tl.static_range(W - 1):
        window = window + (state_row(initial_state, n, i, n < N, channel, exists, D, W),)
        gradients = gradients + (tl.zeros([S, K], tl.float32),)
    for j in tl.static_range(W - 1):
        inside = start + j < end
        current = load(x + j * stride_t, inside, exists)
        d = load(d_out + j * out_stride, inside, exists)
        d = _activated_backward(convolved(window, current, taps, W), d, NORMALISE)
        sums = gradients[:j]  # the state's first j rows are out of token j's sight
        for i in tl.static_range(j, W - 1):
            sums = sums + (tl.fma(d, taps[i - j], gradients[i]),)
        gradients = sums
        window = (window + (current,))[1:]
    target = d_state + (n.to(tl.int64) * (W - 1) * D)[:, None] + channel[None, :]
    for i in tl.static_range(W - 1):
        tl.store(target + i * D, gradients[i].to(d_state.dtype.element_ty), mask=(n < N)[:, None] & exists[None, :])


@triton.jit(do_not_specialize=["T", "N", "stride_b", "stride_t"])
def _conv_backward_state(
    proj, weight, bias, initial_state, cu_seqlens, dq, dk, dv, d_state, T, N, stride_b, stride_t, UNIT: tl.constexpr, H, values,
    K: tl.constexpr, W: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    stride_b, stride_t = stride_b.to(tl.int64) * UNIT, stride_t.to(tl.int64) * UNIT
    tiles = 2 * H + tl.cdiv(values, K)
    tile, block = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    D = 2 * H * K + values
    if tile < 2 * H:
        d_out = dq
        if tile >= H:
            d_out = dk
        _state_strips(
            proj, weight, bias, initial_state, cu_seqlens, d_out, H * K, (tile % H) * K, d_state, tile, block,
            T, N, stride_b, stride_t, D, K, W, S, True,
        )  # fmt: skip
    else:
        _state_strips(
            proj, weight, bias, initial_state, cu_seqlens, dv, values, (tile - 2 * H) * K, d_state, tile, block,
            T, N, stride_b, stride_t, D, K, W, S, False,
        )  # fmt: skip
