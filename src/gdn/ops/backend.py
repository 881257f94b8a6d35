"""Which implementation computes: chosen at each call, by device, dtype and size; a request that cannot be met is an error."""

import importlib.util
import logging
import os
from functools import cache
from typing import Literal

import torch

from gdn.errors import BackendError

log = logging.getLogger(__name__)

Backend = Literal["auto", "reference", "torch", "triton"]
BACKENDS = ("reference", "torch", "triton")
TRITON_K = (64, 128, 256)
TRITON_V = "a multiple of 32 up to 512"
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


def triton_refusal(device: torch.device, dtype: torch.dtype, K: int, V: int) -> str | None:
    """Why the kernels cannot serve, or None."""
    if dtype not in _TRITON_DTYPES:
        return f"values are {str(dtype).removeprefix('torch.')}; expected bfloat16, float16 or float32"
    if K not in TRITON_K or V % 32 or not 32 <= V <= 512:
        return f"head sizes are K = {K}, V = {V}; expected K in {{64, 128, 256}} and V {TRITON_V}"
    return _missing(device.type)


@torch.compiler.assume_constant_result
def _missing(device: str) -> str | None:
    """Why no Triton kernel runs on this kind of device. Under Triton's interpreter they all run on the CPU."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted != (device == "cpu") or device not in ("cpu", "cuda"):
        return f"tensors lie on {device}; expected cuda, or cpu with TRITON_INTERPRET=1 in the environment"
    return None


@cache
def _log_choice(backend: str, device: str, reason: str) -> None:
    log.info("gated delta rule on %s: backend %r; triton: %s", device, backend, reason)
