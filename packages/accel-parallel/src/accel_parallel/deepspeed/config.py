"""A configuration of DeepSpeed: read, merged with what a `DeepSpeedPlugin` says, checked, and completed for a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from accel_parallel.deepspeed import fill
from accel_parallel.deepspeed.facts import Facts, class_names_of, hidden_size_of
from accel_parallel.deepspeed.keys import check_names, check_sections
from accel_parallel.deepspeed.offload import check_offload, probe
from accel_parallel.deepspeed.optimizers import take_schedule
from accel_parallel.deepspeed.plugin import DeepSpeedPlugin
from accel_parallel.deepspeed.reading import read_config
from accel_parallel.deepspeed.refusals import refuse_foreign_duties
from accel_parallel.deepspeed.settings import AUTO, Notes, Settings, table
from accel_state.errors import ConfigError

__all__ = [
    "CompletedConfig",
    "DeepSpeedConfig",
    "Facts",
    "OffloadDevices",
    "ScheduleSection",
    "class_names_of",
    "hidden_size_of",
]

_ARGUMENTS = {
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "gradient_clipping",
    "offload_optimizer_device": "zero_optimization.offload_optimizer.device",
    "offload_optimizer_nvme_path": "zero_optimization.offload_optimizer.nvme_path",
    "offload_param_device": "zero_optimization.offload_param.device",
    "offload_param_nvme_path": "zero_optimization.offload_param.nvme_path",
    "zero3_save_16bit_model": "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    "transformer_moe_cls_names": "zero_optimization.leaf_module.classes",
    "communication_data_type": "communication_data_type",
}
"""Where in DeepSpeed's language a field of the plugin is said, besides the stage."""
_STAGE = "zero_optimization.stage"
_ONLY_AT_STAGE_3 = ("zero3_init_flag", "zero3_save_16bit_model", "transformer_moe_cls_names")


class OffloadDevices(NamedTuple):
    """Where what is not computed with lives: ``"none"``, ``"cpu"`` or ``"nvme"``."""

    optimizer: str
    param: str


class ScheduleSection(NamedTuple):
    """The ``scheduler`` section: a class of ``deepspeed.runtime.lr_schedules`` and its arguments."""

    type: str
    params: dict[str, Any]


@dataclass(frozen=True, slots=True)
class CompletedConfig:
    """What ``deepspeed.initialize`` gets, and why."""

    values: dict[str, Any]
    """The configuration. Nothing in it is left to be filled."""
    rows: tuple[tuple[str, Any, str], ...]
    """Dotted key, value and source of each, and of what was left out."""
    scheduler: ScheduleSection | None
    """The schedule to build over the optimizer, taken out of `values` so that it steps once a step taken."""
    warnings: tuple[str, ...] = ()
    """What is worth saying aloud once."""

    @property
    def stage(self) -> int:
        """The stage of ZeRO."""
        return int(self.values["zero_optimization"]["stage"])

    def explain(self) -> str:
        """Every setting with its value and source, one line each, then what is worth knowing."""
        return "\n".join([table(self.rows), *self.warnings])


