"""What is known of the datasets of Hugging Face ``datasets``. Nothing is imported: whoever has one has loaded it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from typing import Any

__all__ = [
    "divides_badly",
    "first_and_last_row",
    "forget_place",
    "is_streaming",
    "loses_buffer",
    "shuffle_state",
    "split",
    "split_among",
]


def is_streaming(dataset: object) -> bool:
    """Whether it is an ``IterableDataset`` of ``datasets``."""
    module = sys.modules.get("datasets")
    kind = getattr(module, "IterableDataset", None)
    return isinstance(kind, type) and isinstance(dataset, kind)


def split_among(dataset: object) -> int:
    """Among how many nodes ``split_dataset_by_node`` has divided it; 1 where it has not."""
    if not is_streaming(dataset):
        return 1
    return int(getattr(getattr(dataset, "_distributed", None), "world_size", 1))


def split(dataset: Any, num_parts: int, part: int) -> Any:
    """One part of a streaming dataset: other files every epoch where it is shuffled."""
    from_module = sys.modules["datasets"]
    divide: Any = getattr(from_module, "distributed", None)
    if divide is None:
        from importlib import import_module

        divide = import_module("datasets.distributed")
    return divide.split_dataset_by_node(dataset, rank=part, world_size=num_parts)


def loses_buffer(dataset: object) -> bool:
    """Whether its ``state_dict`` leaves samples out: those that a shuffle buffer holds are not in it."""
    if not is_streaming(dataset):
        return False
    shuffling = getattr(dataset, "_shuffling", None)
    return _buffers(dataset) or bool(getattr(shuffling, "buffer_size", 0))


def divides_badly(dataset: object) -> bool:
    """Whether its ``state_dict`` cannot be loaded in a worker process: that of a pipeline with several sources is
    loaded before they are divided among the workers, as of version 5.2."""
    if not is_streaming(dataset):
        return False
    return any(getattr(each, "ex_iterables", None) for each in _chain(getattr(dataset, "_ex_iterable", None)))


def first_and_last_row(dataset: Any) -> str | None:
    """Checksum of the stored first and last rows of a map-style dataset of ``datasets``; ``None`` for any other."""
    kind = getattr(sys.modules.get("datasets"), "Dataset", None)
    if not (isinstance(kind, type) and isinstance(dataset, kind)):
        return None
    stored: Any = dataset.with_format("arrow")  # type: ignore[attr-defined] # a class that is known at run time only
    if not len(stored):
        return None
    rows = [stored[0].to_pydict(), stored[len(stored) - 1].to_pydict()]
    return hashlib.blake2b(repr(rows).encode(), digest_size=8).hexdigest()


def forget_place(dataset: Any) -> None:
    """Let a streaming dataset start its epoch from the beginning, whatever state was loaded into it before."""
    if is_streaming(dataset) and getattr(dataset, "_starting_state_dict", None) is not None:
        dataset._starting_state_dict = None


def shuffle_state(dataset: object) -> str | None:
    """What its order is drawn from, to be compared between ranks; ``None`` where it is not shuffled."""
    if not is_streaming(dataset):
        return None
    found = []
    for each in (dataset, *_chain(getattr(dataset, "_ex_iterable", None))):
        generator = getattr(getattr(each, "_shuffling", each), "generator", None)
        state = getattr(getattr(generator, "bit_generator", None), "state", None)
        if state is not None:
            found.append(f"{type(each).__name__}: {state}")
    return "; ".join(found) or None


def _buffers(dataset: object) -> bool:
    return any(
        type(each).__name__ == "BufferShuffledExamplesIterable"
        for each in _chain(getattr(dataset, "_ex_iterable", None))
    )


def _chain(iterable: Any) -> Iterator[Any]:
    """An examples iterable and all that it reads from."""
    if iterable is None:
        return
    yield iterable
    yield from _chain(getattr(iterable, "ex_iterable", None))
    for each in getattr(iterable, "ex_iterables", None) or ():
        yield from _chain(each)
