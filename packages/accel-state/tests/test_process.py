"""Opening and closing the world, once and on purpose."""

from __future__ import annotations

import logging
import socket
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from accel_state import ConfigError, DistributedType, MeshShape, Process, ProcessEnvironment, ProcessSettings
from accel_state.env import Launcher
from accel_state.process import _meet
from accel_state.testing import rank_environment, run_ranks

CPU = ProcessSettings(device="cpu")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_one_process_has_no_group() -> None:
    with Process.open(CPU) as process:
        assert Process.is_open()
        assert Process.current() is process
        assert process.distributed_type is DistributedType.NO
        assert not dist.is_initialized()
        process.barrier()
        assert repr(process) == "Process(rank 0 of 1, cpu, NO, launcher none)"
    assert not Process.is_open()
    process.close()


def test_closing_an_old_one_leaves_the_new_one_open() -> None:
    old = Process.open(CPU)
    old.close()
    with Process.open(CPU) as new:
        old.close()
        assert Process.current() is new


def test_nothing_open() -> None:
    with pytest.raises(ConfigError, match=r"No process is open.*Process\.open\(\)"):
        Process.current()


def test_the_same_settings_give_the_same_process() -> None:
    with Process.open(CPU) as process:
        assert Process.open(ProcessSettings(device="cpu")) is process


def test_late_and_different_settings_are_refused_and_both_named() -> None:
    with (
        Process.open(CPU),
        pytest.raises(ConfigError, match=r"`timeout_s` is 1800\.0 and 5\.0 was given; `check_collectives` is False"),
    ):
        Process.open(ProcessSettings(device="cpu", timeout_s=5.0, check_collectives=True))


def test_a_world_is_divided_once() -> None:
    with Process.open(CPU) as process:
        process.divide(MeshShape())
        process.divide(MeshShape())
        assert process.settings.mesh == MeshShape()
        with pytest.raises(ConfigError, match="divided into one process already, and tp=2 was asked for"):
            process.divide(MeshShape(tp=2))
    with Process.open(CPU) as process, pytest.raises(ConfigError, match="needs 2 processes, but the world has 1"):
        process.divide(MeshShape(tp=2))


def test_a_failed_opening_leaves_nothing_open() -> None:
    with pytest.raises(ConfigError, match="needs 2 processes, but the world has 1"):
        Process.open(ProcessSettings(device="cpu", mesh=MeshShape(tp=2)))
    assert not Process.is_open()


def test_a_world_without_an_address() -> None:
    environment = ProcessEnvironment(launcher=Launcher.SLURM, rank=0, world_size=2, local_world_size=2)
    with pytest.raises(ConfigError, match=r"MASTER_ADDR=None.*launcher slurm.*Set MASTER_ADDR and MASTER_PORT"):
        Process.open(CPU, environment=environment)


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        environment = ProcessEnvironment(
            rank=0,
            world_size=2,
            local_world_size=2,
            master_addr="127.0.0.1",
            master_port=taken.getsockname()[1],
        )
        with pytest.raises(ConfigError, match=r"cannot listen there.*Set MASTER_PORT to a free port"):
            Process.open(CPU, environment=environment)


def test_no_rank_0_to_be_found() -> None:
    environment = ProcessEnvironment(
        rank=1, local_rank=1, world_size=2, local_world_size=2, master_addr="127.0.0.1", master_port=free_port()
    )
    with pytest.raises(ConfigError, match=r"found no rank 0 there within 1 s.*Check that rank 0 runs"):
        Process.open(ProcessSettings(device="cpu", timeout_s=1.0), environment=environment)
    assert not Process.is_open()


def test_a_group_of_another_size() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        environment = ProcessEnvironment(rank=0, world_size=2, local_world_size=2)
        with pytest.raises(ConfigError, match=r"A process group of 1 processes exists.*say rank 0 of 2"):
            Process.open(CPU, environment=environment)
    finally:
        dist.destroy_process_group()


def describe() -> tuple[int, int, str, int]:
    process = Process.current()
    total = torch.tensor([process.topology.rank])
    dist.all_reduce(total)
    return process.topology.rank, process.topology.node_rank, process.distributed_type.value, int(total)


