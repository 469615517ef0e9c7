"""This process among its peers: opened and closed explicitly, and the only global there is."""

from __future__ import annotations

import atexit
import contextlib
import time
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from enum import Enum
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from accel_state.device import DeviceKind, select_device
from accel_state.env import ProcessEnvironment, detect
from accel_state.errors import ConfigError
from accel_state.topology import MeshShape, Topology

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

__all__ = ["DistributedType", "Process", "ProcessSettings", "close_group"]


class DistributedType(str, Enum):
    """Kind of world a script runs in, by the names that users of such libraries compare with."""

    NO = "NO"
    MULTI_CPU = "MULTI_CPU"
    MULTI_GPU = "MULTI_GPU"
    MULTI_XPU = "MULTI_XPU"
    MULTI_MPS = "MULTI_MPS"
    MULTI_NPU = "MULTI_NPU"
    MULTI_HPU = "MULTI_HPU"
    MULTI_MLU = "MULTI_MLU"
    MULTI_MUSA = "MULTI_MUSA"
    MULTI_SDAA = "MULTI_SDAA"
    MULTI_NEURON = "MULTI_NEURON"
    XLA = "XLA"
    FSDP = "FSDP"
    DEEPSPEED = "DEEPSPEED"
    MEGATRON_LM = "MEGATRON_LM"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessSettings:
    """What is asked for when a `Process` is opened; a default asks for nothing. Later, nothing else may be."""

    device: str | None = None
    """Device type; ``None`` for the machine's own."""
    backend: str | None = None
    """``torch.distributed`` backend; ``None`` for the device's own."""
    timeout_s: float = 1800.0
    """Seconds that a collective waits for its peers."""
    check_collectives: bool = False
    """Whether collectives compare shapes and dtypes over all ranks first."""
    mesh: MeshShape | None = None
    """How the world is divided; ``None``: all of it ``dp_replicate``."""


