import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gdn.model.config import ModelConfig
from gdn.model.lm import GatedDeltaNetLM
from gdn.model.state import DecodeState

T = 71  # more than two chunks of the rule, and no multiple


def tokens(B: int, T: int, seed: int = 0) -> Tensor:
    return torch.randint(61, (B, T), generator=torch.Generator().manual_seed(seed))


def relative(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def read(model: GatedDeltaNetLM, ids: Tensor, *lengths: int) -> tuple[Tensor, DecodeState]:
    """Logits of ids read in pieces of these lengths, and the state after."""
    state = model.new_state(len(ids))
    with torch.no_grad():
        logits = [model(piece, state=state).logits for piece in ids.split(list(lengths), dim=1)]
    return torch.cat(logits, dim=1), state


def test_step_is_chunks_is_full(switches: dict[str, Any], make: Callable[..., GatedDeltaNetLM]) -> None:
    model, ids = make(**switches), tokens(2, T)
    with torch.no_grad():
        full = model(ids).logits
    _, whole = read(model, ids, T)
    for lengths in ([1] * T, [T], [2, 1, 30, 33, 1, 4], [1, 70]):
        logits, state = read(model, ids, *lengths)
        assert relative(logits, full) < 1e-10, lengths
        assert relative(state.recurrent, whole.recurrent) < 1e-10, lengths
        assert state.conv.numel() == 0 or relative(state.conv, whole.conv) < 1e-10, lengths
        assert state.position.tolist() == [T, T]


def test_gradients_flow_to_every_parameter(switches: dict[str, Any], make: Callable[..., GatedDeltaNetLM]) -> None:
    model, ids = make(**switches).train(), tokens(2, 20)
    loss = model(ids[:, :-1], ids[:, 1:]).loss_sum
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    # Along each parameter's own normed gradient at once: a wrong part of any of them shows in the quotient.
    directions = {name: p.grad / p.grad.norm() for name, p in model.named_parameters()}
    losses = []
    for shift in (1e-6, -2e-6):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(directions[name], alpha=shift)
            losses.append(float(model(ids[:, :-1], ids[:, 1:]).loss_sum))
    slope = sum(float(p.grad.norm()) for p in model.parameters())
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(slope, rel=1e-6)


def test_packed_is_alone(switches: dict[str, Any], make: Callable[..., GatedDeltaNetLM]) -> None:
    model, lengths = make(**switches), [1, 40, 0, 3, 27, 0]
    documents = [tokens(1, n, seed=n) for n in lengths]
    packed, bounds = torch.cat(documents, dim=1), torch.tensor([0, *lengths]).cumsum(0).int()
    state = model.new_state(len(lengths))
    with torch.no_grad():
        out = model(packed, cu_seqlens=bounds).logits.split(lengths, dim=1)
        carried = model(packed, cu_seqlens=bounds, state=state).logits.split(lengths, dim=1)
        last = model(packed, cu_seqlens=bounds, last_only=True).logits
    assert state.position.tolist() == lengths
    for i, document in enumerate(documents):
        if lengths[i]:
            alone, alone_state = read(model, document, lengths[i])
            assert relative(out[i], alone) < 1e-10 and relative(carried[i], alone) < 1e-10
            assert relative(last[i], alone[0, -1]) < 1e-10
            assert relative(state.recurrent[:, i : i + 1], alone_state.recurrent) < 1e-10
        else:
            assert not state.recurrent[:, i].any() and not state.conv[:, i].any()


def test_loss_is_the_cross_entropy_of_the_logits(make: Callable[..., GatedDeltaNetLM]) -> None:
    model, ids, labels = make(), tokens(2, 30), tokens(2, 30, seed=1)
    labels[0, 3:20] = -100
    with torch.no_grad():
        logits, loss = model(ids).logits, model(ids, labels).loss_sum
        last = model(ids, last_only=True).logits
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert relative(loss, wanted) < 1e-12
    assert relative(last, logits[:, -1]) < 1e-12


def test_the_head_is_called_for_gradients_and_where_somebody_watches(make: Callable[..., GatedDeltaNetLM]) -> None:
    """Elsewhere a GPU's last logits are a product with its weight alone."""
    model, hidden = make().requires_grad_(False), torch.zeros(1, 3)
    assert not model._calls_head(hidden) and model._calls_head(hidden.requires_grad_())
    with torch.no_grad():
        assert not model._calls_head(hidden)
        model.lm_head.register_forward_hook(lambda *_: None)
        assert model._calls_head(hidden)
        model.lm_head = torch.nn.Sequential(model.lm_head)  # type: ignore[assignment]  an adapter
        assert model._calls_head(hidden)
    model = make().requires_grad_(False)
    model.lm_head.weight.requires_grad_()
    assert model._calls_head(torch.zeros(1, 3))


def test_computing_blocks_again_changes_no_bit_and_keeps_less(make: Callable[..., GatedDeltaNetLM]) -> None:
    model, ids = make(), tokens(2, T)
    found, kept = [], []
    for recompute in ("nothing", "blocks"):
        for block in model.model.layers:
            block.recompute = recompute  # type: ignore[assignment]
        sizes: list[int] = []

        def note(x: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(x.nbytes)
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            loss = model(ids, ids).loss_sum
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
        kept.append(sum(sizes))
    assert all(torch.equal(a, b) for a, b in zip(*found))
    assert kept[1] < kept[0] / 3


def test_state_select_and_fork_are_independent_and_of_constant_size(make: Callable[..., GatedDeltaNetLM]) -> None:
    model, ids = make(), tokens(3, 40)
    state = model.new_state(3)
    empty = state.nbytes
    with torch.no_grad():
        model(ids, state=state)
        assert state.nbytes == empty == sum(tensor.nbytes for tensor in state.tensors().values())
        fork, chosen, before = state.fork(), state.select(torch.tensor([2, 0, 2])), state.fork()
        model(tokens(3, 9, seed=5), state=fork)
        after = model(tokens(1, 5, seed=6).expand(3, 5), state=chosen).logits
        for name, tensor in before.tensors().items():
            assert torch.equal(getattr(state, name), tensor), name
        direct = model(tokens(1, 5, seed=6).expand(3, 5), state=state).logits
    assert (
        relative(after[0], direct[2]) < 1e-12 and relative(after[0], after[2]) < 1e-12 and relative(after[1], direct[0]) < 1e-12
    )
    assert relative(after[0], direct[0]) > 1e-3
    state.reset()
    assert not any(tensor.any() for tensor in state.tensors().values())


def test_the_rows_of_a_batch_do_not_touch(make: Callable[..., GatedDeltaNetLM]) -> None:
    model, ids = make(), tokens(3, 33)
    with torch.no_grad():
        assert relative(model(ids).logits[1], model(ids[1:2]).logits[0]) < 1e-12


@pytest.fixture(scope="module")
def recorded(test_data: Callable[[str], Path]) -> tuple[ModelConfig, dict[str, Tensor]]:
    config = json.loads(test_data("fixtures/gated_deltanet_a.config.json").read_text())
    tensors = load_file(test_data("fixtures/gated_deltanet_a.safetensors"))
    return ModelConfig.from_json(config, "fixture"), tensors


def from_recorded(config: ModelConfig, tensors: dict[str, Tensor], compute: torch.dtype | None = None) -> GatedDeltaNetLM:
    model = GatedDeltaNetLM(config, compute)
    model.load_state_dict({name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")})
    return model.eval()


def test_recorded_logits_and_loss(recorded: tuple[ModelConfig, dict[str, Tensor]]) -> None:
    config, tensors = recorded
    model, ids = from_recorded(config, tensors), tensors["model_io.input_ids"]
    with torch.no_grad():
        logits = model(ids[:, :48]).logits
        loss = model(ids[:, :-1], ids[:, 1:]).loss_sum / ids[:, 1:].numel()
    assert relative(logits, tensors["model_io.logits_fp32_first48"]) < 1e-4
    assert float(loss) == pytest.approx(float(tensors["model_io.loss"]), abs=1e-3)


def test_recorded_bfloat16_and_gradients(recorded: tuple[ModelConfig, dict[str, Tensor]]) -> None:
    config, tensors = recorded
    model, ids = from_recorded(config, tensors, torch.bfloat16), tensors["model_io.input_ids"]
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.dtype == torch.bfloat16
    assert relative(logits, tensors["model_io.logits_bf16"]) < 2e-2
    model = from_recorded(config, tensors)
    (model(ids[:, :-1], ids[:, 1:]).loss_sum / ids[:, 1:].numel()).backward()
    compared = 0
    for name, parameter in model.named_parameters():
        if f"grad.{name}" in tensors:
            compared += 1
            assert relative(parameter.grad, tensors[f"grad.{name}"]) < 6e-2, name
    assert compared > 10
