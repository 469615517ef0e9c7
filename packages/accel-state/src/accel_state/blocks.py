"""The repeated units of a model, which sharding, compilation and activation checkpointing all work on."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable

from torch import nn

from accel_state.errors import ConfigError

__all__ = ["find_blocks", "outermost"]


def find_blocks(
    model: nn.Module,
    *,
    classes: str | type[nn.Module] | Iterable[str | type[nn.Module]] | None = None,
    min_num_params: int | None = None,
) -> list[tuple[str, nn.Module]]:
    """The repeated units of `model` with their fully qualified names.

    The first of these that is given, or that the model has:

    1. `classes`: all modules of these classes or of subclasses, as classes or as names of classes.
    2. `min_num_params`: the smallest modules with at least that many parameters that are not in a smaller one already.
    3. The model's own list of what must not be split (``_no_split_modules`` of the model or of models inside it).
    4. The members of each ``ModuleList``, and of each ``ModuleDict`` with numbers as keys, that holds two of one class
       or more, whatever the others are; of a ``Sequential``, whose ends tend to differ, only those whose class it
       holds twice or more. The outermost such modules, and only those with parameters.

    The model itself is never among them, nor is a module without a forward, such as ``ModuleList``, which nobody calls.
    Order is that of ``named_modules``: a block comes before those inside it, and blocks follow each other as they were
    defined, alike on every rank. Blocks lie inside each other only by class or by size; see `outermost`. Empty where a
    model has no such units. Reads no values, so a model on the meta device will do.

    Raises:
        ConfigError: for a class that no module has, and for settings that contradict each other.
    """
    if classes is not None and min_num_params is not None:
        raise ConfigError(
            f"Blocks were asked for both by class ({_spelled(_as_tuple(classes))}) and by size "
            f"(`min_num_params={min_num_params}`), and a block has one or the other. Give one of them."
        )
    if classes is not None:
        return _of_classes(model, _as_tuple(classes))
    if min_num_params is not None:
        return _of_size(model, min_num_params)
    named = list(model.named_modules())
    return _unsplit(model, named) or _repeated(model, named)


def outermost(blocks: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Those of `blocks`, in any order, that lie inside no other one, in the order given."""
    given = list(blocks)
    names = {name for name, _ in given}
    return [(name, block) for name, block in given if not any(above in names for above in _ancestors(name))]


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts))]


Named = list[tuple[str, nn.Module]]


def _candidates(model: nn.Module, named: Named) -> Named:
    return [(name, module) for name, module in named if module is not model and _is_called(module)]


def _is_called(module: nn.Module) -> bool:
    return type(module).forward is not nn.Module.forward


def _as_tuple(
    classes: str | type[nn.Module] | Iterable[str | type[nn.Module]],
) -> tuple[str | type[nn.Module], ...]:
    return (classes,) if isinstance(classes, (str, type)) else tuple(classes)


def _spelled(classes: Iterable[str | type[nn.Module]]) -> str:
    return ", ".join(f"`{each if isinstance(each, str) else each.__name__}`" for each in classes)


def _of_classes(model: nn.Module, classes: tuple[str | type[nn.Module], ...]) -> list[tuple[str, nn.Module]]:
    if not classes:
        raise ConfigError(
            "Blocks were asked for by class with an empty list, which no module matches. Name the class of a block, "
            "or leave it out to have blocks found."
        )
    candidates = _candidates(model, list(model.named_modules()))
    for each in classes:
        if not any(_is_of(module, each) for _, module in candidates):
            _refuse_class(model, each, {name for _, module in candidates for name in _class_names(module)})
    return [(name, module) for name, module in candidates if any(_is_of(module, each) for each in classes)]


def _is_of(module: nn.Module, wanted: str | type[nn.Module]) -> bool:
    return wanted in _class_names(module) if isinstance(wanted, str) else isinstance(module, wanted)


def _class_names(module: nn.Module) -> list[str]:
    """Names of the module's class and of those it derives from: sharding replaces the class by one derived from it."""
    line = type(module).__mro__
    return [each.__name__ for each in line[: line.index(nn.Module)]]


