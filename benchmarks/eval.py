"""HellaSwag's first documents on a model of the quickstart's size: `gdn eval`'s adapter beside the harness's own HFLM.

    python benchmarks/eval.py DATA [--documents 500] [--out benchmarks/results/eval_cpu.json]

DATA holds eval/hellaswag_val.jsonl. Both score the same requests with the same weights in one process, in turns, HFLM at the
batch size that was best on a tenth of the documents. Tokens: what went through the model, padding included.
"""

import argparse
import json
import logging
import os
import platform
import sys
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("TRITON_INTERPRET", None)

import lm_eval.models  # noqa: F401  before ours, for its registry
import torch
from lm_eval.models.huggingface import HFLM

from gdn.data.tokenizer import train_bpe
from gdn.eval import harness, local
from gdn.eval.scoring import Scorer
from gdn.hf import GatedDeltaNetConfig, GatedDeltaNetForCausalLM
from gdn.model.config import ModelConfig
from gdn.model.lm import GatedDeltaNetLM, init_weights

BATCH_SIZES = (1, 4, 8, 16, 32, 64, 128)


def quickstart_model() -> GatedDeltaNetLM:
    """The quickstart's sizes; reading 2,048 tokens, for HellaSwag is cut at its 128."""
    config = ModelConfig(
        vocab_size=2305,
        hidden_size=128,
        num_hidden_layers=3,
        num_heads=2,
        head_dim=64,
        expand_v=1.0,
        intermediate_size=384,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GatedDeltaNetLM(config)
    init_weights(model, "mamba", 0)
    return model.eval()


class CountingHFLM(HFLM):
    """HFLM that counts the tokens of its batches, padding included."""

    tokens = 0

    def _model_call(self, inps: torch.Tensor, **options: Any) -> torch.Tensor:
        self.tokens += inps.numel()
        return super()._model_call(inps, **options)


def processor() -> str:
    found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{found[0].split(':')[1].strip()} ({torch.backends.cpu.get_cpu_capability()})" if found else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    work = harness.Work("hellaswag", "hellaswag")
    rows = local.read_documents("hellaswag", args.data).rows
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"gdn-bench-eval-{os.getpid()}"
    train_bpe([" ".join([row["ctx"], *row["endings"]]) for row in rows[-2000:]], 2305).save(folder)
    tokenizer = harness.load_tokenizer(folder)
    model = quickstart_model()
    theirs = GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**model.config.to_json()))
    theirs.load_state_dict(model.state_dict())
    hflm = CountingHFLM(pretrained=theirs.eval(), tokenizer=tokenizer, batch_size=1, device="cpu", backend="causal")
    ours = harness.adapt(Scorer(model), tokenizer)

    clock = {"model": 0.0, "cpu": 0.0}

    def timed(method: Any) -> Any:
        def call(requests: Any) -> Any:
            began, busy = time.perf_counter(), time.process_time()
            answers = method(requests, disable_tqdm=True)
            clock["model"], clock["cpu"] = time.perf_counter() - began, time.process_time() - busy
            return answers

        return call

    for lm in (ours, hflm):
        lm.loglikelihood = timed(lm.loglikelihood)  # type: ignore[method-assign]

    def seconds(lm: Any, documents: int) -> tuple[float, dict[str, Any]]:
        """What the requests took, text to scores; the harness's own work around them is the same for both."""
        result = harness.run_task(lm, work, tokenizer, data=args.data, limit=documents)
        return clock["model"], result

    seconds(ours, 10)
    trial = max(10, args.documents // 10)
    found = {}
    for size in BATCH_SIZES:
        hflm.batch_size_per_gpu = size
        found[size] = min(seconds(hflm, trial)[0] for _ in range(2))
        print(f"HFLM, batch size {size}: {found[size]:.2f} s for {trial} documents", flush=True)
    best = min(found, key=lambda size: found[size])
    hflm.batch_size_per_gpu = best

    times: dict[str, list[float]] = {"gdn": [], "hflm": []}
    busy: dict[str, list[float]] = {"gdn": [], "hflm": []}  # of the processor: what else runs on the machine counts less
    results = {}
    for _ in range(args.repeats):
        for name, lm in (("gdn", ours), ("hflm", hflm)):
            hflm.tokens = 0
            took, results[name] = seconds(lm, args.documents)
            times[name].append(took)
            busy[name].append(clock["cpu"])
            print(f"{name}: {took:.2f} s", flush=True)
    apart = max(
        abs(a[0] - b[0])
        for mine, other in zip(results["gdn"]["samples"], results["hflm"]["samples"])
        for a, b in zip(mine["responses"], other["responses"])
    )
    median = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    report = {
        "what": f"HellaSwag, first {args.documents} documents, quickstart-size model, float32",
        "command": "python benchmarks/eval.py DATA " + " ".join(sys.argv[2:]),
        "date": date.today().isoformat(),
        "machine": f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)",
        "load_average": os.getloadavg(),
        "versions": {name: version(name) for name in ("gdn", "torch", "transformers", "lm_eval")},
        "seconds": times,
        "processor_seconds": busy,
        "seconds_of_the_whole_task": {name: result["seconds"] for name, result in results.items()},
        "median_seconds": median,
        "speedup": median["hflm"] / median["gdn"],
        "speedup_of_the_best": min(times["hflm"]) / min(times["gdn"]),
        "speedup_in_processor_seconds": sorted(busy["hflm"])[args.repeats // 2] / sorted(busy["gdn"])[args.repeats // 2],
        "tokens": {"gdn": results["gdn"]["tokens_computed"], "hflm": hflm.tokens, "unpadded": results["gdn"]["tokens_asked"]},
        "hflm_batch_size": best,
        "hflm_seconds_by_batch_size": {str(size): value for size, value in found.items()},
        "largest_difference_of_a_score": apart,
        "acc_norm": {name: result["value"] for name, result in results.items()},
    }
    print(json.dumps(report, indent=2))
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
