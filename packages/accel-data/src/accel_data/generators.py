"""The default generators of this process, looked at, seeded and put back quickly: before and after every batch.

The official ways take 7 µs for python's state and 70 µs for numpy's. Where a trial shows how the memory that holds a
state is to be decoded, that is copied instead, which takes 0.1 µs; it is only read, never written.
"""

from __future__ import annotations

import ctypes
import random
import struct
from array import array
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch

__all__ = ["DefaultGenerator", "default_generators"]

_numpy: Any = np.random  # whose functions are not all in its type stubs
_NUM_WORDS = 624  # of the state of a Mersenne Twister


class DefaultGenerator(Protocol):
    """One of the default generators of this process: looked at, seeded, and put back as it was.

    The object holds addresses: it is made in the process that uses it.
    """

    def look(self) -> Any:
        """Its whole state, for `moved` and `put_back`."""

    def moved(self, state: Any) -> bool:
        """Whether it has been drawn from, or seeded anew, since `look` returned `state`."""

    def put_back(self, state: Any) -> None:
        """Leave it exactly as it was when `look` returned `state`."""

    def seed(self, seed: int) -> None:
        """Seed it with an integer in ``0 .. 2**64 - 1``."""


def default_generators() -> tuple[DefaultGenerator, ...]:
    """Those of python, torch and numpy."""
    return PythonGenerator(), TorchGenerator(), NumpyGenerator()


class PythonGenerator:
    """The generator behind the functions of `random`.

    Its state takes 7 µs to ask for. The memory that holds it takes 0.1 µs to copy, which is done where a trial has
    shown how to decode it.
    """

    def __init__(self) -> None:
        self._generator: Any = random.random.__self__  # type: ignore[attr-defined]
        self._offset = python_offset()
        self._memory = _Memory(self._generator) if self._offset else None
        self._decoded: dict[bytes, tuple[int, ...]] = {}

    def look(self) -> Any:
        # Of two normal numbers, which are made together, the second may be waiting; python keeps it elsewhere.
        return random.getstate() if self._memory is None else self._memory.block.raw, self._generator.gauss_next

    def moved(self, state: Any) -> bool:
        return bool(self.look() != state)

    def put_back(self, state: Any) -> None:
        if not self.moved(state):
            return
        content, waiting = state
        if self._memory is None:
            random.setstate(content)
            return
        decoded = self._decoded.pop(content, None) or _decode_python(content, self._offset)
        self._decoded[content] = decoded
        if len(self._decoded) > 2:  # what is inside changes, what is outside often does not
            self._decoded.pop(next(iter(self._decoded)))
        random.setstate((3, decoded, waiting))

    def seed(self, seed: int) -> None:
        random.seed(seed)


class TorchGenerator:
    """torch's default generator of the host."""

    def __init__(self) -> None:
        self._generator = torch.default_generator
        self._block = ctypes.c_char * self.look().numel()

    def look(self) -> torch.Tensor:
        return self._generator.get_state()

    def moved(self, state: torch.Tensor) -> bool:
        # Compared as bytes, since `torch.equal` takes 3 µs.
        now, block = self._generator.get_state(), self._block
        return bool(block.from_address(now.data_ptr()).raw != block.from_address(state.data_ptr()).raw)

    def put_back(self, state: torch.Tensor) -> None:
        self._generator.set_state(state)

    def seed(self, seed: int) -> None:
        self._generator.manual_seed(seed)


