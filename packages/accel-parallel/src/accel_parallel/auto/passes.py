"""One micro-batch on fake tensors, and what it says about each unit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

from accel_parallel.auto.census import Census
from accel_parallel.auto.profile import Footprint, Growth, UnitPass
from accel_parallel.auto.record import Record, Recorder
from accel_state.config import MixedPrecision
from accel_state.dtypes import DTYPE_OF_PRECISION
from accel_state.errors import ConfigError

__all__ = ["Inputs", "Measuring"]

_BATCH = 2
"""Samples of a micro-batch of token ids: with one, kernels may take paths that no training does."""

_FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
"""What models raise where they cannot run on tensors without values."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What forward is called with. Tensors lend their shapes and dtypes."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    batch_size: int
    sequence_length: int | None = None

    @classmethod
    def of(cls, example: Any) -> Inputs:
        """From an example that a user gave."""
        kwargs = dict(example) if isinstance(example, Mapping) else {}
        args = () if isinstance(example, Mapping) else example if isinstance(example, tuple) else (example,)
        sizes = [each.shape[0] for each in tree_iter((args, kwargs)) if isinstance(each, torch.Tensor) and each.dim()]
        if not sizes or not sizes[0]:
            raise ConfigError(
                f"`example_inputs` of type {type(example).__name__} hold no tensor with a batch, so what a sample "
                f"costs cannot be told. Pass a tensor, a tuple, or a mapping of keyword arguments, the batch first."
            )
        return cls(args, kwargs, sizes[0])

    @classmethod
    def of_tokens(cls, names: Iterable[str], length: int) -> Inputs:
        """Token ids under each of these names."""
        ids = torch.empty(_BATCH, length, dtype=torch.long, device="meta")
        return cls((), dict.fromkeys(names, ids), _BATCH, length)


@dataclass(frozen=True, kw_only=True, slots=True)
class Measuring:
    """A model and how it is trained."""

    model: nn.Module
    """Left as it is."""
    census: Census
    """Its units."""
    loss: Callable[[Any], torch.Tensor] | None
    """From what forward returns."""
    precision: MixedPrecision
    device: str
    """On which it will be trained."""

    def run(self, inputs: tuple[Inputs, ...], *, gathered: bool) -> tuple[Footprint, float]:
        """What a micro-batch keeps and computes, and which part of the root's gradients comes before all of the blocks.

        Args:
            inputs: one, or the longer and the shorter of two.
            gathered: whether parameters come in the lower precision already, instead of by autocast.

        Raises:
            ConfigError: if the model does not run on fake tensors.
        """
        records = [self._record(each, gathered=gathered) for each in inputs]
        sums = [_Sums(record, self.census) for record in records]
        return _footprint(sums, inputs, self.census), _head_share(records[0].order, self.census)

    def _record(self, inputs: Inputs, *, gathered: bool) -> Record:
        model, dtype = self.model, DTYPE_OF_PRECISION[self.precision]
        # Fake tensors on the CPU stand for those of any device: there attention is fused as on an accelerator, which on
        # the meta device it would not be.
        with FakeTensorMode(allow_non_fake_inputs=True), _training(model):
            lower = dtype if gathered else None
            parameters, buffers = _stand_ins(model, lower)
            args, kwargs = tree_map(lambda each: _like(each, lower), (inputs.args, dict(inputs.kwargs)))
            given = [each for each in tree_iter((args, kwargs)) if isinstance(each, torch.Tensor)]
            recorder = Recorder(parameters, [*buffers.values(), *given], hidden_size=self.census.hidden_size)
            tensors = {**parameters, **buffers}
            try:
                with recorder, recorder.blocks(self.census.blocks):
                    with self._forward_context(None if gathered else dtype):
                        output = torch.func.functional_call(model, tensors, args, kwargs, tie_weights=False)
                        value = _loss_of(output, self.loss)
                        del output
                    recorder.enter_backward()
                    value.backward()  # type: ignore[no-untyped-call, unused-ignore]
            except _FAILURES as error:
                raise ConfigError(_failure(model, error)) from error
        return recorder.finish()

    @contextmanager
    def _forward_context(self, dtype: torch.dtype | None) -> Iterator[None]:
        with nullcontext() if dtype is None else torch.autocast("cpu", dtype):
            if torch.device(self.device).type == "cpu":
                yield
            else:
                with _FusedAttention():
                    yield


class _FusedAttention(TorchFunctionMode):
    """Attention without dropout: with it a CPU keeps all scores, and an accelerator the state of its generator."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0
            args = args[:4]  # query, key, value, mask; dropout comes next
        return func(*args, **kwargs)


def _failure(model: nn.Module, error: BaseException) -> str:
    reason = str(error).strip().split("\n")[0]
    return (
        f"{type(model).__name__} could not be measured without computing anything ({type(error).__name__}: {reason}). "
        f"Pass `example_inputs` of the right shapes and a `loss`, choose an attention of torch's own, or, for a "
        f"transformer, set `measured=False`."
    )


def _stand_ins(model: nn.Module, dtype: torch.dtype | None) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Fake parameters and buffers by name. Tied ones come apart, so that each place has a gradient of its own.

    Modules are visited once: `functional_call` would not put back what it replaced under a second name.
    """
    parameters: dict[str, torch.Tensor] = {}
    buffers: dict[str, torch.Tensor] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            lower = dtype if parameter.is_floating_point() else None
            made = torch.empty(parameter.shape, dtype=lower or parameter.dtype, device="cpu")
            parameters[f"{prefix}.{name}" if prefix else name] = made.requires_grad_(parameter.requires_grad)
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            made = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
            buffers[f"{prefix}.{name}" if prefix else name] = made
    return parameters, buffers


