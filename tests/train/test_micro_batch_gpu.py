"""Micro batches as captured CUDA graphs on a GPU: the bits of launched ones, whatever comes between steps."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from test_faults import before_step
from test_micro_batch import SCENARIOS, check, replays
from train_testing import differences, make_run, saved

import gdn.train.loop as loop
from gdn.data.loader import Batch
from gdn.ops.backend import FLOAT8_CAPABILITIES
from gdn.train.micro_batch import MicroBatch
from gdn.train.optim import build_optimizer
from gdn.train.recipe import RunConfig

pytestmark = pytest.mark.gpu
__all__ = ["replays"]  # a fixture

MODELS: dict[str, dict[str, Any]] = {  # the general kernels, and Hopper's own
    "head 64": {"hidden_size": 128, "num_heads": 2, "head_dim": 64, "intermediate_size": 192},
    "head 256": {"hidden_size": 256, "num_heads": 1, "head_dim": 256, "intermediate_size": 320},
}


def run_of(shards: Path, model: str = "head 64", **changes: Any) -> RunConfig:
    train = {"dtype": "bfloat16"} | changes.pop("train", {})
    data = {"seq_len": 128} | changes.pop("data", {})
    return make_run(shards, model=MODELS[model], train=train, data=data, **changes)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_replayed_steps_have_the_bits_of_launched_ones(scenario: str, model: str, shards: Path, replays: list[int]) -> None:
    check(lambda on: run_of(shards, model, train={"cuda_graph": on}, eval={"every": 1}), "cuda", scenario, replays)


NARROW = pytest.param(
    {"float8_ffn": True},
    marks=pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() not in FLOAT8_CAPABILITIES, reason="no float8"
    ),
)


@pytest.mark.parametrize(
    "changes", [{"recompute": "nothing"}, {"recompute": "blocks"}, {"dtype": "float32"}, NARROW, {}], ids=str
)
@pytest.mark.parametrize("packed", [False, True])
def test_every_way_of_training(changes: dict[str, Any], packed: bool, shards: Path, replays: list[int]) -> None:
    data = {"reset_at_documents": packed}
    check(lambda on: run_of(shards, train=changes | {"cuda_graph": on}, data=data), "cuda", "plain", replays)


def test_what_is_not_made_by_the_kernels_is_launched(shards: Path) -> None:
    model = loop.build_model(make_run(shards), torch.device("cuda", 0))  # heads of 16
    assert MicroBatch(model, True)._stream is None


def test_host_waits_for_nothing_in_a_replayed_step(shards: Path) -> None:
    run = run_of(shards)
    loader, _ = loop.open_data(run)
    model = loop.build_model(run, torch.device("cuda", 0))
    micro_batch, optimizer = MicroBatch(model, True), build_optimizer(model, run.optim)
    results = []
    for step in range(6):
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            results.append(loop.train_step(micro_batch, optimizer, list(loader.micro_batches(step)), 1e-3, run))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(micro_batch._graphs) == 2 and all(0 < float(result.loss) < 6 for result in results)


def test_graphs_do_not_double_memory(shards: Path) -> None:
    """Both share a pool, and what the launched step had taken was given back. 256 MiB: workspaces of a second stream."""
    device, held = torch.device("cuda", 0), {}
    ids = torch.randint(300, (64, 2049))
    batch = Batch(ids[:, :-1].clone(), ids[:, 1:].clone(), None, torch.arange(64))
    for on in (False, True):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        model = loop.build_model(run_of(shards, "head 256"), device)
        micro_batch, valid = MicroBatch(model, on), torch.full((), 2 * ids[:, 1:].numel(), device=device)
        for _ in range(3):
            for _ in range(2):
                micro_batch(batch, valid)
            model.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        held[on] = torch.cuda.max_memory_reserved() - before
        del model, micro_batch
    assert held[False] > 1 << 30
    assert held[True] < 1.4 * held[False] + (256 << 20), held


def test_capture_within_the_profilers_window(shards: Path, tmp_path: Path) -> None:
    run = run_of(shards, train={"steps": 4}, log={"every": 1, "profile_steps": [1, 3]})
    loop.train(run, tmp_path, torch.device("cuda", 0), Console(quiet=True))
    assert "_cross_entropy" in (tmp_path / "profile" / "kernels.txt").read_text()


def test_a_whole_run_stopped_evaluated_and_profiled(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(on: bool, **changes: Any) -> RunConfig:
        more = {"checkpoint": {"every": 2, "keep": 9}, "eval": {"every": 3, "windows": 4}}
        return run_of(shards, train={"steps": 8, "cuda_graph": on}, **more, **changes)

    def go(run: RunConfig, folder: Path) -> loop.Outcome:
        return loop.train(run, folder, torch.device("cuda", 0), Console(quiet=True))

    go(run(False), tmp_path / "launched")
    with monkeypatch.context() as patch:
        before_step(patch, 4, lambda: loop.signal.raise_signal(loop.signal.SIGTERM))
        assert go(run(True), tmp_path / "run").progress.step == 5
    go(run(True, log={"every": 1, "profile_steps": [8, 8]}), tmp_path / "run")
    for step in (2, 4, 6, 8):
        assert differences(saved(tmp_path / "launched", step), saved(tmp_path / "run", step)) == []
    rows = [[json.loads(line) for line in (tmp_path / x / "metrics.jsonl").open()] for x in ("launched", "run")]
    heldout = [[row["heldout_loss"] for row in each if "heldout_loss" in row] for each in rows]
    assert len(heldout[0]) == 3 and heldout[0] == heldout[1]
    assert "_cross_entropy" in (tmp_path / "run" / "profile" / "kernels.txt").read_text()
