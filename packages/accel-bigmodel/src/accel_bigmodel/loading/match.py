"""Which stored tensor goes into which tensor of a model, and what the two do not have in common."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from accel_bigmodel.loading.extra import ExtraState
from accel_bigmodel.loading.fused import Part, parts_of
from accel_bigmodel.loading.model_tensor import ModelTensor
from accel_bigmodel.loading.source import Source
from accel_state.config import did_you_mean
from accel_state.errors import CheckpointError

__all__ = ["Match", "match"]

_SHOWN = 5
"""Names of one kind that a message lists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """What is loaded, and what is not."""

    parts: Mapping[str, Sequence[Part]]
    """For each tensor of the model that is loaded, by its first name, what is stored of it."""
    missing: tuple[str, ...]
    """First names of tensors of the model that the checkpoint does not have."""
    unexpected: tuple[str, ...]
    """Names in the checkpoint that the model does not have."""
    extra: Mapping[str, str]
    """For each extra state that is loaded, by its first name, what it is called in the checkpoint."""
    doubled: tuple[tuple[str, str], ...]
    """Pairs of stored names that are one tensor in the model: the one that is loaded, and one that is not."""


def match(
    model: nn.Module,
    tensors: Sequence[ModelTensor],
    extra: Sequence[ExtraState],
    sources: Mapping[str, Source],
    *,
    strict: bool,
    path: Path,
) -> Match:
    """Bring names together.

    Raises:
        CheckpointError: if shapes or kinds of dtype differ; and if `strict`, for every name that only one side has,
            unless the model itself says that it may be so (``_keys_to_ignore_on_load_missing``, ``..._unexpected``).
    """
    wanted = [each for each in tensors if each.is_saved or each.tensor.device.type == "meta"]
    both: list[ModelTensor | ExtraState] = [*wanted, *extra]
    known = {name for each in both for name in each.names}
    found = parts_of(model, sources, known)
    parts: dict[str, Sequence[Part]] = {}
    doubled: list[tuple[str, str]] = []
    used: set[str] = set()
    for each in both:
        held = [name for name in each.names if name in found]
        used.update(held)
        if held:
            parts[each.name] = found[held[0]]
            doubled += [(found[held[0]][0].source, other.source) for name in held[1:] for other in found[name]]
    missing = tuple(each.name for each in both if each.name not in parts)
    unexpected = tuple(part.source for name, each in found.items() if name not in used for part in each)
    if strict:
        lacking = _not_declared(missing, getattr(model, "_keys_to_ignore_on_load_missing", None))
        surplus = _not_declared(unexpected, getattr(model, "_keys_to_ignore_on_load_unexpected", None))
        if lacking or surplus:
            raise CheckpointError(_misfit(model, tensors, sources, lacking, surplus, path))
    _check_shapes(wanted, parts, sources, path)
    stored = {each.name: parts.pop(each.name)[0].source for each in extra if each.name in parts}
    return Match(parts=parts, extra=stored, missing=missing, unexpected=unexpected, doubled=tuple(doubled))


def _not_declared(names: Iterable[str], patterns: Iterable[str] | None) -> list[str]:
    expressions = [re.compile(each) for each in patterns or ()]
    return [name for name in names if not any(each.search(name) for each in expressions)]


def _misfit(
    model: nn.Module,
    tensors: Sequence[ModelTensor],
    sources: Mapping[str, Source],
    missing: Sequence[str],
    unexpected: Sequence[str],
    path: Path,
) -> str:
    kind = type(model).__name__
    parts = []
    if missing:
        listed = _listed(missing, unexpected)
        parts.append(f"{len(missing)} of the model's tensors are not in it: {listed}")
    if unexpected:
        listed = _listed(unexpected, missing)
        parts.append(f"{len(unexpected)} of its {len(sources)} tensors are not in the model: {listed}")
    # A checkpoint is not to overwrite what a model computes on its own, as it did in versions that saved it.
    computed = {name for each in tensors if not each.is_saved for name in each.names}.intersection(unexpected)
    if computed:
        parts.append(f"{len(computed)} of these, `{min(computed)}` the first, are buffers that the model does not save")
    remedy = _prefix(missing, unexpected, kind) or (
        f"Give the checkpoint of a {kind} with the same configuration, or `strict=False` to load what fits; the result "
        f"then names the rest."
    )
    if any(each.tensor.device.type == "meta" for each in tensors if not each.is_saved and each.name in missing):
        remedy = (
            "Buffers that are not saved get their values when the model is made: make it by "
            "`init_empty_weights(include_buffers=False)`."
        )
    return f"`{path}` does not fit the {kind}: {'; '.join(parts)}. {remedy}"


