"""Every GPU kernel compiles for every kind of GPU, within its shared memory, without a GPU; and the table of tiles."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gdn.ops.triton_configs import choose

pytest.importorskip("triton")

SHARED = {80: 163, 86: 99, 89: 99, 90: 227}  # KB a block may have
KERNELS = Counter(_intra=1, _states=4, _d_states=1, _d_initial=1, _gradients=1, _finish=1, _chain=1, _step=1)
KERNELS += Counter(_conv_forward=1, _conv_backward=1, _conv_step=1, _gates_forward=1, _gates_backward=1)
KERNELS += Counter(_embed=1, _linear=41)  # bf16 at 21 tiles, float16 and float32 at ten each
KERNELS += Counter(_layer_step=2, _settle=1, _candidates=1, _choose=2, _noise=1)
KERNELS += Counter(_norm_forward=1, _norm_backward=1, _gated_norm_forward=1, _gated_norm_backward=1)
KERNELS += Counter(_swiglu_forward=1, _swiglu_backward=1, _cross_entropy=1, _row_scores=1)
HOPPER = Counter(_states=10, _gradients=2)  # K=V=128, where a short loop unrolls and registers run out first, and 256
COPIED = Counter(_linear=13)  # of the table's tiles, in bf16
FLOAT8 = Counter(_cast_rows=3, _norm_forward=1, _swiglu_forward_float8=1, _swiglu_backward_float8=1)  # from 8.9 on
WIDE = Counter(_intra=1, _states=3, _d_states=1, _d_initial=1, _gradients=1)  # float32
WIDE_LINES = 6000  # of PTX, where each float32 product of a thread is one: 18,000 took half a minute to compile


def compile_for(arch: int, folder: Path, *options: str) -> list[dict[str, Any]]:
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, str(script), str(arch), *options]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    reports: list[dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    return reports


def check(arch: int, reports: list[dict[str, Any]]) -> None:
    too_large = [report for report in reports if report["shared"] > min(SHARED[arch] * 1024, report.get("allowed", 1 << 30))]
    assert not too_large
    assert not [report for report in reports if report.get("serialised")], "ptxas serialises tensor-core products"


@pytest.fixture(scope="module")
def compiling(tmp_path_factory: pytest.TempPathFactory) -> dict[int, "Future[list[dict[str, Any]]]"]:
    """Both at once: each takes one core for a minute."""
    with ThreadPoolExecutor() as pool:
        return {arch: pool.submit(compile_for, arch, tmp_path_factory.mktemp(f"sm_{arch}")) for arch in (86, 90)}


def test_kernels_fit_the_shared_memory_of_small_gpus(compiling: dict[int, "Future[list[dict[str, Any]]]"]) -> None:
    reports = compiling[86].result()
    assert Counter(report["kernel"] for report in reports) == KERNELS
    check(86, reports)


def test_hoppers_own_kernels_fit_and_their_products_overlap(compiling: dict[int, "Future[list[dict[str, Any]]]"]) -> None:
    reports = [report for report in compiling[90].result() if report["dtype"] != "fp32"]
    assert Counter(report["kernel"] for report in reports) == HOPPER + COPIED + FLOAT8
    assert sum("serialised" in report for report in reports) == (HOPPER + COPIED).total()
    check(90, reports)


def test_float32_kernels_are_short_enough_to_compile(compiling: dict[int, "Future[list[dict[str, Any]]]"]) -> None:
    reports = [report for report in compiling[90].result() if report["dtype"] == "fp32"]
    assert Counter(report["kernel"] for report in reports) == WIDE
    assert max(report["lines"] for report in reports) <= WIDE_LINES
    check(90, reports)


@pytest.mark.soak
@pytest.mark.parametrize("arch", SHARED)
def test_kernels_of_every_size_fit_the_shared_memory(arch: int, tmp_path: Path) -> None:
    check(arch, compile_for(arch, tmp_path, "--all"))


@pytest.mark.parametrize("shared_memory", [99 * 1024, 163 * 1024, 228 * 1024 - 1024, 300 * 1024])
@pytest.mark.parametrize("narrow", [True, False])
def test_blocks_divide_what_they_cut(narrow: bool, shared_memory: int) -> None:
    for V in range(32, 513, 32):
        for kernel in ("states", "d_states", "d_initial", "gradients"):
            config = choose(kernel, narrow, V, shared_memory)
            assert V % config.block == 0 and config.block >= 16 and config.num_warps in ((4, 8) if narrow else (16,))
    for K in (64, 128, 256):
        assert K % choose("intra", narrow, K, shared_memory).block == 0


def test_measured_tiles_are_those_of_the_gpu_they_were_measured_on() -> None:
    assert choose("states", True, 256, 227 * 1024)[:3] == (128, 8, 2)
    assert choose("states", True, 256, 163 * 1024)[:3] == (64, 8, 2)
    assert choose("states", True, 96, 227 * 1024)[:3] == (32, 4, 2)


def test_the_table_needs_no_triton() -> None:
    """`backend` reads it before it is known whether Triton is there."""
    spec = importlib.util.find_spec("gdn.ops.triton_configs")
    assert spec is not None and spec.origin is not None
    assert "import triton" not in Path(spec.origin).read_text()
