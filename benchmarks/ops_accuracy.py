"""Errors of the GPU kernels beside flash-linear-attention's in one test; `python benchmarks/ops_gpu.py --accuracy`.

Relative 2-norm of the error of output, final state and every gradient against this package's PyTorch form in float64 on the
same GPU, which agrees with the recurrence to 1e-12. All implementations get the same inputs, rounded to their dtype beforehand,
and the float64 form gets those too: what is measured is the computation. g, beta and the states are float32 for everyone.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from ops_peers import Random, Result, Shape, reported
from torch import Tensor

from gdn.ops import gated_delta_rule_with_state

Rule = Callable[..., tuple[Tensor, Tensor]]
GATES = ("-1e-4", "-0.1", "-1", "-5", "-20", "mixed")
NAMES = ("q", "k", "v", "g", "beta", "initial_state")


class Case(NamedTuple):
    dtype: torch.dtype
    shape: Shape
    gate: str = "mixed"  # a number: g everywhere
    beta: str = "mixed"
    rows: str = "random"  # "repeated": three keys in turn; "zero": a third of the rows of q and k

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}, {self.shape}, g {self.gate}, beta {self.beta}, rows {self.rows}"


# Rows enough that a case says something of the method: errors of d_g and d_beta are those of the few tokens that the largest
# gradients of states reach, so that with 4 rows either implementation was up to twice as good as the other by luck.
def cases(dtypes: Sequence[str], sizes: Sequence[int], quick: bool) -> Iterator[Case]:
    """One thing at a time, and the hard corner: hardly any decay, full overwrites, repeated keys."""
    for dtype in (getattr(torch, name) for name in dtypes):
        for size in sizes:
            usual, long = Shape(16, 1000, 4, size, size), Shape(1, 65536, 2048 // size, size, size)
            yield Case(dtype, usual)
            yield Case(dtype, usual, "-1e-4", "0.999", "repeated")
            yield Case(dtype, usual, "-20")
            if quick:
                continue
            yield from (Case(dtype, long, gate) for gate in ("mixed", "-1e-4"))
            yield from (Case(dtype, usual, gate) for gate in GATES[:-2])
            yield from (Case(dtype, usual, beta=beta) for beta in ("0.001", "0.5", "0.999"))
            yield from (Case(dtype, usual, gate, "0.001") for gate in ("-1e-4", "-5"))
            yield from (Case(dtype, usual, rows=rows) for rows in ("repeated", "zero"))
            yield from (Case(dtype, usual._replace(B=64, T=T)) for T in (1, 63, 64, 65))


def inputs_of(case: Case, seed: int) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """q, k, v, g, beta, initial_state, and the gradients of output and final state."""
    B, T, H, K, V = case.shape
    random = Random(seed)
    q, k = (torch.nn.functional.normalize(random.normal(B, T, H, K), dim=-1) for _ in "qk")
    if case.rows == "repeated":
        k = k[:, :3].repeat(1, -(-T // 3), 1, 1)[:, :T]
    elif case.rows == "zero":
        empty = random.uniform(B, T, 1, 1) < 0.3
        q, k = q.masked_fill(empty, 0), k.masked_fill(empty, 0)
    v, state, do, d_state = (random.normal(*sizes) for sizes in ((B, T, H, V), (B, H, K, V), (B, T, H, V), (B, H, K, V)))
    if case.gate == "mixed":
        g = -torch.nn.functional.softplus(4 * random.normal(B, T, H) - 3)
    else:
        g = torch.full((B, T, H), float(case.gate), device="cuda")
    beta = (
        0.001 + 0.998 * random.uniform(B, T, H)
        if case.beta == "mixed"
        else torch.full((B, T, H), float(case.beta), device="cuda")
    )
    q, k, v, do = (x.to(case.dtype) for x in (q, k, v, do))
    return [q, k, v, g, beta, state], (do, d_state)


def gdn_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    backend = "torch" if q.dtype == torch.float64 else "triton"
    return gated_delta_rule_with_state(q, k, v, g, beta, initial_state=state, backend=backend)


def fla_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule(q, k, v, g, beta, initial_state=state, output_final_state=True)


def computed(rule: Rule, inputs: list[Tensor], gradients: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    o, final_state = rule(*leaves)
    found = torch.autograd.grad([o, final_state], leaves, [d.to(x.dtype) for d, x in zip(gradients, (o, final_state))])
    return {"o": o.detach(), "final_state": final_state.detach()} | {f"d_{name}": d for name, d in zip(NAMES, found)}


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """As the tests': infinite for anything not finite."""
    error, size = (got.double() - wanted).norm().item(), wanted.norm().item()
    if not error < float("inf"):
        return float("inf")
    return error / size if size else (float("inf") if error else 0.0)


def accuracy(
    dtypes: Sequence[str], sizes: Sequence[int], quick: bool, having: str, peer: bool, save: Callable[[Result], None]
) -> None:
    """Prints our errors, the worst of each tensor and the worst ratios; saves all after every case: a run may be cut short.

    having: only cases in whose name this stands. peer: flash-linear-attention too, but for float32.
    """
    results: Result = {}
    for case in cases(dtypes, sizes, quick):
        if having not in str(case):
            continue
        inputs, gradients = inputs_of(case, zlib.crc32(str(case).encode()))  # the same whatever else is asked for
        wide = computed(gdn_rule, [x.double() for x in inputs], gradients)
        results[str(case)] = result = {"gdn": {}, "fla": {}} if peer and case.dtype != torch.float32 else {"gdn": {}}
        for name in result:
            with reported(result[name]):
                got = computed(gdn_rule if name == "gdn" else fla_rule, inputs, gradients)
                result[name] |= {tensor: relative_error(got[tensor], wide[tensor]) for tensor in wide}
        save(results)
        ours = (f"{tensor} {error:.1e}" if isinstance(error, float) else error for tensor, error in result["gdn"].items())
        print(f"{case}: " + ", ".join(ours), flush=True)
    show(results)


def show(results: Result) -> None:
    ratios, worst, failed = [], {}, set()
    for case, result in results.items():
        for name in result:
            if "error" in result[name]:
                failed.add((name, result[name]["error"]))
        for tensor, ours in result["gdn"].items():
            if tensor == "error":
                continue
            key = (case.partition(",")[0], tensor)
            worst[key] = max(worst.get(key, (0.0, "")), (ours, case))
            if theirs := result.get("fla", {}).get(tensor):
                ratios.append((ours / theirs, ours, theirs, tensor, case))
    print("\nthe worst error of each tensor")
    for (dtype, tensor), (error, case) in worst.items():
        print(f"  {error:8.1e}  {dtype:9} {tensor:16} {case}")
    if ratios:
        print("\nthe highest ratios gdn / fla of the errors")
        for ratio, ours, theirs, tensor, case in sorted(ratios, reverse=True)[:40]:
            print(f"  {ratio:7.2f}  {ours:8.1e} {theirs:8.1e}  {tensor:14} {case}")
        above = sum(ratio > 1.2 for ratio, *_ in ratios)
        print(f"  {len(ratios)} tensors, median ratio {sorted(ratios)[len(ratios) // 2][0]:.2f}, {above} above 1.2")
    for name, error in sorted(failed):
        print(f"  {name} failed: {error}")
