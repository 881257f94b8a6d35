"""One row, token by token, on a CPU: the model's step with few operations a layer, so that reading the weights is the cost.

The projections that read one input are joined (their parameters become views), queries and keys read the state
at once, and vectors between the products are float32 whatever the weights are. The same function as the modules, to rounding.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn.generation.weights import LayerWeights, is_joined, layer_weights
from gdn.model.config import ModelConfig
from gdn.model.lm import GatedDeltaNetLM
from gdn.model.state import DecodeState


class CPUDecoder:
    """Steps of a model whose projections are joined. Holds views of its weights and the step's vectors; the state is the
    caller's. Not for two threads at once.
    """

    def __init__(self, model: GatedDeltaNetLM) -> None:
        self._embeddings, self._head = model.model.embeddings.weight, model.lm_head.weight
        self._norm = model.model.norm.weight.float()
        self._config, self._eps = model.config, model.config.norm_eps
        self._layers = [layer_weights(layer) for layer in model.model.layers]  # type: ignore[arg-type]
        self._room = _Room(model.config, self._head.dtype)

    @staticmethod
    def serves(model: GatedDeltaNetLM) -> bool:
        """Whether the model lies on a CPU, computes in its weights' dtype or wider, and has its projections joined."""
        weight = model.model.embeddings.weight
        plain = weight.device.type == "cpu" and model.compute_dtype in (None, weight.dtype, torch.float32)
        return plain and weight.dtype in (torch.float32, torch.bfloat16) and is_joined(model)

    def step(self, token: int, state: DecodeState) -> Tensor:
        """Logits [vocab] after one more token of the one row in `state`, which is updated in place."""
        room = self._room
        with torch.no_grad():
            x = room.x.copy_(self._embeddings[token])
            for i, layer in enumerate(self._layers):
                torch.mv(layer.projections, self._normed(layer.mixer_norm), out=room.projected.narrow)
                self._mix(layer, state.recurrent[i, 0], state.conv[i, 0])
                x.add_(torch.mv(layer.out, room.o.to_narrow(), out=room.out.narrow))
                torch.mv(layer.ffn, self._normed(layer.ffn_norm), out=room.ffn.narrow)
                room.ffn.to_wide()
                torch.mul(F.silu(room.ffn_gate, inplace=True), room.ffn_up, out=room.inner.wide)
                x.add_(torch.mv(layer.down, room.inner.to_narrow(), out=room.out.narrow))
            state.position += 1
            return torch.mv(self._head, self._normed(self._norm))

    def _normed(self, weight: Tensor) -> Tensor:
        """RMSNorm of x, in the weights' dtype."""
        room = self._room
        # The root mean square as a number of Python's: on a CPU nothing waits for it, and it spares half of the operations.
        scale = (float(room.x.dot(room.x)) / len(room.x) + self._eps) ** -0.5
        torch.mul(room.x, weight, out=room.h.wide).mul_(scale)
        return room.h.to_narrow()

    def _mix(self, layer: LayerWeights, S: Tensor, window: Tensor) -> None:
        """From the projections to o: convolution, norms, gates, rule, output norm and gate; S and window are updated."""
        room, config = self._room, self._config
        room.projected.to_wide()
        if layer.conv is not None:
            room.past.copy_(window)
            room.newest.copy_(room.y)
            window.copy_(room.read[1:])
            torch.sum(torch.mul(room.read, layer.conv, out=room.products), 0, out=room.y)
            if layer.conv_bias is not None:
                room.y.add_(layer.conv_bias)
        F.silu(room.y, inplace=True)
        torch.sum(torch.mul(room.qk, room.qk, out=room.squares), -1, keepdim=True, out=room.sums)
        q, k = room.qk.mul_(room.sums.add_(1e-6).rsqrt_())
        if config.value_heads > config.num_heads:
            q, k = (heads.repeat_interleave(config.value_heads // config.num_heads, dim=0) for heads in (q, k))
        decay = (F.softplus(room.a.add_(layer.dt_bias)).mul_(layer.rate)).exp_().view(-1, 1, 1)
        beta = room.b.sigmoid_()
        if config.allow_neg_eigval:
            beta.mul_(2)

        # o = q (decay S + k w) and w = beta (v - decay k S): both reads are of the old state, at once.
        torch.bmm(torch.stack([q, k], 1), S, out=room.reads).mul_(decay)
        write = torch.sub(room.v, room.read_k, out=room.write).mul_(beta.unsqueeze(-1))
        S.mul_(decay).addcmul_(k.unsqueeze(-1), write.unsqueeze(-2))
        o = room.read_q.addcmul_(q.mul(k).sum(-1, keepdim=True), write).mul_(config.head_dim**-0.5)
        mean = o.square().mean(-1, keepdim=True)
        torch.mul(o.mul_(mean.add_(self._eps).rsqrt_()), layer.o_norm, out=room.o.wide.view(o.shape))
        if config.use_gate:
            room.o.wide.mul_(F.silu(room.gate, inplace=True))


class _Vector:
    """A float32 vector and, where the weights are narrower, its copy in their dtype; `wide` and `narrow` may be one tensor."""

    def __init__(self, size: int, dtype: torch.dtype) -> None:
        self.wide = torch.empty(size)
        self.narrow = self.wide if dtype == torch.float32 else torch.empty(size, dtype=dtype)

    def to_narrow(self) -> Tensor:
        return self.narrow if self.narrow is self.wide else self.narrow.copy_(self.wide)

    def to_wide(self) -> Tensor:
        return self.wide if self.narrow is self.wide else self.wide.copy_(self.narrow)


class _Room:
    """The vectors of a step and views of their parts, made once: a view costs as much as a small operation."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        HV, V, keys, values = config.value_heads, config.head_v_dim, config.key_dim, config.value_dim
        channels = 2 * keys + values
        self.x, self.h = torch.empty(config.hidden_size), _Vector(config.hidden_size, dtype)
        self.projected = _Vector(channels + 2 * HV + (values if config.use_gate else 0), dtype)
        self.y, self.a, self.b, self.gate = self.projected.wide.tensor_split([channels, channels + HV, channels + 2 * HV])
        self.qk = self.y[: 2 * keys].view(2, config.num_heads, config.head_dim)
        self.squares, self.sums = torch.empty_like(self.qk), torch.empty(2, config.num_heads, 1)
        self.v = self.y[2 * keys :].view(HV, V)
        self.read = torch.empty(config.conv_size, channels)
        self.past, self.newest, self.products = self.read[:-1], self.read[-1], torch.empty_like(self.read)
        self.reads, self.write = torch.empty(HV, 2, V), torch.empty(HV, V)
        self.read_q, self.read_k = self.reads[:, 0], self.reads[:, 1]
        self.o, self.out = _Vector(values, dtype), _Vector(config.hidden_size, dtype)
        self.ffn, self.inner = _Vector(2 * config.ffn_size, dtype), _Vector(config.ffn_size, dtype)
        self.ffn_gate, self.ffn_up = self.ffn.wide.chunk(2)
