"""Looking inside a model's memory: how long each head remembers, and how strongly it writes."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from gdn.model.lm import GatedDeltaNetLM


class MemoryUse(NamedTuple):
    """Of one layer: half_life [HV, 3], the 10th, 50th and 90th percentile over tokens; counts [bins] of write strengths."""

    half_life: Tensor
    edges: Tensor
    counts: Tensor


def memory_use(model: GatedDeltaNetLM, input_ids: Tensor, bins: int = 40) -> list[MemoryUse]:
    """The gates of every layer over token ids [B, T].

    A head's half-life at a token is ln 2 / -g, in tokens: after so many such tokens what it holds has faded to one half. The
    write strength beta is between 0 (the token is ignored) and 1, or 2 with allow_neg_eigval.
    """
    gates: list[tuple[Tensor, Tensor]] = []
    hooks = [
        layer.attn.register_forward_pre_hook(lambda mixer, args: gates.append(mixer.gates(args[0])))  # type: ignore[union-attr]
        for layer in model.model.layers
    ]
    try:
        with torch.no_grad():
            model(input_ids, last_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    top = 2.0 if model.config.allow_neg_eigval else 1.0
    shares = torch.tensor([0.1, 0.5, 0.9])
    uses = []
    for g, beta in gates:
        half_life = math.log(2) / -g.flatten(0, 1).float().cpu()
        counts, edges = torch.histogram(beta.float().cpu().flatten(), bins, range=(0.0, top))
        uses.append(MemoryUse(half_life.quantile(shares, dim=0).mT, edges, counts))
    return uses
