"""Loss scaling: small gradients survive a float16 backward, and steps with non-finite ones are skipped.

The method is that of Micikevicius et al., arXiv:1710.03740, section 3.2. The arithmetic, scale by scale, is the
one of ``torch.amp.GradScaler``; the bookkeeping is not: any number of optimizers may share one scale, each may step
several times between two updates, and what the host must know is read once for each step.
"""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

from accel_precision.settings import GradScalerKwargs
from accel_state.errors import AccelError, CheckpointError, ConfigError

__all__ = ["DynamicLossScaler", "NoScaler"]

_SMALLEST_SCALE = 2.0**-126
"""Smallest normal float32: below it the scale loses bits and its inverse overflows."""


class NoScaler:
    """The scaler of every precision whose gradients do not vanish: changes nothing and skips nothing."""

    enabled: bool = False
    reduce_found_inf: Callable[[torch.Tensor], None] | None = None

    def get_scale(self) -> float:
        """Always 1."""
        return 1.0

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """`loss` itself."""
        return loss

    def unscale_(self, optimizer: torch.optim.Optimizer, gradients: Iterable[torch.Tensor]) -> None:
        """Leaves `gradients` as they are, and does not even iterate them."""

    def step(self, optimizer: torch.optim.Optimizer, step: Callable[[], Any]) -> bool:
        """Calls `step`, always."""
        step()
        return True

    def update(self) -> None:
        """Nothing to adapt."""

    def state_dict(self) -> dict[str, Any]:
        """Empty."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Accept the empty state.

        Raises:
            CheckpointError: if the state holds a loss scale, which this precision would drop.
        """
        if state_dict:
            raise CheckpointError(
                f"The checkpoint holds the state of a loss scaler ({', '.join(map(str, state_dict))}), but this run "
                f"computes without one and would drop it. Resume with `mixed_precision='fp16'`, as it was saved."
            )


