from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_launch.explain import explain_plan
from accel_launch.host import Host
from accel_launch.options import LaunchOptions
from accel_launch.plan import LaunchPlan, plan_launch
from accel_state.config import LaunchSettings
from accel_state.env import Launcher, detect
from accel_state.errors import ConfigError

HOST = Host(num_gpus=0, num_cores=8, python="/usr/bin/python")
EIGHT_GPUS = Host(num_gpus=8, num_cores=64, python="/usr/bin/python")


def plan(host: Host = HOST, **options: Any) -> LaunchPlan:
    return plan_launch(LaunchOptions(**options), host, "train.py", ["--lr", "1"])


def test_one_process_is_plain_python() -> None:
    made = plan()
    (process,) = made.processes
    assert process.argv == ("/usr/bin/python", "train.py", "--lr", "1")
    assert process.env == {}
    assert made.replaces_launcher
    assert not made.needs_port


def test_one_process_gets_its_settings_only() -> None:
    (process,) = plan(mixed_precision="bf16", cpu=True).processes
    assert set(process.env) == {"ACCEL_RUN_CONFIG"}
    read = LaunchSettings.from_json(process.env["ACCEL_RUN_CONFIG"])
    assert read.values == {"mixed_precision": "bf16", "device": "cpu"}
    assert read.sources == {"mixed_precision": "--mixed-precision", "device": "--cpu"}


def test_every_run_setting_travels_under_its_name() -> None:
    made = plan(
        num_processes=2,
        gradient_accumulation_steps=4,
        debug=True,
        timeout=60.0,
        project_dir="runs",
        mixed_precision="fp16",
    )
    assert json.loads(made.processes[0].env["ACCEL_RUN_CONFIG"]) == {
        "version": 1,
        "settings": {
            "gradient_accumulation_steps": 4,
            "check_collectives": True,
            "timeout_s": 60.0,
            "project_dir": "runs",
            "mixed_precision": "fp16",
        },
        "sources": {
            "gradient_accumulation_steps": "--gradient-accumulation-steps",
            "check_collectives": "--debug",
            "timeout_s": "--timeout",
            "project_dir": "--project-dir",
            "mixed_precision": "--mixed-precision",
        },
    }


def test_several_processes_without_settings_have_no_variable_of_ours() -> None:
    assert "ACCEL_RUN_CONFIG" not in plan(num_processes=2).processes[0].env


@settings(max_examples=60, deadline=None)
@given(machines=st.sampled_from([1, 2, 3, 8]), local=st.integers(1, 128))
def test_every_rank_is_started_once_and_knows_its_place(machines: int, local: int) -> None:
    """Up to 1,024 processes on 8 machines, read back by what training processes read."""
    world_size = machines * local
    ranks = []
    for machine in range(machines):
        several = {"machine_rank": machine, "main_process_ip": "10.0.0.1", "main_process_port": 29500}
        made = plan(num_processes=world_size, num_machines=machines, **(several if machines > 1 else {}))
        if made.needs_port:
            made = made.with_port(12345)
        assert made.hosts_rank_zero == (world_size > 1 and machine == 0)
        for process in made.processes:
            found = detect(made.environment(process, {}))
            assert (found.rank, found.world_size) == (process.rank, world_size)
            assert found.local_rank == process.local_rank
            assert (found.local_world_size, found.node_rank) == (local, machine)
            found.topology()
            if world_size > 1:
                assert found.launcher == Launcher.TORCHRUN
                assert found.master_port == (29500 if machines > 1 else 12345)
                assert found.master_addr == ("10.0.0.1" if machines > 1 else "127.0.0.1")
            ranks.append(found.rank)
    assert ranks == list(range(world_size))


def test_default_number_of_processes() -> None:
    assert plan(EIGHT_GPUS).world_size == 8
    assert plan(EIGHT_GPUS, cpu=True).world_size == 1
    assert plan().world_size == 1
    several = {"num_machines": 4, "machine_rank": 1, "main_process_ip": "a", "main_process_port": 1}
    assert plan(EIGHT_GPUS, **several).world_size == 32
    assert plan(**several).world_size == 4


def test_default_number_of_processes_names_its_source() -> None:
    sources = {each.name: each.source for each in plan(EIGHT_GPUS).settings}
    assert sources["num_processes"] == "default: 8 CUDA device(s) here"


@pytest.mark.parametrize(
    ("host", "options", "expected"),
    [
        (HOST, {"num_processes": 2}, "4"),
        (HOST, {"num_processes": 16}, "1"),
        (HOST, {}, None),
        (Host(num_cores=8, variables={"OMP_NUM_THREADS": "3"}), {"num_processes": 2}, None),
        (
            Host(num_cores=8, variables={"OMP_NUM_THREADS": "3"}),
            {"num_processes": 2, "num_cpu_threads_per_process": 5},
            "5",
        ),
        (HOST, {"num_cpu_threads_per_process": 5}, "5"),
    ],
)
def test_threads(host: Host, options: dict[str, Any], expected: str | None) -> None:
    assert plan(host, **options).processes[0].env.get("OMP_NUM_THREADS") == expected


def test_module_and_program() -> None:
    assert plan(module=True).processes[0].argv == ("/usr/bin/python", "-m", "train.py", "--lr", "1")
    assert plan(no_python=True).processes[0].argv == ("train.py", "--lr", "1")


