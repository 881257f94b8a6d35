"""A whole residual block in training as one torch.library operator each way, for GPUs: every tensor is made once.

What it computes is `model.lm.Block` without a state. Weights are joined and cast once a call; the mixer's input projections
are one product, and so are gate and up. Weights' gradients come out of the products in the weights' dtype. Kept for the
backward is what a pass over memory cannot give back: residuals, the projection, what the rule keeps, gate and up. Outputs of
norms and SwiGLU are made again by the kernels that differentiate them; q and k by the convolution, unless `keep_keys`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn.ops.conv_rule import Heads
from gdn.ops.triton_conv_rule import fake_saved, run_backward, run_forward
from gdn.ops.triton_float8 import cast_rows, product
from gdn.ops.triton_norm import gated_norm_backward, gated_norm_forward, norm_backward, norm_forward, norm_forward_float8
from gdn.ops.triton_short_conv import conv_forward
from gdn.ops.triton_swiglu import swiglu_backward, swiglu_backward_float8, swiglu_forward, swiglu_forward_float8


class BlockWeights(NamedTuple):
    """A block's parameters, float: matrices [out, in] as nn.Linear has them; conv [D, W] and conv_bias [D] over q | k | v."""

    q: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    g: Tensor
    o: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    attn_norm: Tensor
    A_log: Tensor
    dt_bias: Tensor
    o_norm: Tensor
    mlp_norm: Tensor
    conv: Tensor
    conv_bias: Tensor | None


_MATRICES = BlockWeights._fields.index("attn_norm")  # so many come first


class _Joined(NamedTuple):
    """The matrices in the compute dtype, views of one buffer."""

    into: Tensor  # [P, hidden]: q | k | v | a | b | g
    o: Tensor  # [hidden, HV * V]
    gate_up: Tensor  # [2 F, hidden]
    down: Tensor  # [hidden, F]


def block(
    x: Tensor,
    weights: BlockWeights,
    heads: Heads,
    eps: float,
    allow_neg_eigval: bool,
    cu_seqlens: Tensor | None,
    *,
    keep_keys: bool,
    float8_ffn: bool = False,
) -> Tensor:
    """x [B, T, hidden] -> [B, T, hidden] in x's dtype, which is that of the matrix products; differentiable once.

    float8_ffn: those of the FFN in float8, but its weights' gradients; on a GPU for bfloat16 alone (`backend.float8_refusal`).
    """
    matrices, vectors = list(weights[:_MATRICES]), weights[_MATRICES:]
    switches = list(heads), eps, allow_neg_eigval, keep_keys, float8_ffn
    out: Tensor = _forward(x.contiguous(), matrices, *vectors, cu_seqlens, *switches)[0]
    return out


@torch.library.custom_op("gdn::block", mutates_args=())
def _forward(
    x: Tensor,
    matrices: list[Tensor],
    attn_norm: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    o_norm: Tensor,
    mlp_norm: Tensor,
    conv: Tensor,
    conv_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    heads: list[int],
    eps: float,
    allow_neg_eigval: bool,
    keep_keys: bool,
    float8_ffn: bool,
) -> list[Tensor]:
    """The result; then, for the backward, the joined weights, the residual between the halves, proj, gate | up, o and what
    `conv_rule_training` saves."""
    sizes = Heads(*heads)
    packed = x.new_empty(sum(matrix.numel() for matrix in matrices))
    torch._foreach_copy_(list(packed.split([matrix.numel() for matrix in matrices])), [w.reshape(-1) for w in matrices])
    joined = _views(packed, x.shape[-1], sizes, len(matrices[7]))
    normed, _, _ = norm_forward(x, None, attn_norm, eps)
    proj = normed @ joined.into.t()
    del normed
    q, k, rule = run_forward(
        proj, conv, conv_bias, A_log, dt_bias, None, None, cu_seqlens, sizes, allow_neg_eigval, for_backward=True
    )
    assert rule.X is not None and rule.states is not None
    branch = gated_norm_forward(rule.o, proj, sizes.columns, o_norm, eps).flatten(-2) @ joined.o.t()
    middle, gate_up, out = (_ffn_float8 if float8_ffn else _ffn)(x, branch, mlp_norm, eps, joined)
    del branch
    keys = [q, k] if keep_keys else [q.new_empty(0), q.new_empty(0)]
    return [out, packed, middle, proj, gate_up, rule.o, *keys, rule.X, rule.states, *rule.intra]


