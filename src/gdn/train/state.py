"""What a run carries from step to step, and what of it a checkpoint holds: safetensors and JSON, nothing else.

A checkpoint is also a model folder: weights, config.json and tokenizer in the same places as in an exported one. The moments
are in a folder of their own, by the names of the model's parameters, each process's part by itself.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from gdn.distributed.checkpoint import read_sharded
from gdn.distributed.collectives import total_norm
from gdn.distributed.mesh import Workers
from gdn.distributed.parallelize import gather, scatter
from gdn.errors import CheckpointError, RunError
from gdn.model.lm import GatedDeltaNetLM
from gdn.model.load import load_model, read_config, read_json, save_model

PROGRESS, RECIPE = "progress.json", "recipe.toml"
_BEFORE_SHARDS = "optimizer.safetensors"  # the moments of checkpoints that could not be sharded


@dataclass
class Progress:
    """Where a run stands. The data order needs no more than `step`: it is a pure function of it."""

    step: int = 0  # optimizer steps done, skipped ones too
    tokens: int = 0  # tokens read
    seconds: float = 0.0  # of training, over all sessions
    skipped: int = 0  # steps without an update, their loss or gradient not being finite
    skipped_in_a_row: int = 0  # of those, the ones just before `step`


class Snapshot(NamedTuple):
    """A run's tensors at one step, on the CPU, where training does not touch them."""

    weights: GatedDeltaNetLM | None  # whole; None in all processes but the first
    moments: dict[str, Tensor]  # this process's part


def take_snapshot(model: GatedDeltaNetLM, optimizer: torch.optim.AdamW, workers: Workers) -> Snapshot:
    """Copy weights and moments to the CPU: all that a save keeps training waiting for. All processes call it.

    Raises RunError if a weight is not finite: it must not reach a checkpoint.
    """
    if not total_norm([p.detach() for p in model.parameters()], workers).isfinite():
        raise RunError("a weight is no longer finite; the checkpoints there are were made before that")
    moments = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            moments[f"{name}:{key}"] = value.detach()
    weights = gather(model, torch.device("cpu"), keep=workers.first)
    return Snapshot(weights, BlockingAsyncStager().stage(moments))


def write_state(folder: Path, weights: GatedDeltaNetLM, progress: Progress, recipe: str, shards: str) -> None:
    """Write weights, progress and recipe into `folder`; `shards` is the fingerprint of the data's manifest.

    Raises OSError where the disk does not take them.
    """
    try:
        save_model(weights, folder)
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(f"{folder}: cannot be written: {error}") from None
    text = json.dumps(asdict(progress) | {"shards": shards}, indent=1)
    (folder / PROGRESS).write_text(text + "\n", encoding="utf-8")
    (folder / RECIPE).write_text(recipe, encoding="utf-8")


def read_state(folder: Path, model: GatedDeltaNetLM, optimizer: torch.optim.AdamW, shards: str, workers: Workers) -> Progress:
    """Load a verified checkpoint, made by any number of processes, into model and optimizer; returns where it stood.

    Raises CheckpointError if it is of another configuration, was trained on other shards or is of an older format.
    """
    config = read_config(folder)
    if config != model.config:
        ours, theirs = asdict(model.config), asdict(config)
        key = next(key for key in ours if ours[key] != theirs[key])
        raise CheckpointError(f"{folder}: is of another model: {key} = {theirs[key]!r} there, {ours[key]!r} in the recipe")
    data = read_json(folder / PROGRESS)
    if data.pop("shards") != shards:
        raise CheckpointError(f"{folder}: was trained on other token shards than the recipe's data.shards")
    if (folder / _BEFORE_SHARDS).exists():
        raise CheckpointError(f"{folder}: {_BEFORE_SHARDS} is of an older gdn; train the run to its end with that, or anew")
    scatter(load_model(folder), model)
    moments: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
        optimizer.state[parameter] = state
        moments |= {f"{name}:{key}": value for key, value in state.items()}
    read_sharded(folder, moments, workers)
    return Progress(**data)
