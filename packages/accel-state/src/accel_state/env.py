"""The only module that reads the process environment, and what launchers write there.

Nothing here writes the environment: a launcher builds its children's environment from `snapshot`
and hands it to them. Sources of the names: the documentation of torchrun, Open MPI (``mpirun(1)``),
Intel MPI (Hydra), MVAPICH2 and SLURM (``srun(1)``).
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from accel_state.errors import ConfigError
from accel_state.topology import MeshShape, Topology

__all__ = ["RUN_CONFIG_VARIABLE", "Launcher", "ProcessEnvironment", "detect", "first_host", "snapshot"]

RUN_CONFIG_VARIABLE = "ACCEL_RUN_CONFIG"
"""The one variable of ours: JSON, see `accel_state.config.LaunchSettings`."""


class Launcher(str, Enum):
    """Who started this process."""

    NONE = "none"
    TORCHRUN = "torchrun"
    """torchrun, `accel launch`, or anything else that sets ``RANK`` and ``WORLD_SIZE``."""
    OPEN_MPI = "open-mpi"
    INTEL_MPI = "intel-mpi"
    MVAPICH = "mvapich"
    SLURM = "slurm"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessEnvironment:
    """What the launcher says about this process."""

    launcher: Launcher = Launcher.NONE
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node_rank: int = 0
    master_addr: str | None = None
    """Host that rank 0 runs on; ``None`` where it is not known."""
    master_port: int | None = None
    """TCP port at which rank 0 (or the launcher) serves the rendezvous store."""
    agent_store: bool = False
    """Whether the launcher serves that store itself, so that no rank does (torchrun does)."""
    attempt: int = 0
    """How often the launcher has restarted the world, so that a store that outlives it is not read again."""
    run_config: str | None = None
    """`RUN_CONFIG_VARIABLE` as it was found."""

    def topology(self, mesh: MeshShape | None = None) -> Topology:
        """The place of this process, with the world divided as `mesh` says."""
        return Topology(
            rank=self.rank,
            world_size=self.world_size,
            local_rank=self.local_rank,
            local_world_size=self.local_world_size,
            node_rank=self.node_rank,
            mesh=mesh,
        )


def snapshot() -> dict[str, str]:
    """A copy of this process's environment, to build a child's from."""
    return dict(os.environ)


def detect(environ: Mapping[str, str] | None = None) -> ProcessEnvironment:
    """Recognise the launcher from its variables. Pure when `environ` is given.

    The standard names (``RANK``, ``WORLD_SIZE``, ...) win over an MPI's and those over SLURM's,
    since a launcher started inside a batch job sees the job's variables too.

    Raises:
        ConfigError: where a variable is not a number, or some of a set are missing.
    """
    values = os.environ if environ is None else environ
    reader = _Reader(values)
    if "RANK" in values or "WORLD_SIZE" in values:
        return _standard(reader)
    for launcher, names in _MPI.items():
        # SLURM's own PMI plugin sets PMI_RANK too, but never the local rank that the MPIs give.
        if names.rank in values and names.world_size in values and names.local_rank in values:
            return _mpi(reader, launcher, names)
    # A step id means `srun` started us; a plain batch script has SLURM_PROCID=0 and runs once.
    if "SLURM_PROCID" in values and values.get("SLURM_STEP_ID", "").isdigit():
        return _slurm(reader)
    return ProcessEnvironment(run_config=values.get(RUN_CONFIG_VARIABLE))


@dataclass(frozen=True, slots=True)
class _Names:
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str
    job: tuple[str, ...]
    """Variables that all ranks of one job on one node share, those first that two jobs do not."""


_MPI: dict[Launcher, _Names] = {
    Launcher.OPEN_MPI: _Names(
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        ("OMPI_MCA_ess_base_jobid", "PMIX_NAMESPACE", "OMPI_MCA_orte_hnp_uri"),
    ),
    Launcher.MVAPICH: _Names(
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
        ("MPIRUN_ID",),
    ),
    Launcher.INTEL_MPI: _Names(
        "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", ("PMI_PORT", "I_MPI_HYDRA_HOST_FILE")
    ),
}


class _Reader:
    """Reads numbers, and says which variable is wrong."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self.values = values

    def integer(self, name: str, default: int | None = None, *, needed_by: str = "") -> int:
        text = self.values.get(name)
        if text is None:
            if default is None:
                raise ConfigError(
                    f"`{name}` is not set, but {needed_by} is: together they place a process among its peers. "
                    f"Set both, or neither, or start with `accel launch`."
                )
            return default
        try:
            return int(text)
        except ValueError:
            raise ConfigError(
                f"`{name}={text}` is not a whole number, which a launcher must put there. "
                f"Correct the variable or unset it."
            ) from None

    def port(self, default: int | None = None) -> int | None:
        return self.integer("MASTER_PORT") if "MASTER_PORT" in self.values else default

    @property
    def run_config(self) -> str | None:
        return self.values.get(RUN_CONFIG_VARIABLE)


