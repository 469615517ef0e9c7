"""Which modules tensor parallelism divides, and how: read from a mapping or from the model. No process is needed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, Literal

from torch import nn

from accel_parallel.tensor.audit import Draft, audit_plan
from accel_parallel.tensor.styles import Style, resolve_style
from accel_state.errors import ConfigError

__all__ = ["DividedParameter", "TensorPlan", "match_plan", "plan_tensor_parallel"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DividedParameter:
    """One parameter and a rank's part of it."""

    shape: tuple[int, ...]
    """Of the whole."""
    local_shape: tuple[int, ...]
    """Of each rank's part."""
    dim: int | None
    """Along which it is divided; ``None``: every rank holds the whole."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorPlan:
    """What `apply_tensor_parallel` does to a model, by fully qualified names. ``print(plan)`` shows it."""

    tp_size: int
    """Ranks that share each matrix."""
    origin: Literal["given", "model"]
    """Whether the user wrote it, or the model brought it."""
    modules: Mapping[str, Style]
    """Every module that the plan names, or that follows from one."""
    values: Mapping[str, Style]
    """Parameters and whole numbers, held by modules themselves, that the plan names."""
    parameters: Mapping[str, DividedParameter]
    """Every parameter of the model, once, by the first of its names."""
    derived: Mapping[str, str]
    """Modules that no pattern named, and why they have the style they have."""
    unmatched: tuple[str, ...]
    """Patterns of the model's own plan for parts that this model lacks. (In a given plan, these are refused.)"""

    def __str__(self) -> str:
        source = "given" if self.origin == "given" else "the model's own"
        lines = [f"tensor parallel over {self.tp_size} ranks ({source} plan)"]
        for name, style in {**self.modules, **self.values}.items():
            reason = f"  ({self.derived[name]})" if name in self.derived else ""
            lines.append(f"  {name}: {style.name}{reason}")
        divided = sum(1 for each in self.parameters.values() if each.dim is not None)
        lines.append(f"  {divided} of {len(self.parameters)} parameters are divided")
        return "\n".join(lines)


def plan_tensor_parallel(
    model: nn.Module, *, plan: Mapping[str, str] | None = None, tp_size: int, loss_parallel: bool = False
) -> TensorPlan:
    """Decide how `model` is divided over `tp_size` ranks, and refuse what would not be exact. Changes nothing.

    Args:
        model: any module, on the meta device too.
        plan: style by pattern of names, in which ``*`` stands for one component, such as a layer's number; a full name
            has precedence over a pattern. ``None`` takes the plan that the model brings, as models of transformers do.
        tp_size: number of ranks.
        loss_parallel: leave the output layer's logits divided by vocabulary; see `loss_parallel`.

    Raises:
        ConfigError: for names that match nothing, styles that are not supported, sizes that `tp_size` does not divide,
            and divisions whose result would be another than that of one process.
    """
    if isinstance(tp_size, bool) or not isinstance(tp_size, int) or tp_size < 2:
        raise ConfigError(f"`tp_size={tp_size!r}` divides nothing. Give a number of at least 2, or leave it out.")
    origin: Literal["given", "model"] = "model" if plan is None else "given"
    patterns = _plan_of(model) if plan is None else dict(plan)
    if not patterns:
        raise ConfigError(
            f"{type(model).__name__} brings no tensor-parallel plan, and `tp_plan={plan}` names nothing. Give "
            f"`tp_plan`, such as {{'layers.*.up': 'colwise', 'layers.*.down': 'rowwise'}}."
        )
    targets = _Targets(model)
    matched, unmatched = match_plan(patterns, list(targets.names), strict=origin == "given")
    if not matched:
        raise ConfigError(_no_plan_for(model, unmatched))
    modules: dict[str, Style] = {}
    values: dict[str, Style] = {}
    for name, style in matched.items():
        (modules if name in targets.modules else values)[name] = targets.check(name, style)
    derived: dict[str, str] = {}
    if loss_parallel:
        _keep_logits_divided(model, targets, modules)
    _follow_ties(targets, modules, derived)
    own, _ = (matched, ()) if plan is None else match_plan(_plan_of(model), list(targets.names), strict=False)
    trusted = {name for name, style in matched.items() if own.get(name) == style}
    targets.refuse_other_embeddings(modules, trusted)
    audit_plan(
        Draft(
            held={"": model, **targets.modules},
            modules=modules,
            values=values,
            derived=derived,
            trusted=trusted,
            tp_size=tp_size,
        )
    )
    return TensorPlan(
        tp_size=tp_size,
        origin=origin,
        modules=MappingProxyType(modules),
        values=MappingProxyType(values),
        parameters=MappingProxyType(_divide(targets, modules, values, tp_size)),
        derived=MappingProxyType(derived),
        unmatched=tuple(unmatched),
    )