class NumpyGenerator:
    """The generator behind the functions of ``numpy.random``: one object around another, a source of bits.

    Its state takes 33 µs to ask for and 37 µs to set. The memory of both is copied instead, where a trial has shown
    how to decode it, and it is seeded after a source of its own has been swapped in.
    """

    def __init__(self) -> None:
        self._offsets = numpy_offsets()
        self._around = _Memory(_numpy.random_sample.__self__)
        self._own = _numpy.MT19937(0)
        self._own_memory = _Memory(self._own)
        self._source_memory = self._own_memory  # of the source that was looked at last

    def look(self) -> Any:
        source = _numpy.get_bit_generator()
        memory = self._memory_of(source)
        if memory is None:
            return source, _numpy.get_state(legacy=False), None
        return source, memory.block.raw, self._around.block.raw

    def moved(self, state: Any) -> bool:
        source, content, around = state
        if source is not _numpy.get_bit_generator():
            return True
        memory = self._memory_of(source)
        if memory is None:
            return not _same(content, _numpy.get_state(legacy=False))
        return bool(memory.block.raw != content or self._around.block.raw != around)

    def put_back(self, state: Any) -> None:
        source, content, around = state
        if source is not _numpy.get_bit_generator():
            _numpy.set_bit_generator(source)  # forgets the second of two normal numbers, if that waits
        if not self.moved(state):
            return
        memory = self._memory_of(source)
        if memory is None:
            _numpy.set_state(content)
        elif memory.block.raw == content and not _decode_waiting(around, self._offsets)[0]:
            _numpy.set_bit_generator(source)
        else:
            _numpy.set_state(_decode_numpy(content, around, self._offsets))

    def seed(self, seed: int) -> None:
        if _numpy.get_bit_generator() is not self._own:
            _numpy.set_bit_generator(self._own)
        # The upper half, since torch seeds the same algorithm with the lower one and would draw the same bits.
        _numpy.seed(seed >> 32)

    def _memory_of(self, source: Any) -> _Memory | None:
        """``None`` if it cannot be decoded: the state is copied then."""
        if self._source_memory.owner is not source:
            if not self._offsets or type(source) is not _numpy.MT19937:
                return None
            self._source_memory = self._own_memory if source is self._own else _Memory(source)
        return self._source_memory if self._offsets else None


class _Memory:
    """The memory of an object of CPython, without its header."""

    def __init__(self, owner: Any) -> None:
        header = object.__basicsize__
        self.owner = owner  # kept alive
        self.block = (ctypes.c_char * (type(owner).__basicsize__ - header)).from_address(id(owner) + header)


@cache
def python_offset() -> int:
    """Where the memory of a `random.Random` holds its words; 0 if it does not, as far as a trial shows."""
    generator = random.Random(1)
    memory = _Memory(generator).block
    offset = memory.raw.find(array("I", generator.getstate()[1][:-1]).tobytes())
    for _ in range(2):
        if offset < 4 or _decode_python(memory.raw, offset) != generator.getstate()[1]:
            return 0
        generator.random()
    return offset


def _decode_python(content: bytes, offset: int) -> tuple[int, ...]:
    """The 624 words of the Mersenne Twister and the number of the next one, which CPython keeps before them."""
    return struct.unpack_from(f"{_NUM_WORDS}I", content, offset) + struct.unpack_from("I", content, offset - 4)


@cache
def numpy_offsets() -> tuple[int, int] | None:
    """Where the memory of numpy's source holds its words, and where that of the object around it holds a waiting
    normal number; ``None`` if they do not, as far as a trial shows."""
    source = _numpy.MT19937(1)
    generator = _numpy.RandomState(source)
    content, around = _Memory(source).block, _Memory(generator).block
    generator.standard_normal()
    state = generator.get_state(legacy=False)
    offsets = content.raw.find(_words(state)), around.raw.find(struct.pack("d", state["gauss"]))
    for _ in range(3):
        if min(offsets) < 8 or not _same(_decode_numpy(content.raw, around.raw, offsets), state):
            return None
        generator.standard_normal()
        state = generator.get_state(legacy=False)
    return offsets


def _words(state: Any) -> bytes:
    return array("I", state["state"]["key"].tolist()).tobytes()


def _decode_numpy(content: bytes, around: bytes, offsets: Any) -> dict[str, Any]:
    """The words, the number of the next one, which numpy keeps after them, and what waits."""
    *words, number = struct.unpack_from(f"{_NUM_WORDS + 1}I", content, offsets[0])
    waits, value = _decode_waiting(around, offsets)
    key = np.array(words, dtype=np.uint32)
    return {"bit_generator": "MT19937", "state": {"key": key, "pos": number}, "has_gauss": waits, "gauss": value}


def _decode_waiting(around: bytes, offsets: Any) -> tuple[int, float]:
    """Whether the second of two normal numbers waits, an int padded to eight bytes, and that number."""
    waits, value = struct.unpack_from("i4xd", around, offsets[1] - 8)
    return waits, value


def _same(one: Any, other: Any) -> bool:
    """Whether two states of a generator of numpy are equal: dictionaries of dictionaries, arrays and numbers."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return bool(np.array_equal(one, other))
