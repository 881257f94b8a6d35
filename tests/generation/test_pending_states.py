"""States with pending tokens, wherever states go: copies, files' rows, caches of transformers, whole passes.

Slots are filled by hand: where there is no GPU, nothing else would fill them.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from generation_testing import random_ids, tiny_model
from torch import Tensor

from gdn.generation import engine
from gdn.model import state as state_module
from gdn.model.lm import GatedDeltaNetLM
from gdn.model.state import DecodeState
from gdn.ops.pending import SLOTS


@pytest.fixture(autouse=True)
def slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "slots_for", lambda *_: SLOTS)


def fill(state: DecodeState) -> DecodeState:
    """As tokens at three positions would: keys of length 1, decays."""
    generator = torch.Generator().manual_seed(1)
    K = state.recurrent.shape[3]
    for tensor in (state.recurrent, state.conv, state.pending):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    state.pending[..., :K] /= state.pending[..., :K].norm(dim=-1, keepdim=True)
    state.pending[..., -4] = -torch.rand(state.pending.shape[:-1], generator=generator)
    state.position.copy_(torch.arange(state.rows) * 3 + 5)
    return state


def same(state: DecodeState, wanted: DecodeState) -> bool:
    return all(torch.equal(a, b) for a, b in zip(state.tensors().values(), wanted.tensors().values()))


def test_copies_have_what_is_pending() -> None:
    state = fill(tiny_model().new_state(3))
    fork, chosen, other = state.fork(), state.select(torch.tensor([2, 0, 2, 1])), fill(tiny_model().new_state(3))
    assert same(fork, state) and fork.pending.data_ptr() != state.pending.data_ptr()
    assert all(same(chosen.view(n, n + 1), state.view(row, row + 1)) for n, row in enumerate((2, 0, 2, 1)))
    other.pending.normal_()
    assert not same(other, state)
    other.copy_(state)
    assert same(other, state)
    state.view(1, 2).reset()
    assert not any(tensor.any() for tensor in state.view(1, 2).tensors().values())
    assert same(state.view(0, 1), fork.view(0, 1)) and same(state.view(2, 3), fork.view(2, 3))


def by_model(model: GatedDeltaNetLM, ids: list[int], state: DecodeState) -> Tensor:
    with torch.no_grad():
        logits = model(torch.as_tensor(ids)[None], state=state, last_only=True).logits
    assert logits is not None
    return logits


def by_engine(model: GatedDeltaNetLM, ids: list[int], state: DecodeState) -> Tensor:
    return engine.prefill(model, ids, state)


@pytest.mark.parametrize("read", [by_model, by_engine])
@pytest.mark.parametrize("length", [1, 9])
def test_whatever_reads_a_state_settles_it_first(
    read: Callable[[GatedDeltaNetLM, list[int], DecodeState], Tensor], length: int
) -> None:
    model, ids = tiny_model(), random_ids(length)
    state = fill(model.new_state(1))
    settled, forgetful = state.fork(), state.fork()
    settled.settle()
    forgetful.pending.zero_()
    got, wanted, wrong = (read(model, ids, one) for one in (state, settled, forgetful))
    assert torch.equal(got, wanted) and not torch.allclose(got, wrong, rtol=1e-3)
    assert torch.equal(state.recurrent, settled.recurrent) and not state.pending.any()


def test_caches_of_transformers_carry_and_settle_it() -> None:
    pytest.importorskip("transformers")
    from gdn.hf import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 16, "expand_v": 1}
    torch.manual_seed(0)
    face = GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**sizes)).eval()
    ids = torch.randint(61, (3, 7), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        cache = face(ids).past_key_values
        fill(cache.state)
        copied, kept = copy.deepcopy(cache), cache.state.fork()
        assert same(copied.state, kept)
        order = torch.tensor([2, 0, 0])
        cache.reorder_cache(order)  # in place
        assert same(cache.state, kept.select(order))
        cache.batch_repeat_interleave(2)
        assert same(cache.state, kept.select(order.repeat_interleave(2)))
        settled, forgetful = copy.deepcopy(copied), copy.deepcopy(copied)
        settled.state.settle()
        forgetful.state.pending.zero_()
        got, wanted, wrong = (face(ids, past_key_values=one).logits for one in (copied, settled, forgetful))
    assert torch.equal(got, wanted) and not torch.allclose(got, wrong, rtol=1e-3)
    copied.reset()
    assert not any(tensor.any() for tensor in copied.state.tensors().values())
