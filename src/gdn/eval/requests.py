"""Requests of the Scorer as sequences to read, and the answers put together again: no model, no device."""

from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Request(NamedTuple):
    """How likely is `continuation` behind `context`? Both are ids, at least one each."""

    context: Sequence[int]
    continuation: Sequence[int]


class Likelihood(NamedTuple):
    """Sum of log p over the continuation in nats, and whether each of its tokens is the likeliest in its place."""

    total: float
    greedy: bool


class Wanted(NamedTuple):
    """The tokens that a request wants at positions of a sequence, one after another from the first."""

    first: int
    tokens: Sequence[int]
    request: int


class Piece(NamedTuple):
    """Ids to read, the state's row that holds what is before them (nothing: None), and what requests want of them."""

    ids: Sequence[int]
    row: int | None
    wanted: list[Wanted]


class Results:
    """Log-likelihoods of single tokens, each with the request it belongs to, as they come."""

    def __init__(self, requests: int) -> None:
        self.requests = requests
        self.owners = array("q")
        self.logs: list[Tensor] = []
        self.greedy: list[Tensor] = []

    def collect(self) -> list[Likelihood]:
        # In float64, and in the order of a request's tokens: the sum is the same whatever batches they came in.
        totals = torch.zeros(self.requests, dtype=torch.float64)
        misses = torch.zeros(self.requests, dtype=torch.int64)
        if self.logs:
            owners = tensor_of(self.owners)
            totals.index_add_(0, owners, torch.cat(self.logs).double())
            misses.index_add_(0, owners, (~torch.cat(self.greedy)).long())
        return [Likelihood(total, miss == 0) for total, miss in zip(totals.tolist(), misses.tolist())]


def by_context(requests: Sequence[Request]) -> dict[tuple[int, ...], list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, request in enumerate(requests):
        groups.setdefault(tuple(request.context), []).append(i)
    return groups


def whole(request: Request, i: int) -> Piece:
    """Request `i` read from its first token to the last but one."""
    context, continuation = request
    return Piece([*context, *continuation[:-1]], None, [Wanted(len(context) - 1, continuation, i)])


def rest_of(request: Request, i: int, row: int) -> Piece:
    """What is left of request `i` when the prediction behind its context, which lies in the state's row, is known."""
    continuation = request.continuation
    return Piece(continuation[:-1], row, [Wanted(0, continuation[1:], i)])


def split(sequence: Piece, size: int) -> Iterator[Piece]:
    for start in range(0, len(sequence.ids), size):
        wanted = []
        for first, tokens, request in sequence.wanted:
            begin, end = max(first, start), min(first + len(tokens), start + size)
            if begin < end:
                wanted.append(Wanted(begin - start, tokens[begin - first : end - first], request))
        yield Piece(sequence.ids[start : start + size], sequence.row, wanted)


def tensor_of(values: array) -> Tensor:
    """int64, a copy: several times as fast as from a list."""
    return torch.frombuffer(values, dtype=torch.int64).clone() if values else torch.empty(0, dtype=torch.int64)
