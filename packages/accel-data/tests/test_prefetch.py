"""The next batch is on its way to the device while the step runs: the order of events, and (with a GPU) the time."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from accel_data.prefetch import SideStream, moves, overlapped, pin_wanted, side_stream

CARD = torch.device("cuda", 0)


class Card:
    """A device of which only the log is real: as `torch.cuda` from outside, one line for each thing done to it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current = "step's stream"
        self.num_events = 0

    def current_device(self) -> int:
        return 0

    def Stream(self, device: torch.device) -> Any:  # noqa: N802 - as torch calls it
        assert device == CARD
        self.log.append("make stream")
        return Stream(self, "side stream")

    def Event(self) -> Any:  # noqa: N802
        self.num_events += 1
        return Event(self, self.num_events - 1)

    def current_stream(self, device: torch.device) -> Any:
        assert device == CARD
        return Stream(self, self.current)

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before


class Stream:
    def __init__(self, card: Card, name: str) -> None:
        self.card, self.name = card, name

    def wait_event(self, event: Any) -> None:
        self.card.log.append(f"{self.name} waits for copy {event.number}")


class Event:
    def __init__(self, card: Card, number: int) -> None:
        self.card, self.number = card, number

    def record(self, stream: Stream) -> None:
        assert stream.name == "side stream"

    def synchronize(self) -> None:
        self.card.log.append(f"host waits for copy {self.number}")


class Data(torch.Tensor):
    """A tensor that says where it is copied, and on which stream."""

    card: Card
    on_card = False

    @staticmethod
    def make(card: Card, value: float, *, on_card: bool = False) -> Data:
        made = torch.tensor([float(value)]).as_subclass(Data)
        made.card, made.on_card = card, on_card
        return made

    def to(self, device: Any, non_blocking: bool = False) -> Any:  # type: ignore[override]
        if self.on_card:
            return self
        how = "" if non_blocking else " and wait"
        self.card.log.append(f"copy {self[0].item():g} on {self.card.current}{how}")
        return Data.make(self.card, self[0].item(), on_card=True)

    def record_stream(self, stream: Any) -> None:
        self.card.log.append(f"keep {self[0].item():g} for {stream.name}")

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CARD if self.on_card else torch.device("cpu")

    __torch_function__ = torch._C._disabled_torch_function_impl


@pytest.fixture
def card() -> Card:
    return Card()


def given(card: Card, num: int) -> Iterator[tuple[Any, int]]:
    for number in range(num):
        card.log.append(f"load {number}")
        yield {"x": Data.make(card, number)}, number


def prefetched(card: Card, steps: Any, **kwargs: Any) -> Iterator[tuple[Any, Any]]:
    return overlapped(steps, CARD, **{"non_blocking": None, "side": SideStream(CARD, card), **kwargs})


def test_the_next_copy_is_enqueued_before_the_step_gets_its_batch(card: Card) -> None:
    for batch, number in prefetched(card, given(card, 4)):
        assert batch["x"].on_card
        assert batch["x"].item() == number
        card.log.append(f"step {number}")
    assert card.log == [
        "make stream",
        *("load 0", "copy 0 on side stream"),
        *("load 1", "copy 1 on side stream", "step's stream waits for copy 0", "keep 0 for step's stream", "step 0"),
        *("load 2", "host waits for copy 0", "copy 2 on side stream"),
        *("step's stream waits for copy 1", "keep 1 for step's stream", "step 1"),
        *("load 3", "host waits for copy 1", "copy 3 on side stream"),
        *("step's stream waits for copy 2", "keep 2 for step's stream", "step 2"),
        *("step's stream waits for copy 3", "keep 3 for step's stream", "step 3"),
        *("host waits for copy 2", "host waits for copy 3"),
    ]


def test_nothing_happens_before_the_first_batch_is_asked_for(card: Card) -> None:
    prefetched(card, given(card, 2))
    assert card.log == ["make stream"]


