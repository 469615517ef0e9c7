"""Inference with a model whose parts are on different ranks: a batch passes through them in micro-batches."""

from __future__ import annotations

from accel_parallel.pipeline.model import PipelinedModel, prepare_pippy
from accel_parallel.pipeline.split import plan_split_points

__all__ = ["PipelinedModel", "plan_split_points", "prepare_pippy"]
