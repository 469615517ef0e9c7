"""DeepSpeed behind the `Strategy` protocol: ZeRO 0 to 3 (Rajbhandari et al., arXiv:1910.02054), with its offload.

DeepSpeed scales losses, steps, skips and divides. Windows, averaging, clipping by `clip_grad_norm_` and schedules stay
where they are for every strategy, and checkpoints too: its own are pickles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from accel_parallel.clip import check_clip
from accel_parallel.deepspeed.building import adopt_group, build_engine
from accel_parallel.deepspeed.bundle import refuse_bundle, refuse_clip, refuse_unread_schedule
from accel_parallel.deepspeed.completing import completed_for
from accel_parallel.deepspeed.config import CompletedConfig, DeepSpeedConfig
from accel_parallel.deepspeed.gradients import Gradients, gradients_held_by
from accel_parallel.deepspeed.hf_config import HfDeepSpeedConfig, build_whole
from accel_parallel.deepspeed.options import DeepSpeedOptions, named_plugins
from accel_parallel.deepspeed.placeholders import DummyScheduler
from accel_parallel.deepspeed.plugin import DeepSpeedPlugin
from accel_parallel.deepspeed.sequence import DeepSpeedUlysses, sequence_along
from accel_parallel.deepspeed.sequence_mesh import device_mesh_of
from accel_parallel.deepspeed.states import EngineStates
from accel_parallel.deepspeed.tensor import ReplicaAudit, TensorDivision, check_tensor_parallel
from accel_parallel.parallelism import ParallelismConfig
from accel_parallel.single import SingleStrategy, check_optimizer_state
from accel_parallel.strategy import Bundle, Duty, OptimizerState
from accel_state.errors import ConfigError
from accel_state.logging import get_logger
from accel_state.process import DistributedType, Process
from accel_state.protocols import LossScaler
from accel_state.topology import Axis

if TYPE_CHECKING:
    from accel_parallel.compilation import TorchDynamoPlugin

__all__ = ["DeepSpeedStrategy"]

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Prepared:
    """One model that DeepSpeed has."""

    engine: Any
    model: nn.Module
    optimizer: Optimizer | None
    config: CompletedConfig
    states: EngineStates
    gradients: Gradients | None
    guard: Any
    """Against weights that are loaded past the float32 ones."""


class DeepSpeedStrategy(SingleStrategy):
    """Hands each model to a DeepSpeed engine of its own, configured by the plugin that is selected then."""

    name = "deepspeed"
    owns = frozenset({Duty.SCALE, Duty.STEP})
    options_type = DeepSpeedPlugin
    axes: frozenset[Axis] = frozenset({"dp_replicate", "dp_shard", "sp", "tp"})
    distributed_type = DistributedType.DEEPSPEED

    def __init__(
        self,
        process: Process,
        *,
        place: bool = True,
        options: DeepSpeedOptions | DeepSpeedPlugin | Mapping[str, DeepSpeedPlugin] | None = None,
        parallelism: ParallelismConfig | None = None,
        dynamo: TorchDynamoPlugin | None = None,
    ) -> None:
        """Every rank must call this: it makes the process group where there is none."""
        if not place:
            raise ConfigError(
                "`device_placement=False` leaves models where they are, and DeepSpeed moves them to the process's "
                "device. Leave it out with DeepSpeed."
            )
        super().__init__(process, options=None, parallelism=parallelism, dynamo=dynamo)
        if not isinstance(options, DeepSpeedOptions):
            options = DeepSpeedOptions(plugins=named_plugins(options))
        self.options = options
        self._configs = {name: DeepSpeedConfig.of(plugin) for name, plugin in options.plugins.items()}
        adopt_group(process)
        shape = process.topology.shape
        if shape.sp > 1 or shape.tp > 1:
            self.device_mesh = device_mesh_of(process)
            self.sequence = sequence_along(self.device_mesh, parallelism or ParallelismConfig())
        self._prepared: list[_Prepared] = []
        self._unproven: list[ReplicaAudit] = []
        """Of models whose gradients that tp ranks hold alike have not been compared yet."""
        self._told: HfDeepSpeedConfig | None = None
        """What transformers divides models by while it builds them."""
        self._selected = ""
        self.select_plugin(next(iter(options.plugins)))

    @classmethod
    def settings_in(cls, given: Any) -> dict[str, tuple[Any, str]]:
        found: dict[str, tuple[Any, str]] = {}
        for plugin in named_plugins(given).values():
            config = DeepSpeedConfig.of(plugin)
            if config.precision is not None:
                found.setdefault("mixed_precision", (config.precision, config.precision_source))
            if config.gradient_accumulation_steps is not None:
                said = config.source("gradient_accumulation_steps")
                found.setdefault("gradient_accumulation_steps", (config.gradient_accumulation_steps, said))
        return found

    @classmethod
    def settle_options(
        cls, given: Any, *, process: Process, parallelism: ParallelismConfig | None, precision: str
    ) -> DeepSpeedOptions:
        for name in ("tp_plan", "loss_parallel"):
            if getattr(parallelism, name, None):
                raise ConfigError(
                    f"`ParallelismConfig({name}=...)` was given with DeepSpeed, whose AutoTP divides models by its own "
                    f"rules (`tensor_parallel.partition_config` of its configuration). Leave `{name}` out."
                )
        return DeepSpeedOptions(plugins=named_plugins(given), precision=precision)  # type: ignore[arg-type] # one of its

    # Plugins

    @property
    def plugins(self) -> Mapping[str, DeepSpeedPlugin]:
        """All of them, by name."""
        return self.options.plugins

    @property
    def plugin(self) -> DeepSpeedPlugin:
        """The one that the next model is prepared with."""
        return self.options.plugins[self._selected]

    def select_plugin(self, name: str) -> None:
        """Prepare models from now on with the plugin of that name.

        Raises:
            ConfigError: naming those that there are.
        """
        self.options.find(name)
        self._selected = name
        build_whole()  # also where an earlier Accelerator divides them: the latest choice holds
        self._told = HfDeepSpeedConfig(self._before_model()) if self._config.is_zero3_init else None

    @contextmanager
    def zero3_init(self, enabled: bool = True) -> Iterator[None]:
        """While open, modules are divided over the processes as they are built, as the selected plugin says.

        No process ever holds more than one module's parameters whole. transformers' ``from_pretrained`` and
        ``from_config`` do so by themselves, and need no such block. Every rank must call this.

        Args:
            enabled: ``False`` builds them whole, inside a function that is called in such a block too.

        Raises:
            ConfigError: unless the plugin's stage is 3.
        """
        from deepspeed import zero  # type: ignore[import-not-found,import-untyped,unused-ignore]

        with zero.Init(config_dict_or_path=self._before_model() if enabled else None, enabled=enabled):
            yield

    # What the protocol asks for

    @property
    def average_size(self) -> int:
        return self.process.topology.world_size // self.process.topology.shape.tp

    @property
    def state_layout(self) -> str:
        return "sharded" if any(each.states.stage > 0 for each in self._prepared) else "full"

    def trained_parameters(self, optimizer: Optimizer) -> list[torch.Tensor]:
        return [p for group in self._of_optimizer(optimizer).states.groups for p in group]

    def sum_over_data(self, value: torch.Tensor) -> torch.Tensor:
        total = value.clone()
        if self.average_size == 1:
            return total
        dist.all_reduce(total)
        copies = self.process.topology.shape.tp  # ranks along tp see the same
        return total / copies if total.is_floating_point() else total // copies

    def prepare(self, bundle: Bundle) -> Bundle:
        """As of every strategy. Every rank must call this.

        Raises:
            ConfigError: for what DeepSpeed cannot train; nothing is changed then.
        """
        trained = refuse_bundle(bundle, prepared=[each.model for each in self._prepared if each.optimizer is not None])
        if self.sequence is not None:
            for model in bundle.models:
                self.sequence.check(model)
        models: list[nn.Module] = []
        optimizers: list[Optimizer] = []
        for model in bundle.models:
            optimizer = bundle.optimizers[0] if model is trained else None
            prepared = self._engine_of(model, optimizer, bundle)
            models.append(model if prepared is None else prepared.engine)
            if prepared is not None and prepared.optimizer is not None:
                optimizers.append(prepared.optimizer)
        return Bundle(tuple(models), tuple(optimizers))

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """As of every strategy.

        Raises:
            ConfigError: without a trained model, or for other arguments than ``retain_graph``.
        """
        retain_graph = bool(kwargs.pop("retain_graph", False))
        if kwargs:
            raise ConfigError(
                f"`backward` was called with {', '.join(f'`{name}`' for name in kwargs)}, which DeepSpeed's backward "
                f"does not take. Only `retain_graph` has an effect there; leave the others out."
            )
        if retain_graph and self._only.states.stage == 3:
            raise ConfigError(
                "`backward(retain_graph=True)` was called at ZeRO stage 3, which gives parameters up after they were "
                "used, so that no graph can be gone through again. Add the losses up and call `backward` once."
            )
        self._trained.backward(loss, retain_graph=retain_graph)
        if self._unproven:
            self._unproven = [each for each in self._unproven if not each.verify()]

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        return nullcontext()  # nothing that is seen outside is exchanged before a step

    def sync_in_backward(self, model: nn.Module) -> AbstractContextManager[Any]:
        return nullcontext()

    def join(
        self, models: Sequence[nn.Module], *, settle: Callable[[int], None] | None = None
    ) -> AbstractContextManager[None]:
        """Refused: DeepSpeed's exchanges need all ranks."""
        raise ConfigError(
            "`join_uneven_inputs` was entered with a model of DeepSpeed, whose steps need all ranks, so that one "
            "without a batch would stop the others. Train with even batches, and pass `num_items` where repeated "
            "samples must not count."
        )

    def clip_grad_norm_(
        self, parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float = 2.0
    ) -> torch.Tensor:
        check_clip(max_norm, norm_type)
        gradients = self._trained
        configured = refuse_clip(self._only, parameters, max_norm, norm_type)
        return gradients.clip(None if configured else max_norm)

    def grad_norm(self, parameters: Iterable[torch.Tensor], norm_type: float = 2.0) -> torch.Tensor:
        """Not known before a window ends: what DeepSpeed has by then are sums of this rank alone, or parts of them."""
        return torch.full((), float("nan"), device=self.process.device)

    def clip_grad_value_(self, parameters: Iterable[torch.Tensor], clip_value: float) -> None:
        gradients = self._trained
        if gradients.present:
            gradients.clamp(clip_value)

    def scale_gradients_(self, parameters: Iterable[torch.Tensor], factor: float | torch.Tensor) -> None:
        self._trained.divide(1.0 / factor)

    def zero_grad(self, optimizer: Optimizer, set_to_none: bool = True) -> None:
        gradients = self._of_optimizer(optimizer).gradients
        assert gradients is not None
        gradients.drop()

    def step(self, optimizer: Optimizer, *, scaler: LossScaler, closure: Callable[[], Any] | None = None) -> bool:
        """As of every strategy. Every rank must call this.

        Raises:
            ConfigError: for a `closure`, which DeepSpeed's optimizers do not call.
        """
        if closure is not None:
            raise ConfigError(
                "`step(closure)` was called, and DeepSpeed steps on gradients that are there already. Call `backward` "
                "and `step()`; an optimizer that needs a closure, such as LBFGS, cannot be used with DeepSpeed."
            )
        gradients = self._of_optimizer(optimizer).gradients
        assert gradients is not None
        return gradients.step()

    def model_state(self, model: nn.Module) -> dict[str, torch.Tensor]:
        found = self._of_model(model)
        return super().model_state(model) if found is None else found.states.model_state()  # type: ignore[return-value]

    def load_model_state(self, model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        found = self._of_model(model)
        if found is None:
            super().load_model_state(model, state)
            return
        self.check_model_state(found.states.model_state(), state)  # type: ignore[arg-type]
        found.states.load_model_state(state)

    def optimizer_state(self, optimizer: Optimizer, names: Mapping[torch.Tensor, str]) -> OptimizerState:
        states = self._of_optimizer(optimizer).states
        groups = []
        for live, parameters in zip(optimizer.param_groups, states.groups, strict=True):
            described = [states.described(parameter) for parameter in parameters]
            groups.append(
                {
                    **{key: value for key, value in live.items() if key != "params"},
                    "params": [names[parameter] for parameter in parameters],
                    "param_shapes": [shape for shape, _ in described],
                    "param_dtypes": [dtype for _, dtype in described],
                }
            )
        return OptimizerState(state=states.optimizer_state(names), groups=groups, engine=states.engine_state())

    def load_optimizer_state(
        self, optimizer: Optimizer, names: Mapping[torch.Tensor, str], state: OptimizerState
    ) -> None:
        states = self._of_optimizer(optimizer).states
        ours = [
            {names[parameter]: states.described(parameter) for parameter in parameters} for parameters in states.groups
        ]
        check_optimizer_state(ours, state)
        states.load_optimizer_state(names, state.state)
        for live, saved in zip(optimizer.param_groups, state.groups, strict=True):
            live.update(
                {key: value for key, value in saved.items() if key not in ("params", "param_shapes", "param_dtypes")}
            )
        states.load_engine_state(state.engine)

    def full_state(self, model: nn.Module, *, everywhere: bool = True) -> dict[str, torch.Tensor]:
        found = self._of_model(model)
        return super().model_state(model) if found is None else found.states.full_state(everywhere=everywhere)

    def unwrap(self, model: nn.Module) -> nn.Module:
        for each in self._prepared:
            if model is each.engine:
                return each.model
        return super().unwrap(model)

    def scheduler_for(self, scheduler: Any, optimizer: Optimizer) -> Any:
        refuse_unread_schedule(scheduler)  # prepared later than its optimizer
        if not isinstance(scheduler, DummyScheduler):
            return scheduler
        section = self._of_optimizer(optimizer).config.scheduler
        if section is None:
            assert scheduler.lr_scheduler_callable is not None
            return scheduler.lr_scheduler_callable(optimizer)
        from deepspeed.runtime import lr_schedules  # type: ignore[import-not-found,import-untyped,unused-ignore]

        return getattr(lr_schedules, section.type)(optimizer, **section.params)

    def explain(self) -> list[str]:
        return [line for each in self._prepared for line in ("", "DeepSpeed:", each.config.explain())]

    def release(self) -> None:
        if self._told is not None:
            self._told.release()
            self._told = None
        if isinstance(self.sequence, DeepSpeedUlysses):
            self.sequence.release()
        for each in self._prepared:
            each.guard.remove()
            each.engine.destroy()
        self._prepared.clear()
        self._unproven.clear()
        self.select_plugin(self._selected)

    # One model

    @property
    def _config(self) -> DeepSpeedConfig:
        return self._configs[self._selected]

    def _before_model(self) -> dict[str, Any]:
        return self._config.before_model(
            precision=self.options.precision,
            precision_source=self.options.precision_source,
            sp_size=self.process.topology.shape.sp,
        )

    def _engine_of(self, model: nn.Module, optimizer: Optimizer | None, bundle: Bundle) -> _Prepared | None:
        """What DeepSpeed makes of a model; ``None`` where there is nothing to divide, and it is only moved."""
        config = completed_for(self._config, self.options, model, optimizer, bundle, process=self.process)
        check_tensor_parallel(model, config.values.get("tensor_parallel") or {})
        if self.sequence is not None:
            self.sequence.attach(model)
        if optimizer is None and config.stage < 3:
            model.to(self.process.device)
            self.compile(model)
            return None
        logger.info("DeepSpeed is configured by the plugin %r:\n%s", self._selected, config.explain())
        for warning in config.warnings:
            logger.warning("%s", warning)
        groups = [] if optimizer is None else [_trainable(group["params"]) for group in optimizer.param_groups]
        engine = build_engine(model, optimizer, config.values)
        self.compile(model, sharded=config.stage == 3)  # whose hooks on every module would cut the graph of the whole
        stage, division = config.stage, TensorDivision(model)
        if division and optimizer is not None:
            self._unproven.append(ReplicaAudit(model, division))
        parameters = [parameter for group in groups for parameter in group]
        prepared = _Prepared(
            engine=engine,
            model=model,
            optimizer=None if optimizer is None else engine.basic_optimizer,
            config=config,
            guard=self._guard(model, stage),
            states=EngineStates(engine, model, [group for group in groups if group], stage=stage, division=division),
            gradients=(
                None if optimizer is None else gradients_held_by(engine, parameters, stage=stage, division=division)
            ),
        )
        self._prepared.append(prepared)
        return prepared

    def _guard(self, model: nn.Module, stage: int) -> Any:
        def refuse(*_: Any) -> None:
            if stage > 0 or self.options.precision != "no":
                raise ConfigError(
                    f"`load_state_dict` was called on a {type(model).__name__} that DeepSpeed trains, and its next "
                    f"step would put its own weights in place of these. Load them before `prepare`, or by `load_state`."
                )

        return model.register_load_state_dict_pre_hook(refuse)  # type: ignore[no-untyped-call, unused-ignore]

    @property
    def _only(self) -> _Prepared:
        for each in self._prepared:
            if each.gradients is not None:
                return each
        raise ConfigError(
            "`backward` or clipping was called, and no model was prepared together with an optimizer. Prepare both in "
            "one call: `model, optimizer = accelerator.prepare(model, optimizer)`."
        )

    @property
    def _trained(self) -> Gradients:
        gradients = self._only.gradients
        assert gradients is not None
        return gradients

    def _of_model(self, model: nn.Module) -> _Prepared | None:
        return next((each for each in self._prepared if model is each.engine or model is each.model), None)

    def _of_optimizer(self, optimizer: Optimizer) -> _Prepared:
        for each in self._prepared:
            if each.optimizer is optimizer:
                return each
        raise ConfigError(
            f"A {type(optimizer).__name__} was used that DeepSpeed does not have, or not any more since `free_memory`. "
            f"Use the one that `prepare` returned."
        )


def _trainable(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [parameter for parameter in parameters if parameter.requires_grad]
