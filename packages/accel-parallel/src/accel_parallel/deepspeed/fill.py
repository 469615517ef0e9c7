"""Filling a configuration from the facts of a run. Every step fills what is open and refuses what contradicts."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from accel_parallel.deepspeed.facts import Facts
from accel_parallel.deepspeed.optimizers import fill_optimizer
from accel_parallel.deepspeed.settings import AUTO, Notes, Settings
from accel_state.errors import ConfigError

__all__ = ["PRECISIONS", "STEPS", "clipping_of", "drop_open", "fill_mesh", "fill_precision"]

PRECISIONS: tuple[Literal["bf16"], Literal["fp16"]] = ("bf16", "fp16")
"""Sections that say in which dtype a model computes."""
_MEANT_AUTO = frozenset({
    "data_types.keep_in_fp32_modules", "zero_optimization.zenflow.select_interval",
    "zero_optimization.zenflow.select_strategy", "zero_optimization.zenflow.update_interval",
})  # fmt: skip
"""Where ``"auto"`` is a value of DeepSpeed's own."""


def fill_precision(settings: Settings, facts: Facts, notes: Notes) -> None:
    """``bf16`` and ``fp16`` from the precision of the run."""
    for name in PRECISIONS:
        key, wanted = f"{name}.enabled", facts.precision == name
        said = settings.given(key)
        if said is not None and bool(said) != wanted:
            raise ConfigError(
                f"`{key}` is {said!r} ({settings.source(key)}) and `mixed_precision` is {facts.precision!r} "
                f"({facts.precision_source}), and a model computes in one dtype. Say it in one place, or set "
                f"`{key}` to 'auto'."
            )
        if said is None and (wanted or settings.get(name) is not None):
            settings.set(key, wanted, facts.precision_source)
    if settings.given("torch_autocast.enabled") and facts.precision != "no":
        raise ConfigError(
            f"`torch_autocast.enabled` is true ({settings.source('torch_autocast.enabled')}), which keeps weights in "
            f"float32, and `mixed_precision` is {facts.precision!r} ({facts.precision_source}), by which DeepSpeed "
            f"casts them. Set `mixed_precision='no'`, or take `torch_autocast` out."
        )


def fill_window(settings: Settings, facts: Facts, notes: Notes) -> None:
    """Accumulation: DeepSpeed is told the length of a window, and leaves its end to the caller."""
    key = "gradient_accumulation_steps"
    said = settings.given(key)
    if said is not None and said != facts.num_steps:
        raise settings.conflict(key, facts.num_steps, facts.num_steps_source)
    if said is None:
        settings.set(key, facts.num_steps, facts.num_steps_source)
    settings.set("managed_gradient_accumulation", False, "windows are the `Accelerator`'s")


def fill_batch(settings: Settings, facts: Facts, notes: Notes) -> None:
    """Rows of a micro-batch. DeepSpeed computes the product over ranks and micro-batches itself, once it is checked."""
    key, whole = "train_micro_batch_size_per_gpu", "train_batch_size"
    said, total = settings.given(key), settings.given(whole)
    for name, value in ((key, said), (whole, total)):
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigError(
                f"`{name}` is {value!r} ({settings.source(name)}), which is no number of rows. Give a positive "
                f"integer, or 'auto'."
            )
    seen = facts.micro_batch_size
    if said is not None and seen is not None and said != seen:
        raise ConfigError(
            f"`{key}` is {said} ({settings.source(key)}), and each rank takes {seen} rows at a time from "
            f"{facts.loader_name}. Set it to {seen} or 'auto', or `batch_size={said}` in the loader."
        )
    ranks = facts.num_steps * facts.world_size
    if said is None and seen is None and total is not None and total % ranks:
        raise ConfigError(
            f"`{whole}` is {total} ({settings.source(whole)}), which {_product(facts)} cannot share evenly. Set it to "
            f"a multiple of {ranks}, or to 'auto'."
        )
    if said is None:
        rows, source = seen, facts.loader_name
        if rows is None and total is not None:
            rows, source = total // ranks, f"`{whole}` {total} over {_product(facts)}"
        if rows is None:
            rows, source = 1, "unknown, for no loader was prepared; nothing but DeepSpeed's printed rates use it"
        settings.set(key, rows, source)
    rows = settings.get(key)
    if total is not None and total != rows * ranks:
        raise ConfigError(
            f"`{whole}` is {total} ({settings.source(whole)}), and a step takes {rows} rows ({settings.source(key)}) x "
            f"{_product(facts)} = {rows * ranks}. Set it to 'auto', or make these agree."
        )
    settings.remove(whole)
    notes.rows.append((whole, settings.get(key) * ranks, f"{key} x {_product(facts)}"))


def _product(facts: Facts) -> str:
    return f"{facts.num_steps} micro-batch(es) x {facts.world_size} rank(s)"


def clipping_of(settings: Settings) -> float | None:
    """The norm to which DeepSpeed clips; ``None`` where it does not.

    Raises:
        ConfigError: for what is no norm.
    """
    norm = settings.given("gradient_clipping")
    if norm is None:
        return None
    if isinstance(norm, bool) or not isinstance(norm, (int, float)) or not 0 <= norm < math.inf:
        raise ConfigError(
            f"`gradient_clipping` is {norm!r} ({settings.source('gradient_clipping')}), which is no norm to clip to. "
            f"Give a positive number, or 'auto' and call `clip_grad_norm_`."
        )
    return float(norm) or None


