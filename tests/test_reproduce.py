"""`gdn reproduce` from the command line, on a tiny recipe and generated text: stages, stops, verdicts, the band."""

import hashlib
import json
import math
import os
import re
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")
pytest.importorskip("datatrove")

from eval_testing import sentence, write_data, write_tokenizer
from shards_testing import write_rows

import gdn.distributed.mesh as mesh
import gdn.reproduce as reproduce_module
import gdn.train.loop as loop
from gdn.cli import main
from gdn.data.shards import read_manifest
from gdn.errors import DataError
from gdn.lossband import PARTS, stretches
from gdn.reproduce import package_hashes, table_cells
from gdn.train.metrics import read_metrics

RECIPE = """
name = "tiny"
[model]
vocab_size = 400
hidden_size = 16
num_hidden_layers = 2
num_heads = 2
head_dim = 8
expand_v = 1.0
max_position_embeddings = 96
bos_token_id = 0
eos_token_id = 0
[data]
shards = "elsewhere"
seq_len = 32
micro_batch_size = 2
global_batch_size = 4
[train]
steps = 20
seed = 7
dtype = "float32"
[optim]
lr = 1e-2
warmup_steps = 2
[eval]
every = 10
windows = 8
[checkpoint]
every = 10
[log]
every = 1
"""


