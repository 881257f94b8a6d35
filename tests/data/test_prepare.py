import dataclasses
import json
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn.data.prepare import Holdout, choose_holdout, cut_document, document_group, prepare
from gdn.data.readers import Document, ReadStats, read_documents
from gdn.data.shards import TokenShards, read_manifest, verify_shards
from gdn.data.tokenizer import END_OF_TEXT, Tokenizer, load_tokenizer, train_bpe
from gdn.errors import DataError

TOKENIZER = train_bpe(["some words and some more words\n"] * 20, 280)


def document(text: str, path: str = "a.txt", row: int = 0, source: str = "") -> Document:
    return Document(text, path, row, source)


def split_of(document: Document) -> str:
    return "heldout" if document.path.startswith("held") else "train"


def test_shards_hold_the_documents_in_order(tmp_path: Path) -> None:
    texts = [f"words number {i} " + "x" * (i % 7) for i in range(40)] + ["long " * 60]
    held = [document("held out", "held.txt", source="Book")]
    documents = [document(text, source="Wiki") for text in texts]
    seen: list[tuple[int, int]] = []
    manifest = prepare(
        documents[:20] + held + documents[20:],
        TOKENIZER,
        tmp_path / "out",
        split_of=split_of,
        shard_tokens=100,
        sources=["somewhere"],
        options={"holdout": 0.1},
        stats=ReadStats(bad=3),
        progress=lambda count, size: seen.append((count, size)),
    )
    expected = [[0, *TOKENIZER.encode(text)] for text in texts]
    shards = TokenShards.open(tmp_path / "out", "train")
    assert shards.read(0, shards.num_tokens).tolist() == [i for ids in expected for i in ids]
    begins = np.cumsum([0] + [len(ids) for ids in expected])
    assert shards.document_starts(0, shards.num_tokens).tolist() == begins[:-1].tolist()
    files = manifest.splits["train"]
    assert len(files) > 3 and all(file.tokens <= 100 or file.documents == 1 for file in files)
    assert files[-1].tokens == len(expected[-1]) > 100
    raw = np.fromfile(tmp_path / "out" / "train-00001.bin", dtype="<u2")
    assert raw.tolist() == shards.read(files[0].tokens, files[1].tokens).tolist()
    assert TokenShards.open(tmp_path / "out", "heldout").read(0, 2).tolist() == [0, *TOKENIZER.encode("held out")][:2]
    num_bytes = sum(len(text) for text in texts)
    assert (manifest.num_documents("train"), manifest.num_bytes("train")) == (41, num_bytes)
    assert manifest.source_tokens["train"] == {"Wiki": manifest.num_tokens("train")}
    assert list(manifest.source_tokens["heldout"]) == ["Book"]
    assert (manifest.bos_policy, manifest.bos_id, manifest.dtype) == ("before_each_document", 0, "uint16")
    assert (manifest.skipped, manifest.sources[0].name, manifest.options["holdout"]) == (3, "somewhere", 0.1)
    assert seen[-1] == (42, num_bytes + 8)
    assert verify_shards(tmp_path / "out") == manifest == read_manifest(tmp_path / "out")
    assert load_tokenizer(tmp_path / "out" / "tokenizer").sha256 == manifest.tokenizer_sha256


def test_without_bos_and_with_duplicates(tmp_path: Path) -> None:
    documents = [document("same"), document("other"), document("same", "b.txt"), document("same", "held.txt")]
    kept = prepare(documents, TOKENIZER, tmp_path / "kept", split_of=split_of, bos=False)
    assert (kept.duplicates, kept.num_documents("train"), kept.bos_policy, kept.bos_id) == (0, 3, "none", None)
    shards = TokenShards.open(tmp_path / "kept", "train")
    ids = TOKENIZER.encode("same") + TOKENIZER.encode("other") + TOKENIZER.encode("same")
    assert shards.read(0, shards.num_tokens).tolist() == ids
    with pytest.raises(DataError, match="split 'heldout' got no document"):  # its only text is a copy of a train one
        prepare(documents, TOKENIZER, tmp_path / "out", split_of=split_of, deduplicate=True)
    assert not (tmp_path / "out").exists()
    only = prepare(documents, TOKENIZER, tmp_path / "out", split_of=lambda _: "train", splits=["train"], deduplicate=True)
    assert (only.duplicates, only.num_documents("train"), list(only.splits)) == (2, 2, ["train"])


