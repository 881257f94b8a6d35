"""Which implementation computes: chosen at each call, by device, dtype and size; a request that cannot be met is an error."""

import importlib.metadata
import importlib.util
import logging
import os
import re
from collections.abc import Iterable
from functools import cache
from typing import Literal

import torch

from gdn.errors import BackendError
from gdn.ops.triton_configs import WIDE_KIB, shared_memory

log = logging.getLogger(__name__)

Backend = Literal["auto", "reference", "torch", "triton"]
BACKENDS = ("reference", "torch", "triton")
TRITON_K = (64, 128, 256)
TRITON_V = "a multiple of 32 up to 512"
FLOAT8_SIZE = 16  # what divides the sides of matrices that tensor cores multiply in float8
FLOAT8_CAPABILITIES = ((8, 9), (9, 0))  # on 12.0 cuBLAS refuses scales by row: pytorch/pytorch#192707
OLDEST_TRITON, OLDEST_HOPPER_TRITON, OLDEST_CAPABILITY = (3, 4), (3, 6), (8, 0)
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype, K: int, V: int) -> str:
    """The backend to use for values [..., V] of this dtype, keys of K: `auto` is triton where it serves, else torch.

    Raises BackendError if `backend` is none there is, or is "triton" and cannot serve: what was got, and what is wanted.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise BackendError(f"backend {backend!r} does not exist; expected 'auto' or one of {', '.join(map(repr, BACKENDS))}")
    if backend in ("reference", "torch"):
        return backend
    refusal = triton_refusal(device, dtype, K, V)
    if backend == "triton" and refusal:
        raise BackendError(f"backend 'triton' cannot be used: {refusal}")
    # Triton's interpreter runs the kernels on a CPU, slowly: for tests that ask for it.
    chosen = "torch" if refusal or (backend == "auto" and device.type == "cpu") else "triton"
    if backend == "auto" and not torch.compiler.is_compiling():  # a log call would break the graph
        _log_choice(chosen, device.type, refusal or "built for this device, dtype and size")
    return chosen


def backend_for(x: torch.Tensor) -> str:
    """ "triton" where x lies on a GPU whose kernels compute in x's dtype, whatever the size of heads, else "torch"."""
    return "triton" if x.is_cuda and triton_refusal(x.device, x.dtype, TRITON_K[0], 32) is None else "torch"


def triton_refusal(device: torch.device, dtype: torch.dtype, K: int, V: int) -> str | None:
    """Why the kernels cannot serve, or None."""
    if dtype not in _TRITON_DTYPES:
        return f"values are {str(dtype).removeprefix('torch.')}; expected bfloat16, float16 or float32"
    if K not in TRITON_K or V % 32 or not 32 <= V <= 512:
        return f"head sizes are K = {K}, V = {V}; expected K in {{64, 128, 256}} and V {TRITON_V}"
    return _missing(device.type, device.index, dtype == torch.float32 and K == 256)


def float8_refusal(device: torch.device, K: int, V: int, sides: Iterable[int]) -> str | None:
    """Why a block with heads of K and V cannot multiply in float8 in training matrices of these sides, or None."""
    if device.type != "cuda":
        return f"the model is on {device.type}; expected a GPU of compute capability 8.9 or 9.0"
    if refusal := triton_refusal(device, torch.bfloat16, K, V):
        return refusal
    if (capability := torch.cuda.get_device_capability(device)) not in FLOAT8_CAPABILITIES:
        return f"compute capability {'.'.join(map(str, capability))} does not multiply it by rows; expected 8.9 or 9.0"
    odd = [side for side in sides if side % FLOAT8_SIZE]
    return f"an FFN's matrices have a side of {odd[0]}; expected multiples of {FLOAT8_SIZE}" if odd else None


def pair_refusal(triton_version: str, capability: tuple[int, int]) -> str | None:
    """Why the kernels must not run with this Triton on an NVIDIA GPU of this compute capability, and what helps; or None.

    Not refused: Triton 3.4 to 3.7.0 on Hopper, which compile the transpose of a tensor-core result wrongly and silently
    (flash-linear-attention #640; mended in 3.7.1). These kernels transpose what they loaded and never a result, and `gdn
    doctor` looks for what such a fault would do.
    """
    dotted = ".".join(map(str, capability))
    if capability < OLDEST_CAPABILITY:
        return f"compute capability {dotted} is below 8.0, without tensor cores for bfloat16; use backend 'torch'"
    if capability[0] in (10, 11):
        return f"compute capability {dotted} has too little tensor memory for these tiles; use backend 'torch'"
    match = re.match(r"(\d+)\.(\d+)", triton_version)
    if match is None:
        return f"Triton calls itself {triton_version!r}; expected a version like 3.6.0: pip install 'triton>=3.6'"
    version = int(match[1]), int(match[2])
    if version < OLDEST_TRITON:
        return f"Triton {triton_version} is too old, kernels were never tested below 3.4: pip install 'triton>=3.6'"
    if capability[0] == 9 and version < OLDEST_HOPPER_TRITON:
        return f"Triton {triton_version} lacks the Gluon that the kernels for Hopper need: pip install 'triton>=3.6'"
    return None


def _missing(device: str, index: int | None, large: bool) -> str | None:
    """Why no Triton kernel, or none this large, runs on this device. Under Triton's interpreter they all run on the CPU."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted != (device == "cpu") or device not in ("cpu", "cuda"):
        return f"tensors lie on {device}; expected cuda, or cpu with TRITON_INTERPRET=1 in the environment"
    return _unfit(torch.cuda.current_device() if index is None else index, large) if device == "cuda" else None


# What torch.compiler.assume_constant_result does to a function, without importing the compiler: 1.5 s of every command.
_missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _unfit(index: int, large: bool) -> str | None:
    """Why the kernels do not serve on this GPU; large: float32 keys of 256, which fill more than small GPUs have."""
    if torch.version.hip:
        return "the GPU is AMD's; expected NVIDIA's: these kernels were never run on another"
    versions = [importlib.metadata.version(name) for name in importlib.metadata.packages_distributions().get("triton", ())]
    refusal = pair_refusal(versions[0], torch.cuda.get_device_capability(index)) if versions else None
    kib = shared_memory(torch.device("cuda", index)) // 1024
    if large and kib < WIDE_KIB:
        return refusal or f"float32 with K = 256 needs {WIDE_KIB} KB of shared memory a block, this GPU has {kib}: use bfloat16"
    return refusal


@cache
def _log_choice(backend: str, device: str, reason: str) -> None:
    log.info("gated delta rule on %s: backend %r; triton: %s", device, backend, reason)
