"""What stands in a script for the optimizer and the schedule that a DeepSpeed configuration describes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch.optim import Optimizer

from accel_state.errors import ConfigError

__all__ = ["DummyOptim", "DummyScheduler"]


class DummyOptim(Optimizer):
    """Stands for the optimizer of the configuration's ``optimizer`` section, which is built in ``prepare``.

    Values given here fill what that section leaves to ``"auto"`` or does not mention; another value than the section's
    is refused. Groups keep what they set themselves, such as a ``weight_decay`` of their own.

    Args:
        params: parameters, or groups of them as for any optimizer of torch.
        lr: learning rate; ``None`` takes 1e-3 where the section says ``"auto"``.
        weight_decay: ``None`` takes 0 where the section says ``"auto"``.
        kwargs: further settings, such as ``betas`` and ``eps``.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float | None = None,
        weight_decay: float | None = None,
        **kwargs: Any,
    ) -> None:
        given = {"lr": lr, "weight_decay": weight_decay, **kwargs}
        self.given: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        """What was set for all groups."""
        items = list(params)
        groups: list[dict[str, Any]] = [dict(item) for item in items if isinstance(item, dict)]
        for group in groups:
            held = group["params"]
            group["params"] = [held] if isinstance(held, torch.Tensor) else list(held)
        self.given_groups: list[dict[str, Any]] = groups or [{"params": items}]
        """The groups as they were given: what DeepSpeed builds the optimizer over."""
        super().__init__([dict(group) for group in self.given_groups], {"lr": 1e-3, "weight_decay": 0.0, **self.given})

    def step(self, closure: Callable[[], Any] | None = None) -> NoReturn:
        """Refused: `prepare` gives the optimizer that steps.

        Raises:
            ConfigError: always.
        """
        raise _not_prepared("DummyOptim", "step()")


class DummyScheduler:
    """Stands for the schedule of the configuration's ``scheduler`` section, which is built in ``prepare``.

    Args:
        optimizer: the `DummyOptim` or optimizer that it is for.
        total_num_steps: optimizer steps of the whole run; fills ``total_num_steps`` where that is ``"auto"``.
        warmup_num_steps: optimizer steps of the warm-up; fills ``warmup_num_steps`` where that is ``"auto"``.
        lr_scheduler_callable: without such a section: makes a schedule of torch for the optimizer it is called with.
        kwargs: further parameters of the section's schedule, such as ``warmup_max_lr``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_num_steps: int | None = None,
        warmup_num_steps: int = 0,
        lr_scheduler_callable: Callable[[Optimizer], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for name, count in (("total_num_steps", total_num_steps), ("warmup_num_steps", warmup_num_steps)):
            if count is not None and (type(count) is not int or count < 0):
                raise ConfigError(
                    f"`DummyScheduler({name}={count!r})` is no number of optimizer steps. Give an integer, such as "
                    f"`num_epochs * len(loader) // gradient_accumulation_steps`."
                )
        self.optimizer = optimizer
        self.total_num_steps = total_num_steps
        self.warmup_num_steps = warmup_num_steps
        self.lr_scheduler_callable = lr_scheduler_callable
        self.kwargs = kwargs

    def step(self, *args: Any) -> NoReturn:
        """Refused: `prepare` gives the schedule that steps.

        Raises:
            ConfigError: always.
        """
        raise _not_prepared("DummyScheduler", "step()")

    def get_last_lr(self) -> NoReturn:
        """Refused likewise."""
        raise _not_prepared("DummyScheduler", "get_last_lr()")

    def state_dict(self) -> NoReturn:
        """Refused likewise."""
        raise _not_prepared("DummyScheduler", "state_dict()")

    def load_state_dict(self, state_dict: dict[str, Any]) -> NoReturn:
        """Refused likewise."""
        raise _not_prepared("DummyScheduler", "load_state_dict()")


def _not_prepared(name: str, call: str) -> ConfigError:
    return ConfigError(
        f"`{call}` was called on a `{name}`, which stands for what the DeepSpeed configuration describes and can do "
        f"nothing itself. Use what `accelerator.prepare(...)` returned in its place."
    )
