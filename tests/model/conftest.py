"""Small models of many shapes, with weights large enough that every part matters to the result."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gdn.model.config import ModelConfig
from gdn.model.lm import GatedDeltaNetLM, init_weights

SMALL = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 8, "expand_v": 1.0}

# Every switch of the architecture that changes the computation, alone and with others.
SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-gate": {"use_gate": False},
    "no-conv": {"use_short_conv": False},
    "conv-size-2": {"conv_size": 2},
    "conv-size-1": {"conv_size": 1},
    "conv-bias": {"conv_bias": True},
    "negative-eigenvalues": {"allow_neg_eigval": True},
    "grouped-values": {"num_v_heads": 6},
    "wide-values": {"expand_v": 2.0},
    "narrow-values": {"expand_v": 0.5},
    "tied": {"tie_word_embeddings": True},
    "ffn": {"intermediate_size": 20},
    "ffn-ratio": {"hidden_ratio": 11},
    "many": {
        "use_gate": False,
        "num_v_heads": 4,
        "expand_v": 1.5,
        "conv_bias": True,
        "conv_size": 3,
        "tie_word_embeddings": True,
    },
}


@pytest.fixture(params=SWITCHES)
def switches(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SMALL | SWITCHES[request.param]


@pytest.fixture(scope="session")
def make() -> Callable[..., GatedDeltaNetLM]:
    """make(dtype, **config) -> a model whose norms, biases and gates are not at their neutral values either."""

    def build(dtype: torch.dtype = torch.float64, **config: Any) -> GatedDeltaNetLM:
        model = GatedDeltaNetLM(ModelConfig(**SMALL | config))
        init_weights(model, "mamba", seed=1)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model.to(dtype).eval()

    return build


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
