"""The same token as `CPUDecoder`'s, by the compiled `ops/cpu_token.c`: weights are read as they lie, at the memory's speed."""

import ctypes

import torch
from torch import Tensor, nn

from gdn.generation.weights import LayerWeights, layer_weights
from gdn.model.layers import Linear
from gdn.model.lm import GatedDeltaNetLM
from gdn.model.state import DecodeState
from gdn.ops.cpu_token import BLOCK, MATRICES, VECTORS, Layer, Token, library


class CompiledToken:
    """Steps of a model whose projections are joined. Keeps its weights, whose addresses it holds; the state is the caller's."""

    def __init__(self, model: GatedDeltaNetLM) -> None:
        config = model.config
        layers = [layer_weights(block) for block in model.model.layers]  # type: ignore[arg-type]
        embeddings, head, norm = model.model.embeddings.weight, model.lm_head.weight, model.model.norm.weight.float()
        self._kept = layers, embeddings, head, norm
        self._layers = (Layer * len(layers))(*map(_addresses, layers))
        self._token = Token(
            layers=len(layers), hidden=config.hidden_size, heads=config.num_heads, value_heads=config.value_heads,
            head_dim=config.head_dim, head_v_dim=config.head_v_dim, ffn=config.ffn_size, vocab=config.vocab_size,
            conv_size=config.conv_size if config.use_short_conv else 0, bf16=head.dtype == torch.bfloat16,
            gate=config.use_gate, negative=config.allow_neg_eigval, embeddings=embeddings.data_ptr(), head=head.data_ptr(),
            norm=norm.data_ptr(), layer=self._layers, eps=config.norm_eps,
        )  # fmt: skip
        self._room = torch.empty(0)

    @staticmethod
    def serves(model: GatedDeltaNetLM) -> bool:
        """Whether matrices lie as they are read, all of one dtype, widths are whole blocks, and there is a compiler.

        That `CPUDecoder` serves it is taken for granted.
        """
        config = model.config
        widths = (config.hidden_size, config.head_dim, config.head_v_dim, config.ffn_size)
        matrices = [module.weight for module in model.modules() if isinstance(module, Linear | nn.Embedding)]
        plain = all(matrix.dtype == matrices[0].dtype and matrix.is_contiguous() for matrix in matrices)
        return plain and not any(width % BLOCK for width in widths) and library() is not None

    def step(self, token: int, state: DecodeState) -> Tensor:
        """Logits [vocab] after one more token of the one row in `state`, which is settled, and updated in place."""
        compiled, threads, t = library(), torch.get_num_threads(), self._token
        assert compiled is not None
        if not 0 <= token < t.vocab:
            raise IndexError(f"token {token}; expected an id in [0, {t.vocab}), the model's vocabulary")
        if len(self._room) < t.room_size(threads):
            self._room = torch.empty(t.room_size(threads))
        logits, recurrent, window = torch.empty(t.vocab), state.recurrent[:, 0], state.conv[:, 0]
        t.token, t.room, t.logits = token, self._room.data_ptr(), logits.data_ptr()
        t.recurrent, t.recurrent_stride = recurrent.data_ptr(), recurrent.stride(0)
        t.window, t.window_stride, t.window_bf16 = window.data_ptr(), window.stride(0) * window.itemsize, window.itemsize == 2
        compiled.gdn_step(ctypes.byref(t), threads)
        state.position += 1
        return logits


def _addresses(weights: LayerWeights) -> Layer:
    tensors = {name: getattr(weights, name) for name in (*VECTORS, *MATRICES)}
    return Layer(**{name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()})
