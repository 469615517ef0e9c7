"""Modules that hold a part of their parameters: what their hooks exchange, in forward and in backward.

Parameters are `DTensor`; computing is done on each rank's plain tensors, with the conjugate pairs of operations of
Megatron-LM (arXiv:1909.08053, section 3): where one sums in forward, the other sums in backward. So a module between
two others sees plain tensors, and nothing pays for a dispatch by `DTensor`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from accel_parallel.tensor.styles import Style

__all__ = ["all_gather", "divide_module", "localize_module"]

# torch 2.13 renamed it; the old name warns there.
all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_ENTERED = "_accel_tp_entered"
_ELSEWHERE = "_accel_tp_elsewhere"
_PADDING = "_accel_tp_padding"


def divide_module(module: nn.Module, style: Style, mesh: DeviceMesh) -> None:
    """Let a Linear or an Embedding, whose parameters are divided already, compute with this rank's part."""
    group, rank, size = mesh.get_group(), mesh.get_local_rank(), mesh.size()
    adds_later = style.kind == "linear" and style.exit == "summed"  # a bias is added once, not by each rank

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        for key, parameter in _held(module):
            module.__dict__[key] = None if adds_later and key == "bias" else parameter.to_local()
        if style.entry == "whole":
            return _with_first(args, kwargs, lambda value: _entered(value, group))
        if style.entry == "split":
            return _with_first(args, kwargs, lambda value: _apply(_Split, value, group, rank, size))
        if style.entry == "rows":
            return _with_first(args, kwargs, lambda value: _own_rows(module, value, rank, size))
        return args, kwargs

    def restore(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for key, _ in _held(module):
            module.__dict__.pop(key, None)
        if _PADDING in module.__dict__:
            module.padding_idx = module.__dict__.pop(_PADDING)

    def after(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> Any:
        if style.entry == "rows":
            output = output.masked_fill(module.__dict__.pop(_ELSEWHERE).unsqueeze(-1), 0)
        if style.exit == "summed":
            output = _apply(_Sum, output, group)
            bias: Any = module._parameters.get("bias") if adds_later else None
            return output if bias is None else output + bias.to_local()
        if style.exit == "gathered":
            return _apply(_Gather, output, group, rank, size)
        if style.exit == "kept":
            return DTensor.from_local(output, mesh, [Shard(output.dim() - 1)], run_check=False)
        return output

    module.register_forward_pre_hook(_hook(before), with_kwargs=True)
    # Also where recomputing stops early, by an exception.
    module.register_forward_hook(_hook(restore), always_call=True)
    module.register_forward_hook(_hook(after))


def localize_module(module: nn.Module, summed: Collection[str], mesh: DeviceMesh) -> None:
    """Let a module compute with plain tensors in place of the `DTensor` parameters that it holds itself.

    Args:
        summed: names of those whose gradients cover this rank's part only, and are summed.
    """
    group = mesh.get_group()
    # Not every child is called: then its holder must look after it.
    idle = [
        key
        for key, child in module.named_children()
        if isinstance(child, (nn.ParameterList, nn.ParameterDict)) or isinstance(module, nn.MultiheadAttention)
    ]

    def owners(module: nn.Module) -> list[tuple[str, nn.Module]]:
        return [("", module), *((f"{key}.", module.get_submodule(key)) for key in idle)]

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        for prefix, owner in owners(module):
            for key, parameter in _held(owner):
                local = parameter.to_local()
                owner.__dict__[key] = _entered(local, group) if f"{prefix}{key}" in summed else local

    def restore(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for _, owner in owners(module):
            for key, _ in _held(owner):
                owner.__dict__.pop(key, None)

    module.register_forward_pre_hook(_hook(before))
    module.register_forward_hook(_hook(restore), always_call=True)


def _hook(function: Any) -> Any:
    """What is registered. Before torch 2.13 compilers do not understand how attributes are set for a time and taken
    back (seen with 2.6 and 2.11), and with 2.11 they made code of it that computed other gradients. They leave the
    hooks alone there, at a break of the graph each."""
    if torch.__version__ >= "2.13":  # compared as versions
        return function
    return torch.compiler.disable(function)  # type: ignore[no-untyped-call]


def _held(module: nn.Module) -> list[tuple[str, Any]]:
    return [(key, parameter) for key, parameter in module._parameters.items() if parameter is not None]


def _with_first(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Any], Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (change(args[0]), *args[1:]), kwargs
    if "input" in kwargs:  # the name that Linear and Embedding give it
        return args, {**kwargs, "input": change(kwargs["input"])}
    return args, kwargs


def _own_rows(module: nn.Module, index: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """Indices into this rank's rows. For rows of other ranks, the first one, whose result is blanked afterwards.

    An index outside the whole table stays outside this part of it, so that the lookup refuses it as ever.
    """
    rows = module.__dict__["weight"].shape[0]
    local = index - rank * rows
    elsewhere = ((local < 0) | (local >= rows)) & (index >= 0) & (index < size * rows)
    module.__dict__[_ELSEWHERE] = elsewhere
    padding: Any = getattr(module, "padding_idx", None)
    if padding is not None:
        module.__dict__[_PADDING] = padding
        module.padding_idx = padding % rows if padding // rows == rank else None  # type: ignore[assignment]
    own: torch.Tensor = local.masked_fill(elsewhere, 0)
    return own


def _apply(function: type[torch.autograd.Function], *args: Any) -> torch.Tensor:
    result: torch.Tensor = function.apply(*args)  # type: ignore[no-untyped-call, unused-ignore]
    return result


def _entered(value: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """`value`, whose gradient is summed over the ranks: once, for all the modules that it enters."""
    alone = value.is_leaf or not value.requires_grad or not torch.is_grad_enabled() or torch.compiler.is_compiling()
    if alone:
        return _apply(_SumGradient, value, group)
    known = value.__dict__.get(_ENTERED)
    if known is None or known[0] != value._version or known[1] is not group:
        # The result is no view of `value`, or both would keep each other alive for ever.
        known = (value._version, group, _apply(_SumGradient, value, group))
        setattr(value, _ENTERED, known)
    entered: torch.Tensor = known[2]
    return entered


def _summed(value: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    total = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _gathered(value: torch.Tensor, group: dist.ProcessGroup, size: int) -> torch.Tensor:
    """The parts of all ranks beside each other, in their order: (..., n) to (..., size * n)."""
    value = value.contiguous()
    parts = value.new_empty((size * value.shape[0], *value.shape[1:])) if value.dim() else value.new_empty(size)
    all_gather(parts, value, group=group)
    return torch.cat(parts.chunk(size), dim=-1)


def _part(value: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    width = value.shape[-1] // size
    return value.narrow(-1, rank * width, width).contiguous()


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return value.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _summed(gradient, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        return _summed(value, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, group: dist.ProcessGroup, rank: int, size: int) -> torch.Tensor:
        ctx.place = rank, size
        return _gathered(value, group, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _part(gradient, *ctx.place), None, None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, group: dist.ProcessGroup, rank: int, size: int) -> torch.Tensor:
        ctx.place = group, size
        return _part(value, rank, size)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _gathered(gradient, *ctx.place), None, None, None
