"""Cross entropy of divided logits equals that of whole ones, in value and gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F  # noqa: N812

from accel_parallel.tensor.loss import divided_cross_entropy, loss_parallel
from accel_state import ConfigError
from accel_state.testing import run_ranks

CLASSES = 12
SHAPES = [(CLASSES,), (5, CLASSES), (3, CLASSES, 4)]


def made(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, int]:
    generator = torch.Generator().manual_seed(len(shape))
    logits = torch.randn(shape, generator=generator, dtype=torch.float64).mul_(20).to(dtype)
    dim = min(1, len(shape) - 1)
    target = torch.randint(0, CLASSES, shape[:dim] + shape[dim + 1 :], generator=generator)
    return logits, target, dim


def difference(shape: tuple[int, ...], **options: Any) -> float:
    logits, target, dim = made(shape)
    if len(shape) > 1:
        target.view(-1)[1] = options.get("ignore_index", -100)
    whole = logits.clone().requires_grad_()
    expected = F.cross_entropy(whole, target, **options)
    expected.square().sum().backward()  # type: ignore[no-untyped-call, unused-ignore]
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parts = distribute_tensor(logits, mesh, [Shard(dim)]).requires_grad_()
    with loss_parallel():
        found = F.cross_entropy(parts, target, **options)
        assert not isinstance(found, DTensor)
    found.square().sum().backward()  # type: ignore[no-untyped-call, unused-ignore]
    assert isinstance(parts.grad, DTensor)
    assert isinstance(whole.grad, torch.Tensor)
    apart = max((found - expected).abs().max().item(), (parts.grad.full_tensor() - whole.grad).abs().max().item())
    with loss_parallel():  # as the refusals advise
        gathered = F.cross_entropy(parts.full_tensor(), target, **options)  # type: ignore[attr-defined]
    return max(apart, (gathered - expected).abs().max().item())


def all_differences() -> list[float]:
    weight = torch.rand(CLASSES, dtype=torch.float64)
    cases: list[dict[str, Any]] = [{"reduction": each} for each in ("mean", "sum", "none")]
    cases += [{"ignore_index": 3}, {"weight": weight}, {"weight": weight, "reduction": "sum"}]
    return [difference(shape, **case) for shape in SHAPES for case in cases]


@pytest.mark.parametrize("world_size", [2, 3])
def test_equal_to_whole_logits(world_size: int) -> None:
    for found in run_ranks(all_differences, world_size):
        assert len(found) == 18
        assert max(found) < 1e-12


def edges() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    logits, target, _ = made((5, CLASSES))
    parts = distribute_tensor(logits, mesh, [Shard(1)])
    found: dict[str, Any] = {}
    with loss_parallel():
        found["plain"] = (F.cross_entropy(logits, target) == F.cross_entropy(logits, target)).item()
        found["module"] = (nn.CrossEntropyLoss()(parts, target) - F.cross_entropy(logits, target)).abs().item()
        found["ignored"] = F.cross_entropy(parts, torch.full_like(target, -100)).item()
        short, chosen = made((5, CLASSES), torch.bfloat16)[0], target
        loss = F.cross_entropy(distribute_tensor(short, mesh, [Shard(1)]), chosen)
        found["short"] = (loss.dtype, (loss.float() - F.cross_entropy(short.float(), chosen)).abs().item())
        many, among, _ = made((64, CLASSES), torch.bfloat16)
        each = F.cross_entropy(distribute_tensor(many, mesh, [Shard(1)]), among, reduction="none").float()
        wanted = F.cross_entropy(many.float(), among, reduction="none")
        found["rounded once"] = ((each - wanted).abs() / wanted.abs().clamp_min(1e-3)).max().item()
        overflown = logits.clone()
        overflown[2], target[2] = math.inf, -100
        found["overflown"] = F.cross_entropy(distribute_tensor(overflown, mesh, [Shard(1)]), target).isfinite().item()
        target[2] = 0
        with pytest.raises(RuntimeError, match="out of bounds"):
            F.cross_entropy(parts, torch.full_like(target, CLASSES))
        with pytest.raises(RuntimeError, match="out of bounds"):
            F.cross_entropy(parts, torch.full_like(target, -1))
        with pytest.raises(ConfigError, match=r"was given label_smoothing=0.1 with divided logits"):
            F.cross_entropy(parts, target, label_smoothing=0.1)
        with pytest.raises(ConfigError, match="class probabilities"):
            F.cross_entropy(parts, logits)
    with pytest.raises(ConfigError, match=r"placements \(Replicate\(\),\)"):
        divided_cross_entropy(distribute_tensor(logits, mesh, [Replicate()]), target)
    with pytest.raises(ConfigError, match="`reduction='median'` is none"):
        divided_cross_entropy(parts, target, reduction="median")  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="left"), loss_parallel():
        raise KeyError("left")
    with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
        F.cross_entropy(parts, target)
    return found


def test_edges() -> None:
    for found in run_ranks(edges, 2):
        assert math.isnan(found.pop("ignored"))  # as of torch
        dtype, apart = found.pop("short")
        assert dtype is torch.bfloat16
        assert apart < 0.1
        assert found.pop("module") < 1e-12
        assert found.pop("rounded once") < 2**-8
        assert found == {"plain": True, "overflown": True}
