"""A TCP port for rank 0 that no other launch on this machine takes meanwhile.

Rank 0 binds the port only after it has started, a second or more after it was chosen: two launches at once would
choose the same one. So a launcher holds the UDP port of the same number for as long as it lives. That is a lock
which the kernel gives out once a machine (once a network namespace, exactly as the TCP port), to all users, and
takes back however the launcher ends.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accel_state.errors import ConfigError

__all__ = ["candidate_ports", "hold_free_port", "hold_port"]

_FIRST, _LAST = 10_000, 19_999
"""Below every system's default range of ephemeral ports, so that no outgoing connection takes it, and below
those that `accel_state.env` computes from job numbers."""
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def candidate_ports(low: int, high: int, start: int) -> Iterator[int]:
    """Ports to try, each once, beginning somewhere in the middle. Pure.

    Args:
        low: first port that the kernel gives to outgoing connections.
        high: last such port.
        start: any number; different launches give different ones.
    """
    ports = [port for port in range(_FIRST, _LAST + 1) if not low <= port <= high]
    if not ports:  # the kernel was told to use them all: what is above, or else whatever is free
        ports = list(range(high + 1, 65_536)) or list(range(_FIRST, _LAST + 1))
    for index in range(len(ports)):
        yield ports[(start + index) % len(ports)]


@contextmanager
def hold_free_port() -> Iterator[int]:
    """A free port, held against other launches until the end of the block.

    Raises:
        ConfigError: if there is none.
    """
    low, high = _ephemeral_range()
    for port in candidate_ports(low, high, int.from_bytes(os.urandom(4), "big")):
        lock = _lock(port)
        if lock is None:
            continue
        with lock:
            if _is_free(port):
                yield port
                return
    raise ConfigError(
        f"Rank 0 needs a TCP port, but every one of {_FIRST} to {_LAST} is taken on this machine. "
        f"End what holds them, or give a free one with `--main-process-port`."
    )


@contextmanager
def hold_port(port: int) -> Iterator[int]:
    """A given port, held against other launches until the end of the block.

    Raises:
        ConfigError: if something listens there, or another launch holds it.
    """
    lock = _lock(port)
    if lock is None or not _is_free(port):
        if lock is not None:
            lock.close()
        raise ConfigError(
            f"`--main-process-port {port}` was given, but port {port} is taken on this machine, so rank 0 could not "
            f"listen there. Give another port, or leave the flag out and a free one is found."
        )
    with lock:
        yield port


def _ephemeral_range() -> tuple[int, int]:
    try:
        low, high = _EPHEMERAL.read_text().split()
        return int(low), int(high)
    except (OSError, ValueError):
        return 32_768, 60_999


def _lock(port: int) -> socket.socket | None:
    """The UDP port of that number, or ``None`` where another holds it."""
    lock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        lock.bind(("127.0.0.1", port))
    except OSError as error:
        lock.close()
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            return None
        raise
    return lock


def _is_free(port: int) -> bool:
    """Whether a server could listen on all addresses at this port now."""
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        try:
            probe = socket.socket(family, socket.SOCK_STREAM)
        except OSError:  # a machine without IPv6
            continue
        with probe:
            # As the server will do: a port whose last connections are still closing may be used again.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                probe.bind((address, port))
            except OSError as error:
                if error.errno == errno.EADDRNOTAVAIL:  # IPv6 compiled in and turned off
                    continue
                return False
    return True
