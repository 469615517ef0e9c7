"""What tensor parallelism refuses before anything is divided, because it would fail late or be wrong without a word."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from types import CodeType
from typing import Any, Literal

from torch import nn

from accel_parallel.tensor.styles import Style, resolve_style
from accel_state.errors import ConfigError

__all__ = ["Draft", "audit_plan", "fitting_sizes"]

_FUSED = re.compile(r"qkv|c_attn|query_key_value|gate_up|in_proj|wkv|w12|w13", re.IGNORECASE)
"""Names of matrices that hold several, one behind the other: a part of the rows is no part of each."""

_COUNTS = re.compile(r"(num|n)?_?((attention|attn|query|q|key_value|kv|k|v)_)?heads?(_num)?")
"""Names under which modules keep how many heads they have."""

_ATTENTION = re.compile(r"(^|[._])(self_?|cross_?)?att(n|ention)", re.IGNORECASE)

_HEADS = ("num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """A plan in the making, by fully qualified names; the model itself is called ``""``."""

    held: Mapping[str, nn.Module]
    """Every module."""
    modules: dict[str, Style]
    """Those with a style; what follows from them is added."""
    values: Mapping[str, Style]
    """Parameters and whole numbers with a style of their own."""
    derived: dict[str, str]
    """Why each of the modules that were added has its style."""
    trusted: Set[str]
    """Names to which the model's own plan gives the same style: its author knows the layout."""
    tp_size: int

    def parent(self, name: str) -> nn.Module:
        return self.held[name.rpartition(".")[0]]

    def weight(self, name: str) -> nn.Parameter:
        weight = self.held[name]._parameters["weight"]
        assert weight is not None
        return weight

    def widths(self, name: str) -> tuple[int, int]:
        """Sizes of a divided module's weight: along what is divided, and across."""
        dim = self.modules[name].weight_dim
        assert dim is not None
        return int(self.weight(name).shape[dim]), int(self.weight(name).shape[1 - dim])

    def children(self, name: str) -> dict[str, nn.Module]:
        return {f"{name}.{key}" if name else key: child for key, child in self.held[name].named_children()}


def audit_plan(draft: Draft) -> None:
    """Refuse a plan whose result would not be that of one process; complete it where only one completion is right.

    Raises:
        ConfigError: saying which module, why, and what to change.
    """
    _refuse_unsupported(draft)
    _refuse_sizes(draft)
    _refuse_unpaired(draft)
    _refuse_fused(draft)
    for name in draft.held:
        inside = [child for child in draft.children(name) if child in draft.modules]
        gives = any(draft.modules[child].exit == "divided" for child in inside)
        takes = any(draft.modules[child].entry == "divided" for child in inside)
        if gives and not set(inside) <= draft.trusted:
            _refuse_counts(draft, name)
        if gives and takes:
            _settle_neighbours(draft, name)


def fitting_sizes(sizes: Mapping[str, int]) -> list[int]:
    """The numbers of ranks, from 2, that divide all of `sizes`."""
    common = math.gcd(*sizes.values()) if sizes else 1
    return [size for size in range(2, common + 1) if common % size == 0]


def _refuse_unsupported(draft: Draft) -> None:
    if not any(style.divides for style in (*draft.modules.values(), *draft.values.values())):
        raise ConfigError(
            "The tensor-parallel plan divides nothing: every style in it leaves modules whole. Divide a Linear by "
            "'colwise' and the one behind it by 'rowwise', or set `tp_size=1`."
        )
    for name, module in draft.held.items():
        style = draft.modules.get(name)
        holder = draft.parent(name) if style is not None and style.divides else module
        if isinstance(module, nn.RNNBase) or (holder is not module and isinstance(holder, nn.MultiheadAttention)):
            raise ConfigError(
                f"`{name}` is in a {type(holder).__name__}, which reads the weights of its parts instead of calling "
                f"them, so it cannot be divided, nor an RNN stand beside divided ones. Write it with Linear modules."
            )
        if style is not None and style.kind in ("linear", "embedding"):
            _refuse_held_otherwise(draft, name, module, style)


