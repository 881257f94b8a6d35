"""What this machine is and whether the gated delta rule is right on it: `gdn doctor`. Returns data; cli prints it."""

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.table import Table
from rich.text import Text
from torch import Tensor

from gdn.errors import GDNError
from gdn.generation.engine import decode_dtype
from gdn.ops import gated_delta_rule_step, gated_delta_rule_with_state
from gdn.ops.gated_delta_rule import _choose_backend
from gdn.ops.reference import gated_delta_rule_reference

TOLERANCE = 1e-5  # relative 2-norm of float32 results beside the float64 reference, outputs and gradients alike
KEY_DIMS = (32, 64, 128, 256)
_OPTIONAL = {
    "transformers": "the Hugging Face classes",
    "zstandard": ".jsonl.zst sources",
    "pyarrow": ".parquet sources",
    "tensorboard": "[log] tensorboard = true",
}
# Beyond this ratio of times decode_dtype is called wrong: the trap it avoids is tenfold, a shared machine varies by half.
_CLEARLY_SLOWER = 3.0


class Check(NamedTuple):
    """One line of the examination; ok: passed, failed, or None for what is only reported."""

    name: str
    ok: bool | None
    detail: str


def examine() -> list[Check]:
    """All checks, in the order to be shown; under ten seconds on two cores."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    checks = [*machine(), *packages()]
    for device in devices:
        checks += rule(device)
    return [*checks, *speed()]


def table(checks: list[Check]) -> Table:
    """The checks as a table for the terminal."""
    marks = {True: Text("ok", style="green"), False: Text("FAILED", style="bold red"), None: Text("")}
    grid = Table("check", "", "detail", title="gdn doctor", title_justify="left")
    for check in checks:
        grid.add_row(Text(check.name), marks[check.ok], Text(check.detail))
    return grid


def machine() -> list[Check]:
    """Python, PyTorch, processor, memory, accelerators."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    checks = [
        Check("python", None, f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Check("torch", None, torch.__version__),
        Check("cpu", None, f"{_cpu_model()}; vector instructions in use: {torch.backends.cpu.get_cpu_capability()}"),
        Check("threads", None, f"{torch.get_num_threads()} used by torch, {os.cpu_count()} cores"),
        Check("memory", None, f"{memory / 2**30:.1f} GiB"),
    ]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        size = properties.total_memory / 2**30
        capability = f"compute capability {properties.major}.{properties.minor}"
        checks.append(Check(f"cuda:{i}", None, f"{properties.name}, {size:.1f} GiB, {capability}"))
    if torch.backends.mps.is_available():
        checks.append(Check("mps", None, "available; the rule is not tested on it"))
    if len(checks) == 5:
        checks.append(Check("accelerator", None, "none: everything runs on the CPU"))
    return checks


def packages() -> list[Check]:
    """Which optional packages are installed, and what each is for."""
    checks = []
    for name, purpose in _OPTIONAL.items():
        try:
            detail = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            detail = f"not installed; needed for {purpose}"
        checks.append(Check(name, None, detail))
    return checks


def rule(device: str) -> list[Check]:
    """Which backend the rule uses on `device`; its forward, gradients and single step beside the float64 reference."""
    try:
        chosen = _choose_backend("auto", device)
    except GDNError as error:
        return [Check(f"rule on {device}", False, str(error))]
    checks = [Check(f"rule on {device}", None, f"backend {chosen!r}: 'auto' takes the fastest one built for the device")]
    for K in KEY_DIMS:
        checks.append(_verdict(f"rule, {device}, K = V = {K}", partial(_sequence_errors, K, device)))
    checks.append(_verdict(f"rule, {device}, single steps", partial(_step_errors, 64, device)))
    return checks


def _verdict(name: str, errors: Callable[[], dict[str, float]]) -> Check:
    try:
        found = errors()
    except (GDNError, RuntimeError, ValueError) as error:
        return Check(name, False, f"{type(error).__name__}: {error}")
    worst = max(found, key=lambda key: found[key])
    wrong = [f"{key} {error:.1e}" for key, error in found.items() if not error <= TOLERANCE]
    if wrong:
        return Check(name, False, f"relative error above {TOLERANCE:.0e}: {', '.join(wrong)}")
    return Check(name, True, f"{', '.join(found)}: relative error at most {found[worst]:.1e} ({worst})")


