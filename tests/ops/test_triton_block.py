"""A block in training as one operator, and the kernels around the rule: in the interpreter, or on a GPU if there is one.

Beside the modules in float64. On a GPU in bf16 too, where Hopper's own kernels and the products' float32 output come in.
"""

import weakref
from typing import Any

import pytest
import torch
from ops_testing import boundaries, relative_error
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gdn.model.config import ModelConfig
from gdn.model.lm import Block
from gdn.model.mixer import LayerState
from gdn.ops import linear_cross_entropy, rms_norm, row_scores

pytest.importorskip("triton")

from gdn.ops import triton_norm, triton_swiglu
from gdn.ops.triton_cross_entropy import cross_entropy_in_place

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BOUND = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # a whole block: a dozen operations after each other
SMALL: dict[str, Any] = {"vocab_size": 16, "num_hidden_layers": 1, "num_heads": 1, "head_dim": 64, "expand_v": 0.5}


@pytest.fixture(autouse=True)
def small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter walks every token and row that a program has room for, one after another; several rows a program."""
    monkeypatch.setattr(triton_norm, "PROGRAMS", 8)
    if not GPU:
        for module, way in (("triton_short_conv", "FORWARD"), ("triton_short_conv_backward", "BACKWARD")):
            monkeypatch.setattr(f"gdn.ops.{module}.{way}_TOKENS", 8)
            monkeypatch.setattr(f"gdn.ops.{module}.{way}_WARPS", 4)


def gradients(block: Block, x: Tensor, d: Tensor, cu_seqlens: Tensor | None = None) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = block(x, None, cu_seqlens)
    names = ["x", *dict(block.named_parameters())]
    found = torch.autograd.grad(y, [x, *block.parameters()], d)
    assert all(g.dtype == p.dtype for g, p in zip(found, [x, *block.parameters()]))
    return {"y": y.detach()} | dict(zip(names, found))


CASES: dict[str, dict[str, Any]] = {
    "plain": {"hidden_size": 48, "intermediate_size": 40},
    "bias": {"hidden_size": 32, "intermediate_size": 24, "num_v_heads": 2, "conv_bias": True, "allow_neg_eigval": True},
    "packed": {"hidden_size": 32, "intermediate_size": 24, "lengths": [9, 0, 17]},
}
if GPU:
    CASES["hopper"] = {"hidden_size": 256, "intermediate_size": 320, "num_heads": 2, "head_dim": 128, "expand_v": 1.0}


def problem(name: str, dtype: torch.dtype) -> tuple[Block, Tensor, Tensor, Tensor | None]:
    case = dict(CASES[name])
    lengths = case.pop("lengths", None)
    torch.manual_seed(0)
    block = Block(ModelConfig(**SMALL | case))
    for weight in block.parameters():
        nn.init.normal_(weight, std=0.3 if dtype == torch.float32 else 0.05)
    for norm in (block.attn_norm, block.mlp_norm, block.attn.o_norm):
        nn.init.normal_(norm.weight, 1, 0.3)
    shape = (2, 200 if name == "hopper" else 20) if lengths is None else (1, sum(lengths))
    x, d = (torch.randn(*shape, case["hidden_size"]).to(dtype).float() for _ in range(2))
    return block, x, d, None if lengths is None else boundaries(lengths).to(DEVICE)


@pytest.mark.parametrize("name", CASES)
def test_the_operator_is_the_modules(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.bfloat16 if name == "hopper" else torch.float32
    block, x, d, cu_seqlens = problem(name, dtype)
    block.to(DEVICE, torch.float64)
    wanted = gradients(block, x.to(DEVICE).double(), d.to(DEVICE).double(), cu_seqlens)
    block.float()
    monkeypatch.setattr(Block, "_fused_backend", lambda *_: "triton")
    found = []
    for recompute in ("nothing", "keys", "blocks"):
        block.recompute = recompute  # type: ignore[assignment]
        found.append(gradients(block, x.to(DEVICE, dtype), d.to(DEVICE, dtype), cu_seqlens))
    for got in found:
        errors = {key: e for key in wanted if not (e := relative_error(got[key], wanted[key])) <= BOUND[dtype]}
        assert not errors
        assert all(torch.equal(got[key], found[0][key]) for key in got), "what is computed again has other bits"


def test_it_reads_nothing_it_has_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x, d, _ = problem("plain", torch.float32)
    block.to(DEVICE)
    monkeypatch.setattr(Block, "_fused_backend", lambda *_: "triton")
    wanted = gradients(block, x.to(DEVICE), d.to(DEVICE))
    # A dispatch mode does not see into an operator; this fills what torch.empty returns with nan, there too.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        got = gradients(block, x.to(DEVICE), d.to(DEVICE))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_it_compiles_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x, d, _ = problem("plain", torch.float32)
    block.to(DEVICE)
    monkeypatch.setattr(Block, "_fused_backend", lambda *_: "triton")
    wanted = gradients(block, x.to(DEVICE), d.to(DEVICE))
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    got = gradients(compiled, x.to(DEVICE), d.to(DEVICE))  # type: ignore[arg-type]
    for key in wanted:
        assert torch.equal(got[key.replace("_orig_mod.", "")] if key in got else got["_orig_mod." + key], wanted[key])


def test_whoever_looks_into_a_block_is_called() -> None:
    """A hook or another module in a projection's place: then the modules compute, not the operator."""
    block, x, _, _ = problem("plain", torch.float32)
    x = x.requires_grad_()
    real = "gdn.model.lm.choose_backend"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real, lambda *_: "triton")
        assert block._fused_backend(x, None, None) == "triton"
        state = LayerState(torch.zeros(2, 1, 64, 32), torch.zeros(2, 3, 160))
        assert block._fused_backend(x, state, None) == "torch"  # gradients past a state
        with torch.no_grad():
            assert block._fused_backend(x, state, None) == "triton"
            assert block._fused_backend(x[:, :1], state, None) == "torch"  # a step
        handle = block.attn.q_proj.register_forward_hook(lambda *_: None)
        assert block._fused_backend(x, None, None) == "torch"
        handle.remove()
        assert block._fused_backend(x, None, None) == "triton"
        block.mlp.up_proj = nn.Sequential(block.mlp.up_proj)  # type: ignore[assignment]
        assert block._fused_backend(x, None, None) == "torch"


