"""GPU kernel that brings what single tokens left pending into the states; see `pending`."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@torch.library.custom_op("gdn::settle", mutates_args=("recurrent", "pending"))
def settle(recurrent: Tensor, pending: Tensor, position: Tensor) -> None:
    """One launch for all states, which does no more than look where nothing is in the slots. Shapes as in `pending.settle`; the
    states of a layer and their slots contiguous, float32, K a power of 2, V a multiple of 32."""
    (L, N, HV, slots, P), (K, V) = pending.shape, recurrent.shape[3:]
    if not (recurrent[:1].is_contiguous() and pending[:1].is_contiguous()):
        raise ValueError(f"states have strides {recurrent.stride()}, slots {pending.stride()}; expected contiguous layers")
    if N:
        _settle[(L * N * HV,)](
            recurrent, pending, position, recurrent.stride(0), pending.stride(0), N,
            HV=HV, K=K, V=V, P=P, SLOTS=slots, BV=min(32, V & -V), num_warps=4,
        )  # fmt: skip


@settle.register_fake
def _(recurrent: Tensor, pending: Tensor, position: Tensor) -> None:
    return None


@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["position"])  # rows of a state begin anywhere
def _settle(
    recurrent, pending, position, layer, pending_layer, rows,
    HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, P: tl.constexpr, SLOTS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    head, of_all = tl.program_id(0) % HV, tl.program_id(0) // HV
    row, of_layer = of_all % rows, (of_all // rows).to(tl.int64)
    index = ((tl.load(position + row) + of_layer * HV + head) % SLOTS).to(tl.int32)
    slots = pending + of_layer * pending_layer + (row.to(tl.int64) * HV + head) * (SLOTS * P)
    states = recurrent + of_layer * layer + (row.to(tl.int64) * HV + head) * (K * V)
    slot, channels = tl.arange(0, SLOTS), tl.arange(0, K)
    held = tl.abs(tl.load(slots + slot * P + (K + V)))
    for first in tl.static_range(0, V, BV):
        held += tl.sum(tl.abs(tl.load(slots + slot[:, None] * P + K + first + tl.arange(0, BV)[None, :])), 1)
    if tl.sum(tl.where(slot < index, held, 0.0), 0) != 0.0:
        for start in tl.range(0, V, BV):
            columns = start + tl.arange(0, BV)
            place = states + channels[:, None] * V + columns[None, :]
            S = tl.load(place)
            added, factor = tl.zeros([K, BV], tl.float32), 1.0
            for n in tl.range(0, index):
                own = slots + (index - 1 - n) * P
                added += tl.load(own + channels)[:, None] * (factor * tl.load(own + K + columns))[None, :]
                factor *= tl.exp(tl.load(own + K + V))
            tl.store(place, factor * S + added)
        tl.debug_barrier()  # all columns are read before a slot is emptied
    if tl.sum(held, 0) != 0.0:  # of what was taken up before too: the next position may count it as filled
        for i in tl.static_range(SLOTS):
            for first in tl.static_range(K, K + V, BV):
                tl.store(slots + i * P + first + tl.arange(0, BV), tl.zeros([BV], tl.float32))
            tl.store(slots + i * P + K + V, 0.0)
