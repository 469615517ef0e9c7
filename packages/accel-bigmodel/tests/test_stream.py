"""The transfer engine on a device that copies as late as it may: right values, no race, no memory beyond its budget."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_bigmodel.stored import read_index
from accel_bigmodel.stream import Engine, FileSource, HostMemory, Layout, Load, Mark, Source
from accel_bigmodel.stream.order import Order
from accel_bigmodel.stream.staging import Staging
from accel_bigmodel.testing import FakeTransfers, RaceError, save_file
from accel_state.errors import CheckpointError, ConfigError

SHAPES = ((7,), (3, 5), (), (2, 2))
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int32)
LAYOUT = Layout.of(SHAPES, DTYPES)


def values(number: int) -> list[torch.Tensor]:
    return [torch.full(shape, number + 1, dtype=dtype) for shape, dtype in zip(SHAPES, DTYPES, strict=True)]


def pinned(memory: HostMemory, number: int) -> Source:
    source = memory.source(LAYOUT)
    for index, value in enumerate(values(number)):
        source.writable(index).copy_(value)
    return source


def in_file(folder: Path, number: int) -> Source:
    path = folder / f"{number}.safetensors"
    if not path.exists():
        save_file({f"t{index}": value for index, value in enumerate(values(number))}, path)
    stored = read_index(path)
    return FileSource(LAYOUT, [stored[f"t{index}"] for index in range(len(SHAPES))])


class Model:
    """Units, and what computing with them looks like to the engine."""

    def __init__(self, transfers: FakeTransfers, num_slots: int, sources: list[Source]) -> None:
        self.transfers = transfers
        staging = Staging(transfers, buffer_bytes=512, num_threads=2)
        self.engine = Engine(transfers, num_slots=num_slots, staging=staging)
        self.loads = [Load(self.engine, source, f"unit{number}") for number, source in enumerate(sources)]

    def compute(self, number: int) -> None:
        load = self.loads[number]
        flat = self.engine.acquire(load)
        for got, expected in zip(LAYOUT.views(flat), values(number), strict=True):
            assert torch.equal(got * 1, expected)
        self.engine.release(load)

    def passes(self, count: int) -> None:
        for _ in range(count):
            for number in range(len(self.loads)):
                self.compute(number)


@pytest.fixture
def models() -> Iterator[Any]:
    made: list[Model] = []

    def make(transfers: FakeTransfers, num_slots: int, sources: list[Source]) -> Model:
        made.append(Model(transfers, num_slots, sources))
        return made[-1]

    yield make
    for each in made:
        each.engine.close()


@pytest.mark.parametrize("kind", ["pinned", "pageable", "files"])
@pytest.mark.parametrize("copies", ["late", "early", "random"])
@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_passes_in_order_fetch_ahead_and_stay_in_budget(
    tmp_path: Path, models: Any, kind: str, copies: Any, num_slots: int
) -> None:
    transfers = FakeTransfers(copies=copies, seed=num_slots)
    memory = HostMemory(transfers, budget_bytes=None if kind == "pinned" else 0)
    sources = [in_file(tmp_path, n) if kind == "files" else pinned(memory, n) for n in range(6)]
    model = models(transfers, num_slots, sources)
    with transfers.watch():
        for _ in range(3):
            for number in range(6):
                model.compute(number)
                ahead = model.engine.resident
                assert model.loads[number].name in ahead
                assert len(ahead) <= num_slots
    assert transfers.peak_bytes <= num_slots * LAYOUT.num_bytes
    # After the first pass nothing is fetched when it is needed: it is there, and the next ones too.
    expected = {f"unit{(5 + k) % 6}" for k in range(num_slots)}
    assert set(model.engine.resident) == expected


def test_what_follows_is_learnt_and_learnt_again() -> None:
    order = Order()
    assert order.following(3, 4) == []
    for unit in (0, 1, 2, 3):  # the first pass: in the order of definition, and round again
        order.saw(unit)
        assert order.following(2, 4) == [(unit + 1) % 4, (unit + 2) % 4]
    for _ in range(2):
        for unit in (0, 2, 2, 1, 3, 1, 2):  # forward and backward, in another order
            order.saw(unit)
    # One unit, and what comes next, depend on what was before it.
    assert order.following(3, 4) == [0, 1, 3]
    order.saw(0)
    order.saw(2)
    assert order.following(1, 4) == [1]
    order.saw(1)
    assert order.following(2, 4) == [3, 2]
    order.saw(3)
    order.saw(1)
    assert order.following(2, 4) == [2, 0]
    assert order.following(9, 4) == [2, 0, 3]


def test_pinned_memory_is_copied_at_once_without_the_host_waiting(models: Any) -> None:
    transfers = FakeTransfers()
    memory = HostMemory(transfers)
    model = models(transfers, 3, [pinned(memory, n) for n in range(5)])
    for _ in range(4):
        for number in range(5):
            model.compute(number)
    assert transfers.host_waits == 0
    # One copy a unit and pass, and two that were fetched for a fifth pass.
    assert transfers.num_copies == 4 * 5 + 2
    assert transfers.copied_bytes == transfers.num_copies * LAYOUT.num_bytes


@settings(max_examples=60, deadline=None)
@given(
    uses=st.lists(st.integers(0, 4), min_size=1, max_size=60),
    num_slots=st.integers(1, 4),
    copies=st.sampled_from(["late", "early", "random"]),
    kinds=st.lists(st.sampled_from(["pinned", "pageable", "file"]), min_size=5, max_size=5),
    seed=st.integers(0, 100),
)
def test_any_order_of_use_is_right(
    tmp_path_factory: pytest.TempPathFactory, uses: list[int], num_slots: int, copies: Any, kinds: list[str], seed: int
) -> None:
    """Wrong guesses cost time and nothing else."""
    folder = tmp_path_factory.getbasetemp() / "any_order"
    folder.mkdir(exist_ok=True)
    transfers = FakeTransfers(copies=copies, seed=seed)
    memories = {"pinned": HostMemory(transfers), "pageable": HostMemory(transfers, budget_bytes=0)}
    sources = [in_file(folder, n) if kind == "file" else pinned(memories[kind], n) for n, kind in enumerate(kinds)]
    model = Model(transfers, num_slots, sources)
    try:
        with transfers.watch():
            for number in uses:
                model.compute(number)
        assert transfers.peak_bytes <= num_slots * LAYOUT.num_bytes
    finally:
        model.engine.close()


class Forgetful(FakeTransfers):
    """A device on which one kind of waiting does nothing: the engine's orders are then not kept."""

    def __init__(self, forgets: str) -> None:
        super().__init__()
        self.forgets = forgets

    def copy_after(self, mark: Mark) -> None:
        if self.forgets != "copy":
            super().copy_after(mark)

    def compute_after(self, mark: Mark) -> None:
        if self.forgets != "compute":
            super().compute_after(mark)


