"""Decode states as files: a long prompt is read once and resumed at once. Forking and selecting rows: `DecodeState` itself."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gdn.errors import CheckpointError
from gdn.files import publish_file
from gdn.model.lm import GatedDeltaNetLM
from gdn.model.state import DecodeState

LAYOUT = "1"  # of the tensors' names, axes and meaning; raised with any change to them
_TENSORS = ("recurrent", "conv", "position")


def save_state(state: DecodeState, path: Path, model: GatedDeltaNetLM) -> None:
    """Write all rows of `state`, which `model` made, to a safetensors file: complete or absent, in an existing folder."""
    tensors = {name: getattr(state, name).detach().cpu().contiguous() for name in _TENSORS}
    with publish_file(path) as partial:
        partial.write_bytes(save(tensors, metadata={"layout": LAYOUT, **identity(model)}))


def load_state(path: Path, model: GatedDeltaNetLM) -> DecodeState:
    """The state saved at `path`, on the device of `model`: the same bits, if its activations have the dtype they had.

    Raises CheckpointError for a missing or damaged file, another layout, and a state of another model.
    """
    try:
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; expected a saved decode state") from None
    except (SafetensorError, IsADirectoryError) as error:
        raise CheckpointError(f"{path}: damaged or no safetensors file: {error}") from None
    if metadata.get("layout") != LAYOUT:
        raise CheckpointError(f"{path}: layout = {metadata.get('layout')!r}; expected a decode state of layout {LAYOUT!r}")
    for key, wanted in identity(model).items():
        got = metadata.get(key)
        if got != wanted:
            raise CheckpointError(f"{path}: a state of another model: its {key} is {got}; this model's is {wanted}")
    return _fit(tensors, path, model)


def identity(model: GatedDeltaNetLM) -> dict[str, str]:
    """What tells models apart: SHA-256 of the contents of config.json, and of the gate parameters.

    Those are float32 in every copy of a model, whatever the dtype of the rest, and move with every step of training: so a
    state is not taken up by another checkpoint of the same run. Weights that differ elsewhere alone are not told apart.
    """
    config = json.dumps(model.config.to_json(), sort_keys=True).encode()
    gates = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if name.endswith(("A_log", "dt_bias")):
            gates.update(tensor.detach().float().cpu().numpy().tobytes())
    return {"config_sha256": hashlib.sha256(config).hexdigest(), "gates_sha256": gates.hexdigest()}


def _fit(tensors: dict[str, Tensor], path: Path, model: GatedDeltaNetLM) -> DecodeState:
    if tensors.keys() != set(_TENSORS):
        raise CheckpointError(f"{path}: holds {sorted(tensors)}; expected {sorted(_TENSORS)}")
    weight = model.model.embeddings.weight
    rows = tensors["position"].numel()
    expected = DecodeState.empty(model.config, rows, "meta", model.compute_dtype or weight.dtype)
    for name in _TENSORS:
        wanted: Tensor = getattr(expected, name)
        if tensors[name].shape != wanted.shape:
            raise CheckpointError(f"{path}: {name} is {tuple(tensors[name].shape)}; expected {tuple(wanted.shape)}")
        if tensors[name].dtype.is_floating_point != (wanted.dtype != torch.int64):
            raise CheckpointError(f"{path}: {name} is {tensors[name].dtype}; expected {wanted.dtype}")
        tensors[name] = tensors[name].to(weight.device, wanted.dtype)
    return DecodeState(tensors["recurrent"], tensors["conv"], tensors["position"])
