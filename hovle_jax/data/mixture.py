"""The endless mixed stream of samples: place -> (source, record), in closed form.

Shares are exact: after n samples every source has given its share of n, to within log2(sources)
samples, however many sources there are. So the place of every source follows from n alone, and a
run may change its mixture: a new phase begins at the next window and each source goes on where it
stood.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
import zlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from hovle_jax.errors import UserError


class Draw(NamedTuple):
    """One sample of the stream."""

    source: int  # its number in the mixture
    record: int
    seen: int  # samples its source gave before; the key of all randomness of this sample


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of the stream with one mixture. JSON types only: it is part of the data cursor.

    Attributes:
      start: Place of its first sample.
      sizes: Records of each source, by name.
      weights: Samples of each source, relative to the others.
      drawn: Samples that sources had given before `start`, those of past phases included.
      gone: Records of sources of past phases that this one has not, should they come back.
    """

    start: int
    sizes: dict[str, int]
    weights: dict[str, float]
    drawn: dict[str, int]
    gone: dict[str, int] = dataclasses.field(default_factory=dict)


class Stream:
    """[n] -> `Draw`. Every source passes through all its records in a new order, then again."""

    def __init__(self, names: Sequence[str], phases: Sequence[Phase], seed: int):
        """`names` number the sources; phases may know others, whose samples cannot be drawn."""
        self.phases = list(phases)
        self._starts = [phase.start for phase in phases]
        # By name: neither the order in meta.json nor that of a stored dict may matter.
        self._sources = [sorted(phase.sizes) for phase in phases]
        self._shares = [
            Shares(phase.weights[name] for name in names)
            for phase, names in zip(phases, self._sources, strict=True)
        ]
        self._number = {name: i for i, name in enumerate(names)}
        self._orders = {
            name: Shuffled(size, zlib.crc32(f"{seed} {name}".encode()))
            for name, size in phases[-1].sizes.items()
        }

    def __getitem__(self, n: int) -> Draw:
        k = bisect.bisect_right(self._starts, n) - 1
        source, count = self._shares[k].locate(n - self._starts[k])
        name = self._sources[k][source]
        count += self.phases[k].drawn.get(name, 0)
        return Draw(self._number[name], self._orders[name][count], count)

    def drawn(self, n: int) -> dict[str, int]:
        """Samples that each source gave in the first `n` places."""
        k = max(bisect.bisect_right(self._starts, n) - 1, 0)
        counts = self._shares[k].counts(n - self._starts[k])
        before = self.phases[k].drawn
        here = zip(self._sources[k], counts, strict=True)
        return before | {name: before.get(name, 0) + count for name, count in here}


class Shuffled:
    """[n] -> record: every record once in a random order, then again in another, without end.

    A Feistel network over 4^k >= size numbers is a permutation of them; what falls outside of
    `size` is sent through again (Black and Rogaway, 2002). grain's shuffle gives the like, but at
    100 times the cost for a number at a time, and planning asks for every one.
    """

    _ROUNDS = 6

    def __init__(self, size: int, seed: int):
        self._size, self._seed = size, seed
        self._half = max(1, -(-(size - 1).bit_length() // 2))

    def __getitem__(self, n: int) -> int:
        epoch, x = divmod(n, self._size)
        key = _mix(_mix(self._seed) + epoch)
        mask = (1 << self._half) - 1
        while True:
            left, right = x >> self._half, x & mask
            for k in range(self._ROUNDS):
                left, right = right, left ^ (_mix(key + (k << 58) + right) & mask)
            x = left << self._half | right
            if x < self._size:
                return x


def _mix(x: int) -> int:
    """64 well-mixed bits: the finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _64
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _64
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _64
    return x ^ x >> 31


_64 = (1 << 64) - 1


class Shares:
    """Divides 0, 1, 2, ... among sources by weight.

    A binary tree over the sources: of the first n samples of a node, floor(n * share + 1/2) belong
    to its left half. Both halves grow by at most one with n, so counts and places are exact.
    """

    def __init__(self, weights: Any):
        """`weights`: positive numbers. 0.1 means a tenth, not the float next to it."""
        exact = [Fraction(str(w)) for w in weights]
        unit = math.lcm(*(w.denominator for w in exact))
        self._sums = [0]  # integers: no rounding however far the stream goes
        for weight in exact:
            self._sums.append(self._sums[-1] + int(weight * unit))

    def locate(self, n: int) -> tuple[int, int]:
        """(source, samples it gave before) of sample n."""
        low, high = 0, len(self._sums) - 1
        while high - low > 1:
            middle = (low + high) // 2
            left = self._left(n, low, middle, high)
            if self._left(n + 1, low, middle, high) > left:
                n, high = left, middle
            else:
                n, low = n - left, middle
        return low, n

    def counts(self, n: int) -> list[int]:
        """Samples of every source among the first n."""
        return self._counts(n, 0, len(self._sums) - 1)

    def _counts(self, n: int, low: int, high: int) -> list[int]:
        if high - low == 1:
            return [n]
        middle = (low + high) // 2
        left = self._left(n, low, middle, high)
        return self._counts(left, low, middle) + self._counts(n - left, middle, high)

    def _left(self, n: int, low: int, middle: int, high: int) -> int:
        total = self._sums[high] - self._sums[low]
        return (2 * n * (self._sums[middle] - self._sums[low]) + total) // (2 * total)


def phases_from(
    stored: Sequence[Mapping[str, Any]],
    sizes: dict[str, int],
    weights: dict[str, float],
    place: int,
) -> list[Phase]:
    """The phases of a run whose cursor holds `stored`, now that the mixture is `sizes`, `weights`.

    An equal mixture goes on; another begins at `place`, where each source keeps its own place.

    Raises:
      UserError: a source has another number of records than before.
    """
    phases = [Phase(**phase) for phase in stored]
    before = {name: n for phase in phases for name, n in (phase.gone | phase.sizes).items()}
    for name, size in sizes.items():
        if before.get(name, size) != size:
            raise UserError(
                f"{name}: has {size} records, but had {before[name]} when this run read it; in "
                "another order records would repeat: give the changed data set another name"
            )
    if not phases:
        return [Phase(0, sizes, weights, {})]
    last = phases[-1]
    if last.sizes == sizes and last.weights == weights:
        return phases
    drawn = Stream(list(before), phases, seed=0).drawn(place)
    gone = {name: size for name, size in before.items() if name not in sizes}
    return [phase for phase in phases if phase.start < place] + [
        Phase(place, sizes, weights, drawn, gone)
    ]
