"""Optimizers that step inside backward, layer by layer, so that gradients of the whole model never exist together.

Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources" (LOMO), arXiv:2306.09782.
They are known by their method ``fused_backward(loss, learning_rate)``, as those of the package ``lomo-optim`` have it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from accel_parallel.optimizer import PreparedOptimizer
from accel_state.errors import ConfigError
from accel_state.process import Process

__all__ = ["FusedOptimizer", "audit_fused", "steps_in_backward"]


def steps_in_backward(optimizer: Optimizer) -> bool:
    """Whether it is one of these."""
    return callable(getattr(optimizer, "fused_backward", None))


def audit_fused(
    optimizers: Sequence[Optimizer], *, prepared: Sequence[Optimizer], num_steps: int, scales: bool
) -> None:
    """Refuse what an optimizer cannot do whose gradients are gone when backward returns.

    Args:
        optimizers: about to be prepared.
        prepared: those that are.
        num_steps: micro-batches in a window.
        scales: whether the loss is scaled, so that a step may have to be skipped.

    Raises:
        ConfigError: with the reason.
    """
    fused = [each for each in (*prepared, *optimizers) if steps_in_backward(each)]
    if not fused:
        return
    name = type(fused[0]).__name__
    world_size = Process.current().topology.world_size if Process.is_open() else 1
    if world_size > 1:
        raise ConfigError(
            f"{name} steps each parameter inside backward, before its gradient could be exchanged between "
            f"{world_size} processes, so each would train a model of its own. Train on one process, or use an "
            f"optimizer that steps after backward."
        )
    if num_steps > 1:
        raise ConfigError(
            f"{name} steps in every backward and keeps no gradients, so `gradient_accumulation_steps={num_steps}` "
            f"cannot add any up. Set it to 1 and use a larger batch, or use an optimizer that steps after backward."
        )
    if scales:
        raise ConfigError(
            f"{name} steps parameters while backward is still running, so a step whose gradients turn out not to be "
            f"finite cannot be skipped, as float16 loss scaling needs. Use `mixed_precision='bf16'` or 'no'."
        )
    if len(fused) > 1:
        raise ConfigError(
            f"{name} and {type(fused[1]).__name__} both run backward by themselves, and one loss has one backward. "
            f"Give all parameters to one of them."
        )


class FusedOptimizer(PreparedOptimizer):
    """Steps in `run_backward`; ``step()`` and ``zero_grad()`` have nothing left to do, and may be called all the same.

    A schedule follows its steps, as it does those of others; the rate is that of its first parameter group.
    """

    def run_backward(self, loss: torch.Tensor, learning_rate: float | None, kwargs: dict[str, Any]) -> None:
        """Backward and step in one.

        Args:
            loss: a scalar.
            learning_rate: of this step; ``None``: the one in the parameter group, which a scheduler changes.
            kwargs: further arguments of ``loss.backward``, which are refused.

        Raises:
            ConfigError: for arguments that have no effect, and in an accumulation window of several micro-batches.
        """
        name = type(self.optimizer).__name__
        if kwargs:
            raise ConfigError(
                f"`backward` was given {', '.join(kwargs)}, and {name} runs backward by itself, without arguments. "
                f"Leave them out."
            )
        if not self.window.sync or self.window.micro_steps > 1:
            raise ConfigError(
                f"{name} steps in every backward and keeps no gradients, so a window of {self.window.length} "
                f"micro-batches cannot add any up. Use windows of one with this optimizer."
            )
        rate = self.param_groups[0]["lr"] if learning_rate is None else learning_rate
        self.optimizer.fused_backward(loss, rate)  # type: ignore[attr-defined]
        self.optimizer._opt_called = True  # type: ignore[attr-defined] # torch's schedulers warn where it is missing
        self.steps_taken += 1

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Nothing: backward has stepped."""
        if closure is not None:
            raise ConfigError(
                f"`step(closure)` was called for {type(self.optimizer).__name__}, which steps in `backward` and "
                f"nowhere else. Call `backward(loss)`, and leave the closure out."
            )
        self.window.taken()

    def refuse_clip(self) -> None:
        """Raise the error that there is nothing to clip."""
        raise ConfigError(
            f"Gradients were to be clipped, and those of {type(self.optimizer).__name__} are gone when backward "
            f"returns. Give the optimizer its own `clip_grad_norm` or `clip_grad_value` when you make it."
        )

    def refuse_lost_state(self) -> None:
        """Refuse to save an optimizer that keeps tensors where its ``state_dict`` does not have them.

        Raises:
            ConfigError: naming where they are.
        """
        for key, value in vars(self.optimizer).items():
            if key != "state" and isinstance(value, dict) and any(isinstance(v, torch.Tensor) for v in value.values()):
                raise ConfigError(
                    f"{type(self.optimizer).__name__} keeps tensors in `{key}`, which is not part of its `state_dict`, "
                    f"so a checkpoint would go on with others. Save the model alone, or use an optimizer whose "
                    f"`state_dict` holds all of its state."
                )
