import gzip
import json
import sys
from pathlib import Path

import pytest

from gdn.data.readers import ReadStats, read_documents
from gdn.errors import DataError

zstandard = pytest.importorskip("zstandard", reason="the data extra is not installed")
pyarrow = pytest.importorskip("pyarrow", reason="the data extra is not installed")

ROWS = [
    {"text": "first é", "meta": {"redpajama_set_name": "RedPajamaC4"}},
    {"text": "second\nline", "meta": {"redpajama_set_name": "RedPajamaBook"}},
    {"text": "third", "other": 1},
]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
EXPECTED = [("first é", 0, "RedPajamaC4"), ("second\nline", 1, "RedPajamaBook"), ("third", 2, "")]


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_parquet(path: Path, columns: dict[str, list[object]]) -> Path:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def compress(data: bytes, suffix: str) -> bytes:
    # Two frames: concatenated archives are legal and common.
    half = len(data) // 2
    one = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    return one(data[:half]) + one(data[half:])


def test_a_folder_is_walked_in_sorted_order(tmp_path: Path) -> None:
    write(tmp_path / "b" / "x.py", b"x = 1\r\n")
    write(tmp_path / "a.txt", b"a")
    write(tmp_path / "b.md", "\ufeffé".encode())
    write(tmp_path / "empty.py", b"")
    write(tmp_path / "rows.jsonl", JSONL)
    for left_out in (".git/x.txt", "b/__pycache__/x.py", "b/.hidden.txt", "image.png", "site-packages/y.py"):
        write(tmp_path / left_out, b"left out\0")
    stats = ReadStats()
    documents = list(read_documents(str(tmp_path), exclude=["site-packages"], stats=stats))
    assert [(d.path, d.row) for d in documents] == [
        ("a.txt", 0),
        ("b.md", 0),
        ("b/x.py", 0),
        ("rows.jsonl", 0),
        ("rows.jsonl", 1),
        ("rows.jsonl", 2),
    ]
    assert [d.text for d in documents[:3]] == ["a", "é", "x = 1\r\n"]
    assert stats == ReadStats(documents=6, blank=1)
    assert [d.path for d in read_documents(str(tmp_path), suffixes=[".md"])] == ["b.md"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl_rows(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"rows.jsonl{suffix}", compress(JSONL, suffix))
    documents = list(read_documents(str(path)))
    assert [(d.text, d.row, d.source) for d in documents] == EXPECTED
    assert {d.path for d in documents} == {path.name}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_rows_longer_than_a_chunk(tmp_path: Path, suffix: str) -> None:
    texts = ["漢" * 300_000, "b", "c" * 700_000]
    data = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts).encode()
    path = write(tmp_path / f"rows.jsonl{suffix}", compress(data, suffix))
    assert [d.text for d in read_documents(str(path))] == texts


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "dictionary"])
def test_the_text_column_is_found_however_its_strings_are_laid_out(tmp_path: Path, kind: str) -> None:
    types = {"string": pyarrow.string(), "large_string": pyarrow.large_string(), "string_view": pyarrow.string_view()}
    texts = pyarrow.array(["one", "é", "one"], type=types.get(kind, pyarrow.string()))
    column = texts.dictionary_encode() if kind == "dictionary" else texts
    path = write_parquet(tmp_path / "x.parquet", {"id": [1, 2, 3], "words": column})
    assert [document.text for document in read_documents(str(path))] == ["one", "é", "one"]


