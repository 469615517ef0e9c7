"""The state of an optimizer keyed by position, as torch gives it, made one keyed by parameter name.

torch numbers the parameters of an optimizer in the order in which it was given them. Files of a model do not say that
order (safetensors sorts), so names come, in this order, from: what the user gives; the names that the optimizer
itself was given; shapes, where each fits one tensor of the model only; the order of a model's file that keeps one. What
could be taken two ways is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from accel_parallel.checkpoint.codec import Leaf
from accel_state.config import did_you_mean
from accel_state.errors import CheckpointError

__all__ = ["Weights", "name_state"]

_LIKE_PARAMETER = (
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg", "grad_avg", "sum",
    "acc_delta", "prev", "step_size", "ax",
)  # fmt: skip
"""Entries that the optimizers of ``torch.optim`` keep in the shape of the parameter."""
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_HOW = (
    "Give `--parameter-names names.json`, written where the optimizer is made: `json.dump([names[p] for g in "
    'optimizer.param_groups for p in g["params"]], open("names.json", "w"))` with `names = {p: n for n, p in '
    "model.named_parameters()}`."
)


@dataclass(frozen=True, slots=True)
class Weights:
    """Tensors of the models that the optimizer may hold parameters of."""

    tensors: Mapping[str, Leaf]
    """By ``<item>.<name>``, tied ones once."""
    models: tuple[str, ...]
    is_ordered: bool
    """Whether they are in the order of the model's own `state_dict()`."""

    def full_name(self, name: str, where: str) -> str:
        """The name with the model's in front.

        Raises:
            CheckpointError: if there is no such tensor, or more than one.
        """
        found = [name] if name in self.tensors else []
        found += [full for model in self.models if (full := f"{model}.{name}") in self.tensors and full != name]
        if len(found) == 1:
            return found[0]
        problem = f"is {' and '.join(found)}" if found else "is no tensor of the model"
        hint = did_you_mean(name, [each.partition(".")[2] for each in self.tensors])
        raise CheckpointError(
            f"`{name}` of {where} {problem}.{hint} Give `--parameter-names` with names that the model's file holds, "
            f"or with the model's in front, as in `{self.models[0]}.{name}`."
        )


def name_state(
    raw: Any, weights: Weights, given: Sequence[str] | None, where: str
) -> tuple[dict[str, Any], str | None, int | None]:
    """An optimizer's state by name.

    Args:
        raw: what `state_dict()` gave, keyed by position or by name.
        weights: the models' tensors.
        given: names by position from the user.
        where: the file, for errors.

    Returns:
        The content of an item, how names were found if they were concluded, and the steps taken if it says.

    Raises:
        CheckpointError: if names cannot be told, or do not fit.
    """
    groups, state = _parts(raw, where)
    keys = [key for group in groups for key in group["params"]]
    if all(isinstance(key, str) for key in keys):
        names, how = {key: weights.full_name(key, where) for key in keys}, None
    else:
        chosen, how = _choose(groups, state, keys, weights, given, where)
        names = dict(zip(keys, chosen, strict=True))
    if len(set(names.values())) < len(keys):
        raise CheckpointError(f"Two parameters of {where} have one name. {_HOW}")
    _refuse_other_shapes(state, names, weights, where)
    steps = _steps(state)
    content = {
        "state": {names[key]: dict(entries) for key, entries in state.items()},
        "groups": [_group(group, names, weights) for group in groups],
        "steps_taken": steps or 0,
    }
    return content, how, steps


def _parts(raw: Any, where: str) -> tuple[list[dict[str, Any]], dict[Any, dict[str, Any]]]:
    if not isinstance(raw, Mapping) or "param_groups" not in raw:
        raise CheckpointError(
            f"{where} is no state of one optimizer: it has no `param_groups`. Only what `state_dict()` of an optimizer "
            f"of torch gives can be converted."
        )
    groups = list(raw["param_groups"])
    known = {key for group in groups for key in group["params"]}
    # torch.distributed.checkpoint makes text of the positions that are keys, and drops what is empty.
    keys = {str(key): key for key in known}
    state = {keys.get(str(key), key): dict(entries) for key, entries in (raw.get("state") or {}).items()}
    odd = [key for key in state if key not in known]
    if odd:
        raise CheckpointError(f"{where} has state of {odd[0]!r}, which is in none of its groups: it is damaged.")
    return groups, state


