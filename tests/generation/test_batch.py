"""Prompts beside each other have the text they have alone; rows end and join; what cannot be run is named."""

from typing import Any

import pytest
import torch
from generation_testing import random_ids, tiny_model

from gdn.errors import CheckpointError, ConfigError
from gdn.generation import batch
from gdn.generation.batch import generate_batch
from gdn.generation.engine import generate
from gdn.generation.sampling import Sampling

PROMPTS = [random_ids(length, seed=length) for length in (5, 1, 70, 9, 2, 33, 12)]
SAMPLINGS = [Sampling(temperature=0), Sampling(seed=3), Sampling(0.7, 10, 0.9, 1)]


def texts(pairs: Any, count: int) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(count)]
    for i, token in pairs:
        found[i].append(token)
    return found


@pytest.mark.parametrize("rows", [1, 3, 20])
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_a_prompt_has_the_text_it_has_alone(sampling: Sampling, rows: int) -> None:
    model = tiny_model()
    alone = [list(generate(model, ids, max_new_tokens=8, sampling=sampling)) for ids in PROMPTS]
    eos = {alone[0][2], alone[3][5]}
    wanted = [ids[: min([*(ids.index(e) + 1 for e in eos if e in ids), len(ids)])] for ids in alone]
    got = generate_batch(model, PROMPTS, max_new_tokens=8, sampling=sampling, eos_ids=eos, rows=rows)
    assert texts(got, len(PROMPTS)) == wanted and len({len(ids) for ids in wanted}) > 1


def test_each_prompt_has_a_seed_of_its_own() -> None:
    model, seeds = tiny_model(), [5, 6, 5]
    got = texts(generate_batch(model, [PROMPTS[0]] * 3, max_new_tokens=8, sampling=Sampling(), seeds=seeds), 3)
    assert got[0] == got[2] != got[1]
    assert got == [list(generate(model, PROMPTS[0], max_new_tokens=8, sampling=Sampling(seed=seed))) for seed in seeds]


def test_a_prompt_joins_as_soon_as_a_row_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    step = batch.ReaderStream.next
    monkeypatch.setattr(batch.ReaderStream, "next", lambda self, rows: steps.append(len(rows)) or step(self, rows))
    model = tiny_model()
    order = [i for i, _ in generate_batch(model, PROMPTS[:3], max_new_tokens=4, sampling=SAMPLINGS[0], rows=2)]
    assert order == [0, 1, 0, 1, 0, 1, 0, 1, 2, 2, 2, 2] and steps == [2, 2, 2, 1, 1, 1]


def test_nothing_to_do() -> None:
    model = tiny_model()
    assert list(generate_batch(model, [], max_new_tokens=4, sampling=Sampling())) == []
    assert list(generate_batch(model, PROMPTS, max_new_tokens=0, sampling=Sampling())) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": [[1], []]}, r"prompts\[1\] is empty"),
        ({"prompts": [[1], [2, 99]]}, r"prompts\[1\]\[1\] = 99; expected an id in"),
        ({"rows": 0}, "rows = 0; expected at least 1"),
        ({"seeds": [1]}, "seeds: 1 for 2 prompts"),
        ({"eos_ids": [-1]}, "eos_ids: -1"),
        ({"max_new_tokens": -1}, "max_new_tokens = -1"),
        ({"prefill_chunk": 100}, "prefill_chunk = 100"),
    ],
    ids=str,
)
def test_what_cannot_be_run_is_named_at_the_call(changes: dict[str, Any], message: str) -> None:
    arguments = {"prompts": [[1], [2]], "max_new_tokens": 2, "sampling": Sampling()} | changes
    with pytest.raises(ConfigError, match=message):
        generate_batch(tiny_model(), arguments.pop("prompts"), **arguments)


def test_damaged_weights_are_told() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(CheckpointError, match="finite"):
        list(generate_batch(model, PROMPTS[:2], max_new_tokens=2, sampling=Sampling()))