def test_meta_written_as_a_string_names_the_source_too(tmp_path: Path) -> None:
    metas = ['{"redpajama_set_name": "RedPajamaC4"}', '"redpajama_set_name"', '{"redpajama_set_name": ', "text", None]
    rows = [{"text": f"row {i}", "meta": meta} for i, meta in enumerate(metas)]
    write(tmp_path / "x.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    write_parquet(tmp_path / "y.parquet", {"text": [row["text"] for row in rows], "meta": metas})
    assert [document.source for document in read_documents(str(tmp_path))] == ["RedPajamaC4", "", "", "", ""] * 2


def test_parquet_rows(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"text": ["one", "two"], "meta": [{"redpajama_set_name": "C"}, None]})
    assert [tuple(d) for d in read_documents(str(path))] == [("one", path.name, 0, "C"), ("two", path.name, 1, "")]
    path = write_parquet(tmp_path / "y.parquet", {"content": ["é"] * 1000, "text": [1] * 1000})
    assert [d.row for d in read_documents(str(path), text_column="content")] == list(range(1000))
    with pytest.raises(DataError, match=r"y\.parquet: row 0: 'text' is int; expected a string"):
        list(read_documents(str(path), text_column="text"))
    with pytest.raises(DataError, match=r"y\.parquet: no 'body' column; it has 'content', 'text'"):
        list(read_documents(str(path), text_column="body"))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.txt", b"abc\0def", r"x\.txt: binary data \(a NUL at byte 3\)"),
        ("x.txt", b"abc\xff", r"x\.txt: not UTF-8 at byte 3"),
        ("x.txt", b"", r"x\.txt: empty"),
        ("x.md", b" \n ", r"x\.md: empty"),
        ("x.jsonl", b"", r"x\.jsonl: empty file"),
        ("x.jsonl", JSONL[:-9], r"x\.jsonl: row 2 \(line 3\): broken JSON"),
        ("x.jsonl", JSONL + b"[1]\n", r"row 3 \(line 4\): a JSON list; expected an object"),
        ("x.jsonl", b'{"body": 1}', r"row 0 \(line 1\): no 'text' key; it has 'body'"),
        ("x.jsonl", b'{"text": null}', r"row 0 .*'text' is NoneType; expected a string"),
        ("x.jsonl", b'\n{"text": "\xff"}', r"row 1 \(line 2\): not UTF-8 at byte 10"),
        ("x.jsonl", b'{"text": "a\\ud800"}', r"row 0 .*half a surrogate pair at character 1"),
        ("x.jsonl", b"[" * 100_000, r"row 0 .*nested too deeply"),
        ("x.jsonl.gz", gzip.compress(JSONL)[:-12], r"x\.jsonl\.gz: truncated gzip, after \d+ bytes of text: the rest"),
        ("x.jsonl.gz", b"not gzip at all", r"x\.jsonl\.gz: broken gzip"),
        (
            "x.jsonl.zst",
            zstandard.ZstdCompressor().compress(JSONL)[:-3],
            r"x\.jsonl\.zst: truncated zst, after .*: the rest",
        ),
        ("x.jsonl.zst", b"not zst at all", r"x\.jsonl\.zst: broken zst"),
        ("x.parquet", b"PAR1 no", r"x\.parquet: broken parquet"),
    ],
)
def test_bad_files_get_one_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = write(tmp_path / name, data)
    with pytest.raises(DataError, match=message) as caught:
        list(read_documents(str(path)))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="empty: no text" if not data.strip() and not name.endswith("l") else message):
        list(read_documents(str(tmp_path)))


def test_a_broken_archive_says_from_which_row_on_it_is_lost(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(7)).encode()
    whole, cut = zstandard.ZstdCompressor().compress(rows), zstandard.ZstdCompressor().compress(rows)[:-2]
    path = write(tmp_path / "x.jsonl.zst", whole + cut)
    with pytest.raises(DataError, match=r"truncated zst, after \d+ bytes.*: the rest of the file is missing, from row 7 on$"):
        list(read_documents(str(path)))
    stats = ReadStats()
    assert len(list(read_documents(str(path), skip_bad=True, stats=stats))) == 7 and stats.bad == 1


def test_truncation_between_zst_frames_and_inside_later_ones(tmp_path: Path) -> None:
    one = zstandard.ZstdCompressor().compress(JSONL)
    for cut in (len(one) + 1, len(one) + 7, 2 * len(one) - 1):
        path = write(tmp_path / "x.jsonl.zst", (one + one)[:cut])
        with pytest.raises(DataError, match="truncated zst"):
            list(read_documents(str(path)))


def test_truncated_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", {"text": ["a" * i for i in range(1, 500)]})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="broken parquet"):
        list(read_documents(str(path)))


def test_skip_bad_counts_and_goes_on(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", b"\0")
    write(tmp_path / "b.jsonl", b"{\n" + JSONL + b'{"text": 1}\n{"text": "\xff"}\n{"text": "last"}\n')
    write(tmp_path / "c.jsonl.gz", gzip.compress(JSONL)[:-12])
    write(tmp_path / "d.txt", b"good")
    stats = ReadStats()
    documents = list(read_documents(str(tmp_path), skip_bad=True, stats=stats))
    assert [(d.text, d.row) for d in documents if d.path == "b.jsonl"] == [
        ("first é", 1),
        ("second\nline", 2),
        ("third", 3),
        ("last", 6),
    ]
    assert documents[-1].text == "good"
    assert stats.bad == 5 and "a.txt: binary" in stats.first_bad
    with pytest.raises(DataError, match=r"a\.txt: empty: no text in 1 file\(s\), 1 bad files or rows skipped"):
        list(read_documents(str(tmp_path / "a.txt"), skip_bad=True))


@pytest.mark.parametrize(("module", "name"), [("zstandard", "x.jsonl.zst"), ("pyarrow", "x.parquet")])
def test_a_missing_extra_names_its_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r'needs .*pip install "gdn\[data\]"'):
        list(read_documents(str(write(tmp_path / name, b"x")), text_column="text"))