@pytest.mark.parametrize("programs", [1, triton_norm.PROGRAMS])
@pytest.mark.parametrize(("rows", "D"), [(5, 48), (1, 1024), (70, 100)])
def test_norm_alone(rows: int, D: int, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_norm, "PROGRAMS", programs)
    generator = torch.Generator().manual_seed(0)
    x, d, w = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in ((rows, D), (rows, D), (D,)))
    found = []
    for dtype, norm in ((torch.float64, rms_norm), (torch.float32, triton_norm.rms_norm)):
        leaves = [x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()]
        y = norm(*leaves, 1e-6)
        found.append([y, *torch.autograd.grad(y, leaves, d.to(dtype))])
    assert max(relative_error(got, wanted) for wanted, got in zip(*found)) < 1e-6


def test_swiglu_of_a_width_that_no_tile_divides() -> None:
    joined, d = torch.randn(9, 2 * 260, device=DEVICE), torch.randn(9, 260, device=DEVICE)
    wide = joined.double().requires_grad_()
    gate, up = wide.chunk(2, -1)
    wanted = nn.functional.silu(gate) * up
    (wanted_d,) = torch.autograd.grad(wanted, wide, d.double())
    assert relative_error(triton_swiglu.swiglu_forward(joined), wanted) < 1e-6
    assert relative_error(triton_swiglu.swiglu_backward(d, joined), wanted_d) < 1e-6
    assert relative_error(d, wanted) < 1e-6


