"""Epochs, places, observers and views of one loader."""

from __future__ import annotations

import gc
import os
import signal
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import accel_data.loader
from accel_data import DataLoaderConfiguration, SampleError, ShardedLoader, prepare_data_loader
from accel_state.errors import ConfigError
from accel_state.protocols import BatchInfo, LoaderObserver, Stateful, StatefulLoader
from accel_state.testing import run_ranks
from accel_state.topology import Topology


def sharded(length: int = 20, *, size: int = 1, rank: int = 0, device: Any = None, **arguments: Any) -> ShardedLoader:
    arguments = {"batch_size": 4, "shuffle": True, **arguments}
    dataset = arguments.pop("dataset", range(length))
    return prepare_data_loader(
        DataLoader(dataset, **arguments),
        topology=Topology(rank=rank, world_size=size),
        device=device,
        config=DataLoaderConfiguration(data_seed=5),
        name="train loader",
    )


def ids(loader: ShardedLoader) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


class Notes:
    """An observer that writes down what it is told, and what the loader says at that moment."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def loader_started(self, loader: Any) -> None:
        self.calls.append(("started", loader.epoch, loader.batch_info))

    def batch_delivered(self, loader: Any, info: BatchInfo) -> None:
        assert loader.batch_info == info
        self.calls.append((info.index, info.remaining))

    def loader_ended(self, loader: Any) -> None:
        self.calls.append(("ended", loader.epoch, loader.batch_info))


def test_it_is_what_other_packages_expect() -> None:
    loader = sharded()
    assert isinstance(loader, StatefulLoader)
    assert isinstance(loader, Stateful)
    assert isinstance(Notes(), LoaderObserver)


def test_epochs_follow_one_another_in_orders_of_their_own() -> None:
    loader = sharded()
    assert loader.epoch == 0
    first, second = ids(loader), ids(loader)
    assert loader.epoch == 2
    assert first != second
    loader.set_epoch(0)
    assert ids(loader) == first


def test_the_recipe_for_resuming() -> None:
    def train(loader: ShardedLoader, stop: int | None) -> tuple[list[Any], dict[str, Any] | None]:
        seen: list[Any] = []
        for epoch in range(loader.epoch, 3):
            for batch in loader:
                seen.append((epoch, batch.tolist()))
                if len(seen) == stop:
                    return seen, loader.state_dict()
        return seen, None

    whole, _ = train(sharded(), None)
    assert len(whole) == 15
    for stop in range(1, 15):
        before, state = train(sharded(), stop)
        resumed = sharded()
        assert state is not None
        resumed.load_state_dict(state)
        assert before + train(resumed, None)[0] == whole


def test_a_state_in_the_body_of_the_last_batch_is_an_empty_rest() -> None:
    loader = sharded()
    for _ in loader:
        state = loader.state_dict()
    resumed = sharded()
    resumed.load_state_dict(state)
    assert (resumed.epoch, ids(resumed), resumed.epoch) == (0, [], 1)
    assert ids(resumed) == ids(loader)


def test_break_gives_the_epoch_up() -> None:
    loader = sharded()
    reference = sharded()
    epochs = [ids(reference) for _ in range(2)]
    for _ in loader:
        break
    assert loader.epoch == 1
    assert loader.batch_info is None
    state = loader.state_dict()
    assert (state["epoch"], state["cursor"]) == (1, 0)
    assert ids(loader) == epochs[1]


def test_an_error_in_the_body_gives_the_epoch_up_too() -> None:
    loader = sharded()

    def train() -> None:
        for _ in loader:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        train()
    gc.collect()
    loader.set_epoch(1)
    reference = sharded()
    reference.set_epoch(1)
    assert ids(loader) == ids(reference)


class FailsOnce(Dataset[int]):
    def __init__(self) -> None:
        self.left = 11

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> int:
        self.left -= 1
        if self.left == 0:
            raise OSError("storage went away")
        return index


def test_an_error_in_loading_leaves_the_cursor_and_the_batch_is_tried_again() -> None:
    loader = sharded(dataset=FailsOnce())
    loader.observer = notes = Notes()
    seen: list[list[int]] = []
    with pytest.raises(SampleError, match="storage went away"):
        seen.extend(batch.tolist() for batch in loader)
    assert len(seen) == 2
    assert notes.calls[-1] == ("ended", 0, None)
    assert loader.state_dict()["batches"] == 2
    assert seen + ids(loader) == ids(sharded())


def test_nested_loops_have_a_cursor_each() -> None:
    reference = sharded()
    epochs = [ids(reference) for _ in range(4)]
    loader = sharded()
    outer, inner = [], []
    for number, batch in enumerate(loader):
        outer.append(batch.tolist())
        if number < 2:
            inner.append(ids(loader))
    assert outer == epochs[0]
    assert inner == epochs[1:3]
    assert loader.epoch == 3
    assert ids(loader) == epochs[3]


def test_the_state_is_that_of_the_newest_iterator() -> None:
    loader = sharded()
    first, second = iter(loader), iter(loader)
    next(first), next(first), next(second)
    state = loader.state_dict()
    assert (loader.epoch, state["epoch"], state["batches"]) == (1, 1, 1)
    info = loader.batch_info
    assert info is not None
    assert (info.epoch, info.index) == (1, 0)
    first.close()  # type: ignore[attr-defined]
    assert loader.state_dict() == state
    second.close()  # type: ignore[attr-defined]
    assert loader.epoch == 2


def test_persistent_workers_serve_one_iterator() -> None:
    loader = sharded(num_workers=1, persistent_workers=True)
    outer = iter(loader)
    next(outer)
    assert len(ids(loader)) == 5
    with pytest.raises(ConfigError, match=r"train loader was iterated again, or moved by.*use a second loader"):
        next(outer)


def test_an_observer_is_told_everything_in_order() -> None:
    loader = sharded(length=10)
    loader.observer = notes = Notes()
    ids(loader)
    batches = [(0, 2), (1, 1), (2, 0)]
    assert notes.calls == [("started", 0, None), *batches, ("ended", 1, None)]
    notes.calls.clear()
    for _ in loader:
        break
    assert notes.calls == [("started", 1, None), (0, 2), ("ended", 2, None)]


def test_an_observer_of_a_stream_learns_the_last_batch(counting: Any) -> None:
    loader = sharded(dataset=counting(10), shuffle=None)
    loader.observer = notes = Notes()
    ids(loader)
    assert notes.calls == [("started", 0, None), (0, None), (1, None), (2, 0), ("ended", 1, None)]


def test_batch_info_marks_padding() -> None:
    loader = sharded(length=10, size=4, rank=3, batch_size=2)
    infos = [loader.batch_info for _ in loader]
    assert infos == [
        BatchInfo(0, 0, (2, 2, 2, 2), (2, 2, 2, 2), 1, True),
        BatchInfo(0, 1, (1, 1, 1, 1), (1, 1, 0, 0), 0, True),
    ]
    assert infos[1] is not None
    assert infos[1].is_last
    assert infos[1].num_real == 2


@pytest.mark.parametrize("kind", ["map", "stream", "batches"])
def test_rewind_goes_back_to_where_a_window_began(kind: str, counting: Any) -> None:
    def make() -> ShardedLoader:
        if kind == "stream":
            return sharded(dataset=counting(22), shuffle=None)
        if kind == "batches":
            batches = [[1, 2], [3], [4, 5, 6], [7], [8], [9, 10]]
            return sharded(batch_sampler=batches, batch_size=1, shuffle=None)
        return sharded(length=22)

    loader = make()
    states = [loader.state_dict()]
    for _ in loader:
        states.append(loader.state_dict())
        for rewind, state in enumerate(reversed(states)):
            back = loader.state_dict(rewind=rewind)
            assert (back["batches"], back["cursor"], back["epoch"]) == (state["batches"], state["cursor"], 0)
    assert loader.state_dict()["epoch"] == 1
    assert loader.state_dict(rewind=2) == states[-3]  # a window that goes on into the next epoch
    for _ in loader:
        assert loader.state_dict(rewind=3) == states[-3]
        break
    back = loader.state_dict(rewind=1)  # the epoch that was given up, before its first batch
    assert (back["epoch"], back["batches"]) == (1, 0)


def test_rewinding_past_a_loaded_state_is_refused() -> None:
    loader = sharded()
    loader.load_state_dict({**loader.state_dict(), "batches": 2, "cursor": 8})
    iterator = iter(loader)
    next(iterator)
    assert loader.state_dict(rewind=1)["cursor"] == 8
    with pytest.raises(ConfigError, match="has handed out fewer batches since"):
        loader.state_dict(rewind=2)


def test_set_epoch_keeps_the_place_in_the_epoch_it_names() -> None:
    loader = sharded()
    state = {**loader.state_dict(), "epoch": 3, "batches": 2, "cursor": 8}
    loader.load_state_dict(state)
    loader.set_epoch(3)
    assert loader.state_dict() == state
    loader.set_epoch(4)
    assert (loader.state_dict()["epoch"], loader.state_dict()["cursor"]) == (4, 0)


@pytest.mark.parametrize("epoch", [-1, 1.0, "2", True])
def test_epochs_that_are_none(epoch: Any) -> None:
    with pytest.raises(ConfigError, match="epochs are counted from 0"):
        sharded().set_epoch(epoch)


def test_skip_first_shares_the_place(recording: Any) -> None:
    reference = sharded()
    epochs = [ids(reference) for _ in range(3)]
    dataset = recording(20)
    loader = sharded(dataset=dataset)
    view = loader.skip_first(3)
    assert ids(view) == epochs[0][3:]
    assert len(dataset.asked) == 8
    assert loader.epoch == view.epoch == 1
    assert ids(loader) == epochs[1]
    assert ids(view) == epochs[2]  # only the next iteration skips


def test_skip_first_counts_from_the_beginning_of_the_epoch() -> None:
    whole = ids(sharded())
    loader = sharded()
    loader.load_state_dict({**loader.state_dict(), "batches": 2, "cursor": 8})
    assert ids(loader.skip_first(1)) == whole[2:]
    loader.load_state_dict({**sharded().state_dict(), "batches": 2, "cursor": 8})
    view = loader.skip_first(4)
    for number, batch in enumerate(view):
        assert batch.tolist() == whole[4 + number]
        assert view.batch_info is not None
        assert view.batch_info.index == 4 + number
    assert ids(sharded().skip_first(99)) == []


@pytest.mark.parametrize("kind", ["stream", "batches"])
def test_skip_first_of_other_sources(kind: str, counting: Any) -> None:
    def make(rank: int) -> ShardedLoader:
        if kind == "stream":
            return sharded(dataset=counting(30), shuffle=None, size=2, rank=rank)
        return sharded(
            length=30, batch_sampler=[[each] for each in range(7)], batch_size=1, shuffle=None, size=2, rank=rank
        )

    for rank in range(2):
        whole = ids(make(rank))
        assert len(whole) == 4
        for num in range(6):
            loader = make(rank)
            assert ids(loader.skip_first(num)) == whole[num:]
            assert ids(loader) == whole
        taken = make(rank)
        batches = iter(taken)
        for _ in range(3):
            next(batches)
        loader.load_state_dict(taken.state_dict())
        batches.close()
        assert ids(loader.skip_first(2)) == whole[3:]


@pytest.mark.parametrize("num", [-1, 2.0, True, "3"])
def test_skips_that_are_no_counts(num: Any) -> None:
    with pytest.raises(ConfigError, match="to skip in the train loader, which is no number of batches"):
        sharded().skip_first(num)


def test_other_attributes_are_those_of_the_users_loader() -> None:
    loader = sharded()
    loader.user_loader.note = "kept"  # type: ignore[attr-defined]
    assert loader.note == "kept"
    assert loader.sampler is loader.user_loader.sampler
    assert loader.batch_sampler is loader.user_loader.batch_sampler
    assert loader.dataset == range(20)
    assert loader.total_dataset_length == 20
    with pytest.raises(AttributeError, match="nonsense"):
        loader.nonsense  # noqa: B018
    with pytest.raises(AttributeError, match="dataset_of_nothing"):
        ShardedLoader.__new__(ShardedLoader).dataset_of_nothing  # noqa: B018
    assert repr(sharded(size=2)) == "ShardedLoader(train loader, epoch 0, batch size 4 x 2)"


def test_lengths_of_streams(counting: Any) -> None:
    loader = sharded(dataset=counting(10), shuffle=None)
    assert loader.total_dataset_length is None
    with pytest.raises(TypeError, match="iterable without `__len__`"):
        len(loader)
    counting.__len__ = lambda self: self.length
    try:
        assert (len(sharded(dataset=counting(10), shuffle=None)), loader.total_dataset_length) == (3, 10)
    finally:
        del counting.__len__


def test_batches_are_moved_only_where_they_are_not_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("walked a batch that is on its device")

    loader = sharded(device=torch.device("meta"))
    assert all(batch.device.type == "meta" for batch in loader)
    monkeypatch.setattr("accel_state.tree.send_to_device", never)
    assert len(ids(sharded(device=torch.device("cpu")))) == 5
    assert len(ids(sharded())) == 5
    assert not hasattr(accel_data.loader, "send_to_device")


class Noise(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.rand(())


def test_augmentations_in_workers_differ_between_ranks_and_epochs_and_repeat_with_the_seed() -> None:
    def draw(rank: int) -> list[list[float]]:
        loader = sharded(dataset=Noise(), size=2, rank=rank, num_workers=1)
        return [[each for batch in loader for each in batch.tolist()] for _ in range(2)]

    torch.manual_seed(1)
    first = [draw(0), draw(1)]
    torch.manual_seed(2)
    assert [draw(0), draw(1)] == first
    drawn = [each for rank in first for epoch in rank for each in epoch]
    assert len(set(drawn)) == len(drawn)


class Dies:
    """Kills the process that reads its last sample."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        if index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def message_of(loader: ShardedLoader) -> str:
    try:
        list(loader)
    except SampleError as error:
        return str(error)
    return ""


