"""A model's forward pass in lower precision, on the same module object."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from accel_precision.scaler import NoScaler
from accel_precision.settings import AutocastKwargs
from accel_state.dtypes import DTypePolicy
from accel_state.errors import ConfigError
from accel_state.protocols import LossScaler
from accel_state.tree import map_tensors

__all__ = ["FullPrecision", "MixedPrecision"]

_EARLIER_FORWARD = "_forward_before_precision"
"""Where an instance keeps a `forward` of its own that it had before it was wrapped."""


class FullPrecision:
    """Computes in the dtypes that the model has. Adds nothing to a step."""

    def __init__(self) -> None:
        self.policy = DTypePolicy()
        self._scaler = NoScaler()

    @property
    def name(self) -> str:
        """``"no"``."""
        return "no"

    @property
    def scaler(self) -> LossScaler:
        """A scaler that changes nothing."""
        return self._scaler

    def check(self, model: torch.nn.Module, *, name: str = "model") -> None:
        """Accepts every model."""

    def forward_context(self) -> AbstractContextManager[Any]:
        """A context that does nothing."""
        return nullcontext()

    def wrap_forward(self, model: torch.nn.Module) -> torch.nn.Module:
        """`model`, untouched."""
        return model

    def unwrap_forward(self, model: torch.nn.Module) -> torch.nn.Module:
        """`model`, untouched."""
        return model


class MixedPrecision:
    """Parameters stay as they are; operations that gain by it compute in the policy's ``compute_dtype``.

    Args:
        policy: its ``compute_dtype`` is the one that operations are cast to.
        name: ``"fp16"`` or ``"bf16"``.
        device: where the model computes.
        scaler: keeps gradients from vanishing, under float16.
        autocast: how to cast.

    Raises:
        ConfigError: if torch has no autocast for the device.
    """

    def __init__(
        self,
        policy: DTypePolicy,
        *,
        name: str,
        device: torch.device,
        scaler: LossScaler | None = None,
        autocast: AutocastKwargs | None = None,
    ) -> None:
        if not torch.amp.is_autocast_available(device.type):
            raise ConfigError(
                f"`mixed_precision={name!r}` casts operations with torch.autocast, and torch {torch.__version__} has "
                f"none for the device {device.type!r}. Use `mixed_precision='no'`, or another device."
            )
        self.policy = policy
        self.device = device
        self._name = name
        self._scaler: LossScaler = NoScaler() if scaler is None else scaler
        settings = AutocastKwargs() if autocast is None else autocast
        self._autocast = functools.partial(
            torch.autocast,
            device.type,
            dtype=policy.compute_dtype,
            enabled=settings.enabled,
            cache_enabled=settings.cache_enabled,
        )

    @property
    def name(self) -> str:
        """``"fp16"`` or ``"bf16"``: what is computed in, also where something else was asked for first."""
        return self._name

    @property
    def scaler(self) -> LossScaler:
        """The one scaler of this precision, for every optimizer of the run."""
        return self._scaler

    def check(self, model: torch.nn.Module, *, name: str = "model") -> None:
        """Refuse a model whose gradients would be float16 under loss scaling.

        Args:
            model: not yet wrapped, or wrapped; only its trainable parameters are looked at.
            name: how the user knows the model, for the message.

        Raises:
            ConfigError: naming the first such parameter and how many there are.
        """
        if not self._scaler.enabled:
            return
        found = [key for key, each in model.named_parameters() if each.requires_grad and each.dtype is torch.float16]
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise ConfigError(
                f"The trainable parameter `{name}.{found[0]}`{more} is float16, but `mixed_precision={self._name!r}` "
                f"scales the loss, and gradients kept in float16 would vanish when they are divided by the scale. Keep "
                f"the parameters in float32 (`model.float()`, or load with `torch_dtype=torch.float32`; autocast still "
                f"computes in float16), or use `mixed_precision='bf16'` with a bfloat16 model."
            )

    def forward_context(self) -> AbstractContextManager[Any]:
        """A new autocast context."""
        return self._autocast()

    def wrap_forward(self, model: torch.nn.Module) -> torch.nn.Module:
        """Give `model` a `forward` of its own that computes in autocast and returns the policy's ``output_dtype``.

        The module object, its class, its ``state_dict`` keys and the signature of its ``forward`` stay. A deep copy is
        wrapped too and runs the copy. Wrap before ``torch.compile``, so that the casts are compiled too. Wrapping again
        changes nothing.

        Raises:
            ConfigError: if `model` was wrapped by another precision.
        """
        wrapped_by = _precision_of(model)
        if wrapped_by is None:
            model.__dict__["forward"] = types.MethodType(_casting_forward(self, model), model)
        elif wrapped_by.name != self.name:
            raise ConfigError(
                f"The `{type(model).__name__}` computes in {wrapped_by.name} already, and would now compute in "
                f"{self.name} as well. Prepare a model once, or call `unwrap_forward` on it before."
            )
        return model

    def unwrap_forward(self, model: torch.nn.Module) -> torch.nn.Module:
        """Give `model` the `forward` back that it had; does nothing to a model that was not wrapped."""
        if _precision_of(model) is not None:
            del model.__dict__["forward"]
            if _EARLIER_FORWARD in model.__dict__:
                model.__dict__["forward"] = model.__dict__.pop(_EARLIER_FORWARD)
        return model

    def cast_outputs(self, outputs: Any) -> Any:
        """`outputs` with tensors of the policy's ``compute_dtype`` in its ``output_dtype``; others stay."""
        computed, wanted = self.policy.compute_dtype, self.policy.output_dtype
        if computed is None or wanted is None:
            return outputs
        return _cast(outputs, computed, wanted)


def _cast(tree: Any, computed: torch.dtype, wanted: torch.dtype) -> Any:
    """As `map_tensors`, but plain containers are rebuilt in a way that torch.compile traces in one graph."""
    if isinstance(tree, torch.Tensor):
        return tree.to(wanted) if tree.dtype == computed else tree
    kind = type(tree)
    if kind is dict:
        return {key: _cast(each, computed, wanted) for key, each in tree.items()}
    if kind is list:
        return [_cast(each, computed, wanted) for each in tree]
    if kind is tuple:
        return tuple([_cast(each, computed, wanted) for each in tree])
    return map_tensors(tree, lambda tensor: tensor.to(wanted) if tensor.dtype == computed else tensor)


def _precision_of(model: torch.nn.Module) -> MixedPrecision | None:
    """The precision by which `model` itself was wrapped, not one of its children."""
    function = getattr(model.__dict__.get("forward"), "__func__", None)
    found: MixedPrecision | None = getattr(function, "_precision", None)
    return found


def _casting_forward(precision: MixedPrecision, model: torch.nn.Module) -> Callable[..., Any]:
    """The function behind the new `forward`. It finds everything through its `self`, so that a copy runs the copy."""
    earlier = model.__dict__.get("forward")
    if earlier is None:
        original = type(model).forward
    else:
        model.__dict__[_EARLIER_FORWARD] = earlier

        def original(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.__dict__[_EARLIER_FORWARD](*args, **kwargs)

        functools.update_wrapper(original, earlier)
        del original.__wrapped__  # type: ignore[attr-defined]
        signature = inspect.signature(earlier)
        first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        original.__signature__ = signature.replace(parameters=[first, *signature.parameters.values()])  # type: ignore[attr-defined]

    @functools.wraps(original)
    def forward(self: torch.nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        with precision.forward_context():
            outputs = original(self, *args, **kwargs)
        return precision.cast_outputs(outputs)

    forward._precision = precision  # type: ignore[attr-defined]
    return forward
