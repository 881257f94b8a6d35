"""What the generation tests share: a tiny random model whose text is not constant."""

import torch

from gdn.model.config import ModelConfig
from gdn.model.lm import GatedDeltaNetLM, init_weights

VOCAB = 61


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
