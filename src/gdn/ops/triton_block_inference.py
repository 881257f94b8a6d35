"""A whole residual block without gradients as one torch.library operator, for GPUs: prompts, evaluation.

A row of a product has the same bits however many rows there are (`row_product`); norms, gates, convolution and rule see one row
or one sequence by themselves. So a prompt has the same bits in any batch and cut anywhere on the rule's grid.
"""

import torch
from torch import Tensor

from gdn.ops.conv_rule import Heads
from gdn.ops.row_product import row_product
from gdn.ops.triton_block import BlockWeights
from gdn.ops.triton_conv_rule import run_forward
from gdn.ops.triton_norm import gated_norm_forward, norm_forward
from gdn.ops.triton_short_conv import conv_final_state
from gdn.ops.triton_swiglu import swiglu_forward


def block_inference(
    x: Tensor,
    into: Tensor,
    gate_up: Tensor,
    weights: BlockWeights,
    heads: Heads,
    eps: float,
    allow_neg_eigval: bool,
    conv_state: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, T, hidden] -> the block's output; the final convolution inputs and state, both empty without an initial state.

    With initial_rows int64 [N], the row of both states that each packed sequence begins from, they are empty too.

    into [P, hidden]: the weights of q | k | v | a | b | g; gate_up [2 F, hidden]; they, o and down in x's dtype.
    """
    if not x.numel():  # as where a mask leaves no token; the states stay what they were
        return x, x if conv_state is None else conv_state, x.float() if initial_state is None else initial_state
    matrices = [into, weights.o.to(x.dtype), gate_up, weights.down.to(x.dtype)]
    vectors = (weights.attn_norm, weights.A_log, weights.dt_bias, weights.o_norm, weights.mlp_norm, weights.conv)
    if conv_state is not None and initial_rows is not None:
        conv_state = conv_state[initial_rows]
    states = (conv_state, None if initial_state is None else initial_state.contiguous(), initial_rows, cu_seqlens)
    result: tuple[Tensor, Tensor, Tensor] = _run(
        x.contiguous(), matrices, *vectors, weights.conv_bias, *states, list(heads), eps, allow_neg_eigval
    )
    return result


@torch.library.custom_op("gdn::block_inference", mutates_args=())
def _run(
    x: Tensor,
    matrices: list[Tensor],
    attn_norm: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    o_norm: Tensor,
    mlp_norm: Tensor,
    conv: Tensor,
    conv_bias: Tensor | None,
    conv_state: Tensor | None,
    initial_state: Tensor | None,
    initial_rows: Tensor | None,
    cu_seqlens: Tensor | None,
    heads: list[int],
    eps: float,
    allow_neg_eigval: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    sizes, (into, out, gate_up, down) = Heads(*heads), matrices
    proj = row_product(norm_forward(x, None, attn_norm, eps)[0], into)
    _, _, rule = run_forward(
        proj, conv, conv_bias, A_log, dt_bias, conv_state, initial_state, cu_seqlens, sizes, allow_neg_eigval,
        for_backward=False, initial_rows=initial_rows,
    )  # fmt: skip
    y = gated_norm_forward(rule.o, proj, sizes.columns, o_norm, eps)
    normed, _, residual = norm_forward(x, row_product(y.flatten(-2), out), mlp_norm, eps)
    assert residual is not None
    residual = row_product(swiglu_forward(row_product(normed, gate_up)), down, residual)
    if initial_state is None or initial_rows is not None:
        return residual, x.new_empty(0), x.new_empty(0, dtype=torch.float32)
    assert rule.final_state is not None
    return residual, conv_final_state(proj, conv_state, cu_seqlens, conv.shape[1], sizes.channels), rule.final_state


@_run.register_fake
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
    conv_state: Tensor | None,
    initial_state: Tensor | None,
    initial_rows: Tensor | None,
    cu_seqlens: Tensor | None,
    heads: list[int],
    eps: float,
    allow_neg_eigval: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if initial_state is None or initial_rows is not None:
        return torch.empty_like(x), x.new_empty(0), x.new_empty(0, dtype=torch.float32)
    carried = x.new_empty(len(initial_state), conv.shape[1] - 1, conv.shape[0])
    return torch.empty_like(x), carried, torch.empty_like(initial_state)
