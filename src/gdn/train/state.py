"""What a run carries from step to step, and how a checkpoint holds it: safetensors and JSON, nothing else.

A checkpoint is also a model folder: weights, config.json and tokenizer in the same places as in an exported one.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gdn.errors import CheckpointError
from gdn.model.lm import GatedDeltaNetLM
from gdn.model.load import read_config, read_json, read_tensors, save_model

OPTIMIZER, PROGRESS, RECIPE = "optimizer.safetensors", "progress.json", "recipe.toml"


@dataclass
class Progress:
    """Where a run stands. The data order needs no more than `step`: it is a pure function of it."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # tokens trained on
    seconds: float = 0.0  # of training, over all sessions


def write_state(
    folder: Path, model: GatedDeltaNetLM, optimizer: torch.optim.AdamW, progress: Progress, recipe: str, shards: str
) -> None:
    """Write model, optimizer, progress and recipe into `folder`; `shards` is the fingerprint of the data's manifest.

    Raises OSError where the disk does not take them.
    """
    moments: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            moments[f"{name}:{key}"] = value.detach().cpu()
    try:
        save_model(model, folder)
        save_file(moments, folder / OPTIMIZER)
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(f"{folder}: cannot be written: {error}") from None
    text = json.dumps(asdict(progress) | {"shards": shards}, indent=1)
    (folder / PROGRESS).write_text(text + "\n", encoding="utf-8")
    (folder / RECIPE).write_text(recipe, encoding="utf-8")


def read_state(folder: Path, model: GatedDeltaNetLM, optimizer: torch.optim.AdamW, shards: str) -> Progress:
    """Load a verified checkpoint into model and optimizer and return where it stood.

    Raises CheckpointError if it is of another configuration or was trained on other shards.
    """
    config = read_config(folder)
    if config != model.config:
        ours, theirs = asdict(model.config), asdict(config)
        key = next(key for key in ours if ours[key] != theirs[key])
        raise CheckpointError(f"{folder}: is of another model: {key} = {theirs[key]!r} there, {ours[key]!r} in the recipe")
    data = read_json(folder / PROGRESS)
    if data.pop("shards") != shards:
        raise CheckpointError(f"{folder}: was trained on other token shards than the recipe's data.shards")
    tensors = read_tensors(folder)
    moments = load_file(folder / OPTIMIZER)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
            state = {
                key: moments.pop(f"{name}:{key}") for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}:{key}" in moments
            }
            optimizer.state[parameter] = {
                key: value if key == "step" and parameter.device.type == "cpu" else value.to(parameter.device)
                for key, value in state.items()
            }
    return Progress(**data)
