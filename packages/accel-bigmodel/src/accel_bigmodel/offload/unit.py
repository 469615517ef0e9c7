"""The tensors that travel together, on the device while a forward needs them."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from accel_bigmodel.offload.saved import SavedWeights
from accel_bigmodel.offload.tensor import MovedTensor, pieces_of
from accel_bigmodel.stream import Engine, Load, Source
from accel_state.errors import ConfigError

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
        self.hooked: list[weakref.ref[nn.Module]] = []
        """Modules that have hooks of it."""
        self.opener: weakref.ref[nn.Module] | None = None
        """A module inside the block that entered the unit for its own forward; see `hooks`."""
        self._engine = engine
        self._load = Load(engine, source, name)
        self._views: list[torch.Tensor] = []
        self._put: list[torch.Tensor] = []
        self._entered: list[tuple[int | None, SavedWeights | None]] = []
        """For each time that it was entered and not left: by which module, and what looks at saved tensors since."""
        self._failed = 0

    @property
    def engine(self) -> Engine:
        """What moves it."""
        return self._engine

    @property
    def is_entered(self) -> bool:
        """Whether its modules hold values now."""
        return bool(self._entered)

    def was_entered_by(self, module: nn.Module) -> bool:
        """Whether a forward of `module` entered it, and did not leave it yet."""
        return any(by == id(module) for by, _ in self._entered)

    def enter(self, *, by: nn.Module | None = None, one_forward: bool = True, is_plain: bool = False) -> None:
        """Have the weights where they are needed, good for what is computed from now on.

        Args:
            by: the module whose forward it is for.
            one_forward: whether a forward ends it, so that backward has to fetch the weights again.
            is_plain: whether parameters are ordinary ones, to be looked at and changed.

        Raises:
            CheckpointError: if a file they are read from was cut short.
            OSError: if it cannot be read.
        """
        try:
            flat = self._engine.acquire(self._load)
        except Exception:
            self._failed += 1  # torch calls what is behind a forward nevertheless
            raise
        if not self._entered:
            with torch.inference_mode(mode=False):
                self._views = self.source.layout.views(flat)
            self._put = [tensor.put(pieces, is_plain=is_plain) for tensor, pieces in self._with_pieces(self._views)]
        saved = SavedWeights(self._load, flat) if one_forward and torch.is_grad_enabled() else None
        if saved is not None:
            saved.__enter__()
        self._entered.append((None if by is None else id(by), saved))

    def leave(self, *, keep_all: bool = False) -> None:
        """What was entered last is over. Values that it changed are kept.

        Args:
            keep_all: whether changes count too that torch does not count, as those through ``.data``.

        Raises:
            ConfigError: if a forward put a tensor of another dtype or shape in the place of one of these.
        """
        if self._failed or not self._entered:
            self._failed = max(0, self._failed - 1)
            return
        _, saved = self._entered.pop()
        if saved is not None:
            saved.__exit__()
        refused = None
        if not self._entered:
            refused = self._keep_changes(keep_all=keep_all)
            self._put_placeholders()
        self._engine.release(self._load)
        if refused is not None:
            raise refused

    def reset(self) -> None:
        """Leave it, however often it was entered: an interrupt ended forwards without a word to what is behind them."""
        while self._entered:
            _, saved = self._entered.pop()
            if saved is not None:
                saved.__exit__()
            self._engine.release(self._load)
        self._failed, self.opener = 0, None
        self._put_placeholders()
        self._engine.drop(self._load)

    def put_again(self) -> None:
        """Have modules hold values that fit what is wanted of gradients now, while it is entered."""
        refused = self._keep_changes(keep_all=False)
        for tensor in self.tensors:
            tensor.put_placeholder()
        self._put = [tensor.put(pieces) for tensor, pieces in self._with_pieces(self._views)]
        if refused is not None:
            raise refused

    def present(self) -> list[torch.Tensor]:
        """What its modules hold now, while it is entered."""
        return list(self._put)

    def drop(self) -> None:
        """Let go of what is on the device now, and not when something else needs the room."""
        self._engine.drop(self._load)

    def values(self) -> list[torch.Tensor]:
        """The tensors' values on the host, in order; memory may be that of the source.

        What is on the device is fetched again before its next use, as whoever has these values may change them.
        """
        self._engine.settle(self._load)
        pieces = [self.source.tensor(index) for index in range(len(self.source.layout.shapes))]
        if not self._entered:
            self._engine.drop(self._load)
        return [tensor.value(found) for tensor, found in self._with_pieces(pieces)]

    def set_value(self, position: int, value: torch.Tensor) -> None:
        """Have one of the tensors hold `value` from now on.

        Raises:
            ConfigError: if it is made of other pieces, as one that was quantized in another way.
        """
        self._engine.settle(self._load)
        first = sum(each.num_pieces for each in self.tensors[:position])
        pieces = pieces_of(value)
        if len(pieces) != self.tensors[position].num_pieces:
            raise ConfigError(
                f"`{self.tensors[position].name}` is made of {self.tensors[position].num_pieces} tensors, and the "
                f"value given for it, a {type(value).__name__}, of {len(pieces)}. Give one of the same class."
            )
        for index, piece in enumerate(pieces, first):
            self.source.writable(index).copy_(piece)
            self._load.changes[index] += 1
            if self._entered:
                self._views[index].copy_(piece)
        if not self._entered:
            self._engine.drop(self._load)

    def put_for_good(self) -> None:
        """Give the modules their tensors back, on the host."""
        self.reset()
        self._engine.settle(self._load)
        pieces = [self.source.writable(index) for index in range(len(self.source.layout.shapes))]
        for tensor, found in self._with_pieces(pieces):
            tensor.put_for_good(found)

    def _put_placeholders(self) -> None:
        for tensor in self.tensors:
            tensor.put_placeholder()
        self._views, self._put = [], []

    def _with_pieces(self, pieces: Sequence[torch.Tensor]) -> list[tuple[MovedTensor, Sequence[torch.Tensor]]]:
        found, first = [], 0
        for tensor in self.tensors:
            found.append((tensor, pieces[first : first + tensor.num_pieces]))
            first += tensor.num_pieces
        return found

    def _keep_changes(self, *, keep_all: bool) -> ConfigError | None:
        """Write back what changed; the reason why one of these cannot be, if there is one."""
        refused, index = None, 0
        for tensor, put in zip(self.tensors, self._put, strict=True):
            now = tensor.now(put)
            # Batch normalisation changes its statistics without counting that.
            may_change = not tensor.is_parameter and tensor.is_trained
            if tensor.is_plain and (now is not put or now.data_ptr() != self._views[index].data_ptr()):
                refused = self._keep_another(tensor, index, now) or refused
            else:
                for piece in range(index, index + tensor.num_pieces):
                    counted = bool(self._views[piece]._version)
                    if counted or may_change or (keep_all and self._differs(piece)):
                        self._engine.write_back(self._load, piece, self._views[piece])
                        self._load.changes[piece] += counted
            index += tensor.num_pieces
        return refused

    def _differs(self, piece: int) -> bool:
        """Whether the device has other values than the host. To compare costs less than to keep a copy of a file."""
        self._engine.settle(self._load)
        found, kept = (each.reshape(-1).view(torch.uint8) for each in (self._views[piece], self.source.tensor(piece)))
        return not torch.equal(found.to("cpu"), kept)

    def _keep_another(self, tensor: MovedTensor, index: int, now: Any) -> ConfigError | None:
        """Write back what was put in a tensor's place."""
        layout = self.source.layout
        is_like = isinstance(now, torch.Tensor) and now.dtype == layout.dtypes[index] and now.layout == torch.strided
        if not is_like or tuple(now.shape) != layout.shapes[index]:
            found = f"{now.dtype}, {list(now.shape)}" if isinstance(now, torch.Tensor) else repr(now)
            return ConfigError(
                f"A forward replaced `{tensor.name}` ({layout.dtypes[index]}, {list(layout.shapes[index])}) by another "
                f"kind of value ({found}), which cannot be kept where that one was. Leave buffers on the device "
                f"(`offload_buffers=False`)."
            )
        self._engine.write_back(self._load, index, now)
        self._engine.drop(self._load)
        self._load.changes[index] += 1
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Unit:
        engine = copy.deepcopy(self._engine, memo)
        self._engine.settle(self._load)
        made = Unit.__new__(Unit)
        memo[id(self)] = made
        made.__init__(engine, self.name, copy.deepcopy(self.tensors, memo), self.source.copy())  # type: ignore[misc]
        return made
