"""The command line: what it costs to start, one line for bad input, and the whole path from text to an exported model."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gdn import cli
from gdn.cli import main
from gdn.data.tokenizer import train_bpe

RECIPES = Path(__file__).parents[1] / "recipes"
TINY = """
name = "tiny"
[model]
vocab_size = 300
hidden_size = 16
num_hidden_layers = 1
num_heads = 1
head_dim = 8
expand_v = 1.0
bos_token_id = 0
eos_token_id = 0
[data]
shards = "SHARDS"
seq_len = 16
micro_batch_size = 2
global_batch_size = 2
[train]
steps = 5
dtype = "float32"
[optim]
warmup_steps = 1
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text/, shards/, tiny.toml and a trained run/."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "text").mkdir()
    for i in range(40):
        (folder / "text" / f"{i}.txt").write_text(f"Die Größe {i} 😀 füllt naïve Zeilen.\n" * 5, encoding="utf-8")
    (folder / "tiny.toml").write_text(TINY.replace("SHARDS", str(folder / "shards")))
    arguments = [
        "prepare",
        str(folder / "text"),
        "--train-tokenizer",
        "300",
        "--holdout",
        "0.1",
        "--out",
        str(folder / "shards"),
    ]
    assert main(arguments) == 0
    assert main(["data", "check", str(folder / "shards")]) == 0
    assert main(["train", str(folder / "tiny.toml"), "--out", str(folder / "run"), "--device", "cpu"]) == 0
    return folder


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *parts: str) -> None:
    """Exit code 2, and one line that names all of `parts`."""
    capsys.readouterr()
    assert main(arguments) == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1 and stderr.startswith("gdn: "), stderr
    for part in parts:
        assert part in stderr


@pytest.mark.parametrize("code", ["import gdn", "import gdn.cli; gdn.cli.main(['--help'])"], ids=["import", "help"])
def test_starts_at_once_without_torch(code: str) -> None:
    times = []
    for _ in range(5):
        started = time.monotonic()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        times.append(time.monotonic() - started)
    assert statistics.median(times) <= 0.15, times
    check = (
        f"import sys, atexit\natexit.register(lambda: print('heavy:', {{'torch', 'numpy', 'rich'}} & set(sys.modules)))\n{code}"
    )
    assert b"heavy: set()" in subprocess.run([sys.executable, "-c", check], check=True, capture_output=True).stdout


def test_recipe_errors(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(work / "tiny.toml")
    refused(capsys, ["info", recipe, "optim.lrr=1"], "'optim.lrr'", "'optim.lr'", recipe)
    refused(capsys, ["info", recipe, "train.steps=many"], "train.steps", "'many'", "an integer")
    refused(capsys, ["info", recipe, "train.steps"], "'train.steps'", "section.key=value")
    refused(capsys, ["train", str(work / "none.toml")], str(work / "none.toml"))
    for speed in ("nan", "inf", "0", "-1"):
        refused(capsys, ["info", recipe, f"--tokens-per-second={speed}"], "--tokens-per-second")
    refused(capsys, ["train", recipe, "--device", "toaster", "--out", str(work / "x")], "--device toaster")
    refused(capsys, ["train", recipe, "model.vocab_size=299", "--out", str(work / "y")], "model.vocab_size = 299", "300")
    refused(capsys, ["train", recipe, "model.hidden_size=24", "--out", str(work / "run")], "hidden_size")


@pytest.mark.parametrize(
    "content", [b"", b" \n", b"\x00\x01\x02" * 99, b"caf\xe9 " * 99], ids=["empty", "blank", "binary", "latin-1"]
)
def test_text_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    out = tmp_path / "out"
    arguments = ["prepare", str(tmp_path / "bad.txt"), "--train-tokenizer", "300", "--out", str(out)]
    refused(capsys, arguments, *(["bad.txt"] if content.strip() else []))
    assert [path.name for path in tmp_path.iterdir()] == ["bad.txt"]


def test_prepare_with_every_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gdn.data.shards import read_manifest

    for name in ("a", "b"):
        rows = [f'{{"body": "{name} text {i % 50}"}}' for i in range(100)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows + ["{"]))
    arguments = [
        "prepare",
        str(tmp_path / "a.jsonl"),
        str(tmp_path / "b.jsonl"),
        "--weights",
        "1,3",
        "--train-tokenizer",
        "280",
    ]
    arguments += ["--holdout", "0.2", "--text-column", "body", "--deduplicate", "--no-bos", "--eos", "--dtype", "uint32"]
    arguments += ["--max-tokens", "100000", "--workers", "1", "--out", str(tmp_path / "out")]
    refused(capsys, arguments, "a.jsonl: row 100 (line 101): broken JSON")
    assert main([*arguments, "--skip-bad"]) == 0
    printed = capsys.readouterr().out
    assert "left out: 100 exact copies" in printed and "left out: 2 bad files or rows, 0.99% of all, the first: " in printed
    manifest = read_manifest(tmp_path / "out")
    assert [source.weight for source in manifest.sources] == [1.0, 3.0]
    assert (manifest.dtype, manifest.bos_policy, manifest.eos_policy) == ("uint32", "none", "after_each_document")
    assert manifest.num_documents("train") + manifest.num_documents("heldout") == 100
    refused(capsys, [*arguments, "--eos", "--weights", "1"], "--weights 1: 1 numbers; expected one for each of 2 sources")
    refused(capsys, [*arguments, "--weights", "1,x"], "--weights '1,x': expected numbers separated by commas")
    refused(capsys, [*arguments, "--executor-option", "x"], "--executor-option 'x': expected KEY=VALUE")
    refused(capsys, [*arguments, "--tokenizer", "x"], "expected one of --tokenizer PATH and --train-tokenizer SIZE")
    refused(capsys, [*arguments[:-1], str(tmp_path / "new"), "--holdout", "1"], "holdout = 1.0; expected a share")
    new = ["--train-tokenizer", "280", "--out", str(tmp_path / "new")]
    refused(capsys, ["prepare", str(tmp_path / "absent"), *new], "absent: no such file")


