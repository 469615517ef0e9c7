"""What ``prepare`` refuses before the first step, because it would go wrong without a word later."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from accel_state.errors import ConfigError

__all__ = ["audit_model", "audit_optimizer"]


def audit_model(model: nn.Module, *, name: str, prepared: Iterable[nn.Module], meta_is_filled: bool = False) -> None:
    """Refuse a model that is prepared already or holds parameters or buffers without data.

    Args:
        model: about to be prepared.
        name: what to call it.
        prepared: all models that are prepared, as they were given and as they were handed back.
        meta_is_filled: whether the strategy gives values to what is on the meta device.

    Raises:
        ConfigError: naming the model and the tensor.
    """
    for other in prepared:
        if other is model:
            raise ConfigError(
                f"{name} ({type(model).__name__}) is prepared already; wrapping it again would average its gradients "
                f"twice. Call `prepare` once a model, and use what it returned."
            )
    if isinstance(model, DistributedDataParallel):
        raise ConfigError(
            f"{name} is a DistributedDataParallel already, of this script or of another Accelerator; wrapping it again "
            f"would average its gradients twice. Pass the module inside, `model.module`."
        )
    for key, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta and not meta_is_filled:
            raise ConfigError(
                f"`{key}` of {name} ({type(model).__name__}) is on the meta device: it has a shape and no values. "
                f"Load its weights first, for example with `load_state_dict(..., assign=True)`."
            )


def audit_optimizer(
    optimizer: Optimizer, *, name: str, models: Sequence[nn.Module], others: Sequence[Optimizer]
) -> None:
    """Refuse an optimizer that would step parameters of no prepared model, or those of another optimizer (B15).

    Raises:
        ConfigError: saying how many of its parameters are strangers, and the shape of the first.
    """
    known = {id(parameter) for model in models for parameter in model.parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    strangers = [parameter for parameter in parameters if id(parameter) not in known]
    if strangers:
        first = tuple(strangers[0].shape)
        raise ConfigError(
            f"{name} ({type(optimizer).__name__}) holds {len(strangers)} of {len(parameters)} parameters, the first of "
            f"shape {first}, that belong to no prepared model: their gradients would never be averaged, and if the "
            "model "
            f"was replaced after the optimizer was made, it would never learn. "
            f"Make the optimizer from the parameters of the model that you prepare, and prepare both together."
        )
    taken = {
        id(p): index for index, other in enumerate(others) for group in other.param_groups for p in group["params"]
    }
    for parameter in parameters:
        if id(parameter) in taken:
            raise ConfigError(
                f"{name} ({type(optimizer).__name__}) and prepared optimizer number {taken[id(parameter)]} both hold a "
                f"parameter of shape {tuple(parameter.shape)}; two optimizers would step it on one gradient. "
                f"Give each parameter to one optimizer."
            )
