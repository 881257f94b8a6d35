"""Tiny runs: generated text, its shards, a recipe, and the comparison of two checkpoints bit by bit."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from shards_testing import prepare_texts
from torch import Tensor

from gdn import config as toml
from gdn.data.tokenizer import train_bpe
from gdn.model.config import ModelConfig
from gdn.train.loop import CHECKPOINTS, Outcome, train
from gdn.train.recipe import RunConfig

WORDS = ["the", "state", "is", "a", "matrix", "that", "forgets", "what", "it", "read", "and", "writes", "over", "every", "gate"]
VOCAB = 300
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 2,
        "head_dim": 16,
        "expand_v": 1.0,
        "intermediate_size": 48,
    },
    "data": {"seq_len": 32, "micro_batch_size": 2, "global_batch_size": 4},
    "train": {"steps": 6, "dtype": "float32", "seed": 7},
    "optim": {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 2},
    "checkpoint": {"every": 1, "keep": 100},
    "log": {"every": 1},
}


def text(words: int, seed: int) -> str:
    """Words drawn by a linear congruential generator: the same on every machine and Python."""
    chosen, x = [], seed
    for _ in range(words):
        x = (1103515245 * x + 12345) % 2**31
        chosen.append(WORDS[(x >> 16) % len(WORDS)])
    return " ".join(chosen) + "\n"


def make_shards(folder: Path, vocab: int = VOCAB, seed: int = 1) -> Path:
    texts = [text(60, seed + i) for i in range(40)]
    prepare_texts(texts[:-1], train_bpe(texts, vocab), folder, texts[-1:])
    return folder


def make_run(shards: Path, **changes: dict[str, Any]) -> RunConfig:
    """The tiny recipe on `shards`, with sections updated: make_run(shards, train={"steps": 3})."""
    data = {key: value | changes.get(key, {}) if isinstance(value, dict) else value for key, value in RECIPE.items()}
    data |= {key: value for key, value in changes.items() if key not in data}
    data["data"] |= {"shards": str(shards)} | changes.get("data", {})
    return toml.build(RunConfig, data, "test")


def with_model(run: RunConfig, **changes: Any) -> RunConfig:
    return dataclasses.replace(run, model=ModelConfig(**dataclasses.asdict(run.model) | changes))


def go(run: RunConfig, folder: Path) -> Outcome:
    with (folder.parent / "console.txt").open("a", encoding="utf-8") as stream:
        return train(run, folder, torch.device("cpu"), Console(file=stream))


def saved(folder: Path, step: int) -> Path:
    return folder / CHECKPOINTS / f"step-{step:08d}"


def moments(checkpoint: Path) -> dict[str, Tensor]:
    """The optimizer's tensors, whole, of a checkpoint made by any number of processes: rows of one tensor in several files."""
    parts: dict[str, dict[int, Tensor]] = {}
    for file in sorted((checkpoint / "optimizer").glob("*.safetensors")):
        with safe_open(file, framework="pt") as stream:
            where = json.loads(stream.metadata()["DCP_SHARDING_INFO"])
            for name in stream.keys():  # noqa: SIM118
                offsets = where[name]["saved_offsets"]
                parts.setdefault(name, {})[offsets[0] if offsets else 0] = stream.get_tensor(name)
    return {
        name: torch.cat([rows[first] for first in sorted(rows)]) if rows[min(rows)].ndim else rows[0]
        for name, rows in parts.items()
    }


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """All weights and all optimizer tensors of a checkpoint."""
    return load_file(checkpoint / "model.safetensors") | moments(checkpoint)


def differences(one: Path, other: Path) -> list[str]:
    """Names of tensors that are not the same bit by bit in two checkpoints."""
    a, b = tensors(one), tensors(other)
    return sorted(
        name
        for name in a.keys() | b.keys()
        if name not in a
        or name not in b
        or a[name].dtype != b[name].dtype
        or not torch.equal(a[name].reshape(-1).view(torch.uint8), b[name].reshape(-1).view(torch.uint8))
    )


def partials(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.partial-*"))
