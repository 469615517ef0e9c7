"""`parallelism="auto"`: what a model costs, what a device has, and the fastest plan that fits.

Names are imported when they are first used; choosing needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accel_parallel.auto.choose import select_plan as select_plan
    from accel_parallel.auto.devices import agreed_hardware as agreed_hardware
    from accel_parallel.auto.devices import detect_hardware as detect_hardware
    from accel_parallel.auto.examine import profile_model as profile_model
    from accel_parallel.auto.formula import TransformerSizes as TransformerSizes
    from accel_parallel.auto.formula import transformer_profile as transformer_profile
    from accel_parallel.auto.hardware import Hardware as Hardware
    from accel_parallel.auto.hardware import Link as Link
    from accel_parallel.auto.optimizers import OptimizerCost as OptimizerCost
    from accel_parallel.auto.optimizers import optimizer_cost as optimizer_cost
    from accel_parallel.auto.plan import Candidate as Candidate
    from accel_parallel.auto.plan import Plan as Plan
    from accel_parallel.auto.profile import ModelProfile as ModelProfile
    from accel_parallel.auto.request import AutoParallelism as AutoParallelism

_HOME = {
    "AutoParallelism": "request",
    "Candidate": "plan",
    "Hardware": "hardware",
    "Link": "hardware",
    "ModelProfile": "profile",
    "OptimizerCost": "optimizers",
    "Plan": "plan",
    "TransformerSizes": "formula",
    "agreed_hardware": "devices",
    "detect_hardware": "devices",
    "optimizer_cost": "optimizers",
    "profile_model": "examine",
    "select_plan": "choose",
    "transformer_profile": "formula",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