class DynamicLossScaler:
    """Multiplies the loss by a scale that grows while gradients stay finite and shrinks when they do not.

    The scale lives on the host, so that asking for it, changing it and storing it never wait for a device. The one
    wait is in `step`, which must know whether to step. One scaler serves every optimizer of a run.

    Args:
        init_scale: first factor on the loss.
        growth_factor: greater than 1; applied after `growth_interval` good updates in a row.
        backoff_factor: between 0 and 1; applied at an update before which any gradient was not finite.
        growth_interval: number of good updates in a row before the scale grows.
        device: where the flags of all gradients meet; the device of most gradients.
        reduce_found_inf: called by `unscale_` once, on every rank, with a float32 tensor of shape () on `device` that
            is greater than 0 where this rank found a non-finite gradient. It makes it greater than 0 on all ranks if
            it is on any, in place; without that, ranks that hold different shards would disagree on stepping. Not
            needed where all ranks hold equal gradients, as under data parallelism. May be set later.

    Raises:
        ConfigError: if a number would not keep the scale positive and adapting.
    """

    enabled: bool = True

    def __init__(
        self,
        *,
        init_scale: float = 65536.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        device: torch.device | str = "cpu",
        reduce_found_inf: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        settings = GradScalerKwargs(
            init_scale=init_scale,
            growth_factor=growth_factor,
            backoff_factor=backoff_factor,
            growth_interval=growth_interval,
        )
        self.reduce_found_inf = reduce_found_inf
        self._settings = settings
        self._device = torch.device(device)
        self._scale = _as_float32(settings.init_scale)
        self._growth_tracker = 0
        self._inverse: dict[torch.device, torch.Tensor] = {}
        self._unscaled: dict[torch.optim.Optimizer, torch.Tensor] = {}
        """Flags of the optimizers whose gradients are unscaled and which have not stepped yet."""
        self._stepped = False
        self._found_inf = False

    def get_scale(self) -> float:
        """The factor that the next loss is multiplied by. Read on the host, without waiting for a device."""
        return self._scale

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """`loss` times the current scale, differentiable. A loss of 16 bits is returned in float32, where it fits."""
        return (loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss) * self._scale

    @torch.no_grad()
    def unscale_(self, optimizer: torch.optim.Optimizer, gradients: Iterable[torch.Tensor]) -> None:
        """Divide `gradients`, those of `optimizer`, by the scale in place and note whether any is not finite.

        A second call before `step` does nothing. Does not wait for the device. Of sharded tensors each rank treats
        its own shard, and of sparse ones the values.

        Raises:
            ConfigError: for a float16 gradient, whose small values would vanish in the division.
        """
        if optimizer in self._unscaled:
            return
        groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = defaultdict(list)
        for gradient in gradients:
            values = _values(gradient)
            groups[values.device, values.dtype].append(values)
        flags: dict[torch.device, torch.Tensor] = {self._device: self._new_flag(self._device)}
        for (device, dtype), members in groups.items():
            if dtype is torch.float16:
                raise ConfigError(
                    f"{len(members)} gradient(s) of `{type(optimizer).__name__}` are float16, and dividing them by the "
                    f"loss scale {self._scale:g} would turn small ones into zero. Keep the parameters in float32: "
                    f"load or convert the model with `model.float()`, and let autocast compute in float16."
                )
            if device not in flags:
                flags[device] = self._new_flag(device)
            torch._amp_foreach_non_finite_check_and_unscale_(members, flags[device], self._inverse_on(device))
        found = flags.pop(self._device)
        for flag in flags.values():
            found += flag.to(self._device, non_blocking=True)
        if self.reduce_found_inf is not None:
            self.reduce_found_inf(found)
        self._unscaled[optimizer] = found

    def step(self, optimizer: torch.optim.Optimizer, step: Callable[[], Any]) -> bool:
        """Call `step` unless `unscale_` found a gradient that is not finite. Returns whether it was called.

        Waits for the device once. Afterwards `optimizer` may be unscaled and stepped again before `update`.

        Raises:
            AccelError: if the gradients of `optimizer` were not unscaled since its last step or the last `update`.
        """
        if optimizer not in self._unscaled:
            raise AccelError(
                f"`step` was called for `{type(optimizer).__name__}`, but its gradients still carry the loss scale "
                f"{self._scale:g}: `unscale_` was not called since its last step, or `update` came in between. Call "
                f"`unscale_` before `step`, and `update` after the last step of the window."
            )
        found_inf = self._unscaled.pop(optimizer).item() > 0.0
        self._stepped = True
        self._found_inf |= found_inf
        if not found_inf:
            step()
        return not found_inf

    def update(self) -> None:
        """Adapt the scale, once for all steps since the last call; without any, the scale stays.

        Only between accumulation windows: gradients that were unscaled and not stepped count as given up, so that
        the next window unscales its own.

        Raises:
            AccelError: if the scale has become too small to be a number, because every step was skipped.
        """
        self._unscaled.clear()
        if not self._stepped:
            return
        found_inf, self._found_inf, self._stepped = self._found_inf, False, False
        if found_inf:
            self._growth_tracker = 0
            self._set_scale(self._scale * self._settings.backoff_factor)
            return
        self._growth_tracker += 1
        if self._growth_tracker >= self._settings.growth_interval:
            self._growth_tracker = 0
            grown = _as_float32(self._scale * self._settings.growth_factor)
            if math.isfinite(grown):
                self._set_scale(grown)

    def state_dict(self) -> dict[str, Any]:
        """JSON values from which the scaler is restored to the bit, also between a step and its `update`::

            {"scale": 65536.0, "growth_tracker": 7, "stepped": True, "found_inf": False}

        The last two are what `update` has not been called for yet. Unscaled gradients are not part of it, as gradients
        are not part of a checkpoint.
        """
        return {
            "scale": self._scale,
            "growth_tracker": self._growth_tracker,
            "stepped": self._stepped,
            "found_inf": self._found_inf,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state that `state_dict` gave. The four settings stay those of this scaler.

        Raises:
            CheckpointError: if the state is not one of a loss scaler.
        """
        expected = self.state_dict()
        if set(state_dict) != set(expected):
            raise CheckpointError(
                f"The state of the loss scaler holds {sorted(map(str, state_dict)) or 'nothing'}, but it must hold "
                f"{sorted(expected)}. Resume from a checkpoint saved with `mixed_precision='fp16'`."
            )
        for key, value in expected.items():
            found = state_dict[key]
            good = type(found) is type(value) and math.isfinite(found) and found >= 0
            if not good or (key == "scale" and _as_float32(found) < _SMALLEST_SCALE):
                raise CheckpointError(
                    f"The state of the loss scaler holds `{key}={found!r}`, which is no such value as {value!r}. "
                    f"The checkpoint is damaged: resume from an earlier one."
                )
        self._set_scale(state_dict["scale"])
        self._growth_tracker = state_dict["growth_tracker"]
        self._stepped, self._found_inf = state_dict["stepped"], state_dict["found_inf"]
        self._unscaled.clear()

    def _set_scale(self, scale: float) -> None:
        scale = _as_float32(scale)
        if scale < _SMALLEST_SCALE:
            raise AccelError(
                f"The loss scale has shrunk from {self._settings.init_scale:g} to {self._scale:g}, because the "
                f"gradients were not finite at every scale: the loss or the weights are NaN or infinite themselves. "
                f"Look for the first loss that is not finite, lower the learning rate, or use `mixed_precision='bf16'`."
            )
        self._scale = scale
        self._inverse.clear()

    def _inverse_on(self, device: torch.device) -> torch.Tensor:
        if device not in self._inverse:
            self._inverse[device] = torch.full((), 1.0 / self._scale, dtype=torch.float32, device=device)
        return self._inverse[device]

    @staticmethod
    def _new_flag(device: torch.device) -> torch.Tensor:
        return torch.zeros((), dtype=torch.float32, device=device)


def _values(gradient: torch.Tensor) -> torch.Tensor:
    """The dense local tensor that holds the numbers of `gradient`, sharing its memory."""
    if gradient.is_sparse:
        return gradient._values()
    to_local = getattr(gradient, "to_local", None)
    return gradient if to_local is None else to_local()


def _as_float32(value: float) -> float:
    """`value` rounded to float32, in which tensors carry it; infinite where it does not fit."""
    try:
        return float(struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:
        return math.inf
