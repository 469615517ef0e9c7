"""A whole checkpoint in one folder of `torch.distributed.checkpoint`: which part of it is what."""

from __future__ import annotations

from pathlib import Path

from accel_parallel.checkpoint.item import Item
from accel_parallel.checkpoint_commands.convert.distributed import DistributedCheckpoint
from accel_parallel.checkpoint_commands.convert.found import Asked, Found
from accel_parallel.checkpoint_commands.convert.optimizers import add_optimizers
from accel_state.errors import CheckpointError

__all__ = ["read_dcp"]

_OPTIMIZERS = ("optimizer", "optimizers", "optim")
_SCHEDULERS = ("scheduler", "lr_scheduler")


def read_dcp(folder: Path, asked: Asked) -> Found:
    """Everything in such a folder that can be converted. Tensors stay in their files.

    The model is what lies under ``model``, or else the tensors that lie under no key; the optimizer is what lies under
    ``optimizer``, and the scheduler under ``scheduler`` or ``lr_scheduler``.

    Raises:
        CheckpointError: if there is no model, or its optimizer cannot be read.
    """
    checkpoint = DistributedCheckpoint(folder)
    found = Found(source="torch.distributed.checkpoint", world_size=checkpoint.num_ranks)
    model = _add_model(checkpoint, found, asked)
    key = _key(checkpoint, asked.optimizer_key, _OPTIMIZERS)
    if key is not None:
        _add_optimizer(checkpoint, found, asked, key)
    scheduler = _key(checkpoint, None, _SCHEDULERS)
    if scheduler is not None:
        try:
            found.items.append(Item("scheduler", "scheduler", checkpoint.tree(scheduler)))
        except CheckpointError as error:
            found.left_out.append(f"{scheduler}: {error}")
    for name, nested in checkpoint.keys.items():
        if name not in (model, key, scheduler) and (nested or model is not None):
            found.left_out.append(f"{name}: it is neither model nor optimizer nor scheduler")
    return found


def _key(checkpoint: DistributedCheckpoint, asked: str | None, usual: tuple[str, ...]) -> str | None:
    if asked is not None and not checkpoint.keys.get(asked, False):
        raise CheckpointError(
            f"`{checkpoint.folder}` holds nothing under `{asked}`; it holds {_some(checkpoint)}. Give one of those."
        )
    return asked if asked is not None else next((name for name in usual if checkpoint.keys.get(name)), None)


def _add_model(checkpoint: DistributedCheckpoint, found: Found, asked: Asked) -> str | None:
    """The key it was under; ``None`` for none."""
    key = _key(checkpoint, asked.model_key, ("model",))
    tensors, others = checkpoint.tensors(key)
    if not tensors:
        raise CheckpointError(
            f"`{checkpoint.folder}` holds no tensors under `{key or 'model'}`; it holds {_some(checkpoint)}. Say where "
            f"the model is: `--model-key KEY`."
        )
    found.left_out += [f"{name}: it is no tensor" for name in others]
    state = dict(tensors)
    for alias, other in asked.ties:
        if other not in state:
            raise CheckpointError(f"`--tie {alias}={other}`: there is no `{other}`. Name a tensor that is there.")
        state[alias] = state[other]
    found.items.append(Item("model", "model", state))
    return key


def _add_optimizer(checkpoint: DistributedCheckpoint, found: Found, asked: Asked, key: str) -> None:
    state = checkpoint.tree(key)
    if isinstance(state, dict) and any(str(each).startswith("param_groups.") for each in state):
        found.left_out.append(
            f"{key}: it was saved flattened (`flatten_optimizer_state_dict=True`), which keeps no groups of parameters"
        )
        return
    add_optimizers(found, [(key, state)], asked, ordered=False)


def _some(checkpoint: DistributedCheckpoint) -> str:
    names = sorted(checkpoint.keys)
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
