"""What a launch will start, as plain data: pure, for any number of machines and processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from accel_launch.host import REPLACED_VARIABLES, Host
from accel_launch.options import LaunchOptions
from accel_state.config import LaunchSettings, RunConfig
from accel_state.env import RUN_CONFIG_VARIABLE
from accel_state.errors import ConfigError

__all__ = ["LaunchPlan", "ProcessPlan", "Setting", "plan_launch"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A setting, its value and where that came from."""

    name: str
    value: object
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessPlan:
    """One process to start on this machine."""

    rank: int
    """Number of the process over all machines."""
    local_rank: int
    """Number of the process on this machine."""
    argv: tuple[str, ...]
    """Program and arguments."""
    env: Mapping[str, str]
    """Variables that it gets beside the inherited ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchPlan:
    """Everything that one `accel launch` starts on its machine."""

    processes: tuple[ProcessPlan, ...]
    """The processes of this machine, in order of rank."""
    world_size: int
    """Processes of all machines."""
    num_machines: int
    machine_rank: int
    script: str
    """The script as it was given, for messages."""
    master_port: int | None
    """Port of rank 0; ``None`` where no port is needed, or a free one is to be found: see `needs_port`."""
    removed: frozenset[str]
    """Inherited variables that the processes must not see."""
    settings: tuple[Setting, ...]
    """Settings of the launch itself."""
    run_config: RunConfig
    """Settings of the run as the launch alone makes them; arguments of ``Accelerator(...)`` win over them."""
    grace_period: float | None
    """Seconds to end in once asked from outside; ``None`` for the launcher's own."""
    log_dir: str | None
    quiet: bool

    @property
    def needs_port(self) -> bool:
        """Whether a free port must be found and put in by `with_port`."""
        return self.world_size > 1 and self.master_port is None

    @property
    def hosts_rank_zero(self) -> bool:
        """Whether the port must be free on this machine."""
        return self.world_size > 1 and self.machine_rank == 0

    @property
    def replaces_launcher(self) -> bool:
        """Whether the launcher becomes the one process, since there is nothing to watch."""
        return self.world_size == 1 and self.log_dir is None

    def with_port(self, port: int) -> LaunchPlan:
        """The same plan with rank 0 at `port`."""
        processes = tuple(replace(each, env={**each.env, "MASTER_PORT": str(port)}) for each in self.processes)
        return replace(self, master_port=port, processes=processes)

    def environment(self, process: ProcessPlan, inherited: Mapping[str, str]) -> dict[str, str]:
        """The whole environment of a process."""
        kept = {name: value for name, value in inherited.items() if name not in self.removed}
        return {**kept, **process.env}


def plan_launch(options: LaunchOptions, host: Host, script: str, args: Sequence[str] = ()) -> LaunchPlan:
    """What to start on this machine. Pure: nothing is looked up or started.

    One process of a world of one is started as plain python would be. Several get the standard variables, and
    those settings that were given in `accel_state.env.RUN_CONFIG_VARIABLE`.

    Args:
        options: what was asked for.
        host: the machine, from `accel_launch.host.inspect_host`.
        script: path of the script, name of the module or name of the program.
        args: arguments of the script.

    Raises:
        ConfigError: where the options contradict the machine, or have no effect in this launch.
    """
    world_size = _world_size(options, host)
    _check_world(options, host, world_size)
    local = world_size.value // options.num_machines
    machine_rank = options.machine_rank or 0
    launch_settings = _launch_settings(options)
    threads = _threads(options, host, local)
    shared = _shared_environment(options, world_size.value, local, launch_settings, threads)
    return LaunchPlan(
        processes=tuple(
            _process(machine_rank * local + index, index, _argv(options, host, script, args), shared, world_size.value)
            for index in range(local)
        ),
        world_size=world_size.value,
        num_machines=options.num_machines,
        machine_rank=machine_rank,
        script=script,
        master_port=options.main_process_port if world_size.value > 1 else None,
        removed=frozenset(REPLACED_VARIABLES) & set(host.variables),
        settings=(
            Setting(name="num_processes", value=world_size.value, source=world_size.source),
            *_described(options, world_size.value, threads),
        ),
        run_config=RunConfig(**launch_settings.values, sources=launch_settings.sources),
        grace_period=options.grace_period,
        log_dir=options.log_dir,
        quiet=options.quiet,
    )


@dataclass(frozen=True, slots=True)
class _Sourced:
    """A number, and why it is that."""

    value: int
    source: str


def _world_size(options: LaunchOptions, host: Host) -> _Sourced:
    if options.num_processes is not None:
        return _Sourced(options.num_processes, "--num-processes")
    machines = options.num_machines
    each = f" on each of {machines} machines" if machines > 1 else ""
    if options.cpu:
        return _Sourced(machines, f"default with --cpu: one process{each}")
    if host.num_gpus == 0:
        return _Sourced(machines, f"default: no CUDA device here, so one process{each}")
    return _Sourced(machines * host.num_gpus, f"default: {host.num_gpus} CUDA device(s) here{each and ',' + each}")


