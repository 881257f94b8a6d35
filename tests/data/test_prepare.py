"""Sources to shards: what is in them, what decides them, and what does not."""

import dataclasses
import json
import os
import resource
import stat
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shards_testing import prepare_texts, write_rows

import gdn.data.prepare
from gdn.cli import main
from gdn.data import executors
from gdn.data.documents import is_held_out, text_digest
from gdn.data.prepare import Options, prepare, training_texts
from gdn.data.shards import HELDOUT, TOKENIZER, TRAIN, Manifest, TokenShards, read_manifest, verify_shards
from gdn.data.sources import Source
from gdn.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, train_bpe
from gdn.errors import DataError, RunError
from gdn.files import lock_folder

WORDS = train_bpe(["some words and some more words\n"] * 20, 280)
TEXTS = [f"words number {i} " + "x" * (i % 7) for i in range(60)]


def run(source: Path | str, out: Path, **options: Any) -> Manifest:
    return prepare([Source(str(source))], WORDS, out, Options(**{"holdout": 0.0} | options))


def contents(folder: Path) -> dict[str, bytes]:
    names = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in names}


def ids(texts: Sequence[str]) -> list[int]:
    return [token for text in texts for token in [0, *WORDS.encode(text)]]


def tokens(folder: Path, split: str = TRAIN) -> list[int]:
    shards = TokenShards.open(folder, split)
    return shards.read(0, shards.num_tokens).tolist()


def label(text: str, name: str) -> str:
    return json.dumps({"text": text, "meta": {"redpajama_set_name": name}}) + "\n"


