import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shards_testing import prepare_texts

from gdn.data.shards import TokenShards, read_manifest, verify_shards
from gdn.data.tokenizer import train_bpe
from gdn.errors import DataError

TEXTS = [f"document {i} " * (1 + i % 5) for i in range(30)]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards") / "out"
    train, held = [text for i, text in enumerate(TEXTS) if i % 6], TEXTS[::6]
    prepare_texts(train, train_bpe(TEXTS, 270), out, held, task_bytes=280)
    return out


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    for path in pristine.rglob("*"):
        if path.is_file():
            copy = tmp_path / path.relative_to(pristine)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return tmp_path


def whole(folder: Path, split: str) -> tuple[np.ndarray, list[int]]:
    """The stream and its document starts, read without TokenShards."""
    files = sorted(folder.glob(f"{split}-*.bin"))
    tokens = [np.fromfile(file, dtype="<u2").astype(np.int64) for file in files]
    starts, base = [], 0
    for file, part in zip(files, tokens):
        starts += [base + int(offset) for offset in np.fromfile(file.with_suffix(".docs"), dtype="<u8")]
        base += len(part)
    return np.concatenate(tokens), starts


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_stretch_equals_the_files(pristine: Path, data: st.DataObject) -> None:
    tokens, starts = whole(pristine, "train")
    shards = TokenShards.open(pristine, "train")
    assert shards.num_tokens == len(tokens) and len(read_manifest(pristine).splits["train"]) == 5
    start = data.draw(st.integers(0, len(tokens)))
    count = data.draw(st.integers(0, len(tokens) - start))
    got = shards.read(start, count)
    assert got.dtype == np.int64 and np.array_equal(got, tokens[start : start + count])
    expected = [offset - start for offset in starts if start <= offset < start + count]
    assert shards.document_starts(start, count).tolist() == expected