def match_plan(
    patterns: Mapping[str, str], names: Sequence[str], *, strict: bool = True
) -> tuple[dict[str, str], list[str]]:
    """The style of each name that a pattern matches, in the order of `names`, and the patterns that match none.

    Raises:
        ConfigError: for a pattern that matches nothing, where `strict`, with the nearest name; and for a name to which
            two patterns give different styles.
    """
    known = set(names)
    exact = {pattern for pattern in patterns if pattern in known}
    found: dict[str, tuple[str, str]] = {name: (patterns[name], name) for name in exact}
    unmatched = []
    for pattern, style in patterns.items():
        if pattern in exact:
            continue
        expression = re.compile("[^.]+".join(re.escape(part) for part in pattern.split("*")))
        matches = [name for name in names if expression.fullmatch(name)]
        if not matches:
            unmatched.append(pattern)
        for name in matches:
            earlier = found.setdefault(name, (style, pattern))
            if earlier[0] != style and name not in exact:
                raise ConfigError(
                    f"The plan gives `{name}` the style {earlier[0]!r} by '{earlier[1]}' and {style!r} by '{pattern}'. "
                    f"Make one of the patterns narrower, or add the full name, which has precedence."
                )
    if unmatched and strict:
        raise ConfigError(_no_match(unmatched[0], names))
    return {name: found[name][0] for name in names if name in found}, unmatched


class _Targets:
    """What a plan may name in a model: modules, and parameters and whole numbers that these hold themselves."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = {name: module for name, module in model.named_modules(remove_duplicate=False) if name}
        self.root = model
        held = {"": model, **self.modules}
        self.values: dict[str, nn.Parameter | int] = {}
        for name, module in held.items():
            prefix = f"{name}." if name else ""
            for key, value in vars(module).items():
                if isinstance(value, int) and not isinstance(value, bool):
                    self.values[f"{prefix}{key}"] = value
            held_here = module._parameters.items()
            self.values.update((f"{prefix}{key}", value) for key, value in held_here if value is not None)

    @property
    def names(self) -> Iterable[str]:
        return (*self.modules, *self.values)

    def check(self, name: str, style_name: str) -> Style:
        """The style, if it is one for what `name` is."""
        module = self.modules.get(name)
        other: Literal["embedding", "value"] | None
        other = "value" if module is None else "embedding" if isinstance(module, nn.Embedding) else None
        style = resolve_style(style_name, target=name, kind=other)
        if module is None:
            self._check_value(name, style)
        elif style.kind == "value":
            raise ConfigError(
                f"The plan gives the module `{name}` the style {style.name!r}, which is for a parameter or a number "
                f"that a module holds itself. Use 'colwise' or 'rowwise' for a Linear."
            )
        elif style.kind == "linear" and not _is(module, nn.Linear):
            raise ConfigError(_wrong_kind(name, module, style, "torch.nn.Linear"))
        elif style.kind == "embedding" and not isinstance(module, nn.Embedding):
            raise ConfigError(_wrong_kind(name, module, style, "torch.nn.Embedding"))
        return style

    def refuse_other_embeddings(self, modules: Mapping[str, Style], trusted: Set[str]) -> None:
        """A table whose forward is its own may do with an index what a part of the table cannot."""
        for name, style in modules.items():
            if style.kind == "embedding" and name not in trusted and not _is(self.modules[name], nn.Embedding):
                raise ConfigError(_wrong_kind(name, self.modules[name], style, "torch.nn.Embedding"))

    def _check_value(self, name: str, style: Style) -> None:
        whole_number = isinstance(self.values[name], int)
        if style.kind == "value" or (style.kind == "any" and not (whole_number and style.sums_gradients)):
            return
        kind = "a whole number" if whole_number else "a parameter"
        others = "'divide' or 'replicate'" if whole_number else "'divide', 'replicate' or a style for its module"
        raise ConfigError(f"The plan gives `{name}` the style {style.name!r}, but it is {kind}. Use {others}.")


def _is(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` computes what `kind` does."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def _wrong_kind(name: str, module: nn.Module, style: Style, wanted: str) -> str:
    return (
        f"The plan gives `{name}` the style {style.name!r}, which divides a {wanted}, but it is a "
        f"{type(module).__module__}.{type(module).__qualname__}, whose forward is another. Leave it out of the plan, "
        f"or replace it by a {wanted}."
    )


def _no_match(pattern: str, names: Sequence[str]) -> str:
    general = sorted({re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", name) for name in names})
    nearest = get_close_matches(pattern, general, n=1, cutoff=0.0)
    hint = f" The nearest is '{nearest[0]}'." if nearest else ""
    return (
        f"'{pattern}' in the tensor-parallel plan matches nothing in the model.{hint} Correct the name (`*` stands for "
        f"one component), or leave it out."
    )


def _no_plan_for(model: nn.Module, patterns: Sequence[str]) -> str:
    name = type(model).__name__
    inside = f"as inside a wrapper, such as one of peft, whose own matrices `{patterns[0]}` says nothing of"
    return (
        f"None of the {len(patterns)} patterns of the tensor-parallel plan that {name} brings matches: its modules are "
        f"called otherwise, {inside}. Divide the model that is wrapped, without the wrapper; or give `tp_plan` with "
        f"the names of this one; or shard it (`dp_shard_size`) instead."
    )


def _plan_of(model: nn.Module) -> dict[str, str]:
    """The plan that a model brings, as those of transformers do: whole, or that of its base model in its config."""
    for attribute in ("tp_plan", "_tp_plan"):
        found = getattr(model, attribute, None)
        if isinstance(found, Mapping) and found:
            return dict(found)
    found = getattr(getattr(model, "config", None), "base_model_tp_plan", None)
    if not isinstance(found, Mapping):
        return {}
    base = getattr(model, "base_model_prefix", "")
    prefix = f"{base}." if base and isinstance(getattr(model, base, None), nn.Module) else ""
    return {f"{prefix}{pattern}": style for pattern, style in found.items()}


def _keep_logits_divided(model: nn.Module, targets: _Targets, modules: dict[str, Style]) -> None:
    """Turn the output layer's gathered logits into divided ones."""
    embeddings: Any = getattr(model, "get_output_embeddings", None)
    head = embeddings() if callable(embeddings) else None
    linear = [name for name, style in modules.items() if style.kind == "linear" and style.weight_dim == 0]
    gathered = [name for name in linear if modules[name].exit in ("gathered", "kept")]
    names = gathered if head is None else [name for name in linear if targets.modules[name] is head]
    if not names:
        raise ConfigError(
            f"`loss_parallel=True` was set, but the plan divides no output layer of {type(model).__name__} by "
            f"vocabulary. Add it to the plan, such as {{'lm_head': 'colwise_gather_output'}}, or leave "
            f"`loss_parallel` out."
        )
    modules[names[-1]] = resolve_style("colwise_keep_output", target=names[-1])


