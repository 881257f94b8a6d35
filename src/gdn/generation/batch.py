"""Many prompts, decoded beside each other: a row that has ended makes room for the next prompt, and none waits for another."""

from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from gdn.errors import ConfigError
from gdn.generation.engine import (
    PREFILL_CHUNK,
    Reader,
    check_chunk,
    check_eos,
    check_length,
    check_prompt,
    draw_seed,
    read_prompt,
    reader,
)
from gdn.generation.gpu_decoder import GPUDecoder, Stream
from gdn.generation.sampling import Sampling, sample
from gdn.model.lm import GatedDeltaNetLM
from gdn.model.state import DecodeState


def generate_batch(
    model: GatedDeltaNetLM,
    prompts: Sequence[Tensor | list[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos_ids: Collection[int] = (),
    seeds: Sequence[int] | None = None,
    rows: int = 16,
    prefill_chunk: int = PREFILL_CHUNK,
) -> Iterator[tuple[int, int]]:
    """Yield (index of the prompt, id) as ids are chosen: for each prompt up to max_new_tokens, one of eos_ids ends it, yielded.

    At most `rows` prompts are under way, in one state of so many rows. seeds: of each prompt's draws, sampling.seed for all if
    None; a prompt's ids are those of `generate` with its seed, where the rows' arithmetic is the same (docs/numerics.md).
    Arguments are checked at the call, the model runs when the iterator is advanced; errors as in `generate`.
    """
    ids = [check_prompt(model, prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
    check_length(max_new_tokens)
    check_eos(model, eos_ids)
    check_chunk(prefill_chunk)
    if rows < 1:
        raise ConfigError(f"rows = {rows}; expected at least 1")
    if seeds is not None and len(seeds) != len(prompts):
        raise ConfigError(f"seeds: {len(seeds)} for {len(prompts)} prompts; expected one for each")
    seeds = [sampling.seed] * len(prompts) if seeds is None else list(seeds)
    return _run(model, ids, max_new_tokens, sampling, frozenset(eos_ids), seeds, min(rows, len(prompts)), prefill_chunk)


def _run(
    model: GatedDeltaNetLM,
    prompts: list[Tensor],
    max_new_tokens: int,
    sampling: Sampling,
    eos_ids: frozenset[int],
    seeds: list[int],
    rows: int,
    prefill_chunk: int,
) -> Iterator[tuple[int, int]]:
    if not prompts or not max_new_tokens:
        return
    on_gpu = GPUDecoder(model) if GPUDecoder.serves(model) else None
    read, state = reader(model, on_gpu), model.new_state(rows)
    stream: _Stream = ReaderStream(read, state, sampling) if on_gpu is None else Stream(on_gpu, state, sampling)
    waiting, free = list(range(len(prompts)))[::-1], list(range(rows))[::-1]
    under_way: dict[int, tuple[int, int]] = {}  # row -> its prompt, and tokens still to come
    while waiting or under_way:
        while waiting and free:
            row, i = free.pop(), waiting.pop()
            own = model.new_state(1)
            logits = read_prompt(read, prompts[i], own, prefill_chunk)
            state.view(row, row + 1).copy_(own)
            under_way[row] = i, max_new_tokens
            yield from _took(under_way, free, row, stream.start(row, logits, seeds[i]), eos_ids)
        running = list(under_way)
        if running:
            for row, token in zip(running, stream.next(running)):
                yield from _took(under_way, free, row, token, eos_ids)


def _took(
    under_way: dict[int, tuple[int, int]], free: list[int], row: int, token: int, eos_ids: frozenset[int]
) -> Iterator[tuple[int, int]]:
    """The row's token; a row that ends with it is free."""
    i, left = under_way[row]
    under_way[row] = i, left - 1
    if left == 1 or token in eos_ids:
        del under_way[row]
        free.append(row)
    yield i, token


class _Stream(Protocol):
    """`gpu_decoder.Stream` says what these do."""

    def start(self, row: int, logits: Tensor, seed: int) -> int: ...

    def next(self, rows: Sequence[int]) -> list[int]: ...


class ReaderStream:
    """The same as `gpu_decoder.Stream` by what reads prompts, on any device."""

    def __init__(self, read: Reader, state: DecodeState, sampling: Sampling) -> None:
        self._read, self._state, self._sampling = read, state, sampling
        device = state.position.device
        self._ids = torch.zeros(state.rows, dtype=torch.int64, device=device)
        self._seeds = [0] * state.rows
        self._generator = torch.Generator(device)

    def start(self, row: int, logits: Tensor, seed: int) -> int:
        self._seeds[row] = seed
        return self._choose(row, logits)

    def next(self, rows: Sequence[int]) -> list[int]:
        logits = self._read(self._ids[:, None], self._state)
        return [self._choose(row, logits[row : row + 1]) for row in rows]

    def _choose(self, row: int, logits: Tensor) -> int:
        self._generator.manual_seed(draw_seed(self._seeds[row], int(self._state.position[row])))
        token = int(sample(logits, self._sampling, self._generator))
        self._ids[row] = token
        return token
