import dataclasses
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shards_testing import prepare_texts
from torch import Tensor

from gdn.data.loader import IGNORED, Loader, sequential_windows
from gdn.data.order import Order
from gdn.data.shards import SourceRecord, TokenShards
from gdn.data.tokenizer import train_bpe
from gdn.errors import ConfigError, DataError

T = 8


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    texts = ["ab" * (1 + (i * 7) % 11) + "." * (i % 3) for i in range(60)]
    out = tmp_path_factory.mktemp("loader") / "out"
    prepare_texts(texts, train_bpe([], 257), out, task_bytes=200)
    return TokenShards.open(out, "train")


def stream(shards: TokenShards) -> Tensor:
    return torch.from_numpy(shards.read(0, shards.num_tokens))


def test_micro_batches_are_slices_of_the_stream_in_order(shards: TokenShards) -> None:
    loader = Loader(shards, T, 2, 6, seed=5)
    tokens = stream(shards)
    order = Order((len(tokens) - 1) // T, 5)
    for step in (0, 3, 1000):
        batches = list(loader.micro_batches(step))
        assert torch.cat([batch.window_ids for batch in batches]).tolist() == order.batch(step, 6).tolist()
        for batch in batches:
            assert batch.cu_seqlens is None
            for row, window in enumerate(batch.window_ids.tolist()):
                assert torch.equal(batch.input_ids[row], tokens[window * T : window * T + T])
                assert torch.equal(batch.labels[row], tokens[window * T + 1 : window * T + T + 1])


def test_an_epoch_predicts_every_token_once(shards: TokenShards) -> None:
    loader = Loader(shards, T, 1, 1, seed=1)
    count = shards.parts[0].num_windows(T)
    windows = [int(batch.window_ids[0]) for step in range(count) for batch in loader.micro_batches(step)]
    assert sorted(windows) == list(range(count))
    assert shards.num_tokens - 1 - count * T < T


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_the_global_batch_is_the_same_for_any_division(shards: TokenShards, world_size: int, micro_batch_size: int) -> None:
    whole = next(Loader(shards, T, 48, 48, seed=3).micro_batches(7))
    loader = Loader(shards, T, micro_batch_size, 48, seed=3)
    parts = [batch for rank in range(world_size) for batch in loader.micro_batches(7, rank, world_size)]
    assert len(parts) == 48 // micro_batch_size
    for name in ("input_ids", "labels", "window_ids"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


def test_reset_at_documents_packs_and_masks(shards: TokenShards) -> None:
    tokens = stream(shards).tolist()
    starts = set(shards.document_starts(0, shards.num_tokens).tolist())
    assert starts == {i for i, token in enumerate(tokens) if token == 0}  # BOS marks them in this split
    loader = Loader(shards, T, 3, 6, seed=9, reset_at_documents=True)
    lengths, masked = set(), 0
    for step in range(20):
        for batch in loader.micro_batches(step):
            boundaries: list[int] = []
            labels: list[int] = []
            inputs: list[int] = []
            for row, window in enumerate(batch.window_ids.tolist()):
                for i in range(T):
                    position = window * T + i
                    if i == 0 or position in starts:
                        boundaries.append(row * T + i)
                    inputs.append(tokens[position])
                    labels.append(IGNORED if position + 1 in starts else tokens[position + 1])
            assert batch.input_ids.tolist() == [inputs] and batch.labels.tolist() == [labels]
            assert batch.cu_seqlens is not None and batch.cu_seqlens.dtype == torch.int32
            got = batch.cu_seqlens.tolist()
            assert got[: len(boundaries)] == boundaries
            assert got[len(boundaries) :] and set(got[len(boundaries) :]) == {3 * T}
            lengths.add(len(got))
            masked += labels.count(IGNORED)
    assert len(lengths) == 1 and masked > 20


def test_without_reset_the_next_document_is_a_target(shards: TokenShards) -> None:
    batch = next(Loader(shards, T, 8, 8, seed=1).micro_batches(0))
    assert not (batch.labels == IGNORED).any() and (batch.labels == 0).any()


@pytest.mark.parametrize("seq_len", [1, 8, 37, 100_000])
def test_sequential_windows_cover_the_split(shards: TokenShards, seq_len: int) -> None:
    tokens = stream(shards)
    batches = list(sequential_windows(shards, seq_len, 4))
    labels = torch.cat([batch.labels.flatten() for batch in batches])
    inputs = torch.cat([batch.input_ids.flatten() for batch in batches])
    valid = labels != IGNORED
    assert torch.equal(labels[valid], tokens[1:]) and torch.equal(inputs[valid], tokens[:-1])
    assert not valid[len(tokens) - 1 :].any() and valid[: len(tokens) - 1].all()
    ids = torch.cat([batch.window_ids for batch in batches])
    assert torch.equal(ids, torch.arange(len(ids))) and len(labels) == len(ids) * seq_len


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=12), st.sampled_from([1, 2, 3, 4]))
def test_reading_ahead_changes_nothing(shards: TokenShards, steps: list[int], world_size: int) -> None:
    """Steps in any order, by whichever rank: what was read in the background is used for the very step it was read for."""
    loader = Loader(shards, T, 2, 24, seed=4)
    for step in steps:
        rank = step % world_size
        got = [batch.window_ids for batch in loader.micro_batches(step, rank, world_size)]
        fresh = [batch.window_ids for batch in Loader(shards, T, 2, 24, seed=4).micro_batches(step, rank, world_size)]
        assert all(torch.equal(a, b) for a, b in zip(got, fresh, strict=True))