class Place:
    """What one reproduction starts from, and calls of the command."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "out"
        self.recipe = folder / "recipe.toml"
        self.recipe.write_text(RECIPE, encoding="utf-8")
        self.tokenizer = write_tokenizer(folder / "tokenizer", adds_bos=False)
        self.source = folder / "text"
        write_rows(self.source / "train" / "rows.jsonl", [sentence(n, 80) for n in range(60)])
        write_rows(self.source / "validation" / "rows.jsonl", [sentence(n, 80) for n in range(100, 108)])
        self.data = write_data(folder / "documents")

    def run(self, *more: object, out: Path | None = None) -> int:
        paths = ["--recipe", self.recipe, "--source", self.source, "--tokenizer", self.tokenizer, "--out", out or self.out]
        arguments = ["--quiet", "reproduce", *more, *paths, "--workers", "1", "--device", "cpu"]
        return main([str(argument) for argument in arguments])

    def verdict(self, out: Path | None = None) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(((out or self.out) / "verdict.json").read_text())
        return content


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_one_command_that_goes_on_to_a_verdict_per_cell(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure = ["--tasks", "copa,boolq,wikitext_harness", "--data", place.data, "--limit", 2]
    asked: list[int | None] = []
    monkeypatch.setattr("gdn.eval.workers.choose_workers", lambda workers, *_: asked.append(workers) or 1)
    assert place.run(*measure, "--only-data") == 0
    assert not (place.out / "run").exists() and (place.out / "shards" / "manifest.json").exists()
    written = (place.out / "shards" / "manifest.json").stat().st_mtime_ns

    rate = loop.learning_rate

    def stop(step: int, steps: int, config: Any) -> float:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(step, steps, config)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "learning_rate", stop)
        assert place.run(*measure) == 0
    assert "the same command goes on from there" in capsys.readouterr().out
    assert not (place.out / "verdict.json").exists()
    assert place.run(*measure) == 0
    said = capsys.readouterr().out
    assert (place.out / "shards" / "manifest.json").stat().st_mtime_ns == written
    rows = read_metrics(place.out / "run")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 21))  # none of them twice

    content = place.verdict()
    cells = {cell["task"]: cell for cell in content["cells"]}
    assert list(cells) == ["copa", "boolq", "wikitext_harness"] and cells["copa"]["published"] == 0.7
    measured = json.loads((place.out / "eval" / "results.json").read_text())["tasks"]
    for name, cell in cells.items():
        assert cell["value"] == measured[name]["value"] and cell["documents"] == 2
    assert cells["wikitext_harness"]["verdict"] == "outside, worse" and cells["wikitext_harness"]["value"] > 27.6
    assert f"{sum(c['verdict'] == 'inside' for c in cells.values())} of 3 cells lie within 2 standard errors" in said
    assert "on the first 2 documents of each task" in content["verdict"] and content["verdict"] in " ".join(said.split())

    (checkpoint,) = (place.out / "run" / "checkpoints").glob("step-00000020")
    assert content["checkpoint"]["model.safetensors"] == sha256(checkpoint / "model.safetensors")
    assert content["data"]["fingerprint"] == read_manifest(place.out / "shards").fingerprint
    assert content["recipe"]["train"]["steps"] == 20 and content["packages"]["gdn"]["sha256"]
    assert content["final_loss"] == pytest.approx(rows[-2]["loss"] if "loss" in rows[-2] else rows[-1]["loss"])
    assert len(content["samples"]) >= 2 and content["samples"][0]["prompt"] == "The capital of France is"
    assert content["bits_per_byte"] > 0 and set(content["baselines"]) == {"unigram", "bigram", "xz -9e"}
    page = (place.out / "report.html").read_text()
    assert "The published table" in page and "outside, worse" in page and content["recipe_sha256"] in page

    before = sha256(checkpoint / "model.safetensors")
    monkeypatch.setattr(loop, "train_step", None)  # a call with nothing to do trains no step
    assert place.run(*measure) == 0
    assert sha256(checkpoint / "model.safetensors") == before and place.verdict()["verdict"] == content["verdict"]

    other = write_rows(place.folder / "other.jsonl", [sentence(n) for n in range(9)])
    capsys.readouterr()
    for changed, named in [
        (["--source", other], "sources = "),
        (["optim.lr=0.02"], "optim.lr = 0.01 there, 0.02"),
        (["--limit", 3], "limit: 2, 3"),
        (["--data", place.folder / "nothing"], "no folder of documents"),
        (["--tasks", "nothing"], "nothing: no local data; expected one of"),
        (["--max-tokens", 0], "--max-tokens = 0; expected at least 1"),
        (["--band", place.folder / "band.json", "log.every=10"], "log.every = 10, train.steps = 20: "),
    ]:
        arguments = ["--recipe", place.recipe, "--source", place.source, "--tokenizer", place.tokenizer, "--out", place.out]
        whole = ["--quiet", "reproduce", *measure, *arguments, "--workers", 1, "--device", "cpu", *changed]
        assert main([str(a) for a in whole]) == 2
        assert re.search(re.escape(named), capsys.readouterr().err), named


def test_the_band(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    band = place.folder / "band.json"
    shards = ["--tasks", "none", "--band", band, "--shards", place.folder / "one" / "shards"]
    assert place.run("--tasks", "none", "--band", band, out=place.folder / "one") == 0
    assert place.verdict(place.folder / "one")["verdict"].startswith(
        f"No verdict: no band is recorded in {band}; gdn reproduce"
    )
    assert place.run(*shards, "--record-band", out=place.folder / "one") == 0
    assert "holds one run, and a width needs two" in place.verdict(place.folder / "one")["verdict"]
    assert place.run("train.seed=8", *shards, "--record-band", out=place.folder / "two") == 0
    assert place.run("train.seed=8", *shards, "--record-band", out=place.folder / "two") == 0  # the same run: once
    recorded = json.loads(band.read_text())
    assert [run["seed"] for run in recorded["runs"]] == [7, 8] and len(recorded["runs"][0]["loss"]) == PARTS
    assert recorded["runs"][0]["machine"] and recorded["runs"][0]["versions"]["torch"] == torch.__version__

    other = ["data.micro_batch_size=4", "train.recompute=nothing", "train.cuda_graph=false"]  # none of which decides a loss
    assert place.run("train.seed=9", *other, *shards, out=place.folder / "three") == 0
    content = place.verdict(place.folder / "three")
    assert content["verdict"] == f"Inside: the loss lies within the recorded band in all {PARTS} stretches of the run."
    point, losses = content["band"][3], [run["loss"][3] for run in recorded["runs"]]
    middle = sum(losses) / 2
    assert point["high"] - middle == pytest.approx(middle - point["low"])
    curves = [run["loss"] for run in recorded["runs"]]
    spread = [abs(a - b) / math.sqrt(2) for a, b in zip(*curves)]
    pooled = math.sqrt(sum(s * s for s in spread) / PARTS)
    assert point["high"] - middle == pytest.approx(12.71 * math.sqrt(1.5) * max(spread[3], pooled))
    assert "Loss within the recorded band" in (place.folder / "three" / "report.html").read_text()

    del recorded["recipe"]["optim"]["weight_decay"]  # as if that setting had come later: it had its default then
    for run in recorded["runs"]:
        run["loss"][-1] -= 100.0
    band.write_text(json.dumps(recorded))
    assert place.run("train.seed=9", "data.micro_batch_size=4", *shards, out=place.folder / "three") == 1
    assert "Outside: in 1 of 20 stretches" in place.verdict(place.folder / "three")["verdict"]
    assert place.run("optim.lr=0.02", *shards, out=place.folder / "four") == 0
    said = place.verdict(place.folder / "four")["verdict"]
    assert "the band is of another recipe: optim.lr = 0.01 there, 0.02 here" in said
    recorded["data"] = "0" * 64
    band.write_text(json.dumps(recorded))
    assert place.run("train.seed=8", *shards, out=place.folder / "two") == 0
    assert "the band is of another text" in place.verdict(place.folder / "two")["verdict"]
    capsys.readouterr()
    assert place.run("train.seed=8", *shards, "--record-band", out=place.folder / "two") == 2
    assert "another text" in capsys.readouterr().err
    assert place.run("--tasks", "none", "--record-band") == 2
    assert "--record-band records into a band" in capsys.readouterr().err


def test_a_verdict_is_no_crash_to_torchrun(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reproduce_module, "reproduce", lambda *_: reproduce_module.Result(None, True))
    assert place.run(out=place.folder / "outside") == 1
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(mesh, "join", nullcontext)
    assert place.run(out=place.folder / "outside") == 0


def test_stretches_by_hand() -> None:
    rows = [{"step": step, "tokens": 10 * step, "loss": float(step)} for step in range(1, 41)]
    rows += [{"step": 2, "tokens": 20, "loss": 4.0}, {"step": 40, "heldout_loss": 1.0}, {"step": 3, "loss": None}]
    found = stretches(rows, 40)
    assert len(found) == PARTS and found[0] == (20, 2.5) and found[-1] == (400, 39.5) and found[1] == (40, 3.5)
    with pytest.raises(DataError, match="19 of 20 stretches"):
        stretches([row for row in rows if row["step"] not in (9, 10)], 40)


def test_verdicts_of_cells() -> None:
    def cell(task: str, metric: str, value: float, stderr: float | None) -> Any:
        (made,) = table_cells({task: {"metric": metric, "value": value, "stderr": stderr, "documents": 5}})
        return made["verdict"]

    assert cell("copa", "acc", 0.74, 0.03) == "inside"
    assert cell("copa", "acc", 0.80, 0.03) == "outside, better"
    assert cell("copa", "acc", 0.60, 0.03) == "outside, worse"
    assert cell("wikitext_harness", "word_perplexity_harness", 20.0, 0.5) == "outside, better"  # less is better
    assert cell("wikitext_harness", "word_perplexity_harness", 30.0, 0.5) == "outside, worse"
    assert cell("niah_single_1", "2048", 1.0, 0.0) == "inside"  # no error bar: equal as far as it was published
    assert cell("niah_single_3", "2048", 1.0, 0.0) == "outside, better"
    assert cell("wikitext", "word_perplexity", 30.0, 0.5) is None  # not published


def test_hashes_are_of_the_files() -> None:
    hashes = package_hashes()
    assert {"gdn", "torch", "numpy", "lm_eval"} <= hashes.keys()
    assert len({package["sha256"] for package in hashes.values()}) == len(hashes)
    assert hashes == package_hashes()
