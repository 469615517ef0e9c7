"""Checkpoints in S3, of which moto's server is the stand-in: several processes, large objects, crashes, no server."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import fsspec
import pytest
import torch
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from accel import Accelerator, ProjectConfiguration
from accel_parallel.checkpoint import Checkpoint, Item, save_checkpoint
from accel_parallel.checkpoint import remote as remote_module
from accel_parallel.checkpoint.background import BackgroundSaver
from accel_parallel.checkpoint.object_store import BLOCK_BYTES, ObjectStore
from accel_parallel.checkpoint.remote import RemoteFolder, place_of
from accel_parallel.checkpoint.shelf import shelf_of
from accel_state import CheckpointError, Process, ProcessSettings
from accel_state.testing import RankError, rank_environment, run_ranks

BUCKET = "checkpoints"
WHOLE = torch.arange(24.0).reshape(6, 4)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    stand_in = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    stand_in.start()
    host, port = stand_in.get_host_and_port()
    yield f"http://{host}:{port}"
    stand_in.stop()


@pytest.fixture
def run_url(server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A place in the bucket for this test alone."""
    monkeypatch.setitem(fsspec.config.conf, "s3", options(server))
    fs = fsspec.filesystem("s3")
    if not fs.exists(BUCKET):
        fs.call_s3("create_bucket", Bucket=BUCKET)
    return f"s3://{BUCKET}/{request.node.name}"


def options(server: str) -> dict[str, Any]:
    return {"key": "any", "secret": "any", "endpoint_url": server, "client_kwargs": {"region_name": "us-east-1"}}


