"""Collation whose random draws, such as those of masking or mixing samples, depend on the batch only."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch.utils.data import default_collate, default_convert

from accel_data.reading import TicketedRows

if TYPE_CHECKING:
    from accel_data.generators import DefaultGenerator

__all__ = ["Collation"]


class Collation:
    """Makes a batch of samples; what it draws from the default generators is seeded by the batch.

    So a batch comes out alike in any worker process and after resuming, and drawing in this process leaves the
    generators of the training step as they were. Which generators are drawn from is found out at the first batch;
    the others are compared before and after, and a batch that draws from them after all is collated again. Torch's own
    collation draws nothing and is called as it is.

    Copied to a worker process, where each copy finds out on its own.

    Args:
        collate: the user's ``collate_fn``.
        single: whether it takes the one item of a batch, instead of a list of rows.
    """

    def __init__(self, collate: Callable[[Any], Any], *, single: bool = False) -> None:
        self._collate = _Single(collate) if single else collate
        self.draws_nothing = collate in (default_collate, default_convert)
        """Whether that is known before any batch."""
        self._drawn: set[int] | None = None  # numbers of generators; None: unknown
        self._generators: tuple[DefaultGenerator, ...] = ()

    def __call__(self, rows: Any) -> Any:
        """Collate rows that know their seed, if they do."""
        return self.seeded(list(rows), rows.seed) if isinstance(rows, TicketedRows) else self._collate(rows)

    def seeded(self, rows: Any, seed: int) -> Any:
        """Collate rows under a seed.

        Args:
            rows: what the user's function takes.
            seed: from `collating_seed`.
        """
        if self.draws_nothing:
            return self._collate(rows)
        if not self._generators:
            from accel_data.generators import default_generators  # with numpy.random, when data is read

            self._generators = default_generators()
        outside = [generator.look() for generator in self._generators]
        drawn = self._drawn
        try:
            batch, moved = self._run(rows, seed, range(len(outside)) if drawn is None else drawn, outside)
            if drawn is not None and moved - drawn:
                batch, moved = self._run(rows, seed, range(len(outside)), outside)
            self._drawn = moved if drawn is None else drawn | moved
            return batch
        finally:
            for generator, state in zip(self._generators, outside, strict=True):
                if generator.moved(state):
                    generator.put_back(state)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_generators": ()}  # they belong to this process

    def _run(self, rows: Any, seed: int, seeded: Any, outside: list[Any]) -> tuple[Any, set[int]]:
        """The batch, and the generators that were drawn from."""
        before = list(outside)
        for number in seeded:
            self._generators[number].seed(seed)
            before[number] = self._generators[number].look()
        batch = self._collate(rows)
        moved = {number for number, state in enumerate(before) if self._generators[number].moved(state)}
        return batch, moved


class _Single:
    """Takes the one item that a batch has."""

    def __init__(self, convert: Callable[[Any], Any]) -> None:
        self._convert = convert

    def __call__(self, items: list[Any]) -> Any:
        (item,) = items
        return self._convert(item)
