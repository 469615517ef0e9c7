"""Logging and progress bars that many processes share: the main one speaks, unless others are asked to."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any

from accel_state.errors import ConfigError
from accel_state.process import Process

__all__ = ["RankLogger", "get_logger", "tqdm"]


class RankLogger(logging.LoggerAdapter):  # type: ignore[type-arg] # not subscriptable at run time before Python 3.11
    """A logger whose calls take two more keywords.

    Before a `Process` is open, the process counts as the main one.
    """

    def log(  # type: ignore[override] # what it does not name goes through `kwargs`
        self,
        level: int,
        msg: object,
        *args: object,
        main_process_only: bool | None = None,
        in_order: bool = False,
        **kwargs: Any,
    ) -> None:
        """Log once in the world.

        Args:
            level: as in ``logging``.
            msg: as in ``logging``, with its `args`.
            args: values for the placeholders of `msg`.
            main_process_only: whether only the main process logs; true by default, except with `in_order`.
            in_order: each rank logs in its turn. Every rank must make the call then.
            kwargs: what ``logging`` takes: ``exc_info``, ``stack_info``, ``extra``.

        Raises:
            ConfigError: if only the main process is to log, and that in order.
        """
        if in_order and main_process_only:
            raise ConfigError(
                "`in_order=True` with `main_process_only=True` leaves one process, which has no order. "
                "Drop one of the two."
            )
        # One frame more than in `logging`, so that the record names the caller's line.
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1
        process = Process.current() if Process.is_open() else None
        if in_order and process is not None:
            # Every rank meets at every turn, whatever its level is set to.
            for turn in range(process.topology.world_size):
                if turn == process.topology.rank:
                    self._emit(level, msg, args, kwargs)
                process.barrier()
        elif in_order or main_process_only is False or process is None or process.topology.is_main:
            self._emit(level, msg, args, kwargs)

    def _emit(self, level: int, msg: object, args: tuple[object, ...], kwargs: MutableMapping[str, Any]) -> None:
        if self.isEnabledFor(level):
            msg, kwargs = self.process(msg, kwargs)
            self.logger.log(level, msg, *args, **{**kwargs, "stacklevel": kwargs["stacklevel"] + 1})


def get_logger(name: str, log_level: str | int | None = None) -> RankLogger:
    """A logger that speaks on the main process only, unless a call says otherwise::

        logger = get_logger(__name__)
        logger.info("once")
        logger.info("on every rank", main_process_only=False)
        logger.info("on every rank, one after the other", in_order=True)

    Args:
        name: as in ``logging``.
        log_level: lowest level that is logged, such as ``"INFO"``; by default what ``logging`` is set to.

    Raises:
        ConfigError: if there is no such level.
    """
    logger = logging.getLogger(name)
    if log_level is not None:
        level = log_level.upper() if isinstance(log_level, str) else log_level
        try:
            logger.setLevel(level)
        except ValueError:
            raise ConfigError(
                f"`log_level={log_level!r}` is no level of `logging`. Use DEBUG, INFO, WARNING, ERROR or CRITICAL."
            ) from None
    return RankLogger(logger, {})


def tqdm(*args: Any, main_process_only: bool = True, **kwargs: Any) -> Any:
    """A progress bar that only the main process of each node shows. Takes what ``tqdm.auto.tqdm`` takes.

    Args:
        args: for tqdm.
        main_process_only: ``False`` shows it on every rank.
        kwargs: for tqdm; ``disable=True`` hides it everywhere.
    """
    from tqdm.auto import tqdm as bar  # type: ignore[import-untyped, unused-ignore] # here, since it is slow to import

    if main_process_only and Process.is_open() and not Process.current().topology.is_local_main:
        kwargs["disable"] = True
    return bar(*args, **kwargs)
