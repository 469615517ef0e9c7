"""One forward and backward on fake tensors, watched: every allocation, every operation, and where they happened.

Nothing is computed and no memory is taken, so a model of any size is measured as it is, on any machine.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

__all__ = ["Place", "Record", "Recorder", "Segment"]

Place = int | None
"""Index of a block, or ``None`` outside of all."""


@dataclass(slots=True)
class Segment:
    """A stretch of forward or backward in one place. Bytes are those of activations alive."""

    place: Place
    backward: bool
    start: int = 0
    end: int = 0
    peak: int = 0
    flops: float = 0.0


@dataclass(slots=True)
class Record:
    """What was seen."""

    segments: list[Segment] = field(default_factory=list)
    outputs: dict[int, int] = field(default_factory=dict)
    """Bytes of each block's output."""
    casts: dict[Place, int] = field(default_factory=dict)
    """Bytes of lower-precision copies of weights alive at the end of forward, by place."""
    wide: dict[int, tuple[int, int]] = field(default_factory=dict)
    """For each block, bytes kept, and of these in tensors as wide as the hidden states."""
    order: list[str] = field(default_factory=list)
    """Names of parameters in the order of their gradients, with ``""`` where backward enters the first block."""


@dataclass(slots=True)
class _Storage:
    size_bytes: int
    place: Place
    width: int
    kind: str = "activation"
    alive: bool = True


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Watches what happens while it is entered. `finish` gives the record."""

    def __init__(
        self, parameters: dict[str, torch.Tensor], known: list[torch.Tensor], *, hidden_size: int | None
    ) -> None:
        """
        Args:
            parameters: fake leaves by name; their gradients are dropped as soon as they are complete.
            known: other tensors that are no activations, such as buffers and inputs.
            hidden_size: last dim of the hidden states, if it is known.
        """
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self._storages: list[_Storage] = []
        self._index: dict[int, int] = {}
        self._events: list[tuple[int, int]] = []  # (+index + 1) made, (-index - 1) gone, with the segment it was in
        self._references: dict[int, weakref.ref[Any]] = {}
        self._parameters = {self._key(each) for each in parameters.values()}
        self._known = self._parameters | {self._key(each) for each in known}
        self._keep = (list(parameters.values()), known)  # their storages keep their keys to themselves
        self._hidden_size = hidden_size
        self._segments: list[Segment] = [Segment(None, False)]
        self.record = Record()
        self._handles: list[Any] = [
            parameter.register_post_accumulate_grad_hook(self._gradient_hook(name))  # type: ignore[no-untyped-call]
            for name, parameter in parameters.items()
            if parameter.requires_grad
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._segments[-1].flops += _flops(func, args, kwargs, result)
        cast = func is torch.ops.aten._to_copy.default and self._key(args[0]) in self._parameters
        for each in tree_iter(result):
            if isinstance(each, torch.Tensor):
                self._see(each, "cast" if cast else "activation")
        return result

    @contextmanager
    def blocks(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """While open, forward and backward through these modules are told apart."""
        handles: list[Any] = []
        for index, module in enumerate(modules):
            handles.append(module.register_forward_pre_hook(self._enter_hook(index), prepend=True))
            handles.append(module.register_forward_hook(self._leave_hook(index)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def enter_backward(self) -> None:
        """Forward is over."""
        for storage in self._storages:
            if storage.kind == "cast" and storage.alive:
                self.record.casts[storage.place] = self.record.casts.get(storage.place, 0) + storage.size_bytes
        self._begin(None, backward=True)

    def finish(self) -> Record:
        """Backward is over: replay what happened, now that it is known which tensors were gradients."""
        for handle in self._handles:
            handle.remove()
        live = 0
        position = 0
        for number, segment in enumerate(self._segments):
            segment.start = segment.peak = live
            while position < len(self._events) and self._events[position][0] == number:
                signed = self._events[position][1]
                storage = self._storages[abs(signed) - 1]
                if storage.kind == "activation":
                    live += storage.size_bytes if signed > 0 else -storage.size_bytes
                    segment.peak = max(segment.peak, live)
                position += 1
            segment.end = live
        self.record.segments = self._segments
        return self.record

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        key: int = tensor.untyped_storage()._cdata
        return key

    def _see(self, tensor: torch.Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._index:
            return
        width = tensor.shape[-1] if tensor.dim() else 0
        self._storages.append(_Storage(storage.nbytes(), self._segments[-1].place, width, kind))
        index = len(self._storages)
        self._index[key] = index - 1
        self._events.append((len(self._segments) - 1, index))
        self._references[key] = weakref.ref(storage, lambda _: self._gone(key, index))

    def _gone(self, key: int, index: int) -> None:
        self._storages[index - 1].alive = False
        self._index.pop(key, None)
        self._references.pop(key, None)
        self._events.append((len(self._segments) - 1, -index))

    def _gradient_hook(self, name: str) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            gradient = parameter.grad
            if gradient is not None:
                index = self._index.get(self._key(gradient))
                if index is not None:
                    self._storages[index].kind = "gradient"
            parameter.grad = None
            self.record.order.append(name)

        return hook

    def _begin(self, place: Place, *, backward: bool) -> None:
        self._segments.append(Segment(place, backward))

    def _enter_hook(self, index: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not self._segments[-1].backward:
                self._begin(index, backward=False)

        return hook

    def _leave_hook(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._segments[-1].backward:
                return  # computed again by a checkpoint of its own
            tensors = [each for each in tree_iter(output) if isinstance(each, torch.Tensor)]
            sizes = {self._key(each): each.untyped_storage().nbytes() for each in tensors}
            self.record.outputs[index] = self.record.outputs.get(index, 0) + sum(sizes.values())
            kept = [s for s in self._storages if s.alive and s.place == index and s.kind == "activation"]
            wide = sum(s.size_bytes for s in kept if s.width == self._hidden_size)
            self.record.wide[index] = (sum(s.size_bytes for s in kept), wide)
            self._begin(None, backward=False)
            watched = [each for each in tensors if each.requires_grad]
            if watched:
                torch.autograd.graph.register_multi_grad_hook(watched, self._backward_hook(index), mode="any")

        return hook

    def _backward_hook(self, index: int) -> Callable[[torch.Tensor], None]:
        def hook(_: torch.Tensor) -> None:
            if "" not in self.record.order:
                self.record.order.append("")
            self._begin(index, backward=True)

        return hook


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> float:
    """Operations of one call, as torch counts them; of attention on a CPU, which torch leaves out, likewise."""
    from torch.utils.flop_counter import flop_registry

    packet = func._overloadpacket
    if packet in flop_registry:
        return float(flop_registry[packet](*args, **kwargs, out_val=result))
    name = packet.__name__
    if name == "_scaled_dot_product_flash_attention_for_cpu":
        return _attention_flops(args[0], args[1], args[2])
    if name == "_scaled_dot_product_flash_attention_for_cpu_backward":
        return 2.5 * _attention_flops(args[1], args[2], args[3])
    return 0.0


def _attention_flops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> float:
    """Two products of matrices, of all pairs: (b, heads, s, size) each."""
    rows = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    return 2.0 * rows * (query.shape[3] + value.shape[3])
