"""The published table on a GPU: `gdn eval` from process start and warm, time outside the GPU; and HFLM with fla's model.

    python benchmarks/eval_gpu.py DATA TOKENIZER --out FILE [--rows start,warm,busy,peer] [--minutes 9]
    python benchmarks/eval_gpu.py DATA TOKENIZER --out FILE --device cpu --small      # a rehearsal

DATA holds eval/ and ruler/, TOKENIZER the published tokenizer. The model has the published sizes and random weights in bf16:
its speed is a trained one's, but that it never ends a text early. Each row is added to FILE as soon as it is made, and what is
there is not made again. The rehearsal has a tiny model, few documents, and our own class for transformers in fla's place.
"""

import argparse
import gc
import importlib.util
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ |= {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
os.environ.pop("TRITON_INTERPRET", None)

import lm_eval.models  # noqa: F401  before ours, for its registry
import torch
from lm_eval.models.huggingface import HFLM
from rich.console import Console
from torch.autograd import DeviceType

from gdn.eval import harness, workers
from gdn.eval.scoring import Scorer
from gdn.evaluate import Options, evaluate
from gdn.model.config import ModelConfig
from gdn.model.lm import GatedDeltaNetLM, init_weights
from gdn.model.load import load_model, save_model

PUBLISHED = ModelConfig(
    vocab_size=32000, hidden_size=1024, num_heads=4, head_dim=256, expand_v=1.0, bos_token_id=1, eos_token_id=2
)
TINY = replace(PUBLISHED, hidden_size=32, num_hidden_layers=1, num_heads=1, head_dim=16, intermediate_size=32)
BATCH_SIZES = {"scored": (8, 16, 32, 64, 128, 256), "generated": (64, 128, 256)}  # a step takes as long for 1 as for 16 rows
# Documents of each task that the peer runs; the time for the others is taken to be in proportion to tokens.
SUBSET = {"hellaswag": 400, "piqa": 200, "arc_easy": 200, "arc_challenge": 100, "winogrande": 150, "lambada_openai": 400}
SUBSET |= {"boolq": 200, "copa": 100, "sciq": 100, "wikitext": 10, "wikitext_harness": 10}
GENERATED = 256  # of RULER's 500


class Rows:
    """The file of results: what has been measured so far."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        self.content = json.loads(path.read_text()) if path.exists() else {"about": about, "rows": {}}

    def add(self, name: str, row: dict[str, Any]) -> None:
        self.content["rows"][name] = row
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")
        print(json.dumps({name: row}), flush=True)

    def __contains__(self, name: str) -> bool:
        return name in self.content["rows"]

    def __getitem__(self, name: str) -> dict[str, Any]:
        row: dict[str, Any] = self.content["rows"][name]
        return row


class Clock:
    """Seconds that a language model of the harness spends on requests."""

    def __init__(self, lm: Any) -> None:
        self.seconds = 0.0
        for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(lm, name, self._timed(getattr(lm, name)))

    def _timed(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(requests: Any, **options: Any) -> Any:
            synchronize()
            began = time.perf_counter()
            answers = method(requests, disable_tqdm=True)
            synchronize()
            self.seconds += time.perf_counter() - began
            return answers

        return call


class CountingHFLM(HFLM):
    """HFLM that counts the tokens of its batches, padding included."""

    padded = 0

    def _model_call(self, inps: torch.Tensor, **options: Any) -> torch.Tensor:
        self.padded += inps.numel()
        return super()._model_call(inps, **options)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def write_model(config: ModelConfig, tokenizer: Path, folder: Path) -> Path:
    model = GatedDeltaNetLM(config)
    init_weights(model, "mamba", 0)
    folder.mkdir()
    save_model(model, folder, dtype=torch.bfloat16)
    for path in tokenizer.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def numbers(tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    kept = ("documents", "value", "seconds", "seconds_loading", "tokens_computed", "tokens_asked")
    total = {key: sum(task[key] for task in tasks.values()) for key in ("tokens_computed", "tokens_asked")}
    return total | {"tasks": {name: {key: task[key] for key in kept} for name, task in tasks.items()}}


def from_start(args: argparse.Namespace, folder: Path, rows: Rows) -> None:
    """`gdn eval` as a command, twice: its kernels not compiled before, and compiled."""
    with tempfile.TemporaryDirectory() as name:
        cache = {"TRITON_CACHE_DIR": f"{name}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{name}/inductor"}
        for row in ("start, kernels to compile", "start, kernels compiled"):
            out = Path(name) / row.replace(" ", "-")
            command = [sys.executable, "-m", "gdn", "--quiet", "eval", str(folder), "--data", str(args.data)]
            command += ["--out", str(out), "--device", args.device]
            command += ["--limit", str(args.limit)] if args.limit else []
            command += ["--workers", str(args.workers)]
            began = time.perf_counter()
            done = subprocess.run(command, env=os.environ | cache, capture_output=True, text=True, check=False)
            seconds = time.perf_counter() - began
            if done.returncode:
                rows.add(row, {"failed": done.returncode, "stderr": done.stderr[-2000:]})
                return
            tasks = json.loads((out / "results.json").read_text())["tasks"]
            inside = sum(task["seconds"] for task in tasks.values())
            rows.add(row, {"seconds": seconds, "seconds in tasks": inside} | numbers(tasks))


def warm(args: argparse.Namespace, folder: Path, rows: Rows) -> None:
    """The whole of `evaluate` in a process that has run it once, the model loaded again and workers started each time."""
    options = Options(data=args.data, limit=args.limit, workers=args.workers)
    with tempfile.TemporaryDirectory() as name:
        found = []
        for turn in range(1 + args.repetitions):
            began = time.perf_counter()
            with noted_turns(began) as turns:
                tasks = evaluate(folder, options, Path(name) / str(turn), torch.device(args.device), Console(quiet=True))
                synchronize()
            found.append(time.perf_counter() - began)
            memory = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
            row = {"seconds of the first": found[0], "seconds": found[1:], "peak memory, GB": memory}
            row |= {"the model's process": turns} if args.workers > 1 else {}
            if turn:
                rows.add("warm", row | numbers(tasks))


@contextmanager
def noted_turns(began: float) -> Iterator[dict[str, Any]]:
    """What the process with the model does beside workers, seconds from `began`; an answer takes messages in too."""
    answer, take, team = workers._Team.answer, workers._Team.take, workers._Team
    turns: dict[str, Any] = {"answering": 0.0, "taking": 0.0, "waiting": 0.0, "answers": []}

    def noted_answer(self: Any, scorer: Any) -> None:
        start, asked = time.perf_counter(), set(self.asks)
        answer(self, scorer)
        synchronize()
        names = [self.works[self.running[one]].name for one in asked - set(self.asks) if one in self.running]
        turns["answers"].append([*names, round(start - began, 2), round(time.perf_counter() - began, 2)])
        turns["answering"] += time.perf_counter() - start

    def noted_take(self: Any, timeout: float | None) -> None:
        start = time.perf_counter()
        take(self, timeout)
        turns["taking" if timeout == 0 else "waiting"] += time.perf_counter() - start

    team.answer, team.take = noted_answer, noted_take  # type: ignore[method-assign]
    try:
        yield turns
    finally:
        team.answer, team.take = answer, take  # type: ignore[method-assign]


def busy(args: argparse.Namespace, folder: Path, rows: Rows) -> None:
    """How long a kernel ran, task by task, from a trace of all kernels; the wall clock is that of a run without the trace."""
    device = torch.device(args.device)
    tokenizer = harness.load_tokenizer(folder)
    lm = harness.adapt(Scorer(load_model(folder, dtype=torch.bfloat16, device=device).requires_grad_(False)), tokenizer)
    tasks: dict[str, Any] = rows["busy"]["tasks"] if "busy" in rows else {}
    for work in harness.plan(["card"]):
        if work.name in tasks:
            continue
        harness.run_task(lm, work, tokenizer, data=args.data, limit=20)
        synchronize()
        began = time.perf_counter()
        harness.run_task(lm, work, tokenizer, data=args.data, limit=args.limit)
        synchronize()
        wall = time.perf_counter() - began
        kind = torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[kind]) as trace:
            harness.run_task(lm, work, tokenizer, data=args.data, limit=args.limit)
            synchronize()
        running, kernels = _covered(trace, DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU)
        tasks[work.name] = {"seconds": wall, "kernel seconds": running, "kernels": kernels}
        seconds, kernel = (sum(task[key] for task in tasks.values()) for key in ("seconds", "kernel seconds"))
        total = {"seconds": seconds, "kernel seconds": kernel, "share outside the GPU": 1 - kernel / seconds}
        rows.add("busy", total | {"tasks": dict(tasks), "all tasks": len(tasks) == len(harness.plan(["card"]))})


def _covered(trace: torch.profiler.profile, kind: DeviceType) -> tuple[float, int]:
    """Seconds in which at least one kernel or copy ran, and how many there were."""
    assert trace.profiler is not None and trace.profiler.kineto_results is not None
    events = trace.profiler.kineto_results.events()
    spans = sorted((e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.device_type() == kind)
    covered, end = 0, 0
    for begin, stop in spans:
        covered += max(0, stop - max(begin, end))
        end = max(end, stop)
    return covered / 1e9, len(spans)


def peer_model(args: argparse.Namespace, folder: Path) -> tuple[Any, str]:
    """fla's model with our weights; in a rehearsal without it our own class for transformers."""
    weights = load_model(folder, dtype=torch.bfloat16, device=torch.device(args.device))
    config = json.loads((folder / "config.json").read_text())
    if args.small and (args.device == "cpu" or importlib.util.find_spec("fla") is None):
        from gdn.hf import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

        name = "stand-in: gdn.hf"
    else:
        from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

        name = f"flash-linear-attention {version('flash-linear-attention')}"
    known = {key: value for key, value in config.items() if key not in ("architectures", "model_type", "dtype")}
    model = GatedDeltaNetForCausalLM(GatedDeltaNetConfig(**known)).to(torch.bfloat16)
    missing = model.load_state_dict(weights.state_dict(), strict=False)
    assert not missing.missing_keys and not missing.unexpected_keys, missing
    return model.to(args.device).eval(), name


def peer(args: argparse.Namespace, folder: Path, rows: Rows) -> None:
    """HFLM beside our adapter on the same first documents of each task, and what its whole table would take.

    A task's time is extrapolated by its tokens without padding or sharing; only requests are timed, not the harness's work.
    """
    tokenizer = harness.load_tokenizer(folder)
    model, name = peer_model(args, folder)
    hflm = CountingHFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, backend="causal", max_length=2048)
    ours = harness.adapt(
        Scorer(load_model(folder, dtype=torch.bfloat16, device=torch.device(args.device)).requires_grad_(False)), tokenizer
    )
    clocks = {"gdn": Clock(ours), "hflm": Clock(hflm)}

    def run(which: str, work: harness.Work, limit: int) -> dict[str, Any]:
        lm = ours if which == "gdn" else hflm
        clocks[which].seconds, hflm.padded = 0.0, 0
        return harness.run_task(lm, work, tokenizer, data=args.data, limit=limit)

    def fitting(work: harness.Work, limit: int) -> dict[str, Any]:
        """At half the batch size, and half of that, where the memory is not enough."""
        while True:
            try:
                return run("hflm", work, limit)
            except torch.OutOfMemoryError:
                if hflm.batch_size_per_gpu == 1:
                    raise
            hflm.batch_size_per_gpu //= 2
            gc.collect()
            torch.cuda.empty_cache()

    def best_size(kind: str, work: harness.Work, limit: int) -> tuple[int, dict[str, float]]:
        found: dict[int, float] = {}
        for size in BATCH_SIZES[kind]:
            hflm.batch_size_per_gpu = size
            try:
                run("hflm", work, min(limit, size))  # kernels compile, and memory is taken
                run("hflm", work, limit)
            except torch.OutOfMemoryError:
                gc.collect()
                torch.cuda.empty_cache()
                break
            found[size] = clocks["hflm"].seconds
        return min(found, key=lambda size: found[size]), {str(size): seconds for size, seconds in found.items()}

    works, small = harness.plan(["card"]), args.limit or 1000
    if "peer, batch sizes" not in rows:
        scored, asked = next(w for w in works if w.name == "hellaswag"), next(w for w in works if w.length)
        trials = {
            "scored": best_size("scored", scored, min(100, small)),
            "generated": best_size("generated", asked, min(GENERATED, small)),
        }
        sizes = {kind: {"best": size, "seconds by size": seconds} for kind, (size, seconds) in trials.items()}
        rows.add("peer, batch sizes", {"model": name, **sizes})
    best = {kind: rows["peer, batch sizes"][kind]["best"] for kind in BATCH_SIZES}
    tasks: dict[str, Any] = rows["peer"]["tasks"] if "peer" in rows else {}
    for work in works:
        if work.name in tasks:
            continue
        limit = min(small, GENERATED if work.length else SUBSET[work.name])
        hflm.batch_size_per_gpu = best["generated" if work.length else "scored"]
        run("gdn", work, limit)  # kernels for these shapes compile
        fitting(work, limit)
        mine = run("gdn", work, limit)
        seconds = clocks["gdn"].seconds
        theirs = fitting(work, limit)
        row = {
            "date": date.today().isoformat(),
            "documents": mine["documents"],
            "tokens_asked": mine["tokens_asked"],
            "tokens of gdn": mine["tokens_computed"],
        }
        row |= {"tokens of hflm, padded": hflm.padded, "batch size": hflm.batch_size_per_gpu, "gdn seconds": seconds}
        row |= {"hflm seconds": clocks["hflm"].seconds, "values": [mine["value"], theirs["value"]]}
        if "warm" in rows:
            whole = rows["warm"]["tasks"][work.name]["tokens_asked"] / mine["tokens_asked"]
            row |= {"whole task is so many times these tokens": whole, "hflm seconds, whole": clocks["hflm"].seconds * whole}
        tasks[work.name] = row
        total = {key: sum(task.get(key, 0.0) for task in tasks.values()) for key in ("gdn seconds", "hflm seconds")}
        total |= {"hflm seconds, whole": sum(task.get("hflm seconds, whole", 0.0) for task in tasks.values())}
        rows.add("peer", {"model": name, "complete": len(tasks) == len(works), **total, "tasks": dict(tasks)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", default="start,warm,busy,peer")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1, help="of gdn eval, in start and warm")
    parser.add_argument("--limit", type=int, help="documents of each task (default: all)")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin no row after so many")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    args.limit = args.limit or (2 if args.small else None)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    began = time.monotonic()
    about = {"what": "the published table, random weights in bf16" + (", rehearsal: tiny model" if args.small else "")}
    about |= {"command": " ".join(["python", *sys.argv]), "date": date.today().isoformat(), "cores": os.cpu_count()}
    about |= {"machine": torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()}
    about["versions"] = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "lm_eval", "datasets", "flash-linear-attention"):
        try:
            about["versions"][package] = version(package)
        except PackageNotFoundError:
            about["versions"][package] = None
    rows = Rows(args.out, about)
    measures = {"start": from_start, "warm": warm, "busy": busy, "peer": peer}
    with tempfile.TemporaryDirectory() as name:
        folder = write_model(TINY if args.small else PUBLISHED, args.tokenizer, Path(name) / "model")
        for row in args.rows.split(","):
            if time.monotonic() - began > 60 * args.minutes:
                print(f"{row}: not begun, {args.minutes} minutes have passed", flush=True)
                continue
            if row in ("start", "warm") and any(name.split(",")[0] == row for name in rows.content["rows"]):
                continue
            measures[row](args, folder, rows)


if __name__ == "__main__":
    main()