def test_shards_hold_the_documents_in_order(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "train").mkdir(parents=True)
    (source / "validation").mkdir()
    (source / "train" / "a.jsonl").write_text("".join(label(text, "Wiki") for text in TEXTS))
    (source / "train" / "b.jsonl").write_text(label("last é", "Book"))
    (source / "validation" / "a.jsonl").write_text(label("held out", "C4") + label(" ", "C4"))
    seen: list[tuple[int, int, int]] = []
    options = Options(task_bytes=700)
    manifest = prepare([Source(str(source))], WORDS, tmp_path / "out", options, lambda *state: seen.append(state))
    texts = [*TEXTS, "last é"]
    assert tokens(tmp_path / "out") == ids(texts) and tokens(tmp_path / "out", HELDOUT) == ids(["held out"])
    shards = TokenShards.open(tmp_path / "out", TRAIN)
    lengths = [len(ids([text])) for text in texts]
    assert shards.document_starts(0, shards.num_tokens).tolist() == (np.cumsum(lengths) - lengths).tolist()
    assert len(manifest.splits[TRAIN]) > 5 and manifest.dtype == "uint16"
    assert (manifest.num_documents(TRAIN), manifest.num_bytes(TRAIN)) == (61, sum(len(text.encode()) for text in texts))
    assert manifest.source_tokens == {
        TRAIN: {"Book": lengths[-1], "Wiki": sum(lengths[:-1])},
        HELDOUT: {"C4": len(ids(["held out"]))},
    }
    assert (manifest.bos_policy, manifest.bos_id, manifest.eos_policy) == ("before_each_document", 0, "none")
    assert [file.source for file in manifest.splits[TRAIN]] == [0] * len(manifest.splits[TRAIN])
    assert verify_shards(tmp_path / "out") == manifest == read_manifest(tmp_path / "out")
    assert load_tokenizer(tmp_path / "out" / TOKENIZER).sha256 == manifest.tokenizer_sha256
    assert manifest.versions["datatrove"] and manifest.sources[0].name == str(source)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_policies_of_bos_and_eos(tmp_path: Path, bos: bool, eos: bool) -> None:
    manifest = prepare_texts(["one", "two"], WORDS, tmp_path / "out", bos=bos, eos=eos)
    wanted = [token for text in ("one", "two") for token in [0] * bos + WORDS.encode(text) + [0] * eos]
    assert tokens(tmp_path / "out") == wanted
    assert (manifest.bos_id, manifest.eos_id) == (0 if bos else None, 0 if eos else None)
    assert TokenShards.open(tmp_path / "out", TRAIN).document_starts(0, len(wanted)).tolist() == [0, len(wanted) // 2]


def test_the_engine_changes_no_byte_but_the_versions(tmp_path: Path) -> None:
    pytest.importorskip("gigatoken")
    one = prepare_texts(TEXTS, WORDS, tmp_path / "one", task_bytes=700)
    other = prepare_texts(TEXTS, WORDS, tmp_path / "other", task_bytes=700, engine="gigatoken")
    assert other.fingerprint == one.fingerprint and len(one.splits[TRAIN]) > 1
    assert other.versions.keys() - one.versions.keys() == {"gigatoken"}


def test_exact_copies_are_left_out_wherever_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["same", "other", "same", *TEXTS, "same", TEXTS[3], "end"]
    kept = ["same", "other", *TEXTS, "end"]
    all_of_them = prepare_texts(texts, WORDS, tmp_path / "all", ["same", "held"], task_bytes=300)
    assert (all_of_them.duplicates, all_of_them.num_documents(TRAIN)) == (0, len(texts))
    for at_once in (1 << 20, 8):  # hashes sorted at once, or from many files, documents taken in blocks
        monkeypatch.setattr("gdn.data.assemble._SORTED", at_once)
        monkeypatch.setattr("gdn.data.assemble._BLOCK", at_once)
        out = tmp_path / f"out{at_once}"
        manifest = prepare_texts(texts, WORDS, out, ["same", "held"], task_bytes=300, deduplicate=True)
        assert manifest.duplicates == 4
        assert tokens(out) == ids(kept) and tokens(out, HELDOUT) == ids(["held"])
        assert manifest.source_tokens[TRAIN] == {"": len(ids(kept))}
        verify_shards(out)


def test_a_special_token_in_the_text_is_no_boundary(tmp_path: Path) -> None:
    prepare_texts([f"a{END_OF_TEXT}b"], WORDS, tmp_path / "out")
    assert tokens(tmp_path / "out").count(0) == 1


@pytest.mark.parametrize("deduplicate", [False, True])
@pytest.mark.parametrize("workers", [1, 2])
def test_max_tokens_takes_whole_documents_from_the_first_on(tmp_path: Path, deduplicate: bool, workers: int) -> None:
    texts = [text for text in TEXTS for _ in range(2)] + ["end"]
    kept = TEXTS + ["end"] if deduplicate else texts
    lengths = np.cumsum([len(ids([text])) for text in kept])
    for limit in (1, int(lengths[20]), int(lengths[20]) + 1, 10**9) if workers == 1 else (int(lengths[20]) + 1,):
        out = tmp_path / str(limit)
        options = {"task_bytes": 200, "deduplicate": deduplicate, "workers": workers}
        manifest = prepare_texts(texts, WORDS, out, max_tokens=limit, **options)
        count = min(int(np.searchsorted(lengths, limit)) + 1, len(kept))
        assert tokens(out) == ids(kept[:count])
        assert manifest.duplicates <= count * deduplicate


def test_max_tokens_leaves_most_of_the_source_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    original = gdn.data.prepare.select

    def select(streams: Any, work: Path, deduplicate: bool) -> Any:
        done.append(len(list((work / "tasks").iterdir())))
        return original(streams, work, deduplicate)

    monkeypatch.setattr(gdn.data.prepare, "select", select)
    prepare_texts(TEXTS, WORDS, tmp_path / "out", max_tokens=30, task_bytes=100)
    assert len(done) == 1 and done[0] < 5


def test_weights_divide_the_tokens_and_go_into_the_manifest(tmp_path: Path) -> None:
    for name in "ab":
        write_rows(tmp_path / f"{name}.jsonl", [f"{name} {text}" for text in TEXTS])
    sources = [Source(str(tmp_path / f"{name}.jsonl"), weight) for name, weight in (("a", 1.0), ("b", 3.0))]
    manifest = prepare(sources, WORDS, tmp_path / "out", Options(holdout=0.0, max_tokens=400, task_bytes=300))
    parts = TokenShards.open(tmp_path / "out", TRAIN).parts
    assert [(part.name[-7:], part.weight) for part in parts] == [("a.jsonl", 1.0), ("b.jsonl", 3.0)]
    assert 100 <= parts[0].num_tokens < 130 and 300 <= parts[1].num_tokens < 330
    assert {file.source for file in manifest.splits[TRAIN]} == {0, 1}
    plain = [dataclasses.replace(source, weight=None) for source in sources]
    assert len(prepare(plain, WORDS, tmp_path / "plain", Options(holdout=0.0)).splits[TRAIN]) == 2
    assert len(TokenShards.open(tmp_path / "plain", TRAIN).parts) == 1
    for wrong, message in [
        ([sources[0], plain[1]], r"2 sources with weights \[1.0\]; expected none, or one above 0 for each"),
        ([sources[0], Source("b", -1.0)], r"weights \[1.0, -1.0\]"),
        ([], "0 sources"),
    ]:
        with pytest.raises(DataError, match=message):
            prepare(wrong, WORDS, tmp_path / "no", Options())
    with pytest.raises(DataError, match="max_tokens of 2 sources; expected weights"):
        prepare(plain, WORDS, tmp_path / "no", Options(max_tokens=5))


def test_a_source_with_its_own_splits_beside_one_without(tmp_path: Path) -> None:
    write_rows(tmp_path / "plain.jsonl", TEXTS)
    write_rows(tmp_path / "laid" / "train" / "a.jsonl", ["laid out", "same"])
    write_rows(tmp_path / "laid" / "validation" / "a.jsonl", ["held", "same", TEXTS[0]])
    sources = [Source(str(tmp_path / "laid"), 1.0), Source(str(tmp_path / "plain.jsonl"), 1.0)]
    prepare(sources, WORDS, tmp_path / "out", Options(holdout=0.2, deduplicate=True, task_bytes=500))
    held = [text for text in TEXTS if is_held_out(text_digest(text), 0.2)]
    assert tokens(tmp_path / "out") == ids(["laid out", "same", *(text for text in TEXTS if text not in held)])
    assert tokens(tmp_path / "out", HELDOUT) == ids(["held", *held])
    parts = TokenShards.open(tmp_path / "out", TRAIN).parts
    assert parts[0].num_tokens == len(ids(["laid out", "same"]))


def test_the_holdout_never_moves(tmp_path: Path) -> None:
    """Whether a document is held out depends on its text alone: not on the others, their order, or the files."""
    held = [text for text in TEXTS if is_held_out(text_digest(text), 0.2)]
    assert 3 < len(held) < 25
    write_rows(tmp_path / "one" / "a.jsonl", TEXTS)
    write_rows(tmp_path / "two" / "a.jsonl", [*TEXTS[40:], "a new one"])
    write_rows(tmp_path / "two" / "b.jsonl", TEXTS[:40][::-1])
    run(tmp_path / "one", tmp_path / "out1", holdout=0.2)
    run(tmp_path / "two", tmp_path / "out2", holdout=0.2)
    assert tokens(tmp_path / "out1", HELDOUT) == ids(held)
    assert tokens(tmp_path / "out1") == ids([text for text in TEXTS if text not in held])
    two = TokenShards.open(tmp_path / "out2", HELDOUT)
    assert two.manifest.num_documents(HELDOUT) == len(held) + is_held_out(text_digest("a new one"), 0.2)
    assert not set(training_texts([Source(str(tmp_path / "two"))], Options(holdout=0.2))) & set(held)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".txt"])