@pytest.mark.parametrize("num", [0, 1, 2])
def test_short_sources_come_through(card: Card, num: int) -> None:
    assert [number for _, number in prefetched(card, given(card, num))] == list(range(num))


def test_sources_live_until_the_copy_is_done_and_batches_only_as_long_as_the_step_wants(card: Card) -> None:
    alive: list[Any] = []

    def steps() -> Iterator[tuple[Any, int]]:
        for number in range(4):
            source = Data.make(card, number)
            alive.append(weakref.ref(source))
            yield source, number

    moved = None
    for batch, number in prefetched(card, steps()):
        assert moved is None or moved() is None
        moved = weakref.ref(batch)
        done = {line for line in card.log if line.startswith("host waits")}
        for index, source in enumerate(alive):
            assert source() is not None or f"host waits for copy {index}" in done
        assert number < 3 or alive[0]() is None
        del batch


def failing(card: Card, at: int, error: BaseException) -> Iterator[tuple[Any, int]]:
    for batch, number in given(card, 9):
        if number == at:
            raise error
        yield batch, number


@pytest.mark.parametrize("at", [0, 1, 3])
def test_an_error_comes_with_its_own_batch(card: Card, at: int) -> None:
    ahead = prefetched(card, failing(card, at, KeyError("sample 17")))
    assert [next(ahead)[1] for _ in range(at)] == list(range(at))
    with pytest.raises(KeyError, match="sample 17") as caught:
        next(ahead)
    assert caught.value.args == ("sample 17",)
    assert not any(line == f"load {at + 1}" for line in card.log)


def test_an_error_in_copying_comes_with_its_own_batch(card: Card) -> None:
    class Broken(Data):
        def to(self, device: Any, non_blocking: bool = False) -> Any:  # type: ignore[override]
            raise RuntimeError("out of memory")

    broken = torch.ones(1).as_subclass(Broken)
    ahead = prefetched(card, iter([(Data.make(card, 0), 0), (broken, 1)]))
    assert next(ahead)[1] == 0
    with pytest.raises(RuntimeError, match="out of memory"):
        next(ahead)
    assert card.current == "step's stream"


def test_an_interrupt_is_not_put_off(card: Card) -> None:
    ahead = prefetched(card, failing(card, 1, KeyboardInterrupt("stop")))
    with pytest.raises(KeyboardInterrupt, match="stop"):
        next(ahead)


@pytest.mark.parametrize("non_blocking", [None, False])
def test_giving_up_closes_the_source(card: Card, non_blocking: bool | None) -> None:
    closed = []

    def steps() -> Iterator[tuple[Any, int]]:
        try:
            yield from given(card, 5)
        finally:
            closed.append(True)

    source = steps()  # held, so that it is not closed by being collected
    ahead = prefetched(card, source, non_blocking=non_blocking)
    next(ahead)
    assert closed == []
    ahead.close()  # type: ignore[attr-defined]
    assert closed == [True]
    if non_blocking is None:
        assert card.log[-2:] == ["host waits for copy 0", "host waits for copy 1"]


def test_what_is_on_the_device_stays(card: Card) -> None:
    here, none = Data.make(card, 7, on_card=True), None
    whole = [here, "text", 3]
    steps = [(whole, 0), (none, 1), ([here, Data.make(card, 1)], 2)]
    found = [batch for batch, _ in prefetched(card, steps)]
    assert found[0] is whole
    assert found[1] is None
    assert found[2][0] is here
    assert not any("keep 7" in line for line in card.log)
    assert "keep 1 for step's stream" in card.log


class Opaque:
    """Moves itself and shows no tensor, as batches of graphs do."""

    def __init__(self, card: Card) -> None:
        self.inside = Data.make(card, 5)

    def to(self, device: Any) -> Opaque:
        self.inside = self.inside.to(device)
        return self


class Open(Opaque):
    def record_stream(self, stream: Any) -> None:
        self.inside.record_stream(stream)