def _listed(names: Sequence[str], others: Sequence[str]) -> str:
    shown = []
    for name in names[:_SHOWN]:
        near = did_you_mean(name, list(others)[:2000]).removeprefix(" Did you mean ").removesuffix("?")
        shown.append(f"`{name}`{f' (the other side has {near})' if near else ''}")
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _prefix(missing: Sequence[str], unexpected: Sequence[str], kind: str) -> str:
    """What to do where names differ by what they begin with."""
    in_file = _common_start(unexpected, missing)
    if in_file:
        return (
            f"Names of the checkpoint begin with {in_file!r} and those of the model do not: it is of a model that has "
            f"a {kind} as `{in_file[:-1]}`. Load it into that model"
            + (f", or into `torch.nn.ModuleDict({{{in_file[:-1]!r}: model}})`." if in_file.count(".") == 1 else ".")
        )
    in_model = _common_start(missing, unexpected)
    if in_model:
        return (
            f"Names of the model begin with {in_model!r} and those of the checkpoint do not: it is of the part "
            f"`{in_model[:-1]}` of a {kind}. Load it into that part: "
            f"`load_checkpoint_in_model(model.{in_model[:-1]}, ...)`."
        )
    return ""


def _common_start(longer: Sequence[str], shorter: Sequence[str]) -> str:
    """What most of `shorter` would have to begin with to be in `longer`."""
    known = set(shorter)
    starts: Counter[str] = Counter()
    for name in longer:
        parts = name.split(".")
        starts.update(
            f"{'.'.join(parts[:cut])}." for cut in range(1, len(parts)) if ".".join(parts[cut:]) in known
        )  # fmt: skip
    most = starts.most_common(1)
    return most[0][0] if most and 2 * most[0][1] > min(len(longer), len(shorter)) else ""


def _check_shapes(
    tensors: Sequence[ModelTensor], parts: Mapping[str, Sequence[Part]], sources: Mapping[str, Source], path: Path
) -> None:
    differing = []
    for each in tensors:
        if each.name not in parts:
            continue
        held = parts[each.name]
        filled = sum(math.prod(sources[part.source].shape) for part in held)
        if filled != each.tensor.numel() or any(not _fits(each.tensor, part, sources[part.source]) for part in held):
            first = sources[held[0].source]
            many = f" each, {len(held)} of them," if len(held) > 1 else ""
            differing.append(
                f"`{each.name}` is {list(each.tensor.shape)} in the model and {list(first.shape)}{many} in the file"
            )
        _check_kind(each, [sources[part.source] for part in held], path)
    if differing:
        more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise CheckpointError(
            f"`{path}` has {len(differing)} tensors of another shape: {'; '.join(differing[:_SHOWN])}{more}. The model "
            f"was made with another configuration than the one that was saved: make it with the same."
        )


def _fits(tensor: torch.Tensor, part: Part, source: Source) -> bool:
    if not part.place:
        return tuple(tensor.shape) == source.shape
    try:
        return tuple(torch.empty(tensor.shape, device="meta")[part.place].shape) == source.shape
    except IndexError:
        return False


def _check_kind(each: ModelTensor, sources: Sequence[Source], path: Path) -> None:
    """A conversion between kinds of numbers would load another thing than was saved, such as codes of a quantizer."""
    ours = each.tensor.dtype
    for source in sources:
        theirs = source.dtype
        floating = (ours.is_floating_point, theirs.is_floating_point)
        narrowed = not any(floating) and torch.promote_types(theirs, ours) != ours
        if floating[0] != floating[1] or ours.is_complex != theirs.is_complex or narrowed:
            raise CheckpointError(
                f"`{each.name}` is {ours} in the model and {theirs} in `{path}`, and converting it would change what "
                f"it means. If the checkpoint is quantized, make the model by `load_and_quantize_model`; else save it "
                f"in a dtype of the same kind."
            )
