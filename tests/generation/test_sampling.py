"""Sampling: exact kept sets by hand, drawn frequencies against exact probabilities, and the edges of float32."""

import math

import pytest
import torch
from sampling_testing import draw_by_sorting, keep
from torch import Tensor

import gdn.generation.sampling as sampling_module
from gdn.errors import CheckpointError, ConfigError
from gdn.generation.sampling import Sampling, draw, sample

INF = math.inf
# Probabilities of four tokens, out of order.
LOGITS = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawable(logits: Tensor, sampling: Sampling) -> Tensor:
    """Mask [N, vocab] of the tokens that are drawn where the noise is all for them."""
    vocab = logits.shape[1]
    noise = torch.ones(vocab, vocab).fill_diagonal_(1e-37)
    rows = [draw(row.expand(vocab, -1), sampling, noise) == torch.arange(vocab) for row in logits]
    return torch.stack(rows)


def kept_ids(sampling: Sampling, logits: Tensor = LOGITS) -> list[int]:
    return drawable(logits, sampling)[0].nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("sampling", "ids"),
    [
        (Sampling(), [0, 1, 2, 3]),
        (Sampling(top_k=1), [1]),
        (Sampling(top_k=3), [0, 1, 3]),
        (Sampling(top_k=99), [0, 1, 2, 3]),
        (Sampling(top_p=1.0), [0, 1, 2, 3]),
        (Sampling(top_p=1e-9), [1]),
        (Sampling(top_p=0.49), [1]),
        (Sampling(top_p=0.51), [1, 3]),
        (Sampling(top_p=0.79), [1, 3]),
        (Sampling(top_p=0.81), [0, 1, 3]),
        (Sampling(top_p=0.96), [0, 1, 2, 3]),
        # Of the two best 0.5 / 0.8 = 0.625 is the first: enough for 0.6, though 0.5 of the whole is not.
        (Sampling(top_k=2, top_p=0.6), [1]),
        (Sampling(top_k=2, top_p=0.63), [1, 3]),
        # Temperature 0.5 squares the probabilities: 0.25 / 0.365 = 0.68.
        (Sampling(temperature=0.5, top_p=0.67), [1]),
        (Sampling(temperature=0.5, top_p=0.70), [1, 3]),
    ],
    ids=str,
)
def test_the_kept_set(sampling: Sampling, ids: list[int]) -> None:
    assert kept_ids(sampling) == ids


def test_top_k_is_exact_among_equal_logits_and_prefers_the_lower_id() -> None:
    assert kept_ids(Sampling(top_k=2), torch.tensor([[1.0, 3.0, 3.0, 3.0]])) == [1, 2]
    assert kept_ids(Sampling(top_p=0.5), torch.zeros(1, 4)) == [0, 1]
    assert kept_ids(Sampling(top_k=30), torch.zeros(1, 100)) == list(range(30))  # long enough for an unstable sort to show


@pytest.mark.parametrize(("top_k", "top_p"), [(40, None), (None, 0.9), (300, 0.5), (None, 1e-6), (5000, 0.999)])
def test_the_kept_set_is_that_of_a_stable_sort_of_many_equal_logits(top_k: int | None, top_p: float | None) -> None:
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(5)).mul(4).round()
    logits[:, ::7] = -torch.inf
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    kept = torch.arange(1000).expand(3, -1) < (top_k or 1000)
    if top_p is not None:
        probabilities = ordered.masked_fill(~kept, -torch.inf).softmax(-1)
        kept = kept & (probabilities.cumsum(-1) - probabilities < top_p)
    wanted = torch.zeros_like(kept).scatter_(-1, ids, kept)
    sampling = Sampling(top_k=top_k, top_p=top_p)
    assert torch.equal(keep(logits, sampling), wanted) and torch.equal(drawable(logits, sampling), wanted & logits.isfinite())


@pytest.mark.parametrize("top_k", [None, 1, 7, 60, 5000])
@pytest.mark.parametrize("top_p", [None, 1e-9, 0.3, 0.8, 1.0])
def test_a_draw_is_that_of_the_sort(top_k: int | None, top_p: float | None) -> None:
    sampling = Sampling(1.7, top_k=top_k, top_p=top_p)
    logits, noise = torch.randn(40, 300, generator=generator(3)) * 2, torch.empty(40, 300).exponential_(generator=generator(4))
    for x in (logits, logits.round()):
        assert torch.equal(draw(x, sampling, noise), draw_by_sorting(x, sampling, noise))
    free = draw(logits, Sampling(1.7), noise)
    assert torch.equal(free, draw(logits, sampling, noise)) == (top_k in (None, 5000) and top_p in (None, 1.0))  # the control


