"""A loader that gives this rank its part of every global batch, and knows its place."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from traceback import walk_tb
from typing import Any

import torch

from accel_data.epoch import MAX_NOTES, EpochRun, Step, close
from accel_data.position import Position, read_position, write_position
from accel_data.prefetch import SideStream, moves, overlapped, side_stream
from accel_data.reading import SampleError
from accel_data.source import Source
from accel_state.errors import ConfigError
from accel_state.protocols import BatchInfo, LoaderObserver

__all__ = ["ShardedLoader", "check_count"]


@dataclass(slots=True)
class _Progress:
    """Where a loader stands; shared with the loaders that `skip_first` gave."""

    position: Position
    """Where the next iteration starts, while none is in progress."""
    run: EpochRun | None = None
    """The iteration in progress; of several, the one that was started last."""
    finished: EpochRun | None = None
    """The last iteration, ended or given up, if nothing was set or started since."""
    closed: bool = False
    """Whether the loader was given up."""


class ShardedLoader:
    """A sharded ``DataLoader``: this rank's part of every global batch, in an order that all ranks share.

    Made by `prepare_data_loader`. Attributes that are not listed here are those of the user's loader.

    Place and epochs: iterating finishes the epoch in progress from its cursor, and then the next epoch is next.
    The cursor counts batches that were handed out; what workers have prefetched does not count.

    - A state saved in the body of the last batch resumes as an empty rest of that epoch.
    - ``break`` gives the epoch up, as with any DataLoader: the next iteration is that of the next epoch, from its
      beginning, and so says a state that is saved in between. To go on in the middle, save inside the loop.
    - An error in loading (not in the loop's body) leaves the cursor where it was, so that batch is tried again.
    - Of two iterators alive at once, as in nested loops, each keeps to its own epoch and cursor; the second one
      takes the next epoch. `epoch`, `batch_info` and `state_dict` speak of the one that was started last.
      With persistent workers, which serve one iterator only, going on with the first one raises.
    """

    def __init__(
        self,
        source: Source,
        *,
        user_loader: Any,
        seed: int,
        device: torch.device | None,
        non_blocking: bool | None,
        data_world_size: int,
        name: str,
    ) -> None:
        """Called by `prepare_data_loader` only."""
        self.observer: LoaderObserver | None = None
        """Told of every start, batch and end, if set. Looked at when an iteration starts."""
        self.user_loader = user_loader
        """The loader that this one was made of."""
        self.device = device
        """Where batches are moved to; ``None`` leaves them where they were collated."""
        self.name = name
        self._source = source
        self._non_blocking = non_blocking
        self._side: SideStream | None = None
        self._data_world_size = data_world_size
        self.persistent_workers: bool = getattr(user_loader, "persistent_workers", False)
        """Whether worker processes live on between epochs."""
        self._progress = _Progress(Position(seed=seed))
        self._skip = 0
        self._origin: ShardedLoader | None = None
        """The loader that `skip_first` made this one of: observers are told of that one, whose place it is."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "user_loader" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.user_loader, name)

    @property
    def epoch(self) -> int:
        """The epoch in progress, or the next one where none is."""
        run = self._progress.run
        return self._progress.position.epoch if run is None else run.start.epoch

    @property
    def batch_info(self) -> BatchInfo | None:
        """The batch handed out last in the iteration in progress; ``None`` outside one."""
        run = self._progress.run
        return None if run is None else run.info()

    @property
    def seed(self) -> int:
        """Seed of the order; part of the state."""
        return self._progress.position.seed

    @property
    def dataset(self) -> Any:
        """The user's dataset; the loader itself where there is nothing behind it that we know."""
        return getattr(self.user_loader, "dataset", self.user_loader)

    @property
    def even_batches(self) -> bool:
        """Whether all ranks get as many batches. Set it on every rank; the next iteration keeps to it."""
        return self._source.even

    @even_batches.setter
    def even_batches(self, even: bool) -> None:
        self._source.even = even

    @property
    def batch_size(self) -> int | None:
        """Rows of this rank in a full batch; ``None`` for a batch sampler that does not say."""
        return self._source.batch_size

    @property
    def total_batch_size(self) -> int | None:
        """Samples of a full global batch; ``None`` for a batch sampler that does not say its batch size."""
        size = self._source.batch_size
        return None if size is None else size * self._data_world_size

    @property
    def total_dataset_length(self) -> int | None:
        """Samples of an epoch over all ranks; ``None`` for an iterable that does not say."""
        return self._source.num_samples()

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` the next one, from its beginning. Keeps the cursor if that epoch is in progress already.

        Raises:
            ConfigError: if it is no number of an epoch.
        """
        if not isinstance(epoch, int) or isinstance(epoch, bool) or epoch < 0:
            raise ConfigError(
                f"`set_epoch({epoch!r})` was called on the {self.name}, and epochs are counted from 0. "
                f"Give an integer of at least 0."
            )
        if epoch != self.epoch:
            self._move(Position(seed=self.seed, epoch=epoch))

    def __len__(self) -> int:
        """Batches this rank receives in a whole epoch, less those that are still to be skipped.

        Raises:
            TypeError: for an iterable dataset without a length, as any DataLoader does.
        """
        num = self._source.num_local_batches()
        if num is not None:
            num = max(0, num - self._skip)
        if num is None:
            raise TypeError(
                f"The dataset of the {self.name} is an iterable without `__len__`, so its batches cannot be counted. "
                f"Give the dataset a `__len__`, or iterate without asking for the length."
            )
        return num

    def __iter__(self) -> Iterator[Any]:
        """This rank's batches of the rest of the epoch.

        Every rank must iterate where the order is a sampler's, where parts of a stream are read by different ranks, and
        where rank 0 deals.

        Raises:
            SampleError: if the dataset fails to give a sample, or a worker process died.
            ConfigError: if this iterator's workers serve a newer one.
        """
        run = self._begin()
        observer, progress, shared = self.observer, self._progress, self.persistent_workers
        told = self if self._origin is None else self._origin
        steps = iter(self._moved(run.steps()))
        try:
            if observer is not None:
                observer.loader_started(told)
            while True:
                try:
                    batch, note = next(steps)
                except StopIteration:
                    break
                except BaseException as error:
                    self._stop(run, run.position(0))
                    self._explain(error)
                    raise
                run.advance(note)
                if batch is None:
                    continue  # a step in which this rank has no part
                if observer is not None:
                    info = run.info()
                    assert info is not None
                    observer.batch_delivered(told, info)
                yield batch
                if shared and progress.run is not run:
                    raise self._overtaken()
        finally:
            self._stop(run, run.start.next_epoch())
            close(steps)
            if observer is not None:
                observer.loader_ended(told)

    def state_dict(self, *, rewind: int = 0) -> dict[str, Any]:
        """The place, the same on all ranks: JSON values, but for tensors that a dataset's own state may hold.

        Every rank must call this while a stream is read in parts, since each rank knows the place in its own only.

        Args:
            rewind: batches to go back from the cursor, for a window of accumulation that is not finished. They
                must have been handed out by this object, in this epoch or the one that was finished before.

        Raises:
            ConfigError: if there were not as many.
        """
        progress = self._progress
        runs = [each for each in (progress.run, progress.finished) if each is not None]
        position: Position | None = progress.position if rewind == 0 and progress.run is None else None
        left = rewind
        for run in runs if position is None else ():
            if left <= run.num_done():
                position = run.position(left) if left or run is progress.run else None
                if position is not None or left < run.num_done():
                    break
            left -= run.num_done()
        if position is None:
            raise ConfigError(
                f"`state_dict(rewind={rewind})` was called on the {self.name}, which has handed out fewer batches "
                f"since it was made, loaded or moved, or keeps places of a stream for {MAX_NOTES} batches only: there "
                f"is no place so far back. Save after fewer batches, such as in a smaller accumulation window."
            )
        return write_position(self._source.whole(position), self._source.key())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Stand where `state_dict` was taken; the next iteration goes on from there. Takes over its seed.

        Raises:
            ConfigError: if the state is of other data.
        """
        self._move(read_position(state_dict, self._source.key(), name=self.name))

    def close(self) -> None:
        """Give up the process groups that it has of its own. Every rank must; it cannot be iterated afterwards."""
        if not self._progress.closed:
            self._progress.closed = True
            self._source.close()

    def skip_first(self, num_batches: int) -> ShardedLoader:
        """A loader over the same data whose next iteration leaves the first batches of the epoch out.

        It shares its place with this one, and its observer is told of this one: once it is through, the next epoch
        is next for both. Where the epoch stands past `num_batches` already, because a state was loaded, nothing more
        is left out.

        Raises:
            ConfigError: if `num_batches` is no count.
        """
        check_count(num_batches, self.name)
        view = copy.copy(self)
        view._skip = num_batches
        view._origin = self if self._origin is None else self._origin
        return view

    def __repr__(self) -> str:
        return f"ShardedLoader({self.name}, epoch {self.epoch}, batch size {self.batch_size} x {self._data_world_size})"

    def _begin(self) -> EpochRun:
        progress = self._progress
        if progress.closed:
            raise ConfigError(
                f"The {self.name} was closed, as by `free_memory`, and then iterated: the connections that it read by "
                f"are gone. Prepare the user's loader again."
            )
        # The iterator that was in progress goes on by itself, but the place is that of the newest.
        position = progress.position if progress.run is None else progress.run.start.next_epoch()
        previous = progress.finished if progress.run is None else None
        run = self._source.begin(position, skip=self._skip)
        self._skip = 0
        progress.run, progress.finished = run, previous
        return run

    def _stop(self, run: EpochRun, position: Position | None) -> None:
        progress = self._progress
        if progress.run is not run or position is None:
            return
        progress.run, progress.position = None, position
        progress.finished = run
        run.release()

    def _move(self, position: Position) -> None:
        progress = self._progress
        progress.run, progress.finished, progress.position = None, None, position

    def _moved(self, steps: Iterable[Step]) -> Iterable[Step]:
        """With the batches on the device, the next one on its way there; or as they are."""
        device = self.device
        if device is None or not moves(device):
            return steps
        if self._side is None and self._non_blocking is not False:
            self._side = side_stream(device)  # one for all epochs: memory is kept for each stream
        return overlapped(steps, device, non_blocking=self._non_blocking, side=self._side)

    def _explain(self, error: BaseException) -> None:
        """Raise in place of what torch says of a worker that died."""
        is_told = type(error) is RuntimeError and str(error).startswith("DataLoader worker")
        if is_told or _is_broken_off(error):
            raise SampleError(
                f"A worker process of the {self.name} ended without an answer ({error}), so its batches are lost. "
                f"Most often the system has killed it for want of memory, or of shared memory (/dev/shm): use fewer "
                f"workers or smaller batches, or set `num_workers=0` to see what the dataset does."
            ) from error

    def _overtaken(self) -> ConfigError:
        return ConfigError(
            f"The {self.name} was iterated again, or moved by `set_epoch` or `load_state_dict`, while an iteration of "
            f"it was in progress, and with `persistent_workers=True` its workers serve one iterator only: this one has "
            f"lost its batches. Set `persistent_workers=False`, or use a second loader for the inner loop."
        )


def _is_broken_off(error: BaseException) -> bool:
    """Whether a worker died while it handed a batch over: the connection to it broke, and not one of the dataset's."""
    if not isinstance(error, (ConnectionError, EOFError)) or error.__traceback__ is None:
        return False
    *_, (frame, _) = walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("multiprocessing.")


def check_count(num_batches: object, name: str) -> None:
    """Check how many batches are to be skipped.

    Raises:
        ConfigError: if it is no count.
    """
    if not isinstance(num_batches, int) or isinstance(num_batches, bool) or num_batches < 0:
        raise ConfigError(
            f"`num_batches={num_batches!r}` was given to skip in the {name}, which is no number of batches. "
            f"Give an integer of at least 0."
        )
