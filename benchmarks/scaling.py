"""Tokens a second of `gdn train` on one and on more GPUs of this machine: the same recipe, data and global batch.

    python benchmarks/scaling.py SHARDS [a.b=value ...] [--gpus 1,2] [--steps 24] [--recipe recipes/gdn_360m_15b.toml]

Every count is the command itself, a plain process for one GPU and torchrun for more, in turns. A row of metrics
covers four steps; the median leaves out the first two rows of each turn. Writes benchmarks/results/scaling_GPU.json.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

EVERY = 4  # steps of a row: one a step would have the host wait in each
WARM_UP = 2  # rows


def measure(gpus: int, args: argparse.Namespace, turn: int, folder: Path) -> dict[str, object]:
    """One run of `gdn train`: its speed, memory and losses."""
    out = folder / f"{gpus}-{turn}"
    command = [sys.executable, "-m"]
    if gpus > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}", "-m"]
    command += ["gdn", "--quiet", "train", args.recipe, f"data.shards={args.shards}", f"train.steps={args.steps}"]
    command += [f"optim.warmup_steps={args.steps}", f"log.every={EVERY}", "checkpoint.keep=1", *args.overrides]
    visible = ",".join(str(i) for i in range(gpus))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", visible)}
    started = time.monotonic()
    subprocess.run([*command, "--out", str(out), "--device", args.device], check=True, env=environment)
    seconds = time.monotonic() - started
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "tokens_per_second" in row]
    speeds = [row["tokens_per_second"] for row in rows[WARM_UP:]]
    for file in out.rglob("*.safetensors"):  # gigabytes
        file.unlink()
    return {
        "gpus": gpus,
        "tokens_per_second": statistics.median(speeds),
        "all": speeds,
        "losses": [row["loss"] for row in rows],
        "last_row": rows[-1],
        "seconds_in_all": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", help="folder of `gdn prepare`, of the recipe's vocabulary")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value")
    parser.add_argument("--recipe", default="recipes/gdn_360m_15b.toml")
    parser.add_argument("--gpus", default="1,2")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--device", default="cuda", help="cpu tries the script itself")
    args = parser.parse_args()
    counts = [int(count) for count in args.gpus.split(",")]
    name = torch.cuda.get_device_name().split()[-1].lower() if torch.cuda.is_available() else "cpu"
    record = {
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.argv]),
    }
    runs: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(args.turns):
            for count in counts:
                runs.append(measure(count, args, turn, Path(folder)))
                record |= {"tokens_per_second": medians(runs), "runs": runs}
                if args.device == "cuda":  # after each: what is measured is kept if the rest is cut short
                    path = Path(f"benchmarks/results/scaling_{name}.json")
                    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    first = min(counts)
    for count, speed in medians(runs).items():
        print(f"{count} GPUs: {speed:,.0f} tokens/s, {speed / medians(runs)[first]:.3f} times {first}")
    for count in counts[1:]:
        pairs = zip(runs[0]["losses"], next(r for r in runs if r["gpus"] == count)["losses"])  # type: ignore[call-overload]
        print(f"{count} GPUs: losses within {max(abs(a - b) for a, b in pairs):.2e} of those of {counts[0]}")


def medians(runs: list[dict[str, object]]) -> dict[object, float]:
    """Tokens a second by number of GPUs."""
    speeds: dict[object, list[float]] = {}
    for run in runs:
        speeds.setdefault(run["gpus"], []).append(float(str(run["tokens_per_second"])))
    return {count: statistics.median(values) for count, values in speeds.items()}


if __name__ == "__main__":
    main()
