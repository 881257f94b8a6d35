"""`conv_rule` on the GPU as torch.library operators: convolution, gates and rule in one, each tensor between them made once."""

from typing import Any

import torch
from torch import Tensor

from gdn.ops.conv_rule import Heads
from gdn.ops.triton_backward import backward
from gdn.ops.triton_forward import C, Forward, Intra, chunks_of, forward
from gdn.ops.triton_gates import gates_backward, gates_forward
from gdn.ops.triton_short_conv import conv_forward
from gdn.ops.triton_short_conv_backward import conv_backward


def conv_rule(
    proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    heads: Heads,
    allow_neg_eigval: bool,
    conv_state: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o [B, T, HV, V] and the final state [N, HV, K, V], empty without an initial one."""
    if proj.stride(-1) != 1:
        proj = proj.contiguous()
    if initial_state is not None:
        initial_state = initial_state.float().contiguous()
    tensors = (proj, conv_weight, conv_bias, A_log, dt_bias, conv_state, initial_state)
    inputs = (*tensors, cu_seqlens, list(heads), allow_neg_eigval)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        o, final_state = _training(*inputs)[:2]
    else:
        o, final_state = _inference(*inputs)
    return o, final_state


def run_forward(
    proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    conv_state: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    heads: Heads,
    allow_neg_eigval: bool,
    *,
    for_backward: bool,
    initial_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Forward]:
    """q, k and the rule's results; the final state if there is an initial one, unless it is one of `initial_rows`."""
    q, k, v = conv_forward(proj, conv_weight, conv_bias, *heads, conv_state, cu_seqlens)
    g, beta = gates_forward(proj, heads.channels, heads.channels + heads.HV, A_log, dt_bias, allow_neg_eigval)
    result = forward(
        q, k, v, g, beta, heads.K**-0.5, initial_state, chunks_of(proj.shape[0], proj.shape[1], cu_seqlens),
        with_final_state=initial_state is not None and initial_rows is None, for_backward=for_backward,
        initial_rows=initial_rows,
    )  # fmt: skip
    return q, k, result


def run_backward(
    proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    conv_state: Tensor | None,
    cu_seqlens: Tensor | None,
    heads: Heads,
    allow_neg_eigval: bool,
    saved: list[Tensor],
    do: Tensor,
    d_final_state: Tensor | None,
    dproj: Tensor,
    *,
    with_initial_state: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Writes the gradient of proj's first columns into dproj; returns those of the rest. `saved`: see `_training`."""
    q, k, X, states, A, P, gates = saved
    result = backward(
        q, k, heads.K**-0.5, Intra(A, P, gates), X, states, do, d_final_state,
        chunks_of(proj.shape[0], proj.shape[1], cu_seqlens), with_initial_state=with_initial_state,
    )  # fmt: skip
    d_weight, d_bias, d_conv_state = conv_backward(
        proj, conv_weight, conv_bias, conv_state, cu_seqlens, result.dq, result.dk, result.dv, dproj
    )
    columns = heads.channels, heads.channels + heads.HV
    dA_log, d_dt_bias = gates_backward(proj, *columns, A_log, dt_bias, allow_neg_eigval, result.dg, result.dbeta, dproj)
    return d_weight, d_bias, dA_log, d_dt_bias, d_conv_state, result.d_initial_state


@torch.library.custom_op("gdn::conv_rule_inference", mutates_args=())
def _inference(
    proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    conv_state: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    heads: list[int],
    allow_neg_eigval: bool,
) -> tuple[Tensor, Tensor]:
    _, _, result = run_forward(
        proj, conv_weight, conv_bias, A_log, dt_bias, conv_state, initial_state, cu_seqlens, Heads(*heads), allow_neg_eigval,
        for_backward=False,
    )  # fmt: skip
    return result.o, proj.new_empty(0, dtype=torch.float32) if result.final_state is None else result.final_state


@_inference.register_fake
def _(
    proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    conv_state: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    heads: list[int],
    allow_neg_eigval: bool,
) -> tuple[Tensor, Tensor]:
    return _fake_outputs(proj, initial_state, Heads(*heads))


@torch.library.custom_op("gdn::conv_rule_training", mutates_args=())
def _training(
    proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    conv_state: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    heads: list[int],
    allow_neg_eigval: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, final state, and what the backward needs: q, k, X, states, A, P, gates (`triton_forward`)."""
    q, k, result = run_forward(
        proj, conv_weight, conv_bias, A_log, dt_bias, conv_state, initial_state, cu_seqlens, Heads(*heads), allow_neg_eigval,
        for_backward=True,
    )  # fmt: skip
    assert result.X is not None and result.states is not None
    final_state = proj.new_empty(0, dtype=torch.float32) if result.final_state is None else result.final_state
    return result.o, final_state, q, k, result.X, result.states, *result.intra


@_training.register_fake
def _(
    proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    conv_state: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    heads: list[int],
    allow_neg_eigval: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    o, final_state = _fake_outputs(proj, initial_state, Heads(*heads))
    q, X, states, A, gates = fake_saved(proj, cu_seqlens, Heads(*heads))
    return o, final_state, q, q.clone(), X, states, A, A.clone(), gates


def fake_saved(proj: Tensor, cu_seqlens: Tensor | None, heads: Heads) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """For fakes: empty q, X, states, A and gates; k is like q and P like A."""
    H, K, HV, V = heads
    B, T = proj.shape[:2]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    count = B * ((T + C - 1) // C) if cu_seqlens is None else N + (T - N) // C
    return (
        proj.new_empty(B, T, H, K),
        proj.new_empty(B, T, HV, V),
        proj.new_empty(count, HV, V, K),
        proj.new_empty(count, HV, C, C),
        proj.new_empty(count, HV, 7, C, dtype=torch.float32),
    )


@torch.library.custom_op("gdn::conv_rule_backward", mutates_args=())
def _backward(
    proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    conv_state: Tensor | None,
    cu_seqlens: Tensor | None,
    heads: list[int],
    allow_neg_eigval: bool,
    saved: list[Tensor],
    do: Tensor,
    d_final_state: Tensor | None,
    with_initial_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of proj, conv_weight, conv_bias, A_log, dt_bias, conv_state, initial_state; empty for what is not there."""
    dproj = torch.empty(proj.shape, dtype=proj.dtype, device=proj.device)
    dproj[..., Heads(*heads).columns :] = 0
    inputs = (proj, conv_weight, conv_bias, A_log, dt_bias, conv_state, cu_seqlens, Heads(*heads), allow_neg_eigval)
    gradients = run_backward(*inputs, saved, do, d_final_state, dproj, with_initial_state=with_initial_state)
    empty = proj.new_empty(0, dtype=torch.float32)
    d_weight, d_bias, dA_log, d_dt_bias, d_conv_state, d_initial_state = gradients
    return (
        dproj,
        d_weight,
        empty if d_bias is None else d_bias,
        dA_log,
        d_dt_bias,
        empty.clone() if d_conv_state is None else d_conv_state,
        empty.clone() if d_initial_state is None else d_initial_state,
    )


@_backward.register_fake
def _(
    proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    conv_state: Tensor | None,
    cu_seqlens: Tensor | None,
    heads: list[int],
    allow_neg_eigval: bool,
    saved: list[Tensor],
    do: Tensor,
    d_final_state: Tensor | None,
    with_initial_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, K, HV, V = heads
    empty = proj.new_empty(0, dtype=torch.float32)
    N = proj.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return (
        proj.new_empty(proj.shape),
        conv_weight.new_empty(conv_weight.shape, dtype=torch.float32),
        empty if conv_bias is None else conv_bias.new_empty(conv_bias.shape, dtype=torch.float32),
        A_log.new_empty(A_log.shape, dtype=torch.float32),
        A_log.new_empty(A_log.shape, dtype=torch.float32),
        empty.clone() if conv_state is None else torch.empty_like(conv_state),
        proj.new_empty(N, HV, K, V, dtype=torch.float32) if with_initial_state else empty.clone(),
    )


def _fake_outputs(proj: Tensor, initial_state: Tensor | None, heads: Heads) -> tuple[Tensor, Tensor]:
    final_state = proj.new_empty(0, dtype=torch.float32) if initial_state is None else torch.empty_like(initial_state)
    return proj.new_empty(*proj.shape[:2], heads.HV, heads.V), final_state


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    proj, conv_weight, conv_bias, A_log, dt_bias, conv_state, initial_state, cu_seqlens, heads, allow_neg_eigval = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(proj, conv_weight, conv_bias, A_log, dt_bias, conv_state, cu_seqlens, *output[2:])
    ctx.heads, ctx.allow_neg_eigval, ctx.with_initial_state = heads, allow_neg_eigval, initial_state is not None


def _differentiate(ctx: Any, do: Tensor | None, d_final_state: Tensor | None, *_: Any) -> tuple[Any, ...]:
    proj, conv_weight, conv_bias, A_log, dt_bias, conv_state, cu_seqlens, *saved = ctx.saved_tensors
    do = torch.zeros_like(saved[2]) if do is None else do.to(proj.dtype).contiguous()
    d_final_state = d_final_state.contiguous() if ctx.with_initial_state and d_final_state is not None else None
    gradients = _backward(
        proj, conv_weight, conv_bias, A_log, dt_bias, conv_state, cu_seqlens, ctx.heads, ctx.allow_neg_eigval, saved,
        do, d_final_state, ctx.with_initial_state,
    )  # fmt: skip
    d_proj, d_weight, d_bias, dA_log, d_dt_bias, d_conv_state, d_initial_state = gradients
    return (
        d_proj,
        d_weight.to(conv_weight.dtype),
        None if conv_bias is None else d_bias.to(conv_bias.dtype),
        dA_log.to(A_log.dtype),
        d_dt_bias.to(dt_bias.dtype),
        None if conv_state is None else d_conv_state,
        d_initial_state if ctx.with_initial_state else None,
        None,
        None,
        None,
    )


_training.register_autograd(_differentiate, setup_context=_save)
