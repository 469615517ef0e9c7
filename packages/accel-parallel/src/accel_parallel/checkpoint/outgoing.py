"""The files that a save consists of, as this rank writes its share of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from accel_parallel.checkpoint.codec import Leaf
from accel_parallel.checkpoint.exchange import Exchange
from accel_parallel.checkpoint.item import FlatItem, Item, flatten
from accel_parallel.checkpoint.manifest import ItemRecord
from accel_parallel.checkpoint.plan import PlannedFile, index_name, plan_files
from accel_parallel.checkpoint.tensor_file import StoredTensor
from accel_parallel.sharded import is_divided
from accel_state.collectives import broadcast_object_list
from accel_state.errors import CheckpointError
from accel_state.process import Process
from accel_state.tensor_format import TensorShape, bytes_of, file_header, order_in_file

__all__ = ["Outgoing", "OutgoingFile", "Share"]


@dataclass(frozen=True, slots=True)
class OutgoingFile:
    """A file that this rank writes."""

    name: str
    head: bytes
    """What it begins with: a header, or all of a file without tensors."""
    tensors: tuple[torch.Tensor | StoredTensor, ...] = ()
    """What follows, in that order."""

    def chunks(self) -> Iterator[bytes | memoryview]:
        """Its bytes. Tensors of a device come to the host one at a time, and those of files into memory."""
        yield self.head
        for tensor in self.tensors:
            yield bytes_of(on_host(tensor))

    @property
    def nbytes(self) -> int:
        """Of all of it."""
        return len(self.head) + sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank writes."""

    records: dict[str, ItemRecord]
    """What the manifest says of the items that it describes."""
    nbytes: int
    """Of all its files."""
    num_parts: int
    """Heads and tensors in them."""
    files: Iterator[OutgoingFile]
    """To be run through once, by every rank in step, since divided tensors are exchanged on the way."""


def on_host(tensor: torch.Tensor | StoredTensor) -> torch.Tensor:
    """The values on the CPU, contiguous; a copy only where that is needed."""
    found = tensor.view() if isinstance(tensor, StoredTensor) else tensor
    return found.resolve_conj().resolve_neg().cpu().contiguous()


class Outgoing:
    """Everything that one rank contributes to a checkpoint."""

    def __init__(self, items: Sequence[Item], *, spread: bool = True) -> None:
        """
        Args:
            items: this rank's. Shared ones are the same on every rank, in the same order.
            spread: whether divided tensors are dealt out to all ranks; the main process writes them otherwise.

        Raises:
            CheckpointError: for a value that cannot be stored, or two items of one name.
        """
        self._spread = spread
        self._items: list[FlatItem] = []
        for item in items:
            if any(item.name == each.item.name for each in self._items):
                raise CheckpointError(f"Two items are called `{item.name}`. Give each item a name of its own.")
            self._items.append(flatten(item))

    def alone(self) -> Share:
        """As `share`, of one process that has no peers and no open `Process`. Items must not be shared."""
        plans = {each.item.name: _plan(each, [0]) for each in self._items}
        return self._share(0, [], self._items, plans, None)

    def share(self, process: Process) -> Share:
        """Every rank must call this, and run through the files. Of a shared item the main process has the record."""
        rank, world = process.topology.rank, process.topology.world_size
        shared = [each for each in self._items if each.item.shared]
        if world > 1 and shared:
            # A rank that holds nothing of two tensors cannot see that they are one.
            told = broadcast_object_list([[each.aliases for each in shared]], process=process)[0]
            shared = [_with_aliases(each, aliases) for each, aliases in zip(shared, told, strict=True)]
        writers = list(range(world)) if self._spread else [0]
        plans = {each.item.name: _plan(each, [0], writers) for each in shared}
        own = [each for each in self._items if not each.item.shared]
        plans.update({each.item.name: _plan(each, [rank]) for each in own})
        return self._share(rank, shared, own, plans, process)

    def _share(
        self,
        rank: int,
        shared: Sequence[FlatItem],
        own: Sequence[FlatItem],
        plans: Mapping[str, Sequence[PlannedFile]],
        process: Process | None,
    ) -> Share:
        described = [*(shared if rank == 0 else []), *own]
        texts = [file for each in described for file in _texts(each, plans[each.item.name])]
        sizes = [len(file.head) for file in texts]
        for each in [*shared, *own]:
            shapes = each.shapes
            for file in plans[each.item.name]:
                if file.writer == rank:
                    sizes.append(len(file_header({name: shapes[name] for name in file.tensors})))
                    sizes += [shapes[name].nbytes for name in file.tensors]
        files = self._run(texts, shared, own, plans, process)
        return Share(_records(described, plans), sum(sizes), len(sizes), files)

    def _run(
        self,
        texts: Sequence[OutgoingFile],
        shared: Sequence[FlatItem],
        own: Sequence[FlatItem],
        plans: Mapping[str, Sequence[PlannedFile]],
        process: Process | None,
    ) -> Iterator[OutgoingFile]:
        yield from texts
        for each in own:
            for file in plans[each.item.name]:
                yield _outgoing(file, each.shapes, {name: _detached(each.tensors[name]) for name in file.tensors})
        for each in shared:
            assert process is not None
            yield from _shared_files(each, plans[each.item.name], process)


