"""The compiled draw takes the token that `draw` takes with the same noise, and refuses what it refuses."""

import math
import shutil

import pytest
import torch
from torch import Tensor

from gdn.errors import CheckpointError
from gdn.generation import sampling as sampling_module
from gdn.generation.sampling import Sampling, sample
from gdn.ops import cpu_token

NO_COMPILER = not any(map(shutil.which, ("cc", "gcc", "clang")))  # one that fails is no reason to skip
pytestmark = pytest.mark.skipif(NO_COMPILER, reason="no C compiler")
WAYS = [
    Sampling(0),
    Sampling(1.0),
    Sampling(0.7, top_p=0.95),
    Sampling(1.0, top_p=0.1),
    Sampling(1.3, top_p=1e-30),
    Sampling(1.5, top_k=3),
    Sampling(2.0, top_k=1),
    Sampling(1.0, top_k=50, top_p=0.6),
    Sampling(1e-30, top_k=4, top_p=0.5),
    Sampling(0.9, top_k=10**6, top_p=1.0),
    Sampling(1e39),
    Sampling(1e39, top_k=3),
]


def by_operators(logits: Tensor, sampling: Sampling, seed: int) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling_module, "library", lambda: None)
        return sample(logits, sampling, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("vocab", [1, 5, 16, 33, 1000])
@pytest.mark.parametrize("sampling", WAYS, ids=str)
def test_the_same_token_as_by_operators(sampling: Sampling, vocab: int) -> None:
    """Among them logits of few levels, of which many are equal, and some of -inf."""
    assert cpu_token.library() is not None, cpu_token.build()[1]
    generator, rows = torch.Generator().manual_seed(vocab), 60
    different, free = 0, 0
    for levels in (0, 3):
        logits = 2 * torch.randn(rows, vocab, generator=generator)
        if levels:
            logits = (logits * levels / 8).round() * 8 / levels
            logits[:, 1::3] = -torch.inf
        got = sample(logits, sampling, torch.Generator().manual_seed(7))
        different += int((got != by_operators(logits, sampling, 7)).sum())
        free += int((got != by_operators(logits, Sampling(1.0), 7)).sum())
    # Of scores that are all nearly equal the operators keep fewer digits than of logits.
    assert different <= (
        1 if sampling.temperature < 1e30 or sampling.top_k is None else rows
    )  # a sum in another order may lie on the other side of top_p
    assert vocab < 16 or sampling.temperature == 1.0 or free > 0  # the control


def test_greedy_is_the_first_of_the_best_and_logits_stay_as_they_are() -> None:
    logits = torch.randn(3, 97)
    logits[1, [20, 50]] = 9.0
    untouched, greedy = logits.clone(), sample(logits, Sampling(0), torch.Generator())
    assert greedy.dtype == torch.int64 and greedy.tolist() == logits.argmax(-1).tolist() and greedy[1] == 20
    sample(logits, Sampling(1.0, top_p=0.3), torch.Generator())
    assert torch.equal(logits, untouched)


@pytest.mark.parametrize("vocab", [1, 5, 40])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(1.0, top_p=0.9)], ids=str)
def test_a_row_without_a_finite_best_logit_is_told(sampling: Sampling, bad: float, vocab: int) -> None:
    logits = torch.zeros(2, vocab)
    logits[1, :] = -math.inf
    logits[1, vocab - 1] = bad
    with pytest.raises(CheckpointError, match="the best logit of row 1 is"):
        sample(logits, sampling, torch.Generator())


@pytest.mark.parametrize("least", [0.0, 1.0 - 2.0**-24])
def test_a_token_of_logit_minus_infinity_is_never_chosen(least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, generator=None: self.fill_(least))
    assert sample(torch.tensor([[-math.inf, 0.0, -math.inf]]), Sampling(), torch.Generator()).tolist() == [1]


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(1e39), Sampling(1e39, top_k=3)], ids=str)
def test_a_masked_token_is_never_chosen_whatever_the_temperature(sampling: Sampling) -> None:
    logits = torch.randn(300, 40)
    logits[:, 5::2] = -math.inf
    for seed in range(3):
        for drawn in (sample(logits, sampling, torch.Generator().manual_seed(seed)), by_operators(logits, sampling, seed)):
            assert bool(logits.gather(1, drawn[:, None]).isfinite().all()) and len(drawn.unique()) > 5


def test_noise_of_zero_is_no_certain_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """All noise is alike, so the best logit wins; unclamped, each of them would have an infinite score."""
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, generator=None: self.fill_(0.0))
    assert sample(torch.tensor([[-5.0, 1.0, 0.0]]), Sampling(), torch.Generator()).tolist() == [1]


def test_logits_it_cannot_read_are_drawn_by_operators() -> None:
    logits = torch.randn(4, 40)
    for other in (logits.T.contiguous().T, logits.double(), torch._neg_view(logits)):
        drawn = sample(other, Sampling(1.0), torch.Generator().manual_seed(1))
        assert torch.equal(drawn, by_operators(other, Sampling(1.0), 1))