def test_the_number_of_workers_changes_no_byte(tmp_path: Path, suffix: str, capfd: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for i in range(6):
        texts = [f"file {i} {text}" for text in TEXTS]
        if suffix == ".parquet":
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.table({"text": texts}), source / f"{i}.parquet", row_group_size=10)
        elif suffix == ".jsonl":
            write_rows(source / f"{i}.jsonl", texts)
        else:
            (source / f"{i}.txt").write_text("\n".join(texts))
    for workers in (1, 2):
        run(source, tmp_path / f"out{workers}", workers=workers, task_bytes=1500)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")
    assert capfd.readouterr() == ("", "")  # nothing of datatrove's own messages


def test_a_call_goes_on_where_one_failed(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for i in range(6):
        write_rows(source / f"{i}.jsonl", [f"{i} {text}" for text in TEXTS])
    whole = run(source, tmp_path / "whole", task_bytes=2000)
    good = (source / "4.jsonl").read_text()
    (source / "4.jsonl").write_text(good[:-30] + "x" * 29 + "\n")
    with pytest.raises(DataError, match=r"4\.jsonl: row 59 \(line 60\): broken JSON"):
        run(source, tmp_path / "out", task_bytes=2000)
    work = tmp_path / "out.work"
    done = {path: path.stat().st_ino for path in (work / "tasks").iterdir()}
    assert len(done) > 3 and not (tmp_path / "out").exists()
    with pytest.raises(DataError, match=r"out\.work is of other options: holdout = 0\.0 there, 0\.5 now; choose another --out"):
        run(source, tmp_path / "out", task_bytes=2000, holdout=0.5)
    (source / "4.jsonl").write_text(good + "\n")
    with pytest.raises(DataError, match="the files of the source have changed since this preparation began"):
        run(source, tmp_path / "out", task_bytes=2000)
    (source / "4.jsonl").write_text(good)
    # What is done of a file is done again where somebody has written to it since, at whatever length: here the first.
    (source / "0.jsonl").write_text((source / "0.jsonl").read_text().replace("0 ", "Z ", 1))
    changed = run(source, tmp_path / "changed", task_bytes=2000)
    assert changed.splits != whole.splits
    with lock_folder(work), pytest.raises(RunError, match=f"in use by another process .pid {os.getpid()}"):
        run(source, tmp_path / "out", task_bytes=2000)
    assert run(source, tmp_path / "out", task_bytes=2000).splits == changed.splits
    assert contents(tmp_path / "out") == contents(tmp_path / "changed")
    before = contents(tmp_path / "out")
    assert run(source, tmp_path / "out", task_bytes=2000) == read_manifest(tmp_path / "out")  # complete already
    assert contents(tmp_path / "out") == before
    with pytest.raises(DataError, match="out is of other options: bos = True there, False now"):
        run(source, tmp_path / "out", task_bytes=2000, bos=False)


BAD = [
    ("x.jsonl", '{"text": "good"}\n{"body": 1}\n', r"x\.jsonl: row 1 \(line 2\): no 'text' key; it has 'body'"),
    ("x.jsonl", '{"text": "good"}\n{"text": 3}\n', r"x\.jsonl: row 1 \(line 2\): 'text' is int; expected a string"),
    ("x.jsonl", '{"text": "good"}\n{"text": \n', r"x\.jsonl: row 1 \(line 2\): broken JSON"),
    ("x.jsonl", b'{"text": "good"}\n{"text": "\xff"}\n', r"x\.jsonl: row 1 \(line 2\): not UTF-8 at byte 10"),
    ("x.jsonl", "", r"x\.jsonl: empty file"),
    ("x.jsonl.zst", b"\x28\xb5\x2f\xfd\x04\x00\x41", r"x\.jsonl\.zst: truncated zst"),
    ("x.parquet", b"PAR1", r"x\.parquet: broken parquet"),
    ("x.txt", b"a\0b", r"x\.txt: binary data"),
]


# Two workers read no other way; two cases show that what one of them raises comes through.
@pytest.mark.parametrize(
    ("name", "data", "message", "workers"), [(*case, 1) for case in BAD] + [(*case, 2) for case in BAD[2:4]]
)
def test_bad_input_is_a_line_or_counted(tmp_path: Path, name: str, data: Any, message: str, workers: int) -> None:
    source = tmp_path / "source"
    write_rows(source / "a.jsonl", TEXTS)
    (source / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(DataError, match=message) as caught:
        run(source, tmp_path / "out", workers=workers, task_bytes=4000)
    assert "\n" not in str(caught.value)
    manifest = run(source, tmp_path / "out", skip_bad=True, workers=workers, task_bytes=4000)
    good = ["good"] if b"good" in (source / name).read_bytes() else []
    assert tokens(tmp_path / "out") == ids([*TEXTS, *good])
    assert manifest.skipped == 1 and manifest.skipped_share == pytest.approx(1 / (len(TEXTS) + len(good) + 1))
    assert caught.value.args[0] == manifest.options["first_skipped"]


def test_files_and_rows_without_text_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    write_rows(source / "a.jsonl", ["good", " \n", "too"])
    for name, text in (("b/__init__.py", ""), ("c.txt", "\t"), ("d.txt", "text")):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    WORDS.save(tmp_path / "tokenizer")
    for workers in ("1", "2"):
        out = tmp_path / f"out{workers}"
        command = ["prepare", str(source), "--tokenizer", str(tmp_path / "tokenizer"), "--out", str(out), "--holdout", "0"]
        assert main([*command, "--workers", workers]) == 0
        line = f"left out: 3 files or rows without text, the first: {source}/a.jsonl: row 1 (line 2)"
        assert capsys.readouterr().out.splitlines()[1:] == [line]
        assert tokens(out) == ids(["good", "too", "text"])
        assert read_manifest(out).options["blank"] == 3 and read_manifest(out).skipped == 0
    for name in ("a.jsonl", "d.txt"):
        (source / name).unlink()
    with pytest.raises(DataError, match=r"source: empty: no text to train on; 2 without text, the first: .*b/__init__\.py"):
        run(source, tmp_path / "none")


def test_what_was_skipped_on_request_is_an_error_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "x.jsonl", TEXTS).open("a").write("{\n")
    with monkeypatch.context() as patch:
        patch.setattr(gdn.data.prepare, "assemble", lambda *rest: 1 / 0)  # stopped when all tasks are done
        with pytest.raises(ZeroDivisionError):
            run(tmp_path / "x.jsonl", tmp_path / "out", skip_bad=True)
    with pytest.raises(DataError, match=r"x\.jsonl: row 60 \(line 61\): broken JSON"):
        run(tmp_path / "x.jsonl", tmp_path / "out")
    assert run(tmp_path / "x.jsonl", tmp_path / "out", skip_bad=True).skipped == 1


def test_bad_rows_of_a_stretch_are_counted_from_the_files_start(tmp_path: Path) -> None:
    rows = [json.dumps({"text": text}) for text in TEXTS]
    rows[47] = "{"
    (tmp_path / "x.jsonl").write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"x\.jsonl: row 47 \(line 48\): broken JSON"):
        run(tmp_path / "x.jsonl", tmp_path / "out", task_bytes=300)


