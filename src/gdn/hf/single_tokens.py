"""Single tokens of transformers' `generate` on a GPU: the engine's kernels, after a few tokens as one CUDA graph.

A model's modules cost the host some thirty milliseconds a token there, launching small kernels one by one.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gdn.generation.gpu_decoder import GPUDecoder
from gdn.generation.weights import join_projections
from gdn.model.layers import Linear
from gdn.model.lm import Backbone, GatedDeltaNetLM
from gdn.model.state import DecodeState

LAUNCHED = 4  # tokens before a graph is made, which takes as long as some twenty launched ones


class SingleTokens:
    """Reads the next token of every row in one state. It belongs to a cache: a copy of that starts without one."""

    def __init__(self, decoder: GPUDecoder, state: DecodeState, weights: tuple[int, ...]) -> None:
        self._decoder, self._state, self._weights = decoder, state, weights
        self._ids = torch.zeros(state.rows, dtype=torch.int64, device=state.position.device)
        self._launched = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: tuple[Tensor, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def fits(self, face: Any, state: DecodeState) -> bool:
        """Whether this state and the memory of these weights are those it was made with."""
        return state is self._state and addresses(face) == self._weights

    def read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids [B] int64 -> logits [B, vocab] float32 and the hidden states [B, hidden] before them; updates the state."""
        if self._graph is None and self._launched < LAUNCHED:
            self._launched += 1
            return self._decoder.read(ids, self._state)
        self._ids.copy_(ids)
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._result = self._decoder.read(self._ids, self._state)
        self._graph.replay()
        assert self._result is not None
        logits, hidden = self._result
        return logits.clone(), hidden.clone()  # the next token writes over them


def single_tokens(face: Any, state: DecodeState) -> SingleTokens | None:
    """For a GatedDeltaNetForCausalLM and the state of its cache; None where the kernels do not serve.

    The weights that read one input are laid side by side, in place; nothing else about the model changes.
    """
    if not _is_plain(face):
        return None
    model = _as_lm(face)
    if not GPUDecoder.serves(model):
        with torch.inference_mode(False):  # weights made within could not be trained later
            join_projections(model)
        if not GPUDecoder.serves(model):
            return None
    return SingleTokens(GPUDecoder(model), state, addresses(face))


def addresses(face: Any) -> tuple[int, ...]:
    """Where the first weights lie: other places after any cast or move of the model."""
    attn = face.model.layers[0].attn
    return tuple(weight.data_ptr() for weight in (face.model.embeddings.weight, face.lm_head.weight, attn.q_proj.weight))


def _is_plain(face: Any) -> bool:
    """Whether the modules are as they were made, on one GPU: no adapters in their places, no hooks around them."""
    device = face.lm_head.weight.device
    for module in face.modules():
        if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
            return False
        if isinstance(module, nn.Linear) and (type(module) is not Linear or type(module.weight) is not nn.Parameter):
            return False
        if any(parameter.device != device for parameter in module.parameters(recurse=False)):
            return False
    return bool(face.lm_head.weight.is_cuda)


def _as_lm(face: Any) -> GatedDeltaNetLM:
    """The same modules under the name that the engine knows them by."""
    config = face.config.to_model_config()
    with torch.device("meta"):
        model = GatedDeltaNetLM(replace(config, num_hidden_layers=1))
    model.config, model.lm_head = config, face.lm_head
    backbone: Backbone = model.model
    backbone.embeddings, backbone.layers, backbone.norm = face.model.embeddings, face.model.layers, face.model.norm
    return model.eval()
