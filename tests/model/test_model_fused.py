"""The layer by the fused operator is the layer in pieces: its arguments, columns and states, with that operator in PyTorch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gdn.model import mixer
from gdn.model.layers import Linear
from gdn.model.lm import GatedDeltaNetLM


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[int]]:
    """Call it and from then on layers take the fused path; returns the lengths of what that path was given."""

    def switch_on() -> list[int]:
        lengths: list[int] = []
        whole = mixer.GatedDeltaNet._fused_rule

        def counted(self: Any, x: Any, *rest: Any) -> Any:
            lengths.append(x.shape[1])
            return whole(self, x, *rest)

        monkeypatch.setattr(mixer, "choose_backend", lambda *_: "triton")
        monkeypatch.setattr(mixer.GatedDeltaNet, "_fused_rule", counted)
        return lengths

    return switch_on


def results(model: GatedDeltaNetLM, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits and states of a prefill and of steps after it, of packed sequences, and every gradient of a loss."""
    found: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        state = model.new_state(len(ids))
        pieces = [model(piece, state=state).logits for piece in ids.split([20, 1, 1, 8], dim=1)]
        found |= {"logits": torch.cat(pieces, dim=1), "recurrent": state.recurrent, "conv": state.conv}
        packed = model.new_state(3)
        bounds = torch.tensor([0, 11, 11, 30], dtype=torch.int32)
        found["packed"] = model(ids[:1], state=packed, cu_seqlens=bounds).logits
        found |= {"packed_recurrent": packed.recurrent, "packed_conv": packed.conv}
    model.zero_grad()
    model(ids[:, :-1], ids[:, 1:]).loss_sum.backward()
    return found | {name: parameter.grad for name, parameter in model.named_parameters()}


def test_fused_layer_is_the_layer_in_pieces(
    switches: dict[str, Any], make: Callable[..., GatedDeltaNetLM], fused: Callable[[], list[int]]
) -> None:
    model = make(**switches)
    ids = torch.randint(61, (2, 30), generator=torch.Generator().manual_seed(0))
    wanted = results(model, ids)
    lengths = fused()
    got = results(model, ids)
    layers = range(model.config.num_hidden_layers if model.config.use_short_conv else 0)
    assert lengths == [length for length in (20, 1, 1, 8, 30, 29) for _ in layers]
    for key, tensor in wanted.items():
        assert tensor.numel() == 0 or float((got[key] - tensor).norm() / tensor.norm()) < 1e-10, key


class Adapted(torch.nn.Module):
    """A linear layer and something beside it, its weight in sight, as peft's adapters have it."""

    def __init__(self, base: Linear) -> None:
        super().__init__()
        self.base = base
        self.weight = base.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + 0.5 * x.roll(1, -1)[..., :1]


@pytest.mark.parametrize("name", ["q_proj", "v_proj", "b_proj"])
@pytest.mark.parametrize("way", ["module", "hook"])
def test_what_stands_in_a_projections_place_is_called(
    make: Callable[..., GatedDeltaNetLM], fused: Callable[[], list[int]], name: str, way: str
) -> None:
    model = make()
    ids = torch.randint(61, (2, 30), generator=torch.Generator().manual_seed(0))
    bare = results(model, ids)["logits"]
    attn = model.model.layers[0].attn
    adapted = Adapted(getattr(attn, name))
    if way == "module":
        setattr(attn, name, adapted)
    else:
        base = adapted.base.forward
        adapted.base.forward = lambda x: base(x) + 0.5 * x.roll(1, -1)[..., :1]  # type: ignore[method-assign]
    wanted = results(model, ids)["logits"]
    assert fused() == []
    assert float((results(model, ids)["logits"] - wanted).norm() / wanted.norm()) < 1e-10
    assert float((bare - wanted).norm() / wanted.norm()) > 1e-3
