"""What top-k and top-p keep, by sorting: what `gdn.generation.sampling.draw` and the GPU's kernels find without."""

import torch
from torch import Tensor

from gdn.generation.sampling import Sampling, _scores


def keep(logits: Tensor, sampling: Sampling) -> Tensor:
    """Mask [N, vocab] of the tokens that may be drawn: among equal logits the lower id is kept first, and one always is."""
    scores = _scores(logits, sampling)
    ordered = scores.sort(dim=-1, descending=True).values
    kept = torch.ones_like(ordered, dtype=torch.bool)
    if sampling.top_k is not None:
        kept[:, sampling.top_k :] = False
    if sampling.top_p is not None and sampling.top_p < 1:
        probabilities = ordered.masked_fill(~kept, -torch.inf).softmax(dim=-1)
        better = probabilities.cumsum(dim=-1) - probabilities  # 0 at the best token, which is thereby kept
        kept &= better < sampling.top_p
    number = kept.sum(dim=-1, keepdim=True)
    last = ordered.gather(-1, number - 1)
    above, equal = scores > last, scores == last
    return above | (equal & (equal.cumsum(dim=-1) <= number - above.sum(dim=-1, keepdim=True)))


def draw_by_sorting(logits: Tensor, sampling: Sampling, noise: Tensor | None) -> Tensor:
    """The largest of score - log(noise) among the tokens that are kept."""
    if noise is None:
        return logits.argmax(dim=-1)
    scores = _scores(logits, sampling).masked_fill(~keep(logits, sampling), -torch.inf)
    return (scores - noise.clamp(min=torch.finfo(noise.dtype).tiny).log()).argmax(dim=-1)
