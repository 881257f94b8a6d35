"""Whether the rule is right on this machine, on every backend that serves: the half of `gdn doctor` that computes and compares.

Every result is compared with the recurrence, in float64 on the CPU, from the same rounded inputs.
"""

import importlib.metadata
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn.ops import (
    conv_gated_delta_rule,
    conv_gated_delta_rule_step,
    conv_gated_delta_rule_with_state,
    gated_delta_rule_step,
    gated_delta_rule_with_state,
)
from gdn.ops.backend import Backend, choose_backend, pair_refusal, triton_refusal
from gdn.ops.cpu import usable_cores
from gdn.ops.reference import gated_delta_rule_reference

# Relative 2-norm of the error of outputs, states and gradients alike.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
_LONGEST_FIRST = (torch.float32, torch.bfloat16, torch.float16)  # to compile
KEY_DIMS = (32, 64, 128, 256)  # of the PyTorch form; its values have the same size
SIZES = ((256, 256), (128, 128), (128, 96), (64, 64))  # K, V of the kernels; the first is the models' and compiles longest
TOKENS = 64 + 5  # a whole chunk, and a rest that the state is carried to
PACKED = (66, 0, 1, 2)  # tokens of each packed sequence
LONG = 16384  # tokens of the shortest training sequence that is computed in segments
STATED = ("o", "final_state")  # what the rule returns
H, HV, W = 1, 2, 4  # heads, value heads, width of the convolution


class Check(NamedTuple):
    """One line of the examination; ok: passed, failed, or None for what is only reported."""

    name: str
    ok: bool | None
    detail: str


class Case(NamedTuple):
    """One computation; lengths: of packed sequences, or None."""

    device: str
    K: int
    V: int
    lengths: tuple[int, ...] | None = None
    B: int = 1

    @property
    def cu_seqlens(self) -> Tensor | None:
        return None if self.lengths is None else torch.tensor([0, *self.lengths], device=self.device).cumsum(0).int()

    @property
    def sequences(self) -> int:
        return self.B if self.lengths is None else len(self.lengths)

    @property
    def heads(self) -> dict[str, Any]:
        return {"num_heads": H, "head_dim": self.K, "num_v_heads": HV, "head_v_dim": self.V}


def choice(device: str) -> Check:
    """Which backend `auto` uses on this device, and why."""
    asked = torch.device(device), torch.float32, 128, 128  # a size that the kernels take: what is left is the device
    chosen = choose_backend("auto", *asked)
    if chosen == "triton":
        reason = "its kernels serve K of 64, 128, 256 and V a multiple of 32 up to 512; 'torch' serves all else"
    else:
        reason = f"not 'triton': {triton_refusal(*asked) or 'the interpreter is for tests'}"
    return Check(f"backend on {device}", None, f"'auto' takes {chosen!r}; {reason}")


def rule(device: str) -> Iterator[Check]:
    """The PyTorch form in float32: outputs, final state, every gradient, and single steps."""
    dtypes = (torch.float32,)
    for K in KEY_DIMS:
        yield _verdict(f"rule, {device}, K = V = {K}", partial(_rule_errors, Case(device, K, K), "torch"), dtypes)
    yield _verdict(f"rule, {device}, single steps", partial(_step_errors, Case(device, 64, 64), "torch"), dtypes)


def kernels_on_gpu() -> Iterator[Check]:
    """All of `batches` and `packed`, and long sequences, if Triton is here and not refused on this GPU; as they end.

    The first time nearly all of it is compiling, on one core: so each size, dtype and layout, whose kernels are its own, is a
    task, and the longest begin first.
    """
    device = torch.device("cuda")
    versions = [importlib.metadata.version(name) for name in importlib.metadata.packages_distributions().get("triton", ())]
    if not versions:
        yield Check("triton", None, "not installed: its kernels are not examined; pip install 'triton>=3.6'")
        return
    capability = torch.cuda.get_device_capability(device)
    refusal = pair_refusal(versions[0], capability)
    yield Check("triton", refusal is None, refusal or f"{versions[0]} on compute capability {'.'.join(map(str, capability))}")
    refusal = refusal or triton_refusal(device, torch.float32, 128, 128)
    if refusal:
        yield Check("triton, kernels", None, f"not run: {refusal}")
        return
    tasks = [partial(layout, "cuda", K, V, dtype) for dtype in _LONGEST_FIRST for K, V in SIZES for layout in (batches, packed)]
    tasks += [partial(long_sequence, "cuda", 64, 64, dtype) for dtype in _LONGEST_FIRST]
    workers = min(len(tasks), usable_cores(physical=False))
    yield Check("triton, kernels", None, f"{len(tasks)} parts in {workers} processes, which compile what is not yet compiled")
    # Threads of many processes would wait for each other in the references, tiny operations, and keep the compilers waiting.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        try:
            for part in as_completed([pool.submit(task) for task in tasks]):
                yield from part.result()
        except BrokenProcessPool:  # a crash in a compiler or driver takes its process with it
            yield Check("triton, kernels", False, "a process that examined them died; no other was waited for")


