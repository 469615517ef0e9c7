"""Runs that are killed in the middle of an epoch and go on in the same and in other worlds.

Every kind of data: the ids of each step are those of the undisturbed run, nothing that was seen is fetched again, and
the losses are the same numbers (in another world, sums come in another order).
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler, get_worker_info

from accel import Accelerator, DataLoaderConfiguration, ProjectConfiguration
from accel_state.testing import RankError, run_ranks

LENGTH, GLOBAL, EPOCHS = 64, 12, 3


def sample(index: int) -> dict[str, Any]:
    return {"id": index, "x": torch.sin(torch.arange(4, dtype=torch.float64) * (index + 1))}


class Numbers(Dataset[dict[str, Any]]):
    """Notes what it is asked for."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> dict[str, Any]:
        with self.log.open("a") as log:
            log.write(f"{index}\n")
        found = sample(index)
        found["x"] = found["x"] + 1e-3 * random.random()  # an augmentation: the same wherever it is read
        return found


class Shards(IterableDataset[dict[str, Any]]):
    """Four shards of different lengths, which ranks and workers divide; knows its place if `stateful`."""

    def __init__(self, log: Path, shards: list[list[int]] | None = None) -> None:
        self.log = log
        self.shards = shards or [list(range(20)), list(range(20, 34)), list(range(34, 52)), list(range(52, LENGTH))]
        self.num_shards = len(self.shards)
        self.epoch = 0
        self.place = 0
        self.loaded = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def shard(self, num_shards: int, index: int) -> Shards:
        return type(self)(self.log, self.shards[index::num_shards])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        mine = self.shards if info is None else self.shards[info.id :: info.num_workers]
        ids = [each for shard in mine for each in random.Random(self.epoch).sample(shard, len(shard))]
        first, self.loaded = self.loaded, 0
        for place in range(first, len(ids)):
            self.place = place + 1
            with self.log.open("a") as log:
                log.write(f"{ids[place]}\n")
            yield sample(ids[place])


class Stateful(Shards):
    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state["place"]


class ByLength:
    """Batches of samples alike in length, in an order of its own every epoch; some shorter."""

    batch_size = GLOBAL

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.batches())

    def __iter__(self) -> Iterator[list[int]]:
        return iter(random.Random(self.epoch).sample(self.batches(), len(self.batches())))

    def batches(self) -> list[list[int]]:
        groups = [[each for each in range(LENGTH) if each % 3 == rest] for rest in range(3)]
        return [group[start : start + GLOBAL] for group in groups for start in range(0, len(group), GLOBAL)]


def loader_of(kind: str, world: int, log: Path) -> tuple[DataLoader[Any], dict[str, Any]]:
    """A user's loader whose global batch is the same in every world, and settings for it."""
    batch_size = GLOBAL // world
    shuffled: dict[str, Any] = {"batch_size": batch_size, "shuffle": True}
    if kind == "workers":
        workers = {"num_workers": 2, "persistent_workers": True, "multiprocessing_context": "fork"}
        return DataLoader(Numbers(log), **shuffled, **workers), {}
    if kind == "weighted":
        sampler = WeightedRandomSampler([1.0 + each % 5 for each in range(LENGTH)], LENGTH)
        return DataLoader(Numbers(log), batch_size=batch_size, sampler=sampler), {}
    if kind == "buckets":
        return DataLoader(Numbers(log), batch_sampler=ByLength()), {"split_batches": True}  # type: ignore[arg-type]
    if kind == "dispatched":
        return DataLoader(Numbers(log), **shuffled), {"dispatch_batches": True}
    if kind == "plain stream":
        return DataLoader(Shards(log), batch_size=batch_size), {}
    if kind == "stateful stream":
        return DataLoader(Stateful(log), batch_size=batch_size), {}
    if kind == "dispatched stream":
        return DataLoader(Stateful(log), batch_size=batch_size), {"dispatch_batches": True}
    assert kind == "shuffled"
    return DataLoader(Numbers(log), **shuffled), {}


