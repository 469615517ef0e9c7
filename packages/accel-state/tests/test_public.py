"""What is public, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

import accel_state

NAMES = """
__version__
AccelError BatchSizeError CheckpointError CollectiveError ConfigError MissingDependencyError
DEVICES DTYPE_OF_PRECISION DTypePolicy DeviceKind DistributedType LaunchSettings MeshShape Process
ProcessEnvironment ProcessSettings RankLogger Reduction RunConfig Topology
broadcast broadcast_object_list clear_device_cache concatenate convert_to_fp32 detect dtype_size_bytes
find_batch_size find_blocks find_device find_executable_batch_size gather gather_object gather_ragged get_logger
is_out_of_memory local_main_process_first main_process_first map_tensors on_last_process on_local_main_process
on_local_process on_main_process on_process pad_across_processes parse_dtype print_main reduce release_memory
rng_state send_to_device set_rng_state set_seed slice_tensors split_between_processes synchronize_rng_states
tensor_leaves tqdm tree_signature
"""


def test_public_names_are_these() -> None:
    assert sorted(accel_state.__all__) == sorted(NAMES.split())
    assert dir(accel_state) == sorted(accel_state.__all__)


def test_every_public_name_is_there() -> None:
    for name in accel_state.__all__:
        assert getattr(accel_state, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        accel_state.nothing  # noqa: B018


@pytest.mark.parametrize("heavy", ["torch", "numpy", "tqdm"])
def test_a_launcher_reads_settings_without(heavy: str) -> None:
    modules = "accel_state, accel_state.config, accel_state.env, accel_state.topology, accel_state.protocols"
    code = f"import sys, {modules}; accel_state.LaunchSettings(); sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_protocols_are_met_by_plain_classes() -> None:
    from accel_state.protocols import BatchInfo, Stateful

    info = BatchInfo(epoch=0, index=3, rows=(4, 4), real_rows=(4, 1), remaining=0, may_pad=True)
    assert info.is_last
    assert info.num_real == 5

    class Counter:
        def state_dict(self) -> dict[str, int]:
            return {}

        def load_state_dict(self, state_dict: dict[str, int]) -> None: ...

    assert isinstance(Counter(), Stateful)
    assert not isinstance(object(), Stateful)
