"""Carrying a plan out: memory first, then values, and the model changes hands last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn

from accel_bigmodel.loading.converted import ConvertedFile, converted_name
from accel_bigmodel.loading.delivery import Delivery
from accel_bigmodel.loading.extra import PlannedExtra
from accel_bigmodel.loading.memory import allocate, like
from accel_bigmodel.loading.model_tensor import put
from accel_bigmodel.loading.place import DISK, Place
from accel_bigmodel.loading.plan import LoadOptions, LoadPlan, PlannedTensor
from accel_bigmodel.loading.result import LoadedCheckpoint
from accel_bigmodel.stored import StoredTensor, read_file_header
from accel_state.errors import CheckpointError, ConfigError
from accel_state.tensor_format import TensorShape

__all__ = ["Prepared", "carry_out", "install", "make_room"]

Reader: TypeAlias = Callable[[Sequence[Delivery]], int]
"""Reads everything, and returns how many bytes this process read."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Tensors of the model, and the memory that is to become theirs."""

    memory: list[tuple[PlannedTensor, torch.Tensor]]
    """To be filled."""
    mapped: list[tuple[PlannedTensor, torch.Tensor]]
    """Whose memory is a file, and has its values."""
    extra: list[tuple[PlannedExtra, torch.Tensor]]
    """Likewise to be filled, for modules to take."""

    def deliveries(self) -> list[Delivery]:
        """What fills it."""
        found = [delivery for each, memory in self.memory for delivery in each.deliveries(memory)]
        return found + [each.delivery(memory) for each, memory in self.extra]


def make_room(model: nn.Module, plan: LoadPlan, *, mmap: bool = False, large_pages: bool = False) -> Prepared:
    """Memory for all that goes to a device. Values that would be overwritten elsewhere are let go of before.

    Raises:
        ConfigError: if there is not enough, or `mmap` is wanted and nothing can be mapped.
    """
    mapped = [(each, memory) for each in plan.in_memory if mmap and (memory := each.mapped()) is not None]
    if mmap and not mapped and plan.in_memory:
        raise ConfigError(
            f"`mmap=True` gives tensors the file as their memory, and none of the {len(plan.in_memory)} that are "
            f"loaded can have it: they go to an accelerator, to another dtype than is stored, or have memory already. "
            f"Leave it out; for another dtype, give `dtype='auto'`."
        )
    done = {each.of.name for each, _ in mapped}
    new = [each for each in plan.in_memory if not each.stays and each.of.name not in done]
    for each in [*new, *(each for each, _ in mapped)]:
        _let_go(model, each)
    wanted: list[tuple[str, tuple[int, ...], torch.dtype, torch.device]] = []
    for each in new:
        assert isinstance(each.place, torch.device)
        wanted.append((each.of.name, tuple(each.of.tensor.shape), each.dtype, each.place))
    return Prepared(
        [(each, each.of.tensor) for each in plan.in_memory if each.stays]
        + list(zip(new, allocate(wanted, large_pages=large_pages), strict=True)),
        mapped,
        [(each, each.room()) for each in plan.extra],
    )


def _let_go(model: nn.Module, each: PlannedTensor) -> None:
    old = each.of.tensor
    if old.device.type != "meta":
        each.of.tensor = like(old, torch.empty_like(old, device="meta"))
        put(model, each.of.names, each.of.tensor)


def carry_out(model: nn.Module, plan: LoadPlan, options: LoadOptions, read: Reader) -> LoadedCheckpoint:
    """Load what is planned, and say what was done.

    Raises:
        ConfigError: if a device has no room.
        CheckpointError: if a file was cut short, or the disk is full.
        OSError: if a file cannot be read or written.
    """
    stored, pending = _on_disk(plan, options)
    with ExitStack() as stack:
        file = None if pending is None else stack.enter_context(pending.open())
        prepared = make_room(model, plan, mmap=options.mmap, large_pages=options.reading.large_pages)
        deliveries = prepared.deliveries()
        if pending is not None and file is not None:
            deliveries += pending.deliveries(file)
        bytes_read = read(deliveries)
        written = 0
        if pending is not None and file is not None:
            stored.update(pending.named(file.commit()))
            written = sum(each.nbytes for each in stored.values() if each.path == file.path)
    return install(model, plan, prepared, stored, bytes_read=bytes_read, bytes_written=written)


def install(
    model: nn.Module,
    plan: LoadPlan,
    prepared: Prepared,
    stored: dict[str, StoredTensor],
    *,
    bytes_read: int,
    bytes_written: int,
) -> LoadedCheckpoint:
    """Give the model what was loaded. Whatever a module raises at its extra state goes on to the caller."""
    for each, memory in [*prepared.memory, *prepared.mapped]:
        if not each.stays:
            put(model, each.of.names, like(each.of.tensor, memory))
    sizes: Counter[Place] = Counter()
    places: dict[str, Place] = {}
    index: dict[str, StoredTensor] = {}
    for each in plan.tensors:
        sizes[each.place] += each.of.tensor.numel() * each.dtype.itemsize
        places.update(dict.fromkeys(each.of.names, each.place))
        if each.place == DISK:
            old = each.of.tensor
            put(model, each.of.names, like(old, torch.empty(old.shape, dtype=each.dtype, device="meta")))
            index.update(dict.fromkeys(each.of.names, stored[each.of.name]))
    for extra, state in prepared.extra:  # last, as torch does: modules may look where their tensors are
        extra.give(state)
    return LoadedCheckpoint(
        places=places,
        bytes_by_place=dict(sizes),
        stored=index,
        missing=plan.match.missing,
        unexpected=plan.match.unexpected,
        bytes_read=bytes_read,
        bytes_written=bytes_written,
    )


@dataclass(frozen=True, slots=True)
class _Pending:
    """Tensors that a file is to be written of."""

    path: Path
    tensors: Sequence[PlannedTensor]

    def open(self) -> ConvertedFile:
        """The file, not written yet."""
        return ConvertedFile(self.path, _shapes(self.tensors))

    def deliveries(self, file: ConvertedFile) -> list[Delivery]:
        """What fills it."""
        return [delivery for each in self.tensors for delivery in each.deliveries(file.tensors[each.of.name])]

    def named(self, found: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
        """Its tensors as they are found in it."""
        return {each.of.name: found[each.of.name] for each in self.tensors}


def _on_disk(plan: LoadPlan, options: LoadOptions) -> tuple[dict[str, StoredTensor], _Pending | None]:
    """Those that are found as they are needed, and what has to be written."""
    found = {each.of.name: stored for each in plan.on_disk if (stored := each.stored) is not None}
    others = [each for each in plan.on_disk if each.of.name not in found]
    if not others:
        return found, None
    assert options.offload_folder is not None, "was checked with the plan"
    shapes = _shapes(others)
    sources = {each.of.name: [source for source, _ in each.parts] for each in others}
    path = options.offload_folder / converted_name({name: (shapes[name], sources[name]) for name in shapes})
    pending = _Pending(path, others)
    if path.is_file():
        try:
            return {**found, **pending.named(read_file_header(path))}, None  # an earlier load wrote just this
        except CheckpointError:
            path.unlink(missing_ok=True)  # ours, and damaged since: it is made anew
    return found, pending


def _shapes(tensors: Sequence[PlannedTensor]) -> dict[str, TensorShape]:
    return {each.of.name: TensorShape(tuple(each.of.tensor.shape), each.dtype) for each in tensors}
