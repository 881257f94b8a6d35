"""The quickstart on a small folder of text, end to end, in seconds."""

import gzip
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from gdn import config
from gdn.data.shards import HELDOUT, TRAIN, read_manifest
from gdn.data.tokenizer import load_tokenizer
from gdn.errors import ConfigError, DataError
from gdn.generation.engine import generate
from gdn.generation.sampling import Sampling
from gdn.model.load import load_model
from gdn.quickstart import Options, quickstart, recipe
from gdn.train.metrics import read_metrics
from gdn.train.recipe import RunConfig

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.toml"
MINUTES = 0.02


def write_words(seed: int, count: int) -> str:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 6))) for _ in range(150)] + ["naïve", "def main(", "\n"]
    return " ".join(rng.choices(words, k=count)) + "\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    for i in range(80):
        path = root / f"package{i // 2}" / f"module{i}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(write_words(i, 400), encoding="utf-8")
    (root / "package0" / "copy.md").write_bytes((root / "package0" / "module0.py").read_bytes())
    return root


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def done(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quick") / "out"
    assert quickstart(Options(str(text), MINUTES), out, Console(file=io.StringIO())) == 0
    return out


def test_leaves_results_a_report_and_a_model_that_loads(done: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import gdn.hf  # noqa: F401  registers the Auto classes

    results = json.loads((done / "results.json").read_text())
    manifest, run = read_manifest(done / "shards"), config.load(RunConfig, done / "recipe.toml")
    assert results["steps"] == run.train.steps >= 10
    assert results["tokens"] == run.train.steps * 2048
    assert results["heldout_bytes"] == manifest.num_bytes(HELDOUT)
    assert set(results["baselines"]) == {"unigram", "bigram", "xz -9e"}
    assert 1 < results["bits_per_byte"] < 8  # text of ten letters: an untrained model needs about 11 bits a token
    assert manifest.duplicates == 1 and manifest.options["record"]["heldout_by"] == "folder"
    assert manifest.num_documents(TRAIN) + manifest.num_documents(HELDOUT) == 80
    page = (done / "report.html").read_text(encoding="utf-8")
    assert f"{results['bits_per_byte']:.3f}" in page and page.count("http://") + page.count("https://") <= page.count(
        "www.w3.org"
    )
    model = AutoModelForCausalLM.from_pretrained(done / "model")
    assert sum(p.numel() for p in model.parameters()) == run.model.num_parameters()
    assert AutoTokenizer.from_pretrained(done / "model").decode(
        [*AutoTokenizer.from_pretrained(done / "model")("naïve").input_ids]
    )
    assert f"{results['bits_per_byte']:.6g}" in (done / "model" / "README.md").read_text(encoding="utf-8")


def test_a_second_call_trains_nothing_and_finds_the_same(text: Path, done: Path) -> None:
    before, rows = json.loads((done / "results.json").read_text()), len(read_metrics(done / "run"))
    shutil.rmtree(done / "model")
    (done / "report.html").unlink()
    assert quickstart(Options(str(text), MINUTES), done, Console(file=io.StringIO())) == 0
    assert json.loads((done / "results.json").read_text()) == before
    assert len(read_metrics(done / "run")) == rows
    assert (done / "model" / "model.safetensors").exists() and (done / "report.html").exists()


@pytest.mark.parametrize("other", ["minutes", "text"])
def test_a_folder_of_other_options_is_refused(text: Path, done: Path, other: str) -> None:
    options = Options(str(text), 1.0) if other == "minutes" else Options(str(text.parent), MINUTES)
    before = (done / "options.json").read_bytes()
    with pytest.raises(ConfigError, match="choose another --out"):
        quickstart(options, done, Console(file=io.StringIO()))
    assert (done / "options.json").read_bytes() == before


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), 1440.0])
def test_minutes_out_of_range(tmp_path: Path, minutes: float) -> None:
    with pytest.raises(ConfigError, match="--minutes"):
        quickstart(Options("", minutes), tmp_path / "out", Console(file=io.StringIO()))
    assert not (tmp_path / "out").exists()