def test_altered_and_truncated_shards(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("altered", "truncated"):
        folder = tmp_path / name
        shutil.copytree(work / "shards", folder)
        path = folder / "train-00000.bin"
        content = bytearray(path.read_bytes())
        content[7] ^= 1
        path.write_bytes(bytes(content) if name == "altered" else path.read_bytes()[:-2])
        refused(capsys, ["data", "check", str(folder)], str(path))
        recipe = str(work / "tiny.toml")
        refused(capsys, ["train", recipe, f"data.shards={folder}", "--out", str(tmp_path / "run")], str(path))


def test_generate_errors(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, ["generate", str(tmp_path), "x"], str(tmp_path))
    refused(capsys, ["generate", str(work / "run"), "x", "--temperature", "nan"], "temperature = nan")
    refused(capsys, ["generate", str(work / "run"), "x", "--top-p", "1.5"], "top_p = 1.5", "(0, 1]")
    refused(capsys, ["export", str(work / "run"), str(work / "text")], str(work / "text"))


def test_a_damaged_folder_is_named(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(next((work / "run" / "checkpoints").iterdir()), folder)
    whole = {name: (folder / name).read_bytes() for name in ("model.safetensors", "config.json", "tokenizer.json")}
    config = json.loads(whole["config.json"])

    def damaged(name: str, content: bytes | None, *parts: str) -> None:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        for arguments in (["generate", str(folder), "x"], ["export", str(folder), str(tmp_path / "out")]):
            refused(capsys, arguments, *parts)
        (folder / name).write_bytes(whole[name])
        assert not (tmp_path / "out").exists()

    damaged("model.safetensors", whole["model.safetensors"][:-7], str(folder / "model.safetensors"), "damaged")
    damaged("model.safetensors", None, str(folder / "model.safetensors"), "no such file")
    damaged("tokenizer.json", None, str(folder), "tokenizer.json")
    train_bpe([f"word{n} other{n} third{n} " * 3 for n in range(99)], 400).save(folder)
    refused(capsys, ["export", str(folder), str(tmp_path / "out")], "the tokenizer's ids reach ", "expected at most 299")
    damaged("tokenizer.json", whole["tokenizer.json"][:50], str(folder / "tokenizer.json"))
    for change, words in (
        ({"attn": {"layers": [0]}}, "attn = {'layers': [0]} is not built here"),
        ({"use_rope": True}, "unknown key 'use_rope'"),
        ({"head_dim": "8"}, "head_dim = '8'"),
    ):
        damaged("config.json", json.dumps(config | change).encode(), str(folder / "config.json"), words)
    assert main(["generate", str(folder), "x", "--max-new-tokens", "1"]) == 0


def test_a_folder_that_cannot_be_written(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    refused(capsys, ["train", str(work / "tiny.toml"), "--out", str(tmp_path / "file" / "run")], str(tmp_path / "file"))
    if os.getuid() == 0:
        pytest.skip("root may write anywhere")
    (tmp_path / "closed").mkdir(mode=0o500)
    refused(capsys, ["train", str(work / "tiny.toml"), "--out", str(tmp_path / "closed" / "run")], str(tmp_path / "closed"))


def test_info_of_the_published_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(RECIPES / "gdn_360m_15b.toml"), "--tokens-per-second", "136000"]) == 0
    text = capsys.readouterr().out
    assert "357,781,928" in text and "15,032,385,536" in text and "30.7 h" in text


def test_generate_streams_what_decoding_at_once_gives(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gdn.data.tokenizer import load_tokenizer
    from gdn.generation.engine import generate
    from gdn.generation.sampling import Sampling
    from gdn.model.load import load_model

    folder = next((work / "run" / "checkpoints").iterdir())
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    prompt = [0, *tokenizer.encode("Größe 😀")]
    texts = {}
    for seed in (1, 2, 3):
        arguments = [
            "generate",
            str(work / "run"),
            "Größe 😀",
            "--seed",
            str(seed),
            "--max-new-tokens",
            "150",
            "--device",
            "cpu",
        ]
        printed = []
        for _ in range(2):
            capsys.readouterr()
            assert main([*arguments, "--temperature", "1.0"]) == 0
            printed.append(capsys.readouterr().out)
        sampling = Sampling(temperature=1.0, seed=seed)
        ids = list(generate(model, prompt, max_new_tokens=150, sampling=sampling, eos_ids=(0,)))
        assert printed[0] == printed[1] == "Größe 😀" + tokenizer.decode(ids) + "\n"
        texts[seed] = printed[0]
    assert len(set(texts.values())) == 3 and "\ufffd" in "".join(texts.values())  # an untrained model breaks characters


def test_generate_in_the_dtype_asked_for(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gdn.generation import engine

    seen: list[torch.dtype] = []
    generate = engine.generate
    monkeypatch.setattr(engine, "cpu_widens_bf16", lambda: True)
    monkeypatch.setattr(
        engine, "generate", lambda model, *a, **k: seen.append(model.lm_head.weight.dtype) or generate(model, *a, **k)
    )
    for dtype in ("auto", "float32", "bfloat16"):
        arguments = ["generate", str(work / "run"), "x", "--max-new-tokens", "3", "--device", "cpu", "--dtype", dtype]
        assert main(arguments) == 0
    assert seen == [torch.float32, torch.float32, torch.bfloat16]


def test_export_loads_through_transformers(work: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import gdn.hf  # noqa: F401  registers the Auto classes
    from gdn.data.shards import read_manifest
    from gdn.model.load import load_model

    assert main(["export", str(work / "run"), str(tmp_path / "hf")]) == 0
    ids = torch.arange(20)[None]
    with torch.no_grad():
        wanted = load_model(next((work / "run" / "checkpoints").iterdir()))(ids).logits
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(ids).logits
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    card = (tmp_path / "hf" / "README.md").read_text()
    manifest = read_manifest(work / "shards")
    rows = [("name", "tiny"), ("optim.warmup_steps", 1), ("train.tokens", manifest.num_tokens("train"))]
    rows += [("fingerprint", manifest.fingerprint), ("step", 5), ("tokens", 160), ("loss", f"{last_loss(work):.6g}")]
    for name, value in rows:
        assert f"| {name} | {value} |" in card, name


def last_loss(work: Path) -> float:
    return float(json.loads((work / "run" / "metrics.jsonl").read_text().splitlines()[-1])["loss"])


def test_the_card_takes_further_results_and_tells_no_other_datas(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text('{"arc_easy": {"acc": 0.463}}')
    arguments = ["export", str(work / "run"), str(tmp_path / "hf"), "--results", str(tmp_path / "results.json")]
    assert main(arguments) == 0
    assert "| arc_easy.acc | 0.463 |" in (tmp_path / "hf" / "README.md").read_text()
    refused(capsys, [*arguments[:-1], str(tmp_path / "none.json")], f"{tmp_path / 'none.json'}: no such file; expected a JSON")
    checkpoint = tmp_path / "step-00000005"
    shutil.copytree(next((work / "run" / "checkpoints").iterdir()), checkpoint)
    progress = json.loads((checkpoint / "progress.json").read_text())
    (checkpoint / "progress.json").write_text(json.dumps(progress | {"shards": "of other data"}))
    refused(capsys, ["export", str(checkpoint), str(tmp_path / "no")], str(work / "shards"), "of other data")
    recipe = (checkpoint / "recipe.toml").read_text()
    (checkpoint / "recipe.toml").write_text(recipe.replace(str(work / "shards"), str(tmp_path / "moved")))
    assert main(["export", str(checkpoint), str(tmp_path / "moved-data")]) == 0
    assert "| fingerprint | of other data |" in (tmp_path / "moved-data" / "README.md").read_text()


def test_memory_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wants(error: Exception) -> None:
        def command(args: object) -> int:
            raise error

        monkeypatch.setattr(cli, "_generate", command)

    wants(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"))
    refused(capsys, ["generate", "folder", "x"], "gdn: CUDA out of memory. Tried to allocate 2.00 GiB.\n")
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as allocator:
        torch.empty(2**55)
    wants(allocator.value)
    refused(capsys, ["generate", "folder", "x"], "can't allocate memory")
    wants(RuntimeError("another"))
    with pytest.raises(RuntimeError, match="another"):
        main(["generate", "folder", "x"])
