from __future__ import annotations

from pathlib import Path

import pytest

from accel_launch.host import count_gpus, inspect_host, visible_gpus


@pytest.mark.parametrize(
    ("present", "setting", "expected"),
    [
        (8, None, 8),
        (8, "", 0),
        (8, "-1", 0),
        (8, "0,1", 2),
        (8, " 3 , 5 ", 2),
        (8, "0,1,-1,2", 2),
        (8, "0,9,1", 1),
        (8, "1,1", 0),
        (8, "GPU-aaaa,GPU-bbbb", 2),
        (8, "MIG-a", 1),
        (8, "MIG-a,MIG-b", 1),
        (8, "NoDevFiles", 0),
        (0, "0,1", 0),
        (0, "GPU-aaaa", 0),
        (0, None, 0),
    ],
)
def test_visible_gpus(present: int, setting: str | None, expected: int) -> None:
    assert visible_gpus(present, setting) == expected


def test_device_nodes_count_before_the_drivers_list(tmp_path: Path) -> None:
    assert count_gpus(tmp_path) == 0
    for index in range(4):
        (tmp_path / f"proc/driver/nvidia/gpus/0000:0{index}").mkdir(parents=True)
    assert count_gpus(tmp_path) == 4
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "nvidia-modeset"):
        (tmp_path / "dev" / name).touch()
    assert count_gpus(tmp_path) == 2


def test_cores_are_limited_by_the_control_group(tmp_path: Path) -> None:
    cores = inspect_host({}, root=tmp_path).num_cores
    assert cores >= 1
    quota = tmp_path / "sys/fs/cgroup/cpu.max"
    quota.parent.mkdir(parents=True)
    for text, expected in (("150000 100000", 1), ("50000 100000", 1), ("max 100000", cores), ("x", cores)):
        quota.write_text(text)
        assert inspect_host({}, root=tmp_path).num_cores == expected


def test_only_variables_that_matter_are_kept(tmp_path: Path) -> None:
    host = inspect_host({"RANK": "1", "HOME": "/", "OMP_NUM_THREADS": "2"}, root=tmp_path)
    assert host.variables == {"RANK": "1", "OMP_NUM_THREADS": "2"}
