"""Compiles the GPU kernels ahead of time, without a GPU: `python compile_kernels.py 86 [--all]` prints JSON of what they need.

Run by `test_kernel_compile.py`, in a process of its own: there Triton must not be in its interpreter.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile, make_backend
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from gdn.ops import (
    triton_backward,
    triton_chain,
    triton_configs,
    triton_cross_entropy,
    triton_draw,
    triton_float8,
    triton_forward,
    triton_gates,
    triton_layer_step,
    triton_linear,
    triton_norm,
    triton_pending,
    triton_rows,
    triton_segments,
    triton_step,
    triton_swiglu,
)
from gdn.ops import triton_short_conv as conv
from gdn.ops import triton_short_conv_backward as conv_backward
from gdn.ops.pending import SLOTS, slot_size

SHARED = {80: 163, 86: 99, 89: 99, 90: 227}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
PTXAS = Path(triton.backends.nvidia.__file__).parent / "bin" / "ptxas"


def signature(kernel: Any, values: dict[str, Any], constants: dict[str, Any]) -> tuple[dict, dict, dict]:
    """What a launch with such arguments would be compiled for: types, constants, and what 16 divides."""
    types: dict[str, str] = {}
    constant: dict[tuple[int], Any] = {}
    divisible = {}
    for place, name in enumerate(kernel.arg_names):
        value = constants.get(name, values.get(name))
        if name in constants or value is None:
            types[name], constant[(place,)] = "constexpr", value
            continue
        types[name] = value
        if value.startswith("*") or (value == "i32" and not kernel.params[place].do_not_specialize):
            divisible[(place,)] = [["tt.divisibility", 16]]
    return types, constant, divisible


def compiled(arch: int, kernel: Any, values: dict[str, Any], constants: dict[str, Any], **options: Any) -> dict[str, Any]:
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, *signature(kernel, values, constants))
    target = GPUTarget("cuda", arch, 32)
    translate_where_all_numbers_are_1(target, kernel, values, constants, options)
    result = compile(source, target=target, options=options)
    report = {"kernel": kernel.__name__, "shared": result.metadata.shared, "lines": result.asm["ptx"].count("\n")}
    if kernel.is_gluon() or values.get("x_blocks"):
        with tempfile.NamedTemporaryFile(suffix=".ptx") as file:
            Path(file.name).write_text(result.asm["ptx"])
            command = [PTXAS, "-v", f"--gpu-name=sm_{arch}a", file.name, "-o", "/dev/null"]
            said = subprocess.run(command, capture_output=True, text=True, check=True)
        report["serialised"] = "Potential Performance Loss" in said.stdout + said.stderr
    return report


def translate_where_all_numbers_are_1(
    target: GPUTarget, kernel: Any, values: dict[str, Any], constants: dict[str, Any], options: dict[str, Any]
) -> None:
    """Triton makes constants of arguments that are 1 (one row, one head, one chunk): the kernel must make sense with them."""
    ones = {p.name: 1 for p in kernel.params if values.get(p.name) == "i32" and not p.do_not_specialize}
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, *signature(kernel, values, constants | ones))
    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    parsed = backend.parse_options(options)
    source.make_ir(target, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context)


def tile(*block: int, dtype: str = "bf16") -> str:
    layout = gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16)
    return f"tensordesc<{dtype}{list(block)},{gl.NVMMASharedLayout(0, 32, 2) if dtype == 'fp32' else layout!r}>"


def rule_kernels(arch: int, K: int, V: int, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    x, narrow, BK = "*" + NAMES[dtype], dtype != torch.float32, min(K, 128)
    precision = "tf32" if narrow else "ieee"
    table = {
        kernel: triton_configs.choose(kernel, narrow, K if kernel == "intra" else V, SHARED[arch] * 1024)
        for kernel in ("intra", "states", "d_states", "d_initial", "gradients")
    }
    arrays = dict.fromkeys(("q", "k", "v", "A", "P", "o", "X", "states", "do", "dv", "d_states", "dq", "dk"), x)
    values = arrays | dict.fromkeys(("g", "beta", "gates", "partial", "dg", "dbeta"), "*fp32")
    values |= dict.fromkeys(("T", "per_row", "N", "count"), "i32") | {"scale": "fp32"}
    sizes = {"H": 4, "HV": 4, "K": K}
    wide = sizes | {"V": V, "BK": BK, "PRECISION": precision}
    yield compiled(
        arch, triton_forward._intra, values, sizes | {"BK": table["intra"].block, "MIN_G": -104.0}, **table["intra"].launch()
    )
    forms = [values, values | {"X": None, "states": None, "final_state": "*fp32"}]
    forms.append(forms[1] | {"final_state": None, "initial_state": "*fp32", "initial_rows": "*i64"})
    if narrow:  # whose forward has a product more in float16
        forms.append(values | dict.fromkeys(arrays, "*fp16"))
    for saved in forms:
        yield compiled(arch, triton_forward._states, saved, wide | {"BV": table["states"].block}, **table["states"].launch())
    config = table["d_states"]
    yield compiled(arch, triton_backward._d_states, values, wide | {"BV": config.block}, **config.launch())
    config = table["d_initial"]
    ends = values | {"d_initial": "*fp32"}
    yield compiled(arch, triton_backward._d_initial, ends, wide | {"BK": 64, "BV": config.block}, **config.launch())
    config = table["gradients"]
    tile = {"BK": BK if narrow else 64, "BV": config.block}
    yield compiled(arch, triton_backward._gradients, values, wide | tile, **config.launch())


def other_kernels(arch: int, K: int) -> Iterator[dict[str, Any]]:
    x, f = "*bf16", "*fp32"
    numbers = dict.fromkeys(("T", "per_row", "N", "count", "strips", "tokens", "values", "column_a", "column_b"), "i32")
    strides = ("stride_b", "stride_t", "dproj_stride_b", "dproj_stride_t", "state_stride_b", "state_stride_w")
    numbers |= dict.fromkeys(strides, "i32") | {"H": "i32"}
    rule = {"partial": f, "gates": f, "dg": f, "dbeta": f} | numbers
    yield compiled(arch, triton_backward._finish, rule, {"HV": 4, "PARTS": K // 64}, num_warps=2)
    chain = {"M": f, "L": f, "first": f, "out": f, "count": "i32"}
    yield compiled(arch, triton_segments._chain, chain, {"HV": 4, "K": K, "V": K, "REVERSE": False}, num_warps=4)
    step = dict.fromkeys(("q", "k", "v", "o"), x) | dict.fromkeys(("g", "beta", "state"), f) | {"scale": "fp32"}
    step |= {name: "i32" for name in triton_step._step.arg_names if name.endswith(("_row", "_head"))}
    constants = {"H": 4, "HV": 4, "K": K, "V": K, "BV": 32, "EVICT_FIRST": False}
    yield compiled(arch, triton_step._step, step, constants, num_warps=triton_step.CONFIG.num_warps)
    layer = dict.fromkeys(("proj", "q", "k", "v", "dq", "dk", "dv", "dproj"), x) | numbers
    layer |= dict.fromkeys(("weight", "partials", "A_log", "dt_bias", "g", "beta", "dg", "dbeta", "state"), f)
    strip = {"K": K, "W": 4, "U": conv.tokens_unrolled(4), "UNIT": 8}
    for kernel, L, warps, stages in (
        (conv._conv_forward, conv.FORWARD_TOKENS, conv.FORWARD_WARPS, conv.FORWARD_STAGES),
        (
            conv_backward._conv_backward,
            conv_backward.BACKWARD_TOKENS,
            conv_backward.BACKWARD_WARPS,
            conv_backward.BACKWARD_STAGES,
        ),
    ):
        constants = strip | {"S": conv.strips_per_program(K, warps), "L": L, "STAGES": stages}
        yield compiled(arch, kernel, layer, constants, num_warps=warps)
    constants = {"K": K, "W": 4, "UNIT": 8, "HV": 4, "BLOCK_HV": 4, "DOUBLE": False}
    yield compiled(arch, conv._conv_step, layer, constants, num_warps=conv.STEP_WARPS)
    for kernel in (triton_gates._gates_forward, triton_gates._gates_backward):
        constants = {"HV": 4, "BLOCK_T": 256, "BLOCK_HV": 4, "DOUBLE": False}
        yield compiled(arch, kernel, layer, constants, num_warps=triton_gates.NUM_WARPS)


def products(arch: int, product: str, rows: int, dtype: str = "bf16") -> dict[str, Any]:
    """A product of decoding, of the published size, by the tile for so many rows."""
    x, f = "*" + dtype, "*fp32"
    bytes_, given = {"bf16": (2, 2), "fp16": (2, 4), "fp32": (4, 4)}[dtype]
    N, K, size = {
        "projections": (4104, 1024, 256),
        "output": (1024, 1024, 256),
        "ffn": (5632, 1024, 256),
        "down": (1024, 2816, 256),
        "head": (32000, 1024, 1024),
    }[product]
    given = bytes_ if product == "down" else given
    tile = triton_linear.tile_for(product, rows, K // size, size, bytes_, given, SHARED[arch] * 1024)
    values = dict.fromkeys(("x", "weight", "out", "next_h", "window", "conv"), x) | {"arrived": "*i32", "rows": "i32"}
    values |= {"x": f if given == 4 else x, "next_h": x if dtype == "bf16" else f}  # rows that are yet to be scaled
    values |= dict.fromkeys(("squares", "residual", "norm", "next_squares", "parts"), f) | {"eps": "fp32", "bias": None}
    absent = {"residual", "norm", "next_h", "next_squares", "parts", "arrived", "window", "conv"}
    own: dict[str, Any] = {"SUMS": 64, "HEADS": 1, "GROUP": K // size, "W": 1, "D": 1}
    if product in ("output", "down"):
        absent = {"out", "window", "conv"}
        own |= {"GROUP": triton_linear.group(K // size)}
        own |= {"HEADS": 4, "SUMS": 8} if product == "output" else {"HEADS": 0, "SUMS": 0}
    elif product == "projections":
        absent -= {"window", "conv"}
        own |= {"W": 4, "D": 3072}
    values |= dict.fromkeys(absent) | ({"squares": None} if product == "down" else {})
    values |= {"out": f} if product in ("projections", "head") else {}
    values |= dict.fromkeys(("x_blocks", "weight_blocks"))
    if tile.copied and arch >= 90:
        halves = 2 if product == "ffn" else 1
        values["x_blocks"] = f"tensordesc<{values['x'][1:]}[{tile.rows},{tile.columns}]>"
        values["weight_blocks"] = f"tensordesc<{dtype}[{halves},{tile.weight_rows // halves},{tile.columns}]>"
    triton_chain.hopper = lambda device: arch >= 90
    chain = triton_chain.link(torch.device("cuda"), rows=rows)
    own |= {"N": N, "K": K, "SEGMENT": size, "TO": product, "SPLIT": tile.split, "CHAINED": chain.pop("CHAINED")}
    own |= {"BB": tile.rows, "BN": tile.weight_rows, "BK": tile.columns}
    report = compiled(arch, triton_linear._linear, values, own, num_warps=tile.num_warps, num_stages=tile.stages, **chain)
    if dtype == "fp16" and product == "ffn":  # come one by one, copied or not: its rows are rounded from float32 first
        report.pop("serialised", None)
    return report | {"allowed": tile.bytes(K // size, size, bytes_, given)}


def decoding_kernels(arch: int) -> Iterator[dict[str, Any]]:
    """Of the published size, for few rows and for many."""
    x, f, chained = "*bf16", "*fp32", {"CHAINED": arch >= 90}
    warps = {"num_warps": 4} | ({"launch_pdl": True} if arch >= 90 else {})
    values = dict.fromkeys(("h", "embeddings"), x) | {"ids": "*i32", "arrived": "*i32"}
    values |= dict.fromkeys(("projected", "squares", "noise", "x", "logits", "chunks", "state", "norm"), f)
    values |= dict.fromkeys(("A_log", "dt_bias"), f) | dict.fromkeys(("seeds", "position", "result"), "*i64")
    values |= dict.fromkeys(("rows", "V", "columns", "count", "top_k"), "i32")
    values |= dict.fromkeys(("scale", "inverse", "top_p"), "fp32")
    sizes: dict[str, Any] = {"K": 1024, "WIDTH": 1024, "SIZE": 16}
    yield compiled(arch, triton_rows._embed, values | {"ids": "*i64"}, sizes | chained, **warps)
    for product, tiles in triton_linear.TILES.items():
        for rows in tiles:
            yield products(arch, product, rows)
            if rows in (16, 64):
                yield from (products(arch, product, rows, dtype) for dtype in ("fp16", "fp32"))
    sizes = {"STRIDE": 4104, "H": 4, "HV": 4, "K": 256, "V": 256, "BV": 32, "GATED": True, "DOUBLE": False}
    sizes |= {"P": slot_size(256, 256), "SLOTS": SLOTS, "EVICT_FIRST": True}
    values |= {"pending": f, "recurrent": f, "first": "i32", "layer": "i32", "pending_layer": "i32"}
    two = warps | {"num_warps": triton_layer_step.NUM_WARPS}
    yield compiled(arch, triton_layer_step._layer_step, values, sizes | chained, **two)
    many = {"num_warps": triton_layer_step.NUM_WARPS}
    yield compiled(arch, triton_layer_step._layer_step, values, sizes | {"CHAINED": False, "EVICT_FIRST": False}, **many)
    yield compiled(arch, triton_pending._settle, values, {name: sizes[name] for name in ("HV", "K", "V", "P", "SLOTS", "BV")})
    yield compiled(arch, triton_draw._candidates, values, {"NOISE": True, "BLOCK": triton_draw._BLOCK} | chained, **warps)
    for top_k, top_p in ((False, True), (True, True)):
        chunks = {"CHUNKS": 16, "CHUNK": triton_draw._BLOCK}
        sizes = {"TOP_K": top_k, "TOP_P": top_p, **chunks, "BLOCK": triton_draw._LARGEST_BLOCK} | chained
        yield compiled(arch, triton_draw._choose, values, sizes, **warps | {"num_warps": 16})
    yield compiled(arch, triton_draw._noise, values, {"BLOCK": triton_draw._BLOCK}, num_warps=4)


def copied_products() -> Iterator[dict[str, Any]]:
    """Of the published size, for many rows, those of the table that Hopper's engine copies."""
    for product, tiles in triton_linear.TILES.items():
        yield from (products(90, product, rows) for rows, tile in tiles.items() if tile.copied)


