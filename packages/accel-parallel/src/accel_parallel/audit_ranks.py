"""What ``prepare`` looks at on all ranks together: they must have built the same thing.

Ranks whose parameters differ in number or shape exchange gradients of different lengths: they hang, or mix up tensors.
One digest a rank is exchanged; details follow only where digests differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import torch
import xxhash
from torch import nn
from torch.optim import Optimizer

from accel_parallel.sharded import is_sharded
from accel_state.collectives import gather_object
from accel_state.errors import ConfigError
from accel_state.logging import get_logger
from accel_state.process import Process

__all__ = ["Entry", "audit_ranks", "audit_values", "differing_values", "first_difference"]

_logger = get_logger(__name__)

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Entry(NamedTuple):
    """One tensor of a model, or one optimizer, as another rank can compare it."""

    name: str
    described: str
    """What must be the same everywhere."""
    checksum: str | None = None
    """Of the values; ``None`` where there are none to compare."""
    is_sent: bool = True
    """Whether its model is trained, so that strategies see to its values."""


def audit_ranks(models: Sequence[nn.Module], optimizers: Sequence[Optimizer] = (), *, first: int = 0) -> None:
    """Every rank must call this. Refuse models and optimizers that are not the same on all ranks.

    Values that differ are no error, since strategies send those of rank 0, or fill them in; they are told of in a
    warning, since they mean that a seed was forgotten or a checkpoint was loaded on one rank only. Reading them takes
    about a second for 10 GB of parameters.

    Args:
        models: about to be prepared.
        optimizers: the same.
        first: number of the first of the models.

    Raises:
        ConfigError: on every rank, naming the first difference.
    """
    if not Process.is_open() or Process.current().topology.world_size == 1:
        return
    entries = [
        *chain.from_iterable(_entries(model, f"model number {first + i}") for i, model in enumerate(models)),
        *(_entry(optimizer, f"optimizer number {index} of the call") for index, optimizer in enumerate(optimizers)),
    ]
    digests = gather_object([_digest(entries)])
    if all(digest == digests[0] for digest in digests):
        return
    _warn(_refuse_differing(entries))


def audit_values(model: nn.Module) -> None:
    """Every rank must call this, with a model of which each keeps a part. Refuse one that has other values somewhere.

    Raises:
        ConfigError: on every rank, naming the first difference.
    """
    entries = _entries(model, "the model")
    digests = gather_object([_digest(entries)])
    if all(digest == digests[0] for digest in digests):
        return
    for entry, ranks in differing_values(_refuse_differing(entries)):
        raise ConfigError(
            f"{entry.name} has other values on rank(s) {', '.join(map(str, ranks))} than on rank 0, and each rank "
            f"keeps its own part, so what they make together is neither model. Load the same weights on every rank, or "
            f"seed them alike before building it, as by `set_seed`."
        )


def _refuse_differing(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Every rank must call this. The entries of all ranks, which describe the same tensors."""
    of_ranks: list[list[Entry]] = gather_object([tuple(entries)])
    problem = first_difference(of_ranks)
    if problem is not None:
        raise ConfigError(
            f"{problem}. Ranks exchange tensors in the order of their parameters, so they would hang or mix them up. "
            f"Build the same models and optimizers on every rank, whatever its number, and prepare them in one order."
        )
    return of_ranks


def first_difference(of_ranks: Sequence[Sequence[Entry]]) -> str | None:
    """What is the first thing that a rank has otherwise than rank 0, in words. Pure."""
    wanted = of_ranks[0]
    for rank, entries in enumerate(of_ranks[1:], start=1):
        for ours, theirs in zip(entries, wanted, strict=False):
            if ours.name != theirs.name:
                return f"Where rank 0 has {theirs.name}, rank {rank} has {ours.name}"
            if ours.described != theirs.described:
                return f"{ours.name} is {theirs.described} on rank 0 and {ours.described} on rank {rank}"
        if len(entries) != len(wanted):
            more, less = (rank, 0) if len(entries) > len(wanted) else (0, rank)
            extra = max(entries, wanted, key=len)[min(len(entries), len(wanted))]
            return f"Rank {more} has {extra.name}, and rank {less} has nothing there"
    return None


