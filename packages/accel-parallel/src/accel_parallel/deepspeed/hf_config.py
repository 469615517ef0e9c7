"""What transformers asks about DeepSpeed while it builds or loads a model: whether to divide it, and by what."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from accel_parallel.deepspeed.reading import read_config

__all__ = ["HfDeepSpeedConfig", "build_whole"]


class HfDeepSpeedConfig:
    """Until `release`, ``from_pretrained`` and ``from_config`` of transformers follow this configuration.

    At stage 3 they divide each module as it is built, and no process holds the model whole: the main process maps the
    checkpoint's files, the others take only its shapes, and modules are filled one at a time. At other stages they do
    as always. Weights are held in the configuration's dtype (``bf16``, ``fp16`` or else float32), whatever a checkpoint
    or ``dtype=`` says. transformers keeps a weak reference, so whoever makes one has to keep it. A later one takes over
    from it.

    Args:
        config: a configuration of DeepSpeed without ``"auto"``, such as `DeepSpeedConfig.before_model` gives, or the
            path of a JSON file.

    Raises:
        ConfigError: for a file that cannot be read.
    """

    def __init__(self, config: Mapping[str, Any] | str | Path) -> None:
        values, _ = read_config(config)
        self.config: dict[str, Any] = copy.deepcopy(dict(values))
        """What ``zero.Init`` gets."""
        bridge = _bridge()
        if bridge is not None:
            bridge.set_hf_deepspeed_config(self)

    def release(self) -> None:
        """Let transformers build models whole again, unless another configuration has taken over."""
        bridge = _bridge()
        if bridge is not None and bridge.deepspeed_config() is self.config:
            bridge.unset_hf_deepspeed_config()

    def find_config_node(self, ds_key_long: str) -> tuple[dict[str, Any] | None, str]:
        """The section that a dotted key is in, ``None`` where there is none, and its last name."""
        *parts, last = ds_key_long.split(".")
        section: Any = self.config
        for part in parts:
            section = section.get(part) if isinstance(section, dict) else None
        return (section if isinstance(section, dict) else None), last

    def get_value(self, ds_key_long: str, default: Any = None) -> Any:
        """The value of a dotted key, such as ``"zero_optimization.stage"``."""
        section, last = self.find_config_node(ds_key_long)
        return default if section is None else section.get(last, default)

    def del_config_sub_tree(self, ds_key_long: str, must_exist: bool = False) -> None:
        """Take a value or section out.

        Raises:
            ValueError: where there is none and `must_exist`.
        """
        section, last = self.find_config_node(ds_key_long)
        if section is not None and last in section:
            del section[last]
        elif must_exist:
            raise ValueError(
                f"`{ds_key_long}` is not in this configuration, so it cannot be taken out. Leave `must_exist` out, or "
                f"correct the key."
            )

    def is_true(self, ds_key_long: str) -> bool:
        """Whether the value is given and true."""
        return bool(self.get_value(ds_key_long))

    def is_false(self, ds_key_long: str) -> bool:
        """Whether the value is given and false."""
        value = self.get_value(ds_key_long)
        return value is not None and not value

    def is_zero2(self) -> bool:
        """Whether gradients are divided, and parameters whole."""
        return bool(self.get_value("zero_optimization.stage") == 2)

    def is_zero3(self) -> bool:
        """Whether parameters are divided."""
        return bool(self.get_value("zero_optimization.stage") == 3)

    def is_offload(self) -> bool:
        """Whether optimizer states or parameters live on the host or in files."""
        return any(
            self.get_value(f"zero_optimization.offload_{name}.device") in ("cpu", "nvme")
            for name in ("optimizer", "param")
        )


def build_whole() -> None:
    """Let transformers build models whole, whichever configuration it was told. Imports nothing."""
    bridge = sys.modules.get("transformers.integrations.deepspeed")
    if bridge is not None:
        bridge.unset_hf_deepspeed_config()


def _bridge() -> ModuleType | None:
    """The module by which transformers is told, where that is installed. Importing it takes a second or two."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers.integrations import deepspeed  # type: ignore[import-not-found,import-untyped,unused-ignore]

    module: ModuleType = deepspeed
    return module
