import dataclasses
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gdn.errors import ConfigError
from gdn.model.config import ModelConfig
from gdn.model.lm import GatedDeltaNetLM, init_weights
from gdn.ops import chunked

PUBLISHED = ModelConfig(hidden_size=1024, num_heads=4, expand_v=1.0)


def count(config: ModelConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in GatedDeltaNetLM(config).parameters())


def test_the_published_model_has_its_published_size() -> None:
    assert PUBLISHED.ffn_size == 2816
    assert PUBLISHED.num_parameters() == count(PUBLISHED) == 357_781_928


def test_num_parameters_is_that_of_the_modules(switches: dict[str, Any]) -> None:
    config = ModelConfig(**switches)
    assert config.num_parameters() == count(config)


def test_flops_against_a_count_by_hand() -> None:
    config = ModelConfig(
        vocab_size=11, hidden_size=5, num_hidden_layers=3, num_heads=2, num_v_heads=4, head_dim=7, expand_v=2.0
    )
    config = dataclasses.replace(config, intermediate_size=13)
    flops = config.flops_per_token(seq_len=1000)
    # q, k 14 wide each, v, g and o 56, a and b 4 each: 28 + 3 * 56 + 8 columns of 5.
    assert flops.projections == 3 * 2 * 5 * (28 + 3 * 56 + 8)
    assert flops.convolution == 3 * 2 * (28 + 56) * 4
    # Each of 4 heads: the 7 x 14 state three times; 64 tokens of a chunk, two pairs of products with k (7) and v (14).
    assert flops.rule == 3 * 4 * 2 * (3 * 7 * 14 + 2 * 64 * (7 + 14))
    assert flops.ffn == 3 * 3 * 2 * 5 * 13
    assert flops.head == 2 * 5 * 11
    assert flops.total == sum(flops)
    assert config.flops_per_token(10).rule == 3 * 4 * 2 * (3 * 7 * 14 + 2 * 10 * (7 + 14))


def test_flops_follow_the_weights() -> None:
    """A matrix product takes two operations a weight, so that the parts can be checked against the parameter count."""
    flops = PUBLISHED.flops_per_token(2048)
    weights = PUBLISHED.num_parameters() - 32000 * 1024  # the embeddings are looked up
    assert flops.projections + flops.convolution + flops.ffn + flops.head == pytest.approx(2 * weights, rel=1e-3)
    assert dataclasses.replace(PUBLISHED, use_gate=False).flops_per_token(1).projections == pytest.approx(
        flops.projections * 4 / 5, rel=1e-2
    )
    assert dataclasses.replace(PUBLISHED, use_short_conv=False).flops_per_token(1).convolution == 0


def test_flops_against_torchs_own_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product of matrices in the model as torch counts it; the convolution, which is none, stands by hand above.

    In chunks of 64 as the GPU kernels have them.
    """
    monkeypatch.setattr(chunked, "_chunk_size", lambda T, width: 64)
    config = ModelConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=2, num_heads=2, num_v_heads=4, head_dim=32, expand_v=2.0
    )
    model = GatedDeltaNetLM(config)
    init_weights(model, "mamba", 0)
    B, T = 2, 128
    ids = torch.zeros(B, T, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    counts = {name: sum(by_operator.values()) for name, by_operator in counter.get_flop_counts().items()}

    def counted(*names: str) -> int:
        return sum(flops for name, flops in counts.items() if name.rpartition(".")[2] in names)

    flops = config.flops_per_token(T)
    projections = [f"{name}_proj" for name in "qkvabgo"]
    assert counted(*projections) == B * T * flops.projections
    assert counted("mlp") == B * T * flops.ffn
    assert counted("lm_head") == B * T * flops.head
    inverse = (
        config.num_hidden_layers * config.value_heads * 64 * 64
    )  # of the triangular matrix, by blocks: not counted as work
    assert counted("attn") == B * T * (flops.projections + flops.rule + inverse)


def test_json_round_trip(switches: dict[str, Any]) -> None:
    config = ModelConfig(**switches, bos_token_id=3)
    assert ModelConfig.from_json(config.to_json(), "here") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn": {"layers": [1]}}, r"here: attn = .* is not built here; expected None"),
        ({"attnres_block_size": 4}, "attnres_block_size = 4 is not built"),
        ({"use_l2warp": True}, "use_l2warp = True is not built"),
        ({"use_rope": True}, "here: unknown key 'use_rope' = True; the nearest known key is 'use_"),
        ({"num_v_head": 4}, "unknown key 'num_v_head' = 4; the nearest known key is 'num_v_heads'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not built here; expected 'silu'"),
        ({"output_gate_activation": "sigmoid"}, "output_gate_activation = 'sigmoid'"),
        ({"model_type": "gla"}, "model_type = 'gla'; expected 'gated_deltanet'"),
        ({"hidden_size": "64"}, r"hidden_size = '64' \(str\); expected an integer"),
        ({"num_heads": 0}, "num_heads = 0; expected at least 1"),
        ({"num_v_heads": 9}, "num_v_heads = 9; expected a multiple of num_heads = 6"),
        ({"expand_v": 0.001}, "expand_v = 0.001; expected a whole value dimension"),
        ({"norm_eps": 0.0}, "norm_eps = 0.0"),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_json(ModelConfig().to_json() | change, "here")


def test_keys_of_other_software_are_left_aside() -> None:
    data = ModelConfig().to_json() | {"fuse_norm": True, "transformers_version": "5.17.0", "id2label": {"0": "A"}}
    assert ModelConfig.from_json(data, "here") == ModelConfig()


def test_keys_that_change_nothing_and_switches_that_are_off_are_left_aside() -> None:
    others = {"attn_mode": "fused_recurrent", "_name_or_path": "x/y", "torch_dtype": "bfloat16", "use_rope": False, "mtp": None}
    assert ModelConfig.from_json(PUBLISHED.to_json() | others, "here") == PUBLISHED