def training_kernels(arch: int) -> Iterator[dict[str, Any]]:
    """Around the rule, of the published width."""
    names = "x branch normed total total_again d d_residual dx o proj y dy do dproj joined out d_joined logits"
    values = dict.fromkeys(names.split(), "*bf16") | dict.fromkeys(("weight", "partials", "losses"), "*fp32")
    values |= dict.fromkeys(("rows", "D", "stride", "start", "F", "V"), "i32") | {"eps": "fp32", "labels": "*i64"}
    norm = triton_norm
    for kernel, rows, warps in (
        (norm._norm_forward, norm.FORWARD_ROWS, norm.FORWARD_WARPS),
        (norm._norm_backward, norm.BACKWARD_ROWS, norm.BACKWARD_WARPS),
    ):
        constants = {"BLOCK": 1024, "ROWS": rows, "STAGES": norm.BACKWARD_STAGES}
        yield compiled(arch, kernel, values, constants, num_warps=warps)
    for kernel, rows, warps in (
        (norm._gated_norm_forward, norm.GATED_FORWARD_ROWS, norm.GATED_FORWARD_WARPS),
        (norm._gated_norm_backward, norm.GATED_BACKWARD_ROWS, norm.GATED_BACKWARD_WARPS),
    ):
        sizes = {"HV": 4, "V": 256, "BLOCK_HV": 4, "BLOCK_V": 256, "UNIT": 8, "STAGES": norm.GATED_BACKWARD_STAGES}
        yield compiled(arch, kernel, values, sizes | {"ROWS": rows}, num_warps=warps)
    tile = {"ROWS": triton_swiglu.ROWS, "COLUMNS": triton_swiglu.COLUMNS}
    for kernel in (triton_swiglu._swiglu_forward, triton_swiglu._swiglu_backward):
        yield compiled(arch, kernel, values, tile, num_warps=triton_swiglu.NUM_WARPS)
    constants = {"IGNORED": -100, "GRADIENTS": True, "COLUMNS": triton_cross_entropy.COLUMNS}
    yield compiled(arch, triton_cross_entropy._cross_entropy, values, constants, num_warps=triton_cross_entropy.NUM_WARPS)
    values = values | {"totals": "*fp32", "best": "*i64"}
    constants = {"COLUMNS": triton_cross_entropy.COLUMNS}
    yield compiled(arch, triton_cross_entropy._row_scores, values, constants, num_warps=triton_cross_entropy.NUM_WARPS)