def configure(server: str) -> None:
    """As a user's environment does, for this process and those that it starts."""
    variables = {"AWS_ENDPOINT_URL": server, "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    os.environ.update(variables, AWS_DEFAULT_REGION="us-east-1")


def contents(step: int) -> list[Item]:
    """What a run saves: a divided model together, and every rank its own part."""
    process = Process.current()
    rank = process.topology.rank
    mesh = init_device_mesh("cpu", (process.topology.world_size,))
    weight = distribute_tensor(WHOLE + step, mesh, [Shard(0)])
    return [
        Item("model", "model", {"weight": weight}, shared=True),
        Item(f"rng_{rank}", "rng", {"seed": torch.tensor(step), "rank": rank}),
    ]


def save(server: str, final: str, step: int) -> None:
    configure(server)
    save_checkpoint(final, contents(step), process=Process.current(), step=step, strategy="any")


def saved_step(final: Any, world_size: int = 2) -> int:
    """Reads everything, and checks that it is complete and of one save."""
    checkpoint = Checkpoint(final)
    assert set(checkpoint.items) == {"model", *(f"rng_{rank}" for rank in range(world_size))}
    step = checkpoint.manifest.step
    assert torch.equal(checkpoint.read("model")["weight"], WHOLE + step)
    assert [checkpoint.read(f"rng_{rank}")["seed"].item() for rank in range(world_size)] == [step] * world_size
    return step


def saved_and_loaded(server: str, location: str) -> list[int]:
    """Three numbered ones, the last of which is replaced; the steps of the latest, before and after."""
    topology = Process.current().topology
    configure(server)
    shelf = shelf_of(location)
    assert (shelf.latest(), shelf.next_number()) == (None, 0)
    Process.current().barrier()
    steps = []
    for number, step in ((0, 0), (1, 1), (2, 2), (2, 7)):
        save(server, str(shelf.numbered(number)), step)
        latest = shelf.latest()
        Checkpoint(str(latest)).verify(share=topology.rank, num_shares=topology.world_size)
        steps.append(saved_step(latest))
        Process.current().barrier()
    return steps


def places(final: str) -> set[str]:
    return {place for name in ObjectStore(final).names() if (place := place_of(name)) is not None}


def test_two_processes_save_replace_load_and_prune(server: str, run_url: str) -> None:
    shelf = shelf_of(f"{run_url}/checkpoints")
    assert run_ranks(saved_and_loaded, 2, server, str(shelf.location)) == [[0, 1, 2, 7]] * 2
    assert places(str(shelf.latest())) == {Checkpoint(str(shelf.latest())).manifest.place}
    assert shelf.prune(total_limit=1, keep=[str(shelf.numbered(0))]) == [str(shelf.numbered(1))]
    assert [number for number, _ in shelf.complete()] == [0, 2]
    assert ObjectStore(str(shelf.numbered(1))).names() == []
    assert [saved_step(final) for _, final in shelf.complete()] == [0, 7]


def killed(server: str, final: str, rank: int, at: int) -> None:
    if Process.current().topology.rank == rank:
        count = 0
        translated = ObjectStore._translated

        def counted(self: ObjectStore, name: str) -> Any:
            nonlocal count
            count += 1
            if count > at:
                os.kill(os.getpid(), signal.SIGKILL)
            return translated(self, name)

        with patch.object(ObjectStore, "_translated", counted):
            save(server, final, 1)
    else:
        save(server, final, 1)


def test_a_process_killed_anywhere_leaves_the_old_or_the_new_one(server: str, run_url: str) -> None:
    run_ranks(save, 2, server, run_url, 0)
    steps = []
    # Rank 0 lists, asks and writes for each of three files, lists, asks, reads, puts the manifest, and removes.
    for rank, at in [(1, 0), (1, 3), (0, 0), (0, 4), (0, 10), (0, 11)]:
        with pytest.raises(RankError, match=r"SIGKILL|exit code -9"):
            run_ranks(killed, 2, server, run_url, rank, at, timeout_s=20.0)
        steps.append(saved_step(run_url))
    assert steps == [0, 0, 0, 0, 0, 1]
    assert len(places(run_url)) > 1
    now = time.time() + remote_module.ORPHAN_AGE_S + 1
    with patch.object(remote_module.time, "time", lambda: now):
        store = ObjectStore(run_url)
        remote_module.remove_leftovers(store, store.names())
    assert places(run_url) == {Checkpoint(run_url).manifest.place}
    assert saved_step(run_url) == 1


def save_in_background(server: str, final: str) -> None:
    configure(server)
    saver = BackgroundSaver(Process.current())
    pending = saver.save(final, contents(3), step=3, strategy="any")
    pending.wait()
    saver.close()


def test_processes_of_their_own_write_in_the_background(server: str, run_url: str) -> None:
    run_ranks(save_in_background, 2, server, run_url)
    assert saved_step(run_url) == 3
    assert not [name for name in ObjectStore(run_url).names() if "receipt" in name]


def trained(server: str, project_dir: str) -> tuple[str | None, list[float]]:
    """Resume, train and save as a run does."""
    configure(server)
    with Process.open(ProcessSettings(device="cpu"), environment=rank_environment()):
        accelerator = Accelerator(cpu=True, project_config=ProjectConfiguration(project_dir=project_dir, total_limit=2))
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
        resumed = accelerator.load_state()
        losses = []
        for number in range(4):
            loss = model(torch.randn(4, 3)).square().sum()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if number == 1:
                accelerator.save_state(blocking=False).wait()
        accelerator.end_training()
        return None if resumed is None else str(resumed), losses


def test_a_run_of_two_resumes_from_its_bucket(server: str, run_url: str) -> None:
    first = run_ranks(trained, 2, server, run_url, open_process=False)
    assert [resumed for resumed, _ in first] == [None, None]
    second = run_ranks(trained, 2, server, run_url, open_process=False)
    assert [resumed for resumed, _ in second] == [f"{run_url}/checkpoints/checkpoint_0"] * 2
    assert [losses[:2] for _, losses in second] == [losses[2:] for _, losses in first]
    run_ranks(trained, 2, server, run_url, open_process=False)
    assert [number for number, _ in shelf_of(f"{run_url}/checkpoints").complete()] == [1, 2]


def test_large_objects_go_up_in_parts_and_failed_ones_leave_none(run_url: str) -> None:
    data = os.urandom(2 * BLOCK_BYTES + 12345)
    folder = RemoteFolder(run_url)
    record = folder.write("large", [data[:7], data[7:]], sync=True)
    assert record.size_bytes == len(data)
    file = folder.open("large")
    assert b"".join(file.chunks()) == data
    assert file.view(BLOCK_BYTES - 3, BLOCK_BYTES + 3) == data[BLOCK_BYTES - 3 : BLOCK_BYTES + 3]

    def broken() -> Iterator[bytes]:
        yield data
        raise OSError("the tensor cannot be read")

    with pytest.raises(OSError, match="the tensor cannot be read"):
        folder.write("broken", broken(), sync=True)
    assert not folder.holds("broken")
    fs = fsspec.filesystem("s3")
    assert fs.call_s3("list_multipart_uploads", Bucket=BUCKET).get("Uploads", []) == []


def test_a_folder_marker_is_no_object_in_the_way(run_url: str) -> None:
    fs = fsspec.filesystem("s3")
    fs.call_s3("put_object", Bucket=BUCKET, Key=f"{run_url.partition(BUCKET + '/')[2]}/")
    with Process.open(ProcessSettings(device="cpu")):
        item = Item("model", "model", {"weight": WHOLE})
        save_checkpoint(run_url, [item], process=Process.current(), step=1, strategy="any")
    assert torch.equal(Checkpoint(run_url).read("model")["weight"], WHOLE)


@pytest.mark.parametrize("missing", ["bucket", "server", "credentials"])
def test_a_store_that_does_not_answer_fails_the_save(
    run_url: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        if missing == "server":
            address = f"http://127.0.0.1:{closed.getsockname()[1]}"
            hasty = {"config_kwargs": {"retries": {"max_attempts": 1}}}
            monkeypatch.setitem(fsspec.config.conf, "s3", {**options(address), **hasty})
        elif missing == "credentials":
            given = {key: value for key, value in fsspec.config.conf["s3"].items() if key not in ("key", "secret")}
            monkeypatch.setitem(fsspec.config.conf, "s3", given)
            monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        final = run_url.replace(BUCKET, "no-such-bucket") if missing == "bucket" else run_url
        with Process.open(ProcessSettings(device="cpu")):
            item = Item("model", "model", {"weight": WHOLE})
            with pytest.raises(CheckpointError, match="earlier ones are untouched"):
                save_checkpoint(final, [item], process=Process.current(), step=1, strategy="any")
        with pytest.raises(CheckpointError, match=r"could not be read|holds no `manifest\.json`"):
            Checkpoint(final)