def _like(value: Any, dtype: torch.dtype | None) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    lower = dtype if value.is_floating_point() else None
    return torch.empty(value.shape, dtype=lower or value.dtype, device="cpu")


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """The model in training mode, and as it was afterwards, module by module."""
    before = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def _loss_of(output: Any, loss: Callable[[Any], torch.Tensor] | None) -> torch.Tensor:
    if loss is not None:
        return loss(output)
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(found, torch.Tensor):
        return found
    tensors = [each for each in tree_iter(output) if isinstance(each, torch.Tensor) and each.requires_grad]
    if not tensors:
        raise ValueError("forward returns no tensor that requires a gradient")
    return torch.stack([each.float().sum() for each in tensors]).sum()


class _Sums:
    """One record, added up by kind of block. All amounts are of the whole micro-batch."""

    def __init__(self, record: Record, census: Census) -> None:
        kinds = range(len(census.kinds))
        self.kinds = [dict.fromkeys(_AMOUNTS, 0.0) for _ in kinds]
        self.root = dict.fromkeys(("stem", "head", "head_extra", "forward_flops", "backward_flops"), 0.0)
        self.casts = [0.0 for _ in kinds]
        self.root_cast = float(record.casts.get(None, 0))
        self.tp_share = [0.0 for _ in kinds]
        self._forward(record, census)
        self._backward(record, census)
        for index, kind in enumerate(census.kind_of):
            self.casts[kind] += record.casts.get(index, 0) / census.kinds[kind].count
            kept, wide = record.wide.get(index, (0, 0))
            self.tp_share[kind] = max(self.tp_share[kind], 1.0 - wide / kept if kept else 0.0)

    def _forward(self, record: Record, census: Census) -> None:
        forward = [segment for segment in record.segments if not segment.backward]
        in_blocks = [number for number, segment in enumerate(forward) if segment.place is not None]
        last = in_blocks[-1] if in_blocks else -1
        self._ends: dict[int, int] = {}
        for number, segment in enumerate(forward):
            grown = segment.end - segment.start
            if segment.place is None:
                self.root["stem" if number < last else "head"] += grown
                self.root["forward_flops"] += segment.flops
                continue
            kind = census.kind_of[segment.place]
            self._ends[segment.place] = segment.end
            amounts, count = self.kinds[kind], census.kinds[kind].count
            amounts["kept"] += grown / count
            amounts["forward_flops"] += segment.flops / count
            amounts["forward_extra"] = max(amounts["forward_extra"], segment.peak - segment.end)
        self._end = forward[-1].end
        tail = forward[last + 1 :]
        self.root["head_extra"] = float(max((segment.peak for segment in tail), default=self._end) - self._end)
        for place, size in record.outputs.items():
            kind = census.kind_of[place]
            self.kinds[kind]["output"] += size / census.kinds[kind].count

    def _backward(self, record: Record, census: Census) -> None:
        entered = False
        for segment in record.segments:
            if not segment.backward:
                continue
            entered = entered or segment.place is not None
            if segment.place is None:
                self.root["backward_flops"] += segment.flops
            else:
                kind = census.kind_of[segment.place]
                amounts = self.kinds[kind]
                amounts["backward_flops"] += segment.flops / census.kinds[kind].count
                extra = segment.peak - self._ends[segment.place]
                amounts["backward_extra"] = max(amounts["backward_extra"], extra)
            if not entered:
                self.root["head_extra"] = max(self.root["head_extra"], segment.peak - self._end)


_AMOUNTS = ("kept", "output", "forward_extra", "backward_extra", "forward_flops", "backward_flops")


def _footprint(sums: list[_Sums], inputs: tuple[Inputs, ...], census: Census) -> Footprint:
    root = {name: _fit([each.root[name] for each in sums], inputs) for name in sums[0].root}
    return Footprint(
        blocks=tuple(
            UnitPass(
                **{name: _fit([each.kinds[kind][name] for each in sums], inputs) for name in _AMOUNTS},
                cast_bytes=sums[0].casts[kind],
                tp_share=sums[0].tp_share[kind],
            )
            for kind in range(len(census.kinds))
        ),
        stem=root["stem"],
        head=root["head"],
        head_extra=root["head_extra"],
        root_forward_flops=root["forward_flops"],
        root_backward_flops=root["backward_flops"],
        root_cast_bytes=sums[0].root_cast,
    )


def _fit(amounts: list[float], inputs: tuple[Inputs, ...]) -> Growth:
    """The growth through one or two measured amounts, none of whose parts is negative."""
    samples = [max(0.0, amount) / each.batch_size for amount, each in zip(amounts, inputs, strict=True)]
    length = inputs[0].sequence_length
    if length is None:
        return Growth(per_sample=samples[0])
    if len(samples) == 1:
        return Growth(per_token=samples[0] / length)
    shorter = inputs[1].sequence_length
    assert shorter is not None
    per_pair = (samples[0] / length - samples[1] / shorter) / (length - shorter)
    per_pair = min(max(per_pair, 0.0), samples[0] / length**2)
    return Growth(per_token=samples[0] / length - per_pair * length, per_pair=per_pair)


def _head_share(order: list[str], census: Census) -> float:
    """Of the root's trained elements, those whose gradients are complete before backward enters a block.

    A tied one counts as soon as one of its places has its part, which waits for the other.
    """
    before = order[: order.index("")] if "" in order else order
    total = census.root.trainable_numel
    early: dict[str, int] = {name: census.root_sizes[name] for name in before if name in census.root_sizes}
    return min(1.0, sum(early.values()) / total) if total else 0.0
