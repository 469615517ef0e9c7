"""The one class users meet: five changed lines make a raw PyTorch loop run anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from accel.checkpoint_view import CheckpointView
from accel.contents import Contents
from accel.engine import Engine
from accel.handlers import KwargsHandler, by_type
from accel.kinds import kind_of
from accel.loops import Loops
from accel.metrics import current_batch, gather_for_metrics
from accel.planning import as_request, settle
from accel.project import ProjectConfiguration, settled
from accel.resolve import open_process
from accel.run_state import RunState
from accel.saving import Saving
from accel.spreading import asked_for, dynamo_plugin_of, make_strategy, mesh_shape
from accel.tracking import Tracking
from accel.uneven import join_uneven_inputs
from accel_data.configuration import DataLoaderConfiguration
from accel_data.convert import prepare_data_loader
from accel_parallel.checkpoint.location import Location, as_location
from accel_parallel.plugins import GradientAccumulationPlugin, InitProcessGroupKwargs
from accel_parallel.strategy import Strategy
from accel_precision.policy import precision
from accel_precision.settings import AutocastKwargs, GradScalerKwargs
from accel_state.config import LaunchSettings, MixedPrecision, RunConfig
from accel_state.env import detect
from accel_state.errors import ConfigError
from accel_state.memory import release_memory
from accel_state.process import DistributedType, Process
from accel_state.protocols import StatefulLoader, Tracker
from accel_track import LogWith

if TYPE_CHECKING:
    from accel_parallel.auto import AutoParallelism, Plan
    from accel_parallel.compilation import TorchDynamoPlugin
    from accel_parallel.deepspeed.plugin import DeepSpeedPlugin
    from accel_parallel.fsdp.plugin import FullyShardedDataParallelPlugin
    from accel_parallel.parallelism import ParallelismConfig

__all__ = ["Accelerator"]


class Accelerator(CheckpointView):
    """Runs a training loop on whatever it was launched on.

    ::

        accelerator = Accelerator()
        model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        for batch, labels in loader:
            optimizer.zero_grad()
            loss = loss_function(model(batch), labels)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
    """

    def __init__(
        self,
        *,
        device_placement: bool = True,
        mixed_precision: MixedPrecision | None = None,
        gradient_accumulation_steps: int | None = None,
        gradient_accumulation_plugin: GradientAccumulationPlugin | None = None,
        cpu: bool = False,
        dataloader_config: DataLoaderConfiguration | None = None,
        project_dir: str | Path | None = None,
        project_config: ProjectConfiguration | None = None,
        log_with: LogWith = None,
        step_scheduler_with_optimizer: bool = True,
        strategy: str | None = None,
        fsdp_plugin: FullyShardedDataParallelPlugin | None = None,
        deepspeed_plugin: DeepSpeedPlugin | None = None,
        deepspeed_plugins: Mapping[str, DeepSpeedPlugin] | None = None,
        parallelism_config: ParallelismConfig | None = None,
        parallelism: Literal["auto"] | AutoParallelism | None = None,
        dynamo_plugin: TorchDynamoPlugin | None = None,
        dynamo_backend: str | None = None,
        kwargs_handlers: Sequence[KwargsHandler] = (),
    ) -> None:
        """Join the world and settle every setting. Every rank must call this.

        A value given here wins over the launcher's flag, and that over the default; `explain` prints all of them.

        Args:
            device_placement: whether models and batches are moved to the process's device.
            mixed_precision: ``"no"``, ``"bf16"`` or ``"fp16"``.
            gradient_accumulation_steps: micro-batches whose gradients make one optimizer step.
            gradient_accumulation_plugin: the same with further options, instead of the number.
            cpu: compute on the CPU although there is an accelerator.
            dataloader_config: how prepared loaders are sharded.
            project_dir: folder of checkpoints and metrics; short for a `project_config` with only that.
            project_config: folders, and how checkpoints are named and kept.
            log_with: names of trackers, trackers, or ``"all"``.
            step_scheduler_with_optimizer: ``False`` lets every ``scheduler.step()`` through.
            strategy: name of the strategy, such as one of another package; by default what the rest asks for.
            fsdp_plugin: shard models over the processes, with these options.
            deepspeed_plugin: train with DeepSpeed, configured so.
            deepspeed_plugins: the same for several models, by name; ``state.select_deepspeed_plugin`` chooses.
            parallelism_config: how many processes each kind of parallelism gets.
            parallelism: ``"auto"`` chooses the strategy and its options when the model is prepared, by predicted memory
                and time, and prints why; `AutoParallelism` says more about it.
            dynamo_plugin: compile models with these settings.
            dynamo_backend: short for a `dynamo_plugin` with only that backend, such as ``"inductor"``.
            kwargs_handlers: options of the process group, DDP, autocast and the loss scaler, one of each at most.

        Raises:
            ConfigError: for a setting that cannot work, or would have no effect.
        """
        handlers = by_type(kwargs_handlers)
        if gradient_accumulation_plugin is not None and gradient_accumulation_steps is not None:
            raise ConfigError(
                f"`gradient_accumulation_steps={gradient_accumulation_steps}` and a `gradient_accumulation_plugin` "
                f"with `num_steps={gradient_accumulation_plugin.num_steps}` were both given, and a window has one "
                f"length. Give one of them."
            )
        plugin = gradient_accumulation_plugin
        asked = asked_for(strategy, fsdp_plugin, deepspeed_plugin, deepspeed_plugins)
        environment = Process.current().environment if Process.is_open() else detect()
        group: InitProcessGroupKwargs | None = handlers.get(InitProcessGroupKwargs)
        self.config: RunConfig = asked.resolve(
            {
                "device": "cpu" if cpu else None,
                "mixed_precision": mixed_precision,
                "gradient_accumulation_steps": plugin.num_steps if plugin else gradient_accumulation_steps,
                "backend": group.backend if group else None,
                "timeout_s": group.timeout.total_seconds() if group and group.timeout else None,
                "project_dir": None if project_dir is None else str(project_dir),
            },
            LaunchSettings.from_json(environment.run_config),
        )
        """Every setting, with its source."""
        world_size = environment.topology().world_size
        self.parallelism_config = parallelism_config
        """How many processes each kind of parallelism was given; ``None`` where nothing was asked for."""
        self._request = as_request(parallelism, {**asked.named, "parallelism_config": parallelism_config})
        self.plan: Plan | None = None
        """What ``parallelism="auto"`` chose, once a model is prepared."""
        self.process = open_process(self.config, mesh_shape(parallelism_config, world_size))
        self.project_configuration = settled(project_config, self.config)
        """Folders of this run."""
        self._data = dataloader_config or DataLoaderConfiguration()
        self._place = device_placement
        self._follow = step_scheduler_with_optimizer
        self._loops = Loops()
        self._loaders: list[StatefulLoader[Any]] = []
        computed_in = precision(
            self.config.mixed_precision,
            device=self.process.device,
            autocast=handlers.get(AutocastKwargs),
            scaler=handlers.get(GradScalerKwargs),
        )
        self._spread = partial(
            make_strategy,
            self.process,
            place=device_placement,
            handlers=handlers,
            dynamo=dynamo_plugin_of(dynamo_plugin, dynamo_backend),
            precision=computed_in.name,
        )
        self._engine = Engine(
            strategy=self._spread(name=asked.strategy, options=asked.options, parallelism=parallelism_config),
            precision=computed_in,
            accumulation=plugin or GradientAccumulationPlugin(num_steps=self.config.gradient_accumulation_steps),
            loops=self._loops,
        )
        self._saving = Saving(Contents(self._engine, self.process, self._loaders), self.project_configuration)
        self._tracking = Tracking(log_with, self.process, self.project_configuration.tracking_dir)

    # Settings

    @property
    def mixed_precision(self) -> str:
        """The precision that is computed in, which may differ from the one asked for where the device lacks that."""
        return self._engine.precision.name

    @property
    def strategy(self) -> Strategy:
        """How models are spread over the processes."""
        return self._engine.strategy

    @property
    def state(self) -> RunState:
        """What is in force now; chooses among several plugins of DeepSpeed."""
        return RunState(self.strategy, self.mixed_precision, self.process)

    @property
    def distributed_type(self) -> DistributedType:
        """Kind of world."""
        return self.strategy.distributed_type or self.process.distributed_type

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches in a window. Setting it takes effect with the next window."""
        return self._engine.accumulation.num_steps

    @gradient_accumulation_steps.setter
    def gradient_accumulation_steps(self, num_steps: int) -> None:
        self._engine.accumulation.num_steps = GradientAccumulationPlugin(num_steps=num_steps).num_steps

    def explain(self) -> str:
        """Every setting with its value and its source, what was chosen from them, and dtypes of models, as text."""
        return "\n".join(
            (
                self.config.explain(),
                "",
                f"process: {self.process!r}",
                f"strategy: {self.strategy.name}, chosen for {self.num_processes} process(es)",
                f"precision: {self.mixed_precision}",
                *self._engine.explain(),
            )
        )

    # Preparing

    def prepare(self, *objects: Any) -> Any:
        """Make models, optimizers, loaders and schedulers fit what the run was launched on. Every rank must call this.

        Objects come back in the order given; a single one comes back alone. An optimizer is prepared together with the
        model that it trains, or after it.

        Raises:
            ConfigError: for anything else, and for what `accel_parallel.audit` refuses.
        """
        self._together("prepare")
        kinds = [kind_of(index, each) for index, each in enumerate(objects)]
        given = {
            kind: [each for each, own in zip(objects, kinds, strict=True) if own == kind]
            for kind in ("model", "optimizer", "loader", "scheduler")
        }
        if self._request is not None and given["model"]:
            self._follow_plan(self._request, given)
        loaders = [self._prepare_loader(each) for each in given["loader"]]
        batch_size = next((getattr(each, "batch_size", None) for each in (*loaders, *self._loaders)), None)
        bundle = self._engine.prepare(given["model"], given["optimizer"], given["scheduler"], batch_size)
        self._loaders += [each for each in loaders if not any(known is each for known in self._loaders)]
        ready = {"model": iter(bundle.models), "optimizer": iter(bundle.optimizers), "loader": iter(loaders)}
        prepared = [
            self._engine.prepare_scheduler(each, follow=self._follow) if kind == "scheduler" else next(ready[kind])
            for each, kind in zip(objects, kinds, strict=True)
        ]
        return prepared[0] if len(prepared) == 1 else tuple(prepared)

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """`prepare` for one model."""
        prepared: nn.Module = self.prepare(model)
        return prepared

    def prepare_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """`prepare` for one optimizer, whose model is prepared already."""
        prepared: Optimizer = self.prepare(optimizer)
        return prepared

    def prepare_data_loader(self, data_loader: DataLoader[Any]) -> StatefulLoader[Any]:
        """`prepare` for one loader."""
        prepared: StatefulLoader[Any] = self.prepare(data_loader)
        return prepared

    def prepare_scheduler(self, scheduler: Any) -> Any:
        """`prepare` for one scheduler, whose optimizer is prepared already."""
        return self.prepare(scheduler)

    def unwrap_model(self, model: nn.Module, *, keep_fp32_wrapper: bool = True) -> nn.Module:
        """The module that was given to `prepare`.

        Args:
            model: what `prepare` returned; a module that was not prepared comes back as it is.
            keep_fp32_wrapper: ``False`` also lets its forward compute outside mixed precision again.
        """
        inner = self.strategy.unwrap(model)
        return inner if keep_fp32_wrapper else self._engine.precision.unwrap_forward(inner)

    def get_state_dict(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """The whole model by fully qualified name, as its ``state_dict()`` would give it alone.

        Every rank must call this. A sharded model is gathered tensor by tensor into the host memory of the main
        process, and the others get an empty dict.
        """
        return self.strategy.full_state(model, everywhere=False)

    # A step

    @property
    def sync_gradients(self) -> bool:
        """Whether the current micro-batch ends its accumulation window, so that the optimizer steps."""
        return self._engine.accumulation.sync_gradients

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether any optimizer's last step found gradients that were not finite and changed nothing."""
        return any(optimizer.step_was_skipped for optimizer in self._engine.optimizers)

    def backward(self, loss: torch.Tensor, num_items: int | float | torch.Tensor | None = None, **kwargs: Any) -> None:
        """Add the gradients of `loss`, so scaled that a window's gradient equals that of one process on all of it.

        A mean weighs every rank's batch alike. Where the last batch of an epoch is padded, the samples repeated there
        weigh double, and without `even_batches` those of smaller batches weigh more; `num_items` with the sum over the
        real rows (``loader.batch_info.real_rows[accelerator.process_index]``) is exact there too.

        Args:
            loss: without `num_items`, the mean over this process's micro-batch: a window's gradient is then the mean
                over its micro-batches and processes. With it, the sum over this process's items.
            num_items: items (tokens, samples) that `loss` is the sum of, on this process: the gradient is divided by
                their number in the whole window, over all processes. Every rank must then call this equally often.
            kwargs: passed on to ``loss.backward``; for an optimizer that steps inside it, ``learning_rate``.

        Raises:
            ConfigError: if a window has some losses with and some without `num_items`.
        """
        self._engine.backward(loss, num_items, kwargs)

    def lomo_backward(self, loss: torch.Tensor, learning_rate: float) -> None:
        """`backward` at this rate, for an optimizer that steps inside it; `backward` takes the optimizer's own rate."""
        self._engine.lomo_backward(loss, learning_rate)

    def accumulate(self, *models: nn.Module, num_steps: int | None = None) -> AbstractContextManager[None]:
        """Around forward, backward, clipping and step of one micro-batch: the step happens when the window ends.

        Args:
            models: those that this micro-batch trains; each has a window of its own. By default all.
            num_steps: micro-batches in the windows of these models, instead of `gradient_accumulation_steps`.
        """
        return self._engine.accumulate(models, num_steps)

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Keep the gradients of `model` local, for a script that counts micro-batches by itself."""
        return self.strategy.no_sync(model)

    def trigger_sync_in_backward(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Around a `backward` that is to exchange the gradients of `model`, earlier ones that were kept included.

        For forwards inside `no_sync` or an unfinished window, where it shows only later which backward is the last.
        """
        return self._engine.sync_in_backward(model)

    def join_uneven_inputs(
        self, joinables: Sequence[nn.Module], even_batches: bool | None = None
    ) -> AbstractContextManager[None]:
        """Around one epoch's loop in which ranks may run out of batches at different times. Every rank must enter.

        Ranks that are through wait at the end of the block. A step's gradient is the mean over the ranks that have a
        batch. Afterwards every rank has the models, optimizers and schedulers of one that took the most steps. Nothing
        else that needs all ranks works inside: not `num_items`, gathering, saving, evaluation or `no_sync`.

        Args:
            joinables: prepared models; the loop calls each once a micro-batch, forward and backward, in this order.
            even_batches: what prepared loaders do in the block, instead of what they were configured to do.

        Raises:
            ConfigError: for what would wait for a rank that is through.
        """
        return join_uneven_inputs(
            joinables,
            engine=self._engine,
            loaders=self._loaders,
            process=self.process,
            even_batches=even_batches,
            dealt=bool(self._data.dispatch_batches),
        )

    @property
    def torch_device_mesh(self) -> DeviceMesh | None:
        """The world by the axes of `parallelism_config`; ``None`` where all of it is copies of the model."""
        return self.strategy.device_mesh

    def shard_sequence(self, batch: Mapping[str, Any], *, causal: bool = True) -> dict[str, Any]:
        """This rank's part of a batch of whole sequences, under ``cp_size`` or ``sp_size``; else all of it.

        Names are the same in both: labels of a causal model are shifted first and come back as ``shift_labels``, and
        there are ``position_ids``; see `accel_parallel.sequence.layout`.
        """
        from accel_parallel.sequence.layout import shard_sequence  # only for those who divide sequences, or may

        sequence = self.strategy.sequence
        return shard_sequence(batch, None, causal=causal) if sequence is None else sequence.shard(batch, causal=causal)

    def unshard_sequence(self, tensor: torch.Tensor, *, dim: int = 1, length: int | None = None) -> torch.Tensor:
        """Whole sequences from the parts of all ranks that share them. Every rank must call this; see `shard_sequence`.

        Args:
            tensor: this rank's part.
            dim: of the sequence.
            length: of the sequence before it was padded.
        """
        sequence = self.strategy.sequence
        return tensor if sequence is None else sequence.unshard(tensor, dim=dim, length=length)

    def maybe_context_parallel(
        self,
        buffers: Sequence[torch.Tensor] | None = None,
        buffer_seq_dims: Sequence[int] | None = None,
        no_restore_buffers: set[torch.Tensor] | None = None,
    ) -> AbstractContextManager[None]:
        """Under ``cp_size``, while open each of `buffers` holds this rank's part along its sequence; else nothing.

        Shift labels before, and give them as ``shift_labels``; `shard_sequence` does both.
        """
        sequence = self.strategy.sequence
        if sequence is None:
            return nullcontext()
        return sequence.context_parallel(
            buffers=buffers, buffer_seq_dims=buffer_seq_dims, no_restore_buffers=no_restore_buffers
        )

    def autocast(self) -> AbstractContextManager[Any]:
        """The run's mixed precision for a block outside a prepared model's forward, such as a loss."""
        return self._engine.precision.forward_context()

    def clip_grad_norm_(
        self, parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float = 2.0
    ) -> torch.Tensor:
        """Scale the gradients so that their common norm is at most `max_norm`. Every rank must call this.

        Returns the norm before, which is that of a single process on the whole window. Inside a window, before its
        last micro-batch, nothing is clipped and the norm is that of the sum so far; zero under FSDP with
        ``sync_each_batch=False``, which shows no gradient until then.
        """
        return self._engine.clip_grad_norm_(parameters, max_norm, norm_type)

    def clip_grad_value_(self, parameters: Iterable[torch.Tensor], clip_value: float) -> None:
        """Bound the absolute value of every gradient entry, at the end of a window."""
        self._engine.clip_grad_value_(parameters, clip_value)

    def gather_for_metrics(self, tree: Any, use_gather_object: bool = False) -> Any:
        """The rows of the current batch from all processes, every sample exactly once. Every rank must call this.

        Args:
            tree: tensors with one row a sample of this process's batch, alone or nested.
            use_gather_object: gather lists of Python objects instead, one entry a sample.

        Raises:
            ConfigError: if rows and batch do not match, or it is not clear which batch is meant, so that padding could
                not be told from data.
        """
        process = self._together("gather_for_metrics")
        return gather_for_metrics(
            tree, info=current_batch(self._loops), process=process, use_gather_object=use_gather_object
        )

    @property
    def project_dir(self) -> Location | None:
        """Root of everything that the run writes; text where it is a URL."""
        folder = self.project_configuration.project_dir
        return None if folder is None else as_location(folder)

    # Trackers

    def init_trackers(self, project_name: str, config: Mapping[str, Any] | None = None) -> None:
        """Start the trackers of ``log_with`` on the main process, for a run with these hyperparameters."""
        self._tracking.start(project_name, config or {})

    def log(self, values: Mapping[str, Any], step: int | None = None) -> None:
        """Send values to every tracker, from the main process."""
        self._tracking.log(values, step)

    def get_tracker(self, name: str) -> Tracker:
        """The tracker of that name; on other than the main process one that keeps nothing."""
        return self._tracking.get(name)

    # The end

    def end_training(self) -> None:
        """Finish the trackers and leave the world. Every rank must call this."""
        self._together("end_training")
        try:
            self._saving.close()
        finally:  # a save that failed is raised once all else is in order
            self._release_signals()
            self._tracking.finish()
            self.process.barrier()
            self.process.close()

    def free_memory(self, *objects: Any) -> list[None]:
        """Let go of all that was prepared and of `objects`, and empty the device's cache. Every rank must call this.

        Returns one ``None`` an object: ``model, optimizer = accelerator.free_memory(model, optimizer)``.
        """
        try:
            self._saving.close()
        finally:
            self._engine.forget()
            for loader in self._loaders:
                loader.close()
            self._loaders.clear()
        return release_memory(*objects)

    clear = free_memory

    def _follow_plan(self, request: AutoParallelism, given: Mapping[str, list[Any]]) -> None:
        self.plan = settle(
            request,
            models=given["model"],
            optimizers=given["optimizer"],
            loaders=given["loader"],
            engine=self._engine,
            process=self.process,
            spread=self._spread,
            has_loaders=bool(self._loaders),
        )
        self._request, self.parallelism_config = None, self.plan.parallelism

    def _prepare_loader(self, loader: Any) -> StatefulLoader[Any]:
        prepared = prepare_data_loader(
            loader,
            topology=self.process.topology,
            device=self.process.device if self._place else None,
            config=self._data,
        )
        prepared.observer = self._loops
        return prepared
