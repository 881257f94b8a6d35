"""What `ops_gpu` and `ops_accuracy` share: random inputs on the GPU, gdn and its peers behind common signatures, the record.

Each function of a peer imports it when it is called, so that a peer that is missing or broken costs one line of the report.
FLA would hand the bare rule at K = V = 128 to FlashQLA where that is installed; here each stands in its own column.
"""

import json
import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

os.environ["FLA_FLASH_QLA"] = "0"

Call = Callable[..., Tensor]
Result = dict[str, Any]
CONV_SIZE = 4


class Shape(NamedTuple):
    B: int
    T: int
    H: int
    K: int
    V: int

    def __str__(self) -> str:
        return " ".join(f"{name}{size}" for name, size in self._asdict().items())


class Random:
    """Tensors on the GPU from a generator of their own."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator("cuda").manual_seed(seed)

    def normal(self, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*sizes, generator=self.generator, device="cuda", dtype=dtype)

    def uniform(self, *sizes: int) -> Tensor:
        return torch.rand(*sizes, generator=self.generator, device="cuda")


def rule_inputs(shape: Shape, seed: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """q, k (normalised), v in dtype; g (log decay), beta in float32."""
    B, T, H, K, V = shape
    random = Random(seed)
    q, k = (F.normalize(random.normal(B, T, H, K), dim=-1).to(dtype) for _ in "qk")
    v, g = random.normal(B, T, H, V, dtype=dtype), -F.softplus(random.normal(B, T, H) - 2)
    return [q, k, v, g, random.uniform(B, T, H)]


def gate_parameters(H: int, random: Random) -> list[Tensor]:
    """A_log and dt_bias in float32, as the layer initialises them, but for the distribution of the second."""
    return [(1 + 15 * random.uniform(H)).log(), random.normal(H) - 4]


def raw_inputs(shape: Shape, seed: int) -> list[Tensor]:
    """q, k, v, a, b as a layer has them before norm and gates, in bfloat16; A_log, dt_bias."""
    B, T, H, K, V = shape
    random, dtype = Random(seed), torch.bfloat16
    q, k = (F.silu(random.normal(B, T, H, K, dtype=dtype)) for _ in "qk")
    v = random.normal(B, T, H, V, dtype=dtype)
    a, b = (random.normal(B, T, H, dtype=dtype) for _ in "ab")
    return [q, k, v, a, b, *gate_parameters(H, random)]


def projection_inputs(shape: Shape, seed: int) -> list[Tensor]:
    """The projection [B, T, q|k|v|a|b] in bfloat16, the convolution's weight [D, W], A_log, dt_bias."""
    B, T, H, K, V = shape
    random, dtype = Random(seed), torch.bfloat16
    D = H * (2 * K + V)
    projection, weight = random.normal(B, T, D + 2 * H, dtype=dtype), random.normal(D, CONV_SIZE, dtype=dtype) / 2
    return [projection, weight, *gate_parameters(H, random)]


def separate_inputs(shape: Shape, seed: int, concatenated: bool) -> list[Tensor]:
    """`projection_inputs` as FLA's layer has it: q, k, v (or one qkv), a, b, the three weights (or one), A_log, dt_bias."""
    _, _, H, K, V = shape
    projection, weight, A_log, dt_bias = projection_inputs(shape, seed)
    parts = [H * K, H * K, H * V]
    *qkv, a, b = (x.contiguous() for x in projection.split([*parts, H, H], dim=-1))
    weights = [x.contiguous() for x in weight.split(parts)]
    if concatenated:
        qkv, weights = [torch.cat(qkv, dim=-1)], [weight]
    return [*qkv, a, b, *weights, A_log, dt_bias]


class reported:
    """Turns what a peer raises into one line of its result: a peer may fail in any way, and the others go on."""

    def __init__(self, result: Result) -> None:
        self.result = result

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        first_line = (str(error).strip().splitlines() or [""])[0]
        self.result["error"] = f"{type(error).__name__}: {first_line}"[:300]
        return True


# --- the rule -------------------------------------------------------------------------------------------------------------


def gdn_rule() -> Call:
    from gdn.ops import gated_delta_rule

    return lambda *inputs: gated_delta_rule(*inputs, backend="triton")