def _choose(
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Any, Mapping[str, Any]],
    keys: Sequence[Any],
    weights: Weights,
    given: Sequence[str] | None,
    where: str,
) -> tuple[list[str], str | None]:
    if given is not None:
        if len(given) != len(keys):
            raise CheckpointError(
                f"`--parameter-names` holds {len(given)} names, and {where} {len(keys)} parameters. {_HOW}"
            )
        return [weights.full_name(name, where) for name in given], None
    if all("param_names" in group for group in groups):
        return [weights.full_name(name, where) for group in groups for name in group["param_names"]], None
    shapes = [_shape(state.get(key, {})) for key in keys]
    by_shape = _by_shape(shapes, weights)
    if by_shape is not None:
        return by_shape, "by their shapes, each of which one tensor of the model has"
    parameters = [name for name in weights.tensors if name.rpartition(".")[2] not in _BUFFERS]
    if len(groups) == 1 and len(parameters) == len(keys):
        if not state:
            return parameters, "all of the model's; none has state"
        if weights.is_ordered and all(
            shape is None or shape == tuple(weights.tensors[name].shape)
            for shape, name in zip(shapes, parameters, strict=True)
        ):
            return parameters, "in the order of the model's file, which all shapes agree with"
    grouped = "1 group" if len(groups) == 1 else f"{len(groups)} groups"
    raise CheckpointError(
        f"{where} numbers its {len(keys)} parameters in {grouped} and names none, and shapes fit the "
        f"{len(parameters)} tensors of the model in more than one way, or in none. {_HOW}"
    )


def _by_shape(shapes: Sequence[tuple[int, ...] | None], weights: Weights) -> list[str] | None:
    having: dict[tuple[int, ...], list[str]] = {}
    for name, tensor in weights.tensors.items():
        having.setdefault(tuple(tensor.shape), []).append(name)
    found = [having.get(shape, []) if shape is not None else [] for shape in shapes]
    if not shapes or any(len(names) != 1 for names in found) or len(set(shapes)) < len(shapes):
        return None
    return [names[0] for names in found]


def _shape(entries: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Of the parameter that these entries belong to, where they say."""
    for name in _LIKE_PARAMETER:
        if hasattr(entries.get(name), "shape"):
            return tuple(entries[name].shape)
    return None


def _refuse_other_shapes(
    state: Mapping[Any, Mapping[str, Any]], names: Mapping[Any, str], weights: Weights, where: str
) -> None:
    for key, entries in state.items():
        shape, expected = _shape(entries), tuple(weights.tensors[names[key]].shape)
        if shape is not None and shape != expected:
            raise CheckpointError(
                f"Parameter {key!r} of {where} has state of shape {shape}, and `{names[key]}` has shape {expected}: "
                f"the names are in another order, or the files of two models. {_HOW}"
            )


def _steps(state: Mapping[Any, Mapping[str, Any]]) -> int | None:
    """The most that any parameter was stepped."""
    found = []
    for entries in state.values():
        value: Any = entries.get("step")
        if value is not None:
            tensor = value.view() if hasattr(value, "file") else torch.as_tensor(value)
            found.append(int(tensor.reshape(-1)[0]))
    return max(found, default=None)


def _group(group: Mapping[str, Any], names: Mapping[Any, str], weights: Weights) -> dict[str, Any]:
    ours = [names[key] for key in group["params"]]
    return {
        **group,
        "params": ours,
        "param_shapes": [list(weights.tensors[name].shape) for name in ours],
        "param_dtypes": [weights.tensors[name].dtype for name in ours],
    }
