"""Single tokens of `generate` on a GPU; what decides whether the kernels serve is tested on CPUs too."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hf_testing import relative, tokens
from torch import Tensor

from gdn.generation.gpu_decoder import GPUDecoder
from gdn.generation.weights import is_joined, join_projections
from gdn.hf import GatedDeltaNetForCausalLM, single_tokens

Make = Callable[..., GatedDeltaNetForCausalLM]
SERVED = {"hidden_size": 128, "num_heads": 2, "head_dim": 64, "expand_v": 1}  # sizes that the kernels take

gpu = pytest.mark.gpu
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def test_the_modules_serve_under_the_name_of_the_engine(make: Make) -> None:
    face = make()
    with torch.no_grad():
        own, whole = single_tokens._as_lm(face)(tokens(2, 9)).logits, face(tokens(2, 9)).logits
    assert torch.equal(own, whole)


def test_joining_the_weights_changes_no_parameter(make: Make) -> None:
    face = make()
    parameters, values = list(face.parameters()), {name: value.clone() for name, value in face.state_dict().items()}
    lm = single_tokens._as_lm(face)
    assert not is_joined(lm)
    join_projections(lm)
    assert is_joined(lm) and all(a is b for a, b in zip(parameters, face.parameters()))
    assert all(torch.equal(value, values[name]) for name, value in face.state_dict().items())
    face(tokens(2, 9), labels=tokens(2, 9)).loss.backward()  # and it can be trained on
    assert all(parameter.grad is not None for parameter in face.parameters())
    face.to(torch.float64)
    assert not is_joined(single_tokens._as_lm(face))


def test_adapters_and_hooks_are_not_passed_by(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    face = make()
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    assert single_tokens._is_plain(face)
    hook = face.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert not single_tokens._is_plain(face)
    hook.remove()
    projection = face.model.layers[1].attn.k_proj
    face.model.layers[1].attn.k_proj = torch.nn.Linear(projection.in_features, projection.out_features, bias=False)
    assert not single_tokens._is_plain(face)


def test_a_copied_cache_and_a_moved_model_start_anew(make: Make) -> None:
    face = make()
    with torch.no_grad():
        cache = face(tokens(2, 9)).past_key_values
    assert cache.state is not None
    cache.steps = single_tokens.SingleTokens(GPUDecoder.__new__(GPUDecoder), cache.state, single_tokens.addresses(face))
    assert cache.steps.fits(face, cache.state) and copy.deepcopy(cache).steps is None
    state = cache.state
    cache.reorder_cache(torch.tensor([1, 1]))
    assert cache.state is state and cache.steps.fits(face, state)  # a captured step reads and writes this memory
    cache.batch_repeat_interleave(2)
    assert not cache.steps.fits(face, cache.state)
    face.to(torch.float64)
    assert not cache.steps.fits(face, state)


@gpu
@no_gpu
@pytest.mark.parametrize("rows", [1, 3])
def test_single_tokens_are_the_modules(make: Make, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launched and captured, through a reordering and a masked token."""

    def run(face: Any) -> list[Tensor]:
        found = []
        with torch.no_grad():
            cache = face(ids[:, :70]).past_key_values
            for n in range(70, 70 + 2 * single_tokens.LAUNCHED):
                if n == 73:
                    cache.reorder_cache(torch.arange(rows).flip(0).to("cuda"))
                found.append(face(ids[:, n : n + 1], past_key_values=cache).logits)
            steps = cache.steps
            masked = torch.zeros(rows, 2, dtype=torch.int64, device="cuda")
            found.append(face(ids[:, 90:92], past_key_values=cache, attention_mask=masked).logits)
        assert (steps is None) == (face._step_backend.__name__ != "_step_backend")
        return found

    face, ids = make(**SERVED).to("cuda"), tokens(rows, 99).to("cuda")
    got = run(face)
    monkeypatch.setattr(GatedDeltaNetForCausalLM, "_step_backend", lambda *_: "torch")
    for one, wanted in zip(got, run(face)):
        assert relative(one, wanted) < 1e-5
    assert torch.equal(got[-1][:, 0], got[-1][:, 1])  # nothing but the last token before the padding


@gpu
@no_gpu
def test_ids_out_of_range_are_named(make: Make) -> None:
    face = make(**SERVED).to("cuda")
    with torch.no_grad():
        cache = face(tokens(1, 9).to("cuda")).past_key_values
        with pytest.raises(ValueError, match=r"input_ids\[0, 0\] = 67; expected an id in \[0, 67\)"):
            face(torch.tensor([[67]], device="cuda"), past_key_values=cache)
