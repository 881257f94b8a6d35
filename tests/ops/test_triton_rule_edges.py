"""The rule's Triton kernels in the interpreter, at the edges: what they read and write, dtypes, scale, padding, resets."""

from typing import Any

import pytest
import torch
from ops_testing import PoisonedMemory, Shape, assert_close, boundaries, relative_error, rule_inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gdn.ops import gated_delta_rule_with_state

pytest.importorskip("triton")

if torch.cuda.is_available():
    pytest.skip("test_triton_gpu.py has the rule on a GPU", allow_module_level=True)

from gdn.ops import triton_backward, triton_forward
from gdn.ops.triton_rule import _rule_backward, _rule_training

SMALL = Shape(1, 75, 1, 2, 64, 32)
NAMES = ("q", "k", "v", "g", "beta", "initial_state")


def run(inputs: dict[str, Tensor], backend: Any, **options: Any) -> dict[str, Tensor]:
    """Results and all gradients, each tensor in the dtype it has; the upstream gradients have the values of float16."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    o, final_state = gated_delta_rule_with_state(**leaves, backend=backend, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).half().to(x.dtype) for x in (o, final_state)]
    gradients = torch.autograd.grad([o, final_state], list(leaves.values()), upstream)
    return {"o": o.detach(), "final_state": final_state.detach()} | {f"d_{n}": d for n, d in zip(leaves, gradients)}


def float32(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.float() for name, x in inputs.items()}


# --- memory ---------------------------------------------------------------------------------------------------------------


class GuardedMemory(TorchDispatchMode):
    """Puts whatever torch.empty and its like return, full of nan, between blocks of nan that must stay so.

    A read outside a tensor, or before a write, shows in what is computed from it; `broken` names the shapes of tensors beside
    which something was written.
    """

    margin = 8192  # elements: more than a tile of 64 tokens by 96

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[tuple[torch.Size, Tensor]] = []

    def guarded(self, x: Tensor) -> Tensor:
        """A copy of x, contiguous, between such blocks."""
        blank = torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
        block = torch.full((x.numel() + 2 * self.margin,), blank, dtype=x.dtype, device=x.device)
        self.blocks.append((x.shape, block))
        return block[self.margin : self.margin + x.numel()].view(x.shape).copy_(x)

    def broken(self) -> list[tuple[int, ...]]:
        def blank(x: Tensor) -> bool:
            return bool((x.isnan() if x.is_floating_point() else x == torch.iinfo(x.dtype).max).all())

        return [tuple(size) for size, x in self.blocks if not (blank(x[: self.margin]) and blank(x[-self.margin :]))]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in PoisonedMemory.names:
            return result
        return self.guarded(result.fill_(torch.nan if result.is_floating_point() else torch.iinfo(result.dtype).max))


def launch(x: dict[str, Tensor], cu_seqlens: Tensor | None, do: Tensor, d_state: Tensor) -> dict[str, Tensor | None]:
    """Forward and backward by their launchers, which a dispatch mode sees into and which copy nothing beforehand."""
    B, T, _, K = x["q"].shape
    chunks = triton_forward.chunks_of(B, T, cu_seqlens)
    forward = triton_forward.forward(
        x["q"], x["k"], x["v"], x["g"], x["beta"], K**-0.5, x["initial_state"], chunks, with_final_state=True,
        for_backward=True,
    )  # fmt: skip
    assert forward.X is not None and forward.states is not None
    gradients = triton_backward.backward(
        x["q"], x["k"], K**-0.5, forward.intra, forward.X, forward.states, do, d_state, chunks, with_initial_state=True
    )
    return {"o": forward.o, "final_state": forward.final_state} | {f"d_{n}": d for n, d in zip(NAMES, gradients)}


@pytest.mark.parametrize(
    ("shape", "lengths", "dtype"),
    [
        (Shape(2, 70, 1, 2, 64, 32), None, torch.float32),
        (Shape(1, 66, 1, 1, 256, 32), None, torch.float32),
        (Shape(1, 70, 1, 1, 128, 96), None, torch.float16),
        (Shape(1, 75, 1, 2, 64, 32), [33, 0, 40, 2], torch.float32),
        (Shape(1, 66, 1, 1, 64, 64), [65, 1], torch.float16),  # no chunk is unused
        (Shape(1, 3, 1, 1, 64, 32), [1, 1, 1], torch.float32),  # more chunks than the tokens would fill
    ],
    ids=str,
)
def test_nothing_is_read_or_written_beside_a_tensor(shape: Shape, lengths: list[int] | None, dtype: torch.dtype) -> None:
    """Every tensor, given or made on the way, lies between blocks of nan: none reaches a result, none is overwritten."""
    inputs = rule_inputs(shape, N=None if lengths is None else len(lengths))
    inputs = {name: x.to(dtype if name in "qkv" else torch.float32) for name, x in inputs.items()}
    cu_seqlens = None if lengths is None else boundaries(lengths)
    generator = torch.Generator().manual_seed(1)
    do = torch.randn(inputs["v"].shape, generator=generator).to(dtype)
    d_state = torch.randn(inputs["initial_state"].shape, generator=generator)
    with GuardedMemory() as memory:
        x = {name: memory.guarded(tensor) for name, tensor in inputs.items()}
        bounds = None if cu_seqlens is None else memory.guarded(cu_seqlens)
        got = launch(x, bounds, memory.guarded(do), memory.guarded(d_state))
    assert len(memory.blocks) > 20 and not memory.broken()
    wanted = launch(inputs, cu_seqlens, do, d_state)  # only now: without guards a write beside a tensor ends the process
    for name, tensor in wanted.items():
        assert tensor is not None and tensor.isfinite().all() and torch.equal(got[name], tensor), name  # type: ignore[arg-type]
    assert all(torch.equal(x[name], inputs[name]) for name in inputs)


def test_the_backward_operator_keeps_its_contract_with_pytorch() -> None:
    """No result shares memory with another or with an input, and each has the shape and strides that compilation expects."""
    inputs = float32(rule_inputs(Shape(1, 3, 1, 1, 64, 32), N=3))
    tensors, cu_seqlens = [inputs[name] for name in NAMES], boundaries([1, 1, 1])
    for initial_state in (tensors[5], None):
        o, state, *saved = _rule_training(*tensors[:5], 0.125, initial_state, cu_seqlens, True)
        d_state = None if initial_state is None else state
        arguments = (*tensors[:2], 0.125, cu_seqlens, *saved, o, d_state, initial_state is not None)
        torch.library.opcheck(_rule_backward, arguments, test_utils=("test_schema", "test_faketensor"))


# --- dtypes and scale -----------------------------------------------------------------------------------------------------


def test_every_input_may_have_its_own_dtype() -> None:
    """v's is the output's; each gradient has that of what it is the gradient of."""
    dtypes = {"q": torch.float32, "k": torch.float16, "v": torch.float16, "g": torch.float32, "beta": torch.float16}
    inputs = {name: x.to(dtypes.get(name, torch.float16)) for name, x in rule_inputs(SMALL).items()}
    inputs["q"] = inputs["q"].half().float()  # else the kernels, which round it, would be held to what they never saw
    got = run(inputs, "triton")
    assert got["o"].dtype == torch.float16 and got["final_state"].dtype == torch.float32
    assert all(got[f"d_{name}"].dtype == x.dtype for name, x in inputs.items())
    wanted = run({name: x.double() for name, x in inputs.items()}, "reference")
    wrong = {name: error for name in wanted if not (error := relative_error(got[name], wanted[name])) <= 2e-3}
    assert not wrong


@pytest.mark.parametrize("lengths", [None, [33, 0, 42]], ids=["batch", "packed"])
def test_scale_reaches_output_and_gradients(lengths: list[int] | None) -> None:
    inputs = rule_inputs(SMALL, N=len(lengths or [0]))
    options = {"scale": 0.7, "cu_seqlens": None if lengths is None else boundaries(lengths)}
    assert_close(run(float32(inputs), "triton", **options), run(inputs, "reference", **options), torch.float32)


# --- tokens that write nothing, and resets --------------------------------------------------------------------------------


def test_padding_tokens_leave_the_state_as_it_is() -> None:
    """beta = 0 and g = 0 is a token that only reads; what would be gained by writing it still shows in d_beta."""
    inputs = rule_inputs(SMALL)
    padding = slice(50, None)
    inputs["beta"][:, padding], inputs["g"][:, padding] = 0, 0
    got = run(float32(inputs), "triton")
    assert_close(got, run(inputs, "reference"), torch.float32)
    short = {name: x if name == "initial_state" else x[:, :50] for name, x in float32(inputs).items()}
    assert torch.equal(got["o"][:, :50], gated_delta_rule_with_state(**short, backend="triton")[0])
    assert got["d_v"][:, padding].abs().max() == 0 and got["d_beta"][:, padding].abs().min() > 0


@pytest.mark.parametrize(("at", "reset"), [(20, -torch.inf), (20, -104.5), (64, -1000.0)])
def test_a_reset_is_exact(at: int, reset: float) -> None:
    """No bit of what comes after it depends on what came before, within a chunk or at the first token of one."""
    inputs = float32(rule_inputs(SMALL))
    inputs["g"][:, at] = reset
    other = {name: x.clone() for name, x in inputs.items()}
    for name in ("k", "v", "beta"):
        other[name][:, :at] = float32(rule_inputs(SMALL, seed=5))[name][:, :at]
    other["initial_state"] *= -3
    results = []
    for tensors in (inputs, other):
        leaves = {name: x.requires_grad_() for name, x in tensors.items()}
        o, final_state = gated_delta_rule_with_state(**leaves, backend="triton")
        loss = o[:, at:].square().sum() + final_state.square().sum()
        results.append([o, final_state, *torch.autograd.grad(loss, list(leaves.values()))])
    (o, final_state, *gradients), (other_o, other_state, *other_gradients) = results
    assert torch.equal(o[:, at:], other_o[:, at:]) and torch.equal(final_state, other_state)
    assert not torch.equal(o[:, :at], other_o[:, :at])
    for name, d, other_d in zip(NAMES, gradients, other_gradients):
        if name == "initial_state":
            assert not d.any() and not other_d.any()
            continue
        assert torch.equal(d[:, at:], other_d[:, at:]) and d[:, at + 1 :].any(), name
        # What came before gets no gradient from behind it; g, made of differences of sums over a chunk, to rounding.
        bound = 1e-6 * d[:, at:].abs().max() if name == "g" else 0.0
        assert max(d[:, :at].abs().max(), other_d[:, :at].abs().max()) <= bound, name


@pytest.mark.parametrize("lengths", [[0, 1, 0, 0, 0, 1], [1] * 5, [64, 64, 1]], ids=str)
def test_more_documents_than_chunks_of_tokens(lengths: list[int]) -> None:
    """Where the number of chunks, known from sizes alone, is tight."""
    inputs = rule_inputs(Shape(1, sum(lengths), 1, 1, 64, 32), N=len(lengths))
    options = {"cu_seqlens": boundaries(lengths)}
    assert_close(run(float32(inputs), "triton", **options), run(inputs, "reference", **options), torch.float32)