@pytest.mark.parametrize("V", [11, 100])
def test_cross_entropy_in_place(V: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gdn.ops.triton_cross_entropy.COLUMNS", 64)  # more than one loop step, the last not full
    logits, labels = 3 * torch.randn(6, V), torch.randint(V, (6,))
    logits[1] += 200  # far from zero: the largest is taken out
    logits[2, :-1] = -torch.inf
    labels[2], labels[3] = V - 1, -100
    leaf = logits.double().requires_grad_()
    wanted = nn.functional.cross_entropy(leaf, labels, reduction="none")
    (d,) = torch.autograd.grad(wanted.sum(), leaf)
    got = logits.to(DEVICE, copy=True)
    losses = cross_entropy_in_place(got, labels.to(DEVICE), -100, True)
    assert relative_error(losses.cpu(), wanted) < 1e-6 and relative_error(got.cpu(), d) < 1e-6
    labels[0] = V  # out of bounds
    again = cross_entropy_in_place(logits.to(DEVICE), labels.to(DEVICE), -100, False)
    assert again[0].isnan() and torch.equal(again[1:], losses[1:])


@pytest.mark.parametrize("V", [11, 100])
def test_scores_of_rows(V: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways; of equals the first is the best, by the kernel."""
    monkeypatch.setattr("gdn.ops.triton_cross_entropy.COLUMNS", 64)
    logits = 3 * torch.randn(8, V)
    logits[1] += 200
    logits[2, :-1] = -torch.inf
    logits[3, 5] = logits[3, V - 1] = 50
    logits[4] = 0
    logits[5, 7] = torch.nan
    logits[7, 7] = torch.inf
    fine = [0, 1, 2, 3, 4, 6]
    exact = logits.double().logsumexp(-1)
    for backend in ("torch", "triton"):
        monkeypatch.setattr("gdn.ops.cross_entropy.backend_for", lambda _, backend=backend: backend)
        totals, best = row_scores(logits.to(DEVICE))
        torch.testing.assert_close(totals[fine].cpu().double(), exact[fine], rtol=1e-6, atol=1e-6)
        assert not totals[[5, 7]].isfinite().any()
        assert torch.equal(best[[0, 1, 2, 6]].cpu(), logits.argmax(-1)[[0, 1, 2, 6]])
    assert best[3] == 5 and best[4] == 0


def test_linear_cross_entropy_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """In several chunks, the last a short one; and without gradients."""
    R, D, V = 300, 6, 11
    monkeypatch.setattr("gdn.ops.cross_entropy._GPU_CHUNK_LOGITS", 128 * V)
    torch.manual_seed(0)
    leaves = [torch.randn(R, D, device=DEVICE, requires_grad=True), torch.randn(V, D, device=DEVICE, requires_grad=True)]
    labels = torch.randint(V, (R,), device=DEVICE)
    labels[::7] = -100
    found = []
    for backend, dtype in (("torch", torch.float64), ("triton", torch.float32)):
        monkeypatch.setattr("gdn.ops.cross_entropy.backend_for", lambda _, backend=backend: backend)
        wide = [x.detach().to(dtype).requires_grad_() for x in leaves]
        loss = linear_cross_entropy(*wide, labels)
        found.append([loss, *torch.autograd.grad(0.5 * loss, wide)])
    assert max(relative_error(got, wanted) for wanted, got in zip(*found)) < 1e-6
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(*leaves, labels), found[1][0])
    empty = linear_cross_entropy(leaves[0][:0], leaves[1], labels[:0])
    assert empty == 0 and not torch.autograd.grad(empty, leaves[1])[0].any()


class ChunksAlive(TorchFunctionMode):
    """How many earlier chunks of logits [rows, V] were alive at the product that makes the next, of hidden [rows, D]."""

    def __init__(self, D: int) -> None:
        super().__init__()
        self._D, self._made = D, list[weakref.ref[Tensor]]()
        self.counts: list[int] = []

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        makes = "matmul" in getattr(function, "__name__", "") and args[0].shape[-1] == self._D
        if makes:
            self.counts.append(sum(made() is not None for made in self._made))
        result = function(*args, **kwargs or {})
        if makes:
            self._made.append(weakref.ref(result))
        return result


def test_chunks_of_logits_are_in_memory_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    R, D, V = 300, 6, 11
    monkeypatch.setattr("gdn.ops.cross_entropy._GPU_CHUNK_LOGITS", 128 * V)
    monkeypatch.setattr("gdn.ops.cross_entropy.backend_for", lambda _: "triton")
    hidden, weight = (torch.randn(n, D, device=DEVICE, requires_grad=True) for n in (R, V))
    with ChunksAlive(D) as alive:
        linear_cross_entropy(hidden, weight, torch.zeros(R, dtype=torch.int64, device=DEVICE))
    assert alive.counts == [0, 0, 0]
