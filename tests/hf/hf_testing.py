"""A tiny model with all weights away from their neutral values, and the recorded one as a folder that transformers loads."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

pytest.importorskip("transformers")

from gdn.hf import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
from gdn.model.lm import GatedDeltaNetLM

VOCAB = 67
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 8, "expand_v": 2}


@pytest.fixture(scope="session")
def make() -> Callable[..., GatedDeltaNetForCausalLM]:
    """make(**config) -> a model in evaluation mode whose greedy text varies."""

    def build(**config: Any) -> GatedDeltaNetForCausalLM:
        model = GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**SMALL | {"eos_token_id": None} | config))
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                scale = 0.6 if "embed" in name or "lm_head" in name else 0.15
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
        return model.eval()

    return build


@pytest.fixture(scope="session")
def model(make: Callable[..., GatedDeltaNetForCausalLM]) -> GatedDeltaNetForCausalLM:
    return make()


@pytest.fixture(scope="session")
def recorded(test_data: Callable[[str], Path]) -> dict[str, Tensor]:
    return load_file(test_data("fixtures/gated_deltanet_a.safetensors"))


@pytest.fixture(scope="session")
def recorded_folder(
    test_data: Callable[[str], Path], recorded: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("recorded")
    shutil.copy(test_data("fixtures/gated_deltanet_a.config.json"), folder / "config.json")
    weights = {name[6:]: tensor for name, tensor in recorded.items() if name.startswith("model.")}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.detach().double() - wanted.detach().double()).norm() / wanted.detach().double().norm())


def plain(model: GatedDeltaNetForCausalLM) -> GatedDeltaNetLM:
    """The same weights in gdn's own model."""
    own = GatedDeltaNetLM(model.config.to_model_config())
    own.load_state_dict(model.state_dict())
    return own.eval()


def config_json(folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return data
