"""One tensor that a unit moves: where modules hold it, what stands for it, and what it is on the device."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import FunctionCtx

from accel_bigmodel.offload.placeholder import Placeholder
from accel_state.errors import ConfigError

__all__ = ["MovedTensor", "Place", "holders", "pieces_of"]


class Place(NamedTuple):
    """Where a module holds a tensor. The module is not kept alive by it, so that deleting a model frees it at once."""

    module: weakref.ref[nn.Module]
    name: str
    is_parameter: bool

    @property
    def slots(self) -> dict[str, Any]:
        """The dictionary of the module that holds it; an empty one if the module is no more, since it was replaced."""
        module = self.module()
        if module is None:
            return {}
        return module._parameters if self.is_parameter else module._buffers

    def get(self) -> Any:
        """What is there; None if nothing is."""
        return self.slots.get(self.name)

    def put(self, value: Any) -> None:
        """Have the module hold `value`."""
        module = self.module()
        if isinstance(module, nn.RNNBase) and isinstance(value, nn.Parameter):
            setattr(module, self.name, value)  # it keeps a list of them besides
        else:
            self.slots[self.name] = value


class MovedTensor:
    """A parameter or buffer, under all of its names, that is on the device only while it is needed.

    Modules hold a placeholder while it is not. Where somebody put another tensor in the placeholder's place, that one
    counts, and is let alone.

    Args:
        name: the first of its names, for messages.
        places: all modules that hold it.
        value: as it is now: its dtype, shape and class count.
        device: where it will be.
    """

    def __init__(self, name: str, places: Sequence[Place], value: torch.Tensor, device: torch.device) -> None:
        self.name = name
        self.places = list(places)
        self.is_parameter = places[0].is_parameter
        """Or a buffer."""
        self.num_pieces = len(pieces_of(value))
        """Plain tensors that it is made of: 1, or more for one of another class."""
        self._outer = _outer(value)
        self.placeholder = Placeholder(value, name, device)
        self._filled: list[Place] = []
        """Places that hold a value now."""

    @property
    def is_plain(self) -> bool:
        """Whether it is of torch's own class."""
        return self._outer is None

    @property
    def is_trained(self) -> bool:
        """Whether a module that holds it is in training mode."""
        return any(module.training for place in self.places if (module := place.module()) is not None)

    def value(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensor made of pieces like `pieces_of` gave, on whatever device these are."""
        return pieces[0] if self._outer is None else _rebuild(self._outer, iter(pieces))

    def put(self, pieces: Sequence[torch.Tensor], *, is_plain: bool = False) -> torch.Tensor:
        """Have all modules hold the tensor made of `pieces`, and give it.

        Args:
            pieces: as `value` takes them.
            is_plain: whether a parameter is an ordinary one, to be looked at and changed, and not one of a forward.
        """
        value = self.value(pieces)
        if is_plain and self.is_parameter:
            value = nn.Parameter(value, requires_grad=self.placeholder.requires_grad)
        elif self.placeholder.requires_grad and torch.is_grad_enabled():
            value = _NeedsNoGradient.apply(self.placeholder, value, self.name)  # type: ignore[no-untyped-call]
        elif self.is_parameter:
            value = nn.Parameter(value, requires_grad=False)
        self._filled = [place for place in self.places if place.get() is self.placeholder]
        for place in self._filled:
            place.put(value)
        return value

    def now(self, put: torch.Tensor) -> Any:
        """What modules hold in the place of `put`, which they were given."""
        return self._filled[0].get() if self._filled else put

    def put_placeholder(self) -> None:
        """Have all modules that were given a value hold the placeholder again."""
        for place in self._filled:
            if place.module() is not None:
                place.put(self.placeholder)
        self._filled = []

    def put_for_good(self, pieces: Sequence[torch.Tensor]) -> None:
        """Have all modules hold the tensor made of `pieces` as if it had never been moved."""
        value = self.value(pieces)
        if self.is_parameter:
            value = nn.Parameter(value, requires_grad=self.placeholder.requires_grad)
        for place in self.places:
            if place.get() is self.placeholder:
                place.put(value)

    def __deepcopy__(self, memo: dict[int, Any]) -> MovedTensor:
        made = MovedTensor.__new__(MovedTensor)
        memo[id(self)] = made
        made.__dict__.update(self.__dict__, _filled=[])
        modules = [(copy.deepcopy(place.module(), memo), place) for place in self.places]
        made.places = [place._replace(module=weakref.ref(module)) for module, place in modules if module is not None]
        made.placeholder = copy.deepcopy(self.placeholder, memo)
        return made


class _NeedsNoGradient(torch.autograd.Function):
    """Tells whoever trains a model in this state that these weights get no gradient, instead of giving none."""

    @staticmethod
    def forward(ctx: FunctionCtx, placeholder: torch.Tensor, value: torch.Tensor, name: str) -> torch.Tensor:
        ctx.name = name  # type: ignore[attr-defined]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> Any:
        raise ConfigError(
            f"A gradient for `{ctx.name}` was to be computed, but that weight is offloaded: it is on the device only "  # type: ignore[attr-defined]
            f"while a forward needs it, and an optimizer would never see it. Freeze it by `requires_grad_(False)` to "
            f"train others, such as adapters, or `remove_hooks` and keep what is trained on the device."
        )


def holders(model: nn.Module) -> Iterable[tuple[str, Place, torch.Tensor]]:
    """Every parameter and buffer under each of its names, module by module."""
    for prefix, module in model.named_modules():
        for slots, is_parameter in ((module._parameters, True), (module._buffers, False)):
            for name, tensor in slots.items():
                if tensor is not None:
                    yield f"{prefix}.{name}" if prefix else name, Place(weakref.ref(module), name, is_parameter), tensor


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter) or not hasattr(tensor, "__tensor_flatten__")


def pieces_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that hold the values of `tensor`: itself, or what a subclass flattens into.

    Raises:
        ConfigError: for a subclass that cannot be taken apart.
    """
    if _is_plain(tensor):
        if type(tensor) not in (torch.Tensor, nn.Parameter) and not _is_marked_parameter(tensor):
            raise ConfigError(
                f"A weight of the class `{type(tensor).__name__}` cannot be offloaded: it has values besides its "
                f"elements, and no `__tensor_flatten__` that tells which. Keep its module on the device, or quantize "
                f"by a library whose tensors can be taken apart, such as torchao."
            )
        return [tensor]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [piece for name in names for piece in pieces_of(getattr(tensor, name))]


def _is_marked_parameter(tensor: torch.Tensor) -> bool:
    """Whether the class only says that it is a parameter, and adds no state."""
    return isinstance(tensor, nn.Parameter) and not hasattr(tensor, "quant_state") and not hasattr(tensor, "CB")


class _Outer(NamedTuple):
    kind: type[torch.Tensor]
    context: Any
    size: torch.Size
    stride: tuple[int, ...]
    inner: list[tuple[str, Any]]


def _outer(tensor: torch.Tensor) -> _Outer | None:
    if _is_plain(tensor):
        return None
    names, context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    inner = [(name, _outer(getattr(tensor, name))) for name in names]
    return _Outer(type(tensor), context, tensor.shape, tensor.stride(), inner)


def _rebuild(outer: _Outer, pieces: Any) -> torch.Tensor:
    inner = {name: next(pieces) if each is None else _rebuild(each, pieces) for name, each in outer.inner}
    found: torch.Tensor = outer.kind.__tensor_unflatten__(inner, outer.context, outer.size, outer.stride)  # type: ignore[attr-defined]
    return found
