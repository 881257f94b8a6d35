"""GPU kernels of what lies between the layer's projection and the rule: convolution, SiLU, L2 norm and the split into q, k, v.

A program takes one tile of K columns: a head of q or k, so that the norm's sums are its own, or the next K columns of v. It
walks strips of consecutive tokens, one strip a row of its [S, K] tiles, with the last W - 1 inputs in registers (the window):
every input is read once, the W - 1 before each strip apart. A token's arithmetic is the same wherever its strip, batch or
neighbours lie. Everything is computed in float32. Packed boundaries are read on the device; no launcher waits for it.
Launchers only, forward and step: `triton_short_conv_backward` has the gradients; autograd and checks are elsewhere.

In shape comments D = 2 H K + HV V, the columns q | k | v; taps[i] belongs to the input W - 1 - i tokens ago.
"""

# mypy: disable-error-code=assignment
# Tuples grow in kernels.

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn.ops.triton_gates import log_decay, write_strength

# Tokens a strip, warps, loads in flight: the fastest of 27 on an H200 (docs/log.md). Results do not depend on them.
FORWARD_TOKENS, FORWARD_WARPS, FORWARD_STAGES = 64, 1, 3
STEP_WARPS = 1
_CHANNELS_PER_WARP = 256  # 8 a thread: 16 bytes of bfloat16

EPS = tl.constexpr(1e-6)  # norm.l2_norm's


