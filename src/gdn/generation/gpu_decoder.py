"""Rows of sequences, token by token, on a GPU: six kernels a layer, and all of a token with its draw as one CUDA graph.

The residual stream is float32; what one product leaves for the next to add is float32 too. Which kernels run, and in what order
their sums go, hangs on sizes of the model alone: a row has the same bits beside any number of others (docs/numerics.md).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gdn.errors import CheckpointError
from gdn.generation.sampling import Sampling, draw, finite
from gdn.generation.weights import LayerWeights, is_joined, layer_weights
from gdn.model.lm import Block, GatedDeltaNetLM
from gdn.model.state import DecodeState
from gdn.ops.backend import choose_backend


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
        """Logits [B, vocab] float32 after one more token, ids [B] int64, of each row in `state`, which is updated in place.

        The host does nothing but launch: this can be captured.
        """
        from gdn.ops.triton_rows import Residual, gated_norm_linear, norm_linear, segments, swiglu_linear
        from gdn.ops.triton_short_conv import conv_step
        from gdn.ops.triton_step import step

        config, eps, B = self._config, self._config.norm_eps, len(ids)
        H, HV, K, V, hidden = config.num_heads, config.value_heads, config.head_dim, config.head_v_dim, config.hidden_size
        gates_at = 2 * config.key_dim + config.value_dim + 2 * HV
        with torch.no_grad():
            residual = Residual(self._embeddings[ids].float())
            for layer, recurrent, window in zip(self._layers, state.recurrent, state.conv):
                w = layer.weights
                projected = residual.x.new_empty(B, len(w.projections), dtype=w.projections.dtype)
                x = torch.empty_like(residual.x)
                norm_linear(residual, w.mixer_norm, eps, w.projections, projected, x)
                q, k, v, g, beta = conv_step(
                    projected, layer.conv, w.conv_bias, window, layer.A_log, w.dt_bias, config.allow_neg_eigval, H, K, HV, V
                )
                o = step(q, k, v, g, beta, recurrent, K**-0.5)
                mixed = x.new_empty(HV, B, hidden)
                gated_norm_linear(o, projected[:, gates_at:] if config.use_gate else None, w.o_norm, eps, w.out, mixed)

                residual, x = Residual(x, mixed), torch.empty_like(x)
                gate_up = projected.new_empty(B, len(w.ffn))
                norm_linear(residual, w.ffn_norm, eps, w.ffn, gate_up, x)
                fed = x.new_empty(segments(config.ffn_size), B, hidden)
                swiglu_linear(gate_up, w.down, fed)
                residual = Residual(x, fed)
            logits = residual.x.new_empty(B, config.vocab_size)
            norm_linear(residual, self._norm, eps, self._head, logits, torch.empty_like(residual.x))
            state.position += 1
            return logits

    def choose(self, logits: Tensor, sampling: Sampling, seeds: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [B] int64 drawn from logits [B, vocab] for the tokens at position [B], and whether each row's are finite.

        A draw hangs on the row's seed (int64 [B]) and position alone. This can be captured.
        """
        noise = None
        if not sampling.greedy:
            from gdn.ops.triton_rows import exponential_noise

            noise = exponential_noise(seeds, position, logits.shape[1])
        return draw(logits, sampling, noise), finite(logits)


class Stream:
    """The rows of one state, decoded together: a captured token, replayed. Tokens are chosen as `sampling` tells.

    `state` is updated in place with every token, and its rows may be written between two tokens: a sequence that has ended
    makes room for another (`start`).
    """

    def __init__(self, decoder: GPUDecoder, state: DecodeState, sampling: Sampling) -> None:
        self._decoder, self._state, self._sampling = decoder, state, sampling
        device, rows = state.position.device, state.rows
        self._ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self._seeds = torch.zeros(rows, dtype=torch.int64, device=device)
        self._result = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def start(self, row: int, logits: Tensor, seed: int) -> int:
        """Choose the first token of a row whose state was just written, from the logits [1, vocab] after it; returns it.

        Raises CheckpointError for logits that are not finite.
        """
        self._seeds[row] = _signed(seed)
        part = slice(row, row + 1)
        chosen, ok = self._decoder.choose(logits.float(), self._sampling, self._seeds[part], self._state.position[part])
        self._ids[part] = chosen
        (token,) = self._checked(torch.stack([chosen, ok.long()]), [row])
        return token

    def next(self, rows: Sequence[int]) -> list[int]:
        """One token more of every row; returns those of `rows`, which raise CheckpointError if their logits are not finite."""
        if self._graph is None:
            self._capture()
        assert self._graph is not None
        self._graph.replay()
        return self._checked(self._result[:, list(rows)], rows)

    def _step(self) -> None:
        logits = self._decoder.step(self._ids, self._state)
        chosen, ok = self._decoder.choose(logits, self._sampling, self._seeds, self._state.position)
        self._ids.copy_(chosen)
        self._result.copy_(torch.stack([chosen, ok.long()]))

    def _capture(self) -> None:
        """Once, beside everything else: a first run compiles and must not be seen, so what it changes is put back."""
        kept, ids = self._state.fork(), self._ids.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._step()
        torch.cuda.current_stream().wait_stream(side)
        for name in ("recurrent", "conv", "position"):
            getattr(self._state, name).copy_(getattr(kept, name))
        self._ids.copy_(ids)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._step()

    def _checked(self, result: Tensor, rows: Sequence[int]) -> list[int]:
        tokens, ok = result.tolist()  # the one wait of a token
        for row, fine in zip(rows, ok):
            if not fine:
                raise CheckpointError(
                    f"row {row}: the best logit is not finite: the model's weights are damaged, or its dtype overflows"
                )
        return list(tokens)


class _Layer(NamedTuple):
    weights: LayerWeights
    conv: Tensor  # [D, W]
    A_log: Tensor


def _layer(block: Block) -> _Layer:
    weights = layer_weights(block)
    assert weights.conv is not None
    return _Layer(weights, weights.conv.T.contiguous(), block.attn.A_log)


def _fits(model: GatedDeltaNetLM) -> bool:
    """Whether whole steps of 64 columns make up every product, and heads are powers of two for their norm."""
    config = model.config
    V = config.head_v_dim
    return config.hidden_size % 64 == 0 and config.ffn_size % 64 == 0 and V >= 64 and V & (V - 1) == 0


def _signed(seed: int) -> int:
    return (seed + 2**63) % 2**64 - 2**63