def _refuse_class(model: nn.Module, wanted: str | type[nn.Module], present: set[str]) -> None:
    name = wanted if isinstance(wanted, str) else wanted.__name__
    if _is_of(model, wanted):
        raise ConfigError(
            f"`{name}` is the class of the whole model, and blocks are parts of it. Name the class of its blocks, or "
            f"leave it out to have blocks found."
        )
    nearest = difflib.get_close_matches(name, sorted(present), n=1, cutoff=0.0)
    advice = f"The nearest name is `{nearest[0]}`; give" if nearest else "It has no parts that could be blocks; give"
    raise ConfigError(
        f"No module of `{type(model).__name__}` that is called has the class `{name}`, so it would make no block. "
        f"{advice} the class of a module inside the model, or leave it out to have blocks found."
    )


def _of_size(model: nn.Module, min_num_params: int) -> list[tuple[str, nn.Module]]:
    if isinstance(min_num_params, bool) or not isinstance(min_num_params, int) or min_num_params < 1:
        raise ConfigError(
            f"`min_num_params={min_num_params!r}` is not a number of parameters that a block could have. Give a "
            f"positive integer."
        )
    holders: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        holders.setdefault(parameter, []).append(name.rpartition(".")[0])
    # A parameter counts for the innermost module that has all its places, as two blocks cannot share a tied one.
    counts: Counter[str] = Counter()
    torn: set[str] = set()
    for parameter, places in holders.items():
        home = _common_ancestor(places)
        counts[home] += parameter.numel()
        inside = {above for place in places for above in (*_ancestors(place), place)}
        torn |= {each for each in inside if len(each) > len(home)}
    found = []
    for name, module in reversed(list(model.named_modules())):  # parts before the whole
        if name and counts[name] >= min_num_params and name not in torn and _may_be_alone(model, name, module):
            found.append((name, module))
        elif name:
            counts[name.rpartition(".")[0]] += counts[name]
    return found[::-1]


def _common_ancestor(names: list[str]) -> str:
    shared = []
    for level in zip(*(name.split(".") for name in names)):  # noqa: B905 - the shortest name ends it
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


def _may_be_alone(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether somebody calls the module: attention reads the weights of its parts without calling these."""
    parent = name.rpartition(".")[0]
    return _is_called(module) and not isinstance(model.get_submodule(parent), nn.MultiheadAttention)


def _unsplit(model: nn.Module, named: Named) -> Named:
    # Every part is asked, so the list is found through wrappers, and each model of a composite one has its say.
    # Classes are asked first: what a module does not have is looked for in three dictionaries, and fails slowly.
    having = {kind for kind in {type(module) for _, module in named} if hasattr(kind, "_no_split_modules")}
    lists = [
        _as_tuple(getattr(module, "_no_split_modules", None) or ())
        for _, module in named
        if type(module) in having or "_no_split_modules" in module.__dict__
    ]
    names = {name for each in lists for name in each}
    if not names:
        return []
    blocks = [(name, module) for name, module in _candidates(model, named) if names.intersection(_class_names(module))]
    return outermost(blocks)


def _repeated(model: nn.Module, named: Named) -> Named:
    members = {member for _, holder in named for member in _alike(holder)}
    found: Named = []
    for name, module in named:
        # What is inside of a module comes right behind it, so the outermost ones are known in one pass.
        inside = bool(found) and name.startswith(f"{found[-1][0]}.")
        if not inside and module in members and module is not model and next(module.parameters(), None) is not None:
            found.append((name, module))
    return found


def _alike(holder: nn.Module) -> list[nn.Module]:
    if not isinstance(holder, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        return []
    members = [member for member in holder.children() if _is_called(member)]
    kinds = Counter(_kind(member) for member in members)
    if not members or max(kinds.values()) == 1:
        return []
    if isinstance(holder, nn.Sequential):
        return [member for member in members if kinds[_kind(member)] > 1]
    # A dictionary with words as keys is a way to write attributes, such as two embeddings and a norm.
    numbered = isinstance(holder, nn.ModuleDict) and all(key.isdecimal() for key in holder)
    return members if numbered or isinstance(holder, nn.ModuleList) else []


def _kind(module: nn.Module) -> tuple[type[nn.Module], ...]:
    """What makes two modules alike: their class, and for a sequence, which may hold anything, those of its parts."""
    parts = tuple(type(child) for child in module.children()) if isinstance(module, nn.Sequential) else ()
    return (type(module), *parts)
