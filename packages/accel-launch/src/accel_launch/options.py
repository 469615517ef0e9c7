"""What a launch was asked for. Says nothing about the machine: what contradicts that is found by `plan`."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

from accel_state.config import MixedPrecision
from accel_state.errors import ConfigError

__all__ = ["LaunchOptions"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchOptions:
    """The flags of `accel launch`, each named as its flag. ``None`` and ``False`` mean not given.

    Raises:
        ConfigError: where a value is outside its range, or two of them contradict one another.
    """

    num_processes: int | None = None
    """Processes over all machines. Not given: one a CUDA device of each machine, else one a machine."""
    cpu: bool = False
    """Run on the CPU, whatever devices there are."""
    multi_gpu: bool = False
    """Require several CUDA devices, one a process, instead of taking what is there."""
    num_cpu_threads_per_process: int | None = None
    """Threads of each process's OpenMP pool. Not given, with several processes: an equal part of the cores,
    unless ``OMP_NUM_THREADS`` is set."""
    mixed_precision: MixedPrecision | None = None
    """Dtype in which the forward pass computes."""
    gradient_accumulation_steps: int | None = None
    """Micro-batches whose gradients make one optimizer step."""
    project_dir: str | None = None
    """Folder in which checkpoints and metrics are kept."""
    num_machines: int = 1
    """Machines, on each of which `accel launch` is started by hand."""
    machine_rank: int | None = None
    """Number of this machine, from 0."""
    main_process_ip: str | None = None
    """Address of machine 0. Needed with several machines."""
    main_process_port: int | None = None
    """TCP port at which rank 0 meets the others. Not given, on one machine: a free one."""
    debug: bool = False
    """Compare shapes and dtypes over all ranks before each collective."""
    timeout: float | None = None
    """Seconds that a collective waits for its peers."""
    grace_period: float | None = None
    """Seconds that processes have to end by themselves, a last checkpoint included, once the launcher was asked to end
    by Ctrl-C, SIGTERM or SIGHUP. Not given: 1.4."""
    log_dir: str | None = None
    """Folder that gets the whole output of each rank, what is held back included."""
    quiet: bool = False
    """No words of the launcher's own after a failure."""
    module: bool = False
    """The script is the name of a module, as for ``python -m``."""
    no_python: bool = False
    """The script is a program that is started as it is."""

    def __post_init__(self) -> None:
        for name in ("num_processes", "num_cpu_threads_per_process", "gradient_accumulation_steps", "num_machines"):
            _check_count(name, getattr(self, name))
        self._check_exclusive("cpu", "multi_gpu", "one forbids the devices that the other requires")
        self._check_exclusive("module", "no_python", "a module is run by python and a program is not")
        self._check_seconds("timeout", "that a collective could wait", "1800")
        self._check_seconds("grace_period", "to end in", "1.4")
        if self.main_process_port is not None and not 1 <= self.main_process_port <= 65535:
            raise ConfigError(
                f"`--main-process-port {self.main_process_port}` is not a TCP port: those are 1 to 65535. "
                f"Give one of them, or leave it out for a free one."
            )
        self._check_machines()

    def _check_seconds(self, name: str, what: str, default: str) -> None:
        seconds = getattr(self, name)
        if seconds is not None and not (seconds > 0 and isfinite(seconds)):
            raise ConfigError(
                f"`{_flag(name)} {seconds:g}` is no time {what}. "
                f"Give a positive number of seconds, or leave it out for {default}."
            )

    def _check_exclusive(self, first: str, second: str, why: str) -> None:
        if getattr(self, first) and getattr(self, second):
            raise ConfigError(f"`{_flag(first)}` and `{_flag(second)}` were both given, but {why}. Keep one of them.")

    def _check_machines(self) -> None:
        if self.machine_rank is not None and not 0 <= self.machine_rank < self.num_machines:
            raise ConfigError(
                f"`--machine-rank {self.machine_rank}` with `--num-machines {self.num_machines}`: machines are "
                f"numbered 0 to {self.num_machines - 1}. Correct one of the two."
            )
        if self.num_machines == 1:
            return
        for name, why in (
            ("machine_rank", "each machine must know its own number"),
            ("main_process_ip", "the others must know where machine 0 is"),
            ("main_process_port", "a port that machine 0 finds free is not known to the others"),
        ):
            if getattr(self, name) is None:
                raise ConfigError(
                    f"`--num-machines {self.num_machines}` was given without `{_flag(name)}`, but {why}. "
                    f"Give `{_flag(name)}` on every machine."
                )
        if self.num_processes is not None and self.num_processes % self.num_machines:
            raise ConfigError(
                f"`--num-processes {self.num_processes}` counts the processes of all machines, and "
                f"`--num-machines {self.num_machines}` does not divide it: machines run equal numbers. "
                f"Give a multiple of {self.num_machines}."
            )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check_count(name: str, value: int | None) -> None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ConfigError(f"`{_flag(name)} {value}` is not a count of at least one. Give a positive integer.")
