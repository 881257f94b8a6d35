"""From one projection's output to the rule's: short convolution, SiLU, L2 norm, gates and rule as one operator.

What it computes is the composition of `short_conv`, `l2_norm`, `decay_gate`, `beta_gate` and `gated_delta_rule`. On a GPU the
pieces read slices of the projection and write what the rule reads; the backward writes the projection's gradient in place.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gdn.ops.backend import Backend, choose_backend
from gdn.ops.gated_delta_rule import (
    check_boundaries,
    gated_delta_rule,
    gated_delta_rule_step,
    gated_delta_rule_with_state,
)
from gdn.ops.gates import beta_gate, decay_gate
from gdn.ops.norm import l2_norm
from gdn.ops.short_conv import short_conv, short_conv_step, short_conv_with_state


class Heads(NamedTuple):
    """Sizes of a projection whose columns are q [H * K] | k [H * K] | v [HV * V] | a [HV] | b [HV]."""

    H: int
    K: int
    HV: int
    V: int

    @property
    def channels(self) -> int:
        """D: those that are convolved."""
        return 2 * self.H * self.K + self.HV * self.V

    @property
    def columns(self) -> int:
        return self.channels + 2 * self.HV


def conv_gated_delta_rule(
    proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    *,
    num_heads: int,
    head_dim: int,
    num_v_heads: int,
    head_v_dim: int,
    allow_neg_eigval: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """o [B, T, HV, V] of a layer, in proj's dtype; differentiable (once) in every float tensor.

    proj [B, T, P]: columns q | k | v | a | b (`Heads`), any more are left alone; conv_weight [D, W], conv_bias [D] over q | k |
    v; A_log, dt_bias [HV]. cu_seqlens as in `gated_delta_rule`; convolution and rule start anew at each boundary.
    Raises ValueError for shapes that do not fit, BackendError for a backend that cannot serve.
    """
    heads = Heads(num_heads, head_dim, num_v_heads, head_v_dim)
    _check(proj, conv_weight, A_log, dt_bias, heads, cu_seqlens)
    if _on_triton(backend, proj, heads):
        from gdn.ops.triton_conv_rule import conv_rule

        return conv_rule(proj, conv_weight, conv_bias, A_log, dt_bias, heads, allow_neg_eigval, None, None, cu_seqlens)[0]
    x, g, beta = _split(proj, A_log, dt_bias, heads, allow_neg_eigval)
    q, k, v = _keys_and_values(short_conv(x, conv_weight, conv_bias, cu_seqlens=cu_seqlens), heads)
    return gated_delta_rule(q, k, v, g, beta, cu_seqlens=cu_seqlens, backend=backend)


def conv_gated_delta_rule_with_state(
    proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    conv_state: Tensor,
    initial_state: Tensor,
    *,
    num_heads: int,
    head_dim: int,
    num_v_heads: int,
    head_v_dim: int,
    allow_neg_eigval: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """As `conv_gated_delta_rule` from a state on; also the final convolution inputs [N, W - 1, D] and state [N, HV, K, V].

    conv_state [N, W - 1, D], initial_state [N, HV, K, V] float32; both are left as they are.
    """
    heads = Heads(num_heads, head_dim, num_v_heads, head_v_dim)
    _check(proj, conv_weight, A_log, dt_bias, heads, cu_seqlens)
    if _on_triton(backend, proj, heads):
        from gdn.ops.triton_conv_rule import conv_rule
        from gdn.ops.triton_short_conv import conv_final_state

        o, final_state = conv_rule(
            proj, conv_weight, conv_bias, A_log, dt_bias, heads, allow_neg_eigval, conv_state, initial_state, cu_seqlens
        )
        return o, conv_final_state(proj, conv_state, cu_seqlens, conv_weight.shape[1], heads.channels), final_state
    x, g, beta = _split(proj, A_log, dt_bias, heads, allow_neg_eigval)
    y, final_conv = short_conv_with_state(x, conv_weight, conv_bias, initial_state=conv_state, cu_seqlens=cu_seqlens)
    q, k, v = _keys_and_values(y, heads)
    o, final_state = gated_delta_rule_with_state(
        q, k, v, g, beta, initial_state=initial_state, cu_seqlens=cu_seqlens, backend=backend
    )
    return o, final_conv, final_state


def conv_gated_delta_rule_step(
    proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A_log: Tensor,
    dt_bias: Tensor,
    conv_state: Tensor,
    state: Tensor,
    *,
    num_heads: int,
    head_dim: int,
    num_v_heads: int,
    head_v_dim: int,
    allow_neg_eigval: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """One token for each row, proj [B, P]: updates both states in place and returns o [B, HV, V]. No gradients.

    Two launches on a GPU; it can be captured in a CUDA graph.
    """
    heads = Heads(num_heads, head_dim, num_v_heads, head_v_dim)
    H, K, HV, V = heads
    with torch.no_grad():
        if _on_triton(backend, proj, heads):
            from gdn.ops.triton_short_conv import conv_step

            q, k, v, g, beta = conv_step(
                proj, conv_weight, conv_bias, conv_state, A_log, dt_bias, allow_neg_eigval, H, K, HV, V
            )
        else:
            x, g, beta = _split(proj, A_log, dt_bias, heads, allow_neg_eigval)
            q, k, v = _keys_and_values(short_conv_step(x, conv_weight, conv_bias, conv_state), heads)
        return gated_delta_rule_step(q, k, v, g, beta, state, backend=backend)


def _on_triton(backend: Backend, proj: Tensor, heads: Heads) -> bool:
    return choose_backend(backend, proj.device, proj.dtype, heads.K, heads.V) == "triton" and proj.numel() > 0


def _split(proj: Tensor, A_log: Tensor, dt_bias: Tensor, heads: Heads, allow_neg_eigval: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, a, b = proj[..., : heads.columns].split([heads.channels, heads.HV, heads.HV], dim=-1)
    return x, decay_gate(a, A_log, dt_bias), beta_gate(b, allow_neg_eigval)


def _keys_and_values(y: Tensor, heads: Heads) -> tuple[Tensor, Tensor, Tensor]:
    H, K, HV, V = heads
    q, k, v = y.split([H * K, H * K, HV * V], dim=-1)
    return l2_norm(q.unflatten(-1, (H, K))), l2_norm(k.unflatten(-1, (H, K))), v.unflatten(-1, (HV, V))


def _check(proj: Tensor, conv_weight: Tensor, A_log: Tensor, dt_bias: Tensor, heads: Heads, cu_seqlens: Tensor | None) -> None:
    H, HV = heads.H, heads.HV
    if proj.ndim != 3 or proj.shape[-1] < heads.columns:
        raise ValueError(f"proj is {tuple(proj.shape)}; expected [B, T, P] with P >= {heads.columns} columns of q, k, v, a, b")
    if conv_weight.ndim != 2 or conv_weight.shape[0] != heads.channels:
        raise ValueError(f"conv_weight is {tuple(conv_weight.shape)}; expected [{heads.channels}, W]")
    for name, tensor in (("A_log", A_log), ("dt_bias", dt_bias)):
        if tuple(tensor.shape) != (HV,):
            raise ValueError(f"{name} is {tuple(tensor.shape)}; expected ({HV},)")
    if HV % H:
        raise ValueError(f"num_v_heads is {HV}; expected a multiple of num_heads = {H}")
    if cu_seqlens is not None:
        check_boundaries(cu_seqlens)
        if proj.shape[0] != 1:
            raise ValueError(f"cu_seqlens with a batch of {proj.shape[0]}: packed sequences lie in one row (B == 1)")
