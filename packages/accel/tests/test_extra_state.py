"""What modules keep besides their tensors comes back with them, whatever divides the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from accel import Accelerator, FullyShardedDataParallelPlugin
from accel_state.testing import run_ranks


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.count = 0
        self.scales = torch.zeros(2)

    def get_extra_state(self) -> torch.Tensor:
        return torch.cat([torch.tensor([float(self.count)]), self.scales])  # made anew each time

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.count, self.scales = int(state[0]), state[1:]


def restored(folder: str, kind: str) -> tuple[list[int], list[float], bool]:
    plugin = FullyShardedDataParallelPlugin(min_num_params=1) if kind == "fsdp" else None
    accelerator = Accelerator(cpu=True, project_dir=folder, fsdp_plugin=plugin)
    torch.manual_seed(0)
    raw = nn.Sequential(Counting(), Counting())
    model = accelerator.prepare(raw)
    inner = accelerator.unwrap_model(model)
    inner[0].count, inner[1].count = 7, 8
    inner[1].scales = torch.tensor([1.0, 2.0])
    accelerator.save_state()
    inner[0].count = inner[1].count = 0
    inner[1].scales = torch.zeros(2)
    accelerator.load_state()
    address = inner[1].scales.data_ptr()
    in_file = False
    for line in Path("/proc/self/maps").read_text().splitlines() if Path("/proc/self/maps").exists() else ():
        begin, end = (int(each, 16) for each in line.split()[0].split("-"))
        in_file = in_file or (begin <= address < end and "safetensors" in line)
    accelerator.end_training()
    return [each.count for each in inner], inner[1].scales.tolist(), in_file


@pytest.mark.parametrize(("kind", "world_size"), [("single", 1), ("ddp", 2), ("fsdp", 2)])
def test_it_comes_back_in_memory_of_its_own(tmp_path: Path, kind: str, world_size: int) -> None:
    found = run_ranks(restored, world_size, str(tmp_path), kind)
    assert found == [([7, 8], [1.0, 2.0], False)] * world_size
