"""GPU kernels of sampling: from logits to token ids in two launches, without a sort. `generation.sampling` says what is drawn.

Among all tokens the largest of logit / temperature - log(exponential noise) is a draw from the softmax. If that token is one of
those kept by top-k and top-p, it is the largest among the kept ones too, and so the draw; if not, neither is any token that is
no better than it: the search goes on among the better ones. Whether a token is kept is one sum over its betters. A row's result
hangs on its logits, seed and position alone. Launchers only.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn.ops.triton_chain import begin, link, wait

_BLOCK = 2048  # logits a program of the first launch
_LARGEST_BLOCK = 8192  # logits that a program of the second walks at a time
_TINY = 2.0**-126
_ROUNDING = tl.constexpr(1e-2)  # more than two ways to one score differ by


def choose(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seeds: Tensor,
    position: Tensor,
    result: Tensor,
) -> None:
    """To result [2, B] int64: ids drawn from logits [B, V] float32, contiguous, and 1 where a row's best logit is finite, or 0.

    temperature 0 is greedy: the first of the best. seeds, position: int64 [B]. Equal logits: the lower id is the better.
    """
    B, V = logits.shape
    count = triton.cdiv(V, _BLOCK)
    chunks = torch.empty(3, B, count, device=logits.device)  # of each: its best logit, mass below that, best score
    ids = torch.empty(B, count, dtype=torch.int32, device=logits.device)
    top_k = None if top_k is None or top_k >= V or temperature == 0 else top_k
    top_p = None if top_p is None or top_p >= 1 or temperature == 0 else top_p
    filtered = top_k is not None or top_p is not None
    chain, inverse = link(logits.device), 1.0 / max(temperature, _TINY)
    _candidates[(B, count)](
        logits, seeds, position, chunks, ids, V, inverse, NOISE=temperature > 0, BLOCK=_BLOCK,
        num_warps=4, **chain,
    )  # fmt: skip
    block = min(triton.next_power_of_2(max(V, 16)), _LARGEST_BLOCK)
    _choose[(B,)](
        logits, seeds, position, chunks, ids, result, B, V, count, inverse, 0 if top_k is None else top_k,
        1.0 if top_p is None else top_p, TOP_K=top_k is not None, TOP_P=top_p is not None,
        CHUNKS=triton.next_power_of_2(count), CHUNK=_BLOCK, BLOCK=block,
        num_warps=max(min(block // 512, 32), 4) if filtered else 4, **chain,
    )  # fmt: skip


def exponential_noise(seeds: Tensor, position: Tensor, columns: int) -> Tensor:
    """[B, columns] float32, what `choose` draws with: exponentially distributed, above 0, by the row's seed and position."""
    noise = torch.empty(len(seeds), columns, device=seeds.device)
    _noise[(len(seeds), triton.cdiv(columns, _BLOCK))](seeds, position, noise, columns, BLOCK=_BLOCK, num_warps=4)
    return noise


@triton.jit
def _exponential(seed, position, chunk, BLOCK: tl.constexpr):
    """Of BLOCK tokens from chunk * BLOCK on. A position's numbers never meet another's."""
    offset = position * 4294967296 + chunk * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    a, b, c, d = tl.rand4x(seed, offset)
    uniform = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [BLOCK])
    uniform = tl.maximum(uniform, 2.0**-32)
    # -log(1 - u), where u is small by its series: 1 - u would round to 1, and noise of 0 wins whatever the token's score.
    small = uniform * (1.0 + uniform * (0.5 + uniform * (1.0 / 3.0)))
    return tl.where(uniform < 2.0**-8, small, -tl.log(1.0 - uniform))


@triton.jit
def _noise(seeds, position, noise, columns, BLOCK: tl.constexpr):
    row, chunk = tl.program_id(0), tl.program_id(1)
    column = chunk * BLOCK + tl.arange(0, BLOCK)
    value = _exponential(tl.load(seeds + row), tl.load(position + row), chunk, BLOCK)
    tl.store(noise + row.to(tl.int64) * columns + column, value, mask=column < columns)


@triton.jit(do_not_specialize=["inverse"])
def _candidates(
    logits, seeds, position, chunks, ids, V, inverse,
    NOISE: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    begin(CHAINED)
    wait(CHAINED)
    row, chunk, count = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    column = chunk * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row.to(tl.int64) * V + column, mask=column < V, other=float("-inf")) + 0.0
    best = tl.max(x, 0)
    score = tl.where(x == float("-inf"), float("-inf"), (x - best) * inverse)  # of a chunk of nothing else too
    mass = tl.sum(tl.exp(score), 0)
    best = tl.where(tl.max((x != x).to(tl.int32), 0) > 0, float("nan"), best)
    if NOISE:
        score += -tl.log(_exponential(tl.load(seeds + row), tl.load(position + row), chunk, BLOCK))
    score, which = tl.max(score, 0, return_indices=True)
    target = row * count + chunk
    size = tl.num_programs(0) * count
    tl.store(chunks + target, best)
    tl.store(chunks + size + target, mass)
    tl.store(chunks + 2 * size + target, score)
    tl.store(ids + target, chunk * BLOCK + which)


