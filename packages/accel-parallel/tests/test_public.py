"""What is public, what importing it costs, and whether the README tells the truth."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import accel_parallel
import accel_parallel.checkpoint
import accel_parallel.testing

NAMES = """
__version__
Accumulation AutoParallelism Bundle Checkpoint DDPCommunicationHookType DDPStrategy DeepSpeedPlugin
DeepSpeedSequenceParallelConfig DeepSpeedStrategy DistributedDataParallelKwargs DummyOptim DummyScheduler Duty
FSDPStrategy FullyShardedDataParallelPlugin GradientAccumulationPlugin Hardware HfDeepSpeedConfig
InitProcessGroupKwargs Item LocalSGD OptimizerState ParallelismConfig PipelinedModel Plan PreparedOptimizer
PreparedScheduler SequenceLayout SequenceParallel SingleStrategy Strategy TensorPlan TorchContextParallelConfig
TorchDynamoPlugin Window
apply_tensor_parallel audit_model audit_optimizer audit_ranks audit_replicas average_model checkpoint_activations
compile_model compile_regions divided_cross_entropy dtype_table format_dtype_table has_compiled_regions
is_compiled latest_checkpoint loss_parallel plan_split_points plan_tensor_parallel prepare_pippy profile_model
save_checkpoint select_plan select_strategy shard_sequence strategy_class uncompile
"""


def test_public_names_are_these() -> None:
    assert sorted(accel_parallel.__all__) == sorted(NAMES.split())
    assert dir(accel_parallel) == sorted(accel_parallel.__all__)


def test_every_public_name_is_there() -> None:
    for name in accel_parallel.__all__:
        assert getattr(accel_parallel, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        accel_parallel.nothing  # noqa: B018


def test_names_of_the_checkpoint_and_the_contract_are_these() -> None:
    assert sorted(accel_parallel.checkpoint.__all__) == [
        "About",
        "BackgroundSaver",
        "Checkpoint",
        "Item",
        "Manifest",
        "PendingSave",
        "StoredTensor",
        "latest_checkpoint",
        "next_number",
        "numbered_path",
        "prune",
        "save_checkpoint",
        "write_checkpoint",
    ]
    assert sorted(accel_parallel.testing.__all__) == [
        "ContractModel",
        "SCENARIOS",
        "Scenario",
        "Trace",
        "check_contract",
        "contract_states",
        "contract_trace",
        "reference_trace",
    ]


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, accel_parallel; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_example_of_the_readme_runs(tmp_path: Path) -> None:
    example = re.search(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.S)
    assert example is not None
    script = tmp_path / "example.py"
    script.write_text(example[1])
    for line in ("from the start\n", "resumed at step 3\n"):
        done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stderr
        assert line in done.stdout
    assert "resumed at step 3" in done.stdout
