"""From logits to token ids: temperature, top-k, top-p. One row of logits is one draw; text and stopping live elsewhere."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gdn.errors import CheckpointError, ConfigError


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
    _check(logits)
    if sampling.greedy:
        return draw(logits, sampling, None)
    noise = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator)
    return draw(logits, sampling, noise)


def draw(logits: Tensor, sampling: Sampling, noise: Tensor | None) -> Tensor:
    """As `sample`, with exponentially distributed noise [N, vocab] float32 (None if greedy), unchecked and without waiting."""
    if noise is None:
        return logits.argmax(dim=-1)
    scores = _scores(logits, sampling)
    scores = scores.masked_fill(~_kept(scores, sampling), -torch.inf)
    # The largest of score - log(exponential noise) is an exact draw from softmax(scores): no running sum over the vocabulary
    # that rounds, no synchronisation. The noise is kept off 0, whose logarithm would win for a token of any score.
    return (scores - noise.clamp(min=torch.finfo(noise.dtype).tiny).log()).argmax(dim=-1)


def finite(logits: Tensor) -> Tensor:
    """Whether each row [N] has a next token: its best logit is a finite number."""
    return logits.amax(dim=-1).isfinite()  # nan wherever the row holds one


def keep(logits: Tensor, sampling: Sampling) -> Tensor:
    """Mask [N, vocab] of the tokens that may be drawn: among equal logits the lower id is kept first, and one always is."""
    return _kept(_scores(logits, sampling), sampling)


def _kept(scores: Tensor, sampling: Sampling) -> Tensor:
    if sampling.top_k is None and sampling.top_p is None:
        return torch.ones_like(scores, dtype=torch.bool)
    ordered = _descending(scores)
    kept = torch.ones_like(ordered, dtype=torch.bool)
    if sampling.top_k is not None:
        kept[:, sampling.top_k :] = False
    if sampling.top_p is not None and sampling.top_p < 1:  # at 1 rounding of the sum must not drop the rarest tokens
        probabilities = ordered.masked_fill(~kept, -torch.inf).softmax(dim=-1)
        better = probabilities.cumsum(dim=-1) - probabilities  # 0 at the best token, which is thereby kept
        kept &= better < sampling.top_p
    number = kept.sum(dim=-1, keepdim=True)
    last = ordered.gather(-1, number - 1)
    above, equal = scores > last, scores == last
    return above | (equal & (equal.cumsum(dim=-1) <= number - above.sum(dim=-1, keepdim=True)))


def _descending(scores: Tensor) -> Tensor:
    # numpy sorts 32,000 values in a tenth of the time that PyTorch takes with their places, on a CPU.
    return torch.from_numpy(-np.sort(-scores.numpy())) if scores.is_cpu else scores.sort(dim=-1, descending=True).values


def _scores(logits: Tensor, sampling: Sampling) -> Tensor:
    """Logits over temperature, in float32; from the row's best downwards, so that a tiny temperature cannot overflow."""
    logits = logits.float()
    best = logits.amax(dim=-1, keepdim=True)
    # A quotient below the float32 range of the temperature would be 0 / 0 at the best token.
    return (logits - best) / max(sampling.temperature, torch.finfo(torch.float32).tiny)


def _check(logits: Tensor) -> None:
    if logits.ndim != 2 or 0 in logits.shape:
        raise ValueError(f"logits are {tuple(logits.shape)}; expected [N, vocab] with at least one row and one token")
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
