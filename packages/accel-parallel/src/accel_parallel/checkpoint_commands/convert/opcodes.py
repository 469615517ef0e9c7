"""What a pickle says, without carrying it out.

A pickle is a program for a small stack machine (PEP 3154 and ``pickletools`` of the standard library). This runs the
part of it that builds values, and notes calls instead of making them: no module is imported, no class is looked up, no
function is called, whatever the file holds. What is left is data: plain values and `Record`.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any

from accel_state.errors import CheckpointError

__all__ = ["Record", "read_pickle"]


class Record:
    """An object that the pickle would have made."""

    def __init__(self, name: str, args: tuple[Any, ...] = ()) -> None:
        self.name = name
        """Of its class or function, such as ``torch.Size``."""
        self.args = args
        """What that would have been called with."""
        self.state: Any = None
        """What the object would have been filled with, by attribute."""

    def __repr__(self) -> str:
        return f"<{self.name}>"


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_FRESH: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_VALUES = (
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE",
    "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8",
)  # fmt: skip
_MAPPINGS = ("collections.OrderedDict", "collections.defaultdict")
_MARK = object()


def read_pickle(content: bytes, location: str) -> Any:
    """The value that a pickle describes.

    Raises:
        CheckpointError: if it is damaged, or says what no such description needs.
    """
    try:
        return _Machine().run(content)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, UnicodeError) as error:
        raise CheckpointError(
            f"`{location}` is no pickle of plain records ({error!r}), so it cannot be read without running it, which "
            f"is never done. Give a checkpoint that its own library wrote, whole."
        ) from error


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, content: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "STOP":
                return self.stack.pop()
            self._step(opcode.name, argument)
        raise ValueError("it has no end")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _FRESH:
            stack.append(_FRESH[name]())
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        elif name not in ("PROTO", "FRAME"):
            self._build(name, argument)

    def _build(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name == "TUPLE":
            stack.append(tuple(self._since_mark()))
        elif name in ("LIST", "FROZENSET"):
            stack.append(list(self._since_mark()) if name == "LIST" else frozenset(self._since_mark()))
        elif name == "APPEND":
            _expect(stack[-2], list).append(stack.pop())
        elif name == "APPENDS":
            added = self._since_mark()
            _expect(stack[-1], list).extend(added)
        elif name == "ADDITEMS":
            added = self._since_mark()
            _expect(stack[-1], set).update(added)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _expect(stack[-1], dict)[key] = value
        elif name in ("SETITEMS", "DICT"):
            flat = self._since_mark()
            if name == "DICT":
                stack.append({})
            _expect(stack[-1], dict).update(zip(flat[::2], flat[1::2], strict=True))
        else:
            self._describe(name, argument)

    def _describe(self, name: str, argument: Any) -> None:
        """What would import or call something."""
        stack = self.stack
        if name == "GLOBAL":
            stack.append(Record(argument.replace(" ", ".", 1)))
        elif name == "STACK_GLOBAL":
            inner, module = stack.pop(), stack.pop()
            stack.append(Record(f"{module}.{inner}"))
        elif name in ("REDUCE", "NEWOBJ"):
            args, called = stack.pop(), stack.pop()
            stack.append({} if called.name in _MAPPINGS else Record(called.name, _expect(args, tuple)))
        elif name == "BUILD":
            state = stack.pop()
            _expect(stack[-1], Record).state = state
        else:
            raise ValueError(f"the operation {name}")

    def _since_mark(self) -> list[Any]:
        begin = len(self.stack) - 1
        while self.stack[begin] is not _MARK:
            if begin == 0:
                raise IndexError("no mark")
            begin -= 1
        found = self.stack[begin + 1 :]
        del self.stack[begin:]
        return found


def _expect(value: Any, kind: type[Any]) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{type(value).__name__} in place of {kind.__name__}")
    return value