def _check_world(options: LaunchOptions, host: Host, world_size: _Sourced) -> None:
    if options.multi_gpu:
        _check_gpus(options, host, world_size)
    if world_size.value > 1:
        return
    outer = host.variables.get("WORLD_SIZE", "1")
    if outer != "1":
        raise ConfigError(
            f"One process was asked for ({world_size.source}), but `WORLD_SIZE={outer}` is set: another launcher "
            f"started this and means a world of {outer}, in which each would now train alone. "
            f"Start the script with python, give `--num-machines` and `--machine-rank`, or unset WORLD_SIZE."
        )
    for name in ("main_process_ip", "main_process_port"):
        if getattr(options, name) is not None:
            raise ConfigError(
                f"`--{name.replace('_', '-')} {getattr(options, name)}` was given for one process "
                f"({world_size.source}), which meets no other. Leave it out, or launch several processes."
            )


def _check_gpus(options: LaunchOptions, host: Host, world_size: _Sourced) -> None:
    local = world_size.value // options.num_machines
    if host.num_gpus == 0:
        raise ConfigError(
            "`--multi-gpu` was given, but no CUDA device is visible here (device nodes and CUDA_VISIBLE_DEVICES "
            "were looked at). Check the driver and the variable, or use `--cpu`."
        )
    if world_size.value == 1:
        raise ConfigError(
            f"`--multi-gpu` was given for one process ({world_size.source}), which uses one device. "
            f"Give `--num-processes 2` or more, or leave `--multi-gpu` out."
        )
    if local > host.num_gpus:
        raise ConfigError(
            f"`--multi-gpu` with {local} processes on this machine ({world_size.source}), which has {host.num_gpus} "
            f"visible CUDA device(s), and each process needs its own. "
            f"Launch at most {host.num_gpus * options.num_machines}, or use `--cpu`."
        )


def _launch_settings(options: LaunchOptions) -> LaunchSettings:
    """Those settings of the run that were given, under the names of `RunConfig`."""
    given: dict[str, tuple[Any, str]] = {}
    for name, field in (
        ("mixed_precision", "mixed_precision"),
        ("gradient_accumulation_steps", "gradient_accumulation_steps"),
        ("project_dir", "project_dir"),
        ("timeout_s", "timeout"),
    ):
        value = getattr(options, field)
        if value is not None:
            given[name] = (value, "--" + field.replace("_", "-"))
    if options.cpu:
        given["device"] = ("cpu", "--cpu")
    if options.multi_gpu:
        given["device"] = ("cuda", "--multi-gpu")
    if options.debug:
        given["check_collectives"] = (True, "--debug")
    return LaunchSettings(
        values={name: value for name, (value, _) in given.items()},
        sources={name: source for name, (_, source) in given.items()},
    )


def _threads(options: LaunchOptions, host: Host, local: int) -> Setting | None:
    """``OMP_NUM_THREADS`` for each process; ``None`` leaves it as it is."""
    name = "num_cpu_threads_per_process"
    if options.num_cpu_threads_per_process is not None:
        source = "--num-cpu-threads-per-process"
        return Setting(name=name, value=options.num_cpu_threads_per_process, source=source)
    if local == 1 or "OMP_NUM_THREADS" in host.variables:
        return None
    # Every process would otherwise take all cores, and they would crowd one another out.
    source = f"default: {host.num_cores} core(s) for {local} processes"
    return Setting(name=name, value=max(1, host.num_cores // local), source=source)


def _shared_environment(
    options: LaunchOptions, world_size: int, local: int, settings: LaunchSettings, threads: Setting | None
) -> dict[str, str]:
    shared: dict[str, str] = {}
    if settings.values:
        shared[RUN_CONFIG_VARIABLE] = settings.to_json()
    if threads is not None:
        shared["OMP_NUM_THREADS"] = str(threads.value)
    if world_size > 1:
        shared["WORLD_SIZE"] = str(world_size)
        shared["LOCAL_WORLD_SIZE"] = str(local)
        shared["GROUP_RANK"] = str(options.machine_rank or 0)
        shared["MASTER_ADDR"] = options.main_process_ip or "127.0.0.1"
        if options.main_process_port is not None:
            shared["MASTER_PORT"] = str(options.main_process_port)
    return shared


def _process(rank: int, local_rank: int, argv: tuple[str, ...], shared: dict[str, str], world_size: int) -> ProcessPlan:
    place = {"RANK": str(rank), "LOCAL_RANK": str(local_rank)} if world_size > 1 else {}
    return ProcessPlan(rank=rank, local_rank=local_rank, argv=argv, env={**shared, **place})


def _argv(options: LaunchOptions, host: Host, script: str, args: Sequence[str]) -> tuple[str, ...]:
    if options.no_python:
        return (script, *args)
    if options.module:
        return (host.python, "-m", script, *args)
    return (host.python, script, *args)


def _described(options: LaunchOptions, world_size: int, threads: Setting | None) -> tuple[Setting, ...]:
    """The other settings of the launch, with their sources."""
    described = [
        Setting(
            name="num_machines",
            value=options.num_machines,
            source="--num-machines" if options.num_machines > 1 else "default",
        )
    ]
    if options.machine_rank is not None:
        described.append(Setting(name="machine_rank", value=options.machine_rank, source="--machine-rank"))
    if world_size > 1:
        ip, port = options.main_process_ip, options.main_process_port
        described += [
            Setting(
                name="main_process_ip",
                value=ip or "127.0.0.1",
                source="--main-process-ip" if ip else "default on one machine",
            ),
            Setting(
                name="main_process_port",
                value=port or "a free port",
                source="--main-process-port" if port else "default on one machine",
            ),
        ]
    if options.grace_period is not None:
        described.append(Setting(name="grace_period", value=options.grace_period, source="--grace-period"))
    return (*described, *([threads] if threads else []))
