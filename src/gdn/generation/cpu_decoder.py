"""A model on a CPU, prompts and single tokens: few operations a layer, so that reading the weights is the cost.

The projections that read one input are joined (their parameters become views), products are those of `cpu_products`, and all
between them is float32 whatever the weights are. The same function as the modules, to rounding. Single tokens are compiled
(`cpu_token`) where there is a C compiler.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn.generation.cpu_products import Product, product_with
from gdn.generation.cpu_token import CompiledToken
from gdn.generation.weights import LayerWeights, is_joined, layer_weights
from gdn.model.config import ModelConfig
from gdn.model.lm import GatedDeltaNetLM
from gdn.model.state import DecodeState
from gdn.ops import gated_delta_rule_step, gated_delta_rule_with_state, l2_norm, rms_norm, short_conv_with_state


class CPUDecoder:
    """A model whose projections are joined. Holds views or copies of its weights and the step's vectors; the state is the
    caller's. Not for two threads at once.
    """

    def __init__(self, model: GatedDeltaNetLM) -> None:
        self._model, self._config, self._eps = model, model.config, model.config.norm_eps
        self._embeddings, self._norm = model.model.embeddings.weight, model.model.norm.weight.float()
        self._compiled = CompiledToken(model) if CompiledToken.serves(model) else None

    @cached_property
    def _room(self) -> "_Room":
        return _Room(self._config)

    @cached_property
    def _products(self) -> "_Products":
        """Of each layer, and of the head: made where they are first used, as they may be copies."""
        return _products(self._model)

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
        state.settle()
        with torch.no_grad():
            x = self._embeddings[ids].float()
            layers, head = self._products
            for i, (layer, products) in enumerate(layers):
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
            return head(rms_norm(x[:, -1], self._norm, self._eps))

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
        state.settle()
        if self._compiled is not None and self._compiled.reads(state):
            return self._compiled.step(token, state)
        room = self._room
        layers, head = self._products
        with torch.no_grad():
            x = room.x_row.copy_(self._embeddings[token])
            memory = zip(state.recurrent[:, 0].unbind(), state.conv[:, 0].unbind())
            for (layer, products), (S, window) in zip(layers, memory):
                room.projected.copy_(products.projections(self._normed(layer.mixer_norm)))
                self._mix(layer, S, window)
                x.add_(products.out(room.o))
                room.ffn.copy_(products.ffn(self._normed(layer.ffn_norm)))
                torch.mul(F.silu(room.ffn_gate, inplace=True), room.ffn_up, out=room.inner)
                x.add_(products.down(room.inner))
            state.position += 1
            return head(self._normed(self._norm))[0]

    def _normed(self, weight: Tensor) -> Tensor:
        """RMSNorm of x, [1, hidden]."""
        room = self._room
        # The root mean square as a number of Python's: on a CPU nothing waits for it. As addcmul's value it costs no more,
        # where a tensor times a number is a third of the norm.
        scale = (float(room.x.dot(room.x)) / len(room.x) + self._eps) ** -0.5
        torch.addcmul(room.nothing, room.x, weight, value=scale, out=room.h)
        return room.h_row

    def _mix(self, layer: LayerWeights, S: Tensor, window: Tensor) -> None:
        """From the projections to o: convolution, norms, gates, rule, output norm and gate; S and window are updated."""
        room, config = self._room, self._config
        if layer.conv is not None:
            room.past.copy_(window)
            room.newest.copy_(room.y)
            window.copy_(room.recent)
            torch.sum(torch.mul(room.read, layer.conv, out=room.products), 0, out=room.y)
            if layer.conv_bias is not None:
                room.y.add_(layer.conv_bias)
        F.silu(room.y, inplace=True)
        torch.sum(torch.mul(room.qk, room.qk, out=room.squares), -1, keepdim=True, out=room.sums)
        room.qk.mul_(room.sums.add_(room.tiny).rsqrt_())
        qk = room.qk_by_head
        if config.value_heads > config.num_heads:
            qk = qk.repeat_interleave(config.value_heads // config.num_heads, dim=0)
        q, k = qk.unbind(1)
        torch.mul(F.softplus(room.a.add_(layer.dt_bias)), layer.rate, out=room.decay).exp_()
        room.b.sigmoid_()
        if config.allow_neg_eigval:
            room.b.mul_(2)

        # S' = decay S; w = beta (v - k S'); S = S' + k w; o = q S' + (q k) w. Decaying first brings S into the cache, for both
        # cores at once, where the batched product alone would wait for memory. o's scale is in its norm's epsilon.
        S.mul_(room.decay_by_head)
        torch.bmm(qk, S, out=room.reads)
        write = torch.sub(room.v, room.read_k, out=room.write).mul_(room.beta)
        S.addcmul_(k.unsqueeze(-1), room.write_row)
        o = room.read_q.addcmul_(torch.linalg.vecdot(q, k).unsqueeze(-1), write)
        o.mul_(torch.linalg.vecdot(o, o).add_(room.o_eps).rsqrt_().unsqueeze(-1))
        torch.mul(o, layer.o_norm, out=room.o_by_head).mul_(room.o_scale)
        if config.use_gate:
            room.o.mul_(F.silu(room.gate, inplace=True))


class _Room:
    """The vectors of a step and views of their parts, made once: a view costs as much as a small operation.

    A number of Python's beside a tensor makes an operation thrice as long: numbers are tensors too.
    """

    def __init__(self, config: ModelConfig) -> None:
        HV, V, keys, values = config.value_heads, config.head_v_dim, config.key_dim, config.value_dim
        channels = 2 * keys + values
        self.x, self.h, self.nothing = torch.zeros(3, config.hidden_size)
        self.x_row, self.h_row = self.x[None], self.h[None]
        self.projected = torch.empty(1, channels + 2 * HV + (values if config.use_gate else 0))
        self.y, self.a, self.b, self.gate = self.projected[0].tensor_split([channels, channels + HV, channels + 2 * HV])
        self.qk = self.y[: 2 * keys].view(2, config.num_heads, config.head_dim)
        self.qk_by_head = self.qk.transpose(0, 1)
        self.squares, self.sums = torch.empty_like(self.qk), torch.empty(2, config.num_heads, 1)
        self.tiny = torch.tensor(1e-6)
        self.v = self.y[2 * keys :].view(HV, V)
        self.read = torch.empty(config.conv_size, channels)
        self.past, self.recent, self.newest = self.read[:-1], self.read[1:], self.read[-1]
        self.products = torch.empty_like(self.read)
        self.decay, self.beta = torch.empty(HV), self.b.unsqueeze(-1)
        self.decay_by_head = self.decay.view(HV, 1, 1)
        self.reads, self.write = torch.empty(HV, 2, V), torch.empty(HV, V)
        self.read_q, self.read_k = self.reads.unbind(1)
        self.write_row = self.write.unsqueeze(-2)
        # The norm of a scaled o: s o / sqrt(s^2 |o|^2 / V + eps) = sqrt(V) o / sqrt(|o|^2 + V eps / s^2), s = head_dim^-0.5.
        self.o_eps, self.o_scale = torch.tensor(V * config.norm_eps * config.head_dim), torch.tensor(V**0.5)
        self.o = torch.empty(1, values)
        self.o_by_head = self.o.view(HV, V)
        self.ffn, self.inner = torch.empty(1, 2 * config.ffn_size), torch.empty(1, config.ffn_size)
        self.ffn_gate, self.ffn_up = self.ffn.chunk(2, -1)


class _LayerProducts(NamedTuple):
    projections: Product
    out: Product
    ffn: Product
    down: Product


_Products = tuple[list[tuple[LayerWeights, _LayerProducts]], Product]
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
        _made[model] = known, (list(zip(layers, products)), head.result())
    return _made[model][1]
