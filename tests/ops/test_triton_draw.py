"""Draws without a sort are those of `generation.sampling` with the same noise: in the interpreter, or on a GPU."""

import math
import os

import pytest
import torch
from sampling_testing import draw_by_sorting, keep
from torch import Tensor

from gdn.generation.sampling import Sampling

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from gdn.ops import triton_draw
from gdn.ops.triton_draw import choose, exponential_noise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, VOCAB = 6, 1500
SAMPLINGS = [
    Sampling(temperature=0),
    Sampling(),
    Sampling(1e-320),
    Sampling(0.8, None, 0.95),
    Sampling(1.3, None, 0.2),
    Sampling(1.0, 5),
    Sampling(2.0, 1),
    Sampling(1.5, 30, 0.7),
    Sampling(1.0, VOCAB + 1, 1.0),
    Sampling(0.9, None, 1e-9),
]


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_BLOCK", "_LARGEST_BLOCK"):
        monkeypatch.setattr(triton_draw, name, 1024)


def logits(seed: int = 0, levels: int | None = None) -> Tensor:
    """Of so many different values, if told."""
    x = 2 * torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(seed))
    return (x if levels is None else (x * levels / 8).round() * 8 / levels).to(DEVICE)


def places() -> tuple[Tensor, Tensor]:
    """Seeds, of any sign, and positions."""
    rows = torch.arange(ROWS, device=DEVICE)
    return rows * 7 - 40, rows * 3 + 10**10


def chosen(x: Tensor, sampling: Sampling, rows: slice = slice(None)) -> tuple[Tensor, list[int]]:
    seeds, position = places()
    result = torch.full((2, len(x[rows])), -1, device=DEVICE)
    choose(x[rows], sampling.temperature, sampling.top_k, sampling.top_p, seeds[rows], position[rows], result)
    return result[0], result[1].tolist()


def by_sorting(x: Tensor, sampling: Sampling) -> Tensor:
    return draw_by_sorting(x, sampling, None if sampling.greedy else exponential_noise(*places(), VOCAB))


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("levels", [None, 8], ids=["", "ties"])
def test_a_draw_is_that_of_the_sort(sampling: Sampling, levels: int | None) -> None:
    x = logits(levels=levels)
    x[:, 40:60] = -torch.inf
    got, fine = chosen(x, sampling)
    assert torch.equal(got, by_sorting(x, sampling)) and fine == [1] * ROWS


@pytest.mark.parametrize("vocab", [VOCAB, 1024, 5, 1])
def test_no_draw_hangs_on_the_block(monkeypatch: pytest.MonkeyPatch, vocab: int) -> None:
    """In which the search walks, and makes the noise again."""
    x, sampling, found = logits(4)[:, :vocab].contiguous(), Sampling(2.0, None, 0.3), []
    for block in (64, 1024, 4096):
        monkeypatch.setattr(triton_draw, "_LARGEST_BLOCK", block)
        found.append(chosen(x, sampling)[0])
    wanted = draw_by_sorting(x, sampling, exponential_noise(*places(), vocab))
    assert all(torch.equal(got, wanted) for got in found)


@pytest.mark.parametrize("sampling", [Sampling(1.0, None, 0.1), Sampling(2.0, 3), Sampling(2.0, 40, 0.3)], ids=str)
def test_what_is_drawn_was_kept_and_the_best_of_all_would_not_be(sampling: Sampling) -> None:
    """The control: without the search, most of these draws would lie outside the kept set."""
    x = logits(1)
    kept = keep(x, sampling)
    unfiltered = by_sorting(x, Sampling(sampling.temperature))
    assert kept.gather(1, chosen(x, sampling)[0][:, None]).all()
    assert int(kept.gather(1, unfiltered[:, None]).sum()) <= ROWS // 2


@pytest.mark.parametrize("sampling", [SAMPLINGS[0], SAMPLINGS[3], SAMPLINGS[7]], ids=str)
def test_a_row_is_drawn_as_if_alone(sampling: Sampling) -> None:
    x = logits(2)
    together, _ = chosen(x, sampling)
    x[3] = torch.nan
    for row in (0, ROWS - 1):
        assert chosen(x, sampling, slice(row, row + 1))[0].item() == together[row]
    got, fine = chosen(x, sampling)
    assert fine == [int(row != 3) for row in range(ROWS)] and torch.equal(got[4:], together[4:])


@pytest.mark.parametrize("sampling", [SAMPLINGS[0], SAMPLINGS[1], SAMPLINGS[3], SAMPLINGS[7]], ids=str)
def test_rows_without_a_finite_best_logit_are_told_and_still_give_an_id(sampling: Sampling) -> None:
    x = logits(3)
    x[0], x[1, 1200], x[2, 5], x[3, 1:] = -torch.inf, torch.nan, torch.inf, -torch.inf
    got, fine = chosen(x, sampling)
    assert fine == [0, 0, 0] + [1] * (ROWS - 3) and got[3] == 0
    assert ((got >= 0) & (got < VOCAB)).all()


def test_the_noise_is_exponential_and_hangs_on_seed_and_position_alone() -> None:
    n = 20_000
    seeds, position = torch.tensor([7, 7, 8], device=DEVICE), torch.tensor([4, 5, 4], device=DEVICE)
    noise = exponential_noise(seeds, position, n)
    assert (noise > 0).all() and len({tuple(row[:3].tolist()) for row in noise}) == 3
    for least in (0.01, 0.5, 1.0, 3.0, 6.0):  # within five standard deviations
        share, wanted = (noise > least).double().mean().item(), math.exp(-least)
        assert abs(share - wanted) < 5 * math.sqrt(wanted * (1 - wanted) / (3 * n)), least
    again = exponential_noise(seeds[1:2], position[1:2], 2000)  # another width, another row
    assert torch.equal(again[0], noise[1, :2000])
