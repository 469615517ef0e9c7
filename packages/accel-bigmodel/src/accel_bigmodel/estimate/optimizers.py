"""Optimizers by name: torch's own, run as they are, and those of other packages by what they are known to keep."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from accel_state.config import did_you_mean
from accel_state.errors import ConfigError

__all__ = ["OPTIMIZERS", "make_optimizer", "optimizer_key"]

OPTIMIZERS = (
    "adamw", "adam", "sgd", "sgd_momentum", "adafactor", "adagrad", "adadelta", "adamax", "nadam", "radam", "rmsprop",
    "adamw_8bit", "adam_8bit", "lion", "lion_8bit", "sgd_8bit",
)  # fmt: skip
"""Names that an estimate takes."""

_OF_TORCH = {
    "adamw": "AdamW", "adam": "Adam", "sgd": "SGD", "sgd_momentum": "SGD", "adafactor": "Adafactor",
    "adagrad": "Adagrad", "adadelta": "Adadelta", "adamax": "Adamax", "nadam": "NAdam", "radam": "RAdam",
    "rmsprop": "RMSprop",
}  # fmt: skip
_KEPT: dict[str, tuple[int, bool]] = {
    "adamw_8bit": (2, True), "adam_8bit": (2, True), "lion": (1, False), "lion_8bit": (1, True), "sgd_8bit": (1, True),
}  # fmt: skip
"""Of the others: averages of a parameter's size, and whether in 8 bits."""

_LEAST_8BIT = 4096
"""Elements below which bitsandbytes keeps averages in float32 (``min_8bit_size``)."""
_BLOCK = 256
"""Elements that share a scale (bitsandbytes/optim/optimizer.py)."""


def optimizer_key(name: str) -> str:
    """`name` as `OPTIMIZERS` has it; ``-`` and capitals do not matter.

    Raises:
        ConfigError: if it has not.
    """
    key = str(name).lower().replace("-", "_")
    if key not in OPTIMIZERS:
        raise ConfigError(
            f"`optimizer={name!r}` is not known, so nobody can say what it keeps.{did_you_mean(key, list(OPTIMIZERS))} "
            f"Use one of {', '.join(OPTIMIZERS)}."
        )
    return key


def make_optimizer(name: str, parameters: Iterable[nn.Parameter], *, on_gpu: bool) -> torch.optim.Optimizer:
    """The optimizer of that name for `parameters`, fake ones or real ones.

    Args:
        name: one of `OPTIMIZERS`.
        parameters: those that are trained.
        on_gpu: whether it steps over all parameters at once (``foreach``), as torch does on a GPU by itself.

    Raises:
        ConfigError: for a name that is not known.
    """
    key = optimizer_key(name)
    trained = [each for each in parameters if each.requires_grad]
    if not trained:
        raise ConfigError(
            "A training step was asked for of a model of which no parameter requires a gradient. Set `requires_grad` "
            "of what is trained, or ask for inference only (`training=False`)."
        )
    if key in _KEPT:
        averages, small = _KEPT[key]
        return _Keeper(trained, averages=averages, small=small)
    options: dict[str, Any] = {"lr": 1e-3, "foreach": on_gpu}
    if key == "sgd_momentum":
        options["momentum"] = 0.9
    made: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, _OF_TORCH[key])
    return made(trained, **options)


class _Keeper(torch.optim.Optimizer):
    """Keeps what an optimizer of bitsandbytes keeps, and computes nothing: it works in place, in kernels of its own."""

    def __init__(self, parameters: list[nn.Parameter], *, averages: int, small: bool) -> None:
        super().__init__(parameters, {})
        self._averages = averages
        self._small = small

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make the states of each parameter that has a gradient, once."""
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None and parameter not in self.state:
                self.state[parameter] = self._states(parameter)

    def _states(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        size, device = parameter.numel(), parameter.device
        states = {}
        for index in range(self._averages):
            if self._small and size >= _LEAST_8BIT:
                states[f"state{index}"] = torch.empty(size, dtype=torch.uint8, device=device)
                states[f"absmax{index}"] = torch.empty(-(-size // _BLOCK), dtype=torch.float32, device=device)
            else:
                states[f"state{index}"] = torch.empty(size, dtype=torch.float32, device=device)
        return states
