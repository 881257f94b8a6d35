"""What the operators' tests share: tolerance table, comparison, random inputs of the rule and of a layer, dispatch modes."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gdn.ops import gated_delta_rule_with_state

# Relative 2-norm of the error, for outputs, states and every gradient alike. Nothing loosens it.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted| in float64; nan and inf anywhere count as infinite, a wanted zero asks for exactly zero."""
    assert got.shape == wanted.shape, f"{tuple(got.shape)} beside {tuple(wanted.shape)}"
    got, wanted = got.detach().double(), wanted.detach().double()
    if not (got.isfinite().all() and wanted.isfinite().all()):
        return float("inf")
    error, size = (got - wanted).norm().item(), wanted.norm().item()
    return error / size if size else float("inf") if error else 0.0


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Every tensor of `wanted` within the table's tolerance for dtype; names the ones that are not."""
    assert got.keys() == wanted.keys()
    errors = {name: relative_error(got[name], wanted[name]) for name in wanted}
    wrong = {name: f"{error:.2e}" for name, error in errors.items() if not error <= TOLERANCE[dtype]}
    assert not wrong, f"relative error above {TOLERANCE[dtype]}: {wrong}"


class Shape(NamedTuple):
    B: int
    T: int
    H: int
    HV: int
    K: int
    V: int

    def __str__(self) -> str:
        return "-".join(f"{name}{size}" for name, size in self._asdict().items())


def normalised(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def rule_inputs(
    shape: Shape, *, gate: str = "mixed", keys: str = "random", N: int | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """q, k, v, g, beta and initial_state in float64 with the values of float32, so that every dtype computes from the same."""
    B, T, H, HV, K, V = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator).double()

    q, k, v = normalised(normal(B, T, H, K)), normalised(normal(B, T, H, K)), normal(B, T, HV, V)
    g, beta = GATES[gate](normal(B, T, HV)), normal(B, T, HV).sigmoid()
    if keys == "repeated":  # three keys only, each fully overwritten: the triangular system is as far from I as it gets
        k, beta = k[:, :3].repeat(1, -(-T // 3), 1, 1)[:, :T], 1 - 1e-3 * beta
    elif keys == "same_beta_2":  # a reflection at every token
        k, beta = k[:, :1].expand(B, T, H, K), torch.full_like(beta, 2.0)
    elif keys == "negative_eigenvalues":
        beta = 2 * beta
    elif keys == "zero_rows":
        empty = torch.rand(B, T, 1, 1, generator=generator) < 0.3
        q, k = q.masked_fill(empty, 0), k.masked_fill(empty, 0)
    elif keys == "beta_0":
        beta = beta.masked_fill(torch.rand(B, T, HV, generator=generator) < 0.3, 0)
    else:
        assert keys == "random"
    tensors = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": normal(B if N is None else N, HV, K, V)}
    return {name: x.float().double() for name, x in tensors.items()}


def _resets(x: Tensor) -> Tensor:
    """Mild decay with -1000 at one token, and -inf at one and at three in a row."""
    g = -0.1 * x.abs()
    T = x.shape[1]
    g[:, T // 3] = -1000
    g[:, T // 2] = -torch.inf
    g[:, 2 * T // 3 : 2 * T // 3 + 3] = -torch.inf
    return g


GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "mixed": lambda x: -torch.nn.functional.softplus(2 * x - 2),
    "none": torch.zeros_like,
    "weak": lambda x: torch.full_like(x, -1e-4),
    "strong": lambda x: -20 - x.abs(),
    "resets": _resets,
}


def run_rule(
    inputs: dict[str, Tensor], backend: Any, dtype: torch.dtype, *, cu_seqlens: Tensor | None = None, seed: int = 1
) -> dict[str, Tensor]:
    """Output, final state and the gradients of all inputs for seeded random gradients of output and final state."""
    leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in inputs.items()}
    o, final_state = gated_delta_rule_with_state(**leaves, cu_seqlens=cu_seqlens, backend=backend)
    assert o.dtype == dtype and final_state.dtype == torch.promote_types(dtype, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    do, d_final = (torch.randn(x.shape, generator=generator).to(x.dtype) for x in (o, final_state))
    gradients = torch.autograd.grad([o, final_state], list(leaves.values()), [do, d_final])
    return {"o": o.detach(), "final_state": final_state.detach()} | {f"d_{name}": d for name, d in zip(leaves, gradients)}


def boundaries(lengths: Iterable[int]) -> Tensor:
    """int32 cu_seqlens of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).int()


class PoisonedMemory(TorchDispatchMode):
    """Fills whatever torch.empty and its like return with nan, so that a read before a write shows."""

    names = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "empty_permuted"})
    filled = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self.names:
            self.filled += 1
            result.fill_(torch.nan if result.is_floating_point() else torch.iinfo(result.dtype).max)
        return result


class LargestTensor(TorchDispatchMode):
    """Remembers the elements of the largest tensor that any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return result


EXTRA = 3  # columns of a layer's projection that are not the operator's


def sizes(H: int, K: int, HV: int, V: int) -> dict[str, Any]:
    return {"num_heads": H, "head_dim": K, "num_v_heads": HV, "head_v_dim": V}


def layer_inputs(B: int, T: int, H: int, K: int, HV: int, V: int, W: int, N: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(T)
    D = 2 * H * K + HV * V

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "proj": normal(B, T, D + 2 * HV + EXTRA),
        "conv_weight": normal(D, W) / 2,
        "conv_bias": normal(D),
        "A_log": normal(HV).sigmoid().log(),
        "dt_bias": normal(HV) - 2,
        "conv_state": normal(N, W - 1, D),
        "initial_state": normal(N, HV, K, V),
    }