def _follow_ties(targets: _Targets, modules: dict[str, Style], derived: dict[str, str]) -> None:
    """Let modules that share a weight share its division, as they share its gradient.

    Raises:
        ConfigError: where they cannot.
    """
    holders: dict[int, list[str]] = {}
    for name, module in targets.modules.items():
        weight = module._parameters.get("weight")
        if weight is not None:
            holders.setdefault(id(weight), []).append(name)
    for names in holders.values():
        dims = {modules[name].weight_dim for name in names if name in modules}
        first = next((name for name in names if name in modules), None)
        if len(names) == 1 or first is None or dims == {None}:
            continue
        for name in names:
            if name not in modules and modules[first].weight_dim == 0:
                module = targets.modules[name]
                follower = {nn.Embedding: "embedding_rowwise", nn.Linear: "colwise_gather_output"}
                chosen = next((style for kind, style in follower.items() if _is(module, kind)), None)
                if chosen is not None:
                    modules[name] = resolve_style(chosen, target=name)
                    derived[name] = f"shares its weight with {first}"
            if name not in modules or modules[name].weight_dim != modules[first].weight_dim:
                present = modules[name].name if name in modules else None
                raise ConfigError(
                    f"`{first}` ({modules[first].name!r}) and `{name}` ({present!r}) share one weight, and would "
                    f"divide it in different ways. Divide both by vocabulary ('embedding_rowwise' for the embedding, "
                    f"'colwise_gather_output' for the output layer), or neither."
                )


def _divide(
    targets: _Targets, modules: Mapping[str, Style], values: Mapping[str, Style], tp_size: int
) -> dict[str, DividedParameter]:
    dims: dict[int, int | None] = {}
    for name, style in modules.items():
        for key, parameter in targets.modules[name]._parameters.items():
            if parameter is not None and style.divides:
                dims[id(parameter)] = style.bias_dim if key == "bias" else style.weight_dim
    for name, style in values.items():
        if style.divides:
            dims[id(targets.values[name])] = style.weight_dim
    result = {}
    for name, parameter in targets.root.named_parameters():
        dim = dims.get(id(parameter))
        shape = tuple(parameter.shape)
        local = tuple(size // tp_size if index == dim else size for index, size in enumerate(shape))
        result[name] = DividedParameter(shape=shape, local_shape=local, dim=dim)
    return result
