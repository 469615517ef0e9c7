"""Compiling models by `torch.compile`, in place: as a whole, or once for all blocks that are alike."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn

from accel_parallel.forwards import Forward, dress, forward_of, is_replaced, replace_forward, restore_forward
from accel_parallel.recompute import CACHE_ARGUMENTS, is_checkpointed, recompute_instead, without_cache
from accel_parallel.sequence.attention import exchanges
from accel_state.blocks import find_blocks, outermost
from accel_state.errors import ConfigError

__all__ = [
    "TorchDynamoPlugin",
    "compile_model",
    "compile_regions",
    "has_compiled_regions",
    "is_compiled",
    "uncompile",
]

_KIND = "compiled"


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchDynamoPlugin:
    """How models are compiled. The first five are arguments of `torch.compile`."""

    backend: str | Callable[..., Any] = "inductor"
    """Name of a backend of dynamo, or a function from a graph and example inputs to what runs it."""
    mode: str | None = None
    """What inductor trades for speed, such as ``"reduce-overhead"`` or ``"max-autotune"``; not with `options`."""
    fullgraph: bool = False
    """Whether code that cannot be captured in one graph raises instead of running between several."""
    dynamic: bool | None = None
    """Whether sizes are variables of the compiled code. ``None``: those that turn out to vary."""
    options: dict[str, Any] | None = None
    """Settings of the backend; not with `mode`."""
    disable: bool = False
    """Whether to compile nothing, so that a script can be debugged without changing the other settings."""
    use_regional_compilation: bool | None = None
    """Whether the repeated blocks are compiled, once for all that are alike, and not the model as a whole: compile
    time no longer grows with depth, and what lies between blocks runs as it was written. ``None``: where the model is
    sharded, since hooks of its units are not compiled and would cut the graph of the whole."""

    def __post_init__(self) -> None:
        if self.mode is not None and self.options is not None:
            raise ConfigError(
                f"`mode={self.mode!r}` and `options={self.options}` were both given, and a mode is a set of options. "
                f"Give one of them."
            )
        if isinstance(self.backend, str) and self.backend != "inductor" and self.mode not in (None, "default"):
            raise ConfigError(
                f"`mode={self.mode!r}` is one of inductor's and has no effect with `backend={self.backend!r}`. Leave "
                f"one of them out."
            )

    def arguments(self) -> dict[str, Any]:
        """Those of `torch.compile`."""
        return {
            "backend": self.backend,
            "mode": self.mode,
            "fullgraph": self.fullgraph,
            "dynamic": self.dynamic,
            "options": self.options,
        }


def compile_model(model: nn.Module, plugin: TorchDynamoPlugin, *, sharded: bool = False) -> None:
    """Compile `model` in place, as a whole or by its blocks. Compiling itself happens at the first forward.

    Names, ``state_dict``, identity and hooks stay: the instance's forward is replaced. Call it on the module that a
    user handed in: after activation checkpointing and after a precision's casts, which are compiled too, and before it
    is wrapped in DDP or sharded.

    Args:
        model: what to compile.
        plugin: how.
        sharded: whether the blocks of `model` are or will be sharded by `fully_shard`.

    Raises:
        ConfigError: if something in the model is compiled already, `torch.compile` refuses the settings, a model
            without repeated blocks is to be compiled by these, or a sharded one as a whole.
    """
    if plugin.disable:
        return
    regional = sharded if plugin.use_regional_compilation is None else plugin.use_regional_compilation
    if regional:
        compile_regions(model, **plugin.arguments())
        return
    if sharded:
        raise ConfigError(
            f"`use_regional_compilation=False` was given for `{type(model).__name__}`, which is sharded: the hooks of "
            f"its units run uncompiled and would cut the graph at each of them. Leave it out, or set it to true."
        )
    _refuse_twice(model)
    if any(is_checkpointed(module) and exchanges(module) for module in model.modules()):
        raise ConfigError(
            f"`{type(model).__name__}` was to be compiled as a whole, and in its blocks, whose activations are "
            f"checkpointed, attention exchanges tokens between ranks: its graph would end inside what is to be "
            f"recomputed, which dynamo does not take. Set `use_regional_compilation=True`, or leave one of the two out."
        )
    inner = forward_of(model)
    replace_forward(model, _KIND, _compiled(_with_own_code(inner), plugin.arguments()), inner)


def compile_regions(model: nn.Module, blocks: Iterable[tuple[str, nn.Module]] | None = None, **arguments: Any) -> None:
    """Compile the blocks of `model` in place, those that are alike only once, whatever their number.

    Blocks that run the same forward share what was compiled as long as dynamo's guards hold: parameters are inputs,
    so only a difference of shapes, of dtypes, of what needs gradients or of attributes that the forward reads costs
    another compilation. Integers that number the layers become variables where torch can (from 2.8 on). A block that
    is given a cache of keys and values, in which each has its own place, runs as it was written.

    Args:
        model: the whole model, which is searched for what is compiled already.
        blocks: as `find_blocks` gives them, which is asked by default. Blocks inside others are part of these.
        arguments: those of `torch.compile`.

    Raises:
        ConfigError: as of `compile_model`.
    """
    _refuse_twice(model)
    found = outermost(find_blocks(model) if blocks is None else blocks)
    if not found:
        raise ConfigError(
            f"`{type(model).__name__}` was to be compiled by its repeated blocks, and none were found in it. Compile "
            f"it as a whole (`use_regional_compilation=False`, unless it is sharded), or call `compile_regions` with "
            f"`blocks`."
        )
    alike: dict[Forward, list[nn.Module]] = defaultdict(list)
    for _, block in found:
        alike[forward_of(block)].append(block)
    for inner, members in alike.items():
        outer = _compiled_block(inner, members, arguments)
        for block in members:
            replace_forward(block, _KIND, outer, inner)


def is_compiled(model: nn.Module) -> bool:
    """Whether the model or any part of it is compiled, be it by others."""
    return any(_how_compiled(module) is not None for module in model.modules())


def has_compiled_regions(model: nn.Module) -> bool:
    """Whether parts of the model were compiled by `compile_regions`."""
    return any(is_replaced(module, _KIND) for module in model.modules() if module is not model)


def uncompile(model: nn.Module) -> None:
    """Undo `compile_model` and `compile_regions`; nothing where neither was called.

    Raises:
        ConfigError: if a forward was replaced once more since then.
    """
    for module in model.modules():
        restore_forward(module, _KIND, how="`uncompile`")


def _compiled(function: Forward, arguments: dict[str, Any]) -> Forward:
    try:
        compiled: Forward = torch.compile(function, **arguments)
    except RuntimeError as error:  # dynamo's own errors derive from it
        raise ConfigError(
            f"`torch.compile` refuses {', '.join(f'{name}={value!r}' for name, value in arguments.items())}: {error} "
            f"Change these settings of the compilation."
        ) from error
    return compiled


def _compiled_block(inner: Forward, members: Sequence[nn.Module], arguments: dict[str, Any]) -> Forward:
    """What all of `members`, whose forward is `inner`, are to run."""

    def compiled(inner: Forward, *, recomputes: bool) -> Forward:
        function = _with_variable_numbers(inner) if _numbers_differ(members) else inner
        return _without_caches(_compiled(_with_own_code(function), arguments), inner, recomputes)

    recomputes = is_checkpointed(members[0])
    if recomputes and exchanges(members[0]):
        # Graphs end at an exchange, and dynamo takes none that ends inside of what it is to recompute.
        return recompute_instead(inner, partial(compiled, recomputes=False))
    return compiled(inner, recomputes=recomputes)


def _with_own_code(function: Forward) -> Forward:
    """The same function with a code object of its own, on which dynamo keeps what it compiled.

    Dynamo compiles a code object anew 8 times at most, then it runs as it was written. Decorators give one code object
    to many functions (that of transformers' layers is one for all classes), so these would use up each other's turns.
    """
    if not isinstance(function, FunctionType):
        return function
    code, name = function.__code__.replace(), function.__name__
    copy = FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    dress(copy, function)
    return copy


def _without_caches(compiled: Forward, inner: Forward, recomputes: bool) -> Forward:
    """`compiled`, except where each block would write into its own place of a cache, which makes each one different."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if any(kwargs.get(name) is not None for name in CACHE_ARGUMENTS):
            training = self.training and torch.is_grad_enabled()
            if not (recomputes and training):
                if training:
                    warnings.warn(
                        f"Blocks of class `{type(self).__name__}` were given a cache of keys and values in training, "
                        f"so they run uncompiled. Train with `use_cache=False`.",
                        stacklevel=2,
                    )
                return inner(self, *args, **kwargs)
            kwargs = without_cache(kwargs)
        return compiled(self, *args, **kwargs)

    dress(forward, inner)
    return forward


def _numbers_differ(blocks: Sequence[nn.Module]) -> bool:
    """Whether an integer attribute, such as the number of a layer, has several values in blocks that are alike."""
    values: dict[tuple[str, str], set[int]] = defaultdict(set)
    for block in blocks:
        for path, part in block.named_modules():
            for name, value in vars(part).items():
                if type(value) is int:
                    values[path, name].add(value)
    return any(len(each) > 1 for each in values.values())


def _with_variable_numbers(function: Forward) -> Forward:
    """`function`, traced with integer attributes as variables, where they would be constants of the compiled code."""
    patch = getattr(torch._dynamo, "patch_dynamo_config", None)
    if patch is None:
        return function

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with patch(allow_unspec_int_on_nn_module=True):
            return function(self, *args, **kwargs)

    dress(forward, function)
    return forward


def _how_compiled(module: nn.Module) -> str | None:
    if is_replaced(module, _KIND):
        return "by accel"
    if "_orig_mod" in module._modules:
        return "by `torch.compile(module)`"
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "by `module.compile()`"
    forward = vars(module).get("forward")
    while forward is not None:  # down to what was replaced
        if hasattr(forward, "_torchdynamo_orig_callable"):
            return "by `torch.compile(module.forward)`"
        forward = getattr(forward, "__wrapped__", None)
    return None


def _refuse_twice(model: nn.Module) -> None:
    for name, module in model.named_modules():
        how = _how_compiled(module)
        if how is not None:
            where = f"its part `{name}`" if name else "it"
            raise ConfigError(
                f"`{type(model).__name__}` was to be compiled, and {where} is compiled already, {how}. Compile it "
                f"once: leave one of the two out, or call `uncompile(model)` before."
            )
