"""Whose parameters are whose: the weights of a model by unit, without reading any value."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn

from accel_parallel.auto.profile import BlockKind, DTypeName, Weights
from accel_state.blocks import find_blocks, outermost

__all__ = ["Census", "take_census"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Census:
    """The units of a model."""

    blocks: tuple[nn.Module, ...]
    """Repeated units in the order in which they were defined, which is taken for that of forward."""
    kind_of: tuple[int, ...]
    """Index in `kinds` of each block."""
    kinds: tuple[BlockKind, ...]
    root: Weights
    root_sizes: Mapping[str, int]
    """Elements of each trained parameter outside of blocks, by each of its names."""
    tied_share: float
    """Part of the root's trained elements that have several names."""
    buffer_bytes: int
    dtype: DTypeName
    hidden_size: int | None
    num_heads: int | None
    num_kv_heads: int | None


def take_census(model: nn.Module, *, divided: Collection[str] = ()) -> Census:
    """Count parameters, a tied one once. One that several blocks share belongs to the root, as when it is sharded.

    Args:
        model: any module.
        divided: names of parameters that tensor parallel divides.
    """
    blocks = outermost(find_blocks(model))
    places: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(parameter, []).append(name)
    homes: dict[int | None, list[tuple[nn.Parameter, bool]]] = {None: []}
    for parameter, names in places.items():
        inside = {_block_of(name, blocks) for name in names}
        home = inside.pop() if len(inside) == 1 else None
        homes.setdefault(home, []).append((parameter, any(name in divided for name in names)))
    weights = [_weigh(homes.get(index, ())) for index in range(len(blocks))]
    kinds = Counter(zip((type(block).__name__ for _, block in blocks), weights, strict=True))
    order = list(kinds)
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    root = {id(parameter): len(places[parameter]) > 1 for parameter, _ in homes[None] if parameter.requires_grad}
    tied = sum(parameter.numel() for parameter, _ in homes[None] if root.get(id(parameter)))
    outside = _weigh(homes[None])
    return Census(
        blocks=tuple(block for _, block in blocks),
        kind_of=tuple(
            order.index((type(block).__name__, each)) for (_, block), each in zip(blocks, weights, strict=True)
        ),
        kinds=tuple(BlockKind(name=name, count=count, weights=each) for (name, each), count in kinds.items()),
        root=outside,
        root_sizes={
            name: parameter.numel() for parameter, names in places.items() for name in names if id(parameter) in root
        },
        tied_share=tied / outside.trainable_numel if tied else 0.0,
        buffer_bytes=sum(buffer.numel() * buffer.element_size() for buffer in model.buffers()),
        dtype=_most_common_dtype(places),
        hidden_size=_number(config, "hidden_size", "n_embd", "d_model"),
        num_heads=_number(config, "num_attention_heads", "n_head", "num_heads"),
        num_kv_heads=_number(config, "num_key_value_heads"),
    )


def _block_of(name: str, blocks: list[tuple[str, nn.Module]]) -> int | None:
    return next((index for index, (block, _) in enumerate(blocks) if name.startswith(f"{block}.")), None)


def _weigh(members: Iterable[tuple[nn.Parameter, bool]]) -> Weights:
    held = list(members)
    trained = [parameter for parameter, _ in held if parameter.requires_grad]
    return Weights(
        numel=sum(parameter.numel() for parameter, _ in held),
        size_bytes=sum(parameter.numel() * parameter.element_size() for parameter, _ in held),
        trainable_numel=sum(parameter.numel() for parameter in trained),
        trainable_bytes=sum(parameter.numel() * parameter.element_size() for parameter in trained),
        tp_numel=sum(parameter.numel() for parameter, along_tp in held if along_tp),
    )


def _most_common_dtype(parameters: Iterable[nn.Parameter]) -> DTypeName:
    sizes: Counter[str] = Counter()
    for parameter in parameters:
        sizes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    known: tuple[DTypeName, ...] = get_args(DTypeName)
    return max(known, key=lambda name: (sizes[name], name == "float32"))


def _number(config: Any, *names: str) -> int | None:
    """The first of these entries of a model's configuration that is a number."""
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), None)
