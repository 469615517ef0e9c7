"""The sections ``optimizer`` and ``scheduler``, and what is prepared in their place or instead of them."""

from __future__ import annotations

from typing import Any

import torch

from accel_parallel.deepspeed.facts import Facts
from accel_parallel.deepspeed.keys import check_schedule
from accel_parallel.deepspeed.placeholders import DummyOptim, DummyScheduler
from accel_parallel.deepspeed.settings import Notes, Settings
from accel_state.config import did_you_mean
from accel_state.errors import ConfigError

__all__ = ["fill_optimizer", "take_schedule"]

_ADAM = ("adam", "adamw")
_COMPILED_ON_HOST = ("adam", "adamw", "adagrad", "lion")
"""Whose steps on the host are operators that DeepSpeed compiles."""
_OWN = (*_COMPILED_ON_HOST, "lamb", "muadam", "muadamw", "musgd", "muon")
_WITH_TOTAL = ("WarmupDecayLR", "WarmupCosineLR")
_WITH_WARMUP = ("WarmupLR", *_WITH_TOTAL)
_BY_SHAPE = ("adafactor", "lamb", "lars", "lbfgs", "muon", "shampoo", "soap")
"""Optimizers that are not the same on a part of a parameter, or of several."""
_DEFAULTS = {"lr": 1e-3, "weight_decay": 0.0}


def fill_optimizer(settings: Settings, facts: Facts, notes: Notes) -> None:
    """``optimizer`` from a `DummyOptim`, or what a real optimizer needs to be taken."""
    section, optimizer = settings.get("optimizer"), facts.optimizer
    where = settings.source("optimizer")
    if section is not None and optimizer is None:
        raise ConfigError(
            f"The configuration has an `optimizer` section ({where}), and no optimizer was prepared together with the "
            f"model. Prepare `DummyOptim(model.parameters())` with it to train, or take the section out."
        )
    if optimizer is None:
        return
    if section is None and isinstance(optimizer, DummyOptim):
        raise ConfigError(
            "A `DummyOptim` was prepared, which stands for the optimizer of the configuration, and that has no "
            "`optimizer` section. Add one, such as {'type': 'AdamW', 'params': {'lr': 'auto'}}, or prepare an "
            "optimizer of torch."
        )
    if isinstance(optimizer, DummyOptim):
        _fill_section(settings, optimizer)
        _without_compiler(settings, facts, notes)
        return
    if section is not None:
        raise ConfigError(
            f"The configuration has an `optimizer` section ({where}), and a `{type(optimizer).__name__}` was prepared: "
            f"two optimizers for one model. Prepare `DummyOptim(model.parameters())` instead, or take the section out."
        )
    _take_real(settings, facts, optimizer, notes)


def _take_real(settings: Settings, facts: Facts, optimizer: torch.optim.Optimizer, notes: Notes) -> None:
    name = type(optimizer).__name__
    if name.lower() in _BY_SHAPE and settings.get("zero_optimization.stage") != 0:
        raise ConfigError(
            f"A `{name}` was prepared, which treats each parameter by its shape or norm, and ZeRO steps on flat parts "
            f"of many, so it would compute something else. Use one that treats each element by itself, such as AdamW, "
            f"or `zero_stage=0`."
        )
    if settings.given("zero_allow_untested_optimizer") is None:
        settings.set("zero_allow_untested_optimizer", True, f"the script's own `{name}` was prepared")
    device = settings.given("zero_optimization.offload_optimizer.device")
    if device not in ("cpu", "nvme") or type(optimizer).__module__.startswith("deepspeed."):
        return
    key = "zero_force_ds_cpu_optimizer"
    if settings.given(key):
        raise ConfigError(
            f"`{key}` is true ({settings.source(key)}), torch's `{name}` was prepared, and optimizer states are "
            f"offloaded to {device!r}: DeepSpeed would refuse it. Take `{key}` out, or prepare a `DummyOptim` and give "
            f"the configuration an `optimizer` section."
        )
    settings.set(key, False, f"torch's `{name}` was prepared, and optimizer states are offloaded")
    own = (
        "To step with DeepSpeed's compiled one, prepare `DummyOptim(model.parameters(), lr=...)`, and give the "
        "configuration an `optimizer` section"
        if facts.has_compiler
        else "DeepSpeed's compiled one needs a C++ compiler, ninja and Python's headers, which are not here"
    )
    notes.warnings.append(f"Optimizer states are offloaded, so torch's `{name}` steps on the host. {own}.")


