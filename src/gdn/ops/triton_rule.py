"""The rule's GPU kernels as torch.library operators: fakes for compilation, a backward operator, no host synchronisation.

`gated_delta_rule` checks shapes and decides; here every tensor is contiguous, q, k and v of one dtype.
"""

from typing import Any

import torch
from torch import Tensor

from gdn.ops.triton_backward import backward
from gdn.ops.triton_forward import C, Intra, chunks_of, forward


def rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    with_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """o [B, T, HV, V] in v's dtype and the final state [N, HV, K, V] float32, empty unless asked for.

    Saves what the backward needs (about 2 K / 64 times the bytes of v) only if a gradient will be asked for.
    """
    q, k, v = (x.to(v.dtype).contiguous() for x in (q, k, v))
    g, beta = g.contiguous(), beta.contiguous()
    if initial_state is not None:
        initial_state = initial_state.float().contiguous()
    inputs = (q, k, v, g, beta, scale, initial_state, cu_seqlens, with_final_state)
    differentiable = [x for x in (q, k, v, g, beta, initial_state) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in differentiable):
        o, final_state = _rule_training(*inputs)[:2]
    else:
        o, final_state = _rule_inference(*inputs)
    return o, final_state


@torch.library.custom_op("gdn::rule_inference", mutates_args=())
def _rule_inference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    with_final_state: bool,
) -> tuple[Tensor, Tensor]:
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    chunks = chunks_of(q.shape[0], q.shape[1], cu_seqlens)
    result = forward(
        q, k, v, g, beta, scale, initial_state, chunks, with_final_state=with_final_state, for_backward=False
    )  # fmt: skip
    return result.o, _or_empty(result.final_state, v)


@_rule_inference.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    with_final_state: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), _fake_state(q, v, cu_seqlens, with_final_state)


@torch.library.custom_op("gdn::rule_training", mutates_args=())
def _rule_training(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    with_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, final state, and what the backward needs: X, states, A, P, gates (`triton_forward`)."""
    q, k, v = _aligned(q), _aligned(k), _aligned(v)
    chunks = chunks_of(q.shape[0], q.shape[1], cu_seqlens)
    result = forward(q, k, v, g, beta, scale, initial_state, chunks, with_final_state=with_final_state, for_backward=True)
    assert result.X is not None and result.states is not None
    return result.o, _or_empty(result.final_state, v), result.X, result.states, *result.intra


@_rule_training.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    with_final_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (B, T, HV, V), K = v.shape, q.shape[-1]
    N = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    count = B * ((T + C - 1) // C) if cu_seqlens is None else N + (T - N) // C
    square = v.new_empty(count, HV, C, C)
    gates = v.new_empty(count, HV, 7, C, dtype=torch.float32)
    final_state = _fake_state(q, v, cu_seqlens, with_final_state)
    return torch.empty_like(v), final_state, torch.empty_like(v), v.new_empty(count, HV, V, K), square, square.clone(), gates


@torch.library.custom_op("gdn::rule_backward", mutates_args=())
def _rule_backward(
    q: Tensor,
    k: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    X: Tensor,
    states: Tensor,
    A: Tensor,
    P: Tensor,
    gates: Tensor,
    do: Tensor,
    d_final_state: Tensor | None,
    with_initial_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    chunks = chunks_of(q.shape[0], q.shape[1], cu_seqlens)
    result = backward(
        _aligned(q), _aligned(k), scale, Intra(A, P, gates), X, states, _aligned(do), d_final_state, chunks,
        with_initial_state=with_initial_state,
    )  # fmt: skip
    return *result[:5], _or_empty(result.d_initial_state, X)


@_rule_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    X: Tensor,
    states: Tensor,
    A: Tensor,
    P: Tensor,
    gates: Tensor,
    do: Tensor,
    d_final_state: Tensor | None,
    with_initial_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dg = X.new_empty(X.shape[:3], dtype=torch.float32)
    d_initial_state = _fake_state(q, X, cu_seqlens, with_initial_state)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(X), dg, dg.clone(), d_initial_state


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, _, g, beta, scale, initial_state, cu_seqlens, with_final_state = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, cu_seqlens, *output[2:])
    ctx.scale, ctx.with_final_state = scale, with_final_state
    ctx.with_initial_state = initial_state is not None
    ctx.dtypes = g.dtype, beta.dtype


def _differentiate(ctx: Any, do: Tensor | None, d_final_state: Tensor | None, *_: Any) -> tuple[Any, ...]:
    q, k, cu_seqlens, X, states, A, P, gates = ctx.saved_tensors
    do = torch.zeros_like(X) if do is None else do.to(X.dtype).contiguous()
    d_final_state = d_final_state.contiguous() if ctx.with_final_state and d_final_state is not None else None
    dq, dk, dv, dg, dbeta, d_initial_state = _rule_backward(
        q, k, ctx.scale, cu_seqlens, X, states, A, P, gates, do, d_final_state, ctx.with_initial_state
    )
    g_dtype, beta_dtype = ctx.dtypes
    d_state = d_initial_state if ctx.with_initial_state else None
    return dq, dk, dv, dg.to(g_dtype), dbeta.to(beta_dtype), None, d_state, None, None


_rule_training.register_autograd(_differentiate, setup_context=_save)


def _fake_state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, wanted: bool) -> Tensor:
    if not wanted:
        return v.new_empty(0, dtype=torch.float32)
    N = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return v.new_empty(N, v.shape[2], q.shape[-1], v.shape[-1], dtype=torch.float32)


def _or_empty(state: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32) if state is None else state


def _aligned(x: Tensor) -> Tensor:
    """x where the copy engine can read it: at a multiple of 16 bytes, as every tensor lies that is no slice."""
    return x if x.data_ptr() % 16 == 0 else x.clone()
