"""The order of the samples of an epoch, as a pure function of (seed, epoch, number of samples).

No array of indices is kept of large data: the sample at a position is computed when it is asked for, so an epoch of 10⁸
samples costs no memory and starting in its middle costs no time.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any, Protocol

import torch

from accel_state.errors import ConfigError

__all__ = ["EpochOrder", "ExplicitOrder", "FeistelPermutation", "PermutedOrder", "SequentialOrder", "derive_seed"]

_MASK_64 = (1 << 64) - 1
_ROUNDS = 6  # even, so that the halves end where they began
_MAX_SAMPLES = 1 << 62
_MAX_TABLE = 16384


class EpochOrder(Protocol):
    """Which item of the data stands at each position of an epoch."""

    def __len__(self) -> int: ...
    def at(self, positions: torch.Tensor) -> list[Any]:
        """The items at `positions`: int64, any shape, each in ``0 .. len(self) - 1``; flattened in the result."""


class SequentialOrder:
    """Every sample at the position of its own index."""

    def __init__(self, num_samples: int) -> None:
        self._num_samples = num_samples

    def __len__(self) -> int:
        return self._num_samples

    def at(self, positions: torch.Tensor) -> list[Any]:
        """The positions themselves."""
        return positions.flatten().tolist()


class ExplicitOrder:
    """Items in the order of a list, such as the one a sampler gave."""

    def __init__(self, items: Sequence[Any]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def at(self, positions: torch.Tensor) -> list[Any]:
        """The items of the list at `positions`."""
        items = self._items
        return [items[position] for position in positions.flatten().tolist()]


class PermutedOrder:
    """A permutation of ``0 .. num_samples - 1``, keyed by (seed, epoch), evaluated at any position on its own.

    Up to 16,384 samples are sorted by a keyed hash, which makes every permutation equally likely however few
    there are; more are permuted by `FeistelPermutation`, without a table. The result depends on integer
    arithmetic only: it is the same on every machine and version of torch.

    Args:
        num_samples: at most 2**62.
        seed: any integer; its low 64 bits count.
        epoch: from 0.
    """

    def __init__(self, num_samples: int, *, seed: int, epoch: int) -> None:
        self._num_samples = num_samples
        self._table: torch.Tensor | None = None
        if num_samples <= _MAX_TABLE:
            first, second = (_signed(derive_seed(seed, epoch, number)) for number in range(2))
            hashes = _mix(_mix(torch.arange(num_samples) ^ first) ^ second)  # no ties: both steps are bijections
            self._table = hashes.argsort()
        else:
            self._feistel = FeistelPermutation(num_samples, seed=seed, epoch=epoch)

    def __len__(self) -> int:
        return self._num_samples

    def at(self, positions: torch.Tensor) -> list[Any]:
        """The samples at `positions`, in vectorised passes: under 0.1 µs each in chunks of thousands."""
        if self._table is not None:
            return self._table[positions.flatten()].tolist()
        return self._feistel.evaluate(positions.flatten()).tolist()


class FeistelPermutation:
    """A keyed permutation of ``0 .. num_samples - 1`` in constant memory.

    A generalised Feistel network over Z_a x Z_b with cycle walking: J. Black and P. Rogaway, "Ciphers with
    Arbitrary Finite Domains", CT-RSA 2002, methods 2 and 3. `a` is even and near the square root of the number
    of samples, and ``a * b`` exceeds that number by less than `a`, so hardly any position is walked twice.
    (Were both odd, only even permutations could come out.) The round function is the finaliser of splitmix64:
    G. Steele, D. Lea, C. Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.

    A bijection for any number of samples, statistically good from about a thousand on.
    """

    def __init__(self, num_samples: int, *, seed: int, epoch: int) -> None:
        if num_samples > _MAX_SAMPLES:
            raise ConfigError(
                f"{num_samples} samples were given, and positions are 64-bit integers that hold up to {_MAX_SAMPLES}. "
                f"Split the dataset."
            )
        self._num_samples = num_samples
        root = isqrt(max(num_samples - 1, 0)) + 1
        self._a = max(2, root + root % 2)
        self._b = max(1, -(-num_samples // self._a))
        self._keys = [derive_seed(seed, epoch, number) >> 1 for number in range(_ROUNDS)]

    def evaluate(self, positions: torch.Tensor) -> torch.Tensor:
        """The samples at `positions`, int64 of one dimension, each in ``0 .. num_samples - 1``."""
        values = self._encrypt(positions)
        outside = (values >= self._num_samples).nonzero().flatten()
        while outside.numel():
            walked = self._encrypt(values[outside])
            values[outside] = walked
            outside = outside[walked >= self._num_samples]
        return values

    def _encrypt(self, values: torch.Tensor) -> torch.Tensor:
        """A bijection of ``0 .. a * b - 1``."""
        right = torch.div(values, self._a, rounding_mode="floor")
        left = values - right * self._a
        for number, key in enumerate(self._keys):
            modulus = self._a if number % 2 == 0 else self._b
            # Reduced by a product and a shift, not by `%`, which is several times slower:
            # D. Lemire, "Fast Random Integer Generation in an Interval", ACM TOMACS 29(1), 2019.
            left += _hash(right ^ key).mul_(modulus).bitwise_right_shift_(32)
            left -= (left >= modulus) * modulus
            left, right = right, left
        return left + right * self._a


def derive_seed(*parts: int) -> int:
    """One 64-bit seed from several integers, each of which changes it altogether."""
    state = 0
    for part in parts:
        state = _mix_integer(state ^ _mix_integer(part & _MASK_64))
    return state


def _mix_integer(value: int) -> int:
    """One step of splitmix64."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


_MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _mix(values: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64, a bijection of 64-bit integers, here int64.

    Products of int64 wrap as unsigned ones do. Shifts to the right keep the sign, hence the masks.
    """
    values = (values >> 30).bitwise_and_(0x3FFFFFFFF).bitwise_xor_(values).mul_(_MULTIPLIERS[0])
    values = (values >> 27).bitwise_and_(0x1FFFFFFFFF).bitwise_xor_(values).mul_(_MULTIPLIERS[1])
    return (values >> 31).bitwise_and_(0x1FFFFFFFF).bitwise_xor_(values)


def _hash(values: torch.Tensor) -> torch.Tensor:
    """The upper 32 bits of `_mix` for values that are not negative, short of its last step, which hardly moves them."""
    values = (values >> 30).bitwise_xor_(values).mul_(_MULTIPLIERS[0])
    values = (values >> 27).bitwise_and_(0x1FFFFFFFFF).bitwise_xor_(values).mul_(_MULTIPLIERS[1])
    return values.bitwise_right_shift_(32).bitwise_and_(0xFFFFFFFF)
