"""What a source's files are, and how they are cut into tasks; datasets of the Hub by a small server in its place."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn.data.readers import find_text_column, read_documents, read_piece
from gdn.data.sources import Piece, cut, find_files, group
from gdn.errors import DataError

pyarrow = pytest.importorskip("pyarrow", reason="the data extra is not installed")


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def row(text: str) -> bytes:
    return json.dumps({"text": text}).encode() + b"\n"


def read(pieces: list[Piece]) -> list[str]:
    return [item if isinstance(item, str) else item.text for piece in pieces for item in read_piece(piece, "text")]  # type: ignore[union-attr]


def test_a_file_a_folder_and_a_glob(tmp_path: Path) -> None:
    for name in ("a.txt", "sub/b.jsonl", "sub/c.md", "sub/.hidden.md", "sub/image.png", "skip/d.txt"):
        write(tmp_path / name, row("x"))

    def names(spec: str, **options: Any) -> list[str]:
        return [file.name for file in find_files(str(tmp_path / spec), **options).files]

    (tmp_path / "sub" / "link.txt").symlink_to(tmp_path / "a.txt")  # as in the Hub's cache
    assert "sub/link.txt" in names("")
    (tmp_path / "sub" / "link.txt").unlink()
    assert names("", exclude=["skip"]) == ["a.txt", "sub/b.jsonl", "sub/c.md"]
    assert names("", suffixes=[".md"]) == ["sub/c.md"]
    assert names("sub/image.png") == ["image.png"]
    assert names("s*/*.*") == ["skip/d.txt", "sub/b.jsonl", "sub/c.md"]
    assert names("sub/*.jsonl") == ["b.jsonl"]


def test_any_file_system_of_fsspec() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/source/train/one.jsonl", row("one") + row("two"))
    fs.pipe("/source/validation/two.jsonl", row("held"))
    found = find_files("memory://source")
    assert [(file.url, file.split) for file in found.files] == [
        ("memory:///source/train/one.jsonl", "train"),
        ("memory:///source/validation/two.jsonl", "heldout"),
    ]
    assert [document.text for document in read_documents("memory://source/*/*.jsonl")] == ["one", "two", "held"]


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["train/chunk1/a.jsonl", "validation/chunk1/b.jsonl", "test/c.jsonl"], ["train", "heldout"]),
        (["data/train-00000-of-00002.parquet", "data/test-0.parquet", "data/validation-0.parquet"], ["train", "heldout"]),
        (["train.jsonl", "dev.jsonl", "more.jsonl", "README.md"], ["heldout", "train", "train"]),
        (["test/a.jsonl", "b.jsonl"], [None, None]),  # no train split, so "test" is only a name
        (["train.py", "test/a.py"], [None, None]),  # of code, such names say nothing
    ],
)
def test_splits_of_the_sources_own_layout(tmp_path: Path, files: list[str], splits: list[str | None]) -> None:
    for name in files:
        write(tmp_path / name, row("x"))
    assert [file.split for file in find_files(str(tmp_path)).files] == splits


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text("ab\u00e9 \n", max_size=30), max_size=25), st.integers(1, 200), st.booleans())
def test_stretches_of_plain_jsonl_hold_each_row_once(texts: list[str], task_bytes: int, last_newline: bool) -> None:
    data = b"".join(row(text) for text in texts)
    data = data if last_newline else data[:-1]
    fsspec.filesystem("memory").pipe("/stretches/x.jsonl", data)
    (file,) = find_files("memory://stretches/x.jsonl").files
    pieces = cut(file, task_bytes)
    if len(pieces) > 1:
        assert read(pieces) == texts
        assert len(pieces) == -(-len(data) // task_bytes)


def test_row_groups_of_parquet(tmp_path: Path) -> None:
    import pyarrow.parquet

    texts = [f"text {i} " * 50 for i in range(1000)]
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=100, compression="none")
    (file,) = find_files(str(path)).files
    pieces = cut(file, file.size // 4)
    assert 3 < len(pieces) < 8 and pieces[0].start == 0 and pieces[-1].stop == 10
    assert read(pieces) == texts
    rows = [item.row for item in read_piece(pieces[1], "text") if not isinstance(item, DataError)]
    assert rows[0] == pieces[1].start * 100


def test_tasks_keep_the_order_and_the_size(tmp_path: Path) -> None:
    sizes = [5, 30, 1, 1, 0, 100, 3]
    files = [Piece(str(i), str(i), ".txt", None, 0, -1, size) for i, size in enumerate(sizes)]
    tasks = group(files, 32)
    assert [piece.size for task in tasks for piece in task] == sizes
    assert [[piece.size for piece in task] for task in tasks] == [[5], [30, 1, 1, 0], [100], [3]]
    big = [Piece(str(i), str(i), ".jsonl.zst", None, 0, -1, 10 << 20) for i in range(200)]
    assert {len(task) for task in group(big, 256 << 20)} == {3, 2}  # 2 GB: some 64 tasks, not 8
    assert [len(task) for task in group(big * 100, 256 << 20)][:3] == [25, 25, 25]


def test_the_text_column_is_found(tmp_path: Path) -> None:
    import pyarrow.parquet

    def column(name: str, rows: dict[str, Any]) -> str:
        path = tmp_path / name
        if name.endswith("parquet"):
            pyarrow.parquet.write_table(pyarrow.table({key: [value] for key, value in rows.items()}), path)
        else:
            path.write_text(json.dumps(rows))
        return find_text_column(find_files(str(path)).files)

    for name in ("x.parquet", "x.jsonl"):
        assert column(name, {"id": "1", "text": "x"}) == "text"
        assert column(name, {"id": 1, "words": "x"}) == "words"
        assert column(name, {"id": "1", "content": "x"}) == "content"
        with pytest.raises(DataError, match=rf"{name}: no 'text' column; it has 'id', 'words': name one with --text-column"):
            column(name, {"id": "1", "words": "x"})


def test_the_text_column_is_that_of_the_first_row_file(tmp_path: Path) -> None:
    write(tmp_path / "README.md", b"about")
    write(tmp_path / "data.jsonl", b'{"id": 1, "content": "x"}')
    files = find_files(str(tmp_path)).files
    assert files[0].suffix == ".md" and find_text_column(files) == "content"


def test_sources_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", "http://127.0.0.1:9", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    write(tmp_path / "image.png", b"x")
    for spec, message in [
        (str(tmp_path / "absent"), "absent: no such file or folder"),
        (str(tmp_path), r"no readable file; expected one of .*\.jsonl\.zst"),
        (str(tmp_path / "*.jsonl"), r"no readable file"),
        ("word", "word: no such file or folder; a dataset on the Hub is written OWNER/NAME"),
        ("nowhere://x/y", "nowhere://x/y: cannot be reached: "),
        ("http://127.0.0.1:9/x.jsonl", "x.jsonl: cannot be reached: "),
        ("", "an empty source"),
        ("some/text", "some/text: neither a file here nor to be had from the Hub: .*refused"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            find_files(spec)
        assert "\n" not in str(caught.value)


class Hub(BaseHTTPRequestHandler):
    """The calls that huggingface_hub makes for a dataset: its commit, its tree, its files. One dataset, `some/text`."""

    files: dict[str, bytes] = {}  # noqa: RUF012  set by the test, shared by the server's threads
    sha = "0123456789abcdef0123456789abcdef01234567"

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        if "/some/text" not in path:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "/resolve/" in path:
            data = self.files[path.split(self.sha + "/")[1]]
            first, last = 0, len(data) - 1
            if "Range" in self.headers:
                first, last = (int(part) for part in self.headers["Range"].removeprefix("bytes=").split("-"))
            headers = {"ETag": '"x"', "X-Repo-Commit": self.sha, "Content-Range": f"bytes {first}-{last}/{len(data)}"}
            self._answer(206 if "Range" in self.headers else 200, data[first : last + 1], headers)
        elif "/tree/" in path or "/paths-info/" in path:
            rows = [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in self.files.items()]
            under = path.split(self.sha)[1].strip("/")
            self._answer(200, json.dumps([row for row in rows if str(row["path"]).startswith(under)]).encode(), {})
        else:
            names = [{"rfilename": name} for name in self.files]
            self._answer(200, json.dumps({"id": "some/text", "sha": self.sha, "siblings": names}).encode(), {})

    do_POST = do_HEAD = do_GET

    def _answer(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for key, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    import huggingface_hub
    import huggingface_hub.constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    for module in (huggingface_hub.constants, huggingface_hub.hf_api, huggingface_hub.hf_file_system):
        if hasattr(module, "ENDPOINT"):
            monkeypatch.setattr(module, "ENDPOINT", url)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(huggingface_hub.HfFileSystem, "cachable", False)
    yield Hub
    server.shutdown()
    server.server_close()


def test_a_dataset_of_the_hub_is_read_at_its_commit(hub: type[Hub]) -> None:
    hub.files = {"train/chunk1/a.jsonl": row("one") + row("two"), "validation/b.jsonl": row("held"), "README.md": b"# card"}
    found = find_files("some/text")
    assert found.revision == hub.sha
    assert [(file.name, file.split) for file in found.files] == [
        ("train/chunk1/a.jsonl", "train"),
        ("validation/b.jsonl", "heldout"),
    ]
    assert all(f"some/text@{hub.sha}/" in file.url for file in found.files)
    assert read(found.files) == ["one", "two", "held"]
    with pytest.raises(DataError, match="some/other: neither a file here nor to be had from the Hub: "):
        find_files("some/other")