def test_variables_of_an_outer_launcher_do_not_get_through() -> None:
    outer = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "far", "ACCEL_RUN_CONFIG": "{}", "TORCHELASTIC_X": "1"}
    made = plan(Host(variables={name: outer[name] for name in outer if name != "TORCHELASTIC_X"}))
    assert made.environment(made.processes[0], {**outer, "HOME": "/"}) == {"HOME": "/", "TORCHELASTIC_X": "1"}


def test_log_folder_keeps_the_launcher_with_one_process() -> None:
    assert not plan(log_dir="logs").replaces_launcher


def test_multi_gpu_asks_for_cuda() -> None:
    made = plan(EIGHT_GPUS, multi_gpu=True)
    assert made.world_size == 8
    assert made.run_config.device == "cuda"
    assert made.run_config.source("device") == "--multi-gpu"


@pytest.mark.parametrize(
    ("host", "options", "message"),
    [
        (EIGHT_GPUS, {"cpu": True, "multi_gpu": True}, r"`--cpu` and `--multi-gpu` were both given.*Keep one"),
        (HOST, {"module": True, "no_python": True}, r"`--module` and `--no-python` were both given"),
        (HOST, {"num_processes": 0}, r"`--num-processes 0` is not a count.*positive integer"),
        (HOST, {"num_processes": -3}, r"`--num-processes -3` is not a count"),
        (HOST, {"gradient_accumulation_steps": 0}, r"`--gradient-accumulation-steps 0` is not a count"),
        (HOST, {"num_cpu_threads_per_process": 0}, r"`--num-cpu-threads-per-process 0` is not a count"),
        (HOST, {"num_machines": 0}, r"`--num-machines 0` is not a count"),
        (HOST, {"machine_rank": 3, "num_machines": 2}, r"`--machine-rank 3` with `--num-machines 2`.*0 to 1"),
        (HOST, {"machine_rank": 1}, r"`--machine-rank 1` with `--num-machines 1`"),
        (HOST, {"num_machines": 2}, r"without `--machine-rank`, but each machine must know"),
        (HOST, {"num_machines": 2, "machine_rank": 0}, r"without `--main-process-ip`"),
        (
            HOST,
            {"num_machines": 2, "machine_rank": 0, "main_process_ip": "a"},
            r"without `--main-process-port`, but a port that machine 0 finds",
        ),
        (
            HOST,
            {
                "num_machines": 2,
                "machine_rank": 0,
                "main_process_ip": "a",
                "main_process_port": 1,
                "num_processes": 3,
            },
            r"`--num-machines 2` does not divide it.*multiple of 2",
        ),
        (HOST, {"timeout": 0.0}, r"`--timeout 0` is no time.*positive"),
        (HOST, {"timeout": float("nan")}, r"`--timeout nan` is no time"),
        (HOST, {"main_process_port": 70000}, r"`--main-process-port 70000` is not a TCP port"),
        (HOST, {"main_process_port": 1234}, r"`--main-process-port 1234` was given for one process.*meets no other"),
        (HOST, {"main_process_ip": "a"}, r"`--main-process-ip a` was given for one process"),
        (HOST, {"multi_gpu": True}, r"`--multi-gpu` was given, but no CUDA device is visible"),
        (EIGHT_GPUS, {"multi_gpu": True, "num_processes": 1}, r"for one process \(--num-processes\).*2. or more"),
        (Host(num_gpus=1), {"multi_gpu": True}, r"for one process \(default: 1 CUDA device"),
        (EIGHT_GPUS, {"multi_gpu": True, "num_processes": 9}, r"with 9 processes.*has 8 visible.*at most 8"),
        (
            Host(variables={"WORLD_SIZE": "4"}),
            {},
            r"`WORLD_SIZE=4` is set: another launcher.*train alone.*unset WORLD_SIZE",
        ),
        (HOST, {"mixed_precision": "fp4"}, r"`mixed_precision='fp4'` \(--mixed-precision\) is not a precision"),
    ],
)
def test_contradictions_are_refused(host: Host, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(host, **options)


def test_explanation_has_every_setting_with_its_source() -> None:
    host = Host(num_cores=8, python="/usr/bin/python", variables={"TORCHELASTIC_RESTART_COUNT": "2"})
    text = explain_plan(plan(host, num_processes=2, cpu=True, timeout=60.0))
    assert "2 of 2 process(es) would start; nothing was started." in text
    assert re.search(r"num_processes +2 +--num-processes", text)
    assert re.search(r"num_cpu_threads_per_process +4 +default: 8 core\(s\) for 2 processes", text)
    assert re.search(r"timeout_s +60\.0 +--timeout", text)
    assert re.search(r"mixed_precision +'no' +default", text)
    assert "+ MASTER_PORT=<a free port>" in text
    assert "- TORCHELASTIC_RESTART_COUNT" in text
    assert "rank 1\n  /usr/bin/python train.py --lr 1\n  + RANK=1 LOCAL_RANK=1" in text


def test_explanation_of_one_machine_of_several() -> None:
    several = {"num_machines": 2, "machine_rank": 1, "main_process_ip": "10.0.0.1", "main_process_port": 29500}
    text = explain_plan(plan(num_processes=4, **several))
    assert "2 of 4 process(es) would start on machine 1 of 2" in text
    assert "+ MASTER_PORT=29500" in text
    assert "+ RANK=2 LOCAL_RANK=0" in text
    assert re.search(r"machine_rank +1 +--machine-rank", text)


def test_explanation_of_plain_python() -> None:
    assert "(no difference)" in explain_plan(plan())