@pytest.mark.parametrize(
    ("forgets", "message"), [("copy", "may still read|was given back"), ("compute", "known to have written|given back")]
)
def test_the_stand_in_sees_orders_that_are_not_kept(models: Any, forgets: str, message: str) -> None:
    transfers = Forgetful(forgets)
    memory = HostMemory(transfers)
    model = models(transfers, 2, [pinned(memory, n) for n in range(4)])
    with pytest.raises(RaceError, match=message), transfers.watch():
        model.passes(3)
    model.engine._resident.clear()


def test_a_buffer_is_read_into_only_when_its_copy_is_made(tmp_path: Path, models: Any) -> None:
    """Pieces are smaller than a unit, and there are more of them than buffers: without waiting, values are wrong."""
    transfers = FakeTransfers()
    model = models(transfers, 1, [in_file(tmp_path, n) for n in range(3)])
    for number in (0, 1, 2, 0):
        model.compute(number)
    assert transfers.host_waits > 0

    class Impatient(FakeTransfers):
        def host_after(self, mark: Mark) -> None:
            pass

    impatient = models(Impatient(), 1, [in_file(tmp_path, n) for n in range(3)])
    with pytest.raises(AssertionError, match="equal"):
        impatient.passes(2)


def test_units_that_are_used_within_others_stay(models: Any) -> None:
    transfers = FakeTransfers()
    memory = HostMemory(transfers)
    model = models(transfers, 2, [pinned(memory, n) for n in range(5)])
    with transfers.watch():
        for _ in range(2):
            outer = LAYOUT.views(model.engine.acquire(model.loads[0]))
            inner = LAYOUT.views(model.engine.acquire(model.loads[1]))
            for number in (2, 3, 4):
                model.compute(number)
            assert torch.equal(outer[0] * 1, values(0)[0])
            assert torch.equal(inner[0] * 1, values(1)[0])
            model.engine.release(model.loads[1])
            model.engine.release(model.loads[0])


def test_memory_that_somebody_keeps_is_not_used_again(models: Any) -> None:
    """As a saved tensor of autograd does."""
    transfers = FakeTransfers()
    memory = HostMemory(transfers)
    model = models(transfers, 2, [pinned(memory, n) for n in range(5)])
    with transfers.watch():
        kept = LAYOUT.view(model.engine.acquire(model.loads[0]), 0)
        model.engine.release(model.loads[0])
        for number in (1, 2, 3, 4, 1, 2, 3, 4):
            model.compute(number)
        assert torch.equal(kept * 1, values(0)[0])