def test_top_p_of_one_keeps_tokens_that_the_rounded_sum_would_drop() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, 500:] = -30.0
    assert len(kept_ids(Sampling(top_p=1.0), logits)) == 1000


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(temperature=2.0, top_k=3),
        Sampling(top_p=0.9),
        Sampling(temperature=1.3, top_k=5, top_p=0.8),
    ],
    ids=str,
)
def test_frequencies_are_those_of_the_exact_distribution(sampling: Sampling) -> None:
    n, logits = 40_000, torch.tensor([1.0, -0.5, 0.3, 2.0, -2.0, 0.0, 1.5, -INF])
    p = (logits.double() / sampling.temperature).softmax(0)
    order = p.argsort(descending=True)
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
    p /= p.sum()
    if sampling.top_p:
        before = p[order].cumsum(0) - p[order]
        p[order[before >= sampling.top_p]] = 0
    p /= p.sum()
    counts = sample(logits.expand(n, -1), sampling, generator(1)).bincount(minlength=8).double()
    assert counts[p == 0].sum() == 0
    drawn = p > 0
    chi_square = ((counts - n * p) ** 2 / (n * p))[drawn].sum().item()
    assert chi_square < 25, (chi_square, counts / n, p)  # at most 6 degrees of freedom: beyond 25 once in 3,000 seeds


def test_rows_do_not_touch_each_other() -> None:
    logits = torch.randn(6, 20, generator=generator(3))
    alone = sample(logits, Sampling(top_k=4, top_p=0.9), generator(5))
    changed = logits.clone()
    changed[[0, 2, 5]] = torch.randn(3, 20, generator=generator(4)) * 7
    assert sample(changed, Sampling(top_k=4, top_p=0.9), generator(5))[[1, 3, 4]].equal(alone[[1, 3, 4]])


def test_rows_are_drawn_separately() -> None:
    drawn = sample(torch.zeros(64, 1000), Sampling(), generator(0))
    assert len(set(drawn.tolist())) > 50


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    logits = torch.randn(50, 30, generator=generator(3))
    first, again, other = (sample(logits, Sampling(), generator(seed)) for seed in (7, 7, 8))
    assert first.equal(again) and not first.equal(other)


def test_greedy_is_the_argmax_and_needs_no_randomness() -> None:
    logits = torch.randn(50, 30, generator=generator(3))
    source = generator(0)
    before = source.get_state()
    assert sample(logits, Sampling(temperature=0, top_k=3), source).equal(logits.argmax(-1))
    assert source.get_state().equal(before)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 1e-320])
def test_a_tiny_temperature_is_greedy_and_does_not_overflow(temperature: float) -> None:
    logits = 50 * torch.randn(20, 100, generator=generator(3))
    for top_p in (None, 0.9):
        assert sample(logits, Sampling(temperature, top_p=top_p), generator()).equal(logits.argmax(-1))


def test_half_precision_logits_are_scaled_in_float32() -> None:
    logits = torch.tensor([[8.0, 8.0625]], dtype=torch.bfloat16).expand(20_000, 2)  # neighbours in bf16
    share = sample(logits, Sampling(temperature=0.05), generator(2)).double().mean().item()
    assert abs(share - 1 / (1 + math.exp(-0.0625 / 0.05))) < 0.015


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-24], ids=["least", "most"])
def test_a_token_of_logit_minus_infinity_is_never_chosen_whatever_the_noise(
    uniform: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, generator=None: self.fill_(uniform))
    assert sample(torch.tensor([[-INF, 0.0, -INF]]), Sampling(), generator()).tolist() == [1]
    assert draw(torch.tensor([[-INF, 0.0, -INF]]), Sampling(), torch.zeros(1, 3)).tolist() == [1]


def test_the_noise_is_exponential(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(sampling_module, "library", lambda: None)
    monkeypatch.setattr(sampling_module, "draw", lambda logits, sampling, noise: seen.append(noise))
    sample(torch.zeros(1, 2_000_000), Sampling(), generator(1))
    noise = seen[0].double().flatten()
    assert 0 < float(noise.min()) < 1e-5 and bool(noise.isfinite().all())
    assert abs(float(noise.mean()) - 1) < 3e-3 and abs(float(noise.var()) - 1) < 8e-3
    for at in (1e-3, 0.1, 1.0, 5.0):
        share, wanted = float((noise < at).double().mean()), -math.expm1(-at)
        assert abs(share - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / len(noise)), at


@pytest.mark.parametrize("bad", [math.nan, INF], ids=str)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0)], ids=["drawn", "greedy"])
def test_logits_that_are_not_finite_name_the_row(bad: float, sampling: Sampling) -> None:
    logits = torch.zeros(3, 4)
    logits[2, 1] = bad
    with pytest.raises(CheckpointError, match=f"row 2 is {bad}; expected a finite number"):
        sample(logits, sampling, generator())
    with pytest.raises(CheckpointError, match="row 0 is -inf"):
        sample(torch.full((1, 4), -INF), sampling, generator())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", math.nan),
        ("temperature", INF),
        ("temperature", -0.1),
        ("temperature", "1"),
        ("top_k", 0),
        ("top_k", -3),
        ("top_k", 1.5),
        ("top_k", True),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("seed", 0.5),
    ],
)
def test_values_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} = {value!r}; expected"):
        Sampling(**{name: value})  # type: ignore[arg-type]