@_forward.register_fake
def _(
    x: Tensor,
    matrices: list[Tensor],
    attn_norm: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    o_norm: Tensor,
    mlp_norm: Tensor,
    conv: Tensor,
    conv_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    heads: list[int],
    eps: float,
    allow_neg_eigval: bool,
    keep_keys: bool,
    float8_ffn: bool,
) -> list[Tensor]:
    sizes = Heads(*heads)
    proj = x.new_empty(*x.shape[:2], sizes.columns + sizes.HV * sizes.V)
    q, X, states, A, gates = fake_saved(proj, cu_seqlens, sizes)
    packed, gate_up = x.new_empty(sum(w.numel() for w in matrices)), x.new_empty(*x.shape[:2], 2 * matrices[7].shape[0])
    keys = [q, q.clone()] if keep_keys else [q.new_empty(0), q.new_empty(0)]
    return [torch.empty_like(x), packed, torch.empty_like(x), proj, gate_up, X, *keys, X.clone(), states, A, A.clone(), gates]


@torch.library.custom_op("gdn::block_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    x: Tensor,
    attn_norm: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    o_norm: Tensor,
    mlp_norm: Tensor,
    conv: Tensor,
    conv_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: list[Tensor],
    heads: list[int],
    eps: float,
    allow_neg_eigval: bool,
    float8_ffn: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of the four joined matrices in `dtype`, and of the other weights in float32; an empty one for no bias."""
    sizes = Heads(*heads)
    packed, middle, proj, gate_up, o, q, k, *rule = saved
    joined = _views(packed, x.shape[-1], sizes, gate_up.shape[-1] // 2)

    d_normed, d_gate_up, d_down = (_ffn_backward_float8 if float8_ffn else _ffn_backward)(d_out, gate_up, joined, dtype)
    d_middle, d_mlp_norm = norm_backward(d_normed, middle, mlp_norm, eps, d_out)
    d_both = _weight_gradient(d_gate_up, d_normed, dtype)  # which holds what the norm made
    del d_gate_up, d_normed

    dy = (d_middle @ joined.o).view(o.shape)
    dproj = torch.empty_like(proj)
    do, d_o_norm = gated_norm_backward(dy, o, proj, sizes.columns, o_norm, eps, dproj)
    d_o = _weight_gradient(d_middle, dy.flatten(-2), dtype)
    del dy
    if not q.numel():
        keys = 2 * sizes.H * sizes.K
        bias = None if conv_bias is None else conv_bias[:keys]
        q, k, _ = conv_forward(proj, conv[:keys], bias, sizes.H, sizes.K, 0, sizes.V, None, cu_seqlens)
    d_conv, d_conv_bias, dA_log, d_dt_bias, _, _ = run_backward(
        proj, conv, conv_bias, A_log, dt_bias, None, cu_seqlens, sizes, allow_neg_eigval, [q, k, *rule], do, None, dproj,
        with_initial_state=False,
    )  # fmt: skip
    del do, q, k
    d_normed = dproj @ joined.into
    dx, d_attn_norm = norm_backward(d_normed, x, attn_norm, eps, d_middle)
    d_into = _weight_gradient(dproj, d_normed, dtype)
    d_conv_bias = d_conv.new_empty(0) if d_conv_bias is None else d_conv_bias
    return dx, d_into, d_o, d_both, d_down, d_attn_norm, dA_log, d_dt_bias, d_o_norm, d_mlp_norm, d_conv, d_conv_bias


@_backward.register_fake
def _(
    d_out: Tensor,
    x: Tensor,
    attn_norm: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    o_norm: Tensor,
    mlp_norm: Tensor,
    conv: Tensor,
    conv_bias: Tensor | None,
    cu_seqlens: Tensor | None,
    saved: list[Tensor],
    heads: list[int],
    eps: float,
    allow_neg_eigval: bool,
    float8_ffn: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    joined = _views(saved[0], x.shape[-1], Heads(*heads), saved[3].shape[-1] // 2)
    matrices = [matrix.new_empty(matrix.shape, dtype=dtype) for matrix in joined]
    vectors = [w.new_empty(w.shape, dtype=torch.float32) for w in (attn_norm, A_log, dt_bias, o_norm, mlp_norm, conv)]
    bias = conv.new_empty(0 if conv_bias is None else len(conv), dtype=torch.float32)
    into, o, both, down = matrices
    return torch.empty_like(x), into, o, both, down, *vectors, bias  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    x, matrices, *vectors, cu_seqlens, heads, eps, allow_neg_eigval, _, float8_ffn = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *vectors, cu_seqlens, *output[1:])
    ctx.arguments = heads, eps, allow_neg_eigval, float8_ffn, matrices[0].dtype
    ctx.matrices = [(tuple(matrix.shape), matrix.dtype) for matrix in matrices]
    ctx.vectors = [None if vector is None else vector.dtype for vector in vectors]


def _differentiate(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    tensors = ctx.saved_tensors
    x, *vectors, cu_seqlens = tensors[: 2 + len(ctx.vectors)]
    saved = list(tensors[2 + len(ctx.vectors) :])
    d_out = torch.zeros_like(x) if gradients[0] is None else gradients[0].contiguous()
    dx, into, o, both, down, *others = _backward(d_out, x, *vectors, cu_seqlens, saved, *ctx.arguments)
    rows = [shape[0] for shape, _ in ctx.matrices]
    matrices = [*into.split(rows[:6]), o, *both.split(rows[7:9]), down]
    matrices = [d.to(dtype) for d, (_, dtype) in zip(matrices, ctx.matrices)]
    others = [None if dtype is None else d.to(dtype) for d, dtype in zip(others, ctx.vectors)]
    return dx, matrices, *others, None, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)


def _ffn(x: Tensor, branch: Tensor, norm: Tensor, eps: float, joined: _Joined) -> tuple[Tensor, Tensor, Tensor]:
    """x + branch; gate | up of it; and the block's result."""
    normed, middle, out = norm_forward(x, branch, norm, eps)
    assert middle is not None and out is not None
    gate_up = normed @ joined.gate_up.t()
    del normed, branch
    out.flatten(0, 1).addmm_(swiglu_forward(gate_up).flatten(0, 1), joined.down.t())
    return middle, gate_up, out


def _ffn_float8(x: Tensor, branch: Tensor, norm: Tensor, eps: float, joined: _Joined) -> tuple[Tensor, Tensor, Tensor]:
    """The same."""
    normed, middle = norm_forward_float8(x, branch, norm, eps)
    gate_up = product(normed, cast_rows(joined.gate_up), x.dtype)
    del normed, branch
    out = product(swiglu_forward_float8(gate_up), cast_rows(joined.down), x.dtype)
    return middle, gate_up, out.add_(middle)  # by a pass of its own: a product by rows adds to nothing


def _ffn_backward(d_out: Tensor, gate_up: Tensor, joined: _Joined, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the normed input, of gate | up, and in dtype of down."""
    d_activated = d_out @ joined.down
    d_gate_up = swiglu_backward(d_activated, gate_up)
    d_down = _weight_gradient(d_out, d_activated, dtype)  # which holds what SwiGLU made
    del d_activated
    return d_gate_up @ joined.gate_up, d_gate_up, d_down


def _ffn_backward_float8(d_out: Tensor, gate_up: Tensor, joined: _Joined, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Weights' gradients are products of what bf16 holds: Hopper multiplies float8 along rows alone, and columns copied into
    rows cost what that would save. What is summed over tokens keeps its digits so."""
    down, both = (cast_rows(weight.t().contiguous()) for weight in (joined.down, joined.gate_up))
    d_activated = product(cast_rows(d_out), down, d_out.dtype)
    d_gate_up, narrow = swiglu_backward_float8(d_activated, gate_up)
    d_down = _weight_gradient(d_out, d_activated, dtype)
    del d_activated
    return product(narrow, both, d_out.dtype), d_gate_up, d_down


def _views(packed: Tensor, hidden: int, heads: Heads, F: int) -> _Joined:
    values = heads.HV * heads.V
    shapes = ((heads.columns + values, hidden), (hidden, values), (2 * F, hidden), (hidden, F))
    parts = packed.split([rows * columns for rows, columns in shapes])
    return _Joined(*(part.view(shape) for part, shape in zip(parts, shapes)))


def _weight_gradient(d: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """d^T x of [B, T, N] and [B, T, M], [N, M]; rounded once, to dtype."""
    d, x = d.flatten(0, 1).t(), x.flatten(0, 1)
    if dtype == torch.float32 and x.dtype != dtype and x.is_cuda:
        return torch.mm(d, x, out_dtype=dtype)
    return (d @ x).to(dtype)
