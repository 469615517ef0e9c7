"""How a model, its optimizers and its checkpoints are spread over processes.

Names are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from accel_parallel._version import __version__

if TYPE_CHECKING:
    from accel_parallel.accumulation import Accumulation as Accumulation
    from accel_parallel.accumulation import Window as Window
    from accel_parallel.audit import audit_model as audit_model
    from accel_parallel.audit import audit_optimizer as audit_optimizer
    from accel_parallel.audit_ranks import audit_ranks as audit_ranks
    from accel_parallel.auto import AutoParallelism as AutoParallelism
    from accel_parallel.auto import Hardware as Hardware
    from accel_parallel.auto import Plan as Plan
    from accel_parallel.auto import profile_model as profile_model
    from accel_parallel.auto import select_plan as select_plan
    from accel_parallel.checkpoint import Checkpoint as Checkpoint
    from accel_parallel.checkpoint import Item as Item
    from accel_parallel.checkpoint import latest_checkpoint as latest_checkpoint
    from accel_parallel.checkpoint import save_checkpoint as save_checkpoint
    from accel_parallel.compilation import TorchDynamoPlugin as TorchDynamoPlugin
    from accel_parallel.compilation import compile_model as compile_model
    from accel_parallel.compilation import compile_regions as compile_regions
    from accel_parallel.compilation import has_compiled_regions as has_compiled_regions
    from accel_parallel.compilation import is_compiled as is_compiled
    from accel_parallel.compilation import uncompile as uncompile
    from accel_parallel.ddp import DDPStrategy as DDPStrategy
    from accel_parallel.deepspeed.hf_config import HfDeepSpeedConfig as HfDeepSpeedConfig
    from accel_parallel.deepspeed.placeholders import DummyOptim as DummyOptim
    from accel_parallel.deepspeed.placeholders import DummyScheduler as DummyScheduler
    from accel_parallel.deepspeed.plugin import DeepSpeedPlugin as DeepSpeedPlugin
    from accel_parallel.deepspeed.strategy import DeepSpeedStrategy as DeepSpeedStrategy
    from accel_parallel.dtype_table import dtype_table as dtype_table
    from accel_parallel.dtype_table import format_dtype_table as format_dtype_table
    from accel_parallel.fsdp.plugin import FullyShardedDataParallelPlugin as FullyShardedDataParallelPlugin
    from accel_parallel.fsdp.strategy import FSDPStrategy as FSDPStrategy
    from accel_parallel.local_sgd import LocalSGD as LocalSGD
    from accel_parallel.local_sgd import average_model as average_model
    from accel_parallel.optimizer import PreparedOptimizer as PreparedOptimizer
    from accel_parallel.parallelism import DeepSpeedSequenceParallelConfig as DeepSpeedSequenceParallelConfig
    from accel_parallel.parallelism import ParallelismConfig as ParallelismConfig
    from accel_parallel.parallelism import TorchContextParallelConfig as TorchContextParallelConfig
    from accel_parallel.pipeline import PipelinedModel as PipelinedModel
    from accel_parallel.pipeline import plan_split_points as plan_split_points
    from accel_parallel.pipeline import prepare_pippy as prepare_pippy
    from accel_parallel.plugins import DDPCommunicationHookType as DDPCommunicationHookType
    from accel_parallel.plugins import DistributedDataParallelKwargs as DistributedDataParallelKwargs
    from accel_parallel.plugins import GradientAccumulationPlugin as GradientAccumulationPlugin
    from accel_parallel.plugins import InitProcessGroupKwargs as InitProcessGroupKwargs
    from accel_parallel.recompute import checkpoint_activations as checkpoint_activations
    from accel_parallel.scheduler import PreparedScheduler as PreparedScheduler
    from accel_parallel.select import select_strategy as select_strategy
    from accel_parallel.select import strategy_class as strategy_class
    from accel_parallel.sequence.attention import SequenceParallel as SequenceParallel
    from accel_parallel.sequence.layout import SequenceLayout as SequenceLayout
    from accel_parallel.sequence.layout import shard_sequence as shard_sequence
    from accel_parallel.single import SingleStrategy as SingleStrategy
    from accel_parallel.strategy import Bundle as Bundle
    from accel_parallel.strategy import Duty as Duty
    from accel_parallel.strategy import OptimizerState as OptimizerState
    from accel_parallel.strategy import Strategy as Strategy
    from accel_parallel.tensor.apply import apply_tensor_parallel as apply_tensor_parallel
    from accel_parallel.tensor.apply import audit_replicas as audit_replicas
    from accel_parallel.tensor.loss import divided_cross_entropy as divided_cross_entropy
    from accel_parallel.tensor.loss import loss_parallel as loss_parallel
    from accel_parallel.tensor.plan import TensorPlan as TensorPlan
    from accel_parallel.tensor.plan import plan_tensor_parallel as plan_tensor_parallel

_HOME = {
    "DeepSpeedPlugin": "deepspeed.plugin",
    "DeepSpeedSequenceParallelConfig": "parallelism",
    "DeepSpeedStrategy": "deepspeed.strategy",
    "DummyOptim": "deepspeed.placeholders",
    "DummyScheduler": "deepspeed.placeholders",
    "HfDeepSpeedConfig": "deepspeed.hf_config",
    "plan_split_points": "pipeline",
    "PipelinedModel": "pipeline",
    "prepare_pippy": "pipeline",
    "select_plan": "auto",
    "profile_model": "auto",
    "Plan": "auto",
    "Hardware": "auto",
    "AutoParallelism": "auto",
    "SequenceLayout": "sequence.layout",
    "divided_cross_entropy": "tensor.loss",
    "audit_replicas": "tensor.apply",
    "TensorPlan": "tensor.plan",
    "format_dtype_table": "dtype_table",
    "dtype_table": "dtype_table",
    "audit_ranks": "audit_ranks",
    "average_model": "local_sgd",
    "LocalSGD": "local_sgd",
    "shard_sequence": "sequence.layout",
    "SequenceParallel": "sequence.attention",
    "apply_tensor_parallel": "tensor.apply",
    "plan_tensor_parallel": "tensor.plan",
    "loss_parallel": "tensor.loss",
    "uncompile": "compilation",
    "is_compiled": "compilation",
    "has_compiled_regions": "compilation",
    "compile_regions": "compilation",
    "compile_model": "compilation",
    "TorchDynamoPlugin": "compilation",
    "checkpoint_activations": "recompute",
    "TorchContextParallelConfig": "parallelism",
    "ParallelismConfig": "parallelism",
    "FullyShardedDataParallelPlugin": "fsdp.plugin",
    "FSDPStrategy": "fsdp.strategy",
    "Accumulation": "accumulation",
    "Window": "accumulation",
    "audit_model": "audit",
    "audit_optimizer": "audit",
    "Checkpoint": "checkpoint",
    "Item": "checkpoint",
    "latest_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
    "DDPStrategy": "ddp",
    "PreparedOptimizer": "optimizer",
    "DDPCommunicationHookType": "plugins",
    "DistributedDataParallelKwargs": "plugins",
    "GradientAccumulationPlugin": "plugins",
    "InitProcessGroupKwargs": "plugins",
    "PreparedScheduler": "scheduler",
    "select_strategy": "select",
    "strategy_class": "select",
    "SingleStrategy": "single",
    "Bundle": "strategy",
    "Duty": "strategy",
    "OptimizerState": "strategy",
    "Strategy": "strategy",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
