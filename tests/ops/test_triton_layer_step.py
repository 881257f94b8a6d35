"""A layer's middle in one launch is L2 norm, gates, the rule's step and the gated norm one after another."""

import os

import pytest
import torch
from ops_testing import relative_error
from torch import Tensor

from gdn.ops import beta_gate, decay_gate, gated_delta_rule_step
from gdn.ops.norm import l2_norm
from gdn.ops.pending import SLOTS, settle, slot_size

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from gdn.ops.triton_layer_step import layer_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


@pytest.mark.parametrize(("H", "HV", "K", "V"), [(1, 1, 64, 64), (1, 2, 64, 96), (2, 4, 128, 64)])
@pytest.mark.parametrize(("gated", "double"), [(False, True), (True, False), (True, True)])
def test_the_middle_of_a_layer(H: int, HV: int, K: int, V: int, gated: bool, double: bool) -> None:
    """Tokens enough that every head's state is written once and read with slots filled after it."""
    B, D, layer = 2, 2 * H * K + HV * V, 3
    state, pending = normal(B, HV, K, V), torch.zeros(B, HV, SLOTS, slot_size(K, V), device=DEVICE)
    position, wanted_state = torch.tensor([0, 6], device=DEVICE), state.double()
    A_log, dt_bias, norm = normal(HV), normal(HV, seed=1), normal(V)
    written = torch.zeros(B, HV, dtype=torch.int64, device=DEVICE)
    for token in range(SLOTS + 2):
        projected = normal(B, D + 2 * HV + (HV * V if gated else 0), seed=token)
        x, before = projected.double(), state.clone()
        position += 1
        got = layer_step(
            projected, A_log, dt_bias, norm, state, pending, position, layer, H, gated, double, torch.float32
        )  # fmt: skip
        written += (state != before).any(-1).any(-1)

        q, k, v = (part.unflatten(1, (-1, size)) for part, size in zip(x[:, :D].split([H * K, H * K, HV * V], 1), (K, K, V)))
        g = decay_gate(x[:, D : D + HV], A_log.double(), dt_bias.double())
        beta = beta_gate(x[:, D + HV : D + 2 * HV], double)
        o = gated_delta_rule_step(l2_norm(q), l2_norm(k), v, g, beta, wanted_state, backend="torch")
        gate = torch.nn.functional.silu(x[:, D + 2 * HV :].unflatten(1, (HV, V))) if gated else 1.0
        assert relative_error(got.h, (o * norm.double() * gate).flatten(1)) <= 1e-5
        assert relative_error(got.squares.sum(2), o.square().sum(2)) <= 1e-5
    assert ((written == 1) | (written == 2)).all()
    head = torch.arange(layer * HV, (layer + 1) * HV, device=DEVICE)
    assert torch.equal(written, (position[:, None] + head) // SLOTS - (position[:, None] - token - 1 + head) // SLOTS)
    own = [torch.zeros(layer + 1, *tensor.shape, device=DEVICE) for tensor in (state, pending)]
    own[0][layer], own[1][layer] = state, pending
    settle(own[0], own[1], position)
    assert relative_error(own[0][layer], wanted_state) <= 1e-5


def test_what_is_refused() -> None:
    def refused(message: str, state: Tensor, pending: Tensor) -> None:
        with pytest.raises(ValueError, match=message):
            layer_step(
                normal(1, 258), normal(1), normal(1), normal(64), state, pending, torch.ones(1).long(), 0, 1, False, False,
                torch.float32,
            )  # fmt: skip

    slots = torch.zeros(1, 1, SLOTS, slot_size(64, 64), device=DEVICE)
    refused("state has strides", normal(1, 1, 64, 128)[..., ::2], slots)
    refused("slots are", normal(1, 1, 64, 64), slots[:, :, :0])
    refused("slots are", normal(1, 1, 64, 64), slots.transpose(2, 3).contiguous().transpose(2, 3))
    refused("slots are", normal(1, 1, 64, 64), torch.zeros(slots.numel() + 1, device=DEVICE)[1:].view(slots.shape))
