"""Gathering for metrics: every sample exactly once, or an error (B7)."""

from __future__ import annotations

from typing import Any

import torch

from accel.loops import Loops
from accel_state.collectives import gather, gather_object, gather_ragged
from accel_state.errors import ConfigError
from accel_state.process import Process
from accel_state.protocols import BatchInfo
from accel_state.tree import map_tensors, tensor_leaves

__all__ = ["current_batch", "gather_for_metrics"]


def current_batch(loops: Loops) -> BatchInfo | None:
    """The batch that rows gathered now belong to; ``None`` outside every loop.

    Raises:
        ConfigError: if that cannot be told although some of those in question hold padding: loaders that are read in
            turns differ in it, or the loop is over.
    """
    infos = loops.infos
    if len(infos) == 1:
        return infos[0]
    if not infos:
        if loops.ended_padded:
            raise ConfigError(
                "`gather_for_metrics` was called after a loop whose last batch was padded, so which of the rows are "
                "padding is not known any more. Call it in the loop, batch by batch; or use `gather`, which keeps "
                "padding."
            )
        return None
    differ = any((each.rows, each.real_rows) != (infos[0].rows, infos[0].real_rows) for each in infos)
    if differ and any(each.may_pad or len(set(each.rows)) > 1 for each in infos):
        raise ConfigError(
            f"`gather_for_metrics` was called while {len(infos)} loaders are read in turns, whose batches have "
            f"{', '.join(str(each.num_real) for each in infos)} samples: which of them the rows belong to could not be "
            f"told. Read one loader in a loop of its own, or use `gather`, which keeps padding."
        )
    return infos[-1]


def gather_for_metrics(tree: Any, *, info: BatchInfo | None, process: Process, use_gather_object: bool = False) -> Any:
    """The rows of all ranks for the current batch, without padding, in the order of the data.

    Every rank must call this. Where ranks share samples, as along tp and cp, each sample's rows are those of the first.

    Args:
        tree: tensors of shape (rows of this rank's batch, ...), alone or nested. With `use_gather_object` a list
            with one entry a row.
        info: the batch that is being worked on; ``None`` outside a loop, where nothing is padding.
        process: the open process.
        use_gather_object: gather Python objects, which are pickled on the way between the processes.

    Raises:
        ConfigError: if the rows are not those of the batch although a batch of this epoch holds padding, so that
            the padding could not be told from the data.
    """
    rank = process.topology.data_rank
    if use_gather_object or not _holds_tensors(tree):
        return _gather_objects(tree, info, process, rank)
    if process.topology.data_world_size < process.topology.world_size:
        return _gather_once_a_sample(tree, info, process)
    if info is None:
        return gather(tree, process=process)
    if process.topology.world_size == 1 and not info.may_pad:
        return gather(tree, process=process)
    if not _fits(tree, info.rows[rank]):
        if info.may_pad:
            _refuse(tree, info.rows[rank])
        return gather(tree, process=process)
    if info.rows.count(info.rows[0]) == len(info.rows):
        gathered = gather(tree, process=process)
    else:
        gathered = gather_ragged(tree, info.rows, process=process)
    if info.real_rows == info.rows:
        return gathered
    keep = _real_indices(info)
    return map_tensors(gathered, lambda tensor: tensor[keep.to(tensor.device)])


def _gather_once_a_sample(tree: Any, info: BatchInfo | None, process: Process) -> Any:
    """Where several ranks see the same samples, the rows of one of them, without padding."""
    topology = process.topology
    if info is None or not _fits(tree, info.rows[topology.data_rank]):
        if info is not None and info.may_pad:
            _refuse(tree, info.rows[topology.data_rank])
        gathered = gather(tree, process=process)
        rows = None
    else:
        rows = [info.rows[topology.at(rank).data_rank] for rank in range(topology.world_size)]
        gathered = gather_ragged(tree, rows, process=process)

    def picked(tensor: torch.Tensor) -> torch.Tensor:
        sizes = rows or [tensor.shape[0] // topology.world_size] * topology.world_size
        parts = torch.split(tensor, sizes)
        kept = [parts[rank] for rank in topology.at(0).data_peers]
        if rows is not None and info is not None:
            kept = [part[:real] for part, real in zip(kept, info.real_rows, strict=True)]
        return torch.cat(kept)

    return map_tensors(gathered, picked)


def _holds_tensors(tree: Any) -> bool:
    return isinstance(tree, torch.Tensor) or bool(tensor_leaves(tree))


def _fits(tree: Any, rows: int) -> bool:
    if isinstance(tree, torch.Tensor):
        return tree.dim() > 0 and tree.shape[0] == rows
    return all(tensor.dim() > 0 and tensor.shape[0] == rows for tensor in tensor_leaves(tree))


def _real_indices(info: BatchInfo) -> torch.Tensor:
    """Positions of the real rows in the rows of all ranks, one after the other."""
    starts = [sum(info.rows[:rank]) for rank in range(len(info.rows))]
    return torch.cat([torch.arange(start, start + real) for start, real in zip(starts, info.real_rows, strict=True)])


def _gather_objects(tree: Any, info: BatchInfo | None, process: Process, rank: int) -> list[Any]:
    if not isinstance(tree, (list, tuple)):
        raise ConfigError(
            f"`gather_for_metrics` was given a {type(tree).__name__}, which has no rows to count. "
            f"Give tensors, or a list with one entry a sample."
        )
    entries = list(tree)
    if info is not None and info.may_pad:
        if len(entries) != info.rows[rank]:
            raise ConfigError(_mismatch(f"a list of {len(entries)} entries", info.rows[rank]))
        entries = entries[: info.real_rows[rank]]
    topology = process.topology
    if topology.data_world_size == topology.world_size:
        return gather_object(entries, process=process)
    of_ranks: list[list[Any]] = gather_object([entries], process=process)
    return [entry for peer in topology.at(0).data_peers for entry in of_ranks[peer]]


def _refuse(tree: Any, rows: int) -> None:
    shapes = [tuple(tensor.shape) for tensor in tensor_leaves(tree)]
    raise ConfigError(_mismatch(f"tensors of shape {', '.join(map(str, shapes))}", rows))


def _mismatch(given: str, rows: int) -> str:
    return (
        f"`gather_for_metrics` was given {given}, but this rank's batch has {rows} rows, and the last batch of this "
        "epoch "
        f"is padded: which entries are padding could not be told. Give one row a sample (for a mean loss, the losses "
        "of "
        f"the samples), or use `gather`, which keeps the padding."
    )
