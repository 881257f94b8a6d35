"""What the generation tests share: a tiny random model whose text is not constant; models of every switch, by the modules."""

import copy
from typing import Any

import torch
from torch import Tensor

from gdn.model.config import ModelConfig
from gdn.model.lm import GatedDeltaNetLM, init_weights
from gdn.model.state import DecodeState

VOCAB = 61
SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-gate": {"use_gate": False},
    "no-conv": {"use_short_conv": False},
    "conv-size-1": {"conv_size": 1},
    "conv-bias": {"conv_bias": True},
    "negative-eigenvalues": {"allow_neg_eigval": True},
    "grouped-values": {"num_v_heads": 6, "expand_v": 0.5},
    "wide-values-tied": {"expand_v": 2.0, "tie_word_embeddings": True, "norm_eps": 1e-3},
}


def tiny_model(seed: int = 0, **changes: int) -> GatedDeltaNetLM:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 16} | changes
    model = GatedDeltaNetLM(ModelConfig(expand_v=1.0, **sizes)).eval()  # type: ignore[arg-type]
    init_weights(model, "mamba", seed)
    with torch.no_grad():  # at N(0, 0.02) all tokens are nearly alike and greedy text repeats one token
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model


def random_ids(length: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def build(dtype: torch.dtype = torch.float32, **config: Any) -> GatedDeltaNetLM:
    """A model with no weight at its neutral value."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 8, "expand_v": 1.0}
    model = GatedDeltaNetLM(ModelConfig(**sizes | config)).eval().requires_grad_(False)
    init_weights(model, "mamba", 1)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


def exactly(model: GatedDeltaNetLM) -> GatedDeltaNetLM:
    """The same weights, computed in float64."""
    model = copy.deepcopy(model).double()
    model.compute_dtype = None
    return model


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def by_modules(model: GatedDeltaNetLM, ids: list[int]) -> tuple[Tensor, DecodeState]:
    state = model.new_state(1)
    with torch.no_grad():
        return torch.cat([model(torch.tensor([[token]]), state=state).logits[0] for token in ids]), state
