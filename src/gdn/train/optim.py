"""AdamW with explicit weight-decay groups, and the learning-rate schedule as a function of the step."""

import math
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from gdn.errors import ConfigError
from gdn.train.recipe import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over all parameters; those whose name matches a glob of `no_decay` form a group without weight decay.

    Raises ConfigError for a glob that matches no parameter.
    """
    named = dict(model.named_parameters())
    exempt = set()
    for pattern in config.no_decay:
        matches = {name for name in named if fnmatchcase(name, pattern)}
        if not matches:
            raise ConfigError(f"optim.no_decay: {pattern!r} matches no parameter; names look like {next(iter(named))!r}")
        exempt |= matches
    # Sharded and plain parameters apart: one fused kernel takes only either.
    groups = [
        {
            "params": [p for name, p in named.items() if (name in exempt) == spared and isinstance(p, DTensor) == sharded],
            "weight_decay": 0.0 if spared else config.weight_decay,
        }
        for spared in (False, True)
        for sharded in (False, True)
    ]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Linear warm-up to lr over warmup_steps, then a cosine to min_lr, reached after the last of `steps` (from 0)."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
