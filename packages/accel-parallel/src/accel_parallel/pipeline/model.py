"""Inference with a model whose stages are on different ranks, a batch passing through them in micro-batches.

Each rank runs the model's own forward, with the weights of its stage only: blocks of earlier stages are passed over,
what the stage needs arrives at its first block, and at the next stage's first block the forward ends. Stages and their
exchange are those of ``torch.distributed.pipelining``, with its GPipe schedule (Huang et al., arXiv:1811.06965).

Why not its ``pipeline()``, which cuts a graph of ``torch.export``: a graph holds for the shapes of its example only,
and cannot be made again for another length once the weights of other stages are gone; it has to be traced whole on
every rank; and it gives back tuples and lists where the model gives its own output class. Here a new shape costs one
rehearsal (`rehearsal`), and what a stage cannot know is refused by name on all ranks before anything is
exchanged.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from accel_parallel.audit_ranks import audit_values
from accel_parallel.pipeline.absent import Absent
from accel_parallel.pipeline.agreement import together
from accel_parallel.pipeline.division import Division, divide
from accel_parallel.pipeline.microbatch import (
    PLAIN,
    Cut,
    argument_name,
    check_outputs,
    check_plain,
    check_result_plain,
    cut_batch,
    find_rows,
    join_outputs,
    plan_cut,
)
from accel_parallel.pipeline.rehearsal import Route, rehearse
from accel_parallel.pipeline.stage import StageRun
from accel_state.collectives import broadcast
from accel_state.errors import ConfigError
from accel_state.process import Process
from accel_state.tree import map_tensors, send_to_device, tensor_leaves, tree_signature

__all__ = ["PipelinedModel", "prepare_pippy"]

_MAX_SHAPES = 16
"""Shapes of micro-batches whose stages are kept ready, with the buffers into which their activations arrive."""


def prepare_pippy(
    model: nn.Module,
    split_points: Literal["auto"] | Sequence[str] = "auto",
    no_split_module_classes: str | type[nn.Module] | Sequence[str | type[nn.Module]] | None = None,
    example_args: tuple[Any, ...] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    num_chunks: int | None = None,
    gather_output: bool = False,
    *,
    process: Process | None = None,
) -> PipelinedModel:
    """Every rank must call this, with the same model and arguments. Divides `model` over all ranks, for inference.

    What comes back is called as the model is, on every rank; rank 0's inputs count. It gives the model's output on the
    last rank and ``None`` on the others, or on all. Only the weights of a rank's own stage stay on it, moved to its
    device: `model` is used up. In a world of one process it is the whole model, moved to the device.

    Args:
        model: in evaluation mode, with its weights, on the CPU or on the device of the process.
        split_points: ``"auto"`` makes the largest stage as small as it can be, in bytes, cutting between blocks; or
            the names of the modules with which the second and every later stage begin.
        no_split_module_classes: classes of blocks, of which each stays on one rank, or their names; by default the
            model's own list (``_no_split_modules``), or the members of its lists of layers.
        example_args: positional inputs like those of the calls. Only which there are has to be like them: sizes may
            differ.
        example_kwargs: inputs by name.
        num_chunks: micro-batches into which a batch is divided; ``None``: as many as there are ranks.
        gather_output: whether all ranks get the output.
        process: the world; by default the open one.

    Raises:
        ConfigError: on every rank, for what cannot be divided, with what to change, and for weights that differ
            between the ranks.
    """
    process = process or Process.current()
    num_stages = process.topology.world_size
    chunks = num_stages if num_chunks is None else num_chunks
    with ExitStack() as undo:
        with together("prepare_pippy", process) as same:
            _check_settings(model, split_points, chunks, process)
            if num_stages == 1:
                return PipelinedModel(model.to(process.device), process=process)
            example = {"args": tuple(example_args), "kwargs": dict(example_kwargs or {})}
            check_plain(example)
            example = send_to_device(example, process.device)
            division = _divided(model, split_points, no_split_module_classes, example, process)
            undo.callback(division.cast.dismiss)
            cut = _cut(example, chunks)
            _rehearsed(division, cut_batch(example, cut)[0], cut)  # what cannot work is refused now
            same([division.starts, division.owners, chunks, gather_output])
        audit_values(model)
        undo.pop_all()
    division.place(process.topology.rank)
    return PipelinedModel(model, process=process, division=division, num_chunks=chunks, gather_output=gather_output)


class PipelinedModel(nn.Module):
    """A model of which this rank has one stage. Made by `prepare_pippy`; called as the model is, by every rank.

    It is for evaluation: no call builds a graph, under ``torch.no_grad()`` or not. Rows of a batch must not depend on
    each other, as they are computed in micro-batches, of which the last may be filled up with copies of a row.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        process: Process,
        division: Division | None = None,
        num_chunks: int = 1,
        gather_output: bool = False,
    ) -> None:
        """Called by `prepare_pippy` only.

        Args:
            module: the model, without the weights of other stages.
            process: the world.
            division: how it is divided; ``None``: in one process, not at all.
            num_chunks: micro-batches into which a batch is divided.
            gather_output: whether all ranks get the output.
        """
        super().__init__()
        self.module = module
        self.process = process
        self.num_chunks = num_chunks
        self.gather_output = gather_output
        self.split_points: tuple[str, ...] = () if division is None else division.starts
        """Names of the modules with which the second and every later stage begin."""
        self.training = False
        self._division = division
        self._runs: OrderedDict[tuple[str, int], tuple[Route, StageRun]] = OrderedDict()

    @property
    def num_stages(self) -> int:
        """Stages, one on each rank."""
        return len(self.split_points) + 1

    @property
    def stage(self) -> int:
        """Number of this rank's stage."""
        return self.process.topology.rank if self._division else 0

    @property
    def stage_bytes(self) -> int:
        """Bytes of the weights that this rank holds; buffers outside the blocks, on every rank, apart."""
        if self._division is None:
            return sum(each.nbytes for each in self.module.parameters())
        return self._division.stage_bytes(self.stage)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Every rank must call this. The model's output, on the last rank or on all; ``None`` elsewhere.

        Args:
            args: the model's inputs for the whole batch, of the same shapes on every rank; rank 0's values count.
                Tensors with as many rows as the batch are divided; those with one row, or without a dimension, and
                other values go whole into each micro-batch.
            kwargs: inputs by name, likewise.

        Raises:
            ConfigError: for inputs or outputs that cannot be divided.
            CollectiveError: if the ranks were called with different shapes or settings.
        """
        device = self.process.device
        inputs = send_to_device({"args": args, "kwargs": kwargs}, device)
        if self._division is None:
            return self.module(*inputs["args"], **inputs["kwargs"])
        with together("the pipelined model", self.process) as same:
            self._check_call(inputs)
            same(_described(inputs))
        inputs = _of_first_rank(inputs, self.process)
        cut = _cut(inputs, self.num_chunks)
        chunks = cut_batch(inputs, cut)
        route, run = self._run_for(chunks, cut)
        outputs = run.run(chunks)
        is_last = self.stage == self.num_stages - 1
        result = join_outputs(outputs, cut) if is_last else None
        return self._gathered(result, route, cut) if self.gather_output else result

    def train(self, mode: bool = True) -> PipelinedModel:
        """Refused with `mode`: a pipeline made by `prepare_pippy` is for inference.

        Raises:
            ConfigError: for ``train()``.
        """
        if mode:
            raise ConfigError(
                "`train()` was called on a model that `prepare_pippy` has divided, and it computes no gradients: its "
                "stages run forward only. Train the model before dividing it, with `Accelerator.prepare`."
            )
        return super().train(False)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The weights and buffers that this rank holds, by their names in the model."""
        state = self.module.state_dict(*args, **kwargs)
        return type(state)((name, each) for name, each in state.items() if not isinstance(each, Absent))

    def _check_call(self, inputs: Any) -> None:
        if self.module.training:
            raise ConfigError(
                "The model inside is in training mode, in which dropout and batch statistics would differ between "
                "micro-batches and stages. Call `eval()` on it."
            )
        check_plain(inputs)
        _cut(inputs, self.num_chunks)

    def _run_for(self, chunks: list[Any], cut: Cut) -> tuple[Route, StageRun]:
        """The stage for micro-batches of this shape, rehearsed at the first of its kind."""
        assert self._division is not None
        key = (_described(chunks[0]), cut.num_chunks)
        if key not in self._runs:
            route = _rehearsed(self._division, chunks[0], cut)
            run = StageRun(
                self._division.cast, route, stage=self.stage, num_stages=self.num_stages, num_chunks=cut.num_chunks
            )
            self._runs[key] = route, run
            if len(self._runs) > _MAX_SHAPES:
                self._runs.popitem(last=False)
        self._runs.move_to_end(key)
        return self._runs[key]

    def _gathered(self, result: Any, route: Route, cut: Cut) -> Any:
        """The last rank's output on every rank. Its structure is known from the rehearsal: only tensors travel."""

        def empty(tensor: torch.Tensor) -> torch.Tensor:
            rows = (cut.rows,) if cut.num_chunks > 1 else tensor.shape[:1]
            return torch.empty((*rows, *tensor.shape[1:]), dtype=tensor.dtype, device=self.process.device)

        own = map_tensors(route.result, empty) if result is None else result
        sent = iter(broadcast(tensor_leaves(own), from_process=self.num_stages - 1, process=self.process))
        return map_tensors(own, lambda tensor: next(sent))