def test_a_text_that_cannot_be_tokenised_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gdn.data.encoding._LONGEST_WORD", 1000)
    write_rows(tmp_path / "x.jsonl", [*TEXTS, "y" * 1001, "end"])
    with pytest.raises(DataError, match=r"x\.jsonl: row 60 \(line 61\): 1001 characters without a space or newline"):
        run(tmp_path / "x.jsonl", tmp_path / "out", task_bytes=500)
    manifest = run(tmp_path / "x.jsonl", tmp_path / "out", task_bytes=500, skip_bad=True)
    assert manifest.skipped == 1 and tokens(tmp_path / "out") == ids([*TEXTS, "end"])


def test_a_vocabulary_that_does_not_fit(tmp_path: Path) -> None:
    def words(count: int) -> Tokenizer:
        model = {"type": "WordLevel", "vocab": {f"w{i}": i for i in range(count)}, "unk_token": "w0"}
        data = {"version": "1.0", "model": model, "pre_tokenizer": {"type": "WhitespaceSplit"}, "added_tokens": []}
        return Tokenizer(json.dumps(data).encode(), {"bos_token": "w1"})

    for count, dtype, size in ((65_536, "uint16", 2), (65_537, "uint32", 4)):
        out = tmp_path / dtype
        manifest = prepare_texts([f"w{count - 1} w2"], words(count), out)
        assert manifest.dtype == dtype
        assert tokens(out) == [1, count - 1, 2]
        assert (out / "train-00000.bin").stat().st_size == 3 * size
    with pytest.raises(DataError, match="vocabulary of 65537 does not fit uint16; expected uint32"):
        prepare_texts(["w1"], words(65_537), tmp_path / "no", dtype="uint16")


