"""What users may set about sharded data parallel, in the terms of FSDP2; settings of FSDP1 are translated."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from accel_parallel.fsdp.fsdp1 import translate
from accel_state.config import did_you_mean
from accel_state.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed.fsdp import MixedPrecisionPolicy

__all__ = ["FullyShardedDataParallelPlugin", "StateDictType", "WrapPolicy"]

WrapPolicy = Literal["auto", "transformer_based_wrap", "size_based_wrap", "no_wrap"]
StateDictType = Literal["FULL_STATE_DICT", "SHARDED_STATE_DICT"]
_PRECISIONS = ("no", "fp32", "bf16", "fp16")
_SWITCHES = (
    "cpu_offload", "activation_checkpointing", "cpu_ram_efficient_loading", "sync_module_states", "forward_prefetch",
    "hybrid",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class FullyShardedDataParallelPlugin:
    """How models are sharded over processes (Rajbhandari et al., arXiv:1910.02054; Zhao et al., arXiv:2304.11277).

    Names and values of FSDP1 are taken where they still mean something, and are then gone: only the successor is set.
    The others raise with what to use instead.
    """

    fsdp_version: int = 2
    """2. With 1, settings are read as those of FSDP1; what runs is FSDP2."""
    reshard_after_forward: bool | int | str = True
    """Whether a unit's parameters are given up after its forward and gathered anew in backward: less memory, one more
    exchange. A number reshards to groups of that many processes, such as those of a node. A name of FSDP1's
    ``sharding_strategy`` is translated."""
    auto_wrap_policy: WrapPolicy | Callable[[nn.Module], bool] | None = "auto"
    """What becomes a unit that is gathered at once: ``"transformer_based_wrap"`` the classes named by
    `transformer_cls_names_to_wrap` or else by the model itself; ``"size_based_wrap"`` modules of `min_num_params`;
    ``"no_wrap"`` the whole model; ``"auto"`` or ``None`` whichever of these has what it needs, else repeated blocks; a
    function decides for each module."""
    transformer_cls_names_to_wrap: Sequence[str | type] | None = None
    """Classes of the units, by name. Refused with another policy."""
    min_num_params: int | None = None
    """Least number of parameters of a unit. Refused with another policy."""
    cpu_offload: bool = False
    """Whether parameters, gradients and optimizer states stay in host memory, and steps run there."""
    mixed_precision_policy: MixedPrecisionPolicy | str | Mapping[str, torch.dtype | str | None] | None = None
    """In which dtypes units are gathered and gradients reduced: ``"bf16"`` gathers and computes in bfloat16 and reduces
    in float32, ``"fp16"`` likewise, ``"no"`` as parameters are; or ``param_dtype``, ``reduce_dtype`` and
    ``output_dtype`` one by one. ``None`` follows the run's ``mixed_precision``."""
    ignored_modules: Iterable[nn.Module] | str | None = None
    """Modules that stay whole on every process, or a regular expression that names them in full. Their parameters have
    to be frozen, for nobody averages their gradients."""
    ignored_params: Iterable[torch.Tensor] | None = None
    """The same for single parameters."""
    state_dict_type: StateDictType = "SHARDED_STATE_DICT"
    """How checkpoints hold the model: whole in one file, or a part a process."""
    activation_checkpointing: bool = False
    """Whether units are computed a second time in backward instead of keeping their activations."""
    cpu_ram_efficient_loading: bool = False
    """Whether only rank 0 holds the weights before `prepare`, the others a model on the meta device."""
    weights_path: str | Path | None = None
    """A safetensors file, an index of several or their folder, which every process reads its own part of. The model is
    on the meta device before `prepare`, on every process."""
    sync_module_states: bool = True
    """Whether all processes take over rank 0's parameters and buffers in `prepare`."""
    forward_prefetch: bool = False
    """Whether each unit starts gathering the next one before it computes, besides torch's own order."""
    sharding_strategy: str | int | None = None
    """FSDP1: becomes `reshard_after_forward`, and the mesh where it was hybrid."""
    backward_prefetch: str | None = None
    """FSDP1: ``"BACKWARD_PRE"`` is what FSDP2 always does."""
    limit_all_gathers: bool | None = None
    """FSDP1: true is what FSDP2 always does."""
    use_orig_params: bool | None = None
    """FSDP1: true is what FSDP2 always does."""
    param_init_fn: Any = None
    """FSDP1: refused; build the model on the meta device and give `weights_path`."""
    state_dict_config: Any = None
    """FSDP1: refused; `state_dict_type` says all of it."""
    optim_state_dict_config: Any = None
    """FSDP1: refused; `state_dict_type` says all of it."""
    hybrid: bool = False
    """Whether FSDP1's hybrid strategy was asked for: shards within a node, copies over nodes."""

    def __post_init__(self) -> None:
        self._check_types()
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, value in translate(given).items():
            object.__setattr__(self, name, value)
        self._check_choice("state_dict_type", self.state_dict_type, get_args(StateDictType))
        self._check_wrapping()
        self._check_reshard()
        for name in ("ignored_modules", "ignored_params"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))  # an iterator would last for one model
        if isinstance(self.mixed_precision_policy, str):
            self._check_choice("mixed_precision_policy", self.mixed_precision_policy, _PRECISIONS)
        if self.cpu_ram_efficient_loading and self.weights_path is not None:
            raise ConfigError(
                f"`cpu_ram_efficient_loading=True` takes the weights from rank 0, and "
                f"`weights_path={str(self.weights_path)!r}` from a file. Give one of them."
            )
        if self.cpu_ram_efficient_loading and not self.sync_module_states:
            raise ConfigError(
                "`cpu_ram_efficient_loading=True` leaves the weights to rank 0, and `sync_module_states=False` keeps "
                "the others from getting them. Set `sync_module_states=True`."
            )
        if isinstance(self.ignored_modules, str):
            try:
                re.compile(self.ignored_modules)
            except re.error as error:
                raise ConfigError(
                    f"`ignored_modules={self.ignored_modules!r}` is no regular expression ({error}). "
                    f"Give one that names modules in full, or the modules themselves."
                ) from None

    def _check_types(self) -> None:
        """Words such as "false", from a file of settings, would all count as true."""
        for name in _SWITCHES:
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ConfigError(f"`{name}={value!r}` is neither true nor false. Give True or False.")
        least = self.min_num_params
        if least is not None and (isinstance(least, bool) or not isinstance(least, (int, float))):
            raise ConfigError(f"`min_num_params={least!r}` is no number of parameters. Give a positive number.")
        if not isinstance(self.weights_path, (str, Path, type(None))) or not str(self.weights_path):
            raise ConfigError(f"`weights_path={self.weights_path!r}` is no path. Give that of a file or a folder.")
        for name in ("ignored_modules", "ignored_params"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Iterable):
                raise ConfigError(f"`{name}={value!r}` is one {type(value).__name__}. Give a list, of one at least.")

    def _check_choice(self, name: str, value: object, known: Sequence[str]) -> None:
        if value not in known:
            raise ConfigError(
                f"`{name}={value!r}` is not known.{did_you_mean(str(value), list(known))} "
                f"Use one of {', '.join(known)}."
            )

    def _check_wrapping(self) -> None:
        policy, classes, least = self.auto_wrap_policy, self.transformer_cls_names_to_wrap, self.min_num_params
        if policy is not None and not callable(policy):
            self._check_choice("auto_wrap_policy", policy, get_args(WrapPolicy))
        if classes is not None and least is not None:
            raise ConfigError(
                f"`transformer_cls_names_to_wrap={classes}` and `min_num_params={least}` are two ways to choose units. "
                f"Give one of them."
            )
        for name, value, belongs in (
            ("transformer_cls_names_to_wrap", classes, ("auto", None, "transformer_based_wrap")),
            ("min_num_params", least, ("auto", None, "size_based_wrap")),
        ):
            if value is not None and (callable(policy) or policy not in belongs):
                raise ConfigError(
                    f"`{name}={value!r}` has no effect with `auto_wrap_policy={policy!r}`. "
                    f"Leave one of them out, or set `auto_wrap_policy={belongs[-1]!r}`."
                )
        if policy == "size_based_wrap" and least is None:
            raise ConfigError(
                "`auto_wrap_policy='size_based_wrap'` needs the least size of a unit. "
                "Set `min_num_params`, such as 1e6."
            )
        if least is not None and not least >= 1:
            raise ConfigError(f"`min_num_params={least!r}` is no number of parameters. Give a positive number.")

    def _check_reshard(self) -> None:
        value = self.reshard_after_forward
        if not isinstance(value, (bool, int)) or (not isinstance(value, bool) and value < 2):
            raise ConfigError(
                f"`reshard_after_forward={value!r}` is neither true nor false nor a number of processes to reshard to. "
                f"Use True for least memory, False to gather once a step, or the number of processes of a node."
            )
