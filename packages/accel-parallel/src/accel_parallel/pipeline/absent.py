"""Tensors that are on another rank: a shape, a dtype and a device here, and the values elsewhere.

A pipeline stage runs the model's own forward, in which most weights are those of other stages. Whatever is computed
from an `Absent` tensor is absent too, so that nothing wrong can come out of a value that is not there: it either
arrives from the stage before, or asking for it is an error with a name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from accel_state.errors import ConfigError

__all__ = ["Absent", "Journal"]

_MADE_OF_SHAPE = frozenset(
    {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"}
)
"""Operations whose result depends on shape, dtype and device only: it is there although their argument is not."""


class Journal:
    """What is known, while a model's forward runs, about where it has come to; and what it used on the way."""

    __slots__ = ("place", "rehearsing", "stage", "uses")

    def __init__(self) -> None:
        self.rehearsing = False
        """Whether the pass is for shapes only, and follows all stages rather than one."""
        self.stage = 0
        """Stage that the pass is in."""
        self.place = ""
        """Name of the block that was begun last; empty before the first."""
        self.uses: dict[str, set[str]] = {}
        """By name of a weight, the places at which it was used."""

    def begin(self) -> None:
        """A pass begins."""
        self.stage, self.place, self.uses = 0, "", {}


class Absent(torch.Tensor):
    """A tensor without values. While a model is rehearsed, it knows the stages that will have them."""

    shadow: torch.Tensor
    """On the meta device, with the same shape, strides and dtype."""
    journal: Journal
    stages: int
    """Rehearsing: bit *k* is set where stage *k* has the value."""
    label: str
    """Name of the weight; empty for what was computed."""
    value: torch.Tensor | None
    """The value, once it has arrived from another rank."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: type[Absent],
        shadow: torch.Tensor,
        *,
        device: torch.device,
        journal: Journal,
        stages: int = 0,
        label: str = "",
    ) -> Absent:
        made: Absent = torch.Tensor._make_wrapper_subclass(
            cls,
            shadow.shape,
            strides=shadow.stride(),
            storage_offset=shadow.storage_offset(),
            dtype=shadow.dtype,
            layout=shadow.layout,
            device=device,
        )
        made.shadow, made.journal, made.stages, made.label, made.value = shadow, journal, stages, label, None
        return made

    @staticmethod
    def weight(tensor: torch.Tensor, *, name: str, device: torch.device, journal: Journal) -> Absent:
        """Stands for `tensor`, a parameter or buffer, as it will be on `device`."""
        made = Absent(shadow_of(tensor), device=device, journal=journal, label=name)
        made._is_param = isinstance(tensor, nn.Parameter)
        return made

    def fresh(self) -> Absent:
        """Another one of this shape, of which nothing is known yet."""
        return Absent(self.shadow, device=self.device, journal=self.journal)

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        name = f"{self.label!r}, " if self.label else ""
        return f"Absent({name}shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        absent = [leaf for leaf in _tensors((args, kwargs)) if isinstance(leaf, Absent)]
        journal = absent[0].journal
        for each in absent:
            if each.label:
                journal.uses.setdefault(each.label, set()).add(journal.place)
        if all(each.value is not None for each in absent):
            return func(*_replace(args, _value), **_replace(kwargs, _value))
        if func.overloadpacket.__name__ in _MADE_OF_SHAPE:
            return func(*_replace(args, _stand_in), **_replace(kwargs, _stand_in))
        stages = -1
        for each in absent:
            stages &= each.stages
        written = _written(func, args, kwargs)
        _check_writes(func, written, stages, journal)
        device = kwargs.get("device") or absent[0].device
        if "device" in kwargs:
            kwargs["device"] = torch.device("meta")
        shadow_args, shadow_kwargs = _replace(args, shadow_of), _replace(kwargs, shadow_of)
        result = _run_on_meta(func, shadow_args, shadow_kwargs)
        by_shadow = {id(each.shadow): each for each in written if isinstance(each, Absent)}

        def wrap(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) in by_shadow:  # in place: the very tensor comes back
                return by_shadow[id(tensor)]
            return Absent(tensor, device=torch.device(device), journal=journal, stages=stages)

        return _replace(result, wrap)


def shadow_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor like this one on the meta device."""
    if isinstance(tensor, Absent):
        return tensor.shadow
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _value(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, Absent):
        assert tensor.value is not None
        return tensor.value
    return tensor


def _stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """A real tensor of that shape, with any content."""
    if isinstance(tensor, Absent):
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return tensor


def _run_on_meta(func: Any, args: Any, kwargs: Any) -> Any:
    name = func.overloadpacket.__name__
    if name in ("_local_scalar_dense", "item", "equal", "is_nonzero"):
        raise _unreadable(name)
    try:
        return func(*args, **kwargs)
    except NotImplementedError as error:  # no kernel for shapes alone: the shape depends on values
        raise _unreadable(name) from error


def _unreadable(name: str) -> ConfigError:
    return ConfigError(
        f"The model's forward, outside its blocks, asks for the values of a tensor (`{name}`) that a pipeline stage "
        f"before or after has, so this stage cannot know how to go on. Keep decisions on values inside a block: name "
        f"in `no_split_module_classes` the class of the module that makes them, or begin a stage elsewhere with "
        f"`split_points`."
    )


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    found = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            found += list(_tensors(given))
    return found


def _check_writes(func: Any, written: list[torch.Tensor], stages: int, journal: Journal) -> None:
    """Refuse to write what is absent into what is there, since the latter would then be wrong without a word.

    Views share memory but not what is known of them, so a write may not change what is known. What earlier stages
    have does not matter any more: they are through.
    """
    later = -1 << journal.stage
    for tensor in written:
        if isinstance(tensor, Absent) and tensor.value is None:
            keeps = tensor.stages & later & ~stages == 0 and (tensor.stages >> journal.stage) & 1
            if not journal.rehearsing or keeps:
                continue
        raise ConfigError(
            f"The model's forward, outside its blocks, writes in place (`{func.overloadpacket.__name__}`) into a "
            f"tensor of shape {tuple(tensor.shape)} what only some pipeline stages have, so the others would go on "
            f"with its old content. Compute a new tensor instead, such as with `torch.cat` or `torch.where`, or begin "
            f"a stage elsewhere with `split_points`."
        )


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors among an operation's arguments."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for each in tree:
            yield from _tensors(each)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


def _replace(tree: Any, fn: Callable[[torch.Tensor], Any]) -> Any:
    if isinstance(tree, torch.Tensor):
        return fn(tree)
    if isinstance(tree, (list, tuple)):
        return type(tree)([_replace(each, fn) for each in tree])
    if isinstance(tree, dict):
        return {key: _replace(each, fn) for key, each in tree.items()}
    return tree
