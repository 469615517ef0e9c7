"""Samples read for a DataLoader: the same augmentations anywhere, nothing noticed outside, and errors with a name."""

from __future__ import annotations

import logging
import pickle
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, get_worker_info

from accel_data.randomness import augmentation_seed
from accel_data.reading import SampleError, SampleReader, Ticket, WorkerInit, draws_nothing
from accel_state.errors import AccelError

LENGTH = 48
SEED = augmentation_seed(7, 3)
DRAWS = {
    "python": lambda: random.random() + random.gauss(0, 1),
    "numpy": lambda: float(np.random.random() + np.random.standard_normal()),
    "torch": lambda: float(torch.rand(()) + torch.randn(())),
}
ALL = tuple(DRAWS)


class Augmented(Dataset[Any]):
    """Its index and a number from each of some generators; drawn for a few samples only, if those are given."""

    def __init__(self, kinds: tuple[str, ...] = ALL, *, only: frozenset[int] | None = None) -> None:
        self.kinds = kinds
        self.only = only
        self.asked: Counter[int] = Counter()

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> tuple[float, ...]:
        self.asked[index] += 1
        draws = self.only is None or index in self.only
        return (float(index), *(DRAWS[kind]() for kind in self.kinds if draws))


class Many(Augmented):
    """The same by batches, drawing in one stream."""

    def __init__(self, kinds: tuple[str, ...] = ALL, *, only: frozenset[int] | None = None) -> None:
        super().__init__(kinds, only=only)
        self.calls: list[list[int]] = []

    def __getitems__(self, indices: list[int]) -> list[Any]:
        self.calls.append(indices)
        return [self[index] for index in indices]


class Later(Many):
    """Draws from one generator in the first batch, and from another in the last sample only."""

    def __getitem__(self, index: int) -> tuple[float, ...]:
        self.asked[index] += 1
        return float(index), DRAWS["numpy" if index == order(LENGTH - 1) else "torch"]()


class Failing(Dataset[int]):
    def __init__(self, index: int, error: BaseException, *, draws: bool = False) -> None:
        self.index, self.error, self.draws = index, error, draws

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> int:
        if self.draws:
            random.random(), np.random.standard_normal(), torch.rand(())
        if index == self.index:
            raise self.error
        return index


class FailingMany(Failing):
    def __init__(self, index: int, error: BaseException, *, together: bool) -> None:
        super().__init__(index, error)
        self.together = together

    def __getitems__(self, indices: list[int]) -> list[int]:
        if self.together and len(indices) > 1:
            raise self.error
        return [index if self.together else self[index] for index in indices]


class Tickets:
    """Batches of one rank: each global batch is cut among the ranks, the last is padded with its first row."""

    def __init__(self, *, batch: int, world: int = 1, rank: int = 0, start: int = 0, seed: int = SEED) -> None:
        self.batch, self.world, self.rank, self.start, self.seed = batch, world, rank, start, seed

    def __iter__(self) -> Iterator[Ticket]:
        size = self.batch * self.world
        for first in range(self.start, LENGTH, size):
            positions = [each if each < LENGTH else first for each in range(first, first + size)]
            mine = positions[self.rank * self.batch : (self.rank + 1) * self.batch]
            yield Ticket(self.seed, mine, [order(each) for each in mine])


def order(position: int) -> int:
    return position * 5 % LENGTH


def as_given(samples: list[Any]) -> list[Any]:
    return samples


def reader(dataset: Any, **options: Any) -> SampleReader:
    return SampleReader(dataset, name="train", rank=options.pop("rank", 0), **options)


def read(dataset: Any, tickets: Tickets, **options: Any) -> list[list[Any]]:
    return list(DataLoader(reader(dataset), batch_sampler=tickets, collate_fn=as_given, **options))  # type: ignore[arg-type]


def failure(loader: Any, match: str) -> SampleError:
    """What reading a loader raises, after its workers have ended."""
    batches = iter(loader)
    with pytest.raises(SampleError, match=match) as caught:
        list(batches)
    if loader.num_workers:
        batches._shutdown_workers()  # the error keeps it alive
    return caught.value


def rows(batches: list[list[Any]]) -> dict[float, Any]:
    """What each index came out as, which must be one thing."""
    found: dict[float, Any] = {}
    for row in [row for batch in batches for row in batch]:
        assert found.setdefault(row[0], row) == row
    return found