def test_objects_that_hide_their_tensors_are_copied_by_the_step(card: Card) -> None:
    pairs = [({"x": Data.make(card, 1), "graph": Opaque(card)}, 0), (Data.make(card, 2), 1)]
    batches = [batch for batch, _ in prefetched(card, pairs)]
    assert batches[0]["graph"].inside.on_card
    copies = [line for line in card.log if line.startswith("copy")]
    assert copies == [
        "copy 2 on side stream",
        "copy 1 on step's stream and wait",
        "copy 5 on step's stream and wait",
    ]


def test_objects_that_hand_their_tensors_over_are_copied_ahead(card: Card) -> None:
    graph = Open(card)
    assert next(prefetched(card, [(graph, 0)]))[0] is graph
    assert card.log[1:4] == [
        "copy 5 on side stream and wait",
        "step's stream waits for copy 0",
        "keep 5 for step's stream",
    ]


@pytest.mark.parametrize(
    "make",
    [lambda: torch.eye(2).to_sparse(), lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])],
    ids=["sparse", "nested"],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_whose_memory_cannot_be_kept_are_not_copied_ahead(card: Card, make: Callable[[], torch.Tensor]) -> None:
    assert not SideStream(CARD, card).carries([make()])


def test_tensors_of_another_device_are_not_copied_ahead(card: Card) -> None:
    # Their own device may still be writing them, and the side stream would not wait for it.
    side = SideStream(CARD, card)
    assert not side.carries(torch.ones(1, device="meta"))
    assert side.carries({"ids": torch.ones(1), "text": "a", "number": 3})
    assert side.carries(pack_sequence([torch.ones(2), torch.ones(1)]))


class Spy(dict[str, Any]):
    moved: tuple[Any, Any] | None = None

    def to(self, device: Any, non_blocking: bool = False) -> Spy:
        self.moved = (device, non_blocking)
        return self


@pytest.mark.parametrize(("non_blocking", "passed"), [(None, False), (True, True), (False, False)])
def test_devices_without_streams_get_plain_copies(non_blocking: bool | None, passed: bool) -> None:
    log: list[str] = []

    def steps() -> Iterator[tuple[Any, int]]:
        for number in range(2):
            log.append(f"load {number}")
            yield Spy(x=torch.ones(1)), number

    for batch, number in overlapped(steps(), torch.device("mps"), non_blocking=non_blocking):
        assert batch.moved == (torch.device("mps"), passed)
        log.append(f"step {number}")
    assert log == ["load 0", "step 0", "load 1", "step 1"]


def test_blocking_copies_do_not_look_ahead(card: Card) -> None:
    for _, number in prefetched(card, given(card, 2), non_blocking=False):
        card.log.append(f"step {number}")
    assert card.log[1:] == [
        *("load 0", "copy 0 on step's stream and wait", "step 0"),
        *("load 1", "copy 1 on step's stream and wait", "step 1"),
    ]


def test_which_devices_need_what() -> None:
    assert not moves(None)
    assert not moves(torch.device("cpu"))
    assert moves(torch.device("cuda"))
    assert moves(torch.device("mps"))
    for device in (None, torch.device("cpu"), torch.device("mps"), torch.device("meta")):
        assert not pin_wanted(device, None)
        assert not pin_wanted(device, True)
        assert device is None or side_stream(device) is None
    for name in ("cuda", "xpu"):
        assert pin_wanted(torch.device(name), None)
        assert pin_wanted(torch.device(name), True)
        assert not pin_wanted(torch.device(name), False)


# With an accelerator

needs_streams = pytest.mark.skipif(
    not torch.accelerator.is_available() or torch.accelerator.current_accelerator().type not in ("cuda", "xpu"),
    reason="needs an accelerator with streams (cuda or xpu), and torch sees none here",
)


@pytest.fixture
def device() -> torch.device:
    return torch.device(torch.accelerator.current_accelerator().type, 0)


