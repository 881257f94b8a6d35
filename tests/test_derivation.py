"""docs/derivation.md: its blocks run, what they define is the package's rule, and a formula broken on purpose is noticed."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gdn.ops import gated_delta_rule_with_state

PAGE = Path(__file__).resolve().parents[1] / "docs" / "derivation.md"
GATES = {"mild": (-1.0, 0.0), "weak": (-1e-3, 0.0), "strong": (-25.0, -15.0), "mixed": (-25.0, 0.0)}
INPUTS, OUTPUTS = ("q", "k", "v", "g", "beta", "S"), ("o", "S_end")

Arrays = dict[str, np.ndarray]


def blocks(page: str) -> list[str]:
    """The page's Python, each block behind as many empty lines as stand before it: errors then name the page's own lines."""
    return ["\n" * page.count("\n", 0, m.start(1)) + m[1] for m in re.finditer(r"^```python\n(.*?)^```$", page, re.M | re.S)]


def run(page: str, *, with_asserts: bool = True) -> dict[str, Any]:
    """What the page's blocks define, run in order in one namespace; without its own checks if so asked."""
    names: dict[str, Any] = {}
    for block in blocks(page):
        exec(compile(block, str(PAGE), "exec", optimize=0 if with_asserts else 1), names)
    return names


def random_case(seed: int, gate: str, T: int, K: int, V: int) -> tuple[Arrays, Arrays]:
    """Inputs of the rule, and gradients of what it returns."""
    rng = np.random.default_rng(seed)
    q, k = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.standard_normal((2, T, K)))
    v, do = rng.standard_normal((2, T, V))
    S, D = rng.standard_normal((2, K, V))
    return dict(zip(INPUTS, (q, k, v, rng.uniform(*GATES[gate], T), rng.random(T), S))), {"o": do, "S_end": D}


def wanted(x: Arrays, d: Arrays) -> Arrays:
    """Outputs of `gdn.ops` by the recurrence, and automatic gradients through it, for one row and head."""
    leaves = [torch.tensor(a).requires_grad_() for a in x.values()]
    q, k, v, g, beta = (a[None, :, None] for a in leaves[:5])
    o, final = gated_delta_rule_with_state(q, k, v, g, beta, initial_state=leaves[5][None, None], backend="reference")
    results = [o[0, :, 0], final[0, 0]]
    gradients = torch.autograd.grad(results, leaves, [torch.tensor(a) for a in d.values()])
    names = (*OUTPUTS, *(f"d_{name}" for name in INPUTS))
    return {name: a.detach().numpy() for name, a in zip(names, (*results, *gradients))}


def compare(page: dict[str, Any], seed: int, gate: str, T: int = 200, K: int = 24, V: int = 16) -> None:
    """AssertionError unless the page's functions are the rule to 1e-12, relative 2-norm, on inputs new to the page."""
    x, d = random_case(seed, gate, T, K, V)
    truth = wanted(x, d)
    got = {}
    for name in ("recurrence", "chunked", "split"):
        for output, array in zip(OUTPUTS, page[name](**x)):
            got[name, output] = array
    for name in ("backward_by_token", "backward"):
        for of, array in zip(INPUTS, page[name](**x, do=d["o"], D=d["S_end"])):
            got[name, f"d_{of}"] = array
    rest = {name: x[name] for name in ("k", "g", "beta", "S")}
    got["writes", "S_end"] = page["state_from_writes"](X=page["writes"](v=x["v"], **rest), **rest)
    M, L = page["affine"](**{name: x[name] for name in ("k", "v", "g", "beta")})
    got["affine", "S_end"] = M @ x["S"] + L
    errors = {key: np.linalg.norm(array - truth[key[1]]) / np.linalg.norm(truth[key[1]]) for key, array in got.items()}
    wrong = {key: f"{error:.1e}" for key, error in errors.items() if not error <= 1e-12}
    assert len(got) == 20 and not wrong, f"relative error above 1e-12: {wrong}"


@pytest.fixture(scope="module")
def text() -> str:
    return PAGE.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(text: str) -> dict[str, Any]:
    assert len(blocks(text)) >= 10
    return run(text)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("seed", [2, 3])
def test_the_page_is_the_rule(page: dict[str, Any], seed: int, gate: str) -> None:
    compare(page, seed, gate)


@pytest.mark.parametrize("T", [1, 63, 64, 65])
def test_the_page_is_the_rule_at_the_edges_of_chunks(page: dict[str, Any], T: int) -> None:
    compare(page, 4, "mild", T)


def test_the_table_is_what_the_page_computes(page: dict[str, Any], text: str) -> None:
    rows = list(page["cost"]())
    assert len(rows) == 4
    assert "\n".join(["|---|---|---|---|---|", *rows, ""]) in text


@pytest.mark.parametrize(
    ("formula", "broken"),
    [
        ("dP.T @ q + diagonal * q - Z.T @ k", "dP.T @ q - Z.T @ k"),  # the diagonal of dP
        ("dP.T @ q + diagonal * q - Z.T @ k", "dP.T @ q + diagonal * q"),  # Z in e
        ("dv = A.T @ (", "dv = A @ ("),
        ("pairs[t:, :t].sum()", "pairs[t:, : t + 1].sum()"),
        ("+ end[:t].sum()", ""),
        ("X - np.where(between", "X + np.where(between"),
        ("(v - np.exp(gc) * (k @ S))", "(v - k @ S)"),
        ("dbeta[t], dk[t] = k[t] @ e,", "dbeta[t], dk[t] = beta[t] * k[t] @ e,"),
    ],
)
def test_a_broken_formula_is_noticed(text: str, formula: str, broken: str) -> None:
    assert text.count(formula) == 1
    changed = text.replace(formula, broken)
    with pytest.raises(AssertionError, match="relative error above 1e-12"):
        compare(run(changed, with_asserts=False), 2, "mild", T=70)


def test_the_page_notices_by_itself(text: str) -> None:
    with pytest.raises(AssertionError):
        run(text.replace("dP.T @ q + diagonal * q - Z.T @ k", "dP.T @ q - Z.T @ k"))