def test_the_recipe_is_the_file() -> None:
    if not RECIPE.exists():
        pytest.skip("no recipes/quickstart.toml")
    written = config.load(RunConfig, RECIPE)
    assert recipe("runs/quickstart/shards", written.train.steps) == written


@pytest.mark.parametrize("name", ["one.txt", "rows.jsonl", "rows.jsonl.gz"])
def test_a_single_file_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Up to the shards: what follows does not know what they were made of."""
    source, texts = tmp_path / name, [write_words(i, 60) for i in range(100)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    if name.endswith(".txt"):
        source.write_text("".join(texts), encoding="utf-8")
    else:
        source.write_bytes(gzip.compress(rows.encode()) if name.endswith("gz") else rows.encode())

    class Stop(Exception):
        pass

    def stop(*args: object) -> None:
        raise Stop

    monkeypatch.setattr("gdn.quickstart._recipe_for", stop)
    with pytest.raises(Stop):
        quickstart(Options(str(source), MINUTES), tmp_path / "out", Console(file=io.StringIO()))
    manifest = read_manifest(tmp_path / "out" / "shards")
    assert manifest.num_bytes(TRAIN) + manifest.num_bytes(HELDOUT) == len("".join(texts).encode())
    assert 0.01 < manifest.num_bytes(HELDOUT) / manifest.num_bytes(TRAIN) <= 0.035


def test_text_that_cannot_be_used_claims_no_folder(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "a.txt").write_text("one")
    (tmp_path / "short" / "b.txt").write_text("one")
    (tmp_path / "binary").mkdir()
    (tmp_path / "binary" / "a.txt").write_bytes(b"\xff\x00\xfe")
    for name in ("empty", "short", "binary", "missing"):
        with pytest.raises(DataError, match=name) as error:
            quickstart(Options(str(tmp_path / name), MINUTES), tmp_path / "out", Console(file=io.StringIO()))
        assert "\n" not in str(error.value)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".lock", "options.json"]


def test_ctrl_c_keeps_a_checkpoint_and_the_same_command_finishes(text: Path, done: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    shutil.copytree(done / "shards", out / "shards")
    command = [sys.executable, "-m", "gdn", "quickstart", "--text", str(text), "--minutes", str(MINUTES), "--out", str(out)]
    run = config.load(RunConfig, done / "recipe.toml", ["train.steps=60", "log.every=1", "checkpoint.every=1000"])
    (out / "recipe.toml").write_text(config.dump(run))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        metrics, deadline = out / "run" / "metrics.jsonl", time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and metrics.stat().st_size:
                process.send_signal(signal.SIGINT)
                break
            time.sleep(0.01)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr and "the same command goes on" in stdout
    stopped = max(row["step"] for row in read_metrics(out / "run"))
    assert stopped < 60 and [path.name for path in (out / "run" / "checkpoints").iterdir()] == [f"step-{stopped:08d}"]
    assert not (out / "results.json").exists()
    assert quickstart(Options(str(text), MINUTES), out, Console(file=io.StringIO())) == 0
    steps = [row["step"] for row in read_metrics(out / "run") if "loss" in row]
    assert steps == list(range(1, 61))
    assert json.loads((out / "results.json").read_text())["steps"] == 60


def test_the_model_writes_the_same_text_by_whole_passes_chunks_and_single_tokens(done: Path) -> None:
    """In bfloat16, where the three round differently: what docs/numerics.md promises of this model."""
    model = load_model(done / "model", dtype=torch.bfloat16)
    ids = load_tokenizer(done / "model").encode(write_words(7, 60))
    ids = [0, *ids][:130]
    greedy, wanted, found, state = Sampling(temperature=0), list(ids), list(ids), model.new_state(1)
    with torch.no_grad():
        for _ in range(40):
            wanted.append(int(model(torch.tensor([wanted])).logits[0, -1].argmax()))
        for n in range(len(ids) + 39):
            logits = model(torch.tensor([found[n : n + 1]]), state=state).logits
            if n >= len(ids) - 1:
                found.append(int(logits[0, -1].argmax()))
    for chunk in (64, 128):
        written = generate(model, ids, max_new_tokens=40, sampling=greedy, prefill_chunk=chunk)
        assert [*ids, *written] == wanted == found
    assert len(set(wanted[len(ids) :])) > 3
