"""A model on a CPU, prompts and single tokens: few operations a layer, so that reading the weights is the cost.

The projections that read one input are joined (their parameters become views), products are those of `cpu_products`, and all
between them is float32 whatever the weights are. The same function as the modules, to rounding.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gdn.generation.cpu_products import Product, product_with
from gdn.generation.weights import LayerWeights, is_joined, layer_weights
from gdn.model.config import ModelConfig
from gdn.model.lm import GatedDeltaNetLM
from gdn.model.state import DecodeState
from gdn.ops import gated_delta_rule_step, gated_delta_rule_with_state, l2_norm, rms_norm, short_conv_with_state

Array = np.ndarray[Any, np.dtype[np.float32]]


class CPUDecoder:
    """A model whose projections are joined. Holds views or copies of its weights and the step's vectors; the state is the
    caller's. Not for two threads at once.
    """

    def __init__(self, model: GatedDeltaNetLM) -> None:
        self._embeddings, self._norm = model.model.embeddings.weight, model.model.norm.weight.float().detach().numpy()
        self._config, self._eps = model.config, model.config.norm_eps
        self._layers, self._head = _products(model)
        self._room = _Room(model.config)

    @staticmethod
    def serves(model: GatedDeltaNetLM) -> bool:
        """Whether the model lies on a CPU, computes in its weights' dtype or wider, and has its projections joined."""
        weight = model.model.embeddings.weight
        plain = weight.device.type == "cpu" and model.compute_dtype in (None, weight.dtype, torch.float32)
        return plain and weight.dtype in (torch.float32, torch.bfloat16) and is_joined(model)

    @staticmethod
    def reads(model: GatedDeltaNetLM) -> bool:
        """Whether many rows are this class's too: those that are computed in float32."""
        return CPUDecoder.serves(model) and torch.float32 in (model.compute_dtype, model.model.embeddings.weight.dtype)

    def read(self, ids: Tensor, state: DecodeState) -> Tensor:
        """Logits [N, vocab] after the last of ids [N, T], one row of `state` each, which is updated in place."""
        config = self._config
        HV, channels = config.value_heads, 2 * config.key_dim + config.value_dim
        sizes = [channels, HV, HV, config.value_dim if config.use_gate else 0]
        with torch.no_grad():
            x = self._embeddings[ids].float()
            for i, ((layer, _), products) in enumerate(self._layers):
                y, a, b, gate = products.projections(rms_norm(x, layer.mixer_norm, self._eps)).split(sizes, -1)
                if layer.conv is None:
                    y = F.silu(y)
                else:
                    y, window = short_conv_with_state(y, layer.conv.T, layer.conv_bias, initial_state=state.conv[i])
                    state.conv[i] = window
                o = self._rule(layer, y, a, b, state.recurrent[i])
                o = rms_norm(o, layer.o_norm, self._eps).flatten(-2)
                x = x + products.out(o * F.silu(gate) if config.use_gate else o)
                gate, up = products.ffn(rms_norm(x, layer.ffn_norm, self._eps)).chunk(2, -1)
                x = x + products.down(F.silu(gate) * up)
            state.position += ids.shape[1]
            return self._head(rms_norm(x[:, -1], torch.from_numpy(self._norm), self._eps))

    def _rule(self, layer: LayerWeights, y: Tensor, a: Tensor, b: Tensor, S: Tensor) -> Tensor:
        """Of convolved y [N, T, D] and the gates' projections [N, T, HV]: o [N, T, HV, V]; S is updated."""
        config = self._config
        q, k, v = y.split([config.key_dim, config.key_dim, config.value_dim], -1)
        q, k = (l2_norm(keys.unflatten(-1, (config.num_heads, config.head_dim))) for keys in (q, k))
        v = v.unflatten(-1, (config.value_heads, config.head_v_dim))
        g, beta = F.softplus(a + layer.dt_bias) * layer.rate, b.sigmoid()
        beta = 2 * beta if config.allow_neg_eigval else beta
        if y.shape[1] == 1:
            return gated_delta_rule_step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], beta[:, 0], S).unsqueeze(1)
        o, final = gated_delta_rule_with_state(q, k, v, g, beta, initial_state=S)
        S.copy_(final)
        return o

    def step(self, token: int, state: DecodeState) -> Tensor:
        """Logits [vocab] after one more token of the one row in `state`, which is updated in place."""
        room = self._room
        with torch.no_grad():
            room.x[:] = self._embeddings[token].float().numpy()
            memory = zip(state.recurrent[:, 0].unbind(), state.conv[:, 0].unbind())
            for (layer, products), (S, window) in zip(self._layers, memory):
                room.projected[:] = products.projections(self._normed(layer.vectors.mixer_norm)).numpy()
                self._mix(layer.vectors, S, window)
                room.x += products.out(room.o_row).numpy()
                room.ffn[:] = products.ffn(self._normed(layer.vectors.ffn_norm)).numpy()
                F.silu(room.ffn_gate, inplace=True)
                np.multiply(room.ffn_activated, room.ffn_up, out=room.inner)
                room.x += products.down(room.inner_row).numpy()
            state.position += 1
            return self._head(self._normed(self._norm))[0]

    def _normed(self, weight: Array) -> Tensor:
        """RMSNorm of x, [1, hidden]."""
        room = self._room
        np.multiply(room.x, weight, out=room.h)
        room.h *= (float(np.dot(room.x_flat, room.x_flat)) / len(room.x_flat) + self._eps) ** -0.5
        return room.h_row

    def _mix(self, layer: "_Vectors", S: Tensor, window: Tensor) -> None:
        """From the projections to o: convolution, norms, gates, rule, output norm and gate; S and window are updated."""
        room, config = self._room, self._config
        if layer.conv is not None:
            room.past.copy_(window)
            room.newest[:] = room.y
            window.copy_(room.recent)
            np.multiply(room.read, layer.conv, out=room.products)
            np.add.reduce(room.products, 0, out=room.y)
            if layer.conv_bias is not None:
                room.y += layer.conv_bias
        F.silu(room.y_vector, inplace=True)

        # Both gates at once: decay = exp(rate softplus(a + dt_bias)), beta = sigmoid(b) = exp(-softplus(-b)).
        gates = np.multiply(room.ab, room.gate_signs, out=room.gates)
        gates += layer.gate_bias
        np.logaddexp(gates, 0, out=gates)
        gates *= layer.gate_rate
        np.exp(gates, out=gates)
        if config.allow_neg_eigval:
            room.beta *= 2

        np.multiply(room.qk, room.qk, out=room.squares)
        np.multiply(room.q, room.k, out=room.qk_product)
        sums = np.add.reduce(room.sum_terms, -1, out=room.sums)
        norms = (sums[:2] + 1e-6) ** -0.5
        np.multiply(room.qk_by_head, norms.T[:, None, :, None], out=room.qk_by_value_head)
        qk = sums[2] * norms[0] * norms[1]

        # S' = decay S; w = beta (v - k S'); S = S' + k w; o = q S' + (q k) w. Decaying first brings S into the cache, for both
        # cores at once, where the batched product alone would wait for memory. o's scale is in its norm's epsilon.
        S.mul_(room.decay_by_head)
        torch.bmm(room.qk_rows, S, out=room.reads)
        np.subtract(room.v, room.read_k, out=room.write)
        room.write *= room.beta
        S.addcmul_(room.k_column, room.write_row)
        np.multiply(room.write_by_head, qk[:, None, None], out=room.o_by_head)
        o = room.o
        o += room.read_q
        scale = np.add.reduce(np.multiply(o, o, out=room.write), -1, keepdims=True)
        o *= (scale + room.o_eps) ** -0.5 * room.o_scale
        o *= layer.o_norm
        if config.use_gate:
            F.silu(room.gate_vector, inplace=True)
            o *= room.gate


