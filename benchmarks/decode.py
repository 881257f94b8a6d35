"""Decoding and prefill of the published size with random weights: tokens/s, and the share of what the memory allows.

python benchmarks/decode.py [--device cpu|cuda] [--threads 2] [--tokens 40] [--repetitions 5] [--write]

The floor of a token is one read of the weights that it uses (all but the embedding table) and of the state, and one write of
the state, at the bandwidth measured here: the best of plain reads of 1 GiB. On a virtual machine memory may be half as fast in
the next second, so a repetition's share is of the better of the reads before and after it, is left out where those differ by a
seventh, and the median counts; a share of the run's best read stands beside it. A token is compiled where there is a C
compiler; "by operators" is the one by PyTorch's, in turn with it, whose one-row products have a rate of their own. Prefill runs
beside two stacks of transformers in the same process, turn by turn, in float32. Of several repetitions the quietest counts,
for all times: other work only ever adds to them.
On a GPU: `decode_gpu.py`.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3_5ForCausalLM, Qwen3_5TextConfig

from gdn.generation.cpu_products import product_with
from gdn.generation.cpu_token import CompiledToken
from gdn.generation.engine import decode_dtype, for_decoding, generate
from gdn.generation.engine import prefill as engine_prefill
from gdn.generation.sampling import Sampling
from gdn.hf import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
from gdn.model.config import ModelConfig
from gdn.model.lm import GatedDeltaNetLM, init_weights
from gdn.model.state import DecodeState

RESULT = Path(__file__).parent / "results" / "decode_{device}.json"
PUBLISHED = ModelConfig(hidden_size=1024, num_hidden_layers=21, num_heads=4, head_dim=256, expand_v=1.0)
PROMPT = 512
SAMPLING = Sampling(temperature=0.8, top_p=0.95)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=40, help="decoded in each repetition")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--write", action="store_true", help="also write benchmarks/results/decode_DEVICE.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    record = {
        "date": datetime.date.today().isoformat(),
        "command": "python benchmarks/decode.py " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("gdn", "torch", "transformers")},
        "units": "decode ms: a token of the quietest repetition (its median; on a GPU its mean); prefill ms: fastest; "
        "share: floor / ms; ratio: to gdn's",
        "parameters": PUBLISHED.num_parameters(),
        **(measure_cpu if args.device == "cpu" else measure_cuda)(args.tokens, args.repetitions),
    }
    text = json.dumps(record, indent=2)
    print(text)
    if args.write:
        Path(str(RESULT).format(device=args.device)).write_text(text + "\n", encoding="utf-8")


def measure_cpu(tokens: int, repetitions: int) -> dict[str, Any]:
    reads, products, decode = [read_bandwidth()], {}, {}  # type: ignore[var-annotated]
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        rates = [product_bandwidth(dtype)]
        model = published(dtype)
        chosen, _ = decode_dtype("cpu", dtype, compiled=CompiledToken.serves(model))
        if chosen == dtype:
            decode |= {f"{name}{way}": row for way, row in decoded(model, tokens, repetitions).items()}
            decode[name]["state"] = state_as_file(model)
        if dtype == torch.float32:
            decode["transformers generate, float32"] = through_transformers(model, tokens)
        reads.append(read_bandwidth())
        products[name] = max(*rates, product_bandwidth(dtype))
        del model
    for row in decode.values():
        reads += row.get("reads_beside_gb_s", [])
    for row in decode.values():
        if "megabytes_a_token" in row:
            row["share_of_best_read"] = round(row["megabytes_a_token"] / max(reads) / row["ms"], 3)
    bandwidth = {"best_read_gb_s": max(reads), "one_row_product_gb_s": products}
    return {"bandwidth": bandwidth, "decode": decode, "prefill": prefill(repetitions)}


def measure_cuda(tokens: int, repetitions: int) -> dict[str, Any]:
    from decode_gpu import measure_gpu

    return {"gpu": torch.cuda.get_device_name()} | measure_gpu(published(torch.bfloat16, "cuda"), tokens, repetitions, SAMPLING)


def published(dtype: torch.dtype, device: str = "cpu") -> GatedDeltaNetLM:
    model = GatedDeltaNetLM(PUBLISHED)
    init_weights(model, "mamba", seed=0)
    model.to(dtype)
    for layer in model.model.layers:
        layer.attn.A_log.data, layer.attn.dt_bias.data = layer.attn.A_log.data.float(), layer.attn.dt_bias.data.float()
    return for_decoding(model, device)


def decoded(model: GatedDeltaNetLM, tokens: int, repetitions: int) -> dict[str, dict[str, Any]]:
    """ms of a token through the engine, sampling included, compiled and by PyTorch's operators in turn; and what it moves."""
    weights = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("model.embeddings"))
    moved = (weights + 2 * model.new_state(1).nbytes) / 1e6
    ways = {"": CompiledToken.serves, ", by operators": lambda model: False}
    times, reads, shares = ({way: [] for way in ways} for _ in range(3))  # type: ignore[var-annotated]
    before = read_bandwidth()
    for repetition in range(repetitions):
        for way, serves in ways.items():
            with patch.object(CompiledToken, "serves", serves):
                stream = generate(model, [1, 2, 3, 4 + repetition], max_new_tokens=tokens + 1, sampling=SAMPLING)
                next(stream)
                ms = statistics.median(seconds(lambda stream=stream: next(stream)) * 1e3 for _ in range(tokens))
            after = read_bandwidth()
            times[way].append(round(ms, 2))
            reads[way].append(max(before, after))
            steady = min(before, after) > 0.85 * max(before, after)
            shares[way] += [round(moved / max(before, after) / ms, 3)] if steady else []
            before = after
    return {
        way: {
            "ms": min(times[way]),
            "tokens_per_second": round(1e3 / min(times[way]), 2),
            "share": statistics.median(shares[way]) if shares[way] else None,
            "repetitions_ms": times[way],
            "reads_beside_gb_s": reads[way],
            "shares": shares[way],
            "megabytes_a_token": round(moved, 1),
        }
        for way in ways
    }


