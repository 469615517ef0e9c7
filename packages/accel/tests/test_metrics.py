"""`gather_for_metrics`: every sample exactly once and in order, whatever the sizes, or an error at the first batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from accel import Accelerator, ConfigError, DataLoaderConfiguration
from accel_state.process import ProcessSettings
from accel_state.testing import run_ranks

CPU = ProcessSettings(device="cpu")
LENGTHS = range(1, 25)
BATCHES = range(1, 5)


class Stream(IterableDataset[int]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.length))


def make(length: int, batch: int, kind: str) -> DataLoader[Any]:
    dataset: Any = Stream(length) if kind == "stream" else list(range(length))
    return DataLoader(dataset, batch_size=batch, shuffle=kind == "shuffled")


def gather_all(kind: str) -> dict[tuple[int, int], list[list[int]]]:
    """On a rank: the ids that each step gathers, for every length and batch size."""
    found = {}
    for length in LENGTHS:
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(data_seed=3))
        for batch in BATCHES:
            loader = accelerator.prepare(make(length, batch, kind))
            found[length, batch] = [accelerator.gather_for_metrics(ids).tolist() for ids in loader]
    return found


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("kind", ["map", "shuffled", "stream"])
def test_every_sample_once_in_the_order_of_one_process(world: int, kind: str) -> None:
    answers = run_ranks(gather_all, world, kind, settings=CPU)
    (single,) = run_ranks(gather_all, 1, kind, settings=CPU)
    assert all(answer == answers[0] for answer in answers)
    for (length, batch), steps in answers[0].items():
        ids = [each for step in steps for each in step]
        assert sorted(ids) == list(range(length)), (length, batch)
        assert ids == [each for step in single[length, batch] for each in step], (length, batch)
        assert len(steps) == -(-length // (batch * world)), (length, batch)


def gather_ragged_world() -> list[tuple[list[int], list[int]]]:
    """On a rank: ranks have unequal rows in the last step, and nothing is padded."""
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(even_batches=False))
    loader = accelerator.prepare(make(7, 2, "map"))
    return [(ids.tolist(), accelerator.gather_for_metrics(ids).tolist()) for ids in loader]


def test_ragged_last_batches_are_gathered_too() -> None:
    first, second = run_ranks(gather_ragged_world, 2, settings=CPU)
    assert [mine for mine, _ in first] == [[0, 1], [4, 5]]
    assert [mine for mine, _ in second] == [[2, 3], [6]]
    assert [all_ids for _, all_ids in first] == [all_ids for _, all_ids in second] == [[0, 1, 2, 3], [4, 5, 6]]


def gather_forms() -> list[Any]:
    """On a rank, for each step of five samples in batches of two: a nested tree, a list of objects, and strings."""
    accelerator = Accelerator(cpu=True)
    found = []
    for ids in accelerator.prepare(make(5, 2, "map")):
        tree = accelerator.gather_for_metrics({"ids": ids, "pair": [(ids * 10, ids.float().unsqueeze(1))]})
        objects = accelerator.gather_for_metrics([{"id": each} for each in ids.tolist()], use_gather_object=True)
        words = accelerator.gather_for_metrics([f"sample {each}" for each in ids.tolist()])
        found.append((tree["ids"].tolist(), tree["pair"][0][0].tolist(), tree["pair"][0][1].tolist(), objects, words))
    return found


@pytest.mark.parametrize("world", [1, 2, 3])
def test_nested_tensors_and_objects(world: int) -> None:
    for steps in run_ranks(gather_forms, world, settings=CPU):
        ids = [each for step in steps for each in step[0]]
        assert ids == list(range(5))
        assert [each for step in steps for each in step[1]] == [10 * each for each in range(5)]
        assert [each for step in steps for each in step[2]] == [[float(each)] for each in range(5)]
        assert [each for step in steps for each in step[3]] == [{"id": each} for each in range(5)]
        assert [each for step in steps for each in step[4]] == [f"sample {each}" for each in range(5)]


def refuse(kind: str) -> list[str]:
    """On a rank: five samples in batches of two on two ranks pad the last batch. What the first batch says."""
    accelerator = Accelerator(cpu=True)
    for ids in accelerator.prepare(make(5, 2, "map")):
        given = {
            "a mean": ids.float().mean(),
            "too few": ids[:1],
            "nested": {"good": ids, "bad": ids.float().mean()},
            "objects": ["one"],
        }[kind]
        try:
            accelerator.gather_for_metrics(given)
        except ConfigError as error:
            return [str(error), str(accelerator._loops.infos and accelerator._loops.infos[-1].index)]
    return ["nothing was refused", ""]


@pytest.mark.parametrize("kind", ["a mean", "too few", "nested", "objects"])
def test_what_cannot_be_told_from_padding_is_refused_at_the_first_batch(kind: str) -> None:
    for message, batch in run_ranks(refuse, 2, kind, settings=CPU):
        assert "rows, and the last batch of this epoch is padded" in message
        assert "Give one row a sample" in message
        assert batch == "0"


def gather_means() -> list[int]:
    """On a rank: four samples fit two ranks evenly, so any shape may be gathered."""
    accelerator = Accelerator(cpu=True)
    return [
        accelerator.gather_for_metrics(ids.float().mean()).numel() for ids in accelerator.prepare(make(4, 2, "map"))
    ]


def test_means_are_gathered_where_nothing_is_padded() -> None:
    assert run_ranks(gather_means, 2, settings=CPU) == [[2], [2]]


def test_a_world_of_one_gathers_what_it_has(alone: None) -> None:
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(make(5, 2, "map"))
    assert [accelerator.gather_for_metrics(ids).tolist() for ids in loader] == [[0, 1], [2, 3], [4]]
    assert [accelerator.gather_for_metrics(ids.float().mean()).numel() for ids in loader] == [1, 1, 1]


def test_a_single_object_is_refused(alone: None) -> None:
    accelerator = Accelerator(cpu=True)
    with pytest.raises(ConfigError, match=r"was given a str, which has no rows to count.*one entry a sample"):
        accelerator.gather_for_metrics("word")


def train_and_evaluate() -> tuple[list[list[int]], list[list[int]], int]:
    """On a rank: an evaluation after every training batch, one of them given up, inside an accumulation window."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Linear(1, 1)
    model, optimizer, train, evaluation = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.0), make(10, 2, "map"), make(7, 2, "map")
    )
    evaluated, trained = [], []
    for index, ids in enumerate(train):
        with accelerator.accumulate(model):
            accelerator.backward(model(ids.float().unsqueeze(1)).mean())
            seen = []
            for other in evaluation:
                seen += accelerator.gather_for_metrics(other).tolist()
                if index == 1:
                    break
            evaluated.append(seen)
            trained.append(accelerator.gather_for_metrics(ids).tolist())
            optimizer.step()
            optimizer.zero_grad()
    outside = accelerator.gather_for_metrics(torch.zeros(2)).numel()
    return evaluated, trained, outside