class DeepSpeedConfig:
    """File and arguments together, before a model exists. Made by `of`."""

    __slots__ = ("_settings", "plugin")

    def __init__(self, plugin: DeepSpeedPlugin, settings: Settings) -> None:
        self.plugin = plugin
        self._settings = settings

    @classmethod
    def of(cls, plugin: DeepSpeedPlugin) -> DeepSpeedConfig:
        """Read, merge and check. Touches a folder of an NVMe device, to see that it can be written.

        Raises:
            ConfigError: for a file that cannot be read, names that DeepSpeed does not read, two values for one setting,
                and settings that contradict each other or have no effect.
        """
        values, source = read_config(plugin.hf_ds_config)
        check_names(values, source)
        settings = Settings(values, source)
        _rename_bfloat16(settings)
        _settle_stage(settings, plugin)
        check_sections(settings.values, source)
        _merge_arguments(settings, plugin)
        config = cls(plugin, settings)
        config._check()
        return config

    @property
    def stage(self) -> int | Literal["auto"]:
        """The stage of ZeRO."""
        stage = self._settings.get(_STAGE)
        return "auto" if stage == AUTO else int(stage)

    @property
    def precision(self) -> Literal["no", "bf16", "fp16"] | None:
        """What it says the forward computes in; ``None`` where it leaves that open."""
        enabled = {name: self._settings.given(f"{name}.enabled") for name in fill.PRECISIONS}
        for name in fill.PRECISIONS:
            if enabled[name]:
                return name
        return "no" if all(value is False for value in enabled.values()) else None

    @property
    def precision_source(self) -> str:
        """Where that came from."""
        name = "fp16" if self.precision == "fp16" else "bf16"
        return f"`{name}.enabled`, {self._settings.source(f'{name}.enabled')}"

    @property
    def gradient_accumulation_steps(self) -> int | None:
        """Micro-batches of a window; ``None`` where it leaves that open."""
        steps = self._settings.given("gradient_accumulation_steps")
        return None if steps is None else int(steps)

    @property
    def gradient_clipping(self) -> float | None:
        """Largest norm, to which DeepSpeed clips in its step; ``None`` where it does not clip."""
        return fill.clipping_of(self._settings)

    @property
    def tp_size(self) -> int:
        """Ranks that share each matrix (AutoTP)."""
        return int(self._settings.given("tensor_parallel.autotp_size") or 1)

    @property
    def offload_devices(self) -> OffloadDevices:
        """Where optimizer states and parameters live."""
        return OffloadDevices(*(
            str(self._settings.given(f"zero_optimization.offload_{name}.device") or "none")
            for name in ("optimizer", "param")
        ))  # fmt: skip

    @property
    def is_zero3_init(self) -> bool:
        """Whether models are divided while they are built."""
        flag = self.plugin.zero3_init_flag
        return self.stage == 3 if flag is None else flag

    def said(self, key: str) -> str | None:
        """The value of a dotted key as text, where file or arguments give one."""
        value = self._settings.given(key)
        return None if value is None else str(value)

    def section(self, name: str) -> dict[str, Any]:
        """A section as it was given, with what is left to be filled."""
        return dict(self._settings.get(name) or {})

    def source(self, key: str) -> str:
        """Where the setting of a dotted key came from."""
        return self._settings.source(key)

    def explain(self) -> str:
        """Every setting so far with its value and source, one line each."""
        return table(self._settings.rows())

    def complete(
        self,
        facts: Facts,
        *,
        stage: int | None = None,
        offload_optimizer: str | None = None,
        offload_param: str | None = None,
        because: str = "chosen by memory and traffic",
    ) -> CompletedConfig:
        """Fill what is open from the facts of the run, and compare the rest with them.

        Args:
            facts: what the engine will meet.
            stage: the stage where `stage` is ``"auto"``.
            offload_optimizer: where optimizer states live, if nothing was said about it.
            offload_param: where parameters live, likewise.
            because: the source of these three.

        Raises:
            ConfigError: for what contradicts the facts, with both values and their sources.
        """
        settings = self._settings.copy()
        for key, value in (
            (_STAGE, stage),
            ("zero_optimization.offload_optimizer.device", offload_optimizer),
            ("zero_optimization.offload_param.device", offload_param),
        ):
            if value is not None:
                settings.merge(key, value, because)
        if settings.is_auto(_STAGE):
            raise ConfigError(
                f"`{_STAGE}` is 'auto' ({settings.source(_STAGE)}), and nothing chose a stage for this model. "
                f"Set `zero_stage` to 0, 1, 2 or 3."
            )
        check_offload(settings, int(settings.get(_STAGE)))
        notes = Notes()
        for step in fill.STEPS:
            step(settings, facts, notes)
        schedule = take_schedule(settings, facts, notes)
        fill.drop_open(settings, notes)
        return CompletedConfig(
            values=settings.values,
            rows=(*settings.rows(), *notes.rows),
            scheduler=None if schedule is None else ScheduleSection(*schedule),
            warnings=tuple(notes.warnings),
        )

    def before_model(
        self, *, precision: Literal["no", "bf16", "fp16"], precision_source: str = "`mixed_precision`", sp_size: int = 1
    ) -> dict[str, Any]:
        """What ``zero.Init`` needs to divide a model while it is built; neither optimizer, schedule nor batch size.

        Raises:
            ConfigError: unless the stage is 3, or for a precision that contradicts it.
        """
        if self.stage != 3:
            raise ConfigError(
                f"A model was to be divided while it is built, and `{_STAGE}` is {self.stage!r} "
                f"({self.source(_STAGE)}), which keeps parameters whole. Set `zero_stage=3`, or build it as usual."
            )
        settings = self._settings.copy()
        for key in ("optimizer", "scheduler", "train_batch_size", "gradient_accumulation_steps"):
            settings.remove(key)
        facts = Facts(precision=precision, precision_source=precision_source, sp_size=sp_size, tp_size=self.tp_size)
        notes = Notes()
        fill.fill_precision(settings, facts, notes)
        fill.fill_mesh(settings, facts, notes)
        settings.set("train_micro_batch_size_per_gpu", 1, "unknown before a loader is prepared")
        fill.drop_open(settings, notes)
        return settings.values

    def _check(self) -> None:
        settings, stage = self._settings, self.stage
        for name in _ONLY_AT_STAGE_3:
            value = getattr(self.plugin, name)
            if value and stage != 3:
                open_stage = " until a model is prepared" if stage == AUTO else ""
                raise ConfigError(
                    f"`{name}={value!r}` is about parameters that are divided, and `{_STAGE}` is {stage!r} "
                    f"({settings.source(_STAGE)}){open_stage}. Set `zero_stage=3`, or leave it out."
                )
        if all(settings.given(f"{name}.enabled") for name in fill.PRECISIONS):
            raise ConfigError(
                f"`bf16.enabled` ({settings.source('bf16.enabled')}) and `fp16.enabled` "
                f"({settings.source('fp16.enabled')}) are both true, and the model computes in one of them. Set one to "
                f"false."
            )
        refuse_foreign_duties(settings)
        if stage != AUTO:
            check_offload(settings, int(stage))
        probe(settings)


