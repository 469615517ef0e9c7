from __future__ import annotations

from collections import Counter
from itertools import permutations
from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_data.order import ExplicitOrder, FeistelPermutation, PermutedOrder, SequentialOrder, derive_seed
from accel_state.errors import ConfigError


def everything(order: PermutedOrder) -> list[int]:
    return order.at(torch.arange(len(order)))


@pytest.mark.parametrize("make", [PermutedOrder, FeistelPermutation])
def test_every_small_length_is_permuted(make: type) -> None:
    for length in range(1, 301):
        made = make(length, seed=length, epoch=3)
        positions = torch.arange(length)
        found = made.at(positions) if make is PermutedOrder else made.evaluate(positions).tolist()
        assert sorted(found) == list(range(length)), length


@pytest.mark.parametrize("length", [16_384, 16_385, 65_537, 99_991])
def test_larger_lengths_are_permuted(length: int) -> None:
    assert sorted(everything(PermutedOrder(length, seed=1, epoch=0))) == list(range(length))


@settings(deadline=None, max_examples=60)
@given(
    length=st.integers(16_385, 1 << 62),
    seed=st.integers(0, (1 << 63) - 1),
    positions=st.lists(st.integers(0, (1 << 62) - 1), min_size=1, max_size=50, unique=True),
)
def test_huge_lengths_stay_inside_and_apart(length: int, seed: int, positions: list[int]) -> None:
    inside = sorted({position % length for position in positions})
    found = PermutedOrder(length, seed=seed, epoch=1).at(torch.tensor(inside))
    assert all(0 <= sample < length for sample in found)
    assert len(set(found)) == len(inside)


def test_a_position_does_not_depend_on_its_neighbours() -> None:
    order = PermutedOrder(20_000, seed=5, epoch=2)
    whole = everything(order)
    assert order.at(torch.tensor([[19_999, 0], [1234, 77]])) == [whole[19_999], whole[0], whole[1234], whole[77]]


def test_the_order_is_the_same_on_every_machine() -> None:
    assert everything(PermutedOrder(8, seed=42, epoch=0)) == GOLDEN_SMALL
    assert PermutedOrder(10**9, seed=42, epoch=3).at(torch.arange(4)) == GOLDEN_LARGE


GOLDEN_SMALL = [4, 6, 3, 0, 5, 1, 2, 7]
GOLDEN_LARGE = [883907028, 189932010, 87363666, 111133389]


@pytest.mark.parametrize("length", [50, 20_000])
def test_seeds_and_epochs_differ(length: int) -> None:
    orders = [tuple(everything(PermutedOrder(length, seed=s, epoch=e))) for s in range(4) for e in range(4)]
    assert len(set(orders)) == 16


def chi_square(counts: list[int], expected: list[float]) -> float:
    """Distance from the expected counts in standard deviations of the chi-square distribution."""
    degrees = len(counts) - 1
    statistic = sum((count - mean) ** 2 / mean for count, mean in zip(counts, expected, strict=True))
    return (statistic - degrees) / sqrt(2 * degrees)


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_every_permutation_of_few_samples_is_equally_likely(length: int) -> None:
    trials = 2400
    found = Counter(tuple(everything(PermutedOrder(length, seed=11, epoch=epoch))) for epoch in range(trials))
    every = list(permutations(range(length)))
    assert abs(chi_square([found[each] for each in every], [trials / len(every)] * len(every))) < 4


@pytest.mark.parametrize("positions", [(0, 1), (3, 3 + 142), (7, 19_000)])
def test_pairs_of_positions_are_spread_evenly(positions: tuple[int, int]) -> None:
    length, bins, trials = 20_000, 10, 3000
    counts = [0] * bins**2
    for epoch in range(trials):
        first, second = PermutedOrder(length, seed=2, epoch=epoch).at(torch.tensor(positions))
        counts[first * bins // length * bins + second * bins // length] += 1
    assert abs(chi_square(counts, [trials / bins**2] * bins**2)) < 4


@pytest.mark.parametrize("lag", [1, 2, 64, 316])
def test_neighbours_are_not_correlated(lag: int) -> None:
    values = torch.tensor(everything(PermutedOrder(100_000, seed=4, epoch=0))).double()
    values -= values.mean()
    correlation = (values[:-lag] * values[lag:]).mean() / values.var()
    assert abs(correlation.item()) * sqrt(len(values)) < 4


def test_too_many_samples_are_refused() -> None:
    with pytest.raises(ConfigError, match="64-bit integers that hold up to"):
        PermutedOrder((1 << 62) + 1, seed=0, epoch=0)


def test_other_orders() -> None:
    positions = torch.tensor([[2, 0]])
    assert SequentialOrder(3).at(positions) == [2, 0]
    assert ExplicitOrder(["a", "b", "c"]).at(positions) == ["c", "a"]
    assert (len(SequentialOrder(3)), len(ExplicitOrder("ab")), len(PermutedOrder(9, seed=0, epoch=0))) == (3, 2, 9)


def test_seeds_depend_on_every_part_and_its_place() -> None:
    seeds = [derive_seed(*parts) for parts in [(), (0,), (0, 0), (0, 1), (1, 0), (-1, 0), (1 << 63, 0)]]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 1 << 64 for seed in seeds)
