import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_testing import config_json, plain, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from gdn.data.tokenizer import train_bpe
from gdn.errors import CheckpointError
from gdn.hf import GatedDeltaNetForCausalLM, export, write_card
from gdn.model.lm import GatedDeltaNetLM
from gdn.model.load import load_model

Make = Callable[..., GatedDeltaNetForCausalLM]


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [{}, {"tie_word_embeddings": True}], ids=["plain", "tied"])
def test_an_export_is_complete_and_the_same_model(
    make: Make, tmp_path: Path, dtype: torch.dtype | None, config: dict[str, Any]
) -> None:
    own = plain(make(vocab_size=300, bos_token_id=0, eos_token_id=0, **config))
    tokenizer, out = train_bpe(["the cat sat on the mat. " * 20], 300), tmp_path / "deep" / "out"
    card = write_card({"name": "tiny"}, {}, {})
    export(own, out, tokenizer_files=tokenizer.save, card=card, dtype=dtype)
    assert {path.name for path in out.iterdir()} == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md",
        "modeling_gated_deltanet.py",
    }  # fmt: skip
    assert (out / "README.md").read_text() == card
    loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert loaded.dtype == (dtype or torch.float32) == getattr(torch, config_json(out)["dtype"])
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id) == (0, 0)
    settings = GenerationConfig.from_pretrained(out)
    assert (settings.bos_token_id, settings.eos_token_id) == (0, 0)
    with torch.no_grad():
        assert torch.equal(loaded(tokens(2, 30)).logits, load_model(out)(tokens(2, 30)).logits)
        if dtype is None:
            assert torch.equal(loaded(tokens(2, 30)).logits, own(tokens(2, 30)).logits)
    text = "the cat on the mat"
    assert AutoTokenizer.from_pretrained(out)(text)["input_ids"] == tokenizer.encode(text)


def alter(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    flat = tensors[name].view(-1)
    flat[0] = float("nan") if name.endswith("A_log") else flat[0] * 1.01 + 0.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["model.layers.0.attn.q_proj.weight", "model.layers.1.attn.A_log", "lm_head.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_altered_weight_is_not_published(make: Make, tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """The tokenizer's writer comes between the weights and the check, which must see what lies in the folder."""
    own, out = plain(make()), tmp_path / "out"
    with pytest.raises(CheckpointError, match=rf"{out}: not published: .* differ .* by (nan|\d\.\de[-+]\d+)"):
        export(own, out, tokenizer_files=lambda folder: alter(folder, name), dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_an_altered_configuration_is_not_published(make: Make, tmp_path: Path) -> None:
    def double_write_strength(folder: Path) -> None:
        data = config_json(folder) | {"allow_neg_eigval": True}
        (folder / "config.json").write_text(json.dumps(data))

    with pytest.raises(CheckpointError, match="not published"):
        export(plain(make()), tmp_path / "out", tokenizer_files=double_write_strength)
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_untouched_and_an_existing_folder_kept(make: Make, tmp_path: Path) -> None:
    own = plain(make()).train()
    before = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    export(own, tmp_path / "out", dtype=torch.bfloat16)
    after = own.state_dict()
    assert all(after[name].dtype == before[name].dtype and torch.equal(after[name], before[name]) for name in before)
    assert own.training
    stamp = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(FileExistsError, match="out"):
        export(own, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == stamp


def test_a_model_computing_in_bfloat16_exports_its_float32_weights(make: Make, tmp_path: Path) -> None:
    own = plain(make())
    mixed = GatedDeltaNetLM(own.config, compute_dtype=torch.bfloat16)
    mixed.load_state_dict(own.state_dict())
    export(mixed, tmp_path / "out")
    loaded = load_model(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in own.state_dict().items())


def test_the_card_tells_recipe_data_and_results() -> None:
    recipe = {
        "name": "gdn-small",
        "model": {"hidden_size": 64, "conv": {"size": 4}},
        "optim": {"lr": 0.0004, "betas": [0.9, 0.95]},
    }
    card = write_card(recipe, {"source": "a|b\nc", "tokens": 12345}, {"bits per byte": 1.912345678})
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: text-generation\n")
    assert "# gdn-small" in card and "import gdn.hf" in card
    for row in (
        "| model.hidden_size | 64 |",
        "| model.conv.size | 4 |",
        "| optim.lr | 0.0004 |",
        "| optim.betas | [0.9, 0.95] |",
        r"| source | a\|b c |",
        "| tokens | 12345 |",
        "| bits per byte | 1.91235 |",
    ):
        assert row in card, row
    assert "## Measured results\n\nNone recorded." in write_card(recipe, {}, {})