def test_a_special_token_in_the_text_is_no_boundary(tmp_path: Path) -> None:
    prepare([document(f"a{END_OF_TEXT}b")], TOKENIZER, tmp_path / "out", split_of=split_of, splits=["train"])
    shards = TokenShards.open(tmp_path / "out", "train")
    assert shards.read(0, shards.num_tokens).tolist().count(0) == 1


def test_uint32_above_65536_entries(tmp_path: Path) -> None:
    def words(count: int) -> Tokenizer:
        vocabulary = {f"w{i}": i for i in range(count)}
        model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
        data = {"version": "1.0", "model": model, "pre_tokenizer": {"type": "WhitespaceSplit"}, "added_tokens": []}
        return Tokenizer(json.dumps(data).encode(), {"bos_token": "w1"})

    for count, dtype, size in ((65_536, "uint16", 2), (65_537, "uint32", 4)):
        out = tmp_path / dtype
        manifest = prepare([document(f"w{count - 1} w2")], words(count), out, split_of=split_of, splits=["train"])
        assert manifest.dtype == dtype
        assert TokenShards.open(out, "train").read(0, 3).tolist() == [1, count - 1, 2]
        assert (out / "train-00000.bin").stat().st_size == 3 * size


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def failing(error: BaseException) -> Iterator[Document]:
        yield from [document("fine " * 100)] * 3000
        raise error

    for error in (KeyboardInterrupt(), DataError("row 7"), RuntimeError("bug")):
        with pytest.raises(type(error)):
            prepare(failing(error), TOKENIZER, tmp_path / "out", split_of=split_of, shard_tokens=1000)
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(DataError, match="out: cannot be written: File too large"):
            documents = [document("many words " * 1000)] * 100
            prepare(documents, TOKENIZER, tmp_path / "out", split_of=split_of, splits=["train"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_or_unwritable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="out: exists already"):
        prepare([document("x")], TOKENIZER, tmp_path / "out", split_of=split_of)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"file/out: cannot be written: File exists"):
        prepare([document("x")], TOKENIZER, tmp_path / "file" / "out", split_of=split_of)
    if os.geteuid() != 0:  # root writes anywhere
        tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
        with pytest.raises(DataError, match="new: cannot be written: Permission denied"):
            prepare([document("x")], TOKENIZER, tmp_path / "new", split_of=split_of)
        tmp_path.chmod(stat.S_IRWXU)


def test_bad_arguments_get_one_line(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "t")
    (tmp_path / "t" / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="no BOS; name bos_token"):
        prepare([document("x")], load_tokenizer(tmp_path / "t"), tmp_path / "out", split_of=split_of)
    with pytest.raises(DataError, match="shard_tokens = 0"):
        prepare([document("x")], TOKENIZER, tmp_path / "out", split_of=split_of, shard_tokens=0)


def test_the_fingerprint_follows_the_tokens_only(tmp_path: Path) -> None:
    def made(name: str, text: str, source: str) -> str:
        documents = [document(text), document("x", "held.txt")]
        return prepare(documents, TOKENIZER, tmp_path / name, split_of=split_of, sources=[source]).fingerprint

    assert made("a", "text", "here") == made("b", "text", "there") != made("c", "Text", "here")
    manifest = read_manifest(tmp_path / "a")
    assert dataclasses.replace(manifest, versions={}).fingerprint == manifest.fingerprint
    assert dataclasses.replace(manifest, bos_id=5).fingerprint != manifest.fingerprint