@triton.jit
def _betters(logits, x, token, best, inverse, V, BLOCK: tl.constexpr):
    """How many tokens are better than this one, whose logit is x, and their mass."""
    mass, count = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        other = tl.load(logits + column, mask=column < V, other=float("-inf"))
        better = (other > x) | ((other == x) & (column < token))
        mass += tl.where(better, tl.exp((other - best) * inverse), 0.0)
        count += better.to(tl.int32)
    return tl.sum(count, 0), tl.sum(mass, 0)


@triton.jit
def _best_of_betters(
    logits, seed, position, x, token, best, inverse, V, count, scores, ids, CHUNKS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The token of the largest score among those that are better than this one.

    scores, ids [CHUNKS]: of each chunk's best token. One that is better itself is a bound, below which a whole chunk can be
    left: of the others the noise is made again. Few rows come here, but of many one nearly always does, and all wait for it.
    """
    chunk = tl.arange(0, CHUNKS)
    own = tl.load(logits + ids, mask=chunk < count, other=float("-inf"))
    bound = tl.max(tl.where((own > x) | ((own == x) & (ids < token)), scores, float("-inf")), 0)
    found, score = token, float("-inf")
    for c in tl.range(0, count):
        if tl.max(tl.where(chunk == c, scores, float("-inf")), 0) >= bound - _ROUNDING:
            column = c * BLOCK + tl.arange(0, BLOCK)
            other = tl.load(logits + column, mask=column < V, other=float("-inf"))
            noisy = (other - best) * inverse - tl.log(_exponential(seed, position, c, BLOCK))
            noisy = tl.where((other > x) | ((other == x) & (column < token)), noisy, float("-inf"))
            most, which = tl.max(noisy, 0, return_indices=True)
            found = tl.where(most > score, c * BLOCK + which, found)
            score = tl.maximum(score, most)
    return found


@triton.jit
def _ordered(x):
    """int32 in the order of the floats."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _mass_of_top(logits, best, inverse, V, top_k, BLOCK: tl.constexpr):
    """The mass of the top_k best tokens: of all above the largest logit that top_k reach, and as many at it as remain."""
    low, high = tl.full([], -(2**31), tl.int64), tl.full([], 2**31 - 1, tl.int64)  # top_k reach low, not high + 1
    while low < high:
        middle = (low + high + 1) >> 1
        count = tl.zeros([BLOCK], tl.int32)
        for start in tl.range(0, V, BLOCK):
            column = start + tl.arange(0, BLOCK)
            key = _ordered(tl.load(logits + column, mask=column < V, other=float("-inf")))
            count += ((key >= middle) & (column < V)).to(tl.int32)
        reached = tl.sum(count, 0) >= top_k
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    mass, count = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
    at = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits + column, mask=column < V, other=float("-inf"))
        e = tl.where(column < V, tl.exp((x - best) * inverse), 0.0)
        key = _ordered(x)
        mass += tl.where(key > low, e, 0.0)
        count += (key > low).to(tl.int32)
        at = tl.maximum(at, tl.where(key == low, e, 0.0))
    return tl.sum(mass, 0) + (top_k - tl.sum(count, 0)) * tl.max(at, 0)


@triton.jit(do_not_specialize=["rows", "inverse", "top_k", "top_p"])
def _choose(
    logits, seeds, position, chunks, ids, result, rows, V, count, inverse, top_k, top_p,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, CHUNKS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    begin(CHAINED)
    wait(CHAINED)
    row, chunk = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNKS)
    place, size = row * count + chunk, rows * count
    top = tl.load(chunks + place, mask=chunk < count, other=float("-inf"))
    best = tl.max(top, 0)
    fine = (tl.max((top != top).to(tl.int32), 0) == 0) & (best < float("inf")) & (best > float("-inf"))
    score = tl.load(chunks + 2 * size + place, mask=chunk < count, other=float("-inf")) + (top - best) * inverse
    score = tl.where(top == float("-inf"), float("-inf"), score)
    _, which = tl.max(score, 0, return_indices=True)
    first = tl.load(ids + place, mask=chunk < count, other=0)
    token = tl.load(ids + row * count + which)
    if TOP_K or TOP_P:
        logits += row * V
        seed, place_in_text = tl.load(seeds + row), tl.load(position + row)
        whole = tl.load(chunks + size + place, mask=chunk < count, other=0.0)
        total = tl.sum(tl.where(whole > 0, whole * tl.exp((top - best) * inverse), 0.0), 0)
        if TOP_K and TOP_P:  # noqa: SIM102  known when compiled
            if fine:
                total = _mass_of_top(logits, best, inverse, V, top_k, BLOCK)
        searching = fine
        while searching:
            x = tl.load(logits + token)
            ahead, mass = _betters(logits, x, token, best, inverse, V, BLOCK)
            kept = (ahead == 0) | (mass < top_p * total)
            if TOP_K:
                kept = (ahead == 0) | (ahead < top_k)
                if TOP_P:
                    kept = (ahead == 0) | ((ahead < top_k) & (mass < top_p * total))
            searching = not kept
            if searching:
                token = _best_of_betters(
                    logits, seed, place_in_text, x, token, best, inverse, V, count, score, first, CHUNKS, CHUNK
                )  # fmt: skip
    tl.store(result + row, token.to(tl.int64))
    tl.store(result + rows + row, fine.to(tl.int64))