@pytest.mark.parametrize("world", [1, 2])
def test_an_evaluation_inside_a_training_loop_counts_by_itself(world: int) -> None:
    for evaluated, trained, outside in run_ranks(train_and_evaluate, world, settings=CPU):
        given_up = list(range(2 * world))
        assert evaluated == [given_up if index == 1 else list(range(7)) for index in range(len(trained))]
        assert [each for step in trained for each in step] == list(range(10))
        assert outside == 2 * world  # no loop is running, so nothing is padding


def after_break() -> list[int]:
    """On a rank: a loop that is given up at a whole batch, and a gather after it."""
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(make(5, 2, "map"))
    for _ in loader:
        break
    return accelerator.gather_for_metrics(torch.arange(2)).tolist()


def test_after_break_nothing_is_padding() -> None:
    assert run_ranks(after_break, 2, settings=CPU) == [[0, 1, 0, 1]] * 2


def by_hand() -> list[list[int]]:
    """On a rank: two loaders are read with `next` in turn."""
    accelerator = Accelerator(cpu=True)
    first, second = accelerator.prepare(make(3, 2, "map"), make(4, 2, "map"))
    one, other = iter(first), iter(second)
    return [accelerator.gather_for_metrics(next(iterator)).tolist() for iterator in (one, other)]


def test_loaders_read_by_hand_count_each_batch_as_their_own() -> None:
    assert run_ranks(by_hand, 2, settings=CPU) == [[[0, 1, 2], [0, 1, 2, 3]]] * 2


def read_in_turns(second_length: int) -> list[str]:
    """Gathers while two loaders are read together; what is raised, or the gathered ids."""
    accelerator = Accelerator()
    first = accelerator.prepare(DataLoader(torch.arange(7), batch_size=2))
    second = accelerator.prepare(DataLoader(torch.arange(second_length), batch_size=2))
    seen: list[int] = []
    try:
        for rows, _ in zip(first, second, strict=False):
            seen += accelerator.gather_for_metrics(rows).tolist()
    except ConfigError as error:
        return [str(error)]
    return [str(each) for each in seen]


def test_loaders_read_in_turns_are_refused_where_their_padding_differs() -> None:
    for seen in run_ranks(read_in_turns, 2, 8):
        assert "while 2 loaders are read in turns, whose batches have 3, 4 samples" in seen[0]
    assert run_ranks(read_in_turns, 2, 7)[0] == [str(each) for each in range(7)]


def gather_after_the_loop() -> str:
    accelerator = Accelerator()
    loader = accelerator.prepare(DataLoader(torch.arange(7), batch_size=2))
    batches = list(loader)
    try:
        accelerator.gather_for_metrics(torch.cat(batches))
    except ConfigError as error:
        return str(error)
    return "nothing was raised"


def test_gathering_after_a_padded_loop_is_refused() -> None:
    for message in run_ranks(gather_after_the_loop, 2):
        assert "after a loop whose last batch was padded" in message