def conv_forward(
    proj: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    H: int,
    K: int,
    HV: int,
    V: int,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k [B, T, H, K] = l2_norm(silu(conv(.) + bias)), v [B, T, HV, V] = silu(conv(.) + bias), contiguous, in proj's dtype.

    proj [B, T, P >= D], last stride 1 (16-byte accesses want strides that are multiples of 16); weight [D, W]; bias [D];
    initial_state [N, W - 1, D], the inputs before the first token, zeros if None; cu_seqlens int32 [N + 1] on the device, then
    B == 1. K is a power of two.
    """
    (B, T, _), W = proj.shape, weight.shape[1]
    q, k, v = (proj.new_empty(B, T, heads, size) for heads, size in ((H, K), (H, K), (HV, V)))
    S, L = strips_per_program(K, FORWARD_WARPS), FORWARD_TOKENS
    per_row = triton.cdiv(T, L)
    grid = triton.cdiv(B * per_row, S) * count_tiles(H, K, HV * V)
    if grid:
        sequence = sequence_of_tokens(cu_seqlens, T)
        _conv_forward[(grid,)](
            proj, weight.contiguous(), contiguous(bias), contiguous(initial_state), cu_seqlens, sequence, q, k, v,
            T, B * per_row, per_row, count_sequences(B, cu_seqlens), *in_units(*proj.stride()[:2]), H, HV * V,
            K=K, W=W, S=S, L=L, U=tokens_unrolled(W), STAGES=FORWARD_STAGES, num_warps=FORWARD_WARPS,
        )  # fmt: skip
    return q, k, v


def conv_final_state(proj: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None, W: int, D: int) -> Tensor:
    """Each sequence's last W - 1 inputs [N, W - 1, D] in proj's dtype, from initial_state (zeros if None) on if it is shorter.

    proj [B, T, P >= D]; initial_state [N, W - 1, D]; cu_seqlens int32 [N + 1], then B == 1.
    """
    T, carried, N = proj.shape[1], W - 1, count_sequences(proj.shape[0], cu_seqlens)
    x = proj[..., :D]
    state = proj.new_zeros(N, carried, D) if initial_state is None else initial_state.to(proj.dtype)
    if cu_seqlens is None or T == 0:
        return torch.cat([state[:, min(T, carried) :], x[:, max(T - carried, 0) :]], dim=1) if T else state.clone()
    rows = torch.arange(carried, device=proj.device)
    starts, ends = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    position = ends - carried + rows  # [N, W - 1] in proj; before the sequence's start it is a row of the state
    earlier = (position - starts + carried).clamp(0, max(carried - 1, 0))
    inherited = state.gather(1, earlier.unsqueeze(-1).expand(N, carried, D))
    return torch.where((position < starts).unsqueeze(-1), inherited, x[0, position.clamp_min(0)])


def conv_step(
    proj_row: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    allow_neg_eigval: bool,
    H: int,
    K: int,
    HV: int,
    V: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One token of each row: q, k [B, H, K], v [B, HV, V] in proj_row's dtype and g, beta [B, HV] float32, in one launch.

    proj_row [B, P], last stride 1: columns q | k | v | a | b and any others; weight [D, W]; bias [D]; A_log, dt_bias [HV].
    conv_state [B, W - 1, D], any float dtype, its last stride 1, is moved on in place. The host does nothing but launch:
    this can be captured in a graph.
    """
    B = proj_row.shape[0]
    q, k, v = (proj_row.new_empty(B, heads, size) for heads, size in ((H, K), (H, K), (HV, V)))
    g, beta = (proj_row.new_empty(B, HV, dtype=torch.float32) for _ in range(2))
    if B:
        _conv_step[(B * (count_tiles(H, K, HV * V) + 1),)](
            proj_row, weight.contiguous(), contiguous(bias), conv_state, A_log.contiguous(), dt_bias.contiguous(),
            q, k, v, g, beta, *in_units(proj_row.stride(0), *conv_state.stride()[:2]), H, HV * V,
            K=K, W=weight.shape[1], HV=HV, BLOCK_HV=triton.next_power_of_2(HV), DOUBLE=allow_neg_eigval, num_warps=STEP_WARPS,
        )  # fmt: skip
    return q, k, v, g, beta


def strips_per_program(K: int, num_warps: int) -> int:
    return max(1, num_warps * _CHANNELS_PER_WARP // K)


def tokens_unrolled(W: int) -> int:
    """Tokens a loop step takes: W - 1 at least, or the window outlives one and Triton does not prefetch the next's loads."""
    return 4 if W <= 5 else 8


def in_units(*strides: int) -> tuple[int, ...]:
    """Strides in units of 8 elements, and 8; or the strides, and 1. Triton then knows what it may load 16 bytes at a time.

    By itself it looks for multiples of 16 only: a projection of 3,080 columns would be read in pieces of 2 bytes.
    """
    unit = 1 if any(stride % 8 for stride in strides) else 8
    return *(stride // unit for stride in strides), unit


def count_tiles(H: int, K: int, values: int) -> int:
    return 2 * H + triton.cdiv(values, K)


def count_sequences(B: int, cu_seqlens: Tensor | None) -> int:
    return B if cu_seqlens is None else len(cu_seqlens) - 1


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def sequence_of_tokens(cu_seqlens: Tensor | None, T: int) -> Tensor | None:
    """The sequence of each token, int32 [T]; the right one of those that start there if others are empty."""
    if cu_seqlens is None:
        return None
    tokens = torch.arange(T, device=cu_seqlens.device, dtype=torch.int32)
    return torch.searchsorted(cu_seqlens[1:], tokens, right=True, out_int32=True)


@triton.jit
def load(pointers, rows, columns):
    """[S, K] in float32, zeros where rows [S] or columns [K] are masked."""
    return tl.load(pointers, mask=rows[:, None] & columns[None, :], other=0.0).to(tl.float32)


@triton.jit
def parameters(weight, bias, channel, exists, W: tl.constexpr):
    """W taps and, if there is one, the bias of K channels, [1, K] float32 each."""
    taps = ()
    for i in tl.static_range(W):
        taps = taps + (tl.load(weight + channel * W + i, mask=exists, other=0.0).to(tl.float32)[None, :],)
    if bias is not None:
        taps = taps + (tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)[None, :],)
    return taps


@triton.jit
def state_row(initial_state, n, i, rows, channel, exists, D, W: tl.constexpr):
    """Row i [S] of sequence n [S]'s initial state, [S, K]."""
    return load(initial_state + ((n.to(tl.int64) * (W - 1) + i) * D)[:, None] + channel[None, :], rows, exists)


@triton.jit
def window_before(x, stride_t, first, start, end, n, initial_state, channel, exists, D, W: tl.constexpr):
    """The W - 1 inputs before the tokens `first` [S] of sequences n that begin at `start`; x [S, K] points at `first`'s row."""
    window = ()
    for i in tl.static_range(W - 1):
        row = first - start - (W - 1 - i)  # in the sequence
        inputs = load(x + (i - (W - 1)) * stride_t, (row >= 0) & (first < end), exists)
        if initial_state is not None:
            earlier = (row < 0) & (first < end)
            inputs += state_row(initial_state, n, row + (W - 1), earlier, channel, exists, D, W)  # one of both is 0
        window = window + (inputs,)
    return window


@triton.jit
def restarted(window, restart, initial_state, n, channel, exists, D, W: tl.constexpr):
    """The window before each token, where `restart` [S] that of its sequence n: the initial state, or zeros."""
    fresh = ()
    for i in tl.static_range(W - 1):
        if initial_state is None:
            fresh = fresh + (tl.where(restart[:, None], 0.0, window[i]),)
        else:
            own = state_row(initial_state, n, i, restart, channel, exists, D, W)
            fresh = fresh + (tl.where(restart[:, None], own, window[i]),)
    return fresh


@triton.jit
def convolved(window, x, taps, W: tl.constexpr):
    """The convolution before SiLU, from the latest input to the oldest."""
    y = x * taps[W - 1]
    for i in tl.static_range(W - 1):
        y = tl.fma(window[W - 2 - i], taps[W - 2 - i], y)
    if len(taps) > W:
        y = y + taps[W]
    return y


@triton.jit
def sigmoid(x):
    """Within 3e-7, relative; of the ways to write it that which compiles to the fewest instructions, 5."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


@triton.jit
def _activated(y, NORMALISE: tl.constexpr):
    """silu(y) [S, K], over its rows' norms."""
    y = y * sigmoid(y)
    if NORMALISE:
        y = y * tl.rsqrt(tl.sum(y * y, 1) + EPS)[:, None]
    return y


@triton.jit
def place_strips(strip, strips, per_row, T, cu_seqlens, sequence, N, L: tl.constexpr):
    """Of strips [S]: row of the batch, first token and end of tokens there, the first token's sequence and its start."""
    row = strip // per_row
    first = (strip % per_row) * L
    end = tl.where(strip < strips, T, 0)  # no token of a strip that does not exist is inside
    if sequence is None:
        n = row
        start = tl.zeros_like(first)
    else:
        n = tl.minimum(tl.load(sequence + first, mask=first < end, other=0), N - 1)
        start = tl.load(cu_seqlens + n)
    return row, first, end, n, start


@triton.jit
def _forward_strips(
    proj, weight, bias, initial_state, cu_seqlens, sequence, out, out_stride, out_column, tile, block,
    T, strips, per_row, N, stride_b, stride_t, D,
    K: tl.constexpr, W: tl.constexpr, S: tl.constexpr, L: tl.constexpr, U: tl.constexpr, STAGES: tl.constexpr,
    NORMALISE: tl.constexpr,
):  # fmt: skip
    channel = tile * K + tl.arange(0, K)
    exists = channel < D
    row, first, end, n, start = place_strips(block * S + tl.arange(0, S), strips, per_row, T, cu_seqlens, sequence, N, L)
    row = row.to(tl.int64)
    x = proj + (row * stride_b + first.to(tl.int64) * stride_t)[:, None] + channel[None, :]
    out = out + ((row * T + first) * out_stride)[:, None] + (out_column + tl.arange(0, K))[None, :]
    taps = parameters(weight, bias, channel, exists, W)
    window = window_before(x, stride_t, first, start, end, n, initial_state, channel, exists, D, W)
    for j in tl.range(0, L, U, num_stages=STAGES):
        for u in tl.static_range(U):
            inside = first + j + u < end
            current = load(x + u * stride_t, inside, exists)
            if sequence is not None:
                now = tl.minimum(tl.load(sequence + first + j + u, mask=inside, other=0), N - 1)
                window = restarted(window, inside & (now != n), initial_state, now, channel, exists, D, W)
                n = now
            y = _activated(convolved(window, current, taps, W), NORMALISE)
            tl.store(out + u * out_stride, y.to(out.dtype.element_ty), mask=inside[:, None] & exists[None, :])
            window = (window + (current,))[1:]
        x += U * stride_t
        out += U * out_stride


@triton.jit(do_not_specialize=["T", "strips", "per_row", "N", "stride_b", "stride_t"])
def _conv_forward(
    proj, weight, bias, initial_state, cu_seqlens, sequence, q, k, v,
    T, strips, per_row, N, stride_b, stride_t, UNIT: tl.constexpr, H, values,
    K: tl.constexpr, W: tl.constexpr, S: tl.constexpr, L: tl.constexpr, U: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    stride_b, stride_t = stride_b.to(tl.int64) * UNIT, stride_t.to(tl.int64) * UNIT
    tiles = 2 * H + tl.cdiv(values, K)
    tile, block = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    D = 2 * H * K + values
    if tile < 2 * H:
        out = q
        if tile >= H:
            out = k
        _forward_strips(
            proj, weight, bias, initial_state, cu_seqlens, sequence, out, H * K, (tile % H) * K, tile, block,
            T, strips, per_row, N, stride_b, stride_t, D, K, W, S, L, U, STAGES, True,
        )  # fmt: skip
    else:
        _forward_strips(
            proj, weight, bias, initial_state, cu_seqlens, sequence, v, values, (tile - 2 * H) * K, tile, block,
            T, strips, per_row, N, stride_b, stride_t, D, K, W, S, L, U, STAGES, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["stride_b", "state_stride_b", "state_stride_w"])
def _conv_step(
    proj, weight, bias, state, A_log, dt_bias, q, k, v, g, beta, stride_b, state_stride_b, state_stride_w,
    UNIT: tl.constexpr, H, values,
    K: tl.constexpr, W: tl.constexpr, HV: tl.constexpr, BLOCK_HV: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    tiles = 2 * H + tl.cdiv(values, K)
    tile, row = tl.program_id(0) % (tiles + 1), (tl.program_id(0) // (tiles + 1)).to(tl.int64)
    D = 2 * H * K + values
    state_stride_b, state_stride_w = state_stride_b.to(tl.int64) * UNIT, state_stride_w.to(tl.int64) * UNIT
    proj = proj + row * (stride_b.to(tl.int64) * UNIT)
    if tile == tiles:
        head = tl.arange(0, BLOCK_HV)
        a = tl.load(proj + D + head, mask=head < HV, other=0.0).to(tl.float32)
        b = tl.load(proj + D + HV + head, mask=head < HV, other=0.0).to(tl.float32)
        rate = tl.load(A_log + head, mask=head < HV, other=0.0).to(tl.float32)
        offset = tl.load(dt_bias + head, mask=head < HV, other=0.0).to(tl.float32)
        tl.store(g + row * HV + head, log_decay(a, rate, offset), mask=head < HV)
        tl.store(beta + row * HV + head, write_strength(b, DOUBLE), mask=head < HV)
    else:
        channel = tile * K + tl.arange(0, K)
        exists = channel < D
        there = tl.full([1], 1, tl.int1)
        mask = exists[None, :]
        rows = state + row * state_stride_b + channel[None, :]
        current = load(proj + channel[None, :], there, exists)
        window = ()
        for i in tl.static_range(W - 1):
            window = window + (load(rows + i * state_stride_w, there, exists),)
        taps = parameters(weight, bias, channel, exists, W)
        y = convolved(window, current, taps, W)
        window = (window + (current,))[1:]
        tl.debug_barrier()  # all rows are read before any is written, whichever threads do it
        for i in tl.static_range(W - 1):
            tl.store(rows + i * state_stride_w, window[i].to(state.dtype.element_ty), mask=mask)
        if tile < 2 * H:
            out = q + row * H * K + (tile % H) * K
            if tile >= H:
                out = k + row * H * K + (tile % H) * K
            y = _activated(y, True)
            tl.store(out + tl.arange(0, K)[None, :], y.to(q.dtype.element_ty), mask=mask)
        else:
            out = v + row * values + (tile - 2 * H) * K
            tl.store(out + tl.arange(0, K)[None, :], _activated(y, False).to(v.dtype.element_ty), mask=mask)