def fla_rule() -> Call:
    """Called bare: q and k are normalised, g and beta activated."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return lambda *inputs: chunk_gated_delta_rule(*inputs)[0]


def fla_rule_with_activations() -> Call:
    """With L2 norm and both gates in the call, as FLA's layer calls it."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    def call(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
        in_kernel = {f"use_{what}_in_kernel": True for what in ("qk_l2norm", "gate", "beta_sigmoid")}
        return chunk_gated_delta_rule(q, k, v, a, b, A_log=A_log, dt_bias=dt_bias, state_v_first=True, **in_kernel)[0]

    return call


def flash_qla_rule() -> Call:
    from flash_qla import chunk_gated_delta_rule

    return lambda *inputs: chunk_gated_delta_rule(*inputs)[0]


def flashinfer_rule() -> Call:
    """Forward only. Takes the decay itself, packed rows and an explicit cu_seqlens."""
    from flashinfer.gdn_prefill import chunk_gated_delta_rule

    def call(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        B, T = q.shape[:2]
        cu_seqlens = torch.arange(0, (B + 1) * T, T, device=q.device)
        packed = [x.flatten(0, 1) for x in (q, k, v, g.exp(), beta)]
        o = chunk_gated_delta_rule(*packed, cu_seqlens=cu_seqlens)
        return (o[0] if isinstance(o, tuple) else o).view_as(v)

    return call


# --- the layer's path -----------------------------------------------------------------------------------------------------


def gdn_layer_path(shape: Shape) -> Call:
    from gdn.ops import conv_gated_delta_rule

    sizes = {"num_heads": shape.H, "head_dim": shape.K, "num_v_heads": shape.H, "head_v_dim": shape.V}

    def call(projection: Tensor, weight: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
        return conv_gated_delta_rule(projection, weight, None, A_log, dt_bias, **sizes, backend="triton")

    return call


def fla_layer_path(shape: Shape, concatenated: bool) -> Call:
    """What fla/layers/gated_deltanet.py does between its projections and its output norm, and without its torch.cat."""
    from fla.modules.convolution import causal_conv1d

    rule = fla_rule_with_activations()
    H, K, V = shape.H, shape.K, shape.V

    def call(*inputs: Tensor) -> Tensor:
        count = 1 if concatenated else 3
        qkv, (a, b), weights, gates = inputs[:count], inputs[count : count + 2], inputs[count + 2 : -2], inputs[-2:]
        joined, weight = (parts[0] if concatenated else torch.cat(parts, dim) for parts, dim in ((qkv, -1), (weights, 0)))
        mixed, _ = causal_conv1d(x=joined, weight=weight, bias=None, activation="silu", backend="triton")
        q, k, v = mixed.split([H * K, H * K, H * V], dim=-1)
        return rule(q.unflatten(-1, (H, K)), k.unflatten(-1, (H, K)), v.unflatten(-1, (H, V)), a, b, *gates)

    return call


# --- one token ------------------------------------------------------------------------------------------------------------


def gdn_step() -> Callable[..., object]:
    from gdn.ops import gated_delta_rule_step

    return lambda *inputs: gated_delta_rule_step(*inputs, backend="triton")


def fla_step() -> Callable[..., object]:
    """Returns output and new state: FLA does not write the state in place. Its layer keeps it V first."""
    from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule

    def call(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> object:
        token = [x.unsqueeze(1) for x in (q, k, v, g, beta)]
        return fused_recurrent_gated_delta_rule(*token, initial_state=state, output_final_state=True, state_v_first=True)

    return call


# --- the record ------------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "cuda": torch.version.cuda or ""}
    for name in ("gdn", "torch", "triton", "flash-linear-attention", "fla-core", "tilelang", "flash-qla", "flashinfer-python"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def rounded(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list):
        return [rounded(value) for value in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


def write(path: Path, record: Result) -> None:
    """Rows that were not run now stay as they are in the file, each with its own date, versions and ceilings."""
    if path.exists():
        old = json.loads(path.read_text())
        record = old | record | {"results": old.get("results", {}) | record["results"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(record), indent=2) + "\n")
    print(f"\nwritten: {path}")
