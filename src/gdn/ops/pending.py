"""Tokens that a state has not taken up: decoding on a GPU writes a state once in SLOTS tokens, and reads it for each.

At many rows a token costs what its states' bytes do, and half of those are writes. So the rule's step leaves what it would
add, k w^T, as its two vectors in a slot, with the logarithm of its decay, and takes the filled slots into account:

    S_t = (a_1 ... a_t) S + sum over j of (a_j+1 ... a_t) k_j w_j^T

The token that would fill the last slot writes S instead. Which slot is whose hangs on the token's position, the layer and the
head, so that of all heads every SLOTS-th is written: tokens take the same time, and a row has the same bits beside any others.
Slots that a position counts as filled and that hold zeros change nothing: a state just read by whole passes has such.
"""

import torch
from torch import Tensor

from gdn.ops.backend import choose_backend

SLOTS = 8  # a power of 2


def slot_size(K: int, V: int) -> int:
    """Columns of a slot: k | w | the logarithm of its decay, and three that keep rows aligned."""
    return K + V + 4


def slots_for(device: torch.device, dtype: torch.dtype, K: int, V: int) -> int:
    """Of states there: SLOTS where tokens are decoded by the kernels, else 0."""
    return SLOTS if choose_backend("auto", device, dtype, K, V) == "triton" else 0


def settle(recurrent: Tensor, pending: Tensor, position: Tensor) -> None:
    """Bring what is pending into the states, in place; all slots' w and logarithms are zeros after it.

    recurrent [L, N, HV, K, V]; pending [L, N, HV, SLOTS, `slot_size`], in its place [..., 0, ...] where nothing ever is;
    position [N] int64: tokens read so far.
    """
    if not pending.shape[3]:
        return
    K, V = recurrent.shape[3:]
    if recurrent.dtype == torch.float32 and choose_backend("auto", recurrent.device, torch.bfloat16, K, V) == "triton":
        # It is small, and serves where kernels of 16 bits do; on smaller GPUs those of float32 do not.
        from gdn.ops.triton_pending import settle as kernel

        kernel(recurrent, pending, position)
        return
    L, _, HV, slots, _ = pending.shape
    head = torch.arange(L * HV, device=position.device).view(L, 1, HV)
    filled = torch.arange(slots, device=position.device) < ((position[:, None] + head) % slots)[..., None]
    held = pending.where(filled[..., None], 0.0)
    k, w, g = held[..., :K], held[..., K : K + V], held[..., K + V]
    later = torch.ones(slots, slots, dtype=torch.bool, device=g.device).triu(1)  # a difference of sums would be nan of two -inf
    factors = g[..., None, :].where(later, 0.0).sum(-1).exp()
    recurrent.mul_(g.sum(-1).exp()[..., None, None]).add_(torch.einsum("...sk,...sv->...kv", k * factors[..., None], w))
    pending.zero_()