class Process:
    """This process: its topology, its device and its process group.

    Open it once; `Process.current()` finds it afterwards. It is a context manager too::

        with Process.open(ProcessSettings(device="cpu")) as process:
            print(process.topology.rank, process.device)

    A world of one process has no process group, and collectives are then the identity.
    """

    def __init__(self, settings: ProcessSettings, environment: ProcessEnvironment) -> None:
        """Called by `open` only."""
        self.settings = settings
        self.environment = environment
        self.topology: Topology = environment.topology(settings.mesh)
        self.kind: DeviceKind
        self.device: torch.device
        self.kind, self.device = select_device(
            settings.device, local_rank=self.topology.local_rank, local_world_size=self.topology.local_world_size
        )
        self._owns_group = False
        self.is_closed = False
        """Whether `close` was called: there are no peers to talk to any more."""

    @staticmethod
    def open(
        settings: ProcessSettings | None = None,
        *,
        environment: ProcessEnvironment | None = None,
        store: Store | None = None,
    ) -> Process:
        """Join the world. Every rank must call this; it returns when all have.

        Opening again gives the same object, if nothing else than what is there is asked for.

        Args:
            settings: what is asked for.
            environment: place in the world; by default what the launcher's variables say.
            store: a rendezvous store that is there already; by default one at the master's address.

        Raises:
            ConfigError: if it is open already with other settings (both are named), if a process group
                of another size exists, or if the device or the rendezvous address is missing.
        """
        global _current
        settings = settings or ProcessSettings()
        if _current is not None:
            _current._refuse_other(settings)
            return _current
        process = Process(settings, environment or detect())
        process._join(store)
        _current = process
        return process

    @staticmethod
    def current() -> Process:
        """The open process.

        Raises:
            ConfigError: if none is open.
        """
        if _current is None:
            raise ConfigError(
                "No process is open, so there is no rank, device or group to ask for. "
                "Create an `Accelerator()` or call `Process.open()` first."
            )
        return _current

    @staticmethod
    def is_open() -> bool:
        """Whether `current` would find one."""
        return _current is not None

    @property
    def distributed_type(self) -> DistributedType:
        """Kind of world by its devices; a strategy such as FSDP may narrow it."""
        if self.kind.type == "xla":
            return DistributedType.XLA
        if self.topology.world_size == 1:
            return DistributedType.NO
        return DistributedType(f"MULTI_{self.kind.label}")

    def divide(self, mesh: MeshShape) -> None:
        """Divide the world once it is known how. Every rank must call this, before anything asks for its place.

        Raises:
            ConfigError: if it is divided already, or into another number of processes.
        """
        if self.settings.mesh not in (None, mesh):
            raise ConfigError(
                f"The world is divided into {self.settings.mesh} already, and {mesh} was asked for. "
                f"`close()` the process first, or give the same sizes everywhere."
            )
        self.topology = replace(self.topology, mesh=mesh)
        self.settings = replace(self.settings, mesh=mesh)

    def require_group(self) -> None:
        """Make the process group that a world of one is otherwise spared, for what cannot do without one."""
        if not dist.is_initialized():
            dist.init_process_group(
                backend=self.settings.backend or self.kind.backend,
                store=dist.HashStore(),  # type: ignore[attr-defined] # public by its documentation
                rank=0,
                world_size=1,
                device_id=self.device if self.kind.type == "cuda" else None,
            )
            self._owns_group = True

    def barrier(self) -> None:
        """Wait for all ranks. Every rank must call this. Once closed there is nobody to wait for."""
        if self.topology.world_size > 1 and not self.is_closed:
            dist.barrier()

    def close(self) -> None:
        """Leave the world; the process group ends if it was started here. A second call does nothing."""
        global _current
        self.is_closed = True
        if _current is self:
            _current = None
            if self._owns_group and dist.is_initialized():
                _let_go()
                dist.destroy_process_group()

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        place = f"rank {self.topology.rank} of {self.topology.world_size}"
        launcher = self.environment.launcher.value
        return f"Process({place}, {self.device}, {self.distributed_type.value}, launcher {launcher})"

    def _refuse_other(self, settings: ProcessSettings) -> None:
        """Accept what is so already, chosen or found, and what is not asked for; refuse the rest, naming both."""
        here = replace(
            self.settings,
            device=self.kind.type,
            backend=self.settings.backend or self.kind.backend,
            mesh=self.topology.shape,
        )
        differing = [
            f"`{field.name}` is {getattr(here, field.name)!r} and {asked!r} was given"
            for field in fields(ProcessSettings)
            if (asked := getattr(settings, field.name)) not in (field.default, getattr(here, field.name))
        ]
        if differing:
            raise ConfigError(
                f"This process is open with other settings: {'; '.join(differing)}. Its device and group are made "
                f"once. Give the same settings everywhere, or `close()` it first."
            )

    def _join(self, store: Store | None) -> None:
        world_size = self.topology.world_size
        if self.device.index is not None:
            self.kind.call("set_device", self.device)
        if dist.is_available() and dist.is_initialized():
            self._adopt_group()
            return
        if world_size == 1:
            return
        timeout = timedelta(seconds=self.settings.timeout_s)
        store = _fresh(store or self._open_store(timeout), world_size)
        dist.init_process_group(
            backend=self.settings.backend or self.kind.backend,
            store=store,
            rank=self.topology.rank,
            world_size=world_size,
            timeout=timeout,
            device_id=self.device if self.kind.type == "cuda" else None,
        )
        try:
            _meet(store, self.topology.rank, world_size, timeout)
        except dist.DistError:
            dist.destroy_process_group()
            raise
        self._owns_group = True
        atexit.unregister(_let_go)  # once, however often a process is opened
        atexit.register(_let_go)

    def _adopt_group(self) -> None:
        """The script started a process group of its own: use it, and leave it open at the end."""
        world_size, rank = dist.get_world_size(), dist.get_rank()
        if (world_size, rank) != (self.topology.world_size, self.topology.rank):
            raise ConfigError(
                f"A process group of {world_size} processes exists, in which this is rank {rank}, but the launcher's "
                f"variables say rank {self.topology.rank} of {self.topology.world_size}. "
                f"Start the script with `accel launch` or torchrun, or do not call `init_process_group` yourself."
            )

    def _open_store(self, timeout: timedelta) -> Store:
        environment = self.environment
        if environment.master_addr is None or environment.master_port is None:
            raise ConfigError(
                f"The world has {self.topology.world_size} processes, but where rank 0 listens is not known "
                f"(MASTER_ADDR={environment.master_addr}, MASTER_PORT={environment.master_port}; "
                f"launcher {environment.launcher.value}). "
                f"Set MASTER_ADDR and MASTER_PORT on every node, or start with `accel launch`."
            )
        serves = self.topology.rank == 0 and not environment.agent_store
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined] # public by its documentation, not by __all__
                environment.master_addr,
                environment.master_port,
                self.topology.world_size,
                is_master=serves,
                timeout=timeout,
                wait_for_workers=False,
            )
        except RuntimeError as error:  # a `DistNetworkError`, but of torch 2.6 where a port is taken
            asked = f"{environment.master_addr}:{environment.master_port}"
            if serves:
                why, remedy = "cannot listen there", "Set MASTER_PORT to a free port"
            else:
                why, remedy = f"found no rank 0 there within {timeout.total_seconds():.0f} s", "Check that rank 0 runs"
            raise ConfigError(
                f"Rank {self.topology.rank} was told to meet its peers at {asked}, and {why} ({error}). "
                f"{remedy}, or start with `accel launch`, which finds one."
            ) from error
        # A prefix, so that keys of ours and of a launcher's that shares the store never meet.
        return dist.PrefixStore(f"accel/{environment.attempt}", store)  # type: ignore[attr-defined] # as above


def _fresh(store: Store, world_size: int) -> Store:
    """A part of the store that no earlier world has written to, since a world may be opened again at the same one."""
    turn = (store.add("accel/opened", 1) - 1) // world_size
    return dist.PrefixStore(f"accel/{turn}", store)  # type: ignore[attr-defined]


def close_group(group: dist.ProcessGroup) -> None:
    """Give up a group that was made besides the world's own. Every rank of it must; nothing if the world has ended."""
    if dist.is_initialized():
        _let_go()
        with contextlib.suppress(ValueError):  # it went with an earlier world
            dist.destroy_process_group(group)


def _let_go() -> None:
    """Before the end of the process or of a group: let the backend's threads give up the last collectives' tensors.

    gloo does so a moment after the caller has gone on, and needs the interpreter for it. Seen with torch 2.13 in
    scripts that keep a DDP model to their end: where the interpreter is ending by then, the thread is unwound through
    code that cannot be, and the process aborts ("terminate called without an active exception") although all went
    well; and where the model is let go of last, its group waits for the thread while the thread waits for the
    interpreter, for ever.
    """
    time.sleep(_LET_GO_S)


def _meet(store: Store, rank: int, world_size: int, timeout: timedelta) -> None:
    """Return when all ranks have joined.

    gloo lets a rank go on while its peers still connect to each other, and one that ends at once would break their
    start. Rank 0 goes last, since it may serve the store that the others wait at.
    """
    if store.add("joined", 1) == world_size:
        store.set("all-joined", "1")
    store.wait(["all-joined"], timeout)
    if rank == 0:
        store.wait(["all-gone"], timeout)
    elif store.add("gone", 1) == world_size - 1:
        store.set("all-gone", "1")


_LET_GO_S = 0.03
_current: Process | None = None