def test_the_next_step_is_read_in_the_background(shards: TokenShards, monkeypatch: pytest.MonkeyPatch) -> None:
    loader, threads = Loader(shards, T, 2, 4, seed=4), []
    load = loader.load  # of this loader alone: those of other tests may still be reading ahead
    monkeypatch.setattr(loader, "load", lambda w: (threads.append(threading.current_thread()), load(w))[1])
    for step in range(5, 9):
        list(loader.micro_batches(step))
    assert loader._ahead is not None
    loader._ahead[1].result()
    main = [thread is threading.main_thread() for thread in threads]
    assert main == [True] * 2 + [False] * 8


def test_weighted_sources_are_parts_with_windows_of_their_own(shards: TokenShards) -> None:
    """The same files, told to come from two sources: windows do not cross from one to the other, shares are the weights."""
    files = shards.manifest.splits["train"]
    files = tuple(dataclasses.replace(file, source=int(i >= 2)) for i, file in enumerate(files))
    sources = (SourceRecord("a", "", 1.0), SourceRecord("b", "", 3.0))
    manifest = dataclasses.replace(shards.manifest, splits={"train": files}, sources=sources)
    assert manifest.fingerprint != shards.manifest.fingerprint
    mixed = TokenShards(shards.folder, "train", manifest)
    border = sum(file.tokens for file in files[:2])
    assert [(part.first, part.num_tokens) for part in mixed.parts] == [(0, border), (border, shards.num_tokens - border)]
    tokens, counts = stream(shards), [(border - 1) // T, (shards.num_tokens - border - 1) // T]
    starts = {i * T for i in range(counts[0])} | {border + i * T for i in range(counts[1])}
    for reset in (False, True):
        loader, seen, first = Loader(mixed, T, 4, 8, 2, reset), set(), 0
        for step in range(60):
            for batch in loader.micro_batches(step):
                for row, window in enumerate(batch.window_ids.tolist()):
                    start = window * T if window < counts[0] else border + (window - counts[0]) * T
                    assert torch.equal(batch.input_ids.reshape(-1, T)[row], tokens[start : start + T])
                    seen.add(start)
                    first += start < border
        assert seen == starts and abs(first - 60 * 8 / 4) <= 2
    with pytest.raises(DataError, match=f"has {border} tokens of a; expected at least {border + 1}"):
        Loader(mixed, border, 1, 1, seed=0)


def test_bad_sizes_get_one_line(shards: TokenShards) -> None:
    with pytest.raises(ConfigError, match="global_batch_size = 5; expected a multiple of micro_batch_size = 2"):
        Loader(shards, T, 2, 5, seed=0)
    with pytest.raises(ConfigError, match="seq_len = 0"):
        Loader(shards, 0, 2, 4, seed=0)
    with pytest.raises(ConfigError, match="micro_batch_size = 2 times world_size = 4"):
        next(Loader(shards, T, 2, 4, seed=0).micro_batches(0, 0, 4))
    with pytest.raises(DataError, match=f"has {shards.num_tokens} tokens; expected at least {shards.num_tokens + 1}"):
        Loader(shards, shards.num_tokens, 1, 1, seed=0)
    assert Loader(shards, shards.num_tokens - 1, 1, 1, seed=0).order.num_windows == 1


def test_a_step_is_bit_identical_every_time(tmp_path: Path, shards: TokenShards) -> None:
    again = TokenShards.open(shards.folder, "train")
    for reset in (False, True):
        one, two = (Loader(source, T, 2, 4, 11, reset).micro_batches(123) for source in (shards, again))
        for a, b in zip(one, two, strict=True):
            for x, y in zip(a, b, strict=True):
                assert (x is None and y is None) or np.array_equal(x, y)