def _check_settings(model: nn.Module, split_points: Any, num_chunks: Any, process: Process) -> None:
    name = type(model).__name__
    if isinstance(split_points, str) and split_points != "auto":
        raise ConfigError(
            f"`split_points={split_points!r}` is neither 'auto' nor a list of names. Give a list, such as "
            f"`[{split_points!r}]`, of the modules with which the second and every later stage begin."
        )
    if not isinstance(num_chunks, int) or isinstance(num_chunks, bool) or num_chunks < 1:
        raise ConfigError(
            f"`num_chunks={num_chunks!r}` is not a number of micro-batches: a batch makes at least one. Give a "
            f"positive integer, or leave it out for one a rank."
        )
    if model.training:
        raise ConfigError(
            f"{name} is in training mode, and a pipeline made by `prepare_pippy` is for inference: dropout and batch "
            f"statistics would differ between micro-batches. Call `eval()` on it first."
        )
    if isinstance(model, (DistributedDataParallel, PipelinedModel)):
        raise ConfigError(
            f"The model is a {name}, which spreads it over the ranks already. Pass the module inside, as it was before."
        )
    shape = process.topology.shape
    if shape.pp != shape.size and shape.dp_replicate != shape.size:
        raise ConfigError(
            f"The processes are divided as {shape}, and `prepare_pippy` makes every process a stage of one pipeline. "
            f"Leave the sizes of `ParallelismConfig` at 1 in a script for pipeline inference."
        )
    for key, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ConfigError(
                f"`{key}` of {name} is on the meta device: it has a shape and no values. Load its weights first, for "
                f"example with `load_state_dict(..., assign=True)`."
            )


