"""What a recipe comes to, by arithmetic alone: parameters, FLOPs, tokens, memory, time."""

import math

from rich.table import Table

from gdn.errors import ConfigError
from gdn.model.config import ModelConfig
from gdn.ops.pending import SLOTS, slot_size
from gdn.train.recipe import RunConfig

_TRAINING_BYTES = 4 + 4 + 8  # a parameter: float32 weight, gradient, two moments of AdamW
_TRAINING_PASSES = 3  # the backward costs two forwards


def describe(run: RunConfig, tokens_per_second: float | None = None) -> list[Table]:
    """Tables to print; ConfigError for a recipe that cannot run or a speed that is none."""
    plan = run.check(world_size=1)
    if tokens_per_second is not None and not 0 < tokens_per_second < math.inf:
        raise ConfigError(f"--tokens-per-second = {tokens_per_second}; expected a number above 0")
    model, data = run.model, run.data
    parameters, flops = model.num_parameters(), model.flops_per_token(data.seq_len)
    work = _TRAINING_PASSES * flops.total * plan.tokens

    parts = _table(f"{run.name}: FLOPs per token, forward", "part", "FLOPs", "share")
    for name, value in flops._asdict().items():
        parts.add_row(name, f"{value:,}", f"{value / flops.total:.1%}")
    parts.add_row("total", f"{flops.total:,}", f"training {_TRAINING_PASSES * flops.total:,}")

    facts = _table("run", "", "value", "")
    facts.add_row("parameters", f"{parameters:,}", f"FFN width {model.ffn_size:,}")
    facts.add_row("tokens", f"{plan.tokens:,}", f"{run.train.steps:,} steps of {plan.tokens_per_step:,}")
    facts.add_row("training", f"{work:.3g} FLOPs", f"{plan.grad_accum_steps} micro batches a step on one process")
    facts.add_row("weights, gradients, AdamW", _size(parameters * _TRAINING_BYTES), "float32, activations not included")
    facts.add_row("checkpoint on disk", _size(parameters * 12), "weights and moments")
    facts.add_row("weights in bf16", _size(parameters * 2), "to generate")
    on_gpu = _size(state_bytes(model, SLOTS))
    facts.add_row(
        "decode state", _size(state_bytes(model)), f"a sequence of any length, convolutions in bf16; on a GPU {on_gpu}"
    )
    if tokens_per_second is not None:
        hours = plan.tokens / tokens_per_second / 3600
        rate = _TRAINING_PASSES * flops.total * tokens_per_second / 1e12
        facts.add_row("time", f"{hours:,.1f} h", f"at {tokens_per_second:,.0f} tokens/s, {rate:,.1f} TFLOP/s")
    return [facts, parts]


def state_bytes(model: ModelConfig, slots: int = 0) -> int:
    """Bytes of one row of a DecodeState with bf16 activations and so many slots for pending tokens, its position included."""
    K, V = model.head_dim, model.head_v_dim
    recurrent = 4 * model.num_hidden_layers * model.value_heads * (K * V + slots * slot_size(K, V))
    channels = 2 * model.key_dim + model.value_dim
    conv = 2 * model.num_hidden_layers * (model.conv_size - 1) * channels if model.use_short_conv else 0
    return recurrent + conv + 8


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i == 1 else "left", no_wrap=i < 2)
    return table


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
