"""What a step trains on, as text, and 13-grams shared with evaluation files, against counting by hand."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shards_testing import prepare_texts

from gdn.cli import main
from gdn.data import inspect
from gdn.data.inspect import NGRAM, Overlap, overlaps, windows_of
from gdn.data.loader import Loader
from gdn.data.shards import TRAIN, TokenShards
from gdn.data.tokenizer import train_bpe
from gdn.errors import DataError

RNG = random.Random(1)
VOCABULARY = [f"w{i}" for i in range(200)]
TEXTS = [" ".join(RNG.choices(VOCABULARY, k=RNG.randrange(5, 40))) for _ in range(80)]
TOKENIZER = train_bpe(TEXTS, 300)
T = 32


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    out = tmp_path_factory.mktemp("inspect") / "out"
    prepare_texts(TEXTS, TOKENIZER, out, task_bytes=3000)
    return TokenShards.open(out, TRAIN)


def test_windows_are_those_that_the_step_trains_on(shards: TokenShards) -> None:
    loader = Loader(shards, T, 2, 8, seed=3)
    batches = list(loader.micro_batches(5))
    shown = list(windows_of(loader, TOKENIZER, loader.windows(5).tolist()))
    rows = [row for batch in batches for row in zip(batch.window_ids.tolist(), batch.input_ids.tolist(), batch.labels.tolist())]
    assert len(shown) == len(rows) == 8
    cuts = 0
    for window, (number, inputs, labels) in zip(shown, rows, strict=True):
        tokens = [*inputs, labels[-1]]
        assert window.window == number and shards.read(window.start, T + 1).tolist() == tokens
        assert "".join(window.documents) == TOKENIZER.decode(tokens)  # a byte-level tokenizer: parts join up
        starts = [i for i, token in enumerate(tokens) if token == 0 and i > 0]
        assert len(window.documents) == len(starts) + 1
        cuts += len(starts)
    assert cuts > 3
    for wrong in (-1, loader.order.num_windows):
        with pytest.raises(DataError, match=f"window {wrong}; expected 0 to {loader.order.num_windows - 1}"):
            next(windows_of(loader, TOKENIZER, [wrong]))


def test_the_command_shows_a_step_and_named_windows(
    shards: TokenShards, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'name = "x"\n[model]\nvocab_size = 300\nhidden_size = 16\nnum_hidden_layers = 1\nnum_heads = 1\nhead_dim = 8\n'
        f'[data]\nshards = "{shards.folder}"\nseq_len = {T}\nmicro_batch_size = 2\nglobal_batch_size = 8\n'
        "[train]\nsteps = 1\nseed = 3\n"
    )
    command = ["data", "show", str(shards.folder)]
    known = ["--recipe", str(recipe)]
    assert main([*command, *known, "--step", "5"]) == 0
    by_step, notes = capsys.readouterr()
    assert notes == ""
    windows = Loader(shards, T, 2, 8, seed=3).windows(5).tolist()
    assert [int(line.split()[2].strip(":")) for line in by_step.splitlines() if line.startswith("===")] == windows
    assert main([*command, *known, "--windows", ",".join(map(str, windows))]) == 0
    assert capsys.readouterr().out == by_step
    dump = tmp_path / "nonfinite-step-00000006.json"  # beside the recipe, as in a run's folder
    dump.write_text(json.dumps({"step": 6, "windows": windows, "loss": "nan", "grad_norm": 1.0}) + "\n")
    assert main([*command, "--dump", str(dump)]) == 0
    assert capsys.readouterr().out == by_step
    assert main([*command, "--step", "5"]) == 0
    assert capsys.readouterr().err.startswith("no --recipe: taken for the published run's: seq_len 2048, global_batch_size 256")
    assert main([*command, "--step", "5", *known, "train.seed=4"]) == 0
    assert capsys.readouterr().out != by_step
    other, away = tmp_path / "other.json", tmp_path / "away" / "dump.json"
    other.write_text('{"windows": [1, "2"]}')
    away.parent.mkdir()
    away.write_text(dump.read_text())
    for arguments, message in [
        ([*command, "--step", "-1", *known], "--step -1; expected 0 or more"),
        ([*command, *known, "--windows", "1,x"], "--windows '1,x': expected numbers"),
        ([*command, "--windows", "999"], "window 999; expected 0 to"),
        ([*command, "--dump", str(tmp_path / "nowhere" / "no.json")], "no.json: cannot be read: No such file"),
        ([*command, "--dump", str(recipe)], "recipe.toml: expected a nonfinite-step-*.json of a run"),
        ([*command, "--dump", str(other)], "other.json: expected a nonfinite-step-*.json of a run"),
        ([*command, "--dump", str(away)], "recipe.toml"),
    ]:
        assert main(arguments) == 2
        assert message in capsys.readouterr().err


def grams(text: str) -> set[tuple[str, ...]]:
    words = text.lower().split()
    return {tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 79), st.integers(0, 20), st.integers(1, 40), st.booleans()), min_size=1, max_size=8))
def test_overlaps_are_those_counted_by_hand(
    shards: TokenShards, tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int, int, bool]]
) -> None:
    """Rows are stretches of training documents, whole or with a foreign word in the middle."""
    folder = tmp_path_factory.mktemp("eval")
    texts = []
    for number, first, count, broken in rows:
        words = TEXTS[number].upper().split()[first : first + count]
        texts.append(" ".join(words[: len(words) // 2] + ["Foreign"] * broken + words[len(words) // 2 :]))
    lines = [json.dumps({"question": text, "n": 1, "choices": ["no", ["short"]]}) for text in texts]
    (folder / "task.jsonl").write_text("\n".join(lines))
    training = set().union(*map(grams, TEXTS))
    mine = [grams(text) for text in texts]
    wanted = Overlap(
        "task",
        sum(bool(row) for row in mine),
        sum(bool(row & training) for row in mine),
        len(set().union(*mine)),
        len(set().union(*mine) & training),
    )
    assert overlaps(shards, TOKENIZER, folder) == [wanted]


def test_documents_are_read_whole_across_blocks(shards: TokenShards, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (7, 100, 1 << 20):
        monkeypatch.setattr(inspect, "_BLOCK", step)
        assert list(inspect._documents(shards, TOKENIZER)) == TEXTS


def test_the_command_prints_a_line_a_task(shards: TokenShards, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = max(TEXTS, key=len)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": long}) + "\n" + json.dumps({"text": "x " * 20}) + "\n")
    (tmp_path / "b.txt").write_text(long + " " + "new words " * 10)
    assert main(["data", "overlap", str(shards.folder), "--eval", str(tmp_path)]) == 0
    a, b = capsys.readouterr().out.splitlines()
    assert a.startswith("a: 1 of 2 rows, ") and b.startswith("b: 1 of 1 rows, ")
    for folder, message in ((tmp_path / "none", "no evaluation files"), (tmp_path, r"a.jsonl: row 0 (line 1): broken JSON")):
        (tmp_path / "a.jsonl").write_text("{")
        assert main(["data", "overlap", str(shards.folder), "--eval", str(folder)]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "a.jsonl").write_bytes(b"ab\xff")
    assert main(["data", "overlap", str(shards.folder), "--eval", str(tmp_path)]) == 2
    assert "a.jsonl: broken UTF-8 at byte 2" in capsys.readouterr().err
