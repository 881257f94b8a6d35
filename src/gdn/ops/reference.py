"""The gated delta rule token by token: the oracle that every other implementation is tested against. Slow on purpose.

Any float dtype: float64 is computed in float64, everything else in float32. Gradients come from autograd.
"""

import torch
from torch import Tensor


def gated_delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    lengths: list[int] | None,
) -> tuple[Tensor, Tensor]:
    """The recurrence of Yang et al. 2024 (arXiv:2412.06464, equation 10), literally.

    q, k [B, T, H, K]; v [B, T, HV, V]; g, beta [B, T, HV]; initial_state [N, HV, K, V] or None; lengths: tokens of each packed
    sequence (then B == 1), or None. Returns o [B, T, HV, V] and the final state [N, HV, K, V], both in the computing dtype.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    groups = v.shape[2] // q.shape[2]
    q, k = (x.to(dtype).repeat_interleave(groups, dim=2) for x in (q, k))
    v, g, beta = (x.to(dtype) for x in (v, g, beta))
    if initial_state is not None:
        initial_state = initial_state.to(dtype)
    if lengths is None:
        return _recurrence(q, k, v, g, beta, scale, initial_state)
    outputs, states, start = [], [], 0
    for n, length in enumerate(lengths):
        part = slice(start, start + length)
        state = None if initial_state is None else initial_state[n : n + 1]
        o, final = _recurrence(q[:, part], k[:, part], v[:, part], g[:, part], beta[:, part], scale, state)
        outputs.append(o)
        states.append(final)
        start += length
    return torch.cat(outputs, dim=1), torch.cat(states, dim=0)


def _recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, T, HV, K = q.shape
    state = v.new_zeros(B, HV, K, v.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for t in range(T):
        state = state * g[:, t, :, None, None].exp()
        read = torch.einsum("bhk,bhkv->bhv", k[:, t], state)
        write = beta[:, t, :, None] * (v[:, t] - read)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], write)
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    o = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v)
    return o, state.clone() if T == 0 else state
