"""The token mixer: projections, short convolutions, gates, the gated delta rule and the gated output norm."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gdn.model.config import ModelConfig
from gdn.model.layers import GatedRMSNorm, Linear, RMSNorm
from gdn.ops import (
    beta_gate,
    conv_gated_delta_rule,
    conv_gated_delta_rule_step,
    conv_gated_delta_rule_with_state,
    decay_gate,
    gated_delta_rule,
    gated_delta_rule_step,
    gated_delta_rule_with_state,
    l2_norm,
    short_conv,
    short_conv_step,
    short_conv_with_state,
)
from gdn.ops.backend import choose_backend


class LayerState(NamedTuple):
    """One layer's views into a DecodeState: recurrent [N, HV, K, V], conv [N, conv_size - 1, D].

    rows int64, if given: the row that each sequence begins from, one for several of them perhaps. The state is only read then.
    """

    recurrent: Tensor
    conv: Tensor
    rows: Tensor | None = None

    def own(self) -> "LayerState":
        """A row for each sequence, to be updated in place: a copy where `rows` says which."""
        return self if self.rows is None else LayerState(self.recurrent[self.rows], self.conv[self.rows])


class ShortConv(nn.Module):
    """The parameters of a depthwise convolution, in conv1d's layout [D, 1, W]."""

    def __init__(self, channels: int, conv_size: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, conv_size))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None

    def forward(self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """x [B, T, D] -> [B, T, D]; `state` [N, W - 1, D] is read and updated in place."""
        weight = self.weight.squeeze(1)
        if state is None:
            return short_conv(x, weight, self.bias, cu_seqlens=cu_seqlens)
        if cu_seqlens is None and x.shape[1] == 1 and not torch.is_grad_enabled():
            return short_conv_step(x.squeeze(1), weight, self.bias, state).unsqueeze(1)
        y, final = short_conv_with_state(x, weight, self.bias, initial_state=state, cu_seqlens=cu_seqlens)
        state.copy_(final.detach())
        return y


class GatedDeltaNet(nn.Module):
    """One Gated DeltaNet layer. Source: arXiv:2412.06464, section 3.4; parameter names of flash-linear-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, HV = config.hidden_size, config.value_heads
        self.config = config
        self.q_proj = Linear(hidden, config.key_dim)
        self.k_proj = Linear(hidden, config.key_dim)
        self.v_proj = Linear(hidden, config.value_dim)
        self.a_proj = Linear(hidden, HV)
        self.b_proj = Linear(hidden, HV)
        self.A_log = nn.Parameter(torch.zeros(HV, dtype=torch.float32))  # whatever the default dtype
        self.dt_bias = nn.Parameter(torch.zeros(HV, dtype=torch.float32))
        if config.use_short_conv:
            self.q_conv1d = ShortConv(config.key_dim, config.conv_size, config.conv_bias)
            self.k_conv1d = ShortConv(config.key_dim, config.conv_size, config.conv_bias)
            self.v_conv1d = ShortConv(config.value_dim, config.conv_size, config.conv_bias)
        if config.use_gate:
            self.g_proj = Linear(hidden, config.value_dim)
        self.o_norm = (GatedRMSNorm if config.use_gate else RMSNorm)(config.head_v_dim, config.norm_eps)
        self.o_proj = Linear(config.value_dim, hidden)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Log decay g and write strength beta of each token, [B, T, HV] float32 each."""
        g = decay_gate(self.a_proj(x), self.A_log, self.dt_bias)
        return g, beta_gate(self.b_proj(x), self.config.allow_neg_eigval)

    def forward(self, x: Tensor, state: LayerState | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """x [B, T, hidden] -> [B, T, hidden]; the state, if given, is read and updated in place, without gradients."""
        config = self.config
        o = self._rule(x, state, cu_seqlens)
        if config.use_gate:
            o = self.o_norm(o, self.g_proj(x).view(o.shape))
        else:
            o = self.o_norm(o)
        out: Tensor = self.o_proj(o.flatten(-2))
        return out

    def _rule(self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None) -> Tensor:
        """The rule's output [B, T, HV, V]: where GPU kernels serve, by them, else piece by piece."""
        B, T, _ = x.shape
        config = self.config
        # A weight on meta lies elsewhere: a hook of accelerate brings it when its own module is called.
        if (
            config.use_short_conv
            and choose_backend("auto", x.device, x.dtype, config.head_dim, config.head_v_dim) == "triton"
            and not self.q_conv1d.weight.is_meta
        ):
            return self._fused_rule(x, state, cu_seqlens)
        q, k, v = self._convolve(self.q_proj(x), self.k_proj(x), self.v_proj(x), state, cu_seqlens)
        q = l2_norm(q.view(B, T, config.num_heads, config.head_dim))
        k = l2_norm(k.view(B, T, config.num_heads, config.head_dim))
        v = v.view(B, T, config.value_heads, config.head_v_dim)
        g, beta = self.gates(x)
        if state is None:
            return gated_delta_rule(q, k, v, g, beta, cu_seqlens=cu_seqlens)
        if cu_seqlens is None and T == 1 and not torch.is_grad_enabled():
            q, k, v, g, beta = (tensor.squeeze(1) for tensor in (q, k, v, g, beta))
            return gated_delta_rule_step(q, k, v, g, beta, state.recurrent).unsqueeze(1)
        o, final = gated_delta_rule_with_state(q, k, v, g, beta, initial_state=state.recurrent, cu_seqlens=cu_seqlens)
        state.recurrent.copy_(final.detach())
        return o

    def _fused_rule(self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None) -> Tensor:
        """As `_rule`, by the GPU kernels that read all of it from one projection."""
        projections = (self.q_proj, self.k_proj, self.v_proj, self.a_proj, self.b_proj)
        convolutions = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        weight = torch.cat([conv.weight.squeeze(1) for conv in convolutions])
        biases: list[Tensor] = [conv.bias for conv in convolutions if conv.bias is not None]
        bias = torch.cat(biases) if biases else None
        parameters = (weight, bias, self.A_log, self.dt_bias)
        sizes: dict[str, Any] = {
            "num_heads": self.config.num_heads,
            "head_dim": self.config.head_dim,
            "num_v_heads": self.config.value_heads,
            "head_v_dim": self.config.head_v_dim,
            "allow_neg_eigval": self.config.allow_neg_eigval,
        }
        if state is not None and cu_seqlens is None and x.shape[1] == 1 and not torch.is_grad_enabled():
            row = torch.cat([projection(x) for projection in projections], dim=-1).squeeze(1)
            return conv_gated_delta_rule_step(row, *parameters, state.conv, state.recurrent, **sizes).unsqueeze(1)
        if all(type(projection) is Linear and "forward" not in vars(projection) for projection in projections):
            # Joining the weights costs less than joining what they make: there are more tokens than hidden units.
            proj = F.linear(x, torch.cat([projection.weight for projection in projections]).to(x.dtype))
        else:  # an adapter in a projection's place (peft), or a hook around it (accelerate's offloading)
            proj = torch.cat([projection(x) for projection in projections], dim=-1)
        if state is None:
            return conv_gated_delta_rule(proj, *parameters, cu_seqlens=cu_seqlens, **sizes)
        o, conv, final = conv_gated_delta_rule_with_state(
            proj, *parameters, state.conv, state.recurrent, cu_seqlens=cu_seqlens, **sizes
        )
        state.conv.copy_(conv.detach())
        state.recurrent.copy_(final.detach())
        return o

    def _convolve(
        self, q: Tensor, k: Tensor, v: Tensor, state: LayerState | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self.config.use_short_conv:
            return F.silu(q), F.silu(k), F.silu(v)
        states = (None, None, None) if state is None else state.conv.split([q.shape[-1], k.shape[-1], v.shape[-1]], dim=-1)
        return (
            self.q_conv1d(q, states[0], cu_seqlens),
            self.k_conv1d(k, states[1], cu_seqlens),
            self.v_conv1d(v, states[2], cu_seqlens),
        )