def _divided(
    model: nn.Module, split_points: Any, classes: Any, example: Mapping[str, Any], process: Process
) -> Division:
    with _as_refusal(model, example):
        return divide(
            model,
            split_points,
            classes,
            example,
            num_stages=process.topology.world_size,
            device=process.device,
        )


def _rehearsed(division: Division, chunk: Mapping[str, Any], cut: Cut) -> Route:
    """The way of a micro-batch, checked to its end."""
    with _as_refusal(division.cast.model, chunk):
        route = rehearse(division.cast, chunk["args"], chunk["kwargs"], starts=division.starts, owners=division.owners)
    check_result_plain(route.result)
    check_outputs(route.result, cut)
    return route


@contextmanager
def _as_refusal(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
    """Errors of the model's own code, on inputs for which it is only followed for shapes."""
    try:
        yield
    except ConfigError:
        raise
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError) as error:
        raise ConfigError(
            f"The forward of {type(model).__name__} was followed for its shapes, with the inputs "
            f"({_described(inputs)}), and failed: {type(error).__name__}: {error} Give `example_args`, "
            f"`example_kwargs` and the inputs of each call as the undivided model takes them. Where it does take "
            f"these, name in `no_split_module_classes` the class of the part that fails, or cut elsewhere with "
            f"`split_points`."
        ) from error


def _cut(inputs: Any, num_chunks: int) -> Cut:
    return Cut(1, 1, 1) if num_chunks == 1 else plan_cut(find_rows(inputs), num_chunks)


def _described(inputs: Any) -> str:
    """Structure, shapes, dtypes and plain values of `inputs`, alike exactly where one way through the model serves."""
    parts = tree_signature(inputs)

    def note(leaf: Any, path: str) -> None:
        if isinstance(leaf, PLAIN):
            parts[path] = repr(leaf)

    map_tensors(inputs, lambda tensor: None, on_other=note)
    tops = ("", ".args", ".kwargs")
    return ", ".join(f"{argument_name(path)}: {text}" for path, text in parts.items() if path not in tops)


def _of_first_rank(inputs: Any, process: Process) -> Any:
    """`inputs` with rank 0's values, so that the stages never compute on different ones."""
    sent = iter(broadcast(tensor_leaves(inputs), from_process=0, process=process))
    return map_tensors(inputs, lambda tensor: next(sent))