def batches(device: str, K: int, V: int, dtype: torch.dtype) -> list[Check]:
    """Every Triton kernel at this size, of a batch: outputs, states, all gradients, steps; which bits must be equal."""
    name, case, dtypes = _kernels(device, K, V, dtype), Case(device, K, V), (dtype,)
    return [
        _verdict(f"{name}, rule", partial(_rule_errors, case, "triton"), dtypes),
        _verdict(f"{name}, convolution and rule", partial(_conv_errors, case), dtypes),
        _verdict(f"{name}, steps", partial(_both_step_errors, case), dtypes),
        _same_bits(f"{name}, same bits twice", partial(_repeated, case, dtype)),
        _same_bits(f"{name}, rows of a batch = alone", partial(_rows, case._replace(B=2), dtype)),
    ]


def packed(device: str, K: int, V: int, dtype: torch.dtype) -> list[Check]:
    """The same of packed sequences, with states and a bias, but for steps and bits."""
    name, case, dtypes = _kernels(device, K, V, dtype), Case(device, K, V, PACKED), (dtype,)
    return [
        _verdict(f"{name}, packed, rule", partial(_rule_errors, case, "triton"), dtypes),
        _verdict(f"{name}, packed, convolution and rule", partial(_conv_state_errors, case), dtypes),
    ]


def long_sequence(device: str, K: int, V: int, dtype: torch.dtype) -> list[Check]:
    """The rule on a sequence that is computed in segments."""
    name, case = _kernels(device, K, V, dtype), Case(device, K, V)
    return [_verdict(f"{name}, rule, T = {LONG}", partial(_long_errors, case), (dtype,))]


def _kernels(device: str, K: int, V: int, dtype: torch.dtype) -> str:
    return f"triton, {device}, {_short(dtype)}, K = {K}, V = {V}"


Errors = dict[str, float]


def _verdict(name: str, errors: Callable[[torch.dtype], Errors], dtypes: Sequence[torch.dtype]) -> Check:
    """Passed if every error of every dtype is within its tolerance; the worst of each, or all that are wrong."""
    passed, wrong = [], []
    for dtype in dtypes:
        try:
            found = errors(dtype)
        except Exception as error:  # of a compiler, its modules or a driver: no base class holds them, each is a finding
            wrong.append(f"{_short(dtype)} {_in_short(error)}")
            continue
        above = [f"{key} {error:.1e}" for key, error in found.items() if not error <= TOLERANCE[dtype]]
        if above:
            wrong.append(f"{_short(dtype)} above {TOLERANCE[dtype]:.0e}: {', '.join(above)}")
        worst = max(found, key=lambda key: found[key])
        passed.append(f"{_short(dtype)} {found[worst]:.1e} ({worst})")
    return Check(name, not wrong, "; ".join(wrong) if wrong else f"relative error at most {', '.join(passed)}")


def _same_bits(name: str, results: Callable[[], tuple[dict[str, Tensor], dict[str, Tensor]]]) -> Check:
    try:
        one, other = results()
    except Exception as error:  # as above
        return Check(name, False, _in_short(error))
    differ = [key for key in one if not torch.equal(one[key], other[key])]
    return Check(name, not differ, f"different: {', '.join(differ)}" if differ else f"equal: {', '.join(one)}")


Compute = Callable[..., tuple[Tensor, ...]]


def _results(
    compute: Compute, names: Sequence[str], inputs: dict[str, Tensor], upstream: Sequence[Tensor] | None = None
) -> tuple[dict[str, Tensor], Sequence[Tensor]]:
    """The outputs, called `names`, the gradient of every input for these gradients of the outputs, and these.

    By default half of each is the output itself, half random. With the random half alone the gradients of A_log and dt_bias are
    sums of anything, and now and then so near 0 that none of their digits is right.
    """
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outputs = compute(**leaves)
    if upstream is None:
        noise = partial(_normal, torch.Generator().manual_seed(1))
        detached = [x.detach() for x in outputs]
        upstream = [(x / x.square().mean().sqrt() + noise(*x.shape).to(x.device)).bfloat16() for x in detached]
    gradients = torch.autograd.grad(
        outputs, list(leaves.values()), [d.to(x.device, x.dtype) for d, x in zip(upstream, outputs)]
    )
    return dict(zip(names, outputs)) | {f"d_{name}": d for name, d in zip(leaves, gradients)}, upstream


