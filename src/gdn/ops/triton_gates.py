"""GPU kernels of the two gates: `gates.decay_gate` and `gates.beta_gate` of columns of a projection, in one launch each way.

Launchers only; autograd and checks are elsewhere. Everything is float32; only a, b, da and db have the projection's dtype.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Not yet measured: (token, head) pairs a program, warps.
BLOCK = 1024
NUM_WARPS = 4

# A decay beyond these is none the less exp(g) = 0; within them products with gradients and sums over tokens stay finite.
_LARGEST = tl.constexpr(1e30)
_LARGEST_A_LOG = tl.constexpr(60.0)


def gates_forward(
    proj: Tensor, column_a: int, column_b: int, A_log: Tensor, dt_bias: Tensor, allow_neg_eigval: bool
) -> tuple[Tensor, Tensor]:
    """g = -exp(A_log) * softplus(a + dt_bias) and beta = sigmoid(b), doubled if allow_neg_eigval: [B, T, HV] float32 each.

    proj [B, T, P]: a and b are its HV columns from column_a and column_b on; its last stride is 1. A_log, dt_bias [HV], any
    float dtype. Finite for all finite inputs: g stops at -1e30.
    """
    (B, T, _), HV = proj.shape, A_log.numel()
    g, beta = (proj.new_empty(B, T, HV, dtype=torch.float32) for _ in range(2))
    grid, block_t, block_hv = _grid(proj, HV)
    if grid:
        _gates_forward[(grid,)](
            proj, A_log.contiguous(), dt_bias.contiguous(), g, beta, B * T, T, column_a, column_b, *proj.stride()[:2],
            HV=HV, BLOCK_T=block_t, BLOCK_HV=block_hv, DOUBLE=allow_neg_eigval, num_warps=NUM_WARPS,
        )  # fmt: skip
    return g, beta


def gates_backward(
    proj: Tensor,
    column_a: int,
    column_b: int,
    A_log: Tensor,
    dt_bias: Tensor,
    allow_neg_eigval: bool,
    dg: Tensor,
    dbeta: Tensor,
    dproj: Tensor,
) -> tuple[Tensor, Tensor]:
    """Writes the gradients of a and b into dproj's columns; returns dA_log, ddt_bias [HV] float32.

    dg, dbeta [B, T, HV]; dproj [B, T, P], last stride 1, its other columns stay as they are. Sums over tokens are in a
    fixed order: those of each program, then these.
    """
    (B, T, _), HV = proj.shape, A_log.numel()
    grid, block_t, block_hv = _grid(proj, HV)
    partials = proj.new_empty(grid, 2, HV, dtype=torch.float32)
    if grid:
        _gates_backward[(grid,)](
            proj, A_log.contiguous(), dt_bias.contiguous(), dg.contiguous(), dbeta.contiguous(), dproj, partials,
            B * T, T, column_a, column_b, *proj.stride()[:2], *dproj.stride()[:2],
            HV=HV, BLOCK_T=block_t, BLOCK_HV=block_hv, DOUBLE=allow_neg_eigval, num_warps=NUM_WARPS,
        )  # fmt: skip
    return partials[:, 0].sum(0), partials[:, 1].sum(0)


def _grid(proj: Tensor, HV: int) -> tuple[int, int, int]:
    """Programs, and the tokens and value heads (a power of two) of each."""
    block_hv = triton.next_power_of_2(HV)
    block_t = max(1, BLOCK // block_hv)
    return triton.cdiv(proj.shape[0] * proj.shape[1], block_t), block_t, block_hv


@triton.jit
def log_decay(a, A_log, dt_bias):
    """g, finite for finite float32 arguments."""
    x = a + dt_bias
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    # log(1 + e) with all digits for small e: the rounding of u cancels in e / (u - 1).
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))
    softplus = tl.minimum(tl.maximum(x, 0.0) + log1p, _LARGEST)
    return tl.maximum(-tl.exp(tl.minimum(A_log, _LARGEST_A_LOG)) * softplus, -_LARGEST)


@triton.jit
def write_strength(b, DOUBLE: tl.constexpr):
    beta = tl.sigmoid(b)
    if DOUBLE:
        beta = 2.0 * beta
    return beta


@triton.jit
def _place(T, tokens, HV: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_HV: tl.constexpr):
    """Of this program's [BLOCK_T, BLOCK_HV] tile: number, row and place of its tokens, its value heads, what of it exists."""
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    head = tl.arange(0, BLOCK_HV)[None, :]
    return token, token // T, token % T, head, (token < tokens) & (head < HV)


@triton.jit(do_not_specialize=["tokens", "T"])
def _gates_forward(
    proj, A_log, dt_bias, g, beta, tokens, T, column_a, column_b, stride_b, stride_t,
    HV: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_HV: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    token, row, t, head, inside = _place(T, tokens, HV, BLOCK_T, BLOCK_HV)
    source = proj + row * stride_b + t * stride_t + head
    a = tl.load(source + column_a, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + column_b, mask=inside, other=0.0).to(tl.float32)
    rate = tl.load(A_log + head, mask=head < HV, other=0.0).to(tl.float32)
    offset = tl.load(dt_bias + head, mask=head < HV, other=0.0).to(tl.float32)
    tl.store(g + token * HV + head, log_decay(a, rate, offset), mask=inside)
    tl.store(beta + token * HV + head, write_strength(b, DOUBLE), mask=inside)


@triton.jit(do_not_specialize=["tokens", "T"])
def _gates_backward(
    proj, A_log, dt_bias, dg, dbeta, dproj, partials,
    tokens, T, column_a, column_b, stride_b, stride_t, dproj_stride_b, dproj_stride_t,
    HV: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_HV: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    token, row, t, head, inside = _place(T, tokens, HV, BLOCK_T, BLOCK_HV)
    source = proj + row * stride_b + t * stride_t + head
    target = dproj + row * dproj_stride_b + t * dproj_stride_t + head
    a = tl.load(source + column_a, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + column_b, mask=inside, other=0.0).to(tl.float32)
    rate = tl.load(A_log + head, mask=head < HV, other=0.0).to(tl.float32)
    offset = tl.load(dt_bias + head, mask=head < HV, other=0.0).to(tl.float32)
    dg = tl.load(dg + token * HV + head, mask=inside, other=0.0).to(tl.float32)
    dbeta = tl.load(dbeta + token * HV + head, mask=inside, other=0.0).to(tl.float32)

    da = -dg * tl.exp(tl.minimum(rate, _LARGEST_A_LOG)) * tl.sigmoid(a + offset)
    e = tl.exp(-tl.abs(b))
    db = dbeta * e / ((1.0 + e) * (1.0 + e))  # sigmoid(b) * (1 - sigmoid(b)), without 1 - nearly 1
    if DOUBLE:
        db = 2.0 * db
    tl.store(target + column_a, da.to(dproj.dtype.element_ty), mask=inside)
    tl.store(target + column_b, db.to(dproj.dtype.element_ty), mask=inside)

    heads = tl.arange(0, BLOCK_HV)
    partial = partials + tl.program_id(0).to(tl.int64) * 2 * HV + heads
    tl.store(partial, tl.sum(dg * log_decay(a, rate, offset), 0), mask=heads < HV)  # d g / d A_log = g
    tl.store(partial + HV, tl.sum(da, 0), mask=heads < HV)
