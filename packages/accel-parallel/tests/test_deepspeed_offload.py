"""Offload to the host or to files is checked before anything is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from accel_parallel.deepspeed import offload
from accel_parallel.deepspeed.config import DeepSpeedConfig, Facts
from accel_parallel.deepspeed.plugin import DeepSpeedPlugin
from accel_state.errors import ConfigError


def config(**arguments: Any) -> DeepSpeedConfig:
    return DeepSpeedConfig.of(DeepSpeedPlugin(**arguments))


def refused(message: str) -> Any:
    return pytest.raises(ConfigError, match=message)


@pytest.mark.parametrize(
    ("stage", "arguments", "message"),
    [
        (0, {"offload_optimizer_device": "cpu"}, "optimizer states are from stage 1 on. Set `zero_stage=1`"),
        (2, {"offload_param_device": "cpu"}, "parameters are from stage 3 on. Set `zero_stage=3`"),
        (2, {"offload_optimizer_device": "nvme"}, "no folder is given. Set `offload_optimizer_nvme_path`"),
        (2, {"offload_optimizer_nvme_path": "x"}, "has no effect with .*offload_optimizer.device` None"),
        (3, {"offload_param_device": "cpu", "offload_param_nvme_path": "x"}, "has no effect with .* 'cpu'"),
    ],
)
def test_offload_that_cannot_be_is_refused(stage: Any, arguments: dict[str, Any], message: str) -> None:
    with refused(message):
        config(zero_stage=stage, **arguments)


def test_offload_is_checked_again_with_a_chosen_stage() -> None:
    with refused("parameters are from stage 3 on"):
        config(zero_stage="auto", offload_param_device="cpu").complete(Facts(), stage=2)


def test_a_folder_for_offload_is_written_to_first(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    said = config(zero_stage=3, offload_optimizer_device="nvme", offload_optimizer_nvme_path=folder)
    assert said.offload_devices.optimizer == "nvme"
    assert list(folder.iterdir()) == []
    (tmp_path / "file").write_text("")
    with refused(r"offload_param.nvme_path` is '.*file/x' .*nothing can be written there: Not a directory. Give a"):
        config(zero_stage=3, offload_param_device="nvme", offload_param_nvme_path=tmp_path / "file" / "x")


def test_a_file_system_needs_asynchronous_access(tmp_path: Path) -> None:
    said = config(zero_stage=3, offload_param_device="nvme", offload_param_nvme_path=tmp_path)
    with refused(r"`zero_optimization.offload_param.device` is 'nvme' .*needs libaio, .*or offload to 'cpu'"):
        said.complete(Facts(has_async_io=False))
    said.complete(Facts())


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(offload.os, "fsync", full)
    with refused("nothing can be written there: No space left on device"):
        config(zero_stage=2, offload_optimizer_device="nvme", offload_optimizer_nvme_path=tmp_path)
    assert list(tmp_path.iterdir()) == []
