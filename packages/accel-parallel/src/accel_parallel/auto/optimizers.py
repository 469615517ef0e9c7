"""What an optimizer keeps for each parameter, by its name or as it was made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from accel_state.config import did_you_mean
from accel_state.errors import ConfigError

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["OptimizerCost", "optimizer_cost"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerCost:
    """What an optimizer holds and touches, as multiples of the trained parameters.

    Adam keeps two averages of the parameters' own size and dtype (Kingma and Ba, arXiv:1412.6980): with parameters
    and gradients in float32 that makes the 16 bytes a parameter of Rajbhandari et al., arXiv:1910.02054, section 3.1.
    """

    name: str
    states: float = 0.0
    """Tensors of a parameter's size that are kept between steps."""
    state_bytes: float | None = None
    """Bytes of an element of those; ``None``: as the parameter's."""
    step_extra: float = 0.0
    """Parameter-sized temporaries while a step runs, where torch steps over all parameters at once (``foreach``)."""

    def __post_init__(self) -> None:
        for field in ("states", "step_extra"):
            if not getattr(self, field) >= 0:
                raise ConfigError(f"`{field}={getattr(self, field)!r}` is no amount of memory. Give 0 or more.")

    def kept_bytes(self, *, numel: float, size_bytes: float) -> float:
        """Bytes of the states of `numel` trained parameters that take `size_bytes`."""
        return self.states * (size_bytes if self.state_bytes is None else self.state_bytes * numel)


# Averages of a parameter's size, and temporaries of ``foreach`` as in torch/optim/*.py: Adam and its kin take a square
# root of all second moments; SGD adds weight decay out of place.
_KNOWN: dict[str, tuple[float, float | None, float]] = {
    "sgd": (0, None, 1),
    "sgdmomentum": (1, None, 1),
    "adam": (2, None, 1),
    "adamw": (2, None, 1),
    "nadam": (2, None, 1),
    "radam": (2, None, 2),
    "adamax": (2, None, 1),
    "adadelta": (2, None, 2),
    "adagrad": (1, None, 1),
    "rmsprop": (1, None, 1),
    "lion": (1, None, 1),
    "adafactor": (0.01, None, 1),
    "adam8bit": (2, 1, 0),
    "adamw8bit": (2, 1, 0),
    "pagedadamw8bit": (2, 1, 0),
    "lion8bit": (1, 1, 0),
}


def optimizer_cost(optimizer: str | OptimizerCost | Optimizer) -> OptimizerCost:
    """What `optimizer` costs: a name such as ``"adamw"``, an instance of a known class, or the numbers themselves.

    Raises:
        ConfigError: for one that is not known.
    """
    if isinstance(optimizer, OptimizerCost):
        return optimizer
    if isinstance(optimizer, str):
        return _by_name(optimizer, optimizer)
    name = type(optimizer).__name__
    defaults = optimizer.defaults
    known = _by_name("sgdmomentum" if name == "SGD" and defaults.get("momentum") else name, name)
    more = bool(defaults.get("amsgrad")) + bool(name == "RMSprop" and defaults.get("momentum"))
    more += bool(name == "RMSprop" and defaults.get("centered"))
    # `foreach=None` lets torch decide, which takes it on accelerators; `fused` needs no temporaries.
    at_once = defaults.get("foreach") is not False and not defaults.get("fused")
    return OptimizerCost(
        name=name,
        states=known.states + more,
        state_bytes=known.state_bytes,
        step_extra=known.step_extra if at_once else 0.0,
    )


def _by_name(name: str, shown: str) -> OptimizerCost:
    key = name.lower().replace("_", "").replace("-", "")
    if key not in _KNOWN:
        raise ConfigError(
            f"`optimizer={shown!r}` is not known, so nobody can say what it keeps.{did_you_mean(key, list(_KNOWN))} "
            f"Use one of {', '.join(_KNOWN)}, or give `OptimizerCost(name=..., states=...)` with the number of tensors "
            f"of a parameter's size that it keeps."
        )
    states, state_bytes, extra = _KNOWN[key]
    return OptimizerCost(name=shown, states=states, state_bytes=state_bytes, step_extra=extra)
