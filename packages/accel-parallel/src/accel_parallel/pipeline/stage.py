"""One stage of a pipeline as ``torch.distributed.pipelining`` wants it: a module from what arrives to what is sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from accel_parallel.pipeline.absent import Absent
from accel_parallel.pipeline.cast import Cast, Unit
from accel_parallel.pipeline.microbatch import argument_name, named_tensors
from accel_parallel.pipeline.rehearsal import Boundary, Route
from accel_state.errors import AccelError
from accel_state.tree import map_tensors

__all__ = ["StageModule", "StageRun"]


class StageRun:
    """This rank's stage for micro-batches of one shape: torch's stage and schedule around the model's own forward.

    The schedule divides numbers of micro-batches instead of tensors, since inputs are here on every rank, and so does
    not constrain what inputs and outputs may be.
    """

    def __init__(self, cast: Cast, route: Route, *, stage: int, num_stages: int, num_chunks: int) -> None:
        from torch.distributed.pipelining import PipelineStage, ScheduleGPipe  # slow to import

        self.num_chunks = num_chunks
        self.module = StageModule(cast, route, stage, is_last=stage == num_stages - 1)
        token = torch.empty(1, dtype=torch.int64, device="meta")
        self._stage = PipelineStage(
            self.module,
            stage,
            num_stages,
            cast.device,
            # Given shapes, torch exchanges none, and does not run a micro-batch for them.
            input_args=(token,) if stage == 0 else route.boundaries[stage - 1].shapes,
            output_args=(token,) if stage == num_stages - 1 else route.boundaries[stage].shapes,
        )
        self._schedule = ScheduleGPipe(self._stage, n_microbatches=num_chunks)

    def run(self, chunks: Sequence[Any]) -> list[Any]:
        """Every rank must call this. The outputs of the micro-batches on the last stage, nothing on others.

        Args:
            chunks: ``{"args": ..., "kwargs": ...}`` of each micro-batch.
        """
        self.module.chunks, self.module.outputs = list(chunks), {}
        numbers = torch.arange(self.num_chunks)
        try:
            self._schedule.step(*((numbers,) if self.module.stage == 0 else ()), index=numbers)
            return [self.module.outputs[index] for index in sorted(self.module.outputs)]
        finally:
            self.module.chunks, self.module.outputs = [], {}
            self._stage.clear_runtime_states()  # the activations of all micro-batches


class StageModule(nn.Module):
    """Runs the model's forward from where this stage begins to where it ends."""

    def __init__(self, cast: Cast, route: Route, stage: int, *, is_last: bool) -> None:
        super().__init__()
        self.cast, self.route, self.stage, self.is_last = cast, route, stage, is_last
        self.chunks: list[Any] = []
        self.outputs: dict[int, Any] = {}
        self._incoming = route.boundaries[stage - 1] if stage else None
        self._outgoing = None if is_last else route.boundaries[stage]
        self._received: tuple[torch.Tensor, ...] = ()
        self._num_calls = 0
        self._arrived = False

    def forward(self, *received: torch.Tensor, index: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        chunk = self.chunks[int(index)]
        self._received, self._num_calls, self._arrived = received, 0, False
        self.cast.journal.begin()
        with self.cast.played_by(self._play):
            try:
                result = self.cast.model(*chunk["args"], **chunk["kwargs"])
            except _HandOver as over:
                return over.tensors
        if not self.is_last:
            raise _parted("returned", f"calling `{self.route.boundaries[self.stage].unit}`")
        self.outputs[int(index)] = self._lasting(_present(result, "the output"))
        return index

    def _play(self, unit: Unit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        number, self._num_calls = self._num_calls, self._num_calls + 1
        if number >= len(self.route.calls) or self.route.calls[number] != unit.name:
            expected = self.route.calls[number] if number < len(self.route.calls) else "the end"
            raise _parted(f"called `{unit.name}`", f"`{expected}`")
        stage = self.route.stages[number]
        if stage < self.stage:
            return map_tensors(self.route.outputs[number], _fresh)
        if stage > self.stage:
            assert self._outgoing is not None
            raise _HandOver(_taken(self._outgoing, args, kwargs))
        if self._incoming is not None and not self._arrived:
            self._arrived = True
            self._receive(self._incoming, args, kwargs)
        what = f"an argument of `{unit.name}`"
        with self.cast.played_by(None):
            outputs = unit.forward(*_present(args, what), **_present(kwargs, what))
        if unit.name in self.cast.rules:
            _check_guess(unit, outputs, self.route.outputs[number])
        return outputs

    def _receive(self, boundary: Boundary, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Give the tensors that arrived to the objects that stand for them, wherever else the model holds these."""
        given = dict(named_tensors({"args": args, "kwargs": kwargs}))
        for path, tensor in zip(boundary.paths, self._received, strict=True):
            place = given.get(path)
            if not isinstance(place, Absent):
                raise _parted(f"gave `{argument_name(path)}` to `{boundary.unit}` otherwise", "what was sent")
            place.value = tensor

    def _lasting(self, result: Any) -> Any:
        """The output, without the memory in which the next call's activations will arrive."""
        arrived = {tensor.untyped_storage().data_ptr() for tensor in self._received}
        return map_tensors(
            result, lambda tensor: tensor.clone() if tensor.untyped_storage().data_ptr() in arrived else tensor
        )


def _check_guess(unit: Unit, outputs: Any, expected: Any) -> None:
    shapes, guessed = (
        [(path, each.dtype, tuple(each.shape)) for path, each in named_tensors(tree)] for tree in (outputs, expected)
    )
    if shapes != guessed:
        raise _parted(f"got {shapes} from `{unit.name}`", f"{guessed}")


class _HandOver(BaseException):
    def __init__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self.tensors = tensors


def _fresh(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.fresh() if isinstance(tensor, Absent) else tensor


def _taken(boundary: Boundary, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """What passes to the next stage, as it was rehearsed."""
    given = dict(named_tensors({"args": args, "kwargs": kwargs}))
    tensors = []
    for path, shape in zip(boundary.paths, boundary.shapes, strict=True):
        what = f"`{argument_name(path)}` of `{boundary.unit}`"
        if path not in given:
            raise _parted(f"did not give {what}", "a tensor there")
        tensor = _present(given[path], what)
        if tensor.shape != shape.shape or tensor.dtype != shape.dtype:
            raise _parted(
                f"gave {what} as {tensor.dtype} of shape {tuple(tensor.shape)}", f"{shape.dtype} {tuple(shape.shape)}"
            )
        tensors.append(tensor.contiguous())
    return tuple(tensors)


def _present(tree: Any, what: str) -> Any:
    """`tree` with the values of what arrived."""

    def there(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, Absent):
            return tensor
        if tensor.value is None:
            raise _parted(f"needs for {what} a tensor of shape {tuple(tensor.shape)} of another stage", "to have it")
        return tensor.value

    return map_tensors(tree, there)


def _parted(did: str, expected: str) -> AccelError:
    return AccelError(
        f"The model's forward {did}, and with a micro-batch of the same shapes it was rehearsed with {expected}: its "
        f"way depends on values of the inputs, so the stages have parted. Keep such decisions inside a block, named "
        f"in `no_split_module_classes`, or give inputs that are decided alike (an explicit mask in every call)."
    )
