"""A model as a chain of layers that are not split: what the planners see of it. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from accel_state.dtypes import dtype_size_bytes, parse_dtype

__all__ = ["Chain", "ChainBuilder", "Layer", "Unit"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """What lies in one place: a block, a module without parts, or a tensor that a larger module holds itself."""

    name: str
    """Full name of the module or of the tensor."""
    kind: str
    """Name of its class."""
    weight_bytes: int
    """Of its parameters in the dtype that is planned for, each once."""
    buffer_bytes: int
    """Of its buffers."""
    matrix_elements: float
    """Numbers that each token is multiplied with; of experts, those that a token visits."""
    wide: int
    """Longest side of its matrices: the most features that a token has inside."""
    narrow: int
    """Features of a token between layers, as far as shapes tell."""
    is_block: bool
    """Whether it is a repeated unit of the model."""
    is_lookup: bool
    """Whether rows of a table are read, as in an embedding, instead of multiplied."""

    @property
    def total_bytes(self) -> int:
        """Of parameters and buffers."""
        return self.weight_bytes + self.buffer_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """Layers that share tensors and so lie in one place; most units are one layer."""

    layers: tuple[int, ...]
    """Their numbers in the chain, ascending."""
    weight_bytes: int
    """With what they share counted once."""
    buffer_bytes: int
    """The same of buffers."""


@dataclass(frozen=True, kw_only=True)
class Chain:
    """All layers in the order of the model, and which of them hang together."""

    layers: tuple[Layer, ...]
    """In the order in which the model defines them, which is the order of execution as far as can be told."""
    units: tuple[Unit, ...]
    """In the order of their first layers."""
    ties: tuple[tuple[str, ...], ...]
    """Names of tensors that are one and lie in different layers."""
    dtype: torch.dtype
    """Of most of the weights."""

    @cached_property
    def total_bytes(self) -> int:
        """Of all parameters and buffers, tied ones once."""
        return sum(unit.weight_bytes + unit.buffer_bytes for unit in self.units)

    @cached_property
    def unit_of_layer(self) -> tuple[int, ...]:
        """The unit of each layer."""
        found = [0] * len(self.layers)
        for number, unit in enumerate(self.units):
            for layer in unit.layers:
                found[layer] = number
        return tuple(found)

    @cached_property
    def hidden(self) -> int:
        """Features of a token between layers."""
        widths = Counter(layer.narrow for layer in self.layers if layer.is_block and layer.matrix_elements)
        widths = widths or Counter(layer.narrow for layer in self.layers if layer.matrix_elements)
        return widths.most_common(1)[0][0] if widths else 0

    def block_groups(self) -> list[list[int]]:
        """Numbers of the blocks, those of one list together: an encoder's, then a decoder's."""
        groups: dict[str, list[int]] = {}
        for number, layer in enumerate(self.layers):
            if layer.is_block:
                groups.setdefault(layer.name.rpartition(".")[0], []).append(number)
        return list(groups.values())


class ChainBuilder:
    """Collects layers and their tensors one after the other.

    Args:
        dtype: what floating-point tensors are converted to; ``None`` leaves them.
        special_dtypes: exceptions by name.
        tied_names: groups of names of tensors that are to count as one, besides those with one identity.
        expert_share: part of its experts that a token visits.
    """

    def __init__(
        self,
        *,
        dtype: torch.dtype | str | None = None,
        special_dtypes: Mapping[str, torch.dtype | str] | None = None,
        tied_names: Iterable[Sequence[str]] = (),
        expert_share: float = 1.0,
    ) -> None:
        self._dtype = None if dtype is None else parse_dtype(dtype)
        self._special = {name: parse_dtype(each) for name, each in (special_dtypes or {}).items()}
        self._tied = {name: ("tied", group[0]) for group in tied_names for name in group}
        self._share = expert_share
        self._element_bytes: dict[torch.dtype, float] = {}
        self._shapes: dict[tuple[object, ...], tuple[float, int, int]] = {}
        self._by_dtype: dict[torch.dtype, int] = {}
        self._layers: list[Layer] = []
        self._owner: dict[Hashable, tuple[int, str, int, bool]] = {}
        self._shared: dict[Hashable, list[tuple[int, str]]] = {}
        self._reset()

    def add_tensor(
        self,
        name: str,
        identity: Hashable,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        is_buffer: bool = False,
        is_expert: bool = False,
    ) -> None:
        """A tensor of the layer that is being collected. One that it has already is not counted again."""
        if self._tied:
            identity = self._tied.get(name, identity)
        number = len(self._layers)
        owner = self._owner.get(identity)
        if owner is not None and (owner[0] == number or self._shared.get(identity, [owner[:2]])[-1][0] == number):
            return
        special = self._special.get(name) if self._special else None
        each = self._bytes_of(dtype) if special is None else dtype_size_bytes(special)
        count = math.prod(shape)
        size = math.ceil(count * each)
        if is_buffer:
            self._buffer_bytes += size
        else:
            self._weight_bytes += size
            self._by_dtype[dtype] = self._by_dtype.get(dtype, 0) + count
            self._sides.append((shape, is_expert))
        if owner is None:
            self._owner[identity] = (number, name, size, is_buffer)
        else:
            self._shared.setdefault(identity, [owner[:2]]).append((number, name))

    def end_layer(self, name: str, kind: str, *, is_block: bool = False, is_lookup: bool = False) -> None:
        """The tensors since the last layer are those of this one."""
        key = (*self._sides, is_block, is_lookup)
        if key not in self._shapes:
            self._shapes[key] = _measure(self._sides, self._share, is_block=is_block, is_lookup=is_lookup)
        elements, wide, narrow = self._shapes[key]
        self._layers.append(
            Layer(
                name=name,
                kind=kind,
                weight_bytes=self._weight_bytes,
                buffer_bytes=self._buffer_bytes,
                matrix_elements=elements,
                wide=wide,
                narrow=narrow,
                is_block=is_block,
                is_lookup=is_lookup,
            )
        )
        self._reset()

    def finish(self) -> Chain:
        """The chain of what was collected."""
        root = list(range(len(self._layers)))
        for holders in self._shared.values():
            _join(root, [layer for layer, _ in holders])
        members: dict[int, list[int]] = {}
        for number in range(len(root)):
            members.setdefault(_find(root, number), []).append(number)
        twice: dict[int, list[int]] = {}
        for identity, holders in self._shared.items():
            _, _, size, is_buffer = self._owner[identity]
            over = twice.setdefault(_find(root, holders[0][0]), [0, 0])
            over[is_buffer] += size * (len(holders) - 1)
        held = max(self._by_dtype, key=self._by_dtype.__getitem__, default=torch.get_default_dtype())
        return Chain(
            layers=tuple(self._layers),
            units=tuple(self._unit(layers, twice.get(first, [0, 0])) for first, layers in members.items()),
            ties=tuple(tuple(name for _, name in holders) for holders in self._shared.values()),
            dtype=self._dtype if self._dtype is not None and held.is_floating_point else held,
        )

    def _unit(self, numbers: list[int], over: list[int]) -> Unit:
        layers = [self._layers[number] for number in numbers]
        return Unit(
            layers=tuple(numbers),
            weight_bytes=sum(layer.weight_bytes for layer in layers) - over[0],
            buffer_bytes=sum(layer.buffer_bytes for layer in layers) - over[1],
        )

    def _reset(self) -> None:
        self._sides: list[tuple[tuple[int, ...], bool]] = []
        self._weight_bytes = self._buffer_bytes = 0

    def _bytes_of(self, dtype: torch.dtype) -> float:
        found = self._element_bytes.get(dtype)
        if found is None:
            converted = self._dtype if self._dtype is not None and dtype.is_floating_point else dtype
            found = self._element_bytes[dtype] = dtype_size_bytes(converted)
        return found


def _measure(
    shapes: Sequence[tuple[tuple[int, ...], bool]], share: float, *, is_block: bool, is_lookup: bool
) -> tuple[float, int, int]:
    """Elements that a token is multiplied with, and the widest and the usual number of its features."""
    matrices = [(shape, is_expert) for shape, is_expert in shapes if len(shape) >= 2]
    if not matrices:
        longest = max((math.prod(shape) for shape, _ in shapes), default=0)
        return 0.0, longest, longest
    if is_lookup:
        width = matrices[0][0][-1]
        return 0.0, width, width
    elements = sum(math.prod(shape) * (share if is_expert else 1.0) for shape, is_expert in matrices)
    # Experts are stacked in three dims, and a matrix of one is what the last two are.
    sides = [side for shape, _ in matrices for side in (shape[-2:] if len(shape) == 3 else (shape[0], shape[1]))]
    wide = max(sides)
    counts = Counter(sides)
    usual = max(counts, key=lambda side: (counts[side], -side))
    return elements, wide, usual if is_block else min(sides)


def _find(root: list[int], number: int) -> int:
    while root[number] != number:
        number = root[number]
    return number


def _join(root: list[int], numbers: Sequence[int]) -> None:
    """Make the smallest of the roots the root of all."""
    roots = sorted({_find(root, number) for number in numbers})
    for each in roots[1:]:
        root[each] = roots[0]