@pytest.mark.parametrize("seq_len", [1, 2, 7, 20, 64, 100, 10_000])
def test_windows_and_documents_per_window(pristine: Path, seq_len: int) -> None:
    tokens, starts = whole(pristine, "train")
    shards = TokenShards.open(pristine, "train")
    assert shards.parts[0].num_windows(seq_len) == sum(
        1 for w in range(len(tokens)) if w * seq_len + seq_len + 1 <= len(tokens)
    )
    assert shards.max_documents(0, seq_len) == np.bincount(np.array(starts) // seq_len).max()
    later = starts[len(starts) // 2]
    assert (
        shards.max_documents(later, seq_len)
        >= np.bincount(np.array([s - later for s in starts if s >= later]) // seq_len).max()
    )


def test_reading_outside_is_an_index_error(pristine: Path) -> None:
    shards = TokenShards.open(pristine, "heldout")
    for start, count in ((-1, 2), (0, shards.num_tokens + 1), (shards.num_tokens, 1), (3, -1)):
        with pytest.raises(IndexError):
            shards.read(start, count)
        with pytest.raises(IndexError):
            shards.document_starts(start, count)


@pytest.mark.parametrize("name", ["train-00002.bin", "heldout-00000.docs"])
def test_a_truncated_shard_is_named_at_open(folder: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    for altered in (data[:-1], data + b"\0", b""):
        (folder / name).write_bytes(altered)
        with pytest.raises(DataError, match=f"{name}: truncated or altered: got {len(altered)} bytes, expected {len(data)}"):
            TokenShards.open(folder, name.split("-")[0])
        with pytest.raises(DataError, match=name):
            verify_shards(folder)
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{name}: cannot be read: No such file.*expected a file of {len(data)} bytes"):
        verify_shards(folder)


@pytest.mark.parametrize("name", ["train-00002.bin", "train-00001.docs", "tokenizer/tokenizer.json"])
def test_one_flipped_bit_is_found(folder: Path, name: str) -> None:
    seen: list[str] = []
    verify_shards(folder, seen.append)
    assert {"train-00002.bin", "train-00001.docs", "heldout-00000.bin"} <= set(seen)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 4
    (folder / name).write_bytes(data)
    with pytest.raises(DataError, match=rf"{name}: altered: got sha256 [0-9a-f]{{64}}, expected [0-9a-f]{{64}}"):
        verify_shards(folder)
    if name != "tokenizer/tokenizer.json":
        with pytest.raises(DataError, match=name):
            TokenShards.open(folder, "train").verify()


def test_sums_are_computed_again_only_for_files_that_changed(folder: Path) -> None:
    def read() -> list[str]:
        seen: list[str] = []
        TokenShards.open(folder, "train").verify(seen.append)
        return seen

    assert len(read()) == 10 and read() == []
    path = folder / "train-00002.bin"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=times)  # a time of change set back is no disguise: the inode's own is looked at too
    assert read() == ["train-00002.bin"] and read() == []
    edit(folder, lambda m: m["splits"]["train"][3].update(sha256="0" * 64))
    with pytest.raises(DataError, match=r"train-00003\.bin: altered"):
        read()


def test_more_shards_than_files_may_be_open(pristine: Path) -> None:
    """In a process of its own: the limit is raised as far as the system lets, and named where it does not."""
    code = f"""
import resource, sys
from pathlib import Path
import gdn.data.shards as shards
shards._OTHER_FILES = 30
resource.setrlimit(resource.RLIMIT_NOFILE, (10, int(sys.argv[1])))
train = shards.TokenShards.open(Path({str(pristine)!r}), "train")
print(len(train.read(0, train.num_tokens)))
"""
    run = [subprocess.run([sys.executable, "-c", code, hard], capture_output=True, text=True) for hard in ("200", "40")]
    assert run[0].stdout.strip() == str(TokenShards.open(pristine, "train").num_tokens), run[0].stderr
    assert "files of shards, and a process may open 40 here; expected ulimit -n" in run[1].stderr


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((folder / "manifest.json").read_text())
    change(data)
    (folder / "manifest.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format_version=1), "format_version 1; this gdn reads 2"),
        (lambda m: m.pop("bos_policy"), "key 'bos_policy' is missing"),
        (lambda m: m.pop("splits"), "key 'splits' is missing"),
        (lambda m: m.update(extra=1), "key 'extra' is unknown"),
        (lambda m: m.update(vocab_size="280"), "vocab_size is '280'; expected a non-negative integer"),
        (lambda m: m.update(vocab_size=True), "vocab_size is True; expected a non-negative integer"),
        (lambda m: m.update(bos_id=-1), "bos_id is -1"),
        (lambda m: m.update(dtype="int8"), "dtype 'int8'; expected one of uint16, uint32"),
        (lambda m: m.update(bos_policy="odd"), "bos_policy 'odd'"),
        (lambda m: m.update(splits=[]), r"splits is \[\]; expected an object"),
        (lambda m: m.update(eos_policy="odd"), "eos_policy 'odd'"),
        (lambda m: m["sources"][0].update(weight=-1.0), r"weights \[-1.0\]; expected none, or one above 0"),
        (lambda m: m["sources"][0].update(weight="1"), r"sources\[0\].weight is '1'; expected a number"),
        (lambda m: m["splits"]["train"][2].update(source=1), "train-00002.bin has source 1; expected ascending ones of 1"),
        (lambda m: m["splits"]["train"][1].pop("tokens"), r"key 'splits.train\[1\].tokens' is missing"),
        (lambda m: m["splits"]["train"][0].update(tokens=-5), r"splits.train\[0\].tokens is -5"),
        (lambda m: m["splits"]["train"][0].update(tokens=0), "train-00000.bin has 0 tokens"),
        (lambda m: m["splits"]["train"][0].update(name="../train-00000.bin"), "shard name '../train-00000.bin'"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(folder: Path, change: Callable[[Any], object], message: str) -> None:
    edit(folder, change)
    with pytest.raises(DataError, match=rf"manifest\.json: {message}"):
        read_manifest(folder)


def test_a_missing_or_broken_manifest(folder: Path) -> None:
    with pytest.raises(DataError, match=r"no split 'test'; it has 'train', 'heldout'"):
        TokenShards.open(folder, "test")
    for text in ("{", "[]", "3", '"x"'):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(DataError, match=r"manifest\.json: "):
            read_manifest(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"no manifest\.json; expected a folder written by `gdn prepare`"):
        verify_shards(folder)