def expected(kinds: tuple[str, ...] = ALL, only: frozenset[int] | None = None) -> dict[float, Any]:
    """Each sample read by a reader of its own."""
    return {
        float(order(each)): reader(Augmented(kinds, only=only)).__getitems__(Ticket(SEED, [each], [order(each)]))[0]
        for each in range(LENGTH)
    }


def states() -> list[Any]:
    numpy_state: Any = np.random.get_state()
    return [
        random.getstate(),
        *numpy_state[:1],
        numpy_state[1].tolist(),
        *numpy_state[2:],
        torch.get_rng_state().tolist(),
    ]


def test_one_sample_draws_the_same_wherever_it_is_read() -> None:
    whole = expected()
    assert len({row[1:] for row in whole.values()}) == LENGTH, "samples must differ"
    assert len({number for row in whole.values() for number in row[1:]}) == 3 * LENGTH
    for world in (1, 2, 3):
        for batch in (1, 5, LENGTH):
            ranks = [read(Augmented(), Tickets(batch=batch, world=world, rank=rank)) for rank in range(world)]
            assert rows([batch for rank in ranks for batch in rank]) == whole
    other = read(Augmented(), Tickets(batch=5, seed=augmentation_seed(7, 4)))
    assert not {row[1] for row in rows(other).values()} & {row[1] for row in whole.values()}, "epochs must differ"