def differing_values(of_ranks: Sequence[Sequence[Entry]]) -> list[tuple[Entry, list[int]]]:
    """Tensors whose values differ from those of rank 0, with the ranks where they do. Pure."""
    found = []
    for index, wanted in enumerate(of_ranks[0]):
        others = [
            rank
            for rank, entries in enumerate(of_ranks)
            if entries[index].checksum != wanted.checksum and None not in (entries[index].checksum, wanted.checksum)
        ]
        if others:
            found.append((wanted, others))
    return found


def _warn(of_ranks: Sequence[Sequence[Entry]]) -> None:
    found = differing_values(of_ranks)
    for is_sent, outcome in (
        (True, "Those of rank 0 replace them where the strategy sends weights, as data parallel does"),
        (False, "Nothing sends them, since that model has nothing to train: each rank goes on with its own"),
    ):
        kept = [(entry, ranks) for entry, ranks in found if entry.is_sent is is_sent]
        if kept:
            names = ", ".join(entry.name for entry, _ in kept[:5])
            _logger.warning(
                "Values differ from those of rank 0 on rank(s) %s: %s%s. %s. Seed every rank alike before building the "
                "model, as by `set_seed`, or load the same weights on each.",
                ", ".join(map(str, sorted({rank for _, ranks in kept for rank in ranks}))),
                names,
                f" and {len(kept) - 5} more" if len(kept) > 5 else "",
                outcome,
            )


def _digest(entries: Iterable[Entry]) -> int:
    return xxhash.xxh3_64_intdigest(repr(tuple(map(tuple, entries))).encode())


def _entries(model: nn.Module, name: str) -> list[Entry]:
    is_sent = any(parameter.requires_grad for parameter in model.parameters())
    tensors: list[tuple[str, torch.Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    of_tensors = [
        Entry(
            name=f"`{key}` of {name}",
            described=f"a {'trained' if tensor.requires_grad else 'constant'} {tensor.dtype} of shape "
            f"{tuple(tensor.shape)}",
            checksum=checksum,
            is_sent=is_sent,
        )
        for (key, tensor), checksum in zip(tensors, _checksums([tensor for _, tensor in tensors]), strict=True)
    ]
    return [Entry(name, f"a {type(model).__name__}"), *of_tensors]


def _entry(optimizer: Optimizer, name: str) -> Entry:
    counts = [len(group["params"]) for group in optimizer.param_groups]
    return Entry(name, f"a {type(optimizer).__name__} of {counts} parameters in its groups")


def _checksums(tensors: Sequence[torch.Tensor]) -> list[str | None]:
    """Of each one's bits, by the device's own means; an accelerator is waited for once."""
    on_host: dict[int, str] = {}
    elsewhere: dict[torch.device, list[tuple[int, torch.Tensor]]] = {}
    for index, tensor in enumerate(tensors):
        if tensor.is_meta or is_sharded(tensor) or tensor.layout is not torch.strided or tensor.is_quantized:
            continue
        flat = tensor.detach().contiguous().reshape(-1)
        if tensor.device.type == "cpu":
            on_host[index] = f"cpu {xxhash.xxh3_64_hexdigest(flat.view(torch.uint8).numpy().data)}"
        elif tensor.element_size() in _INTEGERS:
            elsewhere.setdefault(tensor.device, []).append((index, _sum_of_bits(flat)))
    for device, totals in elsewhere.items():
        values = torch.stack([total for _, total in totals]).tolist()
        on_host |= {index: f"{device.type} {value}" for (index, _), value in zip(totals, values, strict=True)}
    return [on_host.get(index) for index in range(len(tensors))]


def _sum_of_bits(flat: torch.Tensor) -> torch.Tensor:
    """A scalar on its device that does not depend on the order of adding, as a sum of floats would."""
    return flat.view(_INTEGERS[flat.element_size()]).sum(dtype=torch.int64)
