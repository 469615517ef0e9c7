"""What users may say to DeepSpeed: a file in its own language, and the settings that are said most often."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from accel_state.config import did_you_mean
from accel_state.errors import ConfigError

__all__ = ["DeepSpeedPlugin", "OffloadDevice"]

OffloadDevice = Literal["none", "cpu", "nvme"]
_COMMUNICATION_TYPES = ("fp16", "bf16", "fp32")


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepSpeedPlugin:
    """How DeepSpeed spreads a model, its gradients and its optimizer (ZeRO: Rajbhandari et al., arXiv:1910.02054).

    `hf_ds_config` is in DeepSpeed's language and may hold whatever it reads; ``"auto"`` there is filled from what is
    prepared. The other fields say the most common of it. A value said in both places has to be the same. ``None``
    leaves a setting to the file, and else to the default named at each field.
    """

    hf_ds_config: Mapping[str, Any] | str | Path | None = None
    """A configuration of DeepSpeed: a dict, or the path of a JSON file."""
    zero_stage: Literal[0, 1, 2, 3, "auto"] | None = None
    """What is divided over the processes: 0 nothing, 1 optimizer states, 2 also gradients, 3 also parameters.
    ``"auto"``: chosen by memory and traffic when a model is prepared. Neither here nor in a file: 2."""
    gradient_accumulation_steps: int | Literal["auto"] | None = None
    """Micro-batches of a window; sets that of the `Accelerator`."""
    gradient_clipping: float | Literal["auto"] | None = None
    """Largest norm of the gradients, to which DeepSpeed clips inside its step. Otherwise, or with 0, nothing is clipped
    unless ``clip_grad_norm_`` is called."""
    offload_optimizer_device: OffloadDevice | None = None
    """Where optimizer states live, from stage 1 on; steps run on the host unless it is ``"none"``."""
    offload_optimizer_nvme_path: str | Path | None = None
    """Folder for them. Only with ``"nvme"``."""
    offload_param_device: OffloadDevice | None = None
    """Where parameters live while they are not computed with, at stage 3."""
    offload_param_nvme_path: str | Path | None = None
    """Folder for them. Only with ``"nvme"``."""
    zero3_init_flag: bool | None = None
    """Whether models are divided while they are built, so that no process ever holds one whole: inside
    ``zero3_init()`` and by ``from_pretrained`` and ``from_config`` of transformers. ``None``: at stage 3."""
    zero3_save_16bit_model: bool | None = None
    """Whether DeepSpeed's own ``save_16bit_model`` may gather the model, at stage 3. ``save_model`` and
    ``get_state_dict`` of the `Accelerator` gather without it."""
    transformer_moe_cls_names: str | Sequence[str] | None = None
    """Classes whose modules are gathered as one at stage 3, since not all their children compute in every forward:
    blocks of experts. Names, in a list or separated by commas."""
    communication_data_type: str | None = None
    """Dtype in which gradients travel: ``"fp16"``, ``"bf16"`` or ``"fp32"``. DeepSpeed's default is that of the
    model."""

    def __post_init__(self) -> None:
        self._check_config()
        if self.zero_stage is not None and self.zero_stage != "auto":
            self._check_stage(self.zero_stage)
        steps = self.gradient_accumulation_steps
        if steps not in (None, "auto") and (type(steps) is not int or steps < 1):
            raise ConfigError(
                f"`gradient_accumulation_steps={steps!r}` is no number of micro-batches: a window holds at least one. "
                f"Give a positive integer, or 'auto'."
            )
        self._check_clipping()
        for name in ("offload_optimizer_device", "offload_param_device"):
            self._check_choice(name, getattr(self, name), get_args(OffloadDevice))
        for name in ("offload_optimizer_nvme_path", "offload_param_nvme_path"):
            path = getattr(self, name)
            if path is not None and (not isinstance(path, (str, Path)) or not str(path)):
                raise ConfigError(f"`{name}={path!r}` is no path. Give a folder on the device to offload to.")
        for name in ("zero3_init_flag", "zero3_save_16bit_model"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise ConfigError(f"`{name}={value!r}` is neither true nor false. Give True or False.")
        self._check_choice("communication_data_type", self.communication_data_type, _COMMUNICATION_TYPES)
        self._split_class_names()

    def _check_config(self) -> None:
        config = self.hf_ds_config
        if config is None or isinstance(config, Mapping) or (isinstance(config, (str, Path)) and str(config)):
            return
        held = getattr(config, "config", None)  # transformers hands over its own object around a dict
        if isinstance(held, Mapping):
            object.__setattr__(self, "hf_ds_config", held)
            return
        raise ConfigError(
            f"`hf_ds_config={config!r}` is no configuration. Give a dict, or the path of a JSON file, in DeepSpeed's "
            f"language."
        )

    @staticmethod
    def _check_stage(stage: object) -> None:
        if type(stage) is not int or not 0 <= stage <= 3:
            raise ConfigError(
                f"`zero_stage={stage!r}` is no stage of ZeRO. Use 0 (nothing divided), 1 (optimizer states), 2 (also "
                f"gradients), 3 (also parameters), or 'auto'."
            )

    def _check_clipping(self) -> None:
        norm = self.gradient_clipping
        if norm is None or norm == "auto":
            return
        number = isinstance(norm, (int, float)) and not isinstance(norm, bool)
        if not number or not 0 <= norm < math.inf:
            raise ConfigError(
                f"`gradient_clipping={norm!r}` is no norm to clip to. Give a positive number, or leave it out and call "
                f"`accelerator.clip_grad_norm_` where you want it."
            )

    @staticmethod
    def _check_choice(name: str, value: object, known: Sequence[str]) -> None:
        if value is not None and value not in known:
            raise ConfigError(
                f"`{name}={value!r}` is not known.{did_you_mean(str(value), list(known))} "
                f"Use one of {', '.join(known)}."
            )

    def _split_class_names(self) -> None:
        names = self.transformer_moe_cls_names
        if names is None:
            return
        parts = names.split(",") if isinstance(names, str) else names
        if not isinstance(parts, Sequence) or not parts or not all(isinstance(name, str) and name for name in parts):
            raise ConfigError(
                f"`transformer_moe_cls_names={names!r}` names no classes. Give names, in a list or separated by "
                f"commas, such as 'MixtralSparseMoeBlock'."
            )
        object.__setattr__(self, "transformer_moe_cls_names", tuple(name.strip() for name in parts))