def _inputs(K: int, T: int) -> dict[str, Tensor]:
    """One sequence with grouped values, in float64 with float32's values."""
    generator = torch.Generator().manual_seed(K)
    B, H, HV = 1, 1, 2

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors = {
        "q": F.normalize(normal(B, T, H, K), dim=-1),
        "k": F.normalize(normal(B, T, H, K), dim=-1),
        "v": normal(B, T, HV, K),
        "g": -F.softplus(2 * normal(B, T, HV) - 2),
        "beta": normal(B, T, HV).sigmoid(),
        "initial_state": normal(B, HV, K, K),
    }
    return {name: tensor.double() for name, tensor in tensors.items()}


def _sequence_errors(K: int, device: str) -> dict[str, float]:
    """Relative error of outputs, final state and every gradient."""
    inputs = _inputs(K, T=64 + 5)  # a whole chunk of tokens, and a rest that the state is carried to
    q, k, v, g, beta, state = narrow = [x.to(device, torch.float32).requires_grad_() for x in inputs.values()]
    got = gated_delta_rule_with_state(q, k, v, g, beta, initial_state=state)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator) for x in got]
    d_got = torch.autograd.grad(got, narrow, [d.to(device) for d in upstream])
    with _one_thread():
        q, k, v, g, beta, state = wide = [x.requires_grad_() for x in inputs.values()]
        wanted = gated_delta_rule_reference(q, k, v, g, beta, K**-0.5, state, None)
        d_wanted = torch.autograd.grad(wanted, wide, [d.double() for d in upstream])
    names = ["o", "final_state", *(f"d_{name}" for name in inputs)]
    return {name: _relative_error(x, y) for name, x, y in zip(names, [*got, *d_got], [*wanted, *d_wanted])}


def _step_errors(K: int, device: str) -> dict[str, float]:
    """The same of outputs and final state, one token at a time."""
    q, k, v, g, beta, state = wide = list(_inputs(K, T=16).values())
    with _one_thread():
        wanted, final_state = gated_delta_rule_reference(q, k, v, g, beta, K**-0.5, state, None)
    q, k, v, g, beta, state = (x.to(device, torch.float32) for x in wide)
    steps = [gated_delta_rule_step(q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], state) for t in range(q.shape[1])]
    return {"o": _relative_error(torch.stack(steps, dim=1), wanted), "final_state": _relative_error(state, final_state)}


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


def speed() -> list[Check]:
    """Measured on the CPU: what decoding is bound by, in both dtypes, and matrix products."""
    times = {dtype: _one_row_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return [*_decode_checks(times), _matmul_check()]


def _decode_checks(times: dict[torch.dtype, float]) -> list[Check]:
    """Two lines of bandwidth, and whether `decode_dtype` chooses the dtype that is not clearly the slower one."""
    weights = 1024 * 2816
    checks = [
        Check(
            f"one-row linear, {_short(dtype)}",
            None,
            f"{weights * dtype.itemsize / seconds / 1e9:.1f} GB/s, {seconds * 1e3:.3f} ms for 1024 x 2816",
        )
        for dtype, seconds in times.items()
    ]
    chosen, reason = decode_dtype("cpu", torch.bfloat16)
    other = torch.float32 if chosen == torch.bfloat16 else torch.bfloat16
    ratio = times[chosen] / times[other]
    detail = f"bf16 weights are decoded in {_short(chosen)} ({reason}); measured {ratio:.2f} of {_short(other)}'s time"
    return [*checks, Check("decode dtype", ratio <= _CLEARLY_SLOWER, detail)]


def _one_row_seconds(dtype: torch.dtype) -> float:
    """Fastest of many products of one row with a weight that is in no core's own cache."""
    row = torch.ones(1, 1024, dtype=dtype)
    weights = [torch.full((2816, 1024), 0.5, dtype=dtype) for _ in range(12)]
    return min(_seconds(partial(F.linear, row, weight)) for _ in range(8) for weight in weights)


def _matmul_check() -> Check:
    n = 1024
    a, b = torch.ones(n, n), torch.ones(n, n)
    seconds = min(_seconds(lambda: a @ b) for _ in range(5))
    return Check("matrix product, float32", None, f"{2 * n**3 / seconds / 1e9:.0f} GFLOP/s for {n} x {n} x {n}")


def _seconds(work: Callable[[], Tensor]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
