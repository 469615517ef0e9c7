"""Launchers recognised by what they set."""

from __future__ import annotations

import pytest

from accel_state import ConfigError, MeshShape, detect
from accel_state.env import RUN_CONFIG_VARIABLE, Launcher, first_host, snapshot

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "PMIX_NAMESPACE": "job-1",
}
INTEL_MPI = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
MVAPICH = {
    "MV2_COMM_WORLD_RANK": "1",
    "MV2_COMM_WORLD_SIZE": "2",
    "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MV2_COMM_WORLD_LOCAL_SIZE": "2",
    "MPIRUN_ID": "77",
    "PMI_ID": "1",
}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2),1",
    "SLURM_STEP_NODELIST": "node[07-09]",
    "SLURM_JOB_ID": "4711",
}


def test_nothing_set_is_one_process() -> None:
    found = detect({"PATH": "/bin"})
    assert (found.launcher, found.rank, found.world_size, found.master_addr) == (Launcher.NONE, 0, 1, None)


def test_torchrun() -> None:
    found = detect({**TORCHRUN, RUN_CONFIG_VARIABLE: "{}"})
    assert found.launcher is Launcher.TORCHRUN
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (5, 8, 1, 4)
    assert (found.node_rank, found.attempt, found.agent_store) == (1, 2, True)
    assert (found.master_addr, found.master_port, found.run_config) == ("node0", 29500, "{}")
    assert found.topology(MeshShape(dp_shard=8)).coord("dp_shard") == 5


def test_rank_and_world_size_alone_mean_one_node() -> None:
    found = detect({"RANK": "1", "WORLD_SIZE": "2"})
    assert (found.local_rank, found.local_world_size, found.node_rank) == (1, 2, 0)
    assert found.master_addr is None


@pytest.mark.parametrize(
    ("variables", "launcher"),
    [(OPEN_MPI, Launcher.OPEN_MPI), (INTEL_MPI, Launcher.INTEL_MPI), (MVAPICH, Launcher.MVAPICH)],
)
def test_mpi_on_one_node(variables: dict[str, str], launcher: Launcher) -> None:
    found = detect(variables)
    assert found.launcher is launcher
    assert found.rank == found.local_rank == found.world_size - 1
    assert found.master_addr == "127.0.0.1"
    assert found.master_port is not None
    assert 20_000 <= found.master_port < 32_000


def test_ranks_of_one_mpi_job_agree_on_the_port_and_jobs_differ() -> None:
    other_rank = {**MVAPICH, "MV2_COMM_WORLD_RANK": "0", "MV2_COMM_WORLD_LOCAL_RANK": "0", "PMI_ID": "0"}
    assert detect(MVAPICH).master_port == detect(other_rank).master_port
    assert detect(OPEN_MPI).master_port != detect({**OPEN_MPI, "PMIX_NAMESPACE": "job-2"}).master_port


def test_mpi_on_several_nodes_needs_an_address() -> None:
    several = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
    found = detect(several)
    assert (found.node_rank, found.master_addr, found.master_port) == (1, None, None)
    found = detect({**several, "MASTER_ADDR": "node0", "MASTER_PORT": "1234"})
    assert (found.master_addr, found.master_port) == ("node0", 1234)


def test_slurm_step() -> None:
    found = detect(SLURM)
    assert found.launcher is Launcher.SLURM
    assert (found.rank, found.world_size, found.local_rank, found.node_rank) == (5, 7, 2, 1)
    assert (found.local_world_size, found.master_addr) == (3, "node07")
    assert detect({**SLURM, "SLURM_NODEID": "2", "SLURM_LOCALID": "0"}).local_world_size == 1
    assert detect({**SLURM, "SLURM_PROCID": "0"}).master_port == found.master_port


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_ID": ""}, {"SLURM_STEP_ID": "4294967291 batch"}])
def test_slurm_batch_script_without_srun_is_one_process(step: dict[str, str]) -> None:
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1", **step}
    assert detect(batch).world_size == 1


def test_pmi_of_slurm_is_not_taken_for_intel_mpi() -> None:
    assert detect({**SLURM, "PMI_RANK": "5", "PMI_SIZE": "7"}).launcher is Launcher.SLURM


def test_the_innermost_launcher_wins() -> None:
    assert detect({**SLURM, **TORCHRUN, **OPEN_MPI}).launcher is Launcher.TORCHRUN
    assert detect({**SLURM, **OPEN_MPI}).launcher is Launcher.OPEN_MPI


@pytest.mark.parametrize(
    ("variables", "match"),
    [
        ({"RANK": "0"}, "`WORLD_SIZE` is not set, but `RANK` is"),
        ({"WORLD_SIZE": "2"}, "`RANK` is not set, but `WORLD_SIZE` is"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "`RANK=one` is not a whole number"),
        ({**TORCHRUN, "MASTER_PORT": ""}, "`MASTER_PORT=` is not a whole number"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "x"}, "`OMPI_COMM_WORLD_LOCAL_SIZE=x` is not"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "3(2)"}, "not of the form"),
        ({**SLURM, "SLURM_LOCALID": "two"}, "`SLURM_LOCALID=two` is not"),
    ],
)
def test_malformed_variables_are_named(variables: dict[str, str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        detect(variables)


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "0", "WORLD_SIZE": "0"},
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "0"},
        {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "0"},
    ],
)
def test_worlds_of_nothing_are_refused_by_the_topology(variables: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="leaves no process to run"):
        detect(variables).topology()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node[07-09,12],login", "node07"),
        ("a,b", "a"),
        ("rack[1-2]n[3,4]", "rack1n3"),
        ("single", "single"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_detect_reads_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert detect().rank == 5
    copy = snapshot()
    copy["RANK"] = "6"
    assert detect().rank == 5
