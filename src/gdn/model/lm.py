"""The language model: embeddings, blocks, head; and its initialisation."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gdn.errors import BackendError
from gdn.model.config import ModelConfig
from gdn.model.layers import Linear, RMSNorm, SwiGLU, joined
from gdn.model.mixer import GatedDeltaNet, LayerState, ShortConv
from gdn.model.state import DecodeState
from gdn.ops import linear_cross_entropy
from gdn.ops.backend import choose_backend
from gdn.ops.conv_rule import Heads
from gdn.ops.row_product import row_product

Init = Literal["mamba", "zeros"]
Recompute = Literal["nothing", "keys", "blocks"]  # in the backward, to save memory; keys: where the kernels on a GPU serve


class LMOutput(NamedTuple):
    """With labels: loss_sum over the valid ones, float32. Without: logits [B, T, vocab], or [N, vocab] with last_only."""

    loss_sum: Tensor | None
    logits: Tensor | None
    state: DecodeState | None


def is_watched(module: nn.Module) -> bool:
    """Whether a call of it does more than it was built for: hooks, or another forward in its place."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks or "forward" in vars(module))


class Block(nn.Module):
    """Pre-norm residual block: mixer, then SwiGLU."""

    def __init__(self, config: ModelConfig, recompute: Recompute = "nothing", float8_ffn: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.float8_ffn = float8_ffn
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = GatedDeltaNet(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.ffn_size)

    def forward(self, x: Tensor, state: LayerState | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        if self.recompute == "blocks" and state is None and torch.is_grad_enabled():
            kept: Tensor = checkpoint(self._run, x, None, cu_seqlens, use_reentrant=False, preserve_rng_state=False)
            return kept
        return self._run(x, state, cu_seqlens)

    def _run(self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None) -> Tensor:
        if self._fused_backend(x, state, cu_seqlens) == "triton":
            return self._fused(x, state, cu_seqlens)
        state = None if state is None else state.own()
        x = x + self.attn(self.attn_norm(x), state, cu_seqlens)
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out

    def _fused_backend(self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None) -> str:
        """ "triton" where the block is one operator. Not for single tokens, which have kernels of their own, nor for gradients
        past a state."""
        training = self._is_training(x)
        apart = state is not None and (training or (cu_seqlens is None and x.shape[1] == 1))
        fused = not apart and self.is_fused(x.device, x.dtype)
        if self.float8_ffn and training and not (fused and x.dtype == torch.bfloat16):
            raise BackendError(
                f"train.float8_ffn = true: a block in {x.dtype} on {x.device.type} is not one operator of the GPU kernels in "
                "torch.bfloat16; expected that, so no hooks nor adapters in it"
            )
        return "triton" if fused else "torch"

    def is_fused(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the block is one operator: on a GPU, every module within as it was built and unwatched. Without gradients a
        row has the same bits then beside any others, as far as `row_product`'s have."""
        config = self.attn.config
        if not (config.use_gate and config.use_short_conv and self.is_plain()):
            return False
        return choose_backend("auto", device, dtype, config.head_dim, config.head_v_dim) == "triton"

    def is_plain(self) -> bool:
        """Whether every module within is as it was built: no adapters (peft), nor hooks of offloading (accelerate) or of
        somebody who looks inside, all of which must be called."""
        if any(module is not self and is_watched(module) for module in self.modules()):
            return False
        attn, mlp = self.attn, self.mlp
        linear = [attn.q_proj, attn.k_proj, attn.v_proj, attn.a_proj, attn.b_proj, attn.g_proj, attn.o_proj]
        linear += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        return all(type(module) is Linear and not module.weight.is_meta for module in linear)

    def _is_training(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or any(weight.requires_grad for weight in self.parameters()))

    def _fused(self, x: Tensor, state: LayerState | None, cu_seqlens: Tensor | None) -> Tensor:
        from gdn.ops.triton_block import BlockWeights, block
        from gdn.ops.triton_block_inference import block_inference

        config, attn, mlp = self.attn.config, self.attn, self.mlp
        convolutions = (attn.q_conv1d, attn.k_conv1d, attn.v_conv1d)
        biases: list[Tensor] = [conv.bias for conv in convolutions if conv.bias is not None]
        weights = BlockWeights(
            q=attn.q_proj.weight,
            k=attn.k_proj.weight,
            v=attn.v_proj.weight,
            a=attn.a_proj.weight,
            b=attn.b_proj.weight,
            g=attn.g_proj.weight,
            o=attn.o_proj.weight,
            gate=mlp.gate_proj.weight,
            up=mlp.up_proj.weight,
            down=mlp.down_proj.weight,
            attn_norm=self.attn_norm.weight,
            A_log=attn.A_log,
            dt_bias=attn.dt_bias,
            o_norm=attn.o_norm.weight,
            mlp_norm=self.mlp_norm.weight,
            conv=torch.cat([conv.weight.squeeze(1) for conv in convolutions]),
            conv_bias=torch.cat(biases) if biases else None,
        )
        if state is not None and cu_seqlens is None:
            state = state.own()
        heads = Heads(config.num_heads, config.head_dim, config.value_heads, config.head_v_dim)
        switches = (heads, config.norm_eps, config.allow_neg_eigval)
        if self._is_training(x):
            keep_keys = self.recompute != "keys"
            return block(x, weights, *switches, cu_seqlens, keep_keys=keep_keys, float8_ffn=self.float8_ffn)
        into = joined([attn.q_proj, attn.k_proj, attn.v_proj, attn.a_proj, attn.b_proj, attn.g_proj]).to(x.dtype)
        gate_up = joined([mlp.gate_proj, mlp.up_proj]).to(x.dtype)
        recurrent, conv, rows = (None, None, None) if state is None else state
        out, conv, recurrent = block_inference(x, into, gate_up, weights, *switches, conv, recurrent, cu_seqlens, rows)
        if state is not None and state.rows is None:
            state.conv.copy_(conv)
            state.recurrent.copy_(recurrent)
        return out


class Backbone(nn.Module):
    """Token ids to hidden states."""

    def __init__(self, config: ModelConfig, recompute: Recompute = "nothing", float8_ffn: bool = False) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, recompute, float8_ffn) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        state: DecodeState | None = None,
        cu_seqlens: Tensor | None = None,
        dtype: torch.dtype | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Ids [B, T] to hidden states [B, T, hidden], computed in `dtype` (the embeddings' own if None).

        rows: see `LayerState`.
        """
        x = self.embeddings(x)
        x = x if dtype is None else x.to(dtype)
        if state is not None:
            state.settle()
        for i, layer in enumerate(self.layers):
            x = layer(x, None if state is None else LayerState(state.recurrent[i], state.conv[i], rows), cu_seqlens)
        out: Tensor = self.norm(x)
        return out


class GatedDeltaNetLM(nn.Module):
    """The model of the published checkpoint; state_dict keys are flash-linear-attention's."""

    def __init__(
        self,
        config: ModelConfig,
        compute_dtype: torch.dtype | None = None,
        recompute: Recompute = "nothing",
        float8_ffn: bool = False,
    ) -> None:
        """compute_dtype: of activations and matrix products; None: that of the weights. recompute: in the backward.
        float8_ffn: the FFNs' products in float8 where gradients are made, by the kernels on a GPU."""
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.model = Backbone(config, recompute, float8_ffn)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embeddings.weight

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        *,
        state: DecodeState | None = None,
        cu_seqlens: Tensor | None = None,
        last_only: bool = False,
    ) -> LMOutput:
        """Loss or logits of a batch of token ids [B, T].

        labels [B, T]: the token to be predicted at each position (not shifted here), -100 for none; then no logits are made.
        state: read and updated in place, without gradients, one row a sequence. cu_seqlens: see `gated_delta_rule`.
        last_only: logits of each sequence's last token alone, [N, vocab].
        """
        hidden = self.model(input_ids, state, cu_seqlens, self.compute_dtype)
        if state is not None:
            state.position += input_ids.shape[1] if cu_seqlens is None else cu_seqlens.diff()
        if labels is not None:
            loss_sum = linear_cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, labels.flatten())
            return LMOutput(loss_sum, None, state)
        if last_only:
            hidden = hidden[:, -1] if cu_seqlens is None else hidden[0, (cu_seqlens[1:] - 1).long()]
            return LMOutput(None, self.logits(hidden), state)
        return LMOutput(None, self.lm_head(hidden), state)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, vocab] of hidden states [R, hidden]; on a GPU a row has the same bits beside any others (`row_product`), unless
        the head must be called."""
        if hidden.is_cuda and not self._calls_head(hidden):
            return row_product(hidden, self.lm_head.weight.to(hidden.dtype))
        called: Tensor = self.lm_head(hidden)
        return called

    def _calls_head(self, hidden: Tensor) -> bool:
        """Whether the head must be called: for gradients, or as an adapter or a hook stands in its place."""
        watched = type(self.lm_head) is not Linear or is_watched(self.lm_head)
        return watched or (torch.is_grad_enabled() and (hidden.requires_grad or self.lm_head.weight.requires_grad))

    def new_state(self, rows: int) -> DecodeState:
        """The empty decode state for this model where it lies."""
        weight = self.model.embeddings.weight
        return DecodeState.empty(self.config, rows, weight.device, self.compute_dtype or weight.dtype)


def init_weights(model: GatedDeltaNetLM, init: Init, seed: int) -> None:
    """Draw all weights anew from `seed`: the same bytes on every machine and wrapper, being drawn on the CPU in a fixed order.

    Matrices from N(0, initializer_range), norms one, biases zero. "mamba": A_log = log U(0, 16), dt_bias the inverse softplus
    of log-uniform (0.001, 0.1). "zeros": both 0, as they stayed in Flame's multi-GPU runs (fla-org/flame#42).
    """
    generator = torch.Generator().manual_seed(seed)
    std = model.config.initializer_range
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding | ShortConv):
                if module is model.lm_head and model.config.tie_word_embeddings:
                    continue
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * std)
                if isinstance(module, ShortConv) and module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
            elif isinstance(module, GatedDeltaNet):
                A_log, dt_bias = gate_parameters(init, len(module.A_log), generator)
                module.A_log.copy_(A_log)
                module.dt_bias.copy_(dt_bias)


def gate_parameters(init: Init, heads: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """A_log and dt_bias [HV] of one layer as `init_weights` draws them."""
    if init == "zeros":
        return torch.zeros(heads), torch.zeros(heads)
    uniform = torch.rand(2, heads, generator=generator)
    # The floor keeps log(0) = -inf out: such a head would never forget, and nothing could train it to.
    A_log = (16 * uniform[0]).clamp(min=1e-4).log()
    low, high = math.log(0.001), math.log(0.1)
    dt = (low + (high - low) * uniform[1]).exp().clamp(min=1e-4)
    return A_log, dt + torch.log(-torch.expm1(-dt))
