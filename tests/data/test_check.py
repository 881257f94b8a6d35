"""A manifest whose counts are not those of its shards and tokenizer: each is a line; a folder as it was written passes."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shards_testing import prepare_texts, write_rows

from gdn.cli import main
from gdn.data.check import check_folder
from gdn.data.cuts import byte_lengths
from gdn.data.prepare import Options, prepare
from gdn.data.shards import HELDOUT, TRAIN, TokenShards, read_manifest, write_manifest
from gdn.data.sources import Source
from gdn.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from gdn.errors import DataError
from gdn.files import sha256_file

TEXTS = [f"document {i} é " * (1 + i % 5) for i in range(120)]
WORDS = train_bpe(TEXTS, 280)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """By hash: a tenth held out."""
    source = write_rows(tmp_path / "source.jsonl", TEXTS)
    prepare([Source(str(source))], WORDS, tmp_path / "out", Options(holdout=0.2, eos=True, task_bytes=1500))
    return tmp_path / "out"


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads((folder / "manifest.json").read_text())
    change(data)
    (folder / "manifest.json").write_text(json.dumps(data))


def train(index: int, **values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest["splits"][TRAIN][index].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(vocab_size=281), r"vocab_size is 281; expected 280, the tokenizer's"),
        (lambda m: m.update(bos_id=5), r"bos_id is 5; expected 0, by the tokenizer and bos_policy 'before_each_document'"),
        (lambda m: m.update(bos_id=5), r"splits.train\[0\]: \d+ of \d+ documents in train-00000.bin without bos_id = 5"),
        (lambda m: m.update(eos_policy="none"), r"eos_id is 0; expected None, by the tokenizer and eos_policy 'none'"),
        (
            lambda m: m["source_tokens"][TRAIN].update({"": 7}),
            r"source_tokens.train sums to 7; expected \d+, the tokens of its",
        ),
        (lambda m: m["source_tokens"].pop(HELDOUT), r"source_tokens is of 'train'; expected 'train', 'heldout', the splits"),
        (lambda m: m.update(bos_id=10**9), r"bos_id is 1000000000; expected 0"),
        (lambda m: m.update(vocab_size=10**12), r"vocab_size is 1000000000000; expected 280"),
        (lambda m: m["source_tokens"].update(train=3), r"source_tokens.train is 3; expected an object of whole numbers"),
        (lambda m: m["source_tokens"][TRAIN].update({"": "x"}), r"source_tokens.train is {'': 'x'}; expected an object of"),
        (train(1, bytes=99), r"splits.train\[1\]: bytes is 99; expected \d+, the text of train-00001.bin"),
        (lambda m: m["options"].update(holdout_share=0.0), r"holdout_share is 0.0; (\d+) of \1 documents of heldout belong"),
        (
            lambda m: m["options"].update(holdout_share=0.9),
            r"holdout_share is 0.9; \d+ of \d+ documents of train belong elsewhere",
        ),
    ],
)
def test_a_count_that_is_not_that_of_the_shards(
    folder: Path, change: Callable[[dict[str, Any]], object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "check", str(folder)]) == 0
    assert capsys.readouterr().out.endswith("all checksums and counts right\n")
    edit(folder, change)
    with pytest.raises(DataError, match=rf"manifest\.json: .*{message}"):
        check_folder(folder)
    assert main(["data", "check", str(folder)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_each_of_several_is_a_line(folder: Path) -> None:
    edit(folder, lambda m: (train(0, bytes=1)(m), train(1, bytes=2)(m), m.update(vocab_size=279 + 2)))
    with pytest.raises(DataError) as caught:
        check_folder(folder)
    assert "manifest.json: vocab_size is 281; expected 280" in str(caught.value).splitlines()[0]
    edit(folder, lambda m: m.update(vocab_size=280))
    with pytest.raises(DataError) as caught:
        check_folder(folder)
    assert len(str(caught.value).splitlines()) == 2


def rewrite(folder: Path, name: str, data: np.ndarray) -> None:
    """Another content with a checksum that is right."""
    data.tofile(folder / name)
    manifest = read_manifest(folder)
    field = "sha256" if name.endswith(".bin") else "docs_sha256"
    first = dataclasses.replace(manifest.splits[TRAIN][0], **{field: sha256_file(folder / name)})
    splits = manifest.splits | {TRAIN: (first, *manifest.splits[TRAIN][1:])}
    write_manifest(dataclasses.replace(manifest, splits=splits), folder)


def test_tokens_and_places_that_are_none(folder: Path) -> None:
    tokens, places = np.fromfile(folder / "train-00000.bin", "<u2"), np.fromfile(folder / "train-00000.docs", "<u8")
    rewrite(folder, "train-00000.docs", places[::-1].copy())
    with pytest.raises(DataError, match=r"splits.train\[0\]: train-00000.docs does not hold \d+ ascending places from 0 to"):
        check_folder(folder)
    rewrite(folder, "train-00000.docs", places)
    rewrite(folder, "train-00000.bin", np.where(np.arange(len(tokens)) == 3, 280, tokens).astype("<u2"))
    with pytest.raises(
        DataError, match=r"splits.train\[0\]: a token 280 in train-00000.bin; expected less than the tokenizer's 280"
    ):
        check_folder(folder)
    rewrite(folder, "train-00000.bin", np.where(np.arange(len(tokens)) == len(tokens) - 1, 5, tokens).astype("<u2"))
    with pytest.raises(DataError, match=r"1 of \d+ documents in train-00000.bin without eos_id = 0"):
        check_folder(folder)


@pytest.mark.parametrize("block", [1, 3, 7])
def test_what_is_found_does_not_hang_on_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    def found() -> str:
        with pytest.raises(DataError) as caught:
            check_folder(folder)
        return str(caught.value)

    edit(folder, lambda m: (m.update(bos_id=5, eos_id=6), train(0, bytes=1)(m)))
    whole = found()
    assert len(whole.splitlines()) > 6
    monkeypatch.setattr("gdn.data.check._BLOCK", block)
    assert found() == whole
    edit(folder, lambda m: (m.update(bos_id=0, eos_id=0), train(0, bytes=2)(m)))
    assert len(found().splitlines()) == 1


def test_a_split_of_the_sources_own_is_no_matter_of_hashes(tmp_path: Path) -> None:
    prepare_texts(TEXTS[10:], WORDS, tmp_path / "out", TEXTS[:10], holdout=0.5)
    check_folder(tmp_path / "out")


def test_bytes_by_the_published_vocabulary(test_data: Callable[[str], Path], tmp_path: Path) -> None:
    """Its mark of a space may stand in a text, so that bytes lie between two bounds, of which the lower is met without one."""
    tokenizer = load_tokenizer(test_data("data/tokenizer/mistral-7b-v0.1"))
    texts = [*TEXTS, " two  spaces\n", "\u2028漢字 🙂"]
    for number, extra in enumerate(([], ["a mark \u2581\u2581 itself"])):
        out = tmp_path / str(number)
        manifest = prepare_texts([*texts, *extra], tokenizer, out)
        lengths = byte_lengths(json.loads(tokenizer.serialized), tokenizer.vocab_size)
        assert lengths is not None
        shards = TokenShards.open(out, TRAIN)
        counts = np.bincount(shards.read(0, shards.num_tokens), minlength=tokenizer.vocab_size)
        counts[1] = 0
        spare = manifest.num_bytes(TRAIN) - (int(counts @ lengths.tables[0]) - manifest.num_documents(TRAIN))
        assert spare == 4 * len(extra)
        check_folder(out)
        edit(out, train(0, bytes=manifest.num_bytes(TRAIN) - 1 - 4 * len(extra)))
        with pytest.raises(DataError, match=r"bytes is \d+; expected \d+ to \d+, the text of train-00000.bin"):
            check_folder(out)


def test_bytes_are_left_alone_where_ids_do_not_tell(tmp_path: Path) -> None:
    definition = json.loads(WORDS.serialized) | {"normalizer": {"type": "Lowercase"}}
    lower = Tokenizer(json.dumps(definition).encode(), {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"})
    prepare_texts(["Ⱥ GROWS when lowered"], lower, tmp_path / "out")
    check_folder(tmp_path / "out")
    edit(tmp_path / "out", train(0, bytes=1))
    check_folder(tmp_path / "out")
