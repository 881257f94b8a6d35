"""What single tokens left pending, brought into the states: by PyTorch and by the kernel, against the tokens one by one."""

import os
from collections.abc import Callable

import pytest
import torch
from ops_testing import relative_error
from torch import Tensor

from gdn.ops.norm import l2_norm
from gdn.ops.pending import SLOTS, settle, slot_size

L, N, HV, K, V = 2, 3, 2, 64, 64
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
STARTS = torch.tensor([0, 1, 10**10])


def by_kernel(recurrent: Tensor, pending: Tensor, position: Tensor) -> None:
    kernel = pytest.importorskip("gdn.ops.triton_pending", exc_type=ImportError)
    if os.environ.get("TRITON_INTERPRET") != "1" and not GPU:
        pytest.skip("needs a CUDA device or TRITON_INTERPRET=1")
    kernel.settle(recurrent, pending, position)


def by_torch(recurrent: Tensor, pending: Tensor, position: Tensor) -> None:
    """On the CPU, wherever the tensors lie."""
    own = [tensor.cpu() for tensor in (recurrent, pending, position)]
    settle(*own)
    recurrent.copy_(own[0])
    pending.copy_(own[1])


WAYS = pytest.mark.parametrize("bring_in", [by_torch, by_kernel])
BringIn = Callable[[Tensor, Tensor, Tensor], None]


def some(tokens: int, strongest: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States, slots as `tokens` tokens filled them, positions after those, and the states that had taken each token up.

    strongest: no logarithm of a decay is lower.
    """
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    states, slots = normal(L, N, HV, K, V), normal(L, N, HV, SLOTS, slot_size(K, V))
    position = STARTS
    wanted, head = states.clone(), torch.arange(L * HV).view(L, 1, HV)
    index = (position[:, None] + head) % SLOTS  # of the next token's slot
    slots[..., K : K + V + 1] = 0.0  # what whole passes leave: slots that count as filled and add nothing
    for _ in range(tokens):
        k, w, g = l2_norm(normal(L, N, HV, K)), normal(L, N, HV, V), -strongest * torch.rand(L, N, HV, generator=generator)
        token = torch.cat([k, w, g.double()[..., None], normal(L, N, HV, 3)], -1)
        slots.scatter_(3, index[..., None, None].expand(-1, -1, -1, 1, token.shape[-1]), token.unsqueeze(3))
        wanted = wanted * g.double().exp()[..., None, None] + k.unsqueeze(-1) * w.unsqueeze(-2)
        index, position = index + 1, position + 1
        assert (index < SLOTS).all()  # a token in the last slot would have been taken up
    return states.float().to(DEVICE), slots.float().to(DEVICE), position.to(DEVICE), wanted.to(DEVICE)


FITTING = 3  # tokens that fit behind the fullest slots of `some`, of the last head of the row at 1


@WAYS
@pytest.mark.parametrize("strongest", [1.0, 300.0])
def test_pending_tokens_are_those_taken_up_one_by_one(bring_in: BringIn, strongest: float) -> None:
    states, slots, position, wanted = some(FITTING, strongest)
    before = states.clone()
    bring_in(states, slots, position)
    assert relative_error(states, wanted) <= 1e-6 < 1e-2 < relative_error(before, wanted)
    assert not slots[..., K : K + V + 1].any()
    again = states.clone()
    bring_in(again, slots, position)
    assert torch.equal(again, states)


@WAYS
def test_nothing_pending_changes_no_bit(bring_in: BringIn) -> None:
    states, slots, position, _ = some(0)
    before = states.clone()
    bring_in(states, slots, position)
    assert torch.equal(states, before)


@WAYS
def test_rows_of_a_larger_state(bring_in: BringIn) -> None:
    states, slots, position, _ = some(FITTING)
    whole, part = (states.clone(), slots.clone()), (states.clone(), slots.clone())
    bring_in(*whole, position)
    bring_in(*(tensor[:, 1:] for tensor in part), position[1:])
    assert relative_error(part[0][:, 1:], whole[0][:, 1:]) <= 1e-6
    assert torch.equal(part[0][:, :1], states[:, :1]) and torch.equal(part[1][:, :1], slots[:, :1])


@WAYS
def test_decays_that_leave_nothing(bring_in: BringIn) -> None:
    """Of minus infinity: what came before is gone, and nothing is nan."""
    states, slots, position, _ = some(FITTING)
    slots[..., K + V] = -torch.inf
    bring_in(states, slots, position)
    assert states.isfinite().all() and states.any(-1).any(-1).all()  # the last token stays


@WAYS
def test_slots_that_were_taken_up_are_not_taken_up_again(bring_in: BringIn) -> None:
    """A state just written has old tokens in its slots, which a later position would count as filled."""
    states, slots, _, _ = some(0)
    slots.normal_()
    head = torch.arange(L * HV, device=DEVICE).view(L, HV)
    position = torch.full((N,), 10 * SLOTS, device=DEVICE)
    written = ((head[:, None] + position[:, None]) % SLOTS == 0).expand(L, N, HV)
    before = states.clone()
    bring_in(states, slots, position)
    assert torch.equal(states[written], before[written]) and written.any() and not torch.equal(states, before)
    assert not slots[..., K : K + V + 1].any()
    after = states.clone()
    bring_in(states, slots, position + 5)
    assert torch.equal(states, after)


@WAYS
def test_what_unfilled_slots_hold_is_not_looked_at(bring_in: BringIn) -> None:
    states, slots, position, wanted = some(FITTING)
    index = (position[:, None].cpu() + torch.arange(L * HV).view(L, 1, HV)) % SLOTS
    unfilled = torch.arange(SLOTS) >= index[..., None]
    slots[unfilled.to(DEVICE)] = torch.nan
    bring_in(states, slots, position)
    assert relative_error(states, wanted) <= 1e-6
    assert not slots[..., K : K + V + 1].any()


def test_states_without_slots_are_left_alone() -> None:
    states = torch.randn(L, N, HV, K, V)
    before = states.clone()
    settle(states, torch.empty(L, N, HV, 0, slot_size(K, V)), torch.tensor([1, 2, 3]))
    assert torch.equal(states, before)
