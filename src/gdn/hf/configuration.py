"""The configuration as transformers knows it: flash-linear-attention's names and defaults, one to one with config.json."""

import dataclasses
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from gdn.model.config import MODEL_TYPE, ModelConfig


class GatedDeltaNetConfig(PreTrainedConfig):
    """What config.json holds. Of the keys that ModelConfig has not, those that choose flash-linear-attention's kernels
    (attn_mode, fuse_norm, fuse_swiglu, fuse_cross_entropy) change no result and are only kept; those that would change the
    result are refused by name when a model is built. With fuse_linear_cross_entropy a training step makes no logits.
    """

    model_type: ClassVar[str] = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    attn_mode: str = "chunk"
    hidden_size: int = 2048
    expand_v: float = 2.0
    use_gate: bool = True
    output_gate_activation: str = "swish"
    use_short_conv: bool = True
    conv_size: int = 4
    conv_bias: bool = False
    head_dim: int = 256
    num_heads: int = 6
    num_v_heads: int | None = None
    max_position_embeddings: int = 2048
    hidden_ratio: int = 4
    intermediate_size: int | None = None
    hidden_act: str = "swish"
    num_hidden_layers: int = 21
    norm_eps: float = 1e-6
    attn: dict[str, Any] | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    fuse_norm: bool = True
    fuse_swiglu: bool = True
    fuse_cross_entropy: bool = True
    fuse_linear_cross_entropy: bool = False
    use_l2warp: bool = False
    vocab_size: int = 32000
    allow_neg_eigval: bool = False
    attnres_block_size: int | None = None

    def to_model_config(self) -> ModelConfig:
        """The architecture alone. Raises ConfigError for a switch that is not built here and for values of a wrong type."""
        data = self.to_dict()
        if isinstance(data["eos_token_id"], list):  # several stop tokens: generate's business, no part of the architecture
            data["eos_token_id"] = None
        return ModelConfig.from_json(data, self.name_or_path or type(self).__name__)

    @classmethod
    def from_model_config(cls, config: ModelConfig) -> "GatedDeltaNetConfig":
        return cls(architectures=["GatedDeltaNetForCausalLM"], **dataclasses.asdict(config))