def _refuse_held_otherwise(draft: Draft, name: str, module: nn.Module, style: Style) -> None:
    if "weight" not in module._parameters:
        raise ConfigError(
            f"`{name}` computes its weight by a parametrization, and dividing the result is not dividing what it is "
            f"computed from. Leave it out of the plan, or remove the parametrization."
        )
    twice = next((value for value in draft.values if value.rpartition(".")[0] == name), None)
    if twice is not None:
        raise ConfigError(
            f"The plan gives `{name}` the style {style.name!r} and names its own `{twice}` too. Leave one of them out."
        )
    for key in ("max_norm", "scale_grad_by_freq", "sparse"):
        if isinstance(module, nn.Embedding) and getattr(module, key):
            raise ConfigError(
                f"`{name}` has `{key}={getattr(module, key)}`, which needs the whole table, and {style.name!r} divides "
                f"it. Leave `{key}` out, or `{name}` out of the plan."
            )


def _refuse_sizes(draft: Draft) -> None:
    sizes: dict[str, int] = {}
    for name, style in draft.modules.items():
        if style.divides:
            sizes.update(_sizes_of(draft, name, style))
    for name, style in draft.values.items():
        if style.divides:
            value = getattr(draft.parent(name), name.rpartition(".")[2])
            sizes[name] = value if isinstance(value, int) else (value.shape[0] if value.dim() else 1)
    wrong = next((label for label, size in sizes.items() if size % draft.tp_size), None)
    if wrong is None:
        return
    fitting = " or ".join(map(str, fitting_sizes(sizes)))
    remedy = f"Set `tp_size` to {fitting}" if fitting else "No size divides everything in the plan: make them multiples"
    raise ConfigError(
        f"`tp_size={draft.tp_size}` does not divide `{wrong}={sizes[wrong]}`, and every rank needs an equal, whole "
        f"part. {remedy}; or leave the modules concerned out of the plan."
    )


def _sizes_of(draft: Draft, name: str, style: Style) -> Iterator[tuple[str, int]]:
    """What must be divisible for one module, by the names that users know."""
    parent, (size, _) = draft.parent(name), draft.widths(name)
    config = _config_of(parent, draft.held[""])
    if "divided" in (style.entry, style.exit):
        head_dim = getattr(parent, "head_dim", None)
        if isinstance(head_dim, int) or _ATTENTION.search(name):
            yield from ((key, getattr(config, key)) for key in _HEADS if isinstance(getattr(config, key, None), int))
        if isinstance(head_dim, int) and head_dim > 0 and size % head_dim == 0:
            yield f"{name}.heads", size // head_dim
    key = "intermediate_size" if "divided" in (style.entry, style.exit) else "vocab_size"
    yield key if getattr(config, key, None) == size else f"{name}.weight.shape[{style.weight_dim}]", size


def _config_of(parent: nn.Module, model: nn.Module) -> Any:
    config = getattr(parent, "config", None) or getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    return text() if callable(text) else config


def _refuse_unpaired(draft: Draft) -> None:
    for name, style in draft.modules.items():
        if style.exit == "divided" and not _has_partner(draft, name, "entry"):
            raise ConfigError(
                f"`{name}` is {style.name!r}, so each rank has a part of its output, and no 'rowwise' module beside or "
                f"behind it takes parts: what follows would be computed from a part. Use 'colwise_gather_output' for "
                f"it, or make the module behind it 'rowwise'."
            )
        if style.entry == "divided" and not _has_partner(draft, name, "exit"):
            raise ConfigError(
                f"`{name}` is {style.name!r}, so it takes each rank's part of its input, and no 'colwise' module "
                f"beside or before it gives parts. Use 'rowwise_split_input' for it, or make the module before it "
                f"'colwise'."
            )


def _has_partner(draft: Draft, name: str, end: Literal["entry", "exit"]) -> bool:
    """Whether a sibling takes (or gives) parts, or a module registered later (or earlier) within the same layer."""
    order = {each: index for index, each in enumerate(draft.held)}
    partners = [other for other, style in draft.modules.items() if getattr(style, end) == "divided"]
    parent = name.rpartition(".")[0]
    if any(other.rpartition(".")[0] == parent for other in partners):
        return True
    while parent and not _holds_layers(draft.held[parent]):
        for other in partners:
            if other.startswith(f"{parent}.") and (order[other] > order[name]) == (end == "entry"):
                return True
        parent = parent.rpartition(".")[0]
    return False