def test_bad_options_get_one_line(tmp_path: Path) -> None:
    WORDS.save(tmp_path / "t")
    (tmp_path / "t" / "tokenizer_config.json").unlink()
    bare = load_tokenizer(tmp_path / "t")
    for tokenizer, options, message in [
        (bare, {}, "no BOS; name bos_token"),
        (bare, {"bos": False, "eos": True}, "no EOS; name eos_token"),
        (WORDS, {"holdout": 1.0}, r"holdout = 1\.0; expected a share"),
        (WORDS, {"max_tokens": 0}, "max_tokens = 0; expected at least 1"),
        (WORDS, {"workers": 0}, "workers = 0; expected at least 1"),
        (WORDS, {"executor": "slurm"}, "slurm: no time; expected --executor-option time="),
        (
            WORDS,
            {"executor_options": {"nodes": "3"}},
            "--executor-option nodes: not one of --executor local; expected one of",
        ),
        (WORDS, {"executor_options": {"randomize_start_duration": "x"}}, "randomize_start_duration=x: expected a whole number"),
        (WORDS, {"executor_options": {"workers": "3"}}, "--executor-option workers: not one of --executor local"),
    ]:
        with pytest.raises(DataError, match=message):
            prepare_texts(["text"], tokenizer, tmp_path / "out", **options)
        assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("out")) in ([], ["out-text"])


