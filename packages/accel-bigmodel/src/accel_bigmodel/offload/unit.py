"""The tensors that travel together, on the device while a forward needs them."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from accel_bigmodel.offload.saved import SavedWeights
from accel_bigmodel.offload.tensor import MovedTensor
from accel_bigmodel.stream import Engine, Load, Source

__all__ = ["Unit"]


class Unit:
    """Puts its tensors into their modules when it is entered, and placeholders when it is left.

    Entering may be nested, as with weights that two modules share and one that calls itself. Every forward that enters
    leaves, by an exception too.

    Args:
        engine: what moves it.
        name: for messages.
        tensors: in the order in which their pieces lie in `source`.
        source: their values.
    """

    def __init__(self, engine: Engine, name: str, tensors: Sequence[MovedTensor], source: Source) -> None:
        self.name = name
        self.tensors = list(tensors)
        self.source = source
        self._engine = engine
        self._load = Load(engine, source, name)
        self.opener: weakref.ref[nn.Module] | None = None
        """A module inside the block that entered the unit for its own forward; see `hooks`."""
        self._depth = 0
        self._views: list[torch.Tensor] = []
        self._put: list[torch.Tensor] = []
        self._saved: list[SavedWeights | None] = []
        self._failed = 0

    @property
    def engine(self) -> Engine:
        """What moves it."""
        return self._engine

    @property
    def is_entered(self) -> bool:
        """Whether its modules hold values now."""
        return self._depth > 0

    def enter(self, *, one_forward: bool = True) -> None:
        """Have the weights where they are needed, good for what is computed from now on.

        Args:
            one_forward: whether a forward ends it, so that backward has to fetch the weights again.

        Raises:
            CheckpointError: if a file they are read from was cut short.
            OSError: if it cannot be read.
        """
        try:
            flat = self._engine.acquire(self._load)
        except BaseException:
            self._failed += 1  # torch calls what is behind a forward nevertheless
            raise
        self._depth += 1
        if self._depth == 1:
            with torch.inference_mode(mode=False):
                self._views = self.source.layout.views(flat)
            self._put = [tensor.put(pieces) for tensor, pieces in self._with_pieces(self._views)]
        saved = SavedWeights(self._load, flat) if one_forward and torch.is_grad_enabled() else None
        if saved is not None:
            saved.__enter__()
        self._saved.append(saved)

    def leave(self) -> None:
        """What was entered last is over. Values that it changed are kept."""
        if self._failed:
            self._failed -= 1
            return
        saved = self._saved.pop()
        if saved is not None:
            saved.__exit__()
        self._depth -= 1
        if self._depth == 0:
            self._keep_changes()
            for tensor in self.tensors:
                tensor.put_placeholder()
            self._views, self._put = [], []
        self._engine.release(self._load)

    def present(self) -> list[torch.Tensor]:
        """What its modules hold now, while it is entered."""
        return list(self._put)

    def drop(self) -> None:
        """Let go of what is on the device now, and not when something else needs the room."""
        self._engine.drop(self._load)

    def values(self) -> list[torch.Tensor]:
        """The tensors' values on the host, in order; memory may be that of the source."""
        self._engine.settle(self._load)
        pieces = [self.source.tensor(index) for index in range(len(self.source.layout.shapes))]
        return [tensor.value(found) for tensor, found in self._with_pieces(pieces)]

    def set_value(self, position: int, value: torch.Tensor) -> None:
        """Have one of the tensors hold `value` from now on."""
        self._engine.settle(self._load)
        first = sum(each.num_pieces for each in self.tensors[:position])
        self.source.writable(first).copy_(value)
        self._engine.drop(self._load)

    def put_for_good(self) -> None:
        """Give the modules their tensors back, on the host."""
        self._engine.settle(self._load)
        pieces = [self.source.writable(index) for index in range(len(self.source.layout.shapes))]
        for tensor, found in self._with_pieces(pieces):
            tensor.put_for_good(found)
        self._engine.drop(self._load)

    def _with_pieces(self, pieces: Sequence[torch.Tensor]) -> list[tuple[MovedTensor, Sequence[torch.Tensor]]]:
        found, first = [], 0
        for tensor in self.tensors:
            found.append((tensor, pieces[first : first + tensor.num_pieces]))
            first += tensor.num_pieces
        return found

    def _keep_changes(self) -> None:
        index = 0
        for tensor, put in zip(self.tensors, self._put, strict=True):
            now = tensor.places[0].get()
            if now is not put and isinstance(now, torch.Tensor) and tensor.num_pieces == 1:
                self._engine.write_back(self._load, index, now)  # another tensor was put in its place
                self._engine.drop(self._load)
            else:
                # Batch normalisation changes its statistics without counting that.
                may_change = not tensor.is_parameter and tensor.is_trained
                for offset in range(tensor.num_pieces):
                    if may_change or self._views[index + offset]._version:
                        self._engine.write_back(self._load, index + offset, self._views[index + offset])
            index += tensor.num_pieces

    def __deepcopy__(self, memo: dict[int, Any]) -> Unit:
        engine = copy.deepcopy(self._engine, memo)
        self._engine.settle(self._load)
        made = Unit.__new__(Unit)
        memo[id(self)] = made
        made.__init__(engine, self.name, copy.deepcopy(self.tensors, memo), self.source.copy())  # type: ignore[misc]
        return made
