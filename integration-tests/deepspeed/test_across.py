"""A run goes on from the checkpoint of any other strategy as if nothing had changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accel import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accel_state.process import Process, ProcessSettings
from accel_state.testing import rank_environment, run_ranks

SPREADS: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"fsdp_plugin": FullyShardedDataParallelPlugin()},
    **{f"zero{stage}": {"deepspeed_plugin": DeepSpeedPlugin(zero_stage=stage)} for stage in range(4)},  # type: ignore[arg-type]
}


def prepared(spread: str) -> tuple[Accelerator, Any, Any]:
    accelerator = Accelerator(**SPREADS[spread])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    return (accelerator, *accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.01)))


def losses(accelerator: Accelerator, model: Any, optimizer: Any, steps: range) -> list[float]:
    found = []
    for step in steps:
        rows = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + accelerator.process_index))
        loss = model(rows).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(accelerator.reduce(loss.detach(), "mean")))
    return found


@contextmanager
def world() -> Iterator[None]:
    """A world of its own for each strategy, which divides it as it needs."""
    with Process.open(ProcessSettings(device="cpu"), environment=rank_environment()) as process:
        assert process.topology.world_size == 2
        yield


def gone_on(folder: str) -> dict[tuple[str, str], list[float]]:
    """Losses of the second half of a run, by the strategies of both halves."""
    for before in SPREADS:
        with world():
            accelerator, model, optimizer = prepared(before)
            losses(accelerator, model, optimizer, range(4))
            accelerator.save_state(f"{folder}/{before}")
            accelerator.free_memory()
    found = {}
    for before, after in product(SPREADS, SPREADS):
        with world():
            accelerator, model, optimizer = prepared(after)
            accelerator.load_state(f"{folder}/{before}")
            found[before, after] = losses(accelerator, model, optimizer, range(4, 8))
            accelerator.free_memory()
    return found


@pytest.mark.timeout(200)
def test_a_run_goes_on_under_any_other_strategy(tmp_path: Path) -> None:
    """Measured: all 36 pairs equal bit by bit."""
    found = run_ranks(gone_on, 2, str(tmp_path), open_process=False, timeout_s=150)[0]
    assert len(found) == 36
    for pair, values in found.items():
        assert values == pytest.approx(found["ddp", "ddp"], abs=1e-6), pair
