"""A step of a small model sharded over two processes by FSDP2, through accel and written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.compare import Comparison
from benchmarks.processes import workers
from benchmarks.sides import Side
from benchmarks.worker import median_of

__all__ = ["block", "comparisons"]

_SIDES = ("torch", "accel")
"""The peers do not shard on the CPU: accelerate runs DDP there, Lightning Fabric refuses."""


def comparisons(sides: dict[str, Side]) -> list[Comparison]:
    """Against ``fully_shard`` on the same units."""
    return [
        Comparison(
            key="FSDP2",
            title="one FSDP2 step on two gloo processes",
            reference="torch",
            by="ratio",
            goal=1.02,
            samplers={
                name: workers(side, "fsdp", "plain", world_size=2) for name, side in sides.items() if name in _SIDES
            },
        )
    ]


def block(side: str, variant: str) -> Callable[[], float]:
    """Some steps, in step with the other rank."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)) for _ in range(4)]
    model = nn.Sequential(nn.Linear(16, 64), nn.ModuleList(layers), nn.Linear(64, 8))
    net = _net(model)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    module, optimizer, backward = _SPREAD[side](net, optimizer)
    rows = torch.randn(8, 16)

    def step() -> None:
        optimizer.zero_grad()
        backward(module(rows).square().mean())
        optimizer.step()

    return median_of(step, warm_up=10, times=60)


def _net(parts: Any) -> Any:
    from torch import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.layers, self.leave = parts

        def forward(self, rows: Any) -> Any:
            hidden = self.enter(rows)
            for layer in self.layers:
                hidden = hidden + layer(hidden)
            return self.leave(hidden)

    return Net()


def _by_hand(net: Any, optimizer: Any) -> tuple[Any, Any, Callable[[Any], None]]:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for layer in net.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net, torch.optim.AdamW(net.parameters(), lr=1e-3), lambda loss: loss.backward()


def _through_accel(net: Any, optimizer: Any) -> tuple[Any, Any, Callable[[Any], None]]:
    from accel import Accelerator, FullyShardedDataParallelPlugin

    accelerator = Accelerator(cpu=True, fsdp_plugin=FullyShardedDataParallelPlugin())
    net, optimizer = accelerator.prepare(net, optimizer)
    return net, optimizer, accelerator.backward


_SPREAD = {"torch": _by_hand, "accel": _through_accel}