class _Room:
    """The vectors of a step and views of their parts, made once: a view costs as much as a small operation.

    What is not the size of the state is numpy's, whose operations on a few thousand numbers take a fraction of PyTorch's time;
    tensors are views of the same memory.
    """

    def __init__(self, config: ModelConfig) -> None:
        H, HV, V, keys, values = config.num_heads, config.value_heads, config.head_v_dim, config.key_dim, config.value_dim
        channels = 2 * keys + values
        self.x, self.h = _zeros(1, config.hidden_size), _zeros(1, config.hidden_size)
        self.x_flat, self.h_row = self.x[0], torch.from_numpy(self.h)
        self.projected = _zeros(1, channels + 2 * HV + (values if config.use_gate else 0))
        self.y, self.ab, gate = np.split(self.projected[0], [channels, channels + 2 * HV])
        self.y_vector, self.gate_vector = torch.from_numpy(self.y), torch.from_numpy(gate)
        self.qk, self.v = self.y[: 2 * keys].reshape(2, H, config.head_dim), self.y[2 * keys :].reshape(HV, V)
        (self.q, self.k), self.qk_by_head = self.qk, self.qk.transpose(1, 0, 2)[:, None]
        self.read, self.products = _zeros(config.conv_size, channels), _zeros(config.conv_size, channels)
        self.past, self.recent, self.newest = torch.from_numpy(self.read[:-1]), torch.from_numpy(self.read[1:]), self.read[-1]

        self.gates, self.gate_signs = _zeros(2 * HV), np.repeat(np.array([1, -1], np.float32), HV)
        self.beta, self.decay_by_head = self.gates[HV:, None], torch.from_numpy(self.gates[:HV]).view(HV, 1, 1)
        self.sum_terms, self.sums = _zeros(3, H, config.head_dim), _zeros(3, H)
        self.squares, self.qk_product = self.sum_terms[:2], self.sum_terms[2]
        self.qk_by_value_head = _zeros(H, HV // H, 2, config.head_dim)
        self.qk_rows = torch.from_numpy(self.qk_by_value_head).view(HV, 2, config.head_dim)
        self.k_column = self.qk_rows[:, 1].unsqueeze(-1)

        self.reads, self.write = torch.zeros(HV, 2, V), _zeros(HV, V)
        self.read_q, self.read_k = self.reads[:, 0].numpy(), self.reads[:, 1].numpy()
        self.write_row, self.write_by_head = torch.from_numpy(self.write).unsqueeze(-2), self.write.reshape(H, HV // H, V)
        # The norm of a scaled o: s o / sqrt(s^2 |o|^2 / V + eps) = sqrt(V) o / sqrt(|o|^2 + V eps / s^2), s = head_dim^-0.5.
        self.o_eps, self.o_scale = V * config.norm_eps * config.head_dim, V**0.5
        self.o = _zeros(HV, V)
        self.o_row, self.o_by_head = torch.from_numpy(self.o).view(1, values), self.o.reshape(H, HV // H, V)
        self.gate = gate.reshape(HV, V) if config.use_gate else gate
        self.ffn, self.inner = _zeros(1, 2 * config.ffn_size), _zeros(1, config.ffn_size)
        self.ffn_activated, self.ffn_up = np.split(self.ffn, 2, axis=1)
        self.ffn_gate, self.inner_row = torch.from_numpy(self.ffn_activated), torch.from_numpy(self.inner)


def _zeros(*shape: int) -> Array:
    return np.zeros(shape, np.float32)


class _Vectors(NamedTuple):
    """What a step reads of a layer beside its matrices, as numpy has it."""

    mixer_norm: Array
    conv: Array | None  # [W, D]
    conv_bias: Array | None
    gate_bias: Array  # dt_bias, then zeros [2 HV]
    gate_rate: Array  # of the decay, then -1 [2 HV]
    o_norm: Array
    ffn_norm: Array


def _vectors(layer: LayerWeights) -> _Vectors:
    return _Vectors(
        mixer_norm=layer.mixer_norm.detach().numpy(),
        conv=None if layer.conv is None else layer.conv.detach().numpy(),
        conv_bias=None if layer.conv_bias is None else layer.conv_bias.detach().numpy(),
        gate_bias=torch.cat([layer.dt_bias, torch.zeros_like(layer.dt_bias)]).detach().numpy(),
        gate_rate=torch.cat([layer.rate, -torch.ones_like(layer.rate)]).detach().numpy(),
        o_norm=layer.o_norm.detach().numpy(),
        ffn_norm=layer.ffn_norm.detach().numpy(),
    )


class _Layer(NamedTuple):
    weights: LayerWeights
    vectors: _Vectors


class _LayerProducts(NamedTuple):
    projections: Product
    out: Product
    ffn: Product
    down: Product


_Products = tuple[list[tuple[_Layer, _LayerProducts]], Product]
_made: "WeakKeyDictionary[GatedDeltaNetLM, tuple[object, _Products]]" = WeakKeyDictionary()


def _products(model: GatedDeltaNetLM) -> _Products:
    """Of each layer, and of the head. Made once for a model, because they may be copies, until any of its weights changes."""
    weights = model.parameters()
    known = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]
    if model not in _made or _made[model][0] != known:
        layers = [layer_weights(block) for block in model.model.layers]  # type: ignore[arg-type]
        large = [(layer.projections, layer.out, layer.ffn, layer.down) for layer in layers]
        # FBGEMM packs on one core, 11 ns a weight, and lets other threads run meanwhile.
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            head = pool.submit(product_with, model.lm_head.weight)
            products = list(pool.map(lambda weights: _LayerProducts(*map(product_with, weights)), large))
        _made[model] = known, ([(_Layer(layer, _vectors(layer)), made) for layer, made in zip(layers, products)], head.result())
    return _made[model][1]