def _fill_section(settings: Settings, optimizer: DummyOptim) -> None:
    """Parameters from the placeholder: what is ``"auto"`` or not mentioned; another number is refused."""
    kind, where = settings.given("optimizer.type"), settings.source("optimizer.type")
    # Its own are written in any case, those of torch as torch spells them.
    if not isinstance(kind, str) or not (kind.lower() in _OWN or hasattr(torch.optim, kind)):
        known = [*_OWN, *(name for name in dir(torch.optim) if isinstance(getattr(torch.optim, name), type))]
        raise ConfigError(
            f"`optimizer.type` is {settings.get('optimizer.type')!r} ({where or 'not given'}), which is neither an "
            f"optimizer of DeepSpeed nor of torch.{did_you_mean(str(kind), known)} Use AdamW, Adam, Adagrad, Lamb, "
            f"Lion, Muon, or a name of `torch.optim`."
        )
    if kind.lower() not in _OWN and settings.given("zero_allow_untested_optimizer") is None:
        settings.set("zero_allow_untested_optimizer", True, f"`{kind}` is torch's")
    for name, value in optimizer.given.items():
        key = f"optimizer.params.{name}"
        held = list(value) if isinstance(value, tuple) else value
        settings.merge(key, held, f"`DummyOptim({name}={value!r})`")
    for name, value in _DEFAULTS.items():
        if settings.is_auto(f"optimizer.params.{name}"):
            settings.set(f"optimizer.params.{name}", value, "default of `DummyOptim`")


def _without_compiler(settings: Settings, facts: Facts, notes: Notes) -> None:
    """An optimizer of torch where DeepSpeed's own for the host cannot be built."""
    kind = str(settings.get("optimizer.type")).lower()
    offloaded = settings.given("zero_optimization.offload_optimizer.device") in ("cpu", "nvme")
    on_host = offloaded or facts.device_type == "cpu"
    if facts.has_compiler or not on_host or kind not in _COMPILED_ON_HOST or (kind == "adagrad" and not offloaded):
        return
    if kind not in _ADAM:
        raise ConfigError(
            f"`optimizer.type` is {settings.get('optimizer.type')!r} ({settings.source('optimizer.type')}), which "
            f"DeepSpeed compiles for the host, and there is no C++ compiler, ninja and Python.h here to do so. Install "
            f"them, or use AdamW, for which torch has one."
        )
    key = "optimizer.params.torch_adam"
    if settings.given(key) is None:
        because = "no C++ compiler, ninja and Python.h here to build DeepSpeed's"
        settings.set(key, True, because)
        # Both say 1e-3, (0.9, 0.999) and 1e-8, but torch's AdamW decays weights unless it is told not to.
        if settings.given("optimizer.params.weight_decay") is None:
            settings.set("optimizer.params.weight_decay", 0.0, "DeepSpeed's default")
        notes.warnings.append(f"torch's Adam steps on the host: {because} compiled one.")


