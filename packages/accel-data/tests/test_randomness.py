"""Seeds that differ where they should, and generators that are left as they were."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import accel_data.generators as memory
from accel_data.generators import default_generators
from accel_data.randomness import (
    AsideGenerators,
    augmentation_seed,
    read_seeded,
    reading_seed,
    sample_seed,
    seeded,
    worker_seed,
)

ACTIONS: list[Callable[[], Any]] = [
    random.random,
    lambda: random.gauss(0, 1),
    lambda: random.getrandbits(7),
    lambda: random.seed(3),
    np.random.random,
    np.random.standard_normal,
    lambda: np.random.randint(9),
    lambda: np.random.binomial(40, 0.3),
    lambda: np.random.seed(3),
    lambda: np.random.set_bit_generator(np.random.MT19937(2)),  # type: ignore[attr-defined]
    lambda: torch.rand(3),
    lambda: torch.randn(()),
    lambda: torch.manual_seed(3),
]
actions = st.lists(st.sampled_from(ACTIONS), max_size=6)


def states() -> list[Any]:
    numpy_state: Any = np.random.get_state()
    return [
        random.getstate(),
        *numpy_state[:1],
        numpy_state[1].tolist(),
        *numpy_state[2:],
        torch.get_rng_state().tolist(),
    ]


def numbers() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.random(),
        np.random.standard_normal(),
        float(torch.randn(())),
    ]


@pytest.fixture(params=["memory", "copies"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """States are read from memory, and from copies where that cannot be decoded."""
    if request.param == "copies":
        monkeypatch.setattr(memory, "python_offset", lambda: 0)
        monkeypatch.setattr(memory, "numpy_offsets", lambda: None)


def test_memory_can_be_decoded_here() -> None:
    assert memory.python_offset()
    assert memory.numpy_offsets()


@pytest.mark.usefixtures("_way")
def test_each_generator_tells_whether_it_moved_and_is_put_back() -> None:
    @given(before=actions, inside=actions, seeds=st.booleans())
    def check(before: list[Any], inside: list[Any], seeds: bool) -> None:
        generators = default_generators()
        for action in before:
            action()
        outside, found = states(), [generator.look() for generator in generators]
        assert not any(generator.moved(state) for generator, state in zip(generators, found, strict=True))
        if seeds:
            for generator in generators:
                generator.seed(1 << 63)
        for action in inside:
            action()
        changed = [one != other for one, other in zip(_by_generator(outside), _by_generator(states()), strict=True)]
        moved = [generator.moved(state) for generator, state in zip(generators, found, strict=True)]
        assert all(told or not really for told, really in zip(moved, changed, strict=True))
        assert not (not inside and not seeds and any(moved))
        for generator, state in zip(generators, found, strict=True):
            generator.put_back(state)
        assert states() == outside

    usual = np.random.get_bit_generator()  # type: ignore[attr-defined]
    try:
        check()
    finally:
        np.random.set_bit_generator(usual)  # type: ignore[attr-defined]


def _by_generator(state: list[Any]) -> list[Any]:
    return [state[0], state[-1], state[1:-1]]


@pytest.mark.usefixtures("_way")
def test_a_second_normal_number_that_waits_is_seen_and_kept() -> None:
    random.gauss(0, 1), np.random.standard_normal()
    python, _, numpy = default_generators()
    for generator, draw in ((python, lambda: random.gauss(0, 1)), (numpy, np.random.standard_normal)):
        state = generator.look()
        first = draw()
        assert generator.moved(state), "a number that waited was taken, and no other state moves"
        generator.put_back(state)
        assert draw() == first


@pytest.mark.usefixtures("_way")
def test_aside_goes_on_where_it_was_and_leaves_the_outside() -> None:
    with AsideGenerators(5) as _:
        whole = [numbers() for _ in range(4)]
    aside, found = AsideGenerators(5), []
    for _ in range(4):
        before = states()
        with aside:
            found.append(numbers())
        assert states() == before
        numbers()
    assert found == whole
    with AsideGenerators(6):
        assert numbers() != whole[0]


@pytest.mark.usefixtures("_way")
def test_aside_in_aside_and_through_errors() -> None:
    one, other = AsideGenerators(1), AsideGenerators(2)
    before = states()

    def inner() -> None:
        with other:
            numbers()
            raise ValueError("inner")

    def within() -> list[Any]:
        with one:
            numbers()
            here = states()
            with pytest.raises(ValueError, match="inner"):
                inner()
            assert states() == here
            with one:
                numbers()
                here[:] = states()
            assert states() == here
            return here

    left = within()
    assert states() == before
    with one:
        assert states() == left


def test_seeded_restores_the_generators_it_is_given() -> None:
    own = torch.Generator().manual_seed(3)
    before, own_before = states(), own.get_state()
    found = []
    for epoch in (0, 0, 1):
        with seeded(7, epoch, generators=(own,)):
            found.append([*numbers(), float(torch.rand((), generator=own))])
    assert states() == before
    assert torch.equal(own.get_state(), own_before)
    assert found[0] == found[1]
    assert not set(found[0]) & set(found[2])


def test_numpy_and_torch_draw_different_bits() -> None:
    aside = AsideGenerators(9)
    with aside:
        numpy_bits = np.random.randint(0, 1 << 32, 4, dtype=np.uint32).tolist()
        torch_bits = [int(torch.empty((), dtype=torch.int64).random_(0, 1 << 32)) for _ in range(4)]
    assert not set(numpy_bits) & set(torch_bits)


class Stream:
    """Draws for each sample, some twice."""

    def __iter__(self) -> Iterator[tuple[int, float]]:
        for number in range(12):
            if number % 3 == 0:
                random.random()
            yield number, random.random() + np.random.random() + float(torch.rand(()))


@given(chunks=st.lists(st.integers(0, 5), max_size=5), skipped=st.integers(0, 12))
def test_a_stream_is_read_alike_from_anywhere(chunks: list[int], skipped: int) -> None:
    seed = reading_seed(7, 0, 0, 1)
    with AsideGenerators(1) as _, AsideGenerators(2):
        generators = AsideGenerators(3)
        with generators:
            whole = list(read_seeded(iter(Stream()), generators, seed=seed, first=0))
        assert len({value for _, value in whole}) == 12
        samples = iter(Stream())
        list(islice(samples, skipped))
        found: list[Any] = []
        before = states()
        for count in [*chunks, 12]:
            with generators:
                rest = read_seeded(samples, generators, seed=seed, first=skipped + len(found))
                found += islice(rest, count)
            assert states() == before
    assert found == whole[skipped:]


def test_a_stream_is_not_read_ahead_and_its_error_passes() -> None:
    def failing() -> Iterator[int]:
        yield 0
        raise KeyError("two")

    generators, source = AsideGenerators(1), failing()
    with generators:
        samples = read_seeded(source, generators, seed=1, first=0)
        assert list(islice(samples, 1)) == [0]
        with pytest.raises(KeyError, match="two"):
            next(samples)


@given(
    seed=st.integers(0, (1 << 63) - 1),
    epoch=st.integers(0, 1 << 20),
    one=st.integers(0, 1 << 40),
    other=st.integers(0, 1 << 40),
)
def test_seeds_of_different_ends_differ(seed: int, epoch: int, one: int, other: int) -> None:
    base = augmentation_seed(seed, epoch)
    assert 0 <= base < 1 << 63
    assert 0 <= sample_seed(base, one) < 1 << 64
    assert (sample_seed(base, one) == sample_seed(base, other)) == (one == other)
    ends = [base, augmentation_seed(seed, epoch + 1), augmentation_seed(seed + 1, epoch)]
    ends += [reading_seed(seed, epoch, 0, 1), reading_seed(seed, epoch, 1, 0), worker_seed(seed, epoch, 0)]
    assert len(set(ends)) == len(ends)


def test_seeds_stay_what_they_are() -> None:
    """Recorded positions rely on them."""
    assert (augmentation_seed(7, 3), sample_seed(5, 9)) == (6416418799313655188, 17827584815388034219)