def through_transformers(model: GatedDeltaNetLM, tokens: int) -> dict[str, float]:
    face = GatedDeltaNetForCausalLM(GatedDeltaNetConfig.from_model_config(model.config)).eval()
    face.load_state_dict(model.state_dict(), assign=True)
    ids = torch.tensor([[1, 2, 3]])
    run = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    short, long = (seconds(lambda n=n: face.generate(ids, max_new_tokens=n, **run)) for n in (2, tokens + 2))
    return {"tokens_per_second": round(tokens / (long - short), 2)}


def state_as_file(model: GatedDeltaNetLM) -> dict[str, float]:
    state = model.new_state(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        save = seconds(lambda: state.save(path, model))
        load = min(seconds(lambda: DecodeState.load(path, model)) for _ in range(5))
        return {
            "megabytes": round(path.stat().st_size / 1e6, 1),
            "save_ms": round(save * 1e3, 1),
            "load_ms": round(load * 1e3, 1),
        }


def prefill(repetitions: int) -> dict[str, Any]:
    """A prompt of 512 tokens and the last token's logits: gdn, transformers' Llama and transformers' own gated delta stack."""
    ids = torch.randint(PUBLISHED.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    own, narrow = published(torch.float32), published(torch.bfloat16)
    runs: dict[str, Callable[[], object]] = {
        "gdn": lambda: engine_prefill(own, ids[0], own.new_state(1)),
        "gdn, bfloat16": lambda: engine_prefill(narrow, ids[0], narrow.new_state(1)),
    }
    sizes = dict.fromkeys(runs, PUBLISHED.num_parameters())
    for name, peer in peers():
        runs[name] = lambda peer=peer: peer(ids, logits_to_keep=1, use_cache=False)
        sizes[name] = sum(parameter.numel() for parameter in peer.parameters())
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for turn in range(repetitions + 1):
            for name, run in runs.items():
                elapsed = seconds(run)
                times[name] += [elapsed] if turn else []  # the first turn warms up
    fastest = {name: min(values) for name, values in times.items()}
    return {
        name: {
            "parameters": sizes[name],
            "ms": round(value * 1e3, 1),
            "tokens_per_second": round(PROMPT / value, 1),
            "ratio": round(value / fastest["gdn"], 2),
        }
        for name, value in fastest.items()
    }


def peers() -> Iterator[tuple[str, nn.Module]]:
    """transformers models of about the same number of parameters, with random weights."""
    width = {"hidden_size": 1024, "intermediate_size": PUBLISHED.ffn_size, "vocab_size": PUBLISHED.vocab_size}
    # A layer of Llama has 12.8M parameters where ours has 13.9M: 23 layers for 21.
    llama = LlamaConfig(**width, num_hidden_layers=23, num_attention_heads=8, num_key_value_heads=8)
    yield "transformers Llama, 23 layers", LlamaForCausalLM(llama).eval()
    linear = {f"linear_{kind}_head_dim": 256 for kind in ("key", "value")} | {
        f"linear_num_{k}_heads": 4 for k in ("key", "value")
    }
    layers = {"num_hidden_layers": 21, "layer_types": ["linear_attention"] * 21, "num_attention_heads": 4}
    stack = Qwen3_5TextConfig(**width, **layers, **linear, num_key_value_heads=4, linear_conv_kernel_dim=4)
    yield "transformers Qwen3.5, 21 gated delta layers", Qwen3_5ForCausalLM(stack).eval()


def read_bandwidth() -> float:
    """GB/s: the best of summing and of dotting 1 GiB of float32."""
    x = torch.ones(1 << 28)
    half = x.view(2, -1)
    once = min(seconds(x.sum) for _ in range(8))
    twice = min(seconds(lambda: torch.dot(half[0], half[1])) for _ in range(8))
    return round(x.nbytes / min(once, twice) / 1e9, 2)


def product_bandwidth(dtype: torch.dtype) -> float:
    """GB/s of one-row products with weights that are in no cache, the best of eight rounds over 0.5 GB."""
    row, count, weight = torch.ones(1, 1024), (1 << 29) // (4096 * 1024 * dtype.itemsize), 4096 * 1024 * dtype.itemsize
    products = [product_with(torch.full((4096, 1024), 0.5, dtype=dtype)) for _ in range(count)]
    elapsed = min(seconds(lambda: [product(row) for product in products]) for _ in range(8))
    return round(count * weight / elapsed / 1e9, 2)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def machine() -> dict[str, Any]:
    name = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout
    models = [line.partition(":")[2].strip() for line in name.splitlines() if line.startswith("Model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "load_before": round(os.getloadavg()[0], 2),
    }


if __name__ == "__main__":
    main()