def test_another_stream_may_compute_too(models: Any) -> None:
    transfers = FakeTransfers()
    memory = HostMemory(transfers)
    model = models(transfers, 2, [pinned(memory, n) for n in range(4)])
    with transfers.watch():
        for _ in range(3):
            for number in range(4):
                with transfers.on_stream(f"stream {number % 2}"):
                    model.compute(number)


def test_what_was_written_back_counts(tmp_path: Path, models: Any) -> None:
    transfers = FakeTransfers()
    memory = HostMemory(transfers)
    slow = HostMemory(transfers, budget_bytes=0)
    sources = [pinned(memory, 0), pinned(slow, 0), in_file(tmp_path, 0)]
    model = models(transfers, 1, sources)
    before = (tmp_path / "0.safetensors").read_bytes()
    for load in model.loads:
        with transfers.watch():
            view = LAYOUT.view(model.engine.acquire(load), 1)
            view += 41
            model.engine.write_back(load, 1, view)
            del view
            model.engine.release(load)
            for other in model.loads:
                if other is not load:
                    model.engine.acquire(other)
                    model.engine.release(other)
            again = LAYOUT.views(model.engine.acquire(load))
            assert torch.equal(again[1] * 1, torch.full((3, 5), 42, dtype=torch.bfloat16))
            assert torch.equal(again[0] * 1, values(0)[0])
            del again
            model.engine.release(load)
        model.engine.settle(load)
        assert torch.equal(load.source.tensor(1), torch.full((3, 5), 42, dtype=torch.bfloat16))
        copied = load.source.copy()
        copied.writable(1).zero_()
        assert load.source.tensor(1)[0, 0] == 42
    assert (tmp_path / "0.safetensors").read_bytes() == before


def test_dtypes_are_converted_while_they_are_read(tmp_path: Path, models: Any) -> None:
    save_file({"a": torch.arange(700, dtype=torch.float32), "b": torch.ones(3)}, tmp_path / "f.safetensors")
    stored = read_index(tmp_path / "f.safetensors")
    layout = Layout.of([(700,), (3,)], [torch.float64, torch.bfloat16])
    transfers = FakeTransfers()
    model = models(transfers, 1, [FileSource(layout, [stored["a"], stored["b"]])])
    views = layout.views(model.engine.acquire(model.loads[0]))
    assert torch.equal(views[0], torch.arange(700, dtype=torch.float64))
    assert torch.equal(views[1], torch.ones(3, dtype=torch.bfloat16))
    del views
    model.engine.release(model.loads[0])


def test_everything_goes_when_the_units_go() -> None:
    transfers = FakeTransfers()
    memory = HostMemory(transfers)
    model = Model(transfers, 3, [pinned(memory, n) for n in range(4)])
    gc.disable()
    try:
        for _ in range(2):
            for number in range(4):
                model.compute(number)
        assert transfers.held_bytes > 0
        model.loads.clear()
        assert model.engine.resident == []
        assert transfers.held_bytes == 0
    finally:
        gc.enable()


def test_a_file_that_was_cut_is_told_where_it_is_needed(tmp_path: Path, models: Any) -> None:
    transfers = FakeTransfers()
    model = models(transfers, 2, [in_file(tmp_path, n) for n in range(4)])
    for number in (0, 1, 2, 3, 0):
        model.compute(number)
    path = tmp_path / "2.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-200])
    model.compute(1)  # unit 2 is fetched ahead of its use, and fails in silence
    with pytest.raises(CheckpointError, match=r"2\.safetensors.*ends within `t\d`"):
        model.compute(2)
    path.write_bytes(whole)
    model.compute(2)


def test_pinning_ends_where_memory_does(models: Any, caplog: pytest.LogCaptureFixture) -> None:
    transfers = FakeTransfers(pinned_bytes=2 * LAYOUT.num_bytes + 3 * 512)
    memory = HostMemory(transfers)
    sources = [pinned(memory, n) for n in range(4)]
    assert [source.pinned is not None for source in sources] == [True, True, False, False]
    assert len([record for record in caplog.records if "can be pinned" in record.message]) == 1
    model = models(transfers, 2, sources)
    for number in (0, 1, 2, 3, 0, 1, 2, 3):
        model.compute(number)


@pytest.mark.parametrize("budget", [0, 1, 3])
def test_a_budget_of_pinned_memory_is_kept(budget: int) -> None:
    transfers = FakeTransfers(pinned_bytes=budget * LAYOUT.num_bytes)
    memory = HostMemory(transfers, budget_bytes=budget * LAYOUT.num_bytes + 100)
    found = [memory.source(LAYOUT).pinned is not None for _ in range(5)]
    assert found == [True] * budget + [False] * (5 - budget)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_slots=0"):
        Engine(FakeTransfers(), num_slots=0)
    with pytest.raises(ConfigError, match="pinned_memory=-1"):
        HostMemory(FakeTransfers(), budget_bytes=-1)
