"""A model's weights as decoding reads them: those that read one input side by side, as one matrix."""

import mmap
from collections.abc import Iterable, Sequence
from itertools import accumulate, repeat
from typing import NamedTuple

import torch
from torch import Tensor

from gdn.model.layers import Linear, adjacent
from gdn.model.lm import Block, GatedDeltaNetLM
from gdn.model.mixer import GatedDeltaNet

_ALIGNED = 64  # bytes, as PyTorch's own memory


def join_projections(model: GatedDeltaNetLM) -> None:
    """Lay the weights that read one input side by side, in place: q, k, v, a, b and the gate; the FFN's gate and up.

    Each parameter's memory becomes its part: names, values and the parameters themselves stay. On a CPU the other matrices move
    with them to memory of large pages, which are read faster.
    """
    together: list[Sequence[Linear]] = []
    alone: list[Sequence[Linear]] = [[model.lm_head]]
    for layer in model.model.layers:
        assert isinstance(layer, Block)
        together += [_inputs(layer.attn), [layer.mlp.gate_proj, layer.mlp.up_proj]]
        alone += [[layer.attn.o_proj], [layer.mlp.down_proj]]
    groups = [linears for linears in together if adjacent(linears) is None]
    weights = [linear.weight for linears in together + alone for linear in linears]
    rooms: Iterable[Tensor | None] | None = None
    if groups and all(weight.is_cpu and weight.dtype == weights[0].dtype for weight in weights):
        rooms = _in_large_pages(together + alone)
        groups = groups if rooms is None else together + alone
    with torch.no_grad():
        for linears, room in zip(groups, repeat(None) if rooms is None else rooms):
            joined = torch.cat([linear.weight for linear in linears], out=room)
            for linear, part in zip(linears, joined.split([len(linear.weight) for linear in linears])):
                linear.weight.data = part


def _in_large_pages(groups: Sequence[Sequence[Linear]]) -> Iterable[Tensor] | None:
    """Room for each group's weights as one matrix, all of one dtype, in one piece of memory, freed with the last of them.

    None where the system has no large pages to give. They are asked for before the memory is used: later costs a copy of it.
    """
    dtype = groups[0][0].weight.dtype
    shapes = [(sum(len(linear.weight) for linear in linears), linears[0].in_features) for linears in groups]
    starts = [0, *accumulate(-(-dtype.itemsize * rows * width // _ALIGNED) * _ALIGNED for rows, width in shapes)]
    advice = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux alone has it
    if advice is None:
        return None
    try:
        memory = mmap.mmap(-1, starts[-1], flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has other rules
        memory.madvise(advice)
    except OSError:
        return None
    return (
        torch.frombuffer(memory, dtype=dtype, count=rows * width, offset=start).view(rows, width)
        for start, (rows, width) in zip(starts, shapes)
    )


def is_joined(model: GatedDeltaNetLM) -> bool:
    """Whether `join_projections` was called, and nothing has moved the weights since."""
    first = model.model.layers[0]
    assert isinstance(first, Block)
    return adjacent(_inputs(first.attn)) is not None


class LayerWeights(NamedTuple):
    """Views of one block's weights, its projections joined; norms, convolution and gates in float32."""

    mixer_norm: Tensor
    projections: Tensor  # [q | k | v | a | b | gate, hidden]
    conv: Tensor | None  # [W, D]
    conv_bias: Tensor | None
    rate: Tensor  # -exp(A_log) [HV]
    dt_bias: Tensor
    o_norm: Tensor
    out: Tensor
    ffn_norm: Tensor
    ffn: Tensor  # [gate | up, hidden]
    down: Tensor


def layer_weights(block: Block) -> LayerWeights:
    attn = block.attn
    projections, ffn = adjacent(_inputs(attn)), adjacent([block.mlp.gate_proj, block.mlp.up_proj])
    assert projections is not None and ffn is not None
    conv, bias = None, None
    if attn.config.use_short_conv:
        convolutions = (attn.q_conv1d, attn.k_conv1d, attn.v_conv1d)
        conv = torch.cat([one.weight.squeeze(1) for one in convolutions]).float().T.contiguous()
        biases: list[Tensor] = [one.bias for one in convolutions if one.bias is not None]
        bias = torch.cat(biases).float() if biases else None
    return LayerWeights(
        mixer_norm=block.attn_norm.weight.float(),
        projections=projections,
        conv=conv,
        conv_bias=bias,
        rate=-attn.A_log.float().exp(),
        dt_bias=attn.dt_bias.float(),
        o_norm=attn.o_norm.weight.float(),
        out=attn.o_proj.weight,
        ffn_norm=block.mlp_norm.weight.float(),
        ffn=ffn,
        down=block.mlp.down_proj.weight,
    )


def _inputs(attn: GatedDeltaNet) -> Sequence[Linear]:
    """The projections of the layer's input, in the order of the joined rows."""
    found = [attn.q_proj, attn.k_proj, attn.v_proj, attn.a_proj, attn.b_proj]
    return [*found, attn.g_proj] if attn.config.use_gate else found
