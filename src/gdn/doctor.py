"""What this machine is and how fast, for `gdn doctor`: data, that cli prints. Whether the rule is right: `doctor_kernels`."""

import copy
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from gdn.doctor_kernels import Check, choice, kernels_on_gpu, rule
from gdn.generation.cpu_products import product_with
from gdn.generation.cpu_token import CompiledToken
from gdn.generation.engine import decode_dtype
from gdn.generation.sampling import Sampling, sample
from gdn.generation.weights import join_projections
from gdn.model.config import ModelConfig
from gdn.model.lm import GatedDeltaNetLM, init_weights
from gdn.ops.cpu import cpuinfo
from gdn.ops.cpu_token import build, library

_OPTIONAL = {
    "transformers": "the Hugging Face classes",
    "zstandard": ".jsonl.zst sources",
    "pyarrow": ".parquet sources",
    "tensorboard": "[log] tensorboard = true",
}
# Beyond this ratio of times decode_dtype is called wrong: the trap it avoids is tenfold, a shared machine varies by half.
_CLEARLY_SLOWER = 3.0
_WRONG = 1e-5  # relative 2-norm of logits in float32


def examine() -> Iterator[Check]:
    """All checks, each as soon as it is known. On a GPU the first run compiles: a minute or two of many cores."""
    yield from machine()
    yield from packages()
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        yield choice(device)
        yield from rule(device)
    if torch.cuda.is_available():
        yield from kernels_on_gpu()
    yield token_on_cpu()
    yield from speed()


def table(checks: Iterable[Check]) -> Table:
    """The checks as a table for the terminal."""
    marks = {True: Text("ok", style="green"), False: Text("FAILED", style="bold red"), None: Text("")}
    grid = Table("check", "", "detail", title="gdn doctor", title_justify="left")
    for check in checks:
        grid.add_row(Text(check.name), marks[check.ok], Text(check.detail))
    return grid


def machine() -> list[Check]:
    """Python, PyTorch, processor, memory, accelerators."""
    cpu = cpuinfo("model name") or platform.processor() or "unknown"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    checks = [
        Check("python", None, f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Check("torch", None, torch.__version__),
        Check("cpu", None, f"{cpu}; vector instructions in use: {torch.backends.cpu.get_cpu_capability()}"),
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


def token_on_cpu() -> Check:
    """Whether single tokens are compiled for this CPU, and are those of the modules: bf16 weights, the rest float32."""
    name = "single tokens on cpu"
    compiled, how = build()
    if compiled is None:
        return Check(name, None, f"by PyTorch's operators: {how}")
    try:
        error, other = _token_error(), _other_draws()
    except Exception as trouble:  # whatever it is, it is a finding
        return Check(name, False, f"compiled {how}: {type(trouble).__name__}: {trouble}")
    detail = f"compiled {how}: relative error {error:.1e} beside the modules, {other} of 200 draws other than by operators"
    return Check(name, error < _WRONG and other <= 1, detail)  # one may lie on the bound of top_p


def _token_error() -> float:
    model = GatedDeltaNetLM(ModelConfig(vocab_size=64, hidden_size=64, num_hidden_layers=2, num_heads=2, head_dim=32))
    init_weights(model, "mamba", seed=0)
    model.bfloat16()
    with torch.no_grad():
        wanted = copy.deepcopy(model).double()(torch.arange(40)[None]).logits[0]
    model.compute_dtype = torch.float32
    join_projections(model)
    state, token = model.new_state(1), CompiledToken(model)
    got = torch.stack([token.step(i, state) for i in range(40)])
    return float((got - wanted).norm() / wanted.norm())


def _other_draws() -> int:
    logits, sampling = torch.randn(200, 500, generator=torch.Generator().manual_seed(0)), Sampling(0.8, top_k=50, top_p=0.9)
    # float64 is drawn by operators.
    drawn = [sample(x, sampling, torch.Generator().manual_seed(1)) for x in (logits, logits.double())]
    return int((drawn[0] != drawn[1]).sum())


def speed() -> list[Check]:
    """Measured on the CPU: what decoding is bound by, in both dtypes, and matrix products."""
    times = {dtype: _one_row_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return [*_decode_checks(times), _matmul_check()]


def _decode_checks(times: dict[torch.dtype, float]) -> list[Check]:
    """Two lines of bandwidth, and whether `decode_dtype` chooses the dtype that is not clearly the slower one.

    The products are PyTorch's: where tokens are compiled they do not use them, and there is no verdict.
    """
    weights = 1024 * 2816
    checks = [
        Check(
            f"one-row linear, {_short(dtype)}",
            None,
            f"{weights * dtype.itemsize / seconds / 1e9:.1f} GB/s, {seconds * 1e3:.3f} ms for 1024 x 2816",
        )
        for dtype, seconds in times.items()
    ]
    compiled = library() is not None
    chosen, reason = decode_dtype("cpu", torch.bfloat16, compiled=compiled)
    other = torch.float32 if chosen == torch.bfloat16 else torch.bfloat16
    ratio = times[chosen] / times[other]
    detail = f"bf16 weights are decoded in {_short(chosen)} ({reason}); measured {ratio:.2f} of {_short(other)}'s time"
    return [*checks, Check("decode dtype", None if compiled else ratio <= _CLEARLY_SLOWER, detail)]


def _one_row_seconds(dtype: torch.dtype) -> float:
    """Fastest of many products of one row with a weight that is in no core's own cache."""
    row = torch.ones(1, 1024)
    products = [product_with(torch.full((2816, 1024), 0.5, dtype=dtype)) for _ in range(12)]
    return min(_seconds(partial(product, row)) for _ in range(8) for product in products)


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
