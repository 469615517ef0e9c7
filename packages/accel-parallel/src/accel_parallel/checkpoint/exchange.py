"""Divided tensors put together, each on the one rank that writes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from accel_parallel.box import Box
from accel_parallel.checkpoint.tensor_file import StoredTensor
from accel_parallel.flat import FlatPart
from accel_parallel.sharded import is_divided, owned_pieces
from accel_state.collectives import gather_object
from accel_state.errors import CheckpointError
from accel_state.process import Process
from accel_state.tensor_format import TensorShape, as_bytes

__all__ = ["EXCHANGE_BYTES", "Exchange"]

EXCHANGE_BYTES = 1 << 28
"""What all ranks together send in one exchange, unless one tensor is larger: buffers of it are on the device."""

Tensors = Mapping[str, "torch.Tensor | FlatPart | StoredTensor"]


class Exchange:
    """Sends the parts of divided tensors to the ranks that write them. Every rank calls the same, in the same order."""

    def __init__(self, tensors: Tensors, *, process: Process) -> None:
        """
        Args:
            tensors: by name, with the same names and whole shapes on every rank; each a divided one on all or on none.
            process: the open process.

        Raises:
            CheckpointError: on every rank, where parts of a tensor are missing.
        """
        self.process = process
        self.tensors = tensors
        self.divided = {name: tensor for name, tensor in tensors.items() if is_divided(tensor)}
        own = {name: [box for box, _ in owned_pieces(self.divided[name])] for name in sorted(self.divided)}
        self._boxes = _without_copies(gather_object([own], process=process) if own else [])
        """For each rank, which parts of which tensor it sends."""
        for name in own:
            sent = sum(box.numel for boxes in self._boxes for box in boxes[name])
            if sent < self._shape(name).numel:
                raise CheckpointError(
                    f"The ranks hold {sent} of the {self._shape(name).numel} elements of `{name}` together, so it "
                    f"cannot be saved. Divide it over all of its ranks."
                )

    def whole(self, names: Sequence[str], writers: Sequence[int]) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Every rank must run through this. Each tensor in that order, on its writer; ``None`` on the others.

        Args:
            names: of the tensors wanted.
            writers: the rank that gets each of them.

        Yields:
            Detached tensors. A divided one is on the CPU in memory of its own, others are as they were given.
        """
        chunk: list[tuple[str, int]] = []
        filled = 0
        for name, writer in zip(names, writers, strict=True):
            size = self._shape(name).nbytes if name in self.divided else 0
            if chunk and filled + size > EXCHANGE_BYTES:
                yield from self._run(chunk)
                chunk, filled = [], 0
            chunk.append((name, writer))
            filled += size
        if chunk:
            yield from self._run(chunk)

    def _run(self, wanted: Sequence[tuple[str, int]]) -> Iterator[tuple[str, torch.Tensor | None]]:
        rank = self.process.topology.rank
        found = self._received([(name, writer) for name, writer in wanted if name in self.divided])
        for name, writer in wanted:
            if name in self.divided:
                yield name, found.pop(name, None)
            else:
                whole: Any = self.tensors[name]
                yield name, whole.detach() if writer == rank else None

    def _received(self, wanted: Sequence[tuple[str, int]]) -> dict[str, torch.Tensor]:
        """One exchange: what this rank gets of these, whole."""
        if not wanted:
            return {}
        rank, world = self.process.topology.rank, self.process.topology.world_size
        if world == 1:
            return {name: self._assembled(name, [part.cpu() for part in self._parts(name)]) for name, _ in wanted}
        outgoing: list[list[torch.Tensor]] = [[] for _ in range(world)]
        for name, writer in wanted:
            outgoing[writer] += [as_bytes(part).to(self.process.device) for part in self._parts(name)]
        sent_sizes = [sum(part.numel() for part in parts) for parts in outgoing]
        parts = [part for to_one in outgoing for part in to_one]
        sent = torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=self.process.device)
        mine = [name for name, writer in wanted if writer == rank]
        sizes = [sum(self._size(source, name) for name in mine) for source in range(world)]
        received = torch.empty(sum(sizes), dtype=torch.uint8, device=self.process.device)
        dist.all_to_all_single(received, sent, sizes, sent_sizes)
        return self._unpacked(mine, torch.split(received.cpu(), sizes))

    def _unpacked(self, mine: Sequence[str], received: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        targets = {name: self._room(name) for name in mine}
        for source, data in enumerate(received):
            begin = 0
            for name in mine:
                for box in self._boxes[source][name]:
                    size = box.numel * targets[name].dtype.itemsize
                    part = data[begin : begin + size]
                    begin += size
                    place = (*box.slices, slice(None))
                    _as_bytes_view(targets[name])[place] = part.view(*box.shape, -1)
        return targets

    def _assembled(self, name: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        target = self._room(name)
        for box, part in zip(self._boxes[0][name], parts, strict=True):
            target[box.slices] = part
        return target

    def _room(self, name: str) -> torch.Tensor:
        """Host memory for the whole, whatever the default device is."""
        return torch.empty(self._shape(name).shape, dtype=self._shape(name).dtype, device="cpu")

    def _parts(self, name: str) -> list[torch.Tensor]:
        sent = self._boxes[self.process.topology.rank][name]
        return [part for box, part in owned_pieces(self.divided[name]) if box in sent]

    def _shape(self, name: str) -> TensorShape:
        return TensorShape(tuple(self.tensors[name].shape), self.tensors[name].dtype)

    def _size(self, source: int, name: str) -> int:
        return sum(box.numel for box in self._boxes[source][name]) * self._shape(name).dtype.itemsize


def _without_copies(held: Sequence[Mapping[str, Sequence[Box]]]) -> list[dict[str, list[Box]]]:
    """Each part once, by the first rank that holds it."""
    seen: dict[str, set[Box]] = {}
    found = []
    for of_rank in held:
        new = {name: [box for box in boxes if box not in seen.get(name, ())] for name, boxes in of_rank.items()}
        found.append(new)
        for name, boxes in new.items():
            seen.setdefault(name, set()).update(boxes)
    return found


def _as_bytes_view(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory with one more dim, that of each element's bytes: some dtypes have no assignment of their own."""
    return (
        tensor.view(torch.uint8).view(*tensor.shape, tensor.dtype.itemsize)
        if tensor.dim()
        else (tensor.view(1).view(torch.uint8))
    )