def _compared(computed: Compute, exact: Compute, names: Sequence[str], inputs: dict[str, Tensor]) -> Errors:
    """The error of each result; `exact` is given the same values in float64 on the CPU."""
    wanted, upstream = _results(exact, names, {name: x.cpu().double() for name, x in inputs.items()})
    got, _ = _results(computed, names, inputs, upstream)
    return {name: _relative_error(got[name], wanted[name]) for name in wanted}


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _inputs(case: Case, dtype: torch.dtype, T: int = TOKENS) -> dict[str, Tensor]:
    """q, k, v of this dtype, the rest float32."""
    _, K, V, _, B = case
    normal = partial(_normal, torch.Generator().manual_seed(K + V))
    q, k, v = F.normalize(normal(B, T, H, K), dim=-1), F.normalize(normal(B, T, H, K), dim=-1), normal(B, T, HV, V)
    tensors = {name: x.to(dtype) for name, x in (("q", q), ("k", k), ("v", v))}
    tensors |= {"g": -F.softplus(2 * normal(B, T, HV) - 2), "beta": normal(B, T, HV).sigmoid()}
    tensors["initial_state"] = normal(case.sequences, HV, K, V)
    return {name: x.to(case.device) for name, x in tensors.items()}


def _rule(case: Case, backend: Backend) -> Compute:
    cu_seqlens = case.cu_seqlens

    def compute(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None) -> tuple[Tensor, ...]:
        return gated_delta_rule_with_state(
            q, k, v, g, beta, initial_state=initial_state, cu_seqlens=cu_seqlens, backend=backend
        )

    return compute


def _rule_errors(case: Case, backend: Backend, dtype: torch.dtype) -> Errors:
    def exact(**x: Tensor) -> tuple[Tensor, ...]:
        lengths = None if case.lengths is None else list(case.lengths)
        with _one_thread():
            return gated_delta_rule_reference(**x, scale=case.K**-0.5, lengths=lengths)

    return _compared(_rule(case, backend), exact, STATED, _inputs(case, dtype))


def _long_errors(case: Case, dtype: torch.dtype) -> Errors:
    """Beside the chunkwise form, which `rule` has compared with the recurrence: that takes too long here."""
    exact = _rule(case._replace(device="cpu"), "torch")
    return _compared(_rule(case, "triton"), exact, STATED, _inputs(case, dtype, LONG))


def _repeated(case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The results of rule and convolution computed twice."""
    columns, parameters = _projection(case, dtype)

    def both() -> dict[str, Tensor]:
        rule, _ = _results(_rule(case, "triton"), STATED, _inputs(case, dtype))
        fused, _ = _results(_conv(case, "triton"), ("o",), columns | parameters)
        return rule | {f"convolution's {name}": x for name, x in fused.items()}

    return both(), both()


def _rows(case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Results and gradients of the rule in a batch, and of each of its rows alone."""
    inputs, compute = _inputs(case, dtype), _rule(case, "triton")
    batch, upstream = _results(compute, STATED, inputs)
    rows = [
        _results(compute, STATED, {name: x[i : i + 1].clone() for name, x in inputs.items()}, [d[i : i + 1] for d in upstream])
        for i in range(case.B)
    ]
    return batch, {name: torch.cat([row[name] for row, _ in rows]) for name in batch}


def _projection(case: Case, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The columns of a projection, q, k, v, a, b, one by one: each has a gradient of its own size; and float32 parameters."""
    _, K, V, _, B = case
    normal = partial(_normal, torch.Generator().manual_seed(K + V))
    widths = {"q": H * K, "k": H * K, "v": HV * V, "a": HV, "b": HV}
    columns = {name: normal(B, TOKENS, width).to(case.device, dtype) for name, width in widths.items()}
    parameters = {
        "conv_weight": normal(2 * H * K + HV * V, W) / 2,
        "A_log": 0.3 * normal(HV),
        "dt_bias": 0.3 * normal(HV) - 3,  # a strong decay costs the gradient of a its digits in bfloat16
    }
    return columns, {name: x.to(case.device) for name, x in parameters.items()}


def _conv(case: Case, backend: Backend) -> Compute:
    cu_seqlens = case.cu_seqlens

    def compute(
        q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, conv_weight: Tensor, A_log: Tensor, dt_bias: Tensor
    ) -> tuple[Tensor, ...]:
        proj = torch.cat([q, k, v, a, b], dim=-1)
        o = conv_gated_delta_rule(proj, conv_weight, None, A_log, dt_bias, **case.heads, cu_seqlens=cu_seqlens, backend=backend)
        return (o,)

    return compute


def _conv_errors(case: Case, dtype: torch.dtype) -> Errors:
    columns, parameters = _projection(case, dtype)
    exact = _conv(case._replace(device="cpu"), "reference")
    return _compared(_conv(case, "triton"), exact, ("o",), columns | parameters)


def _conv_state_errors(case: Case, dtype: torch.dtype) -> Errors:
    """The same with a bias, from states and to states."""

    def run(case: Case, backend: Backend) -> Compute:
        cu_seqlens = case.cu_seqlens

        def compute(
            q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, conv_weight: Tensor, A_log: Tensor, dt_bias: Tensor,
            conv_bias: Tensor, conv_state: Tensor, initial_state: Tensor,
        ) -> tuple[Tensor, ...]:  # fmt: skip
            proj = torch.cat([q, k, v, a, b], dim=-1)
            return conv_gated_delta_rule_with_state(
                proj, conv_weight, conv_bias, A_log, dt_bias, conv_state, initial_state,
                **case.heads, cu_seqlens=cu_seqlens, backend=backend,
            )  # fmt: skip

        return compute

    columns, parameters = _projection(case, dtype)
    inputs = columns | parameters | _states(case, dtype)
    exact = run(case._replace(device="cpu"), "reference")
    return _compared(run(case, "triton"), exact, ("o", "final_conv", "final_state"), inputs)


def _states(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    normal = partial(_normal, torch.Generator().manual_seed(2))
    channels, N = 2 * H * case.K + HV * case.V, case.sequences
    states = {
        "conv_bias": 0.3 * normal(channels),
        "conv_state": normal(N, W - 1, channels).to(dtype),
        "initial_state": normal(N, HV, case.K, case.V),
    }
    return {name: x.to(case.device) for name, x in states.items()}


def _step_errors(case: Case, backend: Backend, dtype: torch.dtype, T: int = 16) -> Errors:
    """Of outputs and final state, one token at a time."""
    inputs = _inputs(case, dtype, T)
    with _one_thread():
        wide = {name: x.cpu().double() for name, x in inputs.items()}
        wanted, final_state = gated_delta_rule_reference(**wide, scale=case.K**-0.5, lengths=None)
    q, k, v, g, beta, state = inputs.values()
    steps = [gated_delta_rule_step(q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], state, backend=backend) for t in range(T)]
    return {"o": _relative_error(torch.stack(steps, dim=1), wanted), "final_state": _relative_error(state, final_state)}


def _both_step_errors(case: Case, dtype: torch.dtype) -> Errors:
    """Steps of the rule alone, and from the projection on."""
    T = W + 1  # until no input of the convolution is from its first state
    columns, parameters = _projection(case, dtype)
    states = _states(case, dtype)
    proj = torch.cat([x[:, :T] for x in columns.values()], dim=-1)
    weights = [parameters["conv_weight"], states["conv_bias"], parameters["A_log"], parameters["dt_bias"]]
    carried = [states["conv_state"], states["initial_state"]]
    wide = [x.cpu().double() for x in (proj, *weights, *carried)]
    wanted = conv_gated_delta_rule_with_state(*wide, **case.heads, backend="reference")
    steps = [conv_gated_delta_rule_step(proj[:, t], *weights, *carried, **case.heads, backend="triton") for t in range(T)]
    got = (torch.stack(steps, dim=1), *carried)
    fused = {name: _relative_error(x, y) for name, x, y in zip(("o", "conv_state", "state"), got, wanted)}
    return _step_errors(case, "triton", dtype, T) | {f"convolution's {name}": error for name, error in fused.items()}


@contextmanager
def _one_thread() -> Iterator[None]:
    """For the reference, thousands of tiny operations: where cores are shared, waiting for a second thread is all they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _relative_error(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted| / |wanted|; nan where either is."""
    wanted = wanted.detach()
    return float((got.detach().cpu().double() - wanted).norm() / wanted.norm())


def _in_short(error: Exception) -> str:
    """Type and message; a compiler quotes the kernel, and says what is wrong at the end."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0] if len(lines) == 1 else f'{lines[0]} ... {lines[-1]}'}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