def train(folder: str, run: str, kind: str, steps_per_window: int, dies_at: int | None) -> None:
    """The recipe of every script, with an evaluation in each epoch. Writes down what each step saw."""
    project = Path(folder)
    settings = ProjectConfiguration(project_dir=project, automatic_checkpoint_naming=True)
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    rank = torch.distributed.get_rank() if world > 1 else 0
    torch.set_num_threads(1)
    torch.manual_seed(0)
    user, config = loader_of(kind, world, project / f"{run}.{rank}.read")
    accelerator = Accelerator(
        cpu=True,
        project_config=settings,
        gradient_accumulation_steps=steps_per_window,
        dataloader_config=DataLoaderConfiguration(data_seed=11, **config),
    )
    model = torch.nn.Linear(4, 1, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    evaluation: Any = DataLoader(range(7), batch_size=12)  # type: ignore[arg-type]
    model, optimizer, loader, evaluation = accelerator.prepare(model, optimizer, user, evaluation)
    accelerator.load_state()
    # What was fetched before a batch was used is in the log of the run that fetched it.
    (project / f"{run}.{rank}.read").write_text("")
    steps = 0
    for epoch in range(loader.epoch, EPOCHS):
        for batch in loader:
            info = loader.batch_info
            real = info.real_rows[accelerator.process.topology.data_rank]
            with accelerator.accumulate(model):
                loss = model(batch["x"])[:real].square().sum()
                accelerator.backward(loss, num_items=real)
                optimizer.step()
                optimizer.zero_grad()
            total = accelerator.reduce(loss.detach(), "sum").item()
            ids = accelerator.gather_for_metrics(batch["id"]).tolist()
            steps += 1
            if rank == 0:
                with (project / f"{run}.steps").open("a") as log:
                    log.write(json.dumps([epoch, info.index, ids, total]) + "\n")
            if info.index == 1:
                seen = [each for few in evaluation for each in accelerator.gather_for_metrics(few).tolist()]
                assert seen == list(range(7))
            if steps % 2 == 0:
                accelerator.save_state()
            if steps == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)
    accelerator.end_training()


def steps_of(folder: Path, run: str) -> dict[tuple[int, int], tuple[list[int], float]]:
    lines = [json.loads(line) for line in (folder / f"{run}.steps").read_text().splitlines()]
    return {(epoch, index): (ids, loss) for epoch, index, ids, loss in lines}


def reads_of(folder: Path, run: str) -> list[int]:
    return [int(line) for path in folder.glob(f"{run}.*.read") for line in path.read_text().split()]


def kill_and_go_on(folder: Path, kind: str, before: int, after: int, window: int) -> None:
    whole, killed = folder / "whole", folder / "killed"
    whole.mkdir()
    killed.mkdir()
    run_ranks(train, before, str(whole), "whole", kind, window, None)
    expected = steps_of(whole, "whole")
    in_epoch = sum(epoch == 0 for epoch, _ in expected)
    dies_at = in_epoch + 5  # in the second epoch
    done = dies_at - dies_at % 2 - in_epoch  # batches of it before the last checkpoint
    with pytest.raises(RankError, match=r"SIGKILL|signal 9|killed"):
        run_ranks(train, before, str(killed), "first", kind, window, dies_at)
    run_ranks(train, after, str(killed), "second", kind, window, None)
    first, second = steps_of(killed, "first"), steps_of(killed, "second")
    start = min(second)
    assert start == (1, done - done % window)  # with the window that was not finished
    # A stream that divides itself is divided anew, among the ranks that there are now, in the next epoch.
    last_epoch = 1 if kind in ("plain stream", "stateful stream") and before != after else EPOCHS
    comparable = [place for place in expected if start <= place and place[0] <= last_epoch]
    assert [place for place in second if place[0] <= last_epoch] == comparable
    assert first == {place: each for place, each in expected.items() if place in first}
    for place in comparable:
        ids, loss = second[place]
        assert ids == expected[place][0], place
        if before == after:
            assert loss == expected[place][1], place
        else:
            assert loss == pytest.approx(expected[place][1], rel=1e-9), place
    for epoch in (1, 2):
        seen = [each for place, (ids, _) in (first | second).items() if place[0] == epoch for each in ids]
        if kind != "weighted":
            assert sorted(seen) == list(range(LENGTH))
    if kind not in ("plain stream", "stateful stream", "dispatched stream", "weighted"):
        # Real rows and the padding of the last batch, and nothing else.
        rest = [each for ids, _ in second.values() for each in ids]
        assert set(reads_of(killed, "second")) == set(rest)
        assert len(rest) <= len(reads_of(killed, "second")) <= len(rest) + len(second) * (after - 1)


TRANSITIONS = [(2, 2), (2, 1), (2, 3), (4, 2), (1, 2)]
KINDS = [
    "shuffled",
    "workers",
    "weighted",
    "buckets",
    "dispatched",
    "plain stream",
    "stateful stream",
    "dispatched stream",
]


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (2, 3)])
def test_a_killed_run_goes_on(tmp_path: Path, before: int, after: int) -> None:
    kill_and_go_on(tmp_path, "shuffled", before, after, 1)


WINDOWED = ["shuffled", "workers", "dispatched", "stateful stream"]


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("kind", "window"), [*((kind, 1) for kind in KINDS), *((kind, 3) for kind in WINDOWED)], ids=str
)
@pytest.mark.parametrize(("before", "after"), TRANSITIONS)
def test_every_kind_of_run_goes_on(tmp_path: Path, kind: str, before: int, after: int, window: int) -> None:
    kill_and_go_on(tmp_path, kind, before, after, window)