def test_an_existing_or_unwritable_folder_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "x.jsonl", ["x"])
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="out: exists already; expected a new folder"):
        run(tmp_path / "x.jsonl", tmp_path / "out")
    with pytest.raises(DataError, match=r"x\.jsonl/out: cannot be written: "):
        run(tmp_path / "x.jsonl", tmp_path / "x.jsonl" / "out")
    if os.geteuid() != 0:  # root writes anywhere
        tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
        with pytest.raises(DataError, match="new: cannot be written: Permission denied"):
            run(tmp_path / "x.jsonl", tmp_path / "new")
        tmp_path.chmod(stat.S_IRWXU)


def test_a_full_disk_is_a_line_and_leaves_nothing(tmp_path: Path) -> None:
    write_rows(tmp_path / "x.jsonl", ["many words " * 1000] * 100)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(DataError, match="out: cannot be written: File too large"):
            run(tmp_path / "x.jsonl", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["x.jsonl"]


def test_the_fingerprint_follows_the_tokens_only(tmp_path: Path) -> None:
    def made(name: str, text: str) -> str:
        return prepare_texts([text], WORDS, tmp_path / name, ["x"]).fingerprint

    assert made("a", "text") == made("b", "text") != made("c", "Text")
    manifest = read_manifest(tmp_path / "a")
    assert dataclasses.replace(manifest, versions={}).fingerprint == manifest.fingerprint
    assert dataclasses.replace(manifest, bos_id=5).fingerprint != manifest.fingerprint


SBATCH = """#!{python}
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
assert "#SBATCH --wait\\n" in script and "#SBATCH --partition=cpu\\n" in script
offset = dict(item.split("=") for item in sys.argv[1].removeprefix("--export=ALL,").split(",")) if len(sys.argv) > 2 else {{}}
failed = 0
first, last = re.search(r"--array=(\\d+)-(\\d+)", script).groups() if "--array" in script else (0, 0)
for number in range(int(first), int(last) + 1):
    environment = os.environ | offset | {{"SLURM_ARRAY_TASK_ID": str(number), "SLURM_NODELIST": "here"}}
    failed |= subprocess.run(["bash", sys.argv[-1]], env=environment, capture_output=True).returncode
print("Submitted batch job 7")
sys.exit(int(failed != 0))
"""


def test_a_task_of_many_documents_keeps_few_of_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "x.jsonl", TEXTS)
    whole = run(tmp_path / "x.jsonl", tmp_path / "whole")
    write, held = executors._SplitWriter._write_rows, []
    monkeypatch.setattr(executors, "_ROWS_AT_ONCE", 7)
    monkeypatch.setattr(executors._SplitWriter, "_write_rows", lambda self: (held.append(len(self._rows)), write(self))[1])
    assert run(tmp_path / "x.jsonl", tmp_path / "pieces") == whole
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")
    assert max(held) == 7 and sum(held) >= len(TEXTS) - 10


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a cluster: sbatch runs the array's jobs here, one after the other."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    scripts = {"sbatch": SBATCH.format(python=sys.executable), "scontrol": "#!/bin/sh\necho here\n"}
    scripts["srun"] = '#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do case "$1" in -n) shift;; esac; shift; done\nexec "$@"\n'
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}")