@pytest.mark.parametrize(("workers", "persistent"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_workers_draw_the_same(workers: int, persistent: bool, world: int) -> None:
    whole = expected()
    for batch in (4,) if world == 2 else (7,):
        for rank in range(world):
            loader = DataLoader(
                reader(Augmented()),
                batch_sampler=Tickets(batch=batch, world=world, rank=rank),  # type: ignore[arg-type]
                collate_fn=as_given,
                num_workers=workers,
                persistent_workers=persistent,
            )
            for _ in range(1 + persistent):
                found = rows(list(loader))
                assert found.items() <= whole.items()


@given(
    kinds=st.sets(st.sampled_from(ALL)).map(lambda kinds: tuple(sorted(kinds))),
    only=st.none() | st.frozensets(st.integers(0, LENGTH - 1), max_size=3),
    batch=st.integers(1, LENGTH),
    start=st.integers(0, LENGTH - 1),
    many=st.booleans(),
)
def test_any_drawing_anywhere(
    kinds: tuple[str, ...], only: frozenset[int] | None, batch: int, start: int, many: bool
) -> None:
    before = states()
    read_in = reader((Many if many else Augmented)(kinds, only=only), rank=1)
    batches = [read_in.__getitems__(ticket) for ticket in Tickets(batch=batch, start=start)]
    assert states() == before
    assert rows(batches).items() <= expected(kinds, only).items()


@pytest.mark.parametrize("kind", [*ALL, "nothing"])
def test_generators_of_the_process_are_left_alone(kind: str) -> None:
    random.gauss(0, 1), np.random.standard_normal(), torch.randn(())  # so that the second of a pair waits
    read_in = reader(Augmented((kind,) if kind in DRAWS else ()))
    for number, ticket in enumerate(Tickets(batch=16)):
        before = states()
        read_in.__getitems__(ticket)
        assert states() == before
        if number == 1:
            random.gauss(0, 1), np.random.standard_normal(), np.random.seed(5), torch.rand(3)


def test_numbers_drawn_between_batches_are_as_without_reading() -> None:
    def numbers(read_too: bool) -> list[float]:
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        read_in, found = reader(Augmented()), []
        for ticket in Tickets(batch=7):
            if read_too:
                read_in.__getitems__(ticket)
            found += [draw() for draw in DRAWS.values()]
            found += [random.gauss(0, 1), float(np.random.standard_normal())]
        return found

    assert numbers(True) == numbers(False)


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("index", [2, order(12)])
def test_generators_of_the_process_are_left_alone_by_an_error(error: BaseException, index: int) -> None:
    read_in = reader(Failing(index, error, draws=True))
    before = states()
    with pytest.raises((SampleError, KeyboardInterrupt), match=r"raised ValueError: no|^$"):
        [read_in.__getitems__(ticket) for ticket in Tickets(batch=10)]
    assert states() == before


def test_another_source_of_bits_in_numpy_is_left_alone() -> None:
    usual = np.random.get_bit_generator()  # type: ignore[attr-defined]
    source = np.random.PCG64(3)
    try:
        np.random.set_bit_generator(source)  # type: ignore[attr-defined]
        before = repr(np.random.get_state(legacy=False))
        assert rows(read(Augmented(only=frozenset({1})), Tickets(batch=8))) == expected(only=frozenset({1}))
        assert repr(np.random.get_state(legacy=False)) == before
        assert np.random.get_bit_generator() is source  # type: ignore[attr-defined]
    finally:
        np.random.set_bit_generator(usual)  # type: ignore[attr-defined]


def test_what_draws_nothing_is_read_once_and_not_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Augmented(())
    read_in = reader(dataset)
    tickets = list(Tickets(batch=8))
    read_in.__getitems__(tickets[0])
    for generator in read_in._generators:
        monkeypatch.setattr(generator, "seed", None)
    for ticket in tickets[1:]:
        read_in.__getitems__(ticket)
    assert dataset.asked == Counter(range(LENGTH))


def test_only_the_batch_with_the_first_draw_is_read_twice() -> None:
    dataset = Augmented(("torch",), only=frozenset({order(37), order(40)}))
    read(dataset, Tickets(batch=8))
    assert {index for index, times in dataset.asked.items() if times > 1} == {order(each) for each in range(32, 40)}
    assert max(dataset.asked.values()) == 2


def test_only_what_is_drawn_from_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    read_in = reader(Augmented(("torch",)))
    tickets = iter(Tickets(batch=8))
    read_in.__getitems__(next(tickets))
    python, _, numpy = read_in._generators
    monkeypatch.setattr(python, "seed", None)
    monkeypatch.setattr(numpy, "seed", None)
    for ticket in tickets:
        read_in.__getitems__(ticket)


def test_padding_comes_out_as_what_it_repeats() -> None:
    read_in = reader(Augmented())
    for _ in range(2):
        first, other, again = read_in.__getitems__(Ticket(SEED, [4, 5, 4], [9, 9, 9]))
        assert first == again
        assert first[1:] != other[1:]


def test_batches_are_read_at_once_while_nothing_is_drawn() -> None:
    dataset = Many((), only=None)
    read(dataset, Tickets(batch=16))
    assert [len(call) for call in dataset.calls] == [16, 16, 16]
    nested = Many(())
    read(Subset(nested, range(LENGTH)), Tickets(batch=16))
    assert [len(call) for call in nested.calls] == [16, 16, 16]


def test_batches_that_draw_are_read_by_samples_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    dataset = Many()
    with caplog.at_level(logging.INFO):
        assert rows(read(dataset, Tickets(batch=16))) == expected()
    assert [len(call) for call in dataset.calls] == [16, *[1] * LENGTH]
    assert [record.message.split(" draws")[0] for record in caplog.records] == ["Many of the loader 'train'"]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        read(Later(), Tickets(batch=16))
    assert len(caplog.records) == 1
    caplog.clear()
    with caplog.at_level(logging.INFO):
        read(Subset(Augmented(), range(LENGTH)), Tickets(batch=16))
        SampleReader(Many(), name="train", rank=1).__getitems__(Ticket(SEED, [0, 1], [0, 1]))
    assert not caplog.records


def test_a_batch_that_draws_only_as_a_whole_is_noticed_once() -> None:
    class Mixed(Many):
        def __getitems__(self, indices: list[int]) -> list[Any]:
            if len(indices) > 1:
                random.random()
            return super().__getitems__(indices)

    dataset = Mixed(())
    read(dataset, Tickets(batch=16))
    assert [len(call) for call in dataset.calls] == [16, *[1] * LENGTH]


def test_items_that_are_batches() -> None:
    dataset = Many(("python",))
    one_by_one = [Ticket(SEED, [each], [order(each)]) for each in range(LENGTH)]
    loader = DataLoader(reader(dataset, one_a_batch=True), batch_size=None, sampler=one_by_one)  # type: ignore[arg-type]
    assert {row[0]: tuple(row) for row in loader} == expected(("python",))
    assert dataset.calls == []
    assert len(loader.dataset) == LENGTH  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (KeyError("label"), r"KeyError: 'label'"),
        (IndexError("out"), "IndexError: out"),
        (StopIteration(), "StopIteration"),
        (ValueError("bad\nrow"), "ValueError: bad\nrow"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("items", [False, True])
def test_an_error_is_named(error: Exception, text: str, workers: int, items: bool) -> None:
    tickets = Tickets(batch=1 if items else 8)
    how: dict[str, Any] = {"batch_size": None, "sampler": tickets} if items else {"batch_sampler": tickets}
    read_in = reader(Failing(order(37), error), rank=3, one_a_batch=items)
    loader = DataLoader(read_in, collate_fn=as_given, num_workers=workers, **how)
    found = failure(loader, rf"Sample {order(37)} .* 'train' on data rank 3, and Failing raised {text}\. The")
    assert isinstance(found, AccelError)
    assert "Correct what `dataset[" in str(found)
    if workers:
        assert "in __getitem__\n    raise self.error" in str(found)
    else:
        assert found.__cause__ is error


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_an_error_travels_from_a_worker(context: str) -> None:
    loader = DataLoader(
        reader(Subset(["a", "b"], [0, 9])),
        batch_sampler=[Ticket(1, [0, 1], [0, 1])],
        num_workers=1,
        multiprocessing_context=context,  # type: ignore[arg-type]
    )
    failure(loader, r"(?s)Original Traceback.*list index out of range.*Sample 1 was asked for by")


def test_the_sample_that_fails_in_a_batch_is_named() -> None:
    with pytest.raises(SampleError, match=r"^Sample 25 .* raised KeyError: 'label'\. ") as caught:
        read(FailingMany(25, KeyError("label"), together=False), Tickets(batch=8))
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(
        SampleError, match=r"^Samples 0, 5, 10, 15, 20, 25, 30, 35 and 4 more .* raised KeyError: 'label'\. Each "
    ):
        read(FailingMany(25, KeyError("label"), together=True), Tickets(batch=12))


@pytest.mark.parametrize("index", [0, order(12)])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3)])
def test_what_is_no_error_is_not_renamed(error: BaseException, index: int) -> None:
    with pytest.raises(type(error), match=r"^$|3"):
        read(Failing(index, error), Tickets(batch=8))


