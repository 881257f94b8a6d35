"""The models as transformers knows them: its calling conventions, padding and cache around the modules of `gdn.model`."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, GenerationMixin, PreTrainedModel, initialization
from transformers.generation import GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from gdn.hf.bundle import AUTO_MAP, write_bundle
from gdn.hf.cache import GatedDeltaNetCache, state_layout
from gdn.hf.configuration import GatedDeltaNetConfig
from gdn.model.layers import Linear, RMSNorm
from gdn.model.lm import Backbone, gate_parameters, is_watched
from gdn.model.mixer import GatedDeltaNet, LayerState, ShortConv
from gdn.ops import linear_cross_entropy
from gdn.ops.cross_entropy import IGNORED


class GatedDeltaNetPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation, shared by the two models."""

    config: GatedDeltaNetConfig
    config_class = GatedDeltaNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _input_embed_layer = "embeddings"
    _no_split_modules = {"Block"}  # noqa: RUF012  (here and below: transformers declares these without ClassVar)
    _skip_keys_device_placement = {"past_key_values"}  # noqa: RUF012
    _keep_in_fp32_modules_strict = {"A_log", "dt_bias"}  # noqa: RUF012
    _is_stateful = True  # what was read cannot be taken back: transformers refuses assisted decoding
    _supports_context_parallel = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Only through transformers' own functions, which leave loaded parameters alone (fla-org/flash-linear-attention#754).
        if isinstance(module, nn.Linear | nn.Embedding | ShortConv):
            initialization.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, ShortConv) and module.bias is not None:
                initialization.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            initialization.ones_(module.weight)
        elif isinstance(module, GatedDeltaNet):
            A_log, dt_bias = gate_parameters("mamba", len(module.A_log))
            initialization.copy_(module.A_log, A_log)
            initialization.copy_(module.dt_bias, dt_bias)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:  # type: ignore[override]
        """As transformers has it (sharded too); the folder also carries the model in one file, as those of `export` do."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_bundle(Path(save_directory))
        self.config.auto_map = AUTO_MAP
        super().save_pretrained(save_directory, **options)


class GatedDeltaNetModel(GatedDeltaNetPreTrainedModel):
    """Token ids or embeddings to hidden states."""

    def __init__(self, config: GatedDeltaNetConfig) -> None:
        super().__init__(config)
        architecture = config.to_model_config()
        self.state_layout = state_layout(architecture)
        backbone = Backbone(architecture)
        self.embeddings, self.layers, self.norm = backbone.embeddings, backbone.layers, backbone.norm
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """Hidden states [B, T, hidden], zero at masked positions.

        attention_mask: ones and zeros, [B, T] or [B, tokens in the cache + T]; masked tokens, wherever they stand, are left
        out of the computation, so that the others come out as without them. past_key_values is updated in place; with
        use_cache one is made where none is given (the default outside training). hidden_states: the embeddings and each
        layer's output, the last one normed. Raises ValueError or TypeError for arguments that do not fit or that would be
        ignored though they change the result elsewhere.
        """
        _refuse_unknown(kwargs)
        B, T = _input_shape(input_ids, inputs_embeds)
        cache = self._cache(past_key_values, use_cache, B)
        mask = token_mask(attention_mask, B, T, 0 if cache is None else cache.seen_tokens)
        if input_ids is not None:
            _check_ids(input_ids, self.config.vocab_size)
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        wants_all = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        moments = self._run(x, mask, cache, bool(wants_all))
        if cache is not None:
            cache.seen_tokens += T
            cache.last_hidden = carry_forward(moments[-1], mask, cache.last_hidden)[:, -1].detach()
        output = BaseModelOutputWithPast(
            last_hidden_state=moments[-1], past_key_values=cache, hidden_states=tuple(moments) if wants_all else None
        )
        return output if self._returns_dict(return_dict) else output.to_tuple()

    def _run(self, x: Tensor, mask: Tensor | None, cache: GatedDeltaNetCache | None, keep: bool) -> list[Tensor]:
        """The layers and the last norm over x [B, T, hidden]: the embeddings and each layer's output, or the last alone.

        Masked tokens are dropped and the others run packed, each row from its own state. Under autocast the activations take
        its type and the modules' explicit casts its place.
        """
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        state = None if cache is None else cache.state_for(x)
        if state is not None:
            state.settle()
        lengths = torch.full(x.shape[:1], x.shape[1], device=x.device) if mask is None else mask.sum(1)
        cu_seqlens = None
        if mask is not None:
            cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
            x = x[mask].unsqueeze(0)
        moments = [x] if keep else []
        with torch.autocast(device, enabled=False):
            for i, layer in enumerate(self.layers):
                if self._recomputes():
                    x = self._gradient_checkpointing_func(layer.__call__, x, None, cu_seqlens)
                else:
                    x = layer(x, None if state is None else LayerState(state.recurrent[i], state.conv[i]), cu_seqlens)
                moments = [*moments, x] if keep else [x]
            moments[-1] = self.norm(x)
        if state is not None:
            state.position += lengths
        return [_unpack(moment, mask) for moment in moments]

    def _recomputes(self) -> bool:
        """Whether a backward may follow in which the layers are called again."""
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    def _cache(self, given: Cache | None, use_cache: bool | None, rows: int) -> GatedDeltaNetCache | None:
        given = check_cache(given, rows)
        if given is not None and given.layout != self.state_layout:
            raise ValueError(
                f"past_key_values is of another model: its state is {given.layout}; this model's is {self.state_layout}"
            )
        if self._recomputes():
            if given is not None or use_cache:
                raise ValueError("use_cache with gradient checkpointing in training: the state would be updated twice")
            return None
        wanted = use_cache if use_cache is not None else self.config.use_cache and not self.training
        return GatedDeltaNetCache(self.config) if given is None and wanted else given

    def _returns_dict(self, return_dict: bool | None) -> bool:
        return bool(self.config.return_dict if return_dict is None else return_dict)


class GatedDeltaNetForCausalLM(GatedDeltaNetPreTrainedModel, GenerationMixin):
    """The language model; its state dict is that of `gdn.model.lm.GatedDeltaNetLM`, key by key."""

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: GatedDeltaNetConfig) -> None:
        super().__init__(config)
        self.model = GatedDeltaNetModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, T, vocab], at a masked position those of the last token before it, and the loss if labels are given.

        labels [B, T]: the tokens themselves (shifted here), -100 for those not to be predicted; a masked token neither
        predicts nor is predicted. The loss is the mean over the predicted tokens, or their sum over num_items_in_batch.
        logits_to_keep: the last so many positions, or these positions; 0: all. The rest as in GatedDeltaNetModel.
        """
        B, T = _input_shape(input_ids, inputs_embeds)
        cache = check_cache(past_key_values, B)
        mask = token_mask(attention_mask, B, T, 0 if cache is None else cache.seen_tokens)
        if self._step_backend(input_ids, cache, (mask, labels, output_hidden_states or None, *kwargs)) == "triton":
            return self._single_token(input_ids, cache, return_dict)
        if labels is not None:
            if labels.shape != (B, T):
                raise ValueError(f"labels are {tuple(labels.shape)}; expected {(B, T)} as the inputs")
            _check_ids(labels, self.config.vocab_size, "labels", IGNORED)
        before = None if cache is None else cache.last_hidden
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            inputs_embeds=inputs_embeds,
            past_key_values=cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = None if labels is None else self._loss(hidden, labels, mask, num_items_in_batch)
        logits = None
        if loss is None or not (self.config.fuse_linear_cross_entropy and self.training):
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(carry_forward(hidden, mask, before)[:, kept])
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )
        return output if self.model._returns_dict(return_dict) else output.to_tuple()

    def _step_backend(self, ids: Tensor | None, cache: GatedDeltaNetCache | None, asked: tuple[Any, ...]) -> str:
        """ "triton" where a GPU's single-token kernels serve this call, by what is then in cache.steps; else "torch".

        asked: what is None where no more than the next token's logits are wanted.
        """
        if ids is None or ids.shape[1] > 1 or any(x is not None for x in asked) or self.config.output_hidden_states:
            return "torch"
        if cache is None or cache.state is None or not cache.state.position.is_cuda or cache.layout != self.model.state_layout:
            return "torch"
        if cache.state.rows != len(ids):
            return "torch"
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cuda"):
            return "torch"
        from gdn.hf.single_tokens import single_tokens

        if cache.steps is None or not cache.steps.fits(self, cache.state):
            cache.steps = single_tokens(self, cache.state)
        return "torch" if cache.steps is None else "triton"

    def _single_token(self, input_ids: Any, cache: Any, return_dict: bool | None) -> CausalLMOutputWithPast | tuple[Any, ...]:
        _check_range(input_ids, self.config.vocab_size)
        logits, cache.last_hidden = cache.steps.read(input_ids[:, 0])
        cache.seen_tokens += 1
        output = CausalLMOutputWithPast(logits=logits[:, None].to(self.lm_head.weight.dtype), past_key_values=cache)
        return output if self.model._returns_dict(return_dict) else output.to_tuple()

    def _loss(self, hidden: Tensor, labels: Tensor, mask: Tensor | None, items: int | Tensor | None) -> Tensor:
        head, targets = self.lm_head, next_labels(labels.to(hidden.device), mask)
        if type(head) is Linear and not is_watched(head):
            loss_sum = linear_cross_entropy(hidden.flatten(0, 1), head.weight, targets.flatten())
        else:  # adapted, offloaded, sharded by itself or hooked: what it computes is known to its call alone
            logits = head(hidden).flatten(0, 1)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss_sum = nn.functional.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
        if items is None:
            items = (targets != IGNORED).sum().clamp(min=1)
        return loss_sum / (items.to(loss_sum.device) if isinstance(items, Tensor) else items)

    def prepare_inputs_for_generation(  # type: ignore[override]  # generate looks for inputs_embeds among the names
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers has it, whose slice of a text that the cache has read to its end would be read again."""
        cache = check_cache(past_key_values)
        if cache is not None and cache.seen_tokens and next_sequence_length is not None and next_sequence_length < 1:
            raise ValueError(
                f"past_key_values has read the whole text and {-next_sequence_length} tokens more; expected a text that goes on"
            )
        given = {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds, **kwargs}
        parent: Any = super()
        return parent.prepare_inputs_for_generation(input_ids, next_sequence_length=next_sequence_length, **given)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        top_p = generation_config.top_p
        if top_p is not None and not 0 < top_p <= 1:  # transformers ignores what is above 1
            raise ValueError(f"top_p = {top_p!r}; expected a number in (0, 1]")
        super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        # Made here and not in the first forward pass because generate's prefill in chunks asks for a cache beforehand.
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache:
            model_kwargs["past_key_values"] = GatedDeltaNetCache(self.config)


def check_cache(cache: Cache | None, rows: int | None = None) -> GatedDeltaNetCache | None:
    """TypeError for a cache that cannot hold this model's state, ValueError for one that holds other than these rows."""
    if cache is not None and not isinstance(cache, GatedDeltaNetCache):
        raise TypeError(f"past_key_values is a {type(cache).__name__}; expected a GatedDeltaNetCache")
    if cache is not None and rows is not None and cache.seen_tokens and cache.batch_size != rows:
        raise ValueError(f"past_key_values holds {cache.batch_size} rows; the batch has {rows}")
    return cache


def token_mask(attention_mask: Tensor | None, B: int, T: int, seen: int) -> Tensor | None:
    """The mask of the T newest tokens as bool [B, T], or None if none of them is masked.

    attention_mask: [B, T] or, with `seen` tokens in the cache, [B, seen + T] of zeros and ones; ValueError otherwise.
    """
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or attention_mask.shape[0] != B or attention_mask.shape[1] not in (T, seen + T):
        wanted = f"({B}, {T})" if seen == 0 else f"({B}, {T}) or, with the {seen} cached tokens, ({B}, {seen + T})"
        raise ValueError(f"attention_mask is {tuple(attention_mask.shape)}; expected {wanted}")
    newest = attention_mask[:, -T:]
    mask = newest == 1
    if mask.all():
        return None
    if not (mask | (newest == 0)).all():
        wrong = newest[~mask & (newest != 0)][0].item()
        raise ValueError(f"attention_mask holds {wrong!r}; expected ones for tokens and zeros for padding")
    return mask


def next_labels(labels: Tensor, mask: Tensor | None) -> Tensor:
    """What each position has to predict: the label of the next unmasked token of its row; -100 at the end and where masked."""
    if mask is None:
        return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    row = mask.nonzero()[:, 0]
    following = labels[mask][1:].where(row[1:] == row[:-1], IGNORED)
    targets = torch.full_like(labels, IGNORED)
    targets[mask] = nn.functional.pad(following, (0, max(0, len(row) - len(following))), value=IGNORED)
    return targets


def _unpack(x: Tensor, mask: Tensor | None) -> Tensor:
    """Packed [1, tokens, D] back to [B, T, D], zeros where masked."""
    if mask is None:
        return x
    out = x.new_zeros(*mask.shape, x.shape[-1])
    out[mask] = x[0]
    return out


def carry_forward(x: Tensor, mask: Tensor | None, before: Tensor | None) -> Tensor:
    """At masked positions of x [B, T, D], the row's last unmasked position before, or `before` [B, D] where there is none.

    So generation goes on from a right-padded row as from the row alone. `before` None: zeros.
    """
    if mask is None:
        return x
    before = torch.zeros_like(x[:, 0]) if before is None else before.to(x.dtype)
    positions = torch.arange(1, mask.shape[1] + 1, device=mask.device).where(mask, 0).cummax(dim=1).values
    return torch.cat([before.unsqueeze(1), x], dim=1).take_along_dim(positions.unsqueeze(-1), dim=1)


def _input_shape(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> tuple[int, int]:
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("expected exactly one of input_ids and inputs_embeds")
    name, given = ("input_ids", input_ids) if inputs_embeds is None else ("inputs_embeds", inputs_embeds)
    assert given is not None
    if given.ndim != (2 if inputs_embeds is None else 3) or 0 in given.shape:
        wanted = "[B, T]" if inputs_embeds is None else "[B, T, hidden]"
        raise ValueError(f"{name} is {tuple(given.shape)}; expected {wanted} with at least one row and one token")
    if input_ids is not None and (input_ids.is_floating_point() or input_ids.dtype == torch.bool):
        raise ValueError(f"input_ids are {input_ids.dtype}; expected integers")
    return given.shape[0], given.shape[1]


def _check_ids(ids: Tensor, vocab: int, name: str = "input_ids", but: int | None = None) -> None:
    """As `_check_range`, but on a GPU training is not held up to look, nor are single tokens that modules read."""
    if not torch.compiler.is_compiling() and (ids.device.type == "cpu" or (ids.shape[1] > 1 and not torch.is_grad_enabled())):
        _check_range(ids, vocab, name, but)


def _check_range(ids: Tensor, vocab: int, name: str = "input_ids", but: int | None = None) -> None:
    """ValueError for the first id that is no token, nor `but`."""
    outside = (ids < 0) | (ids >= vocab)
    if but is not None:
        outside &= ids != but
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        wanted = f"an id in [0, {vocab}), the vocabulary" + ("" if but is None else f", or {but}")
        raise ValueError(f"{name}[{row}, {column}] = {int(ids[row, column])}; expected {wanted}")


def _refuse_unknown(kwargs: dict[str, Any]) -> None:
    """TypeError for arguments not known here, unless they are off: what is ignored must not be able to change the result."""
    kwargs.pop("tokenizer", None)  # generate passes on that of its stopping strings
    wanted = sorted(name for name, value in kwargs.items() if value is not None and value is not False)
    if wanted:
        raise TypeError(f"the Gated DeltaNet model has no argument {', '.join(map(repr, wanted))}: it would change the result")
