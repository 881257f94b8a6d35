"""States as files: the same bits, the same text, and refusals that say what is wrong with which file."""

import os
from pathlib import Path

import pytest
import torch
from generation_testing import random_ids, tiny_model
from safetensors.torch import load_file, save_file

from gdn.errors import CheckpointError
from gdn.generation.engine import generate, prefill
from gdn.generation.sampling import Sampling
from gdn.model import state as state_module
from gdn.model.state import LAYOUT, DecodeState, identity
from gdn.ops.pending import SLOTS

WARM = Sampling(temperature=0.9, top_k=20, seed=5)


def random_state(rows: int = 3) -> DecodeState:
    state = tiny_model().new_state(rows)
    state.recurrent.normal_()
    state.conv.normal_()
    state.position.copy_(torch.arange(rows) * 10**10)
    return state


def same_bits(a: DecodeState, b: DecodeState) -> bool:
    pairs = zip(a.tensors().values(), b.tensors().values())
    return all(x.dtype == y.dtype and x.equal(y) for x, y in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_round_trip_keeps_every_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    state = model.new_state(2)
    state.recurrent.normal_()
    state.conv.normal_()
    state.position.copy_(torch.tensor([3, 10**12]))
    state.save(tmp_path / "state.safetensors", model)
    assert same_bits(DecodeState.load(tmp_path / "state.safetensors", model), state)


def test_a_selection_of_rows_is_saved_as_it_is(tmp_path: Path) -> None:
    state = random_state().select(torch.tensor([2, 0]))
    state.save(tmp_path / "s", tiny_model())
    assert same_bits(DecodeState.load(tmp_path / "s", tiny_model()), state)


def test_pending_tokens_are_saved_where_there_are_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_module, "slots_for", lambda *_: SLOTS)
    state = random_state()
    assert state.pending.shape == (2, 3, 2, SLOTS, 16 + 16 + 4)
    state.pending.normal_()
    state.save(tmp_path / "s", tiny_model())
    assert same_bits(DecodeState.load(tmp_path / "s", tiny_model()), state)


def test_a_state_saved_on_a_gpu_is_settled_where_there_are_no_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(state_module, "slots_for", lambda *_: SLOTS)
        state = random_state()
        state.pending[..., :32].normal_()
        state.pending[..., 32].uniform_(-1, 0)
        state.position.copy_(torch.tensor([3, 5, 10**10 + 7]))
        state.save(tmp_path / "s", tiny_model())
    loaded, before = DecodeState.load(tmp_path / "s", tiny_model()), state.recurrent.clone()
    state.settle()
    assert loaded.recurrent.equal(state.recurrent) and not loaded.recurrent.equal(before)
    assert loaded.pending.shape == tiny_model().new_state(3).pending.shape


