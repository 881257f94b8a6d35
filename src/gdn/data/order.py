"""Which window of tokens goes to which step: a pure function of (sizes, weights, seed, position), with no table in memory.

Ranks, workers and accumulation do not appear: they take slices of what `batch` returns.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gdn.errors import DataError

_ROUNDS = 6
_UNITS = 1 << 20  # weights are rounded to millionths: then 2**43 positions fit uint64 arithmetic


@dataclass(frozen=True)
class Order:
    """A permutation of all windows for each epoch, keyed by (seed, epoch).

    A Feistel network on pairs (left mod a, right mod b) with a * b barely above num_windows (Black and Rogaway,
    "Ciphers with arbitrary finite domains", 2002): a value outside the domain, about one in sqrt(n), is walked on.
    """

    num_windows: int
    seed: int

    def __post_init__(self) -> None:
        if self.num_windows < 1:
            raise DataError(f"{self.num_windows} windows to order; expected at least 1: the split is too short")

    def batch(self, step: int, global_batch_size: int) -> np.ndarray:
        """Windows of optimizer step `step`, counted from 0: int64 [global_batch_size]."""
        return self.windows(step * global_batch_size, global_batch_size)

    def windows(self, first: int, count: int) -> np.ndarray:
        """Windows at the sample positions first .. first + count - 1, across epochs: int64 [count]."""
        result = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            epoch, offset = divmod(first + done, self.num_windows)
            take = min(count - done, self.num_windows - offset)
            result[done : done + take] = self._permute(epoch, np.arange(offset, offset + take, dtype=np.uint64))
            done += take
        return result

    def _permute(self, epoch: int, values: np.ndarray) -> np.ndarray:
        digest = hashlib.blake2b(f"gdn-order-1:{self.seed}:{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
        keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)
        a = _ceil_sqrt(self.num_windows)
        b = -(-self.num_windows // a)
        values = _feistel(values, keys, np.uint64(a), np.uint64(b))
        outside = np.flatnonzero(values >= self.num_windows)
        while outside.size:
            values[outside] = _feistel(values[outside], keys, np.uint64(a), np.uint64(b))
            outside = outside[values[outside] >= self.num_windows]
        return values.astype(np.int64)


class Mixture:
    """Several sources in fixed proportions, each in an `Order` and with epochs of its own.

    Of any stretch of n positions a source gets its share of n to within the number of sources: whoever is asked first takes
    every position at which the whole part of weight * position grows, and the rest is passed on. Windows are numbered
    through the sources in turn. One source is exactly its `Order`.
    """

    def __init__(self, num_windows: Sequence[int], weights: Sequence[float], seed: int) -> None:
        """Raises DataError for a source without a window and for weights that are not positive, one for each source."""
        if len(weights) != len(num_windows) or not all(0 < weight < math.inf for weight in weights):
            raise DataError(f"weights {list(weights)}; expected {len(num_windows)} numbers above 0, one for each source")
        self.orders = [Order(count, seed + (i << 64)) for i, count in enumerate(num_windows)]
        self.num_windows = sum(num_windows)
        self._first_window = [sum(num_windows[:i]) for i in range(len(num_windows))]
        # Of what is left to source i and those after it, the part that it takes.
        shares = [weight / math.fsum(weights[i:]) for i, weight in enumerate(weights)]
        self._units = [np.uint64(min(max(round(share * _UNITS), 1), _UNITS - 1)) for share in shares[:-1]]
        self._units.append(np.uint64(_UNITS))

    def batch(self, step: int, global_batch_size: int) -> np.ndarray:
        """Windows of optimizer step `step`, counted from 0: int64 [global_batch_size]."""
        return self.windows(step * global_batch_size, global_batch_size)

    def windows(self, first: int, count: int) -> np.ndarray:
        """Windows at the positions first .. first + count - 1: int64 [count]."""
        result = np.empty(count, dtype=np.int64)
        places = np.arange(count)
        left = np.arange(first, first + count, dtype=np.uint64)  # positions among those passed on so far
        for order, base, units in zip(self.orders, self._first_window, self._units):
            before = left * units // np.uint64(_UNITS)
            taken = (left + np.uint64(1)) * units // np.uint64(_UNITS) > before
            if taken.any():  # consecutive positions of a source, because `before` counts them
                result[places[taken]] = base + order.windows(int(before[taken][0]), int(taken.sum()))
            places, left = places[~taken], (left - before)[~taken]
        return result


def _feistel(values: np.ndarray, keys: np.ndarray, a: np.uint64, b: np.uint64) -> np.ndarray:
    """A permutation of 0 .. a*b - 1, each uint64 value by itself."""
    left, right = np.divmod(values, b)
    for i in range(0, _ROUNDS, 2):
        left = (left + _mix(right + keys[i]) % a) % a
        right = (right + _mix(left + keys[i + 1]) % b) % b
    return left * b + right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _ceil_sqrt(n: int) -> int:
    return math.isqrt(n - 1) + 1