def told_of_a_dead_worker() -> tuple[str, int]:
    for _ in range(10):
        try:
            loader = prepare_data_loader(
                DataLoader(Dies(), batch_size=2, num_workers=1),  # type: ignore[arg-type]
                topology=Topology(),
                name="train loader",
            )
            message = message_of(loader)
            gc.collect()  # torch's error and its frames hold each other, and the workers
        except RuntimeError:  # torch raises it at any child's end too, wherever the program is then
            continue
        return message, loader.epoch
    return "", 0


def test_a_worker_that_dies_is_told_from_a_dataset_that_fails() -> None:
    """In a process of its own: what torch does at a child's end would reach other tests."""
    ((message, epoch),) = run_ranks(told_of_a_dead_worker, 1, open_process=False)
    assert message.startswith("A worker process of the train loader ended without an answer")
    assert "use fewer workers or smaller batches" in message
    assert epoch == 0


class Unreachable(Dataset[int]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> int:
        raise ConnectionResetError("the dataset's own")


def test_a_connection_of_the_dataset_is_not_that_of_a_worker() -> None:
    loader = prepare_data_loader(DataLoader(Unreachable()), topology=Topology())
    with pytest.raises(SampleError, match="Unreachable raised ConnectionResetError: the dataset's own"):
        list(loader)


def test_a_closed_loader_is_not_read() -> None:
    loader = sharded()
    view = loader.skip_first(1)
    loader.close()
    loader.close()
    for each in (loader, view):
        with pytest.raises(ConfigError, match="was closed, as by `free_memory`, and then iterated"):
            list(each)


def test_a_window_in_an_epoch_that_was_given_up_is_gone_back_to() -> None:
    loader = sharded()
    batches = []
    for batch in loader:
        batches.append(batch.tolist())
        if len(batches) == 3:
            break
    state = loader.state_dict(rewind=2)
    assert (state["epoch"], state["batches"]) == (0, 1)
    resumed = sharded()
    resumed.load_state_dict(state)
    assert ids(resumed)[:2] == batches[1:]


def test_a_view_is_as_long_as_what_it_gives() -> None:
    view = sharded(length=20).skip_first(2)
    assert len(view) == 3
    assert len(ids(view)) == 3
    assert len(view) == 5  # of the next epoch


def test_a_rank_without_rows_in_the_middle_counts_steps() -> None:
    batches = [[0], [1, 2, 3, 4], [5], [6, 7, 8]]
    for rank, expected in enumerate([[[0], [1, 2], [5], [6, 7]], [[3, 4], [8]]]):
        loader = prepare_data_loader(
            DataLoader(range(9), batch_sampler=batches),  # type: ignore[arg-type]
            topology=Topology(rank=rank, world_size=2),
            config=DataLoaderConfiguration(split_batches=True, even_batches=False, data_seed=0),
        )
        seen = []
        for batch in loader:
            info = loader.batch_info
            assert info is not None
            assert len(batch) == info.rows[rank]
            assert sum(info.rows) == len(batches[info.index])
            assert loader.state_dict()["cursor"] == info.index + 1
            seen.append(batch.tolist())
        assert seen == expected


def stop(rows: list[Any]) -> Any:
    if 9 in rows:
        raise StopIteration
    return rows


@pytest.mark.parametrize("workers", [0, 1])
def test_a_collation_that_stops_does_not_end_the_epoch(workers: int) -> None:
    loader = sharded(shuffle=False, collate_fn=stop, num_workers=workers)
    try:
        list(loader)
    except (SampleError, RuntimeError, StopIteration) as error:
        problem = str(error)
    gc.collect()
    assert "StopIteration" in problem
    assert loader.epoch == 0
