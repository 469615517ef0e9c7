"""What of a checkpoint fits a run that is not quite the one that wrote it, and what is waived."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accel_parallel.strategy import OptimizerState

__all__ = ["fit_model", "fit_optimizer"]


def fit_model(name: str, stored: Mapping[str, Any], present: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A state that a strict load takes: what is stored where it fits, and else what the model holds now.

    Args:
        name: of the item.
        stored: tensors by name.
        present: those of the model.

    Returns:
        The state, and a line on each tensor that was waived.
    """
    waived = [f"`{key}` of `{name}` is not in this model, and was left" for key in stored if key not in present]
    state = dict(present)
    for key, value in present.items():
        if key not in stored:
            waived.append(f"`{key}` of `{name}` is not in the checkpoint, and keeps its value")
        elif (stored[key].shape, stored[key].dtype) != (value.shape, value.dtype):
            waived.append(
                f"`{key}` of `{name}` is {_described(stored[key])} in the checkpoint and {_described(value)} here, and "
                f"keeps its value"
            )
        else:
            state[key] = stored[key]
    return state, waived


def fit_optimizer(name: str, saved: OptimizerState, present: OptimizerState) -> tuple[OptimizerState, list[str]]:
    """A state that a strict load takes: what is saved of each parameter that is here, and else what is here now.

    Hyperparameters of a group are those of the saved one that it shares parameters with.

    Returns:
        The state, and a line on each parameter that was waived.
    """
    if len(saved.groups) != len(present.groups):
        counts = f"{len(saved.groups)} groups of parameters in the checkpoint and {len(present.groups)} here"
        return present, [f"`{name}` has {counts}, and keeps its state"]
    known = {key: shape for group in saved.groups for key, shape in _parameters(group).items()}
    here = {key: shape for group in present.groups for key, shape in _parameters(group).items()}
    strange = [key for key in known if key not in here]
    waived = [f"the state of `{key}` in `{name}` has no parameter here, and was left" for key in strange]
    state: dict[str, dict[str, Any]] = {}
    for key, shape in here.items():
        fits = known.get(key) == shape
        if not fits:
            why = f"is of {known[key]} in the checkpoint, not {shape}" if key in known else "is not in the checkpoint"
            waived.append(f"the state of `{key}` in `{name}` {why}, and stays as it is")
        found = (saved if fits else present).state.get(key)
        if found is not None:
            state[key] = found
    own = ("params", "param_shapes", "param_dtypes")
    groups = []
    for number, ours in enumerate(present.groups):
        theirs = next((each for each in saved.groups if set(each["params"]) & set(ours["params"])), None)
        if theirs is None:
            waived.append(f"the settings of group {number} of `{name}` have none to come from, and stay as they are")
        groups.append({**ours, **(theirs or {}), **{key: ours[key] for key in own}})
    return OptimizerState(state=state, groups=groups, engine=saved.engine or present.engine), waived


def _parameters(group: Mapping[str, Any]) -> dict[str, str]:
    """Shape and dtype of each, in words."""
    shapes, dtypes = group["param_shapes"], group["param_dtypes"]
    return {
        key: f"shape {tuple(shape)} and {dtype}"
        for key, shape, dtype in zip(group["params"], shapes, dtypes, strict=True)
    }


def _described(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}"