def fill_clipping(settings: Settings, facts: Facts, notes: Notes) -> None:
    """Nothing is clipped unless that was asked for: left out, DeepSpeed 0.19 would clip to 1."""
    clipping_of(settings)
    if settings.given("gradient_clipping") is None:
        settings.set("gradient_clipping", 0.0, "off; `clip_grad_norm_` clips where it is called")


def fill_mesh(settings: Settings, facts: Facts, notes: Notes) -> None:
    """Ranks that share matrices or sequences."""
    for key, size, name in (
        ("tensor_parallel.autotp_size", facts.tp_size, "tp_size"),
        ("sequence_parallel_size", facts.sp_size, "sp_size"),
    ):
        said = settings.given(key)
        if said is not None and max(said, 1) != size:
            raise settings.conflict(key, size, f"`ParallelismConfig({name}={size})`")
        if said is None and (size > 1 or settings.is_auto(key)):
            settings.set(key, size, f"`ParallelismConfig({name}={size})`")
    key = "tensor_parallel.vocab_parallel_lm_head"
    if facts.tp_size > 1 and settings.get(key) is None:
        settings.set(key, False, "logits over the whole vocabulary, as without AutoTP")


def fill_buckets(settings: Settings, facts: Facts, notes: Notes) -> None:
    """Sizes that follow the model's width *h*, where they say ``"auto"``.

    ``reduce_bucket_size`` h², ``stage3_prefetch_bucket_size`` 0.9 h² and ``stage3_param_persistence_threshold`` 10 h:
    the formulas that the documentation of DeepSpeed in transformers gives. Without a width they are DeepSpeed's
    defaults, and so are those of stage 3 at another.
    """
    width = facts.hidden_size
    for name, size, formula in (
        ("reduce_bucket_size", (width or 0) ** 2, "hidden_size²"),
        ("stage3_prefetch_bucket_size", int(0.9 * (width or 0) ** 2), "0.9 hidden_size²"),
        ("stage3_param_persistence_threshold", 10 * (width or 0), "10 hidden_size"),
    ):
        key = f"zero_optimization.{name}"
        applies = settings.get("zero_optimization.stage") == 3 or not name.startswith("stage3")
        if settings.is_auto(key) and width and applies:
            settings.set(key, size, f"{formula}, which is {width}")


def fill_timers(settings: Settings, facts: Facts, notes: Notes) -> None:
    """Its throughput timer waits for the device in every step, so it runs only where its rates are printed."""
    key = "timers.throughput.enabled"
    if settings.given("steps_per_print") is None and settings.given(key) is None:
        settings.set(key, False, "nothing prints its rates without `steps_per_print`")


def check_async_io(settings: Settings, facts: Facts, notes: Notes) -> None:
    """Refuse a file system to offload to where DeepSpeed cannot read and write one."""
    for name in ("optimizer", "param"):
        key = f"zero_optimization.offload_{name}.device"
        if settings.given(key) == "nvme" and not facts.has_async_io:
            raise ConfigError(
                f"`{key}` is 'nvme' ({settings.source(key)}), and DeepSpeed's file access cannot be compiled here: it "
                f"needs libaio, a C++ compiler, ninja, setuptools and Python.h. Install them (`libaio-dev` or "
                f"`libaio-devel` of the system), or offload to 'cpu'."
            )


def check_leaf_classes(settings: Settings, facts: Facts, notes: Notes) -> None:
    """Refuse classes to be gathered as one of which the model has none: DeepSpeed would go on without."""
    key = "zero_optimization.leaf_module.classes"
    names = settings.given(key)
    if not names or facts.module_classes is None:
        return
    if facts.module_classes & ({names} if isinstance(names, str) else set(names)):
        return
    present = sorted(name for name in facts.module_classes if "." not in name)
    raise ConfigError(
        f"`{key}` is {names!r} ({settings.source(key)}), and the model has no module of such a class. Its classes are "
        f"{', '.join(present)}. Name some of these, or leave it out."
    )


def drop_open(settings: Settings, notes: Notes) -> None:
    """Take out what nothing filled, for which DeepSpeed has a default, and sections in which nothing is left."""
    for key in settings.names():
        if settings.is_auto(key) and key not in _MEANT_AUTO:
            source = settings.source(key)
            settings.remove(key)
            notes.rows.append((key, AUTO, f"{source}: left to DeepSpeed's default"))
            section = key.rpartition(".")[0]
            while section and settings.get(section) == {}:
                settings.remove(section)
                section = section.rpartition(".")[0]


STEPS: tuple[Callable[[Settings, Facts, Notes], None], ...] = (
    fill_window, fill_batch, fill_precision, fill_clipping, fill_mesh, fill_buckets, check_async_io, fill_optimizer,
    fill_timers, check_leaf_classes,
)  # fmt: skip
"""In this order: what comes first is refused first."""