def float8_kernels(arch: int) -> Iterator[dict[str, Any]]:
    """Of the FFN of the published width; GPUs before 8.9 have none."""
    values = dict.fromkeys(("x", "branch", "total", "joined", "d", "d_joined"), "*bf16") | {"weight": "*fp32", "eps": "fp32"}
    values |= dict.fromkeys(("values", "normed"), "*fp8e4nv") | {"scales": "*fp32"} | dict.fromkeys(("rows", "D", "F"), "i32")
    for width in (1024, 2816, 5632):  # a residual, and the transposed weights' rows
        constants = {"BLOCK": triton.next_power_of_2(width)}
        yield compiled(arch, triton_float8._cast_rows, values, constants, num_warps=triton_float8.warps(width))
    constants = {"BLOCK": 1024, "ROWS": triton_norm.FORWARD_ROWS}
    yield compiled(arch, triton_norm._norm_forward, values, constants, num_warps=triton_norm.FORWARD_WARPS)
    for kernel in (triton_swiglu._swiglu_forward_float8, triton_swiglu._swiglu_backward_float8):
        yield compiled(arch, kernel, values, {"BLOCK": 4096}, num_warps=triton_swiglu.FLOAT8_WARPS)


def hopper_kernels(K: int, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    from gdn.ops import triton_hopper_gradients, triton_hopper_states

    name, V, BK = NAMES[dtype], max(K, 128), min(K, 128)
    token, square, key = (tile(*block, dtype=name) for block in ((1, 64, 64), (64, 64), (1, 64, BK)))
    vector, x = tile(1, 64, dtype="fp32"), "*" + name
    values = {"k_in": key, "q_in": key, "A_in": square, "P_in": square, "values_in": token, "gates_in": vector, "out": token}
    values |= {"gates_pointer": "*fp32", "scale": "fp32", "T": "i32", "per_row": "i32"}
    sizes = {"H": 4, "HV": 4, "K": K, "V": V}
    saved, ends = {"states": x}, {"states": x, "first_state": "*fp32", "last_state": "*fp32"}
    forms: tuple[tuple[dict[str, Any], bool], ...] = (saved | {"X_out": token}, False), ({}, False), (saved, True), (ends, True)
    for extra, reverse in forms[:1] if dtype == torch.float16 else forms:  # in float16 the forward alone is different
        constants = sizes | {"BK": BK, "REVERSE": reverse}
        yield compiled(90, triton_hopper_states._states, values | extra, constants, num_warps=4, maxnreg=168)
    if K >= 128 and dtype != torch.float16:
        tiles = dict.fromkeys(("q_in", "k_in", "X_in", "do_in", "dv_in"), token) | {"S_in": square, "D_in": square}
        values = tiles | {"gates_in": vector, "dq": x, "dk": x, "partial": "*fp32", "scale": "fp32"}
        values |= dict.fromkeys(("tiles", "tiles_in_all", "T", "per_row"), "i32")
        yield compiled(90, triton_hopper_gradients._gradients, values, sizes, num_warps=4, maxnreg=168)


def main() -> None:
    arch, every = int(sys.argv[1]), "--all" in sys.argv
    found: list[dict[str, Any]] = []

    def take(K: int, dtype: torch.dtype, reports: Iterator[dict[str, Any]]) -> None:
        found.extend(report | {"K": K, "dtype": NAMES[dtype]} for report in reports)

    for K in (64, 128, 256) if every else (128, 256) if arch == 90 else (256,):
        if arch == 90:
            for dtype in (torch.bfloat16, torch.float16):
                take(K, dtype, hopper_kernels(K, dtype))
        if K == 256 and arch >= 89:
            take(K, torch.bfloat16, float8_kernels(arch))
        if arch == 90 and not every:  # compiling the others for it takes a minute
            if K == 256:
                take(K, torch.bfloat16, copied_products())
                take(K, torch.float32, rule_kernels(arch, K, K, torch.float32))
            continue
        take(K, torch.bfloat16, rule_kernels(arch, K, K, torch.bfloat16))
        take(K, torch.bfloat16, other_kernels(arch, K))
        if K == 256:
            take(K, torch.bfloat16, decoding_kernels(arch))
            take(K, torch.bfloat16, training_kernels(arch))
        if every and (K < 256 or SHARED[arch] >= triton_configs.WIDE_KIB):
            take(K, torch.float32, rule_kernels(arch, K, K, torch.float32))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
