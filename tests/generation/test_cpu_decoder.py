"""The step with joined projections against the modules' own: every switch, both dtypes; and what joining leaves as it was."""

import copy
import gc
import mmap
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from generation_testing import SWITCHES, build, by_modules, exactly, random_ids, relative
from torch import Tensor

from gdn.generation import cpu_decoder, cpu_products
from gdn.generation.cpu_decoder import CPUDecoder
from gdn.generation.weights import join_projections
from gdn.model.layers import Linear
from gdn.model.lm import GatedDeltaNetLM
from gdn.model.load import load_model, save_model
from gdn.model.state import DecodeState


def by_decoder(model: GatedDeltaNetLM, ids: list[int]) -> tuple[Tensor, DecodeState]:
    state, decoder = model.new_state(1), CPUDecoder(model)
    return torch.stack([decoder.step(token, state) for token in ids]), state


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize("way", ["float32", "packed", "rounded"])
def test_a_step_is_the_modules_step(switches: dict[str, Any], way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16: as the modules have it in float64 on the same weights. Where a copy in float16 does not serve, rows are rounded."""
    dtype, bound = (torch.float32 if way == "float32" else torch.bfloat16), (2e-2 if way == "rounded" else 1e-5)
    if way != "packed":
        monkeypatch.setattr(cpu_products, "packs", lambda weight: False)
    model, ids = build(dtype, **switches), random_ids(40)
    wanted, wanted_state = by_modules(model if dtype == torch.float32 else exactly(model), ids)
    rounded, _ = by_modules(model, ids)
    model.compute_dtype = torch.float32
    join_projections(model)
    assert CPUDecoder.serves(model) and CPUDecoder.reads(model)
    got, state = by_decoder(model, ids)
    assert got.dtype == torch.float32 and relative(got, wanted) < bound
    assert way == "float32" or relative(got, wanted) < relative(rounded, wanted)
    assert relative(state.recurrent, wanted_state.recurrent) < bound
    assert state.conv.numel() == 0 or relative(state.conv, wanted_state.conv) < bound
    assert state.position.tolist() == [40]


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_read_together_are_the_modules_rows(switches: dict[str, Any], dtype: torch.dtype) -> None:
    """A prompt of three rows, a second one on its state, then single tokens beside each other."""
    model, pieces = build(dtype, **switches), torch.tensor([random_ids(121, seed) for seed in (1, 2, 3)]).split([90, 30, 1], 1)
    exact = model if dtype == torch.float32 else exactly(model)
    wanted_state = exact.new_state(3)
    with torch.no_grad():
        wanted = [exact(piece, state=wanted_state, last_only=True).logits for piece in pieces]
    model.compute_dtype = torch.float32
    join_projections(model)
    state, decoder = model.new_state(3), CPUDecoder(model)
    for piece, logits in zip(pieces, wanted):
        assert relative(decoder.read(piece, state), logits) < 1e-5
    assert relative(state.recurrent, wanted_state.recurrent) < 1e-5
    assert state.conv.numel() == 0 or relative(state.conv, wanted_state.conv) < 1e-5
    assert state.position.tolist() == [121] * 3


def test_a_model_of_bf16_activations_reads_prompts_by_its_modules() -> None:
    model = build(torch.bfloat16)
    join_projections(model)
    assert CPUDecoder.serves(model) and not CPUDecoder.reads(model)


def test_copies_of_weights_are_made_once_and_again_when_one_changes() -> None:
    model, ids = build(torch.bfloat16), random_ids(10)
    join_projections(model)
    before, _ = by_decoder(model, ids)
    kept = cpu_decoder._products(model)
    assert cpu_decoder._products(model) is kept
    model.model.layers[1].mlp.up_proj.weight.mul_(2)
    after, _ = by_decoder(model, ids)
    assert cpu_decoder._products(model) is not kept
    assert relative(after, before) > 1e-3 and relative(after, by_modules(model, ids)[0]) < 3e-2


def test_a_wrong_step_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: one gate a thousandth off is more than its bound."""
    model, ids = build(), random_ids(40)
    wanted, _ = by_modules(model, ids)
    join_projections(model)
    layer = cpu_decoder.layer_weights
    monkeypatch.setattr(cpu_decoder, "layer_weights", lambda block: layer(block)._replace(rate=layer(block).rate * 1.001))
    assert relative(by_decoder(model, ids)[0], wanted) > 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_joining_changes_no_value_name_or_memory(dtype: torch.dtype, tmp_path: Path) -> None:
    model, ids = build(dtype), torch.tensor([random_ids(70)])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = model(ids).logits
    assert not CPUDecoder.serves(model)
    for _ in range(2):
        join_projections(model)
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert torch.equal(model(ids).logits, wanted)
        attn = model.model.layers[0].attn
        assert attn.q_proj.weight.untyped_storage().data_ptr() == attn.g_proj.weight.untyped_storage().data_ptr()
        total = sum(linear.weight.nbytes for linear in (attn.q_proj, attn.k_proj, attn.v_proj, attn.a_proj, attn.b_proj))
        assert attn.q_proj.weight.untyped_storage().nbytes() == total + attn.g_proj.weight.nbytes
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.state_dict().items())
    assert not CPUDecoder.serves(loaded)


