"""Rows of sequences, token by token, on a GPU: five kernels a layer, one of them the state's, for few rows chained so that each
has its weights at hand when it begins; and all of a token with its draw as one CUDA graph.

The residual stream is float32. The kernels are the same for any number of rows, their tiles are not; in what order sums go
hangs on sizes of the model alone: a row has the same bits beside any number of others (docs/numerics.md).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gdn.errors import CheckpointError
from gdn.generation.sampling import Sampling
from gdn.generation.weights import LayerWeights, is_joined, layer_weights
from gdn.model.lm import Block, GatedDeltaNetLM
from gdn.model.state import DecodeState
from gdn.ops.backend import choose_backend
from gdn.ops.norm import rms_norm


class GPUDecoder:
    """Steps of a model whose projections are joined. Holds views of its weights; the states are the callers'."""

    def __init__(self, model: GatedDeltaNetLM) -> None:
        self._embeddings, self._head = model.model.embeddings.weight, model.lm_head.weight
        self._norm, self._config = model.model.norm.weight, model.config
        self._layers = [_layer(layer) for layer in model.model.layers]  # type: ignore[arg-type]

    @staticmethod
    def serves(model: GatedDeltaNetLM) -> bool:
        """Whether the model's projections are joined, and its device, dtype and sizes are those of the kernels."""
        config, weight = model.config, model.model.embeddings.weight
        sizes = (weight.device, weight.dtype, config.head_dim, config.head_v_dim)
        kernels = config.use_short_conv and choose_backend("auto", *sizes) == "triton" and _fits(model)
        return kernels and model.compute_dtype in (None, weight.dtype) and is_joined(model)

    def step(self, ids: Tensor, state: DecodeState) -> Tensor:
        """One more token, ids [B] int64, of each row in `state`, which is updated in place: logits [B, vocab] float32 after it.

        The host does nothing but launch: this can be captured.
        """
        return self._step(ids, state)[0]

    def read(self, ids: Tensor, state: DecodeState) -> tuple[Tensor, Tensor]:
        """The same, and the last norm's output [B, hidden] that the logits come of."""
        logits, x = self._step(ids, state)
        with torch.no_grad():
            return logits, rms_norm(x, self._norm, self._config.norm_eps).to(self._head.dtype)

    def _step(self, ids: Tensor, state: DecodeState) -> tuple[Tensor, Tensor]:
        """Logits, and the residual stream at the end."""
        from gdn.ops import triton_linear as linear
        from gdn.ops.triton_layer_step import layer_step
        from gdn.ops.triton_rows import embed, operand_dtype

        config, eps, dtype = self._config, self._config.norm_eps, operand_dtype(self._head)
        norms = [layer.weights.mixer_norm for layer in self._layers] + [self._norm]
        with torch.no_grad():
            residual = embed(ids.contiguous(), self._embeddings, state.position, norms[0])
            for n, layer in enumerate(self._layers):
                w = layer.weights
                projected = linear.project(residual.normed, w.projections, eps, state.conv[n], layer.conv, w.conv_bias)
                o = layer_step(
                    projected, layer.A_log, w.dt_bias, w.o_norm, state.recurrent[n], state.pending[n], state.position, n,
                    config.num_heads, config.use_gate, config.allow_neg_eigval, dtype,
                )  # fmt: skip
                linear.add_output(residual, o, w.out, eps, w.ffn_norm)
                linear.add_down(residual, linear.feed(residual.normed, w.ffn, eps), w.down, norms[n + 1])
            return linear.logits(residual.normed, self._head, eps), residual.x

    def choose(
        self, logits: Tensor, sampling: Sampling, seeds: Tensor, position: Tensor, result: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Ids [B] int64 drawn from logits [B, vocab] for the tokens at position [B], and 1 where a row's are finite, or 0.

        A draw hangs on the row's seed (int64 [B]) and position alone. Both are parts of result [2, B] int64 if it is given.
        This can be captured.
        """
        from gdn.ops.triton_draw import choose

        result = seeds.new_empty(2, len(seeds)) if result is None else result
        choose(logits, sampling.temperature, sampling.top_k, sampling.top_p, seeds, position, result)
        return result[0], result[1]


class Stream:
    """The rows of one state, decoded together: a captured token, replayed. Tokens are chosen as `sampling` tells.

    `state` is updated in place with every token, and its rows may be written between two tokens: a sequence that has ended
    makes room for another (`start`).
    """

    def __init__(self, decoder: GPUDecoder, state: DecodeState, sampling: Sampling) -> None:
        self._decoder, self._state, self._sampling = decoder, state, sampling
        device, rows = state.position.device, state.rows
        self._seeds = torch.zeros(rows, dtype=torch.int64, device=device)
        self._result = torch.zeros(2, rows, dtype=torch.int64, device=device)  # ids, and whether their logits were finite
        self._seen = torch.zeros(2, rows, dtype=torch.int64, pin_memory=device.type == "cuda")  # the same on the host
        self._numbers = self._seen.numpy()  # the same memory: a list of a tensor takes thrice as long
        self._graph: torch.cuda.CUDAGraph | None = None

    def start(self, row: int, logits: Tensor, seed: int) -> int:
        """Choose the first token of a row whose state was just written, from the logits [1, vocab] after it; returns it.

        Raises CheckpointError for logits that are not finite.
        """
        self._seeds[row] = _signed(seed)
        part = slice(row, row + 1)
        logits = logits.float().contiguous()
        chosen = self._decoder.choose(logits, self._sampling, self._seeds[part], self._state.position[part])
        self._result[:, part] = torch.stack(chosen)
        self._seen.copy_(self._result)
        return self._checked([row])[0]

    def next(self, rows: Sequence[int]) -> list[int]:
        """One token more of every row; returns those of `rows`, which raise CheckpointError if their logits are not finite."""
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        self._graph.replay()
        if self._result.is_cuda:
            torch.cuda.current_stream(self._result.device).synchronize()  # the one wait of a token
        return self._checked(rows)

    def _step(self) -> None:
        logits = self._decoder.step(self._result[0], self._state)
        self._decoder.choose(logits, self._sampling, self._seeds, self._state.position, self._result)
        self._seen.copy_(self._result, non_blocking=True)

    def _capture(self) -> None:
        """Once, beside everything else: a first run compiles and must not be seen, so what it changes is put back."""
        kept, result = self._state.fork(), self._result.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step()
        torch.cuda.current_stream().wait_stream(side)
        self._state.copy_(kept)
        self._result.copy_(result)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._step()

    def _checked(self, rows: Sequence[int]) -> list[int]:
        tokens, fine = self._numbers.tolist()
        if 0 in fine:
            for row in rows:
                if not fine[row]:
                    raise CheckpointError(
                        f"row {row}: the best logit is not finite: the model's weights are damaged, or its dtype overflows"
                    )
        return [tokens[row] for row in rows]


class _Layer(NamedTuple):
    weights: LayerWeights
    conv: Tensor  # [W, D], in the weights' dtype
    A_log: Tensor


def _layer(block: Block) -> _Layer:
    weights = layer_weights(block)
    assert weights.conv is not None
    return _Layer(weights, weights.conv.to(block.attn.q_conv1d.weight.dtype), block.attn.A_log)


def _fits(model: GatedDeltaNetLM) -> bool:
    """Whether whole steps of 64 columns make up every product, of which a head is one segment, a power of two; and every
    weight's elements can be counted in 31 bits."""
    config = model.config
    V = config.head_v_dim
    steps = config.hidden_size % 64 == 0 and config.ffn_size % 64 == 0 and V >= 64 and V & (V - 1) == 0
    most = max(config.vocab_size, 2 * config.ffn_size, 2 * (config.key_dim + config.value_dim + config.value_heads))
    return steps and most * config.hidden_size < 2**31


def _signed(seed: int) -> int:
    return (seed + 2**63) % 2**64 - 2**63
