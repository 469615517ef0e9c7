"""The optimizer that a training loop holds after ``prepare``: it steps when its window ends, and says if it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from accel_parallel.accumulation import Window
from accel_parallel.strategy import Strategy
from accel_state.errors import ConfigError
from accel_state.protocols import LossScaler

__all__ = ["PreparedOptimizer"]


class PreparedOptimizer(Optimizer):
    """Wraps an optimizer; parameter groups and state stay those of the wrapped one.

    ``step()`` and ``zero_grad()`` may be called at every micro-batch: inside an accumulation window they do nothing.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        window: Window,
        strategy: Strategy,
        scaler: LossScaler,
        given: Optimizer | None = None,
    ) -> None:
        """Called by ``Accelerator.prepare``. `Optimizer.__init__` is left out on purpose: the wrapped one holds all.

        Args:
            optimizer: what the strategy made of the one that was given.
            window: of its micro-batches.
            strategy: what steps it.
            scaler: of losses; one that is not enabled where the strategy scales by itself.
            given: the one that was given, which schedulers know.
        """
        self.optimizer = optimizer
        self.given = optimizer if given is None else given
        self.window = window
        self.steps_taken = 0
        """Steps that changed the parameters."""
        self.step_was_skipped = False
        """Whether the last ``step()`` that was due found gradients that were not finite."""
        self._strategy = strategy
        self._scaler = scaler

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.optimizer.defaults

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Step if the window ends with this micro-batch; otherwise do nothing.

        Raises:
            ConfigError: for a `closure` under loss scaling, which would need every one of its backwards scaled, or in
                a window of several micro-batches, of which it sees the last one only.
        """
        window = self.window
        if closure is not None:
            self._refuse_closure()
        if not window.sync:
            return
        if self._strategy.step(self.optimizer, scaler=self._scaler, closure=closure):
            self.step_was_skipped = False
            self.steps_taken += 1
        else:
            self.step_was_skipped = True
        window.taken()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, unless those of earlier micro-batches of an unfinished window are among them."""
        window = self.window
        if window.accumulating:
            return
        self._strategy.zero_grad(self.optimizer, set_to_none)
        window.pending = False

    def _refuse_closure(self) -> None:
        if self.window.micro_steps > 1 or not self.window.sync:
            raise ConfigError(
                "`step(closure)` was called in an accumulation window of several micro-batches, and a closure that "
                "is evaluated anew knows nothing of the earlier ones. Set `gradient_accumulation_steps=1`, or call "
                "`backward` and `step()` without a closure."
            )
        if self._scaler.enabled:
            raise ConfigError(
                "`step(closure)` was called under float16 loss scaling: the closure's own backward would be unscaled. "
                "Use `mixed_precision='bf16'` or 'no' with this optimizer."
            )

    def unscale_(self) -> None:
        """Divide the gradients by the loss scale, once, so that clipping sees their true size."""
        if self._scaler.enabled:
            gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            self._scaler.unscale_(self.optimizer, gradients)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: the window, the audit and the wrapped model know the parameters of ``prepare`` only."""
        raise ConfigError(
            f"A parameter group with {len(list(param_group.get('params', ())))} entries was added after `prepare`, "
            "which "
            f"bound this optimizer's parameters to its models. Add it before `prepare`."
        )

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def train(self) -> None:
        """Tell a schedule-free optimizer that training goes on; does nothing for others."""
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()  # type: ignore[attr-defined]

    def eval(self) -> None:
        """Tell a schedule-free optimizer that evaluation begins; does nothing for others."""
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # not set yet, as in copying: never look for it in itself
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"Prepared({self.optimizer!r})"
