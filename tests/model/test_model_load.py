import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gdn.errors import CheckpointError, ConfigError
from gdn.model.config import ModelConfig
from gdn.model.lm import GatedDeltaNetLM, init_weights
from gdn.model.load import load_model, save_model


@pytest.fixture
def folder(tmp_path: Path, make: Callable[..., GatedDeltaNetLM]) -> Path:
    save_model(make(torch.float32), tmp_path)
    return tmp_path


def test_round_trip(switches: dict[str, Any], tmp_path: Path, make: Callable[..., GatedDeltaNetLM]) -> None:
    model = make(torch.float32, **switches)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == model.config and not loaded.training
    saved, found = model.state_dict(), loaded.state_dict()
    assert saved.keys() == found.keys()
    assert all(torch.equal(saved[name], found[name]) for name in saved)
    if model.config.tie_word_embeddings:
        assert loaded.lm_head.weight is loaded.model.embeddings.weight
        assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_stored_types(folder: Path, make: Callable[..., GatedDeltaNetLM]) -> None:
    model = make(torch.float32)
    save_model(model, folder, dtype=torch.bfloat16)
    for name, tensor in load_file(folder / "model.safetensors").items():
        wanted = torch.float32 if name.endswith(("A_log", "dt_bias")) else torch.bfloat16
        assert tensor.dtype == wanted, name
        assert torch.equal(tensor, model.state_dict()[name].to(wanted)), name
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    narrow = load_model(folder)
    assert narrow.lm_head.weight.dtype == torch.bfloat16 and narrow.model.layers[0].attn.A_log.dtype == torch.float32
    save_model(narrow, folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_model(folder, dtype=torch.float32).lm_head.weight.dtype == torch.float32


def test_gate_parameters_are_float32_whatever_the_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = GatedDeltaNetLM(ModelConfig(vocab_size=5, hidden_size=8, num_hidden_layers=1, num_heads=1, head_dim=4))
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.model.layers[0].attn.A_log.dtype == model.model.layers[0].attn.dt_bias.dtype == torch.float32
    assert model.lm_head.weight.dtype == torch.bfloat16


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_missing_surplus_and_misshapen_weights_are_named(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.update(extra=torch.zeros(1)))
    with pytest.raises(CheckpointError, match=rf"{folder}.*0 missing .*1 surplus \(first: \['extra'\]\)"):
        load_model(folder)
    change_weights(folder, lambda tensors: (tensors.pop("extra"), tensors.pop("model.norm.weight")))
    with pytest.raises(CheckpointError, match=r"1 missing \(first: \['model.norm.weight'\]\), 0 surplus"):
        load_model(folder)
    change_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(25)}))
    with pytest.raises(CheckpointError, match=r"model.norm.weight is \(25,\); config.json says \(24,\)"):
        load_model(folder)


def test_damaged_files_are_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[:-10], whole[:5], b"", b"not safetensors at all"):
        weights.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{weights}: damaged or no safetensors file"):
            load_model(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=f"{weights}: no such file"):
        load_model(folder)


def test_broken_and_foreign_configs_are_named(folder: Path) -> None:
    config = folder / "config.json"
    data = json.loads(config.read_text())
    for text, message in [
        ("{not", "not valid JSON"),
        ("[1]", "expected a JSON object, got list"),
        ("\udcff", "not valid JSON"),
    ]:
        config.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(CheckpointError, match=f"{config}: {message}"):
            load_model(folder)
    config.write_text(json.dumps(data | {"model_type": "gla"}))
    with pytest.raises(ConfigError, match=f"{config}: model_type = 'gla'; expected 'gated_deltanet'"):
        load_model(folder)
    config.write_text(json.dumps(data | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match="missing"):
        load_model(folder)
    config.unlink()
    with pytest.raises(CheckpointError, match=f"{config}: no such file"):
        load_model(folder)


def test_shards_are_read(folder: Path) -> None:
    tensors, names = load_file(folder / "model.safetensors"), {}
    for i, name in enumerate(tensors):
        names[name] = f"part-{i % 2}.safetensors"
    for file in set(names.values()):
        save_file({name: tensors[name] for name in tensors if names[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    found = load_model(folder).state_dict()
    assert all(torch.equal(tensors[name], found[name]) for name in tensors)


def initialised(init: Any, seed: int, **config: Any) -> GatedDeltaNetLM:
    model = GatedDeltaNetLM(
        ModelConfig(vocab_size=300, hidden_size=64, num_hidden_layers=2, num_heads=64, head_dim=2, **config)
    )
    init_weights(model, init, seed)
    return model


def test_initialisation_is_a_function_of_the_seed() -> None:
    state = torch.get_rng_state()
    first, again, other = (initialised("mamba", seed).state_dict() for seed in (7, 7, 8))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert not torch.equal(first["model.layers.0.attn.A_log"], first["model.layers.1.attn.A_log"])
    torch.set_rng_state(state)
    untouched = torch.rand(1)
    torch.set_rng_state(state)
    model = GatedDeltaNetLM(ModelConfig(vocab_size=5, hidden_size=8, num_hidden_layers=1, num_heads=1, head_dim=4))
    torch.set_rng_state(state)
    init_weights(model, "mamba", 7)
    assert torch.equal(torch.rand(1), untouched)


def test_initialisation_ranges() -> None:
    model = initialised("mamba", 3, conv_bias=True, initializer_range=0.05)
    mixers = [block.attn for block in model.model.layers]
    A = torch.cat([mixer.A_log for mixer in mixers]).detach().exp()
    dt = torch.nn.functional.softplus(torch.cat([mixer.dt_bias for mixer in mixers]).detach())
    assert 0 < A.min() < 1 and 14 < A.max() <= 16 and A.mean() == pytest.approx(8, abs=1.2)
    assert 0.00099 < dt.min() < 0.0015 and 0.07 < dt.max() <= 0.1001
    assert dt.log().mean() == pytest.approx(math.log(0.01), abs=0.3)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert name.endswith("dt_bias") or not parameter.any(), name
        elif not name.endswith("A_log"):
            assert float(parameter.detach().std()) == pytest.approx(0.05, rel=0.15), name


def test_zeros_are_zeros_and_change_nothing_else() -> None:
    mamba, zeros = initialised("mamba", 3), initialised("zeros", 3)
    for block in zeros.model.layers:
        assert not block.attn.A_log.any() and not block.attn.dt_bias.any()
    assert torch.equal(mamba.model.embeddings.weight, zeros.model.embeddings.weight)


def test_tied_embeddings_are_one_weight() -> None:
    model = initialised("mamba", 3, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embeddings.weight
    assert torch.equal(model.model.embeddings.weight, initialised("mamba", 3).model.embeddings.weight)