@pytest.mark.parametrize("system", ["large pages", "no such advice", "none to give"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_float32_matrices_move_to_large_pages_where_there_are_some(
    system: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, as they are; the memory goes with the model. macOS knows no such advice; kernels may refuse it."""
    if system == "no such advice":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    elif system == "none to give":
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1, raising=False)
    elif not hasattr(mmap, "MADV_HUGEPAGE"):
        pytest.skip("no large pages to ask for here")
    model, ids = build(tie_word_embeddings=tied), torch.tensor([random_ids(70)])
    before, wanted = copy.deepcopy(model.state_dict()), model(ids).logits
    pieces: list[weakref.ref[mmap.mmap]] = []
    map_memory = mmap.mmap

    def recorded(*args: Any, **kwargs: Any) -> mmap.mmap:
        memory = map_memory(*args, **kwargs)
        pieces.append(weakref.ref(memory))
        return memory

    monkeypatch.setattr(mmap, "mmap", recorded)
    for _ in range(2):
        join_projections(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert (model.lm_head.weight is model.model.embeddings.weight) == tied and torch.equal(model(ids).logits, wanted)
    kept = [memory for piece in pieces if (memory := piece()) is not None]
    assert len(kept) == (system == "large pages")
    for memory in kept:
        start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        matrices = [module.weight for module in model.modules() if isinstance(module, Linear)]
        assert all(start <= matrix.data_ptr() < start + len(memory) for matrix in matrices)
        assert not any(matrix.data_ptr() % 64 for matrix in (model.lm_head.weight, model.model.layers[1].mlp.down_proj.weight))
    del model, kept
    memory = matrices = None
    gc.collect()
    assert not any(piece() for piece in pieces)


def test_models_it_cannot_step_are_left_to_the_modules() -> None:
    for model in (build(torch.float64), build()):
        join_projections(model)
        model.compute_dtype = torch.bfloat16  # narrower than the weights: the modules round, the step would not
        assert not CPUDecoder.serves(model)
    model.compute_dtype = None
    assert CPUDecoder.serves(model)
    model.to(torch.bfloat16)  # every parameter got memory of its own
    assert not CPUDecoder.serves(model)


def test_rows_of_one_storage_that_are_out_of_order_are_not_taken_for_joined() -> None:
    model = build()
    join_projections(model)
    attn = model.model.layers[0].attn
    attn.q_proj.weight, attn.k_proj.weight = attn.k_proj.weight, attn.q_proj.weight
    assert not CPUDecoder.serves(model)