def test_an_error_that_hangs_on_an_unseeded_draw_is_none() -> None:
    late = frozenset({order(37)})

    class Picky(Augmented):
        def __getitem__(self, index: int) -> tuple[float, ...]:
            sample = super().__getitem__(index)
            if sample != expected_samples[float(index)]:
                raise ValueError("drawn without a seed")
            return sample

    expected_samples = expected(("python",), late)
    assert rows(read(Picky(("python",), only=late), Tickets(batch=8))) == expected_samples


def test_a_copy_for_another_process_holds_no_addresses() -> None:
    read_in = reader(Subset(["a", "b"], [0, 1]))  # type: ignore[arg-type]
    ticket = Ticket(SEED, [0, 1], [1, 0])
    assert read_in.__getitems__(ticket) == ["b", "a"]
    copied = pickle.loads(pickle.dumps(read_in))
    assert copied._generators == ()
    assert copied.__getitems__(ticket) == ["b", "a"]


class Derived(TensorDataset):
    pass


@pytest.mark.parametrize(
    ("dataset", "expected_answer"),
    [
        (TensorDataset(torch.zeros(3)), True),
        ([1], True),
        ((1,), True),
        (range(3), True),
        (Subset(range(3), [0]), True),  # type: ignore[arg-type]
        (ConcatDataset([range(3), Subset([1], [0])]), True),  # type: ignore[list-item, arg-type]
        (ConcatDataset([range(3), Augmented()]), False),  # type: ignore[list-item]
        (Subset(Augmented(), [0]), False),
        (Derived(torch.zeros(3)), False),
        (Augmented(()), False),
    ],
)
def test_which_datasets_draw_nothing(dataset: Any, expected_answer: bool) -> None:
    assert draws_nothing(dataset) is expected_answer


class Around(Dataset[Any]):
    """Tells of which type the dataset is that a worker shows."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[str, list[int]]:
        info = get_worker_info()
        assert info is not None
        return type(info.dataset).__name__, info.dataset.calls

    calls: list[int]


def note_call(worker: int) -> None:
    info = get_worker_info()
    assert info is not None
    info.dataset.calls = [worker]


@pytest.mark.parametrize("init", [None, note_call])
def test_a_worker_shows_the_dataset_of_the_user(init: Any) -> None:
    dataset = Around()
    dataset.calls = []
    loader = DataLoader(
        reader(dataset),
        batch_sampler=[Ticket(1, [0], [0])],  # type: ignore[arg-type]
        collate_fn=as_given,
        num_workers=1,
        worker_init_fn=WorkerInit(init),
    )
    assert list(loader) == [[("Around", [0] if init else [])]]
