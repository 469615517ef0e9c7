"""A batch cut into micro-batches of one shape, and their outputs joined again. Pure: no process is needed."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from accel_state.errors import ConfigError
from accel_state.tree import concatenate, map_tensors

__all__ = [
    "PLAIN",
    "Cut",
    "argument_name",
    "check_outputs",
    "check_plain",
    "check_result_plain",
    "cut_batch",
    "find_rows",
    "join_outputs",
    "named_tensors",
    "plan_cut",
]

PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum, torch.dtype, torch.device)
"""Kinds of values that are the same in every micro-batch."""


@dataclasses.dataclass(frozen=True, slots=True)
class Cut:
    """How many micro-batches a batch makes, and their size."""

    rows: int
    """Rows of the batch."""
    num_chunks: int
    size: int
    """Rows of each micro-batch. The last one is filled up with copies of the last row."""

    @property
    def padding(self) -> int:
        """Rows that are filled up."""
        return self.num_chunks * self.size - self.rows


def plan_cut(rows: int, num_chunks: int) -> Cut:
    """At most `num_chunks` micro-batches of one size, with as few rows filled up as that size allows.

    5 rows in at most 4: 3 micro-batches of 2 rows, with 1 row filled up.
    """
    size = -(-rows // num_chunks)
    return Cut(rows, -(-rows // size), size)


def find_rows(inputs: Mapping[str, Any]) -> int:
    """Rows of the batch: the first dimension of the input tensors, of which those of one row are for all rows.

    Raises:
        ConfigError: if there are none, or two tensors have different first dimensions.
    """
    found = [(path, tensor.shape[0]) for path, tensor in named_tensors(inputs) if tensor.dim() > 0]
    if not found:
        raise ConfigError(
            "The model was called without a tensor that has a dimension, so there is no batch to divide into "
            "micro-batches. Give the inputs as tensors whose first dimension is the batch, on every rank."
        )
    many = [(path, rows) for path, rows in found if rows != 1]
    for path, rows in many:
        if rows != many[0][1]:
            raise ConfigError(
                f"Input `{argument_name(many[0][0])}` has {many[0][1]} rows and `{argument_name(path)}` has {rows}, so "
                f"it is not clear what to divide into micro-batches. Give every input the batch as its first "
                f"dimension, or one row if it holds for all; or set `num_chunks=1`, which divides nothing."
            )
    rows = many[0][1] if many else 1
    if rows == 0:
        raise ConfigError(
            f"Input `{argument_name(many[0][0])}` has no rows, so there is nothing to compute. Give at least one row."
        )
    return rows


def cut_batch(inputs: Any, cut: Cut) -> list[Any]:
    """The micro-batches of `inputs`. Tensors of another number of rows, and other values, go whole into each."""
    if cut.num_chunks == 1:
        return [inputs]

    def part(index: int) -> Any:
        def rows(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.dim() == 0 or tensor.shape[0] != cut.rows:
                return tensor
            taken = tensor[index * cut.size : (index + 1) * cut.size]
            missing = cut.size - taken.shape[0]
            return torch.cat([taken, taken[-1:].expand(missing, *taken.shape[1:])]) if missing else taken

        return map_tensors(inputs, rows)

    return [part(index) for index in range(cut.num_chunks)]


def check_plain(inputs: Any) -> None:
    """Refuse inputs that may hold a batch that nobody can see.

    Raises:
        ConfigError: naming the first.
    """

    def check(leaf: Any, path: str) -> Any:
        if isinstance(leaf, PLAIN) or callable(leaf):
            return leaf
        raise ConfigError(
            f"Input `{argument_name(path)}` is a {type(leaf).__name__}, which cannot be divided into micro-batches. "
            f"Give tensors, plain values, and lists, tuples, mappings or dataclasses of them."
        )

    map_tensors(inputs, lambda tensor: tensor, on_other=check)


def check_outputs(result: Any, cut: Cut) -> None:
    """Refuse outputs of a micro-batch that cannot be joined to those of the batch.

    Raises:
        ConfigError: naming the first.
    """
    if cut.num_chunks == 1:
        return
    for path, tensor in named_tensors(result):
        if tensor.dim() == 0 or tensor.shape[0] != cut.size:
            raise ConfigError(
                f"The model gives a tensor of shape {tuple(tensor.shape)} at `{path or 'the top'}` for a micro-batch "
                f"of {cut.size} row(s), without the batch as its first dimension, so those of {cut.num_chunks} "
                f"micro-batches cannot be joined. Compute it from the other outputs (a loss from the logits), or set "
                f"`num_chunks=1`."
            )


def check_result_plain(result: Any) -> None:
    """Refuse outputs that are neither tensors nor plain values: parts of them are on other ranks.

    Raises:
        ConfigError: naming the first.
    """

    def check(leaf: Any, path: str) -> Any:
        if isinstance(leaf, PLAIN):
            return leaf
        cache = "cache" in type(leaf).__name__.lower()
        remedy = "Pass `use_cache=False`" if cache else "Let the model return tensors only"
        raise ConfigError(
            f"The model returns a {type(leaf).__name__} at `{path or 'the top'}`, which each stage would fill in part "
            f"and no rank has whole. {remedy}, with the example and with each call."
        )

    map_tensors(result, lambda tensor: tensor, on_other=check)


def join_outputs(outputs: Sequence[Any], cut: Cut) -> Any:
    """The output of the batch, from those of the micro-batches."""
    if cut.num_chunks == 1:
        return outputs[0]
    joined = concatenate(outputs)
    return map_tensors(joined, lambda tensor: tensor[: cut.rows]) if cut.padding else joined


def named_tensors(tree: Any, path: str = "") -> list[tuple[str, torch.Tensor]]:
    """The tensors of `tree` with their paths, such as ``[0].mask``."""
    return list(_walk(tree, path))


def _walk(tree: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, child in tree.items():
            yield from _walk(child, f"{path}.{key}")
    elif isinstance(tree, (list, tuple)):
        for index, child in enumerate(tree):
            yield from _walk(child, f"{path}[{index}]")
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for each in dataclasses.fields(tree):
            yield from _walk(getattr(tree, each.name), f"{path}.{each.name}")


def argument_name(path: str) -> str:
    """``mask`` for ``.kwargs.mask`` and ``[0]`` for ``.args[0]``, paths in a tree of ``args`` and ``kwargs``."""
    return path.removeprefix(".kwargs").removeprefix(".args").removeprefix(".")
