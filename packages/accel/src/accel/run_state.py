"""What is in force in a run, and the choice among several plugins of DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from accel.process_view import ProcessView
from accel_parallel.strategy import Strategy
from accel_state.errors import ConfigError
from accel_state.process import DistributedType, Process

if TYPE_CHECKING:
    from accel_parallel.deepspeed.plugin import DeepSpeedPlugin

__all__ = ["RunState"]


class RunState(ProcessView):
    """This process among its peers, with the precision and the plugins of its `Accelerator`. Made anew at each look."""

    def __init__(self, strategy: Strategy, mixed_precision: str, process: Process) -> None:
        """Called by ``Accelerator.state``."""
        self.process = process
        self.mixed_precision = mixed_precision
        self._strategy: Any = strategy

    @property
    def distributed_type(self) -> DistributedType:
        """Kind of world."""
        return self._strategy.distributed_type or self.process.distributed_type

    @property
    def deepspeed_plugins(self) -> Mapping[str, DeepSpeedPlugin]:
        """By name; a single one is called ``"default"``. Empty without DeepSpeed."""
        return getattr(self._strategy, "plugins", {})

    @property
    def deepspeed_plugin(self) -> DeepSpeedPlugin | None:
        """The one that the next model is prepared with."""
        return getattr(self._strategy, "plugin", None)

    def get_deepspeed_plugin(self, name: str) -> DeepSpeedPlugin:
        """The plugin of that name.

        Raises:
            ConfigError: naming those that there are.
        """
        found: DeepSpeedPlugin = self._with_plugins().options.find(name)
        return found

    def select_deepspeed_plugin(self, name: str) -> None:
        """Prepare models from now on with the plugin of that name. Every rank must call this.

        Raises:
            ConfigError: naming those that there are.
        """
        self._with_plugins().select_plugin(name)

    def _with_plugins(self) -> Any:
        if not self.deepspeed_plugins:
            raise ConfigError(
                f"A plugin of DeepSpeed was asked for, and the strategy of this run is `{self._strategy.name}`. "
                f"Create `Accelerator(deepspeed_plugins={{...}})` with a plugin for each model."
            )
        return self._strategy
