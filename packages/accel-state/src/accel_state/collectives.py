"""Collectives over nested structures. Every rank must call each of these, in the same order.

In a world of one process, and where no `Process` is open, each gives back what it was given. Nothing is exchanged
that was not asked for: shapes are compared beforehand only under ``check_collectives``, so without that check
shapes that differ between ranks are undefined in `gather`, `reduce` and `broadcast` (an error of the backend, or
wrong rows). Where they may differ, call `pad_across_processes` first, or `gather_ragged` if the sizes are known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar, get_args

import torch
import torch.distributed as dist

from accel_state.config import did_you_mean
from accel_state.errors import CollectiveError, ConfigError
from accel_state.process import Process
from accel_state.tree import map_tensors, tensor_leaves, tree_signature

__all__ = [
    "Reduction",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "gather_ragged",
    "pad_across_processes",
    "reduce",
]

Reduction = Literal["mean", "sum", "max", "min", "none"]

T = TypeVar("T")

# torch 2.13 renamed it; the old name warns there.
_all_gather: Callable[[torch.Tensor, torch.Tensor], Any] = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)

# What gloo and nccl both carry. Anything else travels as bytes.
_CARRIED = frozenset(
    {
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.int8,
        torch.uint8,
        torch.int32,
        torch.int64,
        torch.bool,
    }
)


def gather(tree: Any, *, process: Process | None = None) -> Any:
    """Every rank must call this. Tensors of all ranks, joined along dimension 0 in order of rank, on every rank.

    A tensor without a dimension counts as one row. Shapes must agree over ranks: see the module's first lines.
    One collective a tensor and nothing else. Gradients do not flow through it.

    Args:
        tree: tensors on the device of the process, or containers of them.
        process: the world; by default the open one.

    Raises:
        ConfigError: if a leaf is not a tensor.
        CollectiveError: on every rank, under ``check_collectives``, if structures, shapes or dtypes differ.
    """
    peers = _peers(process)
    if peers is None:
        return tree
    if peers.settings.check_collectives:
        _check("gather", tree_signature(tree), peers)
    world_size = peers.topology.world_size
    if isinstance(tree, torch.Tensor):
        return _gather_rows(tree, world_size)
    return map_tensors(tree, lambda tensor: _gather_rows(tensor, world_size), on_other=_refuse("gather"))


def gather_ragged(tree: Any, rows: Sequence[int], *, process: Process | None = None) -> Any:
    """Every rank must call this. Like `gather` for different numbers of rows that everybody knows beforehand.

    One collective a tensor, padded to the longest; the padding does not come back.

    Args:
        tree: tensors whose dimension 0 has ``rows[rank]`` entries, or containers of them.
        rows: rows of each rank, in order of rank; the same on every rank.
        process: the world; by default the open one.

    Raises:
        ConfigError: if a leaf is not a tensor, or `rows` contradicts the world or a tensor's shape.
    """
    peers = _peers(process)
    rank, world_size = (0, 1) if peers is None else (peers.topology.rank, peers.topology.world_size)
    if len(rows) != world_size or min(rows) < 0:
        raise ConfigError(
            f"`rows={list(rows)}` does not say how many rows each of {world_size} process(es) has. "
            f"Give one number, not negative, for each rank."
        )
    if peers is not None and peers.settings.check_collectives:
        _check("gather_ragged", {**tree_signature(tree, free_dim=0), "rows": str(list(rows))}, peers)

    def gathered(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != rows[rank]:
            raise ConfigError(
                f"A tensor of shape {list(tensor.shape)} was given on rank {rank}, but `rows` says that it has "
                f"{rows[rank]} rows. Slice the tensor to that, or correct `rows`, which all ranks must give alike."
            )
        return tensor if peers is None else _gather_uneven(tensor, rows)

    if isinstance(tree, torch.Tensor):
        return gathered(tree)
    return map_tensors(tree, gathered, on_other=_refuse("gather_ragged"))


def gather_object(obj: Any, *, process: Process | None = None) -> list[Any]:
    """Every rank must call this. What each rank gave, in order of rank, on every rank.

    Where every rank gives a list or a tuple, their entries come back in one flat list: ``gather_object([x])`` has
    one entry a rank. Anything else comes back as it is, one entry a rank. Objects travel pickled, so only use it
    among processes that trust each other.
    """
    peers = _peers(process)
    if peers is None:
        found = [obj]
    else:
        if peers.settings.check_collectives:
            _check("gather_object", {}, peers)
        found = [None] * peers.topology.world_size
        dist.all_gather_object(found, obj)
    if all(isinstance(each, (list, tuple)) for each in found):
        return [entry for each in found for entry in each]
    return found


def reduce(tree: Any, reduction: Reduction = "mean", scale: float = 1.0, *, process: Process | None = None) -> Any:
    """Every rank must call this. Tensors combined elementwise over all ranks, then multiplied by `scale`.

    What is given is not changed. The dtype of the result does not depend on the world: a mean of integers is float32,
    sums of bool and of integers narrower than 32 bits are int64, anything of 8-bit floats is float32.

    Args:
        tree: tensors of the same shapes on every rank, or containers of them.
        reduction: how to combine; ``"none"`` exchanges nothing and only scales.
        scale: factor of the result.
        process: the world; by default the open one.

    Raises:
        ConfigError: if `reduction` is unknown, or a leaf is not a tensor.
        CollectiveError: on every rank, under ``check_collectives``, if structures, shapes or dtypes differ.
    """
    if reduction not in get_args(Reduction):
        known = list(get_args(Reduction))
        raise ConfigError(
            f"`reduction={reduction!r}` is no way to combine tensors.{did_you_mean(str(reduction), known)} "
            f"Use one of {', '.join(known)}."
        )
    peers = _peers(process)
    if peers is not None and peers.settings.check_collectives:
        _check(f"reduce({reduction!r})", tree_signature(tree), peers)
    world_size = 1 if peers is None else peers.topology.world_size
    return map_tensors(
        tree, lambda tensor: _reduce_tensor(tensor, reduction, scale, world_size), on_other=_refuse("reduce")
    )


def broadcast(tree: Any, from_process: int = 0, *, process: Process | None = None) -> Any:
    """Every rank must call this. The tensors of rank `from_process`, on every rank.

    The other ranks give tensors of the same shapes and dtypes, which are not changed.

    Raises:
        ConfigError: if there is no such rank, or a leaf is not a tensor.
        CollectiveError: on every rank, under ``check_collectives``, if structures, shapes or dtypes differ.
    """
    peers = _peers(process)
    _check_source(from_process, peers)
    if peers is None:
        return tree
    if peers.settings.check_collectives:
        _check(f"broadcast({from_process})", tree_signature(tree), peers)
    rank = peers.topology.rank
    return map_tensors(
        tree, lambda tensor: _broadcast_tensor(tensor, from_process, rank), on_other=_refuse("broadcast")
    )


def broadcast_object_list(objects: list[T], from_process: int = 0, *, process: Process | None = None) -> list[T]:
    """Every rank must call this. Replaces the entries of `objects` by those of rank `from_process`; returns it.

    The lists must be of one length. Objects travel pickled, as in `gather_object`.

    Raises:
        ConfigError: if there is no such rank.
        CollectiveError: on every rank, under ``check_collectives``, if the lengths differ.
    """
    peers = _peers(process)
    _check_source(from_process, peers)
    if peers is None:
        return objects
    if peers.settings.check_collectives:
        _check(f"broadcast_object_list({from_process})", {"": f"list[{len(objects)}]"}, peers)
    dist.broadcast_object_list(objects, src=from_process)
    return objects


def pad_across_processes(
    tree: Any, dim: int = 0, pad_index: float = 0, pad_first: bool = False, *, process: Process | None = None
) -> Any:
    """Every rank must call this. Tensors made as long along `dim` as the longest of any rank.

    One small collective for the whole tree. Tensors without such a dimension, and leaves that are no tensors, stay.

    Args:
        tree: a tensor, or containers of tensors and other leaves.
        dim: dimension in which sizes may differ.
        pad_index: what to fill with.
        pad_first: whether to fill before the content rather than after it.
        process: the world; by default the open one.

    Raises:
        CollectiveError: on every rank, under ``check_collectives``, if anything but the sizes of `dim` differs.
    """
    peers = _peers(process)
    if peers is None:
        return tree
    if peers.settings.check_collectives:
        _check("pad_across_processes", tree_signature(tree, free_dim=dim), peers)
    ragged = [leaf for leaf in tensor_leaves(tree) if -leaf.dim() <= dim < leaf.dim()]
    if not ragged:
        return tree
    sizes = torch.tensor([leaf.shape[dim] for leaf in ragged], device=peers.device)
    dist.all_reduce(sizes, op=dist.ReduceOp.MAX)
    longest = iter(sizes.tolist())

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        if not -tensor.dim() <= dim < tensor.dim():
            return tensor
        missing = next(longest) - tensor.shape[dim]
        if missing == 0:
            return tensor
        shape = list(tensor.shape)
        shape[dim] = missing
        filling = tensor.new_full(shape, pad_index)
        return torch.cat([filling, tensor] if pad_first else [tensor, filling], dim=dim)

    return map_tensors(tree, padded)


def _peers(process: Process | None) -> Process | None:
    """The process if it has peers to talk to, else ``None``."""
    if process is None:
        if not Process.is_open():
            return None
        process = Process.current()
    elif process.is_closed:
        raise ConfigError(
            f"{process!r} was closed, so its peers cannot be reached any more. "
            f"Call collectives before `close()` or `end_training()`."
        )
    return process if process.topology.world_size > 1 else None


def _gather_rows(tensor: torch.Tensor, world_size: int) -> torch.Tensor:
    """(n, ...) on each rank → (world_size * n, ...)."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dim() == 0:
        tensor = tensor.reshape(1)
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    shape = tensor.shape
    output = tensor.new_empty((world_size * shape[0], *shape[1:]))
    if tensor.dtype in _CARRIED:
        _all_gather(output, tensor)
    else:
        _all_gather(output.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
    return output


def _gather_uneven(tensor: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    longest, total = max(rows), sum(rows)
    if longest == 0:
        return tensor
    if tensor.shape[0] < longest:
        # Filled with zeros, since other memory may hold what must not travel.
        filling = tensor.new_zeros((longest - tensor.shape[0], *tensor.shape[1:]))
        tensor = torch.cat([tensor.detach(), filling])
    gathered = _gather_rows(tensor, len(rows))
    if total == longest * len(rows):
        return gathered
    if all(count == longest for count in rows[:-1]):
        return gathered[:total]
    return torch.cat([gathered[rank * longest : rank * longest + count] for rank, count in enumerate(rows)])


def _reduce_tensor(tensor: torch.Tensor, reduction: Reduction, scale: float, world_size: int) -> torch.Tensor:
    given = tensor.detach() if world_size > 1 else tensor
    as_bool = tensor.dtype == torch.bool and reduction in ("max", "min")
    result = given
    if reduction != "none":
        result = _summable(given, reduction)
        if world_size > 1:
            # Backends work in place and want contiguous memory; what was given stays as it is.
            result = result.clone(memory_format=torch.contiguous_format) if result is given else result.contiguous()
            operation = {"max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}.get(reduction, dist.ReduceOp.SUM)
            dist.all_reduce(result, op=operation)
        if reduction == "mean" and world_size > 1:
            result = result / world_size
        if as_bool:
            result = result.to(torch.bool)
    return result if scale == 1.0 else result * scale


def _summable(tensor: torch.Tensor, reduction: Reduction) -> torch.Tensor:
    """`tensor` in a dtype that backends reduce and that holds the result."""
    dtype = tensor.dtype
    if dtype.is_complex:
        return tensor
    if dtype.is_floating_point:
        return tensor if dtype in _CARRIED else tensor.float()
    if reduction == "mean":
        return tensor.float()
    if dtype == torch.bool and reduction in ("max", "min"):
        return tensor.to(torch.uint8)
    return tensor if dtype in (torch.int32, torch.int64) else tensor.long()


def _broadcast_tensor(tensor: torch.Tensor, from_process: int, rank: int) -> torch.Tensor:
    if tensor.requires_grad:
        tensor = tensor.detach()
    sent = (
        tensor.contiguous() if rank == from_process else torch.empty_like(tensor, memory_format=torch.contiguous_format)
    )
    dist.broadcast(sent if sent.dtype in _CARRIED else sent.view(-1).view(torch.uint8), src=from_process)
    return sent


def _check_source(from_process: int, peers: Process | None) -> None:
    world_size = 1 if peers is None else peers.topology.world_size
    if not 0 <= from_process < world_size:
        raise ConfigError(
            f"`from_process={from_process}` is no rank of a world of {world_size} process(es). "
            f"Give a number from 0 to {world_size - 1}."
        )


def _refuse(operation: str) -> Callable[[Any, str], Any]:
    def refuse(leaf: Any, path: str) -> Any:
        where = f" at {path}" if path else ""
        remedy = "broadcast_object_list" if operation == "broadcast" else "gather_object"
        raise ConfigError(
            f"`{operation}` was given a {type(leaf).__name__}{where}, and it exchanges tensors only. "
            f"Use `{remedy}` for other objects, or make it a tensor."
        )

    return refuse


def _check(operation: str, signature: dict[str, str], peers: Process) -> None:
    """Compare the calls of all ranks; if any differs, every rank raises."""
    calls: list[Any] = [None] * peers.topology.world_size
    dist.all_gather_object(calls, (operation, signature))
    if all(call == calls[0] for call in calls):
        return
    groups: dict[str, list[int]] = {}
    same = _agreed(calls)
    for rank, (name, described) in enumerate(calls):
        differing = [f"{path or 'tree'}: {text}" for path, text in described.items() if (path, text) not in same]
        groups.setdefault(f"{name} with {', '.join(differing) or 'the same tree'}", []).append(rank)
    told = "\n".join(f"  rank {_ranks(ranks)}: {text}" for text, ranks in groups.items())
    raise CollectiveError(
        f"The ranks do not fit together in `{operation}`:\n{told}\nA collective needs the same call, structure, shapes "
        f"and dtypes on every rank. Use `pad_across_processes` or `gather_ragged` where only sizes differ."
    )


def _agreed(calls: list[tuple[str, dict[str, str]]]) -> set[tuple[str, str]]:
    """The entries that all ranks share."""
    return set.intersection(*(set(signature.items()) for _, signature in calls))


def _ranks(ranks: list[int]) -> str:
    """``[0, 1, 2, 5]`` → ``"0-2, 5"``."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and parts[-1][-1] == rank - 1:
            parts[-1][-1:] = [parts[-1][0], rank] if len(parts[-1]) == 1 else [rank]
        else:
            parts.append([rank])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
