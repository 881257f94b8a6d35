"""The rule's kernels on the GPU that is there, Hopper's own among them: values, gradients, and which bits must be the same.

`python -m pytest -m gpu tests/ops`; none of this runs without a GPU. And where compute-sanitizer runs, for accesses beside a
tensor: `PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 python -m pytest -m gpu tests/ops -k small_case`.
"""

from collections.abc import Iterator

import pytest
import torch
from ops_testing import EXTRA, Shape, boundaries, layer_inputs, relative_error, rule_inputs, sizes
from torch import Tensor

from gdn.ops import (
    conv_gated_delta_rule_step,
    conv_gated_delta_rule_with_state,
    gated_delta_rule,
    gated_delta_rule_step,
    gated_delta_rule_with_state,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

BOUND = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
NAMES = ("q", "k", "v", "g", "beta", "initial_state")
MODEL = Shape(4, 2048, 4, 4, 256, 256)


@pytest.fixture(autouse=True)
def float32_is_float32() -> Iterator[None]:
    """The PyTorch form beside which errors are measured must not use tf32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def on_gpu(shape: Shape, dtype: torch.dtype, N: int | None = None, gate: str = "mixed") -> dict[str, Tensor]:
    inputs = rule_inputs(shape, N=N, gate=gate)
    return {name: x.to("cuda", dtype if name in "qkv" else torch.float32) for name, x in inputs.items()}


def results(inputs: dict[str, Tensor], backend: str, cu_seqlens: Tensor | None = None) -> dict[str, Tensor]:
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    o, state = gated_delta_rule_with_state(**leaves, cu_seqlens=cu_seqlens, backend=backend)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in (o, state)]
    gradients = torch.autograd.grad([o, state], list(leaves.values()), upstream)
    return {"o": o.detach(), "final_state": state.detach()} | {f"d_{n}": d for n, d in zip(leaves, gradients)}


def check(inputs: dict[str, Tensor], dtype: torch.dtype, cu_seqlens: Tensor | None = None) -> None:
    got = results(inputs, "triton", cu_seqlens)
    wanted = results({name: x.double() for name, x in inputs.items()}, "torch", cu_seqlens)
    wrong = {name: e for name in wanted if not (e := relative_error(got[name], wanted[name])) <= BOUND[dtype]}
    assert not wrong


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        Shape(2, 333, 2, 2, 256, 256),
        Shape(2, 320, 1, 2, 128, 128),
        Shape(1, 65, 2, 2, 64, 128),
        Shape(1, 64, 1, 1, 256, 384),
        Shape(2, 63, 1, 1, 128, 512),
        Shape(3, 1, 2, 2, 256, 128),
        Shape(1, 130, 1, 2, 64, 96),
    ],
    ids=str,
)
def test_values_and_gradients(shape: Shape, dtype: torch.dtype) -> None:
    check(on_gpu(shape, dtype), dtype)


@pytest.mark.parametrize("lengths", [[100, 0, 233, 1, 0]], ids=str)
@pytest.mark.parametrize("K", [64, 128, 256])
def test_packed_rows(K: int, lengths: list[int]) -> None:
    # Heads enough: the norm of d_g is that of the few tokens beside the end that the final state's gradient comes in by.
    inputs = on_gpu(Shape(1, sum(lengths), 4, 8, K, K), torch.bfloat16, N=len(lengths))
    check(inputs, torch.bfloat16, boundaries(lengths).cuda())


@pytest.mark.parametrize("lengths", [None, [66, 0, 3]], ids=["batch", "packed"])
@pytest.mark.parametrize("K", [64, 128, 256])
def test_a_small_case_of_each_kernel(K: int, lengths: list[int] | None) -> None:
    """Projection to output and back, and one token more, at a size with kernels of its own on Hopper."""
    inputs = layer_inputs(1, 69, 1, K, 2, 128, 4, N=1 if lengths is None else len(lengths))
    cu_seqlens = None if lengths is None else boundaries(lengths).cuda()
    heads, found = sizes(1, K, 2, 128), {}
    for backend in ("torch", "triton"):
        leaves = {name: x.cuda().to(torch.bfloat16 if name == "proj" else x.dtype) for name, x in inputs.items()}
        leaves = {name: x.requires_grad_() for name, x in leaves.items()}
        results = conv_gated_delta_rule_with_state(**leaves, **heads, cu_seqlens=cu_seqlens, backend=backend)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(1)
        upstream = [torch.randn(x.shape, generator=generator).to(x) for x in results]
        gradients = torch.autograd.grad(results, list(leaves.values()), upstream)
        constants = {name: x.detach() for name, x in leaves.items() if name not in ("proj", "conv_state", "initial_state")}
        rows = leaves["proj"].detach()[0, : len(results[2])]
        states = {"conv_state": results[1].detach().clone(), "state": results[2].detach().clone()}
        o = conv_gated_delta_rule_step(rows, **constants, **states, **heads, backend=backend)  # type: ignore[arg-type]
        found[backend] = [*results, *gradients, o, *states.values()]
    assert not found["triton"][3][..., -EXTRA:].any()  # the projection's gradient beside the operator's columns
    errors = [relative_error(got, wanted) for got, wanted in zip(found["triton"], found["torch"])]
    assert max(errors) <= 2e-2, errors


@pytest.mark.parametrize("T", [16384, 18432])
def test_long_sequences_in_segments(T: int) -> None:
    check(on_gpu(Shape(1, T, 1, 1, 128, 128), torch.bfloat16), torch.bfloat16)


def test_two_runs_have_the_same_bits() -> None:
    inputs = on_gpu(MODEL, torch.bfloat16)
    first, second = (results(inputs, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    inputs = on_gpu(MODEL, torch.bfloat16)
    whole = results(inputs, "triton")
    leaves = {name: x[1:2].clone().requires_grad_() for name, x in inputs.items()}
    o, state = gated_delta_rule_with_state(**leaves, backend="triton")
    generator = torch.Generator().manual_seed(1)
    do, d_state = (torch.randn(whole[name].shape, generator=generator).to(whole[name]) for name in ("o", "final_state"))
    gradients = torch.autograd.grad([o, state], list(leaves.values()), [do[1:2], d_state[1:2]])
    got = {"o": o, "final_state": state} | {f"d_{n}": d for n, d in zip(leaves, gradients)}
    assert all(torch.equal(got[name][0], whole[name][1]) for name in whole)


def test_padding_behind_a_row_and_training_change_none_of_its_bits() -> None:
    inputs = on_gpu(Shape(2, 500, 2, 2, 256, 256), torch.bfloat16)
    o = gated_delta_rule(**inputs, backend="triton")
    short = {name: x if name == "initial_state" else x[:, :333].contiguous() for name, x in inputs.items()}
    assert torch.equal(gated_delta_rule(**short, backend="triton"), o[:, :333])
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    assert torch.equal(gated_delta_rule(**leaves, backend="triton"), o)


def test_a_prefill_split_on_the_grid_has_the_same_bits() -> None:
    inputs = on_gpu(Shape(2, 1000, 2, 2, 256, 256), torch.bfloat16)
    o, final_state = gated_delta_rule_with_state(**inputs, backend="triton")
    for cuts in ([64], [512], [64, 128, 960]):
        state, outputs = inputs["initial_state"], []
        for start, end in zip([0, *cuts], [*cuts, 1000]):
            part = {name: x[:, start:end] for name, x in inputs.items() if name != "initial_state"}
            piece, state = gated_delta_rule_with_state(**part, initial_state=state, backend="triton")
            outputs.append(piece)
        assert torch.equal(torch.cat(outputs, dim=1), o) and torch.equal(state, final_state), cuts


def test_step_rows_have_the_same_bits_at_every_batch() -> None:
    inputs = {
        name: x if name == "initial_state" else x[:, 0]
        for name, x in on_gpu(Shape(256, 1, 4, 4, 256, 256), torch.bfloat16).items()
    }
    state = inputs.pop("initial_state")
    whole_state = state.clone()
    whole = gated_delta_rule_step(**inputs, state=whole_state, backend="triton")
    for rows in (1, 2, 16, 17, 64, 255):
        own = state[:rows].clone()
        o = gated_delta_rule_step(**{name: x[:rows] for name, x in inputs.items()}, state=own, backend="triton")
        assert torch.equal(o, whole[:rows]) and torch.equal(own, whole_state[:rows]), rows


def test_offsets_beyond_31_bits() -> None:
    """Outputs of more than 2^31 elements: the last row is computed as it is alone."""
    B, T, K, V = 33, 131072, 64, 512
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GB of free memory")
    torch.manual_seed(0)
    q, k = (torch.nn.functional.normalize(torch.randn(B, T, 1, K, device="cuda", dtype=torch.bfloat16), dim=-1) for _ in "qk")
    v = torch.randn(B, T, 1, V, device="cuda", dtype=torch.bfloat16)
    g, beta = -torch.rand(B, T, 1, device="cuda"), torch.rand(B, T, 1, device="cuda")
    assert v.numel() > 2**31
    o = gated_delta_rule(q, k, v, g, beta, backend="triton")
    assert torch.equal(gated_delta_rule(*(x[-1:] for x in (q, k, v, g, beta)), backend="triton")[0], o[-1])