def take_schedule(settings: Settings, facts: Facts, notes: Notes) -> tuple[str, dict[str, Any]] | None:
    """Take the ``scheduler`` section out, filled from a `DummyScheduler`.

    Raises:
        ConfigError: for a section without placeholder, the other way round, or a number that nobody gave.
    """
    section, placeholder = settings.get("scheduler"), facts.scheduler
    where = settings.source("scheduler")
    if section is not None and placeholder is None:
        raise ConfigError(
            f"The configuration has a `scheduler` section ({where}), and no `DummyScheduler` was prepared in its "
            f"place, so it would never step. Prepare `DummyScheduler(optimizer)` and step it, or take the section out."
        )
    if placeholder is None:
        return None
    if section is None and placeholder.lr_scheduler_callable is None:
        raise ConfigError(
            "A `DummyScheduler` was prepared, which stands for the schedule of the configuration, and that has no "
            "`scheduler` section. Add one, such as {'type': 'WarmupLR', 'params': {}}, or pass `lr_scheduler_callable`."
        )
    if section is None:
        return None
    if placeholder.lr_scheduler_callable is not None:
        raise ConfigError(
            f"`DummyScheduler(lr_scheduler_callable=...)` makes a schedule, and the configuration has a `scheduler` "
            f"section ({where}): two schedules for one optimizer. Leave one of them out."
        )
    _fill_schedule(settings, facts, placeholder, notes)
    check_schedule(settings.get("scheduler"), f"{where} and `DummyScheduler`")
    rows = [row for row in settings.rows() if row[0].startswith("scheduler.")]
    notes.rows.extend((key, value, f"{source}; built by the `Accelerator`") for key, value, source in rows)
    held = settings.remove("scheduler")
    return str(held["type"]), dict(held.get("params") or {})


def _fill_schedule(settings: Settings, facts: Facts, placeholder: DummyScheduler, notes: Notes) -> None:
    params = "scheduler.params"
    for name, value in placeholder.kwargs.items():
        settings.merge(f"{params}.{name}", value, f"`DummyScheduler({name}={value!r})`")
    _fill_counts(settings, placeholder, notes)
    if settings.is_auto(f"{params}.warmup_min_lr"):
        settings.set(f"{params}.warmup_min_lr", 0.0, "a warm-up begins at 0")
    if settings.is_auto(f"{params}.warmup_max_lr"):
        rate, source = _learning_rate(settings, facts)
        settings.set(f"{params}.warmup_max_lr", rate, source)
    for key in [key for key in settings.names() if key.startswith(f"{params}.") and settings.is_auto(key)]:
        settings.remove(key)


def _fill_counts(settings: Settings, placeholder: DummyScheduler, notes: Notes) -> None:
    """Numbers of steps. Scripts give both whatever the schedule, so one without the parameter goes without."""
    kind, name = settings.get("scheduler.type"), "total_num_steps"
    key, total = f"scheduler.params.{name}", placeholder.total_num_steps
    if total is not None and kind in _WITH_TOTAL:
        settings.merge(key, total, f"`DummyScheduler({name}={total})`")
    elif total is not None:
        notes.rows.append((f"DummyScheduler.{name}", total, f"not used by {kind}"))
    if settings.is_auto(key):
        raise ConfigError(
            f"`{key}` is 'auto' ({settings.source(key)}), and nobody says how many steps the run has. Pass "
            f"`DummyScheduler(optimizer, {name}=...)`."
        )
    key, warmup = "scheduler.params.warmup_num_steps", placeholder.warmup_num_steps
    source = f"`DummyScheduler(warmup_num_steps={warmup})`"
    if kind not in _WITH_WARMUP:
        if warmup:
            notes.rows.append(("DummyScheduler.warmup_num_steps", warmup, f"not used by {kind}"))
    elif settings.is_auto(key):
        settings.set(key, max(warmup, 1), source if warmup else f"{source}; DeepSpeed has at least one")
    elif warmup:
        settings.merge(key, warmup, source)


def _learning_rate(settings: Settings, facts: Facts) -> tuple[Any, str]:
    """That of the optimizer; one a group where groups have rates of their own."""
    optimizer = facts.optimizer
    if optimizer is None:
        return _DEFAULTS["lr"], "default, for no optimizer was prepared"
    said = settings.given("optimizer.params.lr")
    given = optimizer.given_groups if isinstance(optimizer, DummyOptim) else optimizer.param_groups
    common = said if said is not None else _DEFAULTS["lr"]
    rates = [float(group.get("lr", common)) for group in given]
    return (rates[0] if len(set(rates)) == 1 else rates), "learning rate of the optimizer"