def test_groups_are_package_folders_files_or_rows() -> None:
    folders = {"asyncio/x.py": "asyncio", "test/test_asyncio/a.py": "test/test_asyncio", "os.py": "."}
    folders["a/b/c/d.py"] = "a/b"
    for path, group in folders.items():
        assert document_group(document("t", path), "folder") == group
        assert document_group(document("t", path), "file") == path
    one, two = document("t", "a/x.jsonl.zst", 0), document("u", "a/x.jsonl.zst", 1)
    assert document_group(one, "folder") == document_group(one, "file") != document_group(two, "folder")


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 50)), min_size=1, max_size=60),
    st.floats(0.05, 0.5),
    st.integers(0, 100),
)
def test_holdout_stays_within_its_fraction(files: list[tuple[str, int]], fraction: float, seed: int) -> None:
    documents = [document("é" * size, f"{folder}/{i}.py") for i, (folder, size) in enumerate(files)]
    try:
        holdout = choose_holdout(documents, fraction, seed)
    except DataError as error:
        assert "hold out" in str(error)
        assert min(size for _, size in files) > int(fraction * 2 * sum(size for _, size in files)) // 2
        return
    assert holdout == choose_holdout(reversed(documents), fraction, seed)
    held = [d for d in documents if holdout.split_of(d) == "heldout"]
    assert 0 < sum(len(d.text) for d in held) <= fraction * sum(len(d.text) for d in documents)
    groups = {document_group(d, holdout.by) for d in held}
    assert groups.isdisjoint(document_group(d, holdout.by) for d in documents if d not in held)


def test_holdout_keeps_folders_whole_and_falls_back_to_files() -> None:
    packages = [document("x" * 100, f"package{i}/{j}.py") for i in range(20) for j in range(5)]
    holdout = choose_holdout(packages, 0.1, 0)
    assert holdout.by == "folder" and len(holdout.groups) == 2
    assert {choose_holdout(packages, 0.1, seed).groups for seed in range(5)} != {holdout.groups}
    flat = [document("x" * 100, f"{j}.txt") for j in range(50)]
    holdout = choose_holdout(flat, 0.1, 0)
    assert holdout.by == "file" and len(holdout.groups) == 5
    rows = [document(f"row {i:03}", "rows.jsonl", i) for i in range(100)]
    holdout = choose_holdout(rows, 0.1, 0)
    assert sum(holdout.split_of(d) == "heldout" for d in rows) == 10
    with pytest.raises(DataError, match=r"no document is small enough to hold out 10\.0% of 100 bytes in 1 file"):
        choose_holdout(flat[:1], 0.1, 0)


def test_a_cut_document_loses_nothing() -> None:
    text = "".join(f"line {i}\n" for i in range(1000)) + "last"
    pieces = cut_document(document(text, "book.txt"), 20)
    assert "".join(piece.text for piece in pieces) == text
    assert 15 <= len(pieces) <= 21 and all(piece.text.endswith("\n") for piece in pieces[:-1])
    assert choose_holdout(pieces, 0.1, 0).by == "file"
    assert [piece.text for piece in cut_document(document("one line"), 5)] == ["one line"]


def test_from_folder_to_shards(tmp_path: Path) -> None:
    for i in range(20):
        folder = tmp_path / "source" / f"p{i}"
        folder.mkdir(parents=True)
        (folder / "a.py").write_text(f"value = {i}\n" * 5)
        (folder / "copy.py").write_text("the same everywhere\n")
    holdout = choose_holdout(read_documents(tmp_path / "source"), 0.2, 1)
    assert isinstance(holdout, Holdout)
    documents = read_documents(tmp_path / "source")
    manifest = prepare(documents, TOKENIZER, tmp_path / "out", split_of=holdout.split_of, deduplicate=True)
    assert manifest.duplicates == 19
    assert manifest.num_documents("train") + manifest.num_documents("heldout") == 21