def _shared_files(each: FlatItem, plan: Sequence[PlannedFile], process: Process) -> Iterator[OutgoingFile]:
    exchange = Exchange(each.tensors, process=process)
    names = [name for file in plan for name in file.tensors]
    arriving = exchange.whole(names, [file.writer for file in plan for _ in file.tensors])
    for file in plan:
        # In this order `zip` takes nothing of the next file.
        found = {name: tensor for name, (_, tensor) in zip(file.tensors, arriving, strict=False)}
        if file.writer == process.topology.rank:
            yield _outgoing(file, each.shapes, {name: tensor for name, tensor in found.items() if tensor is not None})


def _with_aliases(each: FlatItem, aliases: Mapping[str, str]) -> FlatItem:
    """The same item with the aliases that the main process found."""
    if each.aliases == aliases:
        return each
    back = {name: each.tensors[other] for name, other in each.aliases.items()}
    tensors: dict[str, Leaf] = {**each.tensors, **back}
    kept = {name: leaf for name, leaf in tensors.items() if name not in aliases}
    return FlatItem(each.item, each.json, kept, dict(aliases))


def _plan(each: FlatItem, writers: Sequence[int], of_divided: Sequence[int] = ()) -> list[PlannedFile]:
    """Whole tensors are those of one rank: copies of others may differ, such as running means of a batch norm."""
    whole: dict[str, int] = {}
    divided: dict[str, int] = {}
    for name, found in sorted(each.shapes.items()):
        (divided if is_divided(each.tensors[name]) else whole)[name] = found.nbytes
    return plan_files(each.item.name, [(whole, writers), (divided, of_divided)])


def _records(described: Sequence[FlatItem], plans: Mapping[str, Sequence[PlannedFile]]) -> dict[str, ItemRecord]:
    found = {}
    for each in described:
        plan = plans[each.item.name]
        names = sorted([file.name for file in _texts(each, plan)] + [file.name for file in plan])
        found[each.item.name] = ItemRecord(each.item.kind, tuple(names), each.aliases, each.item.of)
    return found


def _texts(each: FlatItem, plan: Sequence[PlannedFile]) -> list[OutgoingFile]:
    found = []
    if each.json is not None:
        found.append(OutgoingFile(f"{each.item.name}.json", each.json))
    if len(plan) > 1:
        total = sum(shape.nbytes for shape in each.shapes.values())
        where = {name: file.name for file in plan for name in file.tensors}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        found.append(OutgoingFile(index_name(each.item.name), json.dumps(index, indent=1).encode()))
    return found


def _outgoing(
    file: PlannedFile, shapes: Mapping[str, TensorShape], tensors: Mapping[str, torch.Tensor | StoredTensor]
) -> OutgoingFile:
    held = {name: shapes[name] for name in file.tensors}
    return OutgoingFile(file.name, file_header(held), tuple(tensors[name] for name in order_in_file(held)))


def _detached(leaf: Leaf) -> torch.Tensor | StoredTensor:
    assert isinstance(leaf, (torch.Tensor, StoredTensor))
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf
