"""Which memory of tensors is alive, at every moment of a run: of real tensors and of fake ones alike.

Every operator that torch dispatches passes by, below autograd, so that backward is seen as well. What counts is the
memory (a storage), once, however many tensors look at it, from its making to the moment when nothing refers to it.
Memory that a kernel takes and gives back inside, and that of other processes and libraries, is not seen.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["OTHER", "AllocationTracker", "Peak"]

OTHER = "activations"
"""What memory counts as that nobody registers, unless a tracker is told otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Peak:
    """The moment at which most was alive."""

    total_bytes: int = 0
    parts: Mapping[str, int] = field(default_factory=dict)
    """Bytes by category."""
    moment: str = ""
    """What ran then."""


class AllocationTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums up the memory of live tensors while it is entered, and remembers the largest sum.

    Register what was made before: it counts once something looks at it, and under no name then. One thread: the one
    that enters it, and those in which autograd runs its backward.

    Example::

        with AllocationTracker() as tracker:
            tracker.register("weights", model.parameters())
            model(batch).sum().backward()
        print(tracker.peak.total_bytes, tracker.peak.parts)

    Args:
        device: only memory on devices of this type counts; by default all but meta tensors, which have none.
        granularity_bytes: to what multiple an allocator rounds up; CUDA's takes 512.
        weights: by category, what part of its bytes counts; categories that are not named count in full. With it, the
            same run tells what one of several ranks needs that share some of the memory.
        known: categories of memory by the order in which it is made, of a run like this one; see `order_of`.
        resizes: whether memory may be resized without an operator, as `fully_shard` does with what it gathers. All that
            is alive is then looked at again after every operator, which is slow.
    """

    def __init__(
        self,
        *,
        device: str | None = None,
        granularity_bytes: int = 1,
        weights: Mapping[str, float] | None = None,
        known: Mapping[int, str] | None = None,
        resizes: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moment = ""
        """What runs now, for people; set by whoever runs it."""
        self.category = OTHER
        """What memory counts as that nobody registers; set by whoever runs it."""
        self.answer_item: float | None = None
        """What a fake tensor answers when its value is asked for; ``None`` leaves that an error."""
        self._device = device
        self._granularity = granularity_bytes
        self.weights = dict(weights or {})
        """By category, what part of its bytes counts."""
        self._known = dict(known or {})
        self._resizes = resizes
        self._made = 0
        self._live: dict[int, tuple[weakref.ref[Any], str, int, int]] = {}
        self._bytes: Counter[str] = Counter()
        self._peak: tuple[float, dict[str, int], str] = (-1.0, {}, "")

    @property
    def peak(self) -> Peak:
        """The largest sum since the beginning or `reset_peak`."""
        total, parts, moment = self._peak
        shown = {name: round(each * self.weights.get(name, 1.0)) for name, each in parts.items() if each}
        return Peak(total_bytes=max(0, round(total)), parts=shown, moment=moment)

    @property
    def current_bytes(self) -> int:
        """What is alive now, weighted."""
        return round(self._sum())

    def reset_peak(self) -> None:
        """Forget the peak; what is alive now is the new one."""
        self._peak = (-1.0, {}, "")
        self._note()

    def register(self, category: str, tensors: Iterable[Any]) -> None:
        """Count `tensors`, and anything nested that holds some, as `category` from now on, also those known before."""
        for tensor in _tensors(list(tensors)):
            self._see(tensor, category)
        self._note()

    def add(self, category: str, size_bytes: int) -> None:
        """Count memory that no tensor of this process stands for; a negative size takes it away again."""
        self._bytes[category] += size_bytes
        self._note()

    def order_of(self, tensors: Iterable[Any]) -> set[int]:
        """The places of the memory of `tensors` in the order in which all of it was made since the tracker was.

        The same program makes the same in the same order, so a second run can be told what became of it.
        """
        found = (self._live.get(id(each.untyped_storage())) for each in _tensors(list(tensors)))
        return {known[3] for known in found if known is not None}

    def live(self, category: str) -> int:
        """Bytes of one category that are alive, not weighted."""
        return self._bytes[category]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and self.answer_item is not None:
            return self.answer_item
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._see(tensor, None)
        if self._resizes:
            self._look_again()
        if self._sum() > self._peak[0]:
            self._note(str(func))
        return result

    def _see(self, tensor: torch.Tensor, category: str | None) -> None:
        if not self._counts(tensor):
            return
        storage = tensor.untyped_storage()
        key = id(storage)
        size = self._rounded(storage.nbytes())
        known = self._live.get(key)
        if known is None or known[0]() is not storage:
            number, self._made = self._made, self._made + 1
            category = category or self._known.get(number, self.category)
            self._live[key] = (weakref.ref(storage, self._forget(key)), category, size, number)
            self._bytes[category] += size
        elif (category is not None and category != known[1]) or size != known[2]:  # renamed, or resized in place
            category = category or known[1]
            self._bytes[known[1]] -= known[2]
            self._live[key] = (known[0], category, size, known[3])
            self._bytes[category] += size

    def _look_again(self) -> None:
        for key, (reference, category, size, number) in list(self._live.items()):
            storage = reference()
            if storage is not None and (now := self._rounded(storage.nbytes())) != size:
                self._live[key] = (reference, category, now, number)
                self._bytes[category] += now - size

    def _rounded(self, size_bytes: int) -> int:
        return -(-size_bytes // self._granularity) * self._granularity

    def _counts(self, tensor: torch.Tensor) -> bool:
        if tensor.layout != torch.strided:
            return False
        kind = tensor.device.type
        return kind != "meta" if self._device is None else kind == self._device

    def _forget(self, key: int) -> Callable[[weakref.ref[Any]], None]:
        def forget(reference: weakref.ref[Any]) -> None:
            known = self._live.get(key)
            if known is not None and known[0] is reference:
                del self._live[key]
                self._bytes[known[1]] -= known[2]

        return forget

    def _sum(self) -> float:
        weights = self.weights
        if not weights:
            return float(sum(self._bytes.values()))
        return sum(size * weights.get(name, 1.0) for name, size in self._bytes.items())

    def _note(self, operator: str = "") -> None:
        total = self._sum()
        if total > self._peak[0]:
            shown = f"{self.moment}, in {operator.removesuffix('.default')}" if operator else self.moment
            self._peak = (total, dict(self._bytes), shown)


def _tensors(nested: Any) -> Iterator[torch.Tensor]:
    """Plain tensors inside; those that wrap others are taken apart."""
    for leaf in (nested,) if isinstance(nested, torch.Tensor) else tree_leaves(nested):
        if not isinstance(leaf, torch.Tensor):
            continue
        flatten = getattr(type(leaf), "__tensor_flatten__", None)
        if flatten is None:
            yield leaf
        else:
            names, _ = leaf.__tensor_flatten__()  # type: ignore[attr-defined]
            for name in names:
                yield from _tensors(getattr(leaf, name))
