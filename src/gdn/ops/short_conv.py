"""The causal depthwise convolution over a few tokens, with SiLU, that precedes the rule; whole sequences and single tokens.

As shifted multiply-adds on [B, T, D]: on CPUs as fast as conv1d, which wants the other layout, and the same code everywhere.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn.ops.gated_delta_rule import sequence_lengths


def short_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """silu(sum_i weight[:, i] * x[t - (W - 1) + i] + bias): each channel sees its last W tokens, none of another sequence.

    x [B, T, D]; weight [D, W]; bias [D]; initial_state [N, W - 1, D], the inputs before the first token, zeros if None.
    cu_seqlens: int32 [N + 1], then B == 1 and the window starts anew at each boundary. Returns [B, T, D] in x's dtype.
    """
    return _conv(*_extend(x, weight, initial_state, cu_seqlens), weight, bias)


def short_conv_with_state(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `short_conv`, and each sequence's last W - 1 inputs [N, W - 1, D], from its initial_state on if it is shorter."""
    extended, positions = _extend(x, weight, initial_state, cu_seqlens)
    y = _conv(extended, positions, weight, bias)
    carried = weight.shape[1] - 1
    if cu_seqlens is None:
        return y, extended[:, extended.shape[1] - carried :].clone()
    ends = cu_seqlens[1:].long() + carried * torch.arange(1, len(cu_seqlens), device=x.device)
    last = ends[:, None] + torch.arange(-carried, 0, device=x.device)
    return y, extended[0, last]


def short_conv_step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> Tensor:
    """One token for each row: x [B, D] -> [B, D]; `state` [B, W - 1, D] is updated in place. No gradients."""
    with torch.no_grad():
        extended = torch.cat([state, x.unsqueeze(1)], dim=1)
        state.copy_(extended[:, 1:])
        return F.silu(_window_sum(extended, weight, bias)).squeeze(1)


def _extend(x: Tensor, weight: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Put each sequence's W - 1 earlier inputs in front of it; packed: also where its tokens' outputs lie in the result."""
    (B, T, D), carried = x.shape, weight.shape[1] - 1
    N = B if cu_seqlens is None else len(cu_seqlens) - 1
    if weight.shape[0] != D:
        raise ValueError(f"weight is {tuple(weight.shape)}; expected [{D}, W] beside x {tuple(x.shape)}")
    if initial_state is None:
        initial_state = x.new_zeros(N, carried, D)
    elif initial_state.shape != (N, carried, D):
        raise ValueError(f"initial_state is {tuple(initial_state.shape)}; expected {(N, carried, D)}")
    initial_state = initial_state.to(x.dtype)
    if cu_seqlens is None:
        return torch.cat([initial_state, x], dim=1), None
    if B != 1:
        raise ValueError(f"cu_seqlens with a batch of {B}: packed sequences lie in one row (B == 1)")
    pieces = x[0].split(sequence_lengths(cu_seqlens, T))
    extended = torch.cat([part for pair in zip(initial_state.unbind(), pieces) for part in pair]).unsqueeze(0)
    # Token t of sequence n has (n + 1) * carried inherited inputs before it; its window starts `carried` earlier.
    sequence = torch.bucketize(torch.arange(T, device=x.device), cu_seqlens[1:].long(), right=True)
    return extended, torch.arange(T, device=x.device) + sequence * carried


def _conv(extended: Tensor, positions: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = _window_sum(extended, weight, bias)
    return F.silu(y if positions is None else y[:, positions])


def _window_sum(extended: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    W = weight.shape[1]
    T = extended.shape[1] - W + 1
    weight = weight.to(extended.dtype)
    y = extended[:, W - 1 :] * weight[:, W - 1]
    for i in range(W - 1):
        y = torch.addcmul(y, extended[:, i : i + T], weight[:, i])
    return y if bias is None else y + bias.to(y.dtype)