def _rename_bfloat16(settings: Settings) -> None:
    """The old name of the section, which DeepSpeed reads where the new one is missing."""
    old = settings.get("bfloat16")
    if old is None:
        return
    if settings.get("bf16") is not None:
        raise ConfigError(
            f"`bf16` and its old name `bfloat16` are both given ({settings.source('bf16')}), and only the first would "
            f"be read. Keep `bf16`."
        )
    source = settings.source("bfloat16")
    settings.remove("bfloat16")
    settings.set("bf16", old, source)


def _settle_stage(settings: Settings, plugin: DeepSpeedPlugin) -> None:
    """The stage first, since much depends on it."""
    if plugin.zero_stage is not None:
        settings.merge(_STAGE, plugin.zero_stage, f"`DeepSpeedPlugin(zero_stage={plugin.zero_stage!r})`")
    stage = settings.get(_STAGE)
    if stage is None:
        said_nothing = plugin.hf_ds_config is None
        settings.set(_STAGE, 2 if said_nothing else 0, "default" if said_nothing else "DeepSpeed's default")
    elif stage != AUTO and (type(stage) is not int or stage not in range(4)):
        raise ConfigError(
            f"`{_STAGE}` is {stage!r} ({settings.source(_STAGE)}), and ZeRO has the stages 0, 1, 2 and 3. "
            f"Set one of them, or 'auto'."
        )


def _merge_arguments(settings: Settings, plugin: DeepSpeedPlugin) -> None:
    for name, key in _ARGUMENTS.items():
        value = getattr(plugin, name)
        if value is not None:
            value = str(value) if isinstance(value, Path) else value
            settings.merge(key, value, f"`DeepSpeedPlugin({name}={value!r})`")
