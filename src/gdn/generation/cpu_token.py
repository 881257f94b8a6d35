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
    """Steps of a model whose projections are joined; not for two threads at once. The state is the caller's.

    Holds the weights as they lie now, norms and gates in float32: a parameter that gets other memory is not followed.
    """

    def __init__(self, model: GatedDeltaNetLM) -> None:
        config = model.config
        self._kept: list[Tensor] = []
        layers = [self._layer(layer_weights(block)) for block in model.model.layers]  # type: ignore[arg-type]
        embeddings, head, norm = model.model.embeddings.weight, model.lm_head.weight, model.model.norm.weight.float()
        self._layers = (Layer * len(layers))(*layers)
        self._token = Token(
            layers=len(layers), hidden=config.hidden_size, heads=config.num_heads, value_heads=config.value_heads,
            head_dim=config.head_dim, head_v_dim=config.head_v_dim, ffn=config.ffn_size, vocab=config.vocab_size,
            conv_size=config.conv_size if config.use_short_conv else 0, bf16=head.dtype == torch.bfloat16,
            gate=config.use_gate, negative=config.allow_neg_eigval, embeddings=self._address(embeddings),
            head=self._address(head), norm=self._address(norm), layer=self._layers, eps=config.norm_eps,
        )  # fmt: skip
        self._room = _floats(0)

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

    def reads(self, state: DecodeState) -> bool:
        """Whether a layer's part of the first row is one piece of memory, as it is in every state that was not made by hand."""
        t, channels = self._token, state.conv.shape[-1]
        matrices = state.recurrent.stride()[2:] == (t.head_dim * t.head_v_dim, t.head_v_dim, 1)
        return matrices and state.conv.stride()[2:] == (channels, 1)

    def step(self, token: int, state: DecodeState) -> Tensor:
        """Logits [vocab] after one more token of the one row in `state`, which is settled, and updated in place."""
        compiled, threads, t = library(), torch.get_num_threads(), self._token
        assert compiled is not None
        if not 0 <= token < t.vocab:
            raise IndexError(f"token {token}; expected an id in [0, {t.vocab}), the model's vocabulary")
        if len(self._room) < t.room_size(threads):
            self._room = _floats(t.room_size(threads))
        logits, recurrent, window = _floats(t.vocab), state.recurrent, state.conv
        t.token, t.room, t.logits = token, self._room.data_ptr(), logits.data_ptr()
        t.recurrent, t.recurrent_stride = recurrent.data_ptr(), recurrent.stride(0)
        t.window, t.window_stride, t.window_bf16 = window.data_ptr(), window.stride(0) * window.itemsize, window.itemsize == 2
        compiled.gdn_step(ctypes.byref(t), threads)
        state.position += 1
        return logits

    def _layer(self, weights: LayerWeights) -> Layer:
        return Layer(**{name: self._address(getattr(weights, name)) for name in (*VECTORS, *MATRICES)})

    def _address(self, tensor: Tensor | None) -> int | None:
        """Where it lies in one piece. The memory is kept, not the parameter, which may be given other memory."""
        if tensor is None:
            return None
        self._kept.append(tensor.detach().contiguous())
        return self._kept[-1].data_ptr()


def _floats(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.float32, device="cpu")  # whatever the defaults are
