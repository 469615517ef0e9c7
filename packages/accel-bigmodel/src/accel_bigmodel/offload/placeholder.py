"""What a module holds while the values of a parameter or buffer are not on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from accel_state.errors import ConfigError

__all__ = ["Placeholder", "pickling_refused"]

aten: Any = torch.ops.aten
_OF_SHAPE = {
    aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like, aten.rand_like, aten.randn_like, aten.new_empty,
    aten.new_zeros, aten.new_ones, aten.new_full, aten.new_empty_strided,
}  # fmt: skip
"""Operators that look at shape, dtype and device alone."""


def pickling_refused(name: str) -> ConfigError:
    """Why a model cannot be pickled that has `name`, a tensor or a unit, offloaded."""
    return ConfigError(
        f"A model with offloaded weights ({name!r} is one of its parts) cannot be pickled: streams and pinned memory "
        f"belong to this process. Save its `state_dict()`, which is complete, or call `remove_hooks` first."
    )


class Placeholder(torch.Tensor):
    """Has shape, dtype and device, and no values: whatever would read or change these is refused with a reason.

    The device is the one where its values will be, so that who asks a model where it computes, or puts something beside
    a weight, gets the right answer. An ordinary tensor without values would be no refusal: some operators take one on
    the meta device beside others, and give memory that nobody wrote (``torch.nn.functional.linear`` in torch 2.13).

    Args:
        value: what it stands for.
        name: for messages.
        device: where its values will be.
    """

    is_offloaded = True
    """How others know it, who do not import this package."""
    _name: str

    @staticmethod
    def __new__(cls, value: torch.Tensor, name: str, device: torch.device) -> Placeholder:
        made: Placeholder = torch.Tensor._make_wrapper_subclass(
            cls, value.shape, dtype=value.dtype, device=device, requires_grad=value.requires_grad
        )
        made._name = name
        if isinstance(value, nn.Parameter):
            made._is_param = True
        return made

    def __init__(self, value: torch.Tensor, name: str, device: torch.device) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Placeholder({self._name!r}, shape={list(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Placeholder:
        made = Placeholder(self, self._name, self.device)
        memo[id(self)] = made
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise pickling_refused(self._name)

    @property
    def data(self) -> Any:
        """Refused, as values are not there."""
        self._refuse("be read or changed")

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        self._refuse("be replaced")

    def _refuse(self, what: str) -> NoReturn:
        raise ConfigError(
            f"`{self._name}` was to {what}, but is offloaded: it has values only while a forward of its block needs "
            f"them. If a module reads the weights of its children without calling them, name its class in "
            f"`preload_module_classes`. To look at weights or change them, use `align_module_device`; to move, convert "
            f"or merge the model, call `remove_hooks` first."
        )

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if isinstance(first, cls):
            if func.overloadpacket is aten.detach:
                return _plain(first)
            if func.overloadpacket is aten.copy_ and args[1] is first:
                return first  # a state was loaded to where the values are, see `hooks`
            if func.overloadpacket in _OF_SHAPE:
                kwargs["device"] = kwargs.get("device") or first.device
                return func(torch.empty(first.shape, dtype=first.dtype, device="meta"), *args[1:], **kwargs)
        given = next(each for each in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(each, cls))
        return given._refuse(f"be used by `{func.overloadpacket.__name__}`")


def _plain(placeholder: Placeholder) -> Placeholder:
    """The same, as a tensor that is no parameter: what a ``state_dict`` holds until it is filled."""
    with torch.no_grad():
        made: Placeholder = torch.Tensor._make_wrapper_subclass(
            Placeholder, placeholder.shape, dtype=placeholder.dtype, device=placeholder.device
        )
    made._name = placeholder._name
    return made