def test_a_world_on_two_nodes() -> None:
    assert run_ranks(describe, 4, nodes=2) == [(rank, rank // 2, "MULTI_CPU", 6) for rank in range(4)]


def open_by_address() -> list[bool]:
    """Without a store that is there already: as under torchrun."""
    with Process.open(CPU, environment=rank_environment()) as process:
        process.barrier()
        inside = dist.is_initialized()
    return [inside, dist.is_initialized()]


def test_the_group_ends_with_the_process() -> None:
    assert run_ranks(open_by_address, 2, open_process=False) == [[True, False]] * 2


def nothing() -> None: ...


def test_ranks_that_end_at_once_do_not_break_the_start_of_others() -> None:
    for _ in range(10):
        run_ranks(nothing, 4)


def test_nobody_goes_on_before_all_have_joined_and_rank_0_goes_last() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    ranks = [threading.Thread(target=_meet, args=(store, rank, 3, timedelta(seconds=20))) for rank in range(3)]
    for thread in ranks[:2]:
        thread.start()
    time.sleep(0.1)
    assert all(thread.is_alive() for thread in ranks[:2])
    store.add("joined", 1)  # rank 2 has come, and has not gone on yet
    store.set("all-joined", "1")
    ranks[1].join(10)
    assert not ranks[1].is_alive()
    assert ranks[0].is_alive()
    store.set("all-gone", "1")
    ranks[0].join(10)
    assert not ranks[0].is_alive()


def join_slowly() -> float:
    place = rank_environment()

    def late(*args: Any) -> None:
        time.sleep(0.5)
        _meet(*args)

    with pytest.MonkeyPatch.context() as patch:
        if place.rank == 1:
            patch.setattr("accel_state.process._meet", late)
        begin = time.monotonic()
        with Process.open(CPU, environment=place):
            return time.monotonic() - begin


def test_opening_waits_for_the_slowest() -> None:
    assert min(run_ranks(join_slowly, 2, open_process=False)) >= 0.45


def open_twice() -> list[int]:
    sizes = []
    for _ in range(2):
        with Process.open(CPU, environment=rank_environment()):
            sizes.append(dist.get_world_size())
    return sizes


def test_a_world_can_be_opened_again_at_the_same_store() -> None:
    assert run_ranks(open_twice, 2, open_process=False) == [[2, 2]] * 2


def rank_0_serves(port: int) -> int:
    place = rank_environment()
    environment = ProcessEnvironment(
        rank=place.rank,
        local_rank=place.rank,
        world_size=2,
        local_world_size=2,
        master_addr="127.0.0.1",
        master_port=port,
    )
    with Process.open(CPU, environment=environment):
        return dist.get_world_size()


def test_rank_0_serves_where_no_launcher_does() -> None:
    assert run_ranks(rank_0_serves, 2, free_port(), open_process=False) == [2, 2]


def adopt() -> bool:
    place = rank_environment()
    store = dist.TCPStore("127.0.0.1", place.master_port, is_master=False)  # type: ignore[attr-defined, arg-type]
    dist.init_process_group("gloo", store=store, rank=place.rank, world_size=place.world_size)
    with Process.open(CPU, environment=place) as process:
        process.barrier()
    logging.getLogger(__name__).info("closed")
    still_there = dist.is_initialized()
    dist.destroy_process_group()
    return still_there


def test_a_group_of_the_script_is_adopted_and_left_open() -> None:
    assert run_ranks(adopt, 2, open_process=False) == [True, True]


def test_opening_again_may_ask_for_what_is_there_or_for_nothing() -> None:
    with Process.open(ProcessSettings(timeout_s=60.0), environment=ProcessEnvironment()) as process:
        found = process.kind.type  # not asked for above: what this machine has
        assert Process.open() is process
        assert Process.open(ProcessSettings(device=found, backend=process.kind.backend)) is process
        with pytest.raises(ConfigError, match=r"`timeout_s` is 60.0 and 30.0 was given"):
            Process.open(ProcessSettings(timeout_s=30.0))