@pytest.mark.parametrize("layout", ["1", LAYOUT])
def test_a_state_without_slots_takes_some_where_there_are(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved on a CPU, or by a version that had none."""
    state, model = random_state(), tiny_model()
    state.save(tmp_path / "s", model)
    tensors = load_file(tmp_path / "s")
    if layout == "1":
        del tensors["pending"]
    save_file(tensors, tmp_path / "s", metadata={"layout": layout} | identity(model))
    monkeypatch.setattr(state_module, "slots_for", lambda *_: SLOTS)
    loaded = DecodeState.load(tmp_path / "s", model)
    assert loaded.recurrent.equal(state.recurrent) and not loaded.pending.any() and loaded.pending.shape[3] == SLOTS


@pytest.mark.parametrize("stop", [1, 6])
def test_saved_loaded_and_going_on_is_never_having_stopped(tmp_path: Path, stop: int) -> None:
    model, ids = tiny_model(), random_ids(90)
    whole_state, state = model.new_state(1), model.new_state(1)
    whole = list(generate(model, ids, max_new_tokens=16, sampling=WARM, state=whole_state))
    head = list(generate(model, ids, max_new_tokens=stop, sampling=WARM, state=state))
    state.save(tmp_path / "s", model)
    fork, loaded = state.fork(), DecodeState.load(tmp_path / "s", tiny_model())
    tails = [
        list(generate(model, head[-1:], max_new_tokens=16 - stop, sampling=WARM, state=one)) for one in (state, fork, loaded)
    ]
    assert [head + tail for tail in tails] == [whole] * 3
    assert same_bits(loaded, whole_state) and same_bits(fork, whole_state)


def test_the_saved_file_does_not_move_with_the_state(tmp_path: Path) -> None:
    model, state = tiny_model(), tiny_model().new_state(1)
    prefill(model, random_ids(20), state)
    before = state.fork()
    state.save(tmp_path / "s", model)
    prefill(model, random_ids(20), state)
    assert not same_bits(state, before)
    assert same_bits(DecodeState.load(tmp_path / "s", model), before)


def test_a_state_of_another_configuration_names_both(tmp_path: Path) -> None:
    mine, other = tiny_model(), tiny_model(num_v_heads=4)
    mine.new_state(1).save(tmp_path / "s", mine)
    with pytest.raises(CheckpointError) as error:
        DecodeState.load(tmp_path / "s", other)
    ours, theirs = identity(mine)["config_sha256"], identity(other)["config_sha256"]
    assert ours != theirs
    assert str(error.value) == (
        f"{tmp_path / 's'}: a state of another model: its config_sha256 is {ours}; this model's is {theirs}"
    )


def test_a_state_of_another_step_of_the_same_run_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model.new_state(1).save(tmp_path / "s", model)
    with torch.no_grad():
        model.model.layers[1].attn.dt_bias[0] += 1e-4
    with pytest.raises(CheckpointError, match="a state of another model: its gates_sha256"):
        DecodeState.load(tmp_path / "s", model)


def test_a_copy_of_the_model_in_another_dtype_takes_the_state(tmp_path: Path) -> None:
    model, state = tiny_model(), random_state(1)
    state.save(tmp_path / "s", model)
    model.compute_dtype = torch.bfloat16
    loaded = DecodeState.load(tmp_path / "s", model)
    assert loaded.recurrent.equal(state.recurrent) and loaded.conv.equal(state.conv.bfloat16())


def test_files_that_are_no_state_are_refused(tmp_path: Path) -> None:
    model, path = tiny_model(), tmp_path / "s"

    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as error:
            DecodeState.load(path, model)
        assert str(path) in str(error.value)

    refused("no such file")
    path.mkdir()
    refused("damaged or no safetensors file")
    path.rmdir()
    model.new_state(1).save(path, model)
    content, tensors = path.read_bytes(), load_file(path)
    for length in (0, 5, 100, len(content) - 1):
        path.write_bytes(content[:length])
        refused("damaged or no safetensors file")
    save_file(tensors, path)
    refused("layout = None; expected a decode state of layout '2'")
    save_file(tensors, path, metadata={"layout": "3"} | identity(model))
    refused("layout = '3'")
    good = {"layout": LAYOUT} | identity(model)
    save_file({"position": tensors["position"]}, path, metadata=good)
    refused(r"holds \['position'\]; expected")
    save_file(tensors | {"position": torch.zeros(2, dtype=torch.int64)}, path, metadata=good)
    refused(r"recurrent is \(2, 1, 2, 16, 16\); expected \(2, 2, 2, 16, 16\)")
    save_file(tensors | {"position": torch.zeros(1)}, path, metadata=good)
    refused("position is torch.float32; expected torch.int64")
    save_file(tensors | {"pending": torch.zeros(2, 1, 2, 4, 36)}, path, metadata=good)
    refused(r"pending is \(2, 1, 2, 4, 36\); expected \(2, 1, 2, 8, 36\)")
    save_file({"position": tensors["position"]}, path, metadata=good | {"layout": "1"})
    refused(r"holds \['position'\]; expected")


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = tiny_model(), tmp_path / "s"
    model.new_state(1).save(path, model)
    before = path.read_bytes()

    def full_disk(self: Path, data: bytes) -> int:
        with self.open("wb") as stream:
            stream.write(data[: len(data) // 2])
        raise OSError(28, os.strerror(28), str(self))

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        random_state(1).save(path, model)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