def test_slurm(slurm: None, tmp_path: Path) -> None:
    write_rows(tmp_path / "source" / "x.jsonl", TEXTS)
    options = {"executor": "slurm", "executor_options": {"time": "1:00:00", "partition": "cpu"}, "task_bytes": 1200}
    run(tmp_path / "source", tmp_path / "here", task_bytes=1200)
    run(tmp_path / "source", tmp_path / "there", **options)
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
    write_rows(tmp_path / "source" / "y.jsonl", ["good"]).write_text("{")
    with pytest.raises(DataError, match=r"y\.jsonl: row 0 \(line 1\): broken JSON"):
        run(tmp_path / "source", tmp_path / "bad", **options)


def test_slurm_and_ray_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "x.jsonl", TEXTS)
    monkeypatch.setenv("PATH", str(tmp_path))
    given = {"time": "1:00:00", "partition": "cpu"}
    with pytest.raises(DataError, match="--executor slurm: sbatch: No such file"):
        run(tmp_path / "x.jsonl", tmp_path / "out", executor="slurm", executor_options=given)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DataError, match="--executor ray: Ray is not installed"):
        run(tmp_path / "x.jsonl", tmp_path / "out", executor="ray")


def test_slimpajama_as_it_lies_on_disk(test_data: Callable[[str], Path], tmp_path: Path) -> None:
    """The published tokenizer on its own kind of text: ids of the plain library, both splits, labels by source."""
    tokenizer = load_tokenizer(test_data("data/tokenizer/mistral-7b-v0.1"))
    files = sorted(test_data("data/slimpajama_like/validation/chunk1").iterdir())
    for i, folder in enumerate(("train/chunk1", "validation/chunk1")):  # the layout, with its smallest files
        (tmp_path / "source" / folder).mkdir(parents=True)
        (tmp_path / "source" / folder / f"example_{i}.jsonl.zst").symlink_to(files[i])
    source = Source(str(tmp_path / "source"))
    manifest = prepare([source], tokenizer, tmp_path / "out", Options(max_tokens=100_000))
    assert set(manifest.splits) == {TRAIN, HELDOUT}
    assert set(manifest.source_tokens[TRAIN]) <= {"RedPajamaWikipedia", "RedPajamaBook"}
    shards = TokenShards.open(tmp_path / "out", TRAIN)
    texts = training_texts([source], Options(), max_bytes=1 << 20)
    starts = shards.document_starts(0, shards.num_tokens).tolist() + [shards.num_tokens]
    for first, last, text in zip(starts[:4], starts[1:], texts):
        assert shards.read(first, last - first).tolist() == [1, *tokenizer.encode(text)]


def test_without_datatrove_one_line_says_so(tmp_path: Path) -> None:
    code = (
        "import sys, importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'datatrove' else f(n, *a)\n"
    )
    code += f"import gdn.cli; sys.exit(gdn.cli.main(['prepare', 'x', '--tokenizer', 'y', '--out', {str(tmp_path / 'o')!r}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, 'gdn: prepare needs datatrove: pip install "gdn[data]"\n')
