"""A folder of safetensors and config.json to a model, and back: run checkpoints and Hugging Face folders alike."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gdn.errors import CheckpointError
from gdn.model.config import MODEL_TYPE, ModelConfig
from gdn.model.lm import GatedDeltaNetLM

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_FLOAT32 = ("A_log", "dt_bias")  # the gates' parameters keep float32 whatever the rest is stored or computed in


def read_config(folder: Path) -> ModelConfig:
    """The architecture in `folder`/config.json; CheckpointError if there is none, ConfigError if it is not ours to build."""
    return ModelConfig.from_json(read_json(folder / CONFIG), str(folder / CONFIG))


def is_ours(folder: Path) -> bool:
    """Whether `folder`/config.json is of this architecture; CheckpointError if there is none."""
    return bool(read_json(folder / CONFIG).get("model_type") == MODEL_TYPE)


def read_json(path: Path, expected: str = f"a folder with {CONFIG} and {WEIGHTS}") -> dict[str, Any]:
    """A JSON object from a file; CheckpointError naming it if it is missing, where `expected` should be, or broken."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise CheckpointError(f"{path}: no such file; expected {expected}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def load_model(folder: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> GatedDeltaNetLM:
    """The model in `folder`, in evaluation mode; `dtype` of its weights, None: as stored (gate parameters stay float32).

    Raises CheckpointError for missing, surplus, misshapen or damaged weights, naming them.
    """
    config = read_config(folder)
    with torch.device("meta"):
        model = GatedDeltaNetLM(config)
    tensors = read_tensors(folder)
    if config.tie_word_embeddings:
        tensors.setdefault("lm_head.weight", tensors.get("model.embeddings.weight", torch.empty(0)))
    _check_keys(model, tensors, folder)
    for name in tensors:
        tensors[name] = tensors[name].to(device=device, dtype=stored_dtype(name, dtype))
    model.load_state_dict(tensors, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embeddings.weight
    return model.eval()


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder's safetensors file or shards."""
    if (folder / INDEX).exists():
        files = sorted({folder / name for name in read_json(folder / INDEX)["weight_map"].values()})
    else:
        files = [folder / WEIGHTS]
    tensors = {}
    for file in files:
        if not file.exists():
            raise CheckpointError(f"{file}: no such file; expected the model's weights")
        try:
            with safe_open(file, framework="pt") as stream:
                tensors.update({name: stream.get_tensor(name) for name in stream.keys()})  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(f"{file}: damaged or no safetensors file: {error}") from None
    return tensors


def save_model(model: GatedDeltaNetLM, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write config.json and model.safetensors into the existing `folder`; tied weights once, gate parameters in float32."""
    stored = str(dtype or model.model.embeddings.weight.dtype).removeprefix("torch.")
    text = json.dumps(model.config.to_json() | {"dtype": stored}, indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        tensors[name] = tensor.detach().to(device="cpu", dtype=stored_dtype(name, dtype)).contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def stored_dtype(name: str, dtype: torch.dtype | None) -> torch.dtype | None:
    """The dtype of the weight `name` where `dtype` is asked of the whole model; None: whatever it has."""
    return torch.float32 if name.endswith(_FLOAT32) else dtype


def _check_keys(model: GatedDeltaNetLM, tensors: dict[str, Tensor], folder: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing, surplus = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or surplus:
        raise CheckpointError(
            f"{folder}: weights do not fit {CONFIG}: {len(missing)} missing (first: {missing[:1]}), "
            f"{len(surplus)} surplus (first: {surplus[:1]})"
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(f"{folder}: {name} is {tuple(tensors[name].shape)}; {CONFIG} says {shape}")