def _holds_layers(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList) or (isinstance(module, nn.ModuleDict) and all(map(str.isdigit, module)))


def _refuse_fused(draft: Draft) -> None:
    for name, style in draft.modules.items():
        if style.name == "colwise" and name not in draft.trusted and _FUSED.search(name.rpartition(".")[2]):
            raise ConfigError(
                f"`{name}` is 'colwise', and by its name it holds several matrices in one. Where these lie one behind "
                f"the other, a rank's rows are not a part of each, and the result would be wrong. Use "
                f"'colwise_gather_output' and, behind it, 'rowwise_split_input'; or 'colwise_by_head' if its rows are "
                f"laid out head by head."
            )


def _refuse_counts(draft: Draft, name: str) -> None:
    parent = draft.held[name]
    read = {word for code in _code_of(type(parent)) for word in _names_in(code)}
    for key, value in vars(parent).items():
        full = f"{name}.{key}" if name else key
        if isinstance(value, bool) or not isinstance(value, int) or value < 2 or full in draft.values:
            continue
        if key in read and _COUNTS.fullmatch(key):
            raise ConfigError(
                f"`{name or type(parent).__name__}` is divided over {draft.tp_size} ranks, and its code reads "
                f"`{key}={value}`, which counts the heads of all of them. Let it reshape to `(..., -1, head_dim)`; or "
                f"add '{full}': 'divide' to the plan, so that each rank reads {value // draft.tp_size}, or "
                f"'{full}': 'replicate' if the whole number is right."
            )


def _code_of(kind: type) -> Iterator[CodeType]:
    """The code of every method but ``__init__``, decorated ones too."""
    for base in kind.__mro__:
        if base in (nn.Module, object):
            continue
        for key, value in vars(base).items():
            while hasattr(value, "__wrapped__"):
                value = value.__wrapped__
            code = getattr(value, "__code__", None)
            if isinstance(code, CodeType) and key != "__init__":
                yield code


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _settle_neighbours(draft: Draft, name: str) -> None:
    """Parameters that may act on a rank's part have a gradient of that part only: sum it, or ask."""
    children = draft.children(name)
    for child, module in {name: draft.held[name], **children}.items():
        composed = child != name and any(True for inner in module.children() for _ in inner.parameters())
        if child in draft.modules or composed:  # the shapes inside a composed one say nothing of what it is given
            continue
        open_ = [
            f"{child}.{key}" if child else key
            for key, parameter in module.named_parameters(recurse=child != name)
            if _may_act_on_part(draft, name, tuple(_acting(module, parameter.shape)))
        ]
        unclear = next((full for full in open_ if full not in draft.values), None)
        if unclear is None:
            continue
        head_dim = getattr(draft.held[name], "head_dim", None)
        if child != name and {tuple(each.shape) for each in module.parameters()} == {(head_dim,)}:
            draft.modules[child] = resolve_style("replicated_with_grad_allreduce", target=child)
            draft.derived[child] = "acts inside each head, and each rank has some of the heads"
            continue
        raise ConfigError(
            f"`{unclear}` lies beside divided modules in `{name or type(draft.held[name]).__name__}`, and its shape "
            f"leaves open whether it acts on each rank's part. Add '{unclear if child == name else child}' to the "
            f"plan: 'replicate' if it acts before or behind the divided part, or 'replicated_with_grad_allreduce' if "
            f"inside it, where each rank has a part of its gradient."
        )


def _acting(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of a parameter that meet those of an activation: of a table, not its rows."""
    return shape[-1:] if isinstance(module, nn.Embedding) else shape


def _may_act_on_part(draft: Draft, parent: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter of such a shape could be used with a part of the width without an error."""
    widths = [draft.widths(child) for child in draft.children(parent) if _passes_parts(draft, child)]
    parts = {divided // draft.tp_size for divided, _ in widths}
    whole = {across for _, across in widths}
    head_dim = getattr(draft.held[parent], "head_dim", None)
    if math.prod(shape) == 1:
        return True
    return any(
        size == head_dim or (size not in whole and any(part % size == 0 for part in parts))
        for size in shape
        if size > 1
    )


def _passes_parts(draft: Draft, name: str) -> bool:
    style = draft.modules.get(name)
    return style is not None and "divided" in (style.entry, style.exit)
