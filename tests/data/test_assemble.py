"""Which documents are kept of what tasks made, against a list and a set in memory."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gdn.data import assemble
from gdn.data.assemble import ROWS, TASK, Kept, select, task_folder
from gdn.data.shards import HELDOUT, TRAIN
from gdn.data.sources import Stream

TASKS = st.lists(st.lists(st.tuples(st.integers(0, 12), st.integers(1, 9)), min_size=1, max_size=40), min_size=1, max_size=5)


def write_task(work: Path, task: int, split: str, documents: list[tuple[int, int]]) -> None:
    """A task's folder as `select` reads it; of each document what its text is, and its tokens."""
    folder = task_folder(work, task)
    folder.mkdir(parents=True)
    lengths = [length for _, length in documents]
    rows = np.zeros(len(documents), dtype=ROWS)
    rows["start"] = np.cumsum([0, *lengths[:-1]])
    rows["hash"] = [[text // 3, text % 3] for text, _ in documents]
    rows.tofile(folder / f"{split}.rows")
    counts = {"tokens": sum(lengths), "documents": len(documents), "sha256": ""}
    (folder / TASK).write_text(json.dumps({"splits": {split: counts}, "labels": [""]}))


def documents_of(kept: list[Kept]) -> list[tuple[int, int]]:
    """(task, place) of all that is kept."""
    found = []
    for item in kept:
        for split in item.ends:
            for block in assemble._blocks(item, split):
                found += [(int(item.folder.name), block.first + int(place)) for place in np.flatnonzero(block.kept)]
    return found


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TASKS, TASKS, st.one_of(st.none(), st.integers(1, 300)), st.booleans(), st.sampled_from([8, 16, 1 << 18]))
def test_what_is_kept_is_what_a_set_would_keep(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    train: list[list[tuple[int, int]]],
    heldout: list[list[tuple[int, int]]],
    limit: int | None,
    deduplicate: bool,
    block: int,
) -> None:
    """Texts with many copies each, so that a file of hashes is longer than what is sorted together."""
    monkeypatch.setattr(assemble, "_SORTED", block)
    monkeypatch.setattr(assemble, "_BLOCK", block)
    work = tmp_path_factory.mktemp("work")
    for number, (split, documents) in enumerate([*((TRAIN, task) for task in train), *((HELDOUT, task) for task in heldout)]):
        write_task(work, number, split, documents)
    streams = [
        Stream(0, TRAIN, limit, 0, [[]] * len(train)),
        Stream(0, HELDOUT, None, len(train), [[]] * len(heldout)),
    ]
    (work / "hashes").mkdir()
    (work / "hashes" / "000000").write_bytes(b"left by a run that was killed")
    kept, lacking = select(streams, work, deduplicate)
    wanted, seen, left = [], set(), limit
    for number, task in enumerate([*train, *heldout]):
        for place, (text, length) in enumerate(task):
            if number < len(train) and left is not None and left <= 0:
                break
            if deduplicate and text in seen:
                continue
            seen.add(text)
            wanted.append((number, place))
            if number < len(train) and left is not None:
                left -= length
    assert documents_of(kept) == wanted
    assert lacking == {0: max(left or 0, 0), 1: 0}
    assert (work / "hashes").exists() == (not deduplicate)
    numbers = [(item.folder, bits, split) for item in kept for split, bits in item.dropped.items()]
    assert all(bits.nbytes <= -(-len(np.fromfile(folder / f"{split}.rows", ROWS)) // 8) for folder, bits, split in numbers)
