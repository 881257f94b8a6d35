"""The table of docs/numerics.md for the CPU: what must not change the answer, in float32 and bf16, each with a control.

Relative 2-norms of logits. A control is the same comparison with one thing wrong that the claim is about: it must miss the
bound by far, or the bound would say nothing. One model is of random weights, the other flash-linear-attention's recorded one.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_testing import plain, relative
from torch import Tensor
from transformers import AutoModelForCausalLM

from gdn.generation.engine import for_decoding, generate, prefill
from gdn.generation.sampling import Sampling
from gdn.hf import GatedDeltaNetForCausalLM
from gdn.model.lm import GatedDeltaNetLM

BOUNDS = {  # claim -> dtype -> bound
    "cut": {torch.float32: 1e-5, torch.bfloat16: 2e-2},
    "padding": {torch.float32: 1e-5, torch.bfloat16: 1e-2},
    "batch": {torch.float32: 1e-5, torch.bfloat16: 1e-2},
}
LENGTH = 150
GREEDY = Sampling(temperature=0)

Face = GatedDeltaNetForCausalLM


@pytest.fixture(params=["random", "recorded"])
def source(request: pytest.FixtureRequest, model: Face) -> Face:
    """The model of a test, in float32."""
    if request.param == "random":
        return model
    loaded: Face = AutoModelForCausalLM.from_pretrained(request.getfixturevalue("recorded_folder")).eval()
    return loaded


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def face(request: pytest.FixtureRequest, source: Face, tmp_path: Path) -> Face:
    source.save_pretrained(tmp_path)
    loaded: Face = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=request.param).eval()
    return loaded


def ids_for(model: Face, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def holds(claim: str, got: Tensor, wanted: Tensor, control: Tensor) -> None:
    """The claim within its bound, its control at least three times beyond it."""
    bound = BOUNDS[claim][wanted.dtype]
    assert relative(got, wanted) < bound
    assert relative(control, wanted) > 3 * bound


def read(model: GatedDeltaNetLM, ids: Tensor, cuts: list[int], forget: int | None = None) -> Tensor:
    """Logits of ids read in pieces of these lengths; `forget`: the piece before which the state is emptied, as a control."""
    state, logits = model.new_state(len(ids)), []
    for i, piece in enumerate(ids.split(cuts, dim=1)):
        if i == forget:
            state.reset()
        logits.append(model(piece, state=state).logits)
    return torch.cat(logits, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("cuts", [[64, 64, 22], [1] * LENGTH, [63, 1, 2, 84], [149, 1]], ids=lambda cuts: f"{len(cuts)}-pieces")
def test_full_is_chunks_is_token_by_token(face: Face, cuts: list[int]) -> None:
    own, ids = plain(face).to(face.dtype), ids_for(face, 2, LENGTH)
    wanted = face(ids).logits
    holds("cut", read(own, ids, cuts), wanted, read(own, ids, [75, 75], forget=1))
    cache = face(ids[:, : cuts[0]]).past_key_values
    rest = face(ids[:, cuts[0] :], past_key_values=cache).logits
    holds("cut", rest, wanted[:, cuts[0] :], face(ids[:, cuts[0] :]).logits)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "interior"])
def test_padding_is_no_padding(face: Face, side: str) -> None:
    lengths, width = (LENGTH, 70, 1, 33), LENGTH + 13
    ids, mask = ids_for(face, 4, width, seed=9), torch.zeros(4, width, dtype=torch.long)
    rows = [ids_for(face, 1, length, seed=length) for length in lengths]
    for i, (row, length) in enumerate(zip(rows, lengths)):
        places = {
            "left": torch.arange(width - length, width),
            "right": torch.arange(length),
            "interior": torch.linspace(0, width - 1, length).long(),
        }[side]
        ids[i, places], mask[i, places] = row[0], 1
    padded = face(ids, attention_mask=mask).logits[mask == 1]
    unmasked = ids.masked_fill(mask == 0, 0)
    alone = torch.cat([face(row).logits[0] for row in rows])
    control = face(unmasked).logits[mask == 1]
    if side == "right":  # a causal model does not see what comes after: here the mask itself is what the control gets wrong
        control = face(ids, attention_mask=mask.roll(1, dims=1)).logits[mask == 1]
    holds("padding", padded, alone, control)


@torch.no_grad()
@pytest.mark.parametrize("rows", [2, 5, 17])
def test_a_row_in_a_batch_is_the_row_alone(face: Face, rows: int) -> None:
    ids = ids_for(face, rows, LENGTH)
    batch = face(ids).logits
    for row in {0, rows // 2, rows - 1}:
        holds("batch", batch[row], face(ids[row : row + 1]).logits[0], batch[(row + 1) % rows])
    own = plain(face).to(face.dtype)
    step = read(own, ids, [LENGTH - 1, 1])[:, -1]
    holds("batch", step[0], read(own, ids[:1], [LENGTH - 1, 1])[0, -1], step[1])


@torch.no_grad()
def test_packed_documents_are_each_alone(face: Face) -> None:
    own, lengths = plain(face).to(face.dtype), [70, 1, 64, 15]
    documents = [ids_for(face, 1, length, seed=length) for length in lengths]
    packed, bounds = torch.cat(documents, dim=1), torch.tensor([0, *lengths]).cumsum(0).int()
    alone = torch.cat([own(document).logits[0] for document in documents])
    holds("batch", own(packed, cu_seqlens=bounds).logits[0], alone, own(packed).logits[0])


@torch.no_grad()
def test_bf16_on_whatever_this_cpu_decodes_with_is_the_model(source: Face) -> None:
    """The engine's own way: prefill and lean steps after `for_decoding`, beside the whole text at once in float64."""
    own = plain(source).to(torch.bfloat16)
    exact = plain(source).to(torch.bfloat16).double()
    ids = ids_for(source, LENGTH)
    model = for_decoding(own, "cpu")
    state, logits = model.new_state(1), []
    for end in (70, *range(71, LENGTH + 1)):
        logits.append(prefill(model, ids[70 if end == 70 else end - 1 : end] if end > 70 else ids[:70], state))
    got, wanted = torch.cat(logits).double(), exact(ids[None]).logits[0, 69:]
    assert relative(got, wanted) < BOUNDS["cut"][torch.bfloat16]
    assert relative(got.roll(1, 0), wanted) > 3 * BOUNDS["cut"][torch.bfloat16]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_loaded_or_forked_state_goes_on_to_the_bit(source: Face, dtype: torch.dtype, tmp_path: Path) -> None:
    model = for_decoding(plain(source).to(dtype), "cpu")
    ids = ids_for(source, 75)
    state = model.new_state(1)
    prefill(model, ids, state)
    state.save(tmp_path / "state", model)
    fork, loaded = state.fork(), type(state).load(tmp_path / "state", model)
    chosen = state.select(torch.tensor([0]))
    reset = model.new_state(1)
    texts, states = [], [state, fork, loaded, chosen, reset]
    for one in states:
        texts.append(list(generate(model, [5], max_new_tokens=20, sampling=GREEDY, state=one)))
    assert texts[:4] == [texts[0]] * 4
    assert all(torch.equal(one.recurrent, state.recurrent) for one in states[:4])
    assert not torch.equal(reset.recurrent, state.recurrent)  # the control: an empty state is another one


def test_recorded_outputs_of_flash_linear_attention(
    recorded_folder: Path, recorded: dict[str, Tensor], make: Callable[..., Face]
) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(recorded_folder).eval()
    ids, wanted = recorded["model_io.input_ids"][:, :48], recorded["model_io.logits_fp32_first48"]
    with torch.no_grad():
        assert relative(loaded(ids).logits, wanted) < 1e-5
        assert relative(read(plain(loaded), ids, [20, 27, 1]), wanted) < 1e-5
        loaded.model.layers[1].attn.dt_bias += 0.01
        assert relative(loaded(ids).logits, wanted) > 3e-5
