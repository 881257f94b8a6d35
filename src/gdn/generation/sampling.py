"""From logits to token ids: temperature, top-k, top-p. One row of logits is one draw; text and stopping live elsewhere."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gdn.errors import CheckpointError, ConfigError
from gdn.ops.cpu_token import library

_FLOAT32 = torch.finfo(torch.float32)


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    temperature: 0 is greedy, where top_k and top_p, which always keep the best token, change nothing.
    top_k: draw among the k best tokens. top_p: among the fewest best ones whose probabilities sum to top_p; with both,
    top_k is applied first and the rest renormalised. seed: of all draws. Raises ConfigError for values out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not _is_real(self.temperature) or not math.isfinite(self.temperature) or self.temperature < 0:
            raise ConfigError(f"temperature = {self.temperature!r}; expected a finite number >= 0 (0 is greedy)")
        if self.top_k is not None and (not _is_integer(self.top_k) or self.top_k < 1):
            raise ConfigError(f"top_k = {self.top_k!r}; expected a whole number >= 1, or none")
        if self.top_p is not None and (not _is_real(self.top_p) or not 0 < self.top_p <= 1):
            raise ConfigError(f"top_p = {self.top_p!r}; expected a number in (0, 1], or none")
        if not _is_integer(self.seed):
            raise ConfigError(f"seed = {self.seed!r}; expected a whole number")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """One token id for each row: logits [N, vocab] -> ids [N] int64; float32 throughout, rows independent of each other.

    `generator` lies on the logits' device and is not used when greedy. A logit of -inf is a token that is never chosen.
    Raises CheckpointError for logits that hold nan or +inf, or nothing but -inf: such a model has no next token.
    """
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"logits are {tuple(logits.shape)}; expected [N, vocab] with at least one row and one token")
    uniform = None
    if not sampling.greedy:  # in steps of 2^-24 from 0 on; `exponential_` takes four times as long
        uniform = torch.empty_like(logits, dtype=torch.float32).uniform_(generator=generator)
    compiled = library() if _lies_plainly(logits) else None
    if compiled is None:
        _check(logits)
        # -log(1 - u), clear of 0.
        return draw(logits, sampling, None if uniform is None else uniform.neg_().log1p_().neg_().clamp_(min=2.0**-25))
    top_k = 0 if sampling.top_k is None or sampling.top_k >= logits.shape[1] else sampling.top_k
    rest = logits.shape[1], _temperature(sampling), top_k, 1.0 if sampling.top_p is None else sampling.top_p
    own = [None] * len(logits) if uniform is None else [row.data_ptr() for row in uniform]
    ids = [compiled.gdn_draw(row.data_ptr(), noise, *rest) for row, noise in zip(logits, own)]
    if min(ids) < 0:
        _check(logits)
        raise AssertionError(f"row {ids.index(min(ids))}: no token was drawn from logits that are fine")
    return torch.tensor(ids, device=logits.device)


def draw(logits: Tensor, sampling: Sampling, noise: Tensor | None) -> Tensor:
    """As `sample`, with exponentially distributed noise [N, vocab] float32 (None if greedy), unchecked.

    No sort, as in `ops.triton_draw`: the largest of score - log(noise) is an exact draw from softmax(scores). If top-k or top-p
    do not keep that token, they keep none that is no better than it, and the search goes on among the better ones.
    """
    if noise is None:
        return logits.argmax(dim=-1)
    scores = _scores(logits, sampling)
    # Noise of 0 would win for a token of any score.
    noisy = scores - noise.clamp(min=torch.finfo(noise.dtype).tiny).log()
    top_k = None if sampling.top_k is None or sampling.top_k >= scores.shape[-1] else sampling.top_k
    top_p = None if sampling.top_p is None or sampling.top_p >= 1 else sampling.top_p  # at 1 rounding must drop no rare token
    if top_k is None and top_p is None:
        return noisy.argmax(dim=-1)
    mass, ids = scores.exp(), torch.arange(scores.shape[-1], device=scores.device)
    among = mass
    if top_k is not None:  # at once but for equal scores: of flat logits hardly a first choice is among the k best
        best = scores.topk(top_k).values
        noisy.masked_fill_(scores < best[:, -1:], -torch.inf)
        among = best.exp()
    whole = among.sum(dim=-1)
    while True:
        token = noisy.argmax(dim=-1, keepdim=True)
        of_token = scores.gather(-1, token)
        better = (scores > of_token) | ((scores == of_token) & (ids < token))
        dropped = torch.zeros_like(whole, dtype=torch.bool)
        if top_k is not None:
            dropped |= better.sum(dim=-1) >= top_k
        if top_p is not None:
            dropped |= mass.where(better, 0.0).sum(dim=-1) >= top_p * whole
        dropped &= better.any(dim=-1)  # the best is always kept
        if not dropped.any():
            return token.squeeze(-1)
        noisy.masked_fill_(~better & dropped.unsqueeze(-1), -torch.inf)


def finite(logits: Tensor) -> Tensor:
    """Whether each row [N] has a next token: its best logit is a finite number."""
    return logits.amax(dim=-1).isfinite()  # nan wherever the row holds one


def _scores(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits over temperature, in float32; from the row's best downwards, so that a tiny temperature cannot overflow."""
    logits = logits.float()
    best = logits.amax(dim=-1, keepdim=True)
    return (logits - best) / _temperature(sampling)


def _temperature(sampling: Sampling) -> float:
    """Within float32: a quotient below it would be 0 / 0 at the best token, one by infinity nan at a logit of -inf."""
    return min(max(sampling.temperature, _FLOAT32.tiny), _FLOAT32.max)


def _lies_plainly(logits: Tensor) -> bool:
    """Whether C reads what PyTorch does there: no subclass, no view that negates."""
    plain = type(logits) in (Tensor, torch.nn.Parameter) and logits.is_cpu and logits.dtype == torch.float32
    return plain and logits.is_contiguous() and not logits.is_neg()


def _check(logits: Tensor) -> None:
    bad = [row for row, good in enumerate(finite(logits).tolist()) if not good]
    if bad:
        raise CheckpointError(
            f"the best logit of row {bad[0]} is {logits[bad[0]].amax().item()}; expected a finite number: "
            "the model's weights are damaged, or its dtype overflows"
        )


def _is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
