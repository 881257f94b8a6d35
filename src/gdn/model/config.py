"""The architecture of a Gated DeltaNet language model: what config.json stores, and what follows from it by arithmetic."""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from gdn.config import build
from gdn.errors import ConfigError

MODEL_TYPE = "gated_deltanet"  # of flash-linear-attention, whose checkpoints load here and the other way round

# Keys of flash-linear-attention's configuration that would change the computation, with the values that do not.
_NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "attn": (None,),
    "attnres_block_size": (None,),
    "use_l2warp": (None, False),
    "hidden_act": (None, "swish", "silu"),
    "output_gate_activation": (None, "swish", "silu"),
}

# Keys that change no result: flash-linear-attention's choice of kernels, and what transformers writes into every config.json.
_LEFT_ASIDE = {
    "attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_cache",
    "architectures", "auto_map", "model_type", "dtype", "torch_dtype", "transformers_version", "quantization_config",
    "pad_token_id", "sep_token_id", "decoder_start_token_id", "tokenizer_class", "prefix", "id2label", "label2id", "num_labels",
    "problem_type", "finetuning_task", "task_specific_params", "return_dict", "output_hidden_states", "output_attentions",
    "torchscript", "chunk_size_feed_forward", "is_encoder_decoder", "is_decoder",
}  # fmt: skip


class FlopsPerToken(NamedTuple):
    """Floating-point operations of one token's forward pass, a multiply-add counted as two; training takes three times that."""

    projections: int
    convolution: int
    rule: int
    ffn: int
    head: int

    @property
    def total(self) -> int:
        return sum(self)


@dataclass(frozen=True)
class ModelConfig:
    """Names and defaults are those of flash-linear-attention's `gated_deltanet` configuration."""

    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 21
    num_heads: int = 6  # of queries and keys
    num_v_heads: int | None = None  # of values, a multiple of num_heads; None: as many
    head_dim: int = 256  # K
    expand_v: float = 2.0  # V = expand_v * head_dim
    use_gate: bool = True
    use_short_conv: bool = True
    conv_size: int = 4
    conv_bias: bool = False
    allow_neg_eigval: bool = False  # write strengths in (0, 2) instead of (0, 1)
    hidden_ratio: int = 4
    intermediate_size: int | None = None  # None: 2/3 of hidden_ratio * hidden_size, rounded up to a multiple of 256
    norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    max_position_embeddings: int = 2048  # the length trained on; the model itself has no limit
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "head_dim", "conv_size", "hidden_ratio")
        for name in (*sizes, "num_v_heads", "intermediate_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value}; expected at least 1")
        if self.value_heads % self.num_heads:
            raise ConfigError(f"num_v_heads = {self.num_v_heads}; expected a multiple of num_heads = {self.num_heads}")
        if self.head_dim * self.expand_v != self.head_v_dim or self.head_v_dim < 1:
            raise ConfigError(f"expand_v = {self.expand_v}; expected a whole value dimension, head_dim is {self.head_dim}")
        if self.norm_eps <= 0 or self.initializer_range <= 0:
            raise ConfigError(f"norm_eps = {self.norm_eps}, initializer_range = {self.initializer_range}; expected both > 0")

    @property
    def value_heads(self) -> int:
        return self.num_heads if self.num_v_heads is None else self.num_v_heads

    @property
    def head_v_dim(self) -> int:
        return int(self.head_dim * self.expand_v)

    @property
    def key_dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def value_dim(self) -> int:
        return self.value_heads * self.head_v_dim

    @property
    def ffn_size(self) -> int:
        if self.intermediate_size is not None:
            return self.intermediate_size
        return 256 * -(-int(self.hidden_size * self.hidden_ratio * 2 / 3) // 256)

    def num_parameters(self) -> int:
        """Number of trained weights; 357,781,928 for the published model."""
        hidden, channels = self.hidden_size, 2 * self.key_dim + self.value_dim
        mixer = hidden * (channels + self.value_dim * (2 if self.use_gate else 1) + 2 * self.value_heads)
        mixer += 2 * self.value_heads + self.head_v_dim
        if self.use_short_conv:
            mixer += channels * (self.conv_size + int(self.conv_bias))
        layer = mixer + 3 * hidden * self.ffn_size + 2 * hidden
        embeddings = self.vocab_size * hidden * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + embeddings + hidden

    def flops_per_token(self, seq_len: int) -> FlopsPerToken:
        """Forward FLOPs of one token in a sequence of seq_len, by part; the rule in its chunk form with chunks of 64 tokens.

        Per token and value head the rule multiplies the state three times (read by k, read by q, write) and, within a chunk
        of C tokens, forms and applies two C x C matrices. Norms and gates, below one percent, are not counted.
        """
        hidden, layers, chunk = self.hidden_size, self.num_hidden_layers, min(64, seq_len)
        channels = 2 * self.key_dim + self.value_dim
        projected = channels + self.value_dim * (2 if self.use_gate else 1) + 2 * self.value_heads
        K, V = self.head_dim, self.head_v_dim
        return FlopsPerToken(
            projections=layers * 2 * hidden * projected,
            convolution=layers * 2 * channels * self.conv_size if self.use_short_conv else 0,
            rule=layers * self.value_heads * (6 * K * V + 4 * chunk * (K + V)),
            ffn=layers * 6 * hidden * self.ffn_size,
            head=2 * hidden * self.vocab_size,
        )

    def to_json(self) -> dict[str, Any]:
        """The contents of config.json, as transformers and flash-linear-attention read it."""
        return {
            "architectures": ["GatedDeltaNetForCausalLM"],
            "model_type": MODEL_TYPE,
            "attn_mode": "chunk",
            "attn": None,
            "hidden_act": "swish",
            "use_cache": True,
            **dataclasses.asdict(self),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str) -> "ModelConfig":
        """Read a config.json; `where` names it in errors. Keys that change no result are left aside.

        Raises ConfigError for another model_type, and for switches that are not built or not known here, unless they are off.
        """
        if data.get("model_type") != MODEL_TYPE:
            raise ConfigError(f"{where}: model_type = {data.get('model_type')!r}; expected {MODEL_TYPE!r}")
        for key, neutral in _NOT_BUILT.items():
            if data.get(key) not in neutral:
                raise ConfigError(f"{where}: {key} = {data[key]!r} is not built here; expected {neutral[-1]!r}")
        names = {field.name for field in dataclasses.fields(cls)}
        known = names | _NOT_BUILT.keys() | _LEFT_ASIDE
        for key, value in data.items():
            if key not in known and not key.startswith("_") and value is not None and value is not False:
                near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)[0]
                raise ConfigError(f"{where}: unknown key {key!r} = {value!r}; the nearest known key is {near!r}")
        return build(cls, {key: value for key, value in data.items() if key in names}, where)