def busy(device: torch.device) -> tuple[Callable[[int], None], float]:
    """Work for the device that the host only enqueues, and the seconds of one unit of it (20 ms or so)."""
    matrix = torch.randn(2048, 2048, device=device)

    def work(units: int) -> None:
        for _ in range(units):
            torch.mm(matrix, matrix)

    work(20)
    torch.accelerator.synchronize(device)
    began = time.perf_counter()
    work(200)
    torch.accelerator.synchronize(device)
    per_unit = max(1, round(0.02 / ((time.perf_counter() - began) / 200)))
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        work(per_unit)
        torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return lambda units: work(units * per_unit), sorted(seconds)[1]


def slow(num: int, seconds: float, size: int = 1 << 20) -> Iterator[tuple[torch.Tensor, int]]:
    """Pinned batches of 4 MB, each of which takes the host some time."""
    buffers = [torch.empty(size).pin_memory() for _ in range(num)]
    for number in range(num):
        time.sleep(seconds)
        yield buffers[number].fill_(number), number


@pytest.mark.gpu
@needs_streams
@pytest.mark.parametrize("non_blocking", [None, True, False])
def test_values_arrive_whatever_the_streams_do(device: torch.device, non_blocking: bool | None) -> None:
    def steps() -> Iterator[tuple[Any, int]]:
        for number in range(200):
            pinned = torch.full((1 << 18,), float(number)).pin_memory()
            yield {"x": pinned, "seq": pack_sequence([torch.full((3,), float(number))]), "n": number}, number

    work, _ = busy(device)
    sums = []
    for batch, number in overlapped(steps(), device, non_blocking=non_blocking):
        assert isinstance(batch["seq"], PackedSequence)
        assert batch["x"].device == device
        assert batch["n"] == number
        if number % 40 == 0:
            work(3)  # the host runs ahead from here, and memory that was given back too early would be overwritten
        sums.append(batch["x"].double().mean() + batch["seq"].data.double().mean())
        del batch
    assert torch.stack(sums).tolist() == [2.0 * number for number in range(200)]


@pytest.mark.gpu
@needs_streams
def test_copies_run_beside_the_step(device: torch.device) -> None:
    work, step_s = busy(device)
    kind = getattr(torch, device.type)
    side = side_stream(device)
    assert side is not None
    source = torch.empty(1 << 24).pin_memory()
    began, copied, worked = (kind.Event(enable_timing=True) for _ in range(3))
    began.record()
    work(3)
    worked.record()
    side._stream.wait_event(began)
    side.copy(source)
    copied.record(side._stream)
    torch.accelerator.synchronize(device)
    assert began.elapsed_time(copied) < began.elapsed_time(worked) * 0.8
    assert began.elapsed_time(worked) > 1000 * step_s


@pytest.mark.gpu
@needs_streams
@pytest.mark.parametrize(("load_steps", "why"), [(1.5, "loading is slower"), (0.5, "loading is faster")])
def test_the_time_is_that_of_the_slower_part(device: torch.device, load_steps: float, why: str) -> None:
    work, step_s = busy(device)
    num, load_s = 20, load_steps * step_s
    batches = overlapped(slow(num, load_s), device, non_blocking=None)
    began = time.perf_counter()
    for batch, _ in batches:
        work(1)
        batch.add_(1)
    torch.accelerator.synchronize(device)
    total = time.perf_counter() - began
    assert total < num * max(load_s, step_s) * 1.15 + load_s + step_s + 0.05, why


@pytest.mark.gpu
@needs_streams
def test_there_is_no_wait_where_loading_is_faster_than_the_step(device: torch.device) -> None:
    work, step_s = busy(device)
    waits = []
    batches = iter(overlapped(slow(20, 0.0), device, non_blocking=None))
    for _ in range(20):
        began = time.perf_counter()
        batch, _ = next(batches)
        waits.append(time.perf_counter() - began)
        work(1)
        batch.sum().item()  # waits for the device, so that it is idle when the next batch is asked for
    assert sorted(waits[1:])[len(waits) // 2] < 0.1 * step_s
