import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gdn.data.documents import Document
from gdn.data.holdout import choose_holdout, cut_document, document_group
from gdn.errors import DataError


def document(text: str, path: str = "a.txt", row: int = 0) -> Document:
    return Document(text, path, row, "")


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
