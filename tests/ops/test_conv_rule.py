"""Projection to the rule's output: the GPU kernels (in the interpreter, or on a GPU) beside the composition in PyTorch."""

import importlib.util
from typing import Any

import pytest
import torch
from ops_testing import EXTRA, TOLERANCE, boundaries, layer_inputs, relative_error, sizes
from torch import Tensor

from gdn.errors import BackendError
from gdn.ops import (
    beta_gate,
    conv_gated_delta_rule,
    conv_gated_delta_rule_step,
    conv_gated_delta_rule_with_state,
    decay_gate,
    gated_delta_rule_with_state,
    l2_norm,
    short_conv_with_state,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def short_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter walks every token a strip of the convolution has room for, one after another."""
    if DEVICE == "cpu" and importlib.util.find_spec("triton"):
        for module, way in (("triton_short_conv", "FORWARD"), ("triton_short_conv_backward", "BACKWARD")):
            monkeypatch.setattr(f"gdn.ops.{module}.{way}_TOKENS", 8)
            monkeypatch.setattr(f"gdn.ops.{module}.{way}_WARPS", 4)  # strips beside each other, in one program


def run(inputs: dict[str, Tensor], dtype: torch.dtype, **options: Any) -> dict[str, Tensor]:
    """Results, and all gradients for seeded gradients of them."""
    leaves = {name: x.to(DEVICE, dtype).requires_grad_() for name, x in inputs.items()}
    tensors = {"conv_bias": None} | leaves
    if "conv_state" in leaves:
        results = conv_gated_delta_rule_with_state(**tensors, **options)  # type: ignore[arg-type]
    else:
        results = (conv_gated_delta_rule(**tensors, **options),)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(x) for x in results]
    gradients = torch.autograd.grad(results, list(leaves.values()), upstream)
    named = dict(zip(("o", "conv", "state"), (x.detach() for x in results)))
    return named | {f"d_{name}": d for name, d in zip(leaves, gradients)}


CASES: dict[str, dict[str, Any]] = {
    "plain": {"shape": (2, 70, 1, 64, 1, 32, 4), "without": ("conv_bias", "conv_state", "initial_state")},
    "grouped": {"shape": (1, 66, 1, 64, 2, 32, 2), "without": ("conv_state", "initial_state")},
    "states": {"shape": (2, 20, 1, 64, 1, 96, 3), "without": ()},
    "packed": {"shape": (1, 90, 1, 64, 2, 32, 4), "without": ("conv_bias",), "lengths": [20, 0, 69, 1, 0]},
    "wide": {"shape": (1, 10, 1, 128, 1, 64, 4), "without": ("conv_state", "initial_state"), "allow_neg_eigval": True},
}


@pytest.mark.parametrize("name", CASES)
def test_kernels_are_the_composition_in_pytorch(name: str) -> None:
    pytest.importorskip("triton")
    case = CASES[name]
    shape, lengths = case["shape"], case.get("lengths")
    inputs = layer_inputs(*shape, N=shape[0] if lengths is None else len(lengths))
    inputs = {key: x for key, x in inputs.items() if key not in case["without"]}
    options: dict[str, Any] = sizes(*shape[2:6]) | {"allow_neg_eigval": case.get("allow_neg_eigval", False)}
    options["cu_seqlens"] = None if lengths is None else boundaries(lengths).to(DEVICE)
    got = run(inputs, torch.float32, backend="triton", **options)
    wanted = run(inputs, torch.float64, backend="torch", **options)
    wrong = {key: e for key in wanted if not (e := relative_error(got[key], wanted[key])) <= TOLERANCE[torch.float32]}
    assert not wrong
    assert not got["d_proj"][..., -EXTRA:].any()


def test_pytorch_is_the_composition_of_the_public_pieces() -> None:
    H, K, HV, V, W = 1, 8, 2, 6, 4
    x = {name: tensor.double() for name, tensor in layer_inputs(2, 9, H, K, HV, V, W, N=2).items()}
    o, conv, state = conv_gated_delta_rule_with_state(**x, **sizes(H, K, HV, V), allow_neg_eigval=True)
    D = 2 * H * K + HV * V
    y, wanted_conv = short_conv_with_state(x["proj"][..., :D], x["conv_weight"], x["conv_bias"], initial_state=x["conv_state"])
    q, k, v = (part.unflatten(-1, (-1, size)) for part, size in zip(y.split([H * K, H * K, HV * V], dim=-1), (K, K, V)))
    a, b = x["proj"][..., D : D + HV], x["proj"][..., D + HV : D + 2 * HV]
    g, beta = decay_gate(a, x["A_log"], x["dt_bias"]), beta_gate(b, allow_neg_eigval=True)
    wanted_o, wanted_state = gated_delta_rule_with_state(l2_norm(q), l2_norm(k), v, g, beta, initial_state=x["initial_state"])
    assert torch.equal(o, wanted_o) and torch.equal(conv, wanted_conv) and torch.equal(state, wanted_state)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_token_by_token_is_the_whole(backend: Any) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    H, K, HV, V, W, T = 1, 64, 2, 32, 4, 6
    x = {name: tensor.to(DEVICE) for name, tensor in layer_inputs(3, T, H, K, HV, V, W, N=3).items()}
    options = sizes(H, K, HV, V) | {"backend": backend}
    o, conv, state = conv_gated_delta_rule_with_state(**x, **options)
    proj, conv_state, running = x.pop("proj"), x.pop("conv_state"), x.pop("initial_state")
    tokens = [conv_gated_delta_rule_step(proj[:, t], **x, conv_state=conv_state, state=running, **options) for t in range(T)]
    for got, wanted in ((torch.stack(tokens, dim=1), o), (conv_state, conv), (running, state)):
        assert relative_error(got, wanted) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"proj": torch.zeros(1, 5, 40)}, r"proj is \(1, 5, 40\).*P >= 164"),
        ({"proj": torch.zeros(5, 170)}, r"proj is \(5, 170\); expected \[B, T, P\]"),
        ({"conv_weight": torch.zeros(100, 4)}, r"conv_weight is \(100, 4\); expected \[160, W\]"),
        ({"A_log": torch.zeros(3)}, r"A_log is \(3,\); expected \(2,\)"),
        ({"dt_bias": torch.zeros(1)}, r"dt_bias is \(1,\); expected \(2,\)"),
        ({"num_v_heads": 3, "num_heads": 2}, "proj is"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens is torch.int64"),
    ],
    ids=str,
)
def test_bad_input_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    inputs = layer_inputs(1, 5, 1, 64, 2, 16, 4, N=1)
    arguments = {key: inputs[key] for key in ("proj", "conv_weight", "conv_bias", "A_log", "dt_bias")} | sizes(1, 64, 2, 16)
    with pytest.raises(ValueError, match=message):
        conv_gated_delta_rule(**arguments | change)


# --- the kernels: bits, memory, layouts, PyTorch's contract ---------------------------------------------------------------

KERNELS = (1, 64, 2, 32)  # H, K, HV, V
QUICK = ("test_schema", "test_faketensor")  # of what has no gradient


def bits(inputs: dict[str, Tensor], upstream: list[Tensor] | None = None, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Results of the kernels, then all gradients, for these gradients of the results."""
    leaves = {name: x.to(DEVICE).detach().clone().requires_grad_() for name, x in inputs.items()}
    results = conv_gated_delta_rule_with_state(**leaves, **sizes(*KERNELS), backend="triton", **options)  # type: ignore[arg-type]
    upstream = upstream or [torch.ones_like(x) for x in results]
    return [x.detach() for x in results], list(torch.autograd.grad(results, list(leaves.values()), upstream))


def test_packed_documents_have_the_bits_they_have_alone() -> None:
    """Results, and the gradients of what is the document's own; the parameters' are sums over documents."""
    pytest.importorskip("triton")
    lengths = [3, 0, 20, 1, 0]
    bounds = boundaries(lengths).tolist()
    inputs = layer_inputs(1, bounds[-1], *KERNELS, 4, N=len(lengths))
    (o, conv, state), (d_proj, *_, d_conv, d_state) = bits(inputs, cu_seqlens=boundaries(lengths).to(DEVICE))
    for n, (start, end) in enumerate(zip(bounds, bounds[1:])):
        own = {"conv_state": inputs["conv_state"][n : n + 1], "initial_state": inputs["initial_state"][n : n + 1]}
        if start == end:
            assert torch.equal(conv[n], own["conv_state"][0].to(DEVICE))
            assert torch.equal(state[n], own["initial_state"][0].to(DEVICE))
            assert torch.equal(d_conv[n], torch.ones_like(d_conv[n])) and torch.equal(d_state[n], torch.ones_like(d_state[n]))
            continue
        alone, gradients = bits(inputs | own | {"proj": inputs["proj"][:, start:end]})
        for got, wanted in zip(alone, (o[:, start:end], conv[n : n + 1], state[n : n + 1])):
            assert torch.equal(got, wanted), n
        for got, wanted in zip((gradients[0], *gradients[-2:]), (d_proj[:, start:end], d_conv[n : n + 1], d_state[n : n + 1])):
            assert torch.equal(got, wanted), n


def test_a_row_has_the_same_bits_in_any_batch_and_in_two_runs() -> None:
    pytest.importorskip("triton")
    inputs = layer_inputs(3, 20, *KERNELS, 4, N=3)
    results, gradients = bits(inputs)
    again, again_gradients = bits(inputs)
    assert all(torch.equal(x, y) for x, y in zip([*results, *gradients], [*again, *again_gradients]))
    for row in (0, 2):
        own = {name: inputs[name][row : row + 1] for name in ("proj", "conv_state", "initial_state")}
        alone, own_gradients = bits(inputs | own)
        for got, whole in zip([*alone, own_gradients[0], *own_gradients[-2:]], [*results, gradients[0], *gradients[-2:]]):
            assert torch.equal(got[0], whole[row]), row


def test_a_prefill_split_on_the_grid_has_the_same_bits() -> None:
    pytest.importorskip("triton")
    inputs = {name: x.to(DEVICE) for name, x in layer_inputs(1, 140, *KERNELS, 4, N=1).items()}
    options = sizes(*KERNELS) | {"backend": "triton"}
    o, conv, state = conv_gated_delta_rule_with_state(**inputs, **options)
    proj, running, outputs = inputs.pop("proj"), (inputs.pop("conv_state"), inputs.pop("initial_state")), []
    before = [x.clone() for x in running]
    for start, end in ((0, 64), (64, 128), (128, 140)):
        piece, *after = conv_gated_delta_rule_with_state(proj[:, start:end], *inputs.values(), *running, **options)
        assert all(torch.equal(x, y) for x, y in zip(running, before))  # a state given is left as it is
        running, before = tuple(after), [x.clone() for x in after]
        outputs.append(piece)
    assert torch.equal(torch.cat(outputs, dim=1), o) and torch.equal(running[0], conv) and torch.equal(running[1], state)


def test_projections_of_any_strides() -> None:
    """What other columns hold, nan here, is neither read nor has it a gradient."""
    pytest.importorskip("triton")
    inputs = {name: x.to(DEVICE) for name, x in layer_inputs(2, 10, *KERNELS, 4, N=2).items()}
    wanted, wanted_gradients = bits(inputs)
    proj = inputs["proj"].clone()
    proj[..., -EXTRA:] = torch.nan
    B, T, P = proj.shape
    layouts = {
        "slice": torch.full((B, 2 * T, P + 8), torch.nan, device=DEVICE)[:, T:, :P],
        "transposed": torch.full((P, T, B), torch.nan, device=DEVICE).permute(2, 1, 0),
        "odd": torch.full((B, T, P + 1), torch.nan, device=DEVICE)[..., 1:],
    }
    for name, view in layouts.items():
        leaves = inputs | {"proj": view.copy_(proj)}
        leaves = {key: x.detach().requires_grad_() for key, x in leaves.items()}
        results = conv_gated_delta_rule_with_state(**leaves, **sizes(*KERNELS), backend="triton")  # type: ignore[arg-type]
        gradients = torch.autograd.grad(results, list(leaves.values()), [torch.ones_like(x) for x in results])
        same = [torch.equal(x, y) for x, y in zip([*results, *gradients], [*wanted, *wanted_gradients])]
        assert not view.is_contiguous() and all(same), name


def test_operators_keep_their_contract_with_pytorch() -> None:
    """Packed so that every chunk there is room for is one: of the others nothing is written."""
    pytest.importorskip("triton")
    from gdn.ops.triton_conv_rule import _backward, _inference, _training

    inputs = {name: x.to(DEVICE) for name, x in layer_inputs(1, 3, 1, 64, 1, 32, 2, N=3).items()}
    tail = (boundaries([1, 1, 1]).to(DEVICE), [1, 64, 1, 32], False)
    torch.library.opcheck(_inference, (*inputs.values(), *tail), test_utils=QUICK)
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    torch.library.opcheck(_training, (*leaves.values(), *tail))
    for without in ((), ("conv_bias", "conv_state", "initial_state")):
        tensors = [None if name in without else x for name, x in inputs.items()]
        o, state, *saved = _training(*tensors, *tail)
        d_state = None if without else state
        torch.library.opcheck(_backward, (*tensors[:6], *tail, saved, o, d_state, not without), test_utils=QUICK)


def test_compiled_as_one_graph() -> None:
    pytest.importorskip("triton")
    lengths = [3, 0, 7]
    inputs = {name: x.to(DEVICE) for name, x in layer_inputs(1, 10, *KERNELS, 4, N=3).items()}
    options = sizes(*KERNELS) | {"cu_seqlens": boundaries(lengths).to(DEVICE)}

    def loss(*tensors: Tensor) -> Tensor:
        o, conv, state = conv_gated_delta_rule_with_state(*tensors, **options, backend="triton")
        return o.square().sum() + conv.square().sum() + state.square().sum()

    leaves = [x.requires_grad_() for x in inputs.values()]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    wanted, got = (torch.autograd.grad(f(*leaves), leaves) for f in (loss, compiled))
    assert all(torch.equal(x, y) for x, y in zip(got, wanted))


@pytest.mark.parametrize("frozen", ["proj", "parameters", "conv_state"])
def test_what_needs_no_gradient_may_lack_one(frozen: str) -> None:
    """A layer's first or a frozen part: the others' gradients have the same bits, and so have they of the state alone."""
    pytest.importorskip("triton")
    inputs = {name: x.to(DEVICE) for name, x in layer_inputs(1, 10, *KERNELS, 4, N=1).items()}
    names = {"proj": ["proj"], "parameters": ["conv_weight", "conv_bias", "A_log", "dt_bias"], "conv_state": ["conv_state"]}
    found = []
    for without in ([], names[frozen]):
        leaves = {name: x.clone().requires_grad_(name not in without) for name, x in inputs.items()}
        state = conv_gated_delta_rule_with_state(**leaves, **sizes(*KERNELS), backend="triton")[2]  # type: ignore[arg-type]
        kept = [x for name, x in leaves.items() if name not in names[frozen]]
        found.append(torch.autograd.grad(state.square().sum(), kept))
    assert all(x.any() and torch.equal(x, y) for x, y in zip(*found))


@pytest.mark.parametrize("parameters", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_half_precision_projections(parameters: torch.dtype) -> None:
    """As under autocast, parameters in float32, and all in 16 bits; gradients in each tensor's own dtype."""
    pytest.importorskip("triton")
    inputs = {name: x.to(DEVICE) for name, x in layer_inputs(1, 66, *KERNELS, 4, N=1).items()}
    inputs = {n: x.half() if n == "proj" else x if n.endswith("state") else x.to(parameters) for n, x in inputs.items()}
    inputs["conv_state"] = inputs["conv_state"].half()
    results, gradients = bits(inputs)
    assert results[0].dtype == torch.float16 and results[2].dtype == torch.float32
    assert [d.dtype for d in gradients] == [x.dtype for x in inputs.values()]
    leaves = {name: x.double().requires_grad_() for name, x in inputs.items()}
    wanted = conv_gated_delta_rule_with_state(**leaves, **sizes(*KERNELS), backend="torch")  # type: ignore[arg-type]
    wanted_gradients = torch.autograd.grad(wanted, list(leaves.values()), [torch.ones_like(x) for x in wanted])
    names = ("o", "conv", "state", *inputs)
    pairs = zip(names, [*results, *gradients], [*wanted, *wanted_gradients])
    wrong = {name: error for name, x, y in pairs if not (error := relative_error(x, y)) <= 4e-3}
    assert not wrong


@pytest.mark.parametrize("sizes_BT", [(2, 0), (0, 5)], ids=str)
def test_nothing_to_do_is_done(sizes_BT: tuple[int, int]) -> None:
    pytest.importorskip("triton")
    inputs = {name: x.to(DEVICE) for name, x in layer_inputs(*sizes_BT, *KERNELS, 4, N=sizes_BT[0]).items()}
    results = conv_gated_delta_rule_with_state(**inputs, **sizes(*KERNELS), backend="triton")  # type: ignore[arg-type]
    assert results[0].shape == (*sizes_BT, 2, 32)
    assert torch.equal(results[1], inputs["conv_state"]) and torch.equal(results[2], inputs["initial_state"])


@pytest.mark.parametrize(("K", "V"), [(32, 32), (64, 48)], ids=str)
def test_what_the_kernels_cannot_do_is_refused_and_auto_takes_pytorch(K: int, V: int) -> None:
    inputs = {name: x.to(DEVICE) for name, x in layer_inputs(1, 3, 1, K, 1, V, 4, N=1).items()}
    arguments = {key: inputs[key] for key in ("proj", "conv_weight", "conv_bias", "A_log", "dt_bias")} | sizes(1, K, 1, V)
    with pytest.raises(BackendError, match=f"K = {K}, V = {V}"):
        conv_gated_delta_rule(**arguments, backend="triton")
    assert torch.equal(conv_gated_delta_rule(**arguments), conv_gated_delta_rule(**arguments, backend="torch"))
