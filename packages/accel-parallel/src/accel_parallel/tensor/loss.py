"""Cross entropy of logits that are divided by vocabulary: no rank ever holds those of the whole.

Shoeybi et al., "Megatron-LM", arXiv:1909.08053, section 3: what is exchanged is two numbers a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from accel_state.errors import ConfigError

__all__ = ["divided_cross_entropy", "loss_parallel"]


@contextmanager
def loss_parallel() -> Iterator[None]:
    """While open, ``torch.nn.functional.cross_entropy`` computes with divided logits as they are, also in a model.

    Only forward has to be inside. Other logits are computed as ever. Without this context torch refuses divided logits
    beside a plain target.
    """
    with _Intercept():
        yield


def divided_cross_entropy(
    logits: DTensor,
    target: torch.Tensor,
    *,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> torch.Tensor:
    """The loss that ``cross_entropy`` has of the whole logits, on every rank. Every rank along tp must call this.

    Args:
        logits: (classes) or (rows, classes, ...), divided along classes over one mesh of one axis, alike otherwise.
        target: class numbers of shape () or (rows, ...), alike on all ranks.
        weight: of each class, (classes).
        ignore_index: target that counts as no row.
        reduction: as of ``cross_entropy``.

    Returns:
        A plain tensor. 16-bit logits are computed with in float32, and the result has their dtype.

    Raises:
        ConfigError: for logits that are divided otherwise, and class probabilities as target.
    """
    if not _is_divided(logits):
        raise ConfigError(
            f"The logits have placements {logits.placements}, and the divided loss needs them divided along classes, "
            f"over one axis. Pass what the output layer gives with `loss_parallel=True`, of shape (rows, classes)."
        )
    if target.is_floating_point():
        raise ConfigError(
            "The target holds class probabilities, and the divided loss knows class numbers only. Give class numbers, "
            "or leave `loss_parallel` out."
        )
    if reduction not in ("mean", "sum", "none"):
        raise ConfigError(f"`reduction={reduction!r}` is none. Use 'mean', 'sum' or 'none'.")
    target = target.full_tensor() if isinstance(target, DTensor) else target
    local = logits.to_local()
    if local.dim() > 1:
        local = local.movedim(1, -1)
    mesh = logits.device_mesh
    start = mesh.get_local_rank() * local.shape[-1]
    counted = target != ignore_index
    classes = target.masked_fill(~counted, 0)
    computing = local.float() if local.dtype.itemsize < 4 else local
    total = logits.shape[min(1, logits.dim() - 1)]
    losses = _DividedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        computing, classes, start, total, mesh.get_group()
    )
    shares = counted.to(losses.dtype) if weight is None else weight.to(losses.dtype)[classes] * counted
    losses = (losses * shares).masked_fill(~counted, 0)
    if reduction != "none":
        losses = losses.sum()
    if reduction == "mean":
        losses = losses / shares.sum()
    return losses.to(local.dtype)  # type: ignore[no-any-return]


def _is_divided(logits: object) -> bool:
    if not isinstance(logits, DTensor) or len(logits.placements) != 1 or logits.dim() == 0:
        return False
    return logits.placements[0].is_shard(min(1, logits.dim() - 1))


class _Intercept(TorchFunctionMode):
    """Sends the cross entropy of divided logits to ours, and everything else on its way."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy:
            given = dict(zip(("input", "target", "weight", "size_average", "ignore_index"), args, strict=False))
            given.update(kwargs)
            if _is_divided(given.get("input")):
                return _from_functional(**given)
        return func(*args, **kwargs)


def _from_functional(
    *,
    input: DTensor,  # noqa: A002 - the name that torch gives it
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    if size_average is not None or reduce is not None or label_smoothing != 0:
        given = {"size_average": size_average, "reduce": reduce, "label_smoothing": label_smoothing}
        shown = ", ".join(f"{key}={value}" for key, value in given.items() if value)
        raise ConfigError(
            f"`cross_entropy` was given {shown} with divided logits, which the divided loss has not. Leave that out "
            f"(`reduction` replaces the first two), or give `logits.full_tensor()`, which gathers them."
        )
    return divided_cross_entropy(input, target, weight=weight, ignore_index=ignore_index, reduction=reduction)


class _DividedCrossEntropy(torch.autograd.Function):
    """The loss of each row. Gradient: softmax minus one at the target, each rank its classes."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, start: int, total: int, group: dist.ProcessGroup
    ) -> torch.Tensor:
        # logits (..., classes of this rank), target (...)
        largest = logits.amax(-1)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        shifted = logits - largest.unsqueeze(-1)
        local = target - start
        elsewhere = ((local < 0) | (local >= logits.shape[-1])) & (target >= 0) & (target < total)
        local = local.masked_fill(elsewhere, 0)  # a target that is no class stays outside, and `gather` refuses it
        chosen = shifted.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0)
        exponentials = shifted.exp_()
        sums = torch.stack([exponentials.sum(-1), chosen])  # (2, ...)
        dist.all_reduce(sums, group=group)
        ctx.save_for_backward(exponentials.div_(sums[0].unsqueeze(-1)), local, elsewhere)
        return sums[0].log() - sums[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        probabilities, local, elsewhere = ctx.saved_tensors
        result = probabilities * gradient.unsqueeze(-1)
        result.scatter_add_(-1, local.unsqueeze(-1), -gradient.masked_fill(elsewhere, 0).unsqueeze(-1))
        return result, None, None, None, None
