"""What stands between a DataLoader and the user's map-style dataset: named errors, and one seed a sample."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset, get_worker_info

from accel_data.randomness import collating_seed, sample_seed
from accel_state.errors import AccelError

if TYPE_CHECKING:
    from accel_data.generators import DefaultGenerator

__all__ = ["SampleError", "SampleReader", "Ticket", "TicketedRows", "WorkerInit", "draws_nothing"]

_logger = logging.getLogger(__name__)

_MOST_NAMED = 8  # indices of a batch in an error


class SampleError(AccelError, RuntimeError):
    """A dataset that failed to give a sample. The original error is its cause.

    From a worker process it comes as DataLoader hands on every error: made anew, of a text that ends with this
    message and has the original traceback before it.
    """


class Ticket(NamedTuple):
    """What the batch sampler gives the underlying DataLoader for one batch, instead of a list of indices."""

    seed: int
    """Of the augmentations of the epoch, from `augmentation_seed`."""
    positions: Sequence[int]
    """Position in the epoch of each row. Rows of one position, such as padding, come out alike."""
    indices: Sequence[Any]
    """What the dataset is asked for, one a row."""


def draws_nothing(dataset: Any) -> bool:
    """Whether a dataset is known by its type to draw no random numbers, so that it can be read without a ticket.

    True for exactly `TensorDataset`, `list`, `tuple` and `range`, and for `Subset` and `ConcatDataset` of such.
    Classes derived from them may draw.
    """
    kind = type(dataset)
    if kind is Subset:
        return draws_nothing(dataset.dataset)
    if kind is ConcatDataset:
        return all(draws_nothing(each) for each in dataset.datasets)
    return kind in (TensorDataset, list, tuple, range)


class TicketedRows(list[Any]):
    """Samples on their way to a `Collation` that draws, with the seed of their batch."""

    def __init__(self, samples: Sequence[Any], ticket: Ticket) -> None:
        super().__init__(samples)
        self.seed = collating_seed(ticket.seed, ticket.positions[0] if ticket.positions else 0)


class SampleReader(Dataset[Any]):
    """Reads samples of a dataset so that what each draws depends on (seed of the epoch, position) only.

    Neither the rank, the number of ranks and workers, the batch size nor what was read before matters to transforms
    that draw from the default generators of python, numpy and torch; and these are left as they were, so that
    dropout of the step between two batches does not notice that data was read in this process.

    Only generators that the dataset draws from are seeded for every sample (python's takes 4.7 µs, numpy's 1.6,
    torch's 1.1). Which these are is found out while the first batch is read; the others are compared before and
    after every batch. Once one has been drawn from after all, that batch is read again, and that generator is
    seeded from then on. At most three batches are read twice. A dataset that looks at a generator without drawing from
    it, or puts back what it drew, is not noticed.

    A dataset with ``__getitems__``, such as one of Hugging Face, is asked for a whole batch at once as long as that
    draws nothing. Where it draws, its samples would depend on each other, so that it is asked for one at a time
    from then on, again by ``__getitems__``, which is logged once.

    Copied to a worker process, where each copy finds out on its own.

    Args:
        dataset: of map style.
        name: of the loader, for messages.
        rank: the data rank, for messages.
        one_a_batch: whether the DataLoader has ``batch_size=None``: each item of the dataset is a batch, and its
            ``__getitems__`` is not used.
        keeps_ticket: whether batches come as `TicketedRows`.
    """

    def __init__(
        self, dataset: Any, *, name: str, rank: int, one_a_batch: bool = False, keeps_ticket: bool = False
    ) -> None:
        self.dataset = dataset
        self._name = name
        self._rank = rank
        self._keeps_ticket = keeps_ticket
        self._reads_many = not one_a_batch and _reads_many(dataset)
        self._drawn: tuple[int, ...] | None = () if self._reads_many else None  # indices of generators; None: unknown
        self._generators: tuple[DefaultGenerator, ...] = ()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, ticket: Ticket) -> Any:
        """The sample of a ticket of one row. Called where the DataLoader has ``batch_size=None``."""
        return self._read(ticket)[0]

    def __getitems__(self, ticket: Ticket) -> list[Any]:
        """The samples of a ticket, in its order.

        Raises:
            SampleError: if the dataset raises; names the sample, the rank and the loader.
        """
        samples = self._read(ticket)
        # A dataset may make a batch by itself, which is no list of rows.
        return TicketedRows(samples, ticket) if self._keeps_ticket and isinstance(samples, list) else samples

    def _read(self, ticket: Ticket) -> list[Any]:
        if not self._generators:
            from accel_data.generators import default_generators  # with numpy.random, when data is read

            self._generators = default_generators()
        generators = self._generators
        outside = [generator.look() for generator in generators]
        untouched = False
        try:
            if self._drawn is not None:
                try:
                    samples = self._read_seeded(ticket) if self._drawn else self._read_unseeded(ticket.indices)
                except SampleError:
                    untouched = not self._notice(outside)
                    if untouched:
                        raise
                else:
                    untouched = not self._notice(outside)
                    if untouched:
                        return samples
            return self._find_out(ticket)
        finally:
            if self._drawn or not untouched:
                for generator, state in zip(generators, outside, strict=True):
                    generator.put_back(state)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_generators": ()}  # they belong to this process

    def _notice(self, states: list[Any]) -> bool:
        """Whether any has moved that had not been drawn from before; noted as drawn from, whoever did it."""
        drawn = self._drawn or ()
        moved: tuple[int, ...] = ()
        for number, generator in enumerate(self._generators):
            if number not in drawn and generator.moved(states[number]):
                moved += (number,)
        if moved:
            if self._reads_many and not drawn:
                self._say_slower()
            self._drawn = drawn + moved
        return bool(moved)

    def _read_unseeded(self, indices: Sequence[Any]) -> list[Any]:
        samples: list[Any] = []
        index = None
        try:
            if self._reads_many:
                many: list[Any] = self.dataset.__getitems__(list(indices))
                return many
            dataset, append = self.dataset, samples.append
            for index in indices:
                append(dataset[index])
            return samples
        except Exception as error:  # whatever the user's code raises, and raised again with what it lacks
            named = self._named_many(indices, error) if self._reads_many else self._named(index, error)
            raise named from named.__cause__ or error

    def _read_seeded(self, ticket: Ticket) -> list[Any]:
        """Read with the generators that are drawn from seeded for each sample."""
        seeds = [self._generators[number].seed for number in self._drawn or ()]
        samples = []
        for position, index in zip(ticket.positions, ticket.indices, strict=True):
            seed = sample_seed(ticket.seed, position)
            for seed_one in seeds:
                seed_one(seed)
            samples.append(self._read_one(index))
        return samples

    def _find_out(self, ticket: Ticket) -> list[Any]:
        """Read with every generator seeded for each sample, and note those that are drawn from."""
        drawn = set(self._drawn or ())
        samples = []
        for position, index in zip(ticket.positions, ticket.indices, strict=True):
            seed = sample_seed(ticket.seed, position)
            for generator in self._generators:
                generator.seed(seed)
            states = [generator.look() for generator in self._generators]
            samples.append(self._read_one(index))
            drawn.update(
                number
                for number, (generator, state) in enumerate(zip(self._generators, states, strict=True))
                if generator.moved(state)
            )
        self._drawn = tuple(sorted(drawn))
        return samples

    def _read_one(self, index: Any) -> Any:
        try:
            if self._reads_many:
                [sample] = self.dataset.__getitems__([index])
                return sample
            return self.dataset[index]
        except Exception as error:  # as above
            raise self._named(index, error) from error

    def _named(self, index: Any, error: Exception) -> SampleError:
        return SampleError(
            f"Sample {_short(index)} was asked for by the loader {self._name!r} on data rank {self._rank}, and "
            f"{type(self.dataset).__name__} raised {_line(error)}. The epoch cannot go on without it, on no rank. "
            f"Correct what `dataset[{_short(index)}]` reads or does, or leave it out of the data, such as with "
            f"`torch.utils.data.Subset`."
        )

    def _named_many(self, indices: Sequence[Any], error: Exception) -> SampleError:
        """The error of the sample that fails when read alone too; else of them all."""
        for index in indices:
            try:
                self._read_one(index)
            except SampleError as alone:  # noqa: PERF203 - each is tried
                return alone
        named = ", ".join(_short(index) for index in indices[:_MOST_NAMED])
        more = f" and {len(indices) - _MOST_NAMED} more" if len(indices) > _MOST_NAMED else ""
        return SampleError(
            f"Samples {named}{more} were asked for at once by the loader {self._name!r} on data rank {self._rank}, and "
            f"{type(self.dataset).__name__} raised {_line(error)}. Each of them can be read alone, but the epoch "
            f"cannot go on without them, on no rank. Correct `__getitems__` of the dataset, which gets their list."
        )

    def _say_slower(self) -> None:
        info = get_worker_info()
        if self._rank == 0 and (info is None or info.id == 0):
            _logger.warning(
                "%s of the loader %r draws random numbers while a whole batch is read by `__getitems__`. It is read "
                "one sample at a time from now on, which is slower, so that what each draws depends on its position "
                "only. To read batches at once, draw in `collate_fn` instead.",
                type(self.dataset).__name__,
                self._name,
            )


class WorkerInit:
    """Shows the user's dataset, not ours around it, to ``get_worker_info()`` in a worker; then calls theirs.

    Args:
        user_init: the ``worker_init_fn`` of the user's loader, called with the number of the worker.
    """

    def __init__(self, user_init: Callable[[int], None] | None) -> None:
        self._user_init = user_init

    def __call__(self, worker_id: int) -> None:
        info = get_worker_info()
        assert info is not None
        # The record is frozen. It belongs to this worker alone, and the loader itself keeps another reference.
        ours: Any = info.dataset
        object.__setattr__(info, "dataset", ours.dataset)
        if self._user_init is not None:
            self._user_init(worker_id)


def _reads_many(dataset: Any) -> bool:
    """Whether ``__getitems__`` of a dataset does more than to read one after another, as that of a plain `Subset`."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return callable(getattr(dataset, "__getitems__", None))


def _short(index: Any) -> str:
    text = repr(index)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _line(error: Exception) -> str:
    """Type and message, as a traceback ends."""
    return "".join(traceback.format_exception_only(error)).strip()
