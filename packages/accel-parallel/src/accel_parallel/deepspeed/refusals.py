"""Settings by which DeepSpeed would do, or seem to do, what the `Accelerator` does."""

from __future__ import annotations

from typing import Any

from accel_parallel.deepspeed.settings import Settings
from accel_state.errors import ConfigError

__all__ = ["refuse_foreign_duties"]

_WHEN_TRUE = {
    "managed_gradient_accumulation": "windows are the `Accelerator`'s, which divides by the micro-batches or items "
    "that each really held. Take it out, and set `gradient_accumulation_steps`",
    "dataloader_drop_last": "loaders are yours and prepared by the `Accelerator`, so it has no effect. Pass "
    "`drop_last=True` to your `DataLoader`",
    "data_efficiency.enabled": "loaders are yours and prepared by the `Accelerator`, so it has no effect. Take it out, "
    "and order the data in your own sampler",
    **{
        f"{name}.enabled": "trackers are the `Accelerator`'s, and only the main process would need this one. Take it "
        "out, and use `log_with`"
        for name in ("tensorboard", "wandb", "comet", "csv_monitor")
    },
    "autotuning.enabled": "only DeepSpeed's own launcher tunes, so it has no effect. Take it out, or set "
    "`zero_stage='auto'`",
}
_CHECKPOINTS = (
    "`save_state` and `load_state` write and read checkpoints in a format of their own, so it has no effect. Take it "
    "out"
)
_WHEN_PRESENT = {
    "checkpoint": _CHECKPOINTS,
    "datastates_ckpt": _CHECKPOINTS,
    "pipeline": "it is about DeepSpeed's `PipelineModule`, which cannot be prepared, so it has no effect. Take it out",
}


def refuse_foreign_duties(settings: Settings) -> None:
    """Refuse what would be done twice, or not at all.

    Raises:
        ConfigError: saying who does it instead.
    """
    for key in ("bf16.enabled", "fp16.enabled", *(key for key in _WHEN_TRUE if key.endswith(".enabled"))):
        value = settings.given(key)
        if value is not None and not isinstance(value, bool):
            raise _error(settings, key, value, "it is neither true nor false. Write one of them, without quotes")
    printed = settings.given("steps_per_print")
    if printed is not None and (not isinstance(printed, int) or isinstance(printed, bool) or printed < 1):
        raise _error(settings, "steps_per_print", printed, "it is no number of steps. Give one, or take it out")
    kind = settings.given("communication_data_type")
    if kind not in (None, "fp16", "bf16", "fp32"):
        raise _error(settings, "communication_data_type", kind, "gradients travel in 'fp16', 'bf16' or 'fp32'. Set one")
    for key, reason in _WHEN_TRUE.items():
        if settings.given(key):
            raise _error(settings, key, settings.get(key), reason)
    for key, reason in _WHEN_PRESENT.items():
        if settings.given(key):
            raise _error(settings, key, settings.get(key), reason)
    operation = settings.given("gradient_allreduce_op")
    if operation not in (None, "mean"):
        raise _error(
            settings, "gradient_allreduce_op", operation,
            "the loss is scaled for gradients that are averaged over processes. Take it out",
        )  # fmt: skip


def _error(settings: Settings, key: str, value: Any, reason: str) -> ConfigError:
    return ConfigError(f"`{key}` is {value!r} ({settings.source(key)}), and {reason}.")