def _standard(reader: _Reader) -> ProcessEnvironment:
    rank = reader.integer("RANK", needed_by="`WORLD_SIZE`")
    world_size = reader.integer("WORLD_SIZE", needed_by="`RANK`")
    # Where only RANK and WORLD_SIZE are set by hand, one node is meant unless LOCAL_* says otherwise.
    local_world_size = reader.integer("LOCAL_WORLD_SIZE", world_size)
    return ProcessEnvironment(
        launcher=Launcher.TORCHRUN,
        rank=rank,
        world_size=world_size,
        local_rank=reader.integer("LOCAL_RANK", rank % local_world_size if local_world_size > 0 else 0),
        local_world_size=local_world_size,
        node_rank=reader.integer("GROUP_RANK", rank // local_world_size if local_world_size > 0 else 0),
        master_addr=reader.values.get("MASTER_ADDR"),
        master_port=reader.port(),
        agent_store=reader.values.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=reader.integer("TORCHELASTIC_RESTART_COUNT", 0),
        run_config=reader.run_config,
    )


def _mpi(reader: _Reader, launcher: Launcher, names: _Names) -> ProcessEnvironment:
    rank = reader.integer(names.rank)
    world_size = reader.integer(names.world_size)
    local_world_size = reader.integer(names.local_world_size, world_size)
    one_node = local_world_size == world_size
    job = next((reader.values[name] for name in names.job if name in reader.values), "")
    return ProcessEnvironment(
        launcher=launcher,
        rank=rank,
        world_size=world_size,
        local_rank=reader.integer(names.local_rank),
        local_world_size=local_world_size,
        node_rank=rank // max(1, local_world_size),
        # Which host rank 0 has is not said, nor is there a variable that is sure to be alike on all nodes.
        master_addr=reader.values.get("MASTER_ADDR", "127.0.0.1" if one_node else None),
        master_port=reader.port(_job_port(job) if one_node else None),
        run_config=reader.run_config,
    )


def _slurm(reader: _Reader) -> ProcessEnvironment:
    rank = reader.integer("SLURM_PROCID")
    world_size = reader.integer("SLURM_STEP_NUM_TASKS", reader.integer("SLURM_NTASKS", 1))
    node_rank = reader.integer("SLURM_NODEID", 0)
    tasks = reader.values.get("SLURM_STEP_TASKS_PER_NODE") or reader.values.get("SLURM_TASKS_PER_NODE", str(world_size))
    per_node = _expand_counts(tasks)
    nodes = reader.values.get("SLURM_STEP_NODELIST") or reader.values.get("SLURM_JOB_NODELIST")
    job = f"{reader.values.get('SLURM_JOB_ID', '')}.{reader.values.get('SLURM_STEP_ID', '')}"
    return ProcessEnvironment(
        launcher=Launcher.SLURM,
        rank=rank,
        world_size=world_size,
        local_rank=reader.integer("SLURM_LOCALID", 0),
        local_world_size=per_node[node_rank] if node_rank < len(per_node) else per_node[-1],
        node_rank=node_rank,
        master_addr=reader.values.get("MASTER_ADDR", first_host(nodes) if nodes else None),
        master_port=reader.port(_job_port(job)),
        run_config=reader.run_config,
    )


def _job_port(job: str) -> int:
    """A port that all ranks of a job compute alike, outside the range the kernel gives to clients."""
    return 20_000 + zlib.crc32(job.encode()) % 12_000


def _expand_counts(text: str) -> tuple[int, ...]:
    """``"2(x3),1"`` → ``(2, 2, 2, 1)``, SLURM's form of tasks per node."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ConfigError(
                f"`SLURM_TASKS_PER_NODE={text}` is not of the form `2(x3),1`, in which SLURM counts the tasks of each "
                f"node. Correct the variable, or start with `accel launch`."
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return tuple(counts)


def first_host(nodes: str) -> str:
    """The first host of a SLURM list: ``"node[07-09,12],login"`` → ``"node07"``.

    Each bracket contributes its first number; a name may hold several.
    """
    depth, end = 0, len(nodes)
    for index, char in enumerate(nodes):
        depth += (char == "[") - (char == "]")
        if char == "," and depth == 0:
            end = index
            break
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes[:end])


def told_to_others(name: str) -> str | None:
    """A variable that another library reads, for who has to know what that will do. Nothing of ours is set by it."""
    return os.environ.get(name)


def tell_others(name: str, value: str) -> None:
    """Set a variable that another library insists on reading, unless somebody has. It stays for the process's life."""
    os.environ.setdefault(name, value)
