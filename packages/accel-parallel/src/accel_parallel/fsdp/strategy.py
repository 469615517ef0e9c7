"""Sharded data parallel, alone or with tensor, context and sequence parallel: FSDP2 over one mesh of processes.

Each process holds a part of every parameter, gradient and optimizer state; a unit's parameters are gathered when it
computes, and its gradients reduced to the owners of their parts. Rajbhandari et al., "ZeRO", arXiv:1910.02054; Zhao et
al., "PyTorch FSDP", arXiv:2304.11277; torch's `fully_shard` does the work.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from accel_parallel.axes import ModelAxes
from accel_parallel.clip import check_clip, clip_to_norm_, gradients_of
from accel_parallel.extra_state import give_extra_states, is_extra
from accel_parallel.fsdp.plugin import FullyShardedDataParallelPlugin
from accel_parallel.fsdp.precision import precision_policy, refuse_other_precision
from accel_parallel.fsdp.statistics import share_statistics
from accel_parallel.fsdp.units import (
    check_ignored,
    check_separate,
    check_shardable,
    ignored_parameters,
    plan_units,
)
from accel_parallel.fsdp.usage import Usage
from accel_parallel.fsdp.weights import AsTheyAre, FromFiles, FromRankZero, WeightSource
from accel_parallel.mesh import Mesh
from accel_parallel.naming import parameter_names
from accel_parallel.parallelism import ParallelismConfig
from accel_parallel.recompute import checkpoint_activations
from accel_parallel.sharded import in_memory, is_sharded, like, local_of, part_of, total_norm, whole
from accel_parallel.single import SingleStrategy
from accel_parallel.strategy import Bundle
from accel_state.errors import ConfigError
from accel_state.process import DistributedType, Process
from accel_state.protocols import LossScaler
from accel_state.topology import Axis, MeshShape

if TYPE_CHECKING:
    from accel_parallel.compilation import TorchDynamoPlugin

__all__ = ["FSDPStrategy"]


class FSDPStrategy(SingleStrategy):
    """Shards every model over the processes of its mesh; those along other axes compute their part of each sample.

    With no mesh asked for, all processes share one copy. With ``dp_replicate``, each group of ``dp_shard`` shares one.
    """

    name = "fsdp"
    options_type = FullyShardedDataParallelPlugin
    axes: frozenset[Axis] = frozenset({"dp_replicate", "dp_shard", "cp", "sp", "tp"})
    exchanges_each_batch = True
    distributed_type = DistributedType.FSDP

    def __init__(
        self,
        process: Process,
        *,
        place: bool = True,
        options: FullyShardedDataParallelPlugin | None = None,
        parallelism: ParallelismConfig | None = None,
        dynamo: TorchDynamoPlugin | None = None,
    ) -> None:
        """Every rank must call this: it makes the process groups of the mesh."""
        if not place:
            raise ConfigError(
                "`device_placement=False` leaves models where they are, and shards live on the process's device. "
                "Leave it out with FSDP."
            )
        super().__init__(process, options=None, parallelism=parallelism, dynamo=dynamo)
        self.options = options or FullyShardedDataParallelPlugin()
        _check_device(process.device)
        process.require_group()
        self.mesh = Mesh(process, _shape(process, self.options))
        self.device_mesh = self.mesh.root
        _check_reshard(self.options, self.mesh)
        self.model_axes = ModelAxes(self.mesh, parallelism or ParallelismConfig())
        self.sequence = self.model_axes.sequence
        if self.options.cpu_ram_efficient_loading and self.model_axes.divides_tensors:
            raise ConfigError(
                f"`cpu_ram_efficient_loading=True` sends whole units from rank 0, and `tp_size="
                f"{self.mesh.topology.shape.tp}` divides the model before there are units. Give `weights_path`, from "
                f"which each process reads its own part."
            )
        self._keeping: set[int] = set()
        """Models, by identity, that keep their gradients local for now."""
        self._sharded: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        """Models that were prepared."""
        self._usage: weakref.WeakKeyDictionary[Optimizer, Usage] = weakref.WeakKeyDictionary()

    @classmethod
    def settle_options(
        cls, given: Any, *, process: Process, parallelism: ParallelismConfig | None, precision: str
    ) -> FullyShardedDataParallelPlugin:
        shape = process.topology.shape
        if parallelism is not None and process.topology.world_size == shape.dp_replicate > 1:
            raise ConfigError(
                f"`fsdp_plugin` shards a model over processes, and `ParallelismConfig(dp_replicate_size="
                f"{shape.dp_replicate})` gives each a whole copy. Set `dp_shard_size={shape.dp_replicate}` instead, or "
                f"leave the plugin out."
            )
        options: FullyShardedDataParallelPlugin = given or FullyShardedDataParallelPlugin()
        if options.mixed_precision_policy is None and precision != "no":
            options = replace(options, mixed_precision_policy=precision)
        refuse_other_precision(options, precision)
        return options

    @property
    def average_size(self) -> int:
        return self.mesh.average_size

    @property
    def fills_meta(self) -> bool:
        return self.options.cpu_ram_efficient_loading or self.options.weights_path is not None

    @property
    def state_layout(self) -> str:
        return "sharded" if self.options.state_dict_type == "SHARDED_STATE_DICT" else "full"

    def sum_over_data(self, value: torch.Tensor) -> torch.Tensor:
        return self.mesh.sum_over_data(value)

    def reduce_found_inf(self, found: torch.Tensor) -> None:
        """Greater than zero on all ranks where it is on any. Every rank must call this."""
        dist.all_reduce(found, dist.ReduceOp.MAX)

    def prepare(self, bundle: Bundle) -> Bundle:
        """As of every strategy. Every rank must call this.

        Raises:
            ConfigError: for what cannot be sharded; nothing is changed then.
        """
        source = self._source()
        check_separate(bundle.models)
        check_ignored(bundle.models, self.options)
        _refuse_weights_unread(bundle.models, self.options)
        plans = []
        for model in bundle.models:
            _refuse_sharded(model)
            ignored = ignored_parameters(model, self.options)
            units = plan_units(model, self.options, ignored=ignored)
            check_shardable(model, units, ignored)
            source.check(model)
            plans.append((model, units, ignored, self.model_axes.plan(model)))
        places = {
            parameter: (index, name)
            for index, model in enumerate(bundle.models)
            for name, parameter in model.named_parameters()
        }
        for optimizer in bundle.optimizers:
            _refuse_gathered(optimizer, places)
        for model, units, ignored, division in plans:
            if division is not None:
                source.before(chain(model.named_parameters(), model.named_buffers()), model)
            self.model_axes.apply(model, division)
            self._shard(model, units, ignored, source)
            share_statistics(model)
            model.register_forward_hook(_reshard_unless_training)
            self._sharded.add(model)
        sharded = [dict(model.named_parameters()) for model in bundle.models]
        for optimizer in bundle.optimizers:
            _follow(optimizer, {old: sharded[index][name] for old, (index, name) in places.items()})
        return bundle

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        super().backward(loss, **kwargs)
        self.model_axes.after_backward()

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        return self._exchanging(model, False)

    def sync_in_backward(self, model: nn.Module) -> AbstractContextManager[Any]:
        return self._exchanging(model, True)

    def join(
        self, models: Sequence[nn.Module], *, settle: Callable[[int], None] | None = None
    ) -> AbstractContextManager[None]:
        """Refused: a rank without inputs still has to gather its parts for the others."""
        raise ConfigError(
            "`join_uneven_inputs` was entered with sharded models, whose every forward needs all ranks, so that one "
            "without a batch would stop the others. Train with even batches, and pass `num_items` where repeated "
            "samples must not count."
        )

    def clip_grad_norm_(
        self, parameters: Iterable[torch.Tensor], max_norm: float, norm_type: float = 2.0
    ) -> torch.Tensor:
        check_clip(max_norm, norm_type)
        gradients = gradients_of(_only_shards(parameters))
        norm = total_norm(gradients, norm_type)
        clip_to_norm_(gradients, norm, max_norm)
        return norm

    def grad_norm(self, parameters: Iterable[torch.Tensor], norm_type: float = 2.0) -> torch.Tensor:
        return total_norm(gradients_of(_only_shards(parameters)), norm_type)

    def step(self, optimizer: Optimizer, *, scaler: LossScaler, closure: Callable[[], Any] | None = None) -> bool:
        # What a forward without a backward gathered would be old afterwards, and the next forward would take it.
        for model in self._sharded:
            _reshard(model)
        if self.process.topology.world_size > 1 and closure is None:  # a closure has not run backward yet
            usage = self._usage.setdefault(optimizer, Usage())
            usage.observe(optimizer, names=self._parameter_names, process=self.process)
        return super().step(optimizer, scaler=scaler, closure=closure)

    def _parameter_names(self) -> dict[torch.Tensor, str]:
        return parameter_names([(type(model).__name__.removeprefix("FSDP"), model) for model in self._sharded])

    def model_state(self, model: nn.Module) -> dict[str, torch.Tensor]:
        _reshard(self.unwrap(model))
        return super().model_state(model)

    def load_model_state(self, model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
        present = self.model_state(model)
        self.check_model_state(present, state)
        with torch.no_grad():
            for name, value in state.items():
                if not is_extra(name):
                    local_of(present[name]).copy_(part_of(value, present[name]))
        give_extra_states(self.unwrap(model), state)

    def _new_entry(self, value: Any, parameter: torch.Tensor | None) -> Any:
        if parameter is None or not is_sharded(parameter):
            return super()._new_entry(value, parameter)
        return _as_divided(value, parameter)

    def full_state(self, model: nn.Module, *, everywhere: bool = True) -> dict[str, torch.Tensor]:
        keeps = everywhere or self.process.topology.is_main
        # Tied ones are one tensor under all of their names, as in one process: gathered once, and written once.
        held = self.unwrap(model).state_dict(keep_vars=True)
        wholes: dict[int, torch.Tensor] = {}
        state: dict[str, torch.Tensor] = {}
        for name, value in self.model_state(model).items():
            identity = id(held[name])
            if identity not in wholes:
                full = whole(value)
                wholes[identity] = (full if everywhere else full.cpu()) if keeps else full.new_empty(0)
            if keeps:
                state[name] = wholes[identity]
        return state

    @contextmanager
    def _exchanging(self, model: nn.Module, exchanges: bool) -> Iterator[None]:
        """While open, backward exchanges gradients, those that were kept before included, or keeps them whole."""
        module: Any = self.unwrap(model)
        before = id(module) not in self._keeping
        self._set_exchanging(module, exchanges)
        try:
            yield
        finally:
            self._set_exchanging(module, before)

    def _set_exchanging(self, module: Any, exchanges: bool) -> None:
        module.set_requires_gradient_sync(exchanges)
        if exchanges:
            self._keeping.discard(id(module))
        else:
            self._keeping.add(id(module))

    def _source(self) -> WeightSource:
        options, device = self.options, self.process.device
        if options.weights_path is not None:
            return FromFiles(Path(options.weights_path), torch.device("cpu") if options.cpu_offload else device)
        if options.sync_module_states:
            if self.model_axes.divides_tensors:
                # Whole tensors wait on the host to be divided, and go to the device part by part.
                return FromRankZero(torch.device("cpu"), fills_meta=False)
            return FromRankZero(device, fills_meta=options.cpu_ram_efficient_loading)
        return AsTheyAre()

    def _shard(
        self, model: nn.Module, units: list[tuple[str, nn.Module]], ignored: set[nn.Parameter], source: WeightSource
    ) -> None:
        if self.options.activation_checkpointing:
            # Inside the units' hooks, which gather parameters again before a block is computed again.
            checkpoint_activations(model, units[::-1] or None)
        self.compile(model, sharded=bool(units))
        taken: set[int] = set()
        settings = self._settings(ignored)
        device = self.process.device
        for parameter in ignored:
            parameter.data = parameter.data.to(device)
        for name, unit in [*units, ("", model)]:
            fresh = [
                (f"{name}.{key}" if name else key, tensor)
                for key, tensor in [*unit.named_parameters(), *unit.named_buffers()]
                if id(tensor) not in taken and not is_sharded(tensor)
            ]
            source.before(fresh, model)
            held = [p for _, p in unit.named_parameters() if not is_sharded(p) and p not in ignored]
            for parameter in held:
                if not parameter.is_contiguous():  # torch cuts dense rows
                    parameter.data = parameter.data.contiguous()
            _fully_shard(unit, is_root=unit is model, settings=settings)
            taken.update(id(tensor) for _, tensor in fresh)
            for parameter in held:
                if not parameter.is_meta:  # an optimizer may still hold it: let go of its memory now
                    parameter.data = parameter.data.new_empty(0)
            taken.update(id(tensor) for tensor in unit.buffers())
        source.after(model)
        if self.options.forward_prefetch:
            _prefetch_forward([unit for _, unit in units[::-1]])

    def _settings(self, ignored: set[nn.Parameter]) -> dict[str, Any]:
        from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

        settings: dict[str, Any] = {
            "mesh": self.mesh.data,
            "mp_policy": precision_policy(self.options),
            "reshard_after_forward": self.options.reshard_after_forward,
        }
        if self.options.cpu_offload:
            settings["offload_policy"] = CPUOffloadPolicy(pin_memory=self.process.device.type != "cpu")
        if ignored:
            if "ignored_params" not in inspect.signature(fully_shard).parameters:
                raise ConfigError(
                    f"`ignored_modules` and `ignored_params` need a torch of 2.7 or newer, and this is "
                    f"{torch.__version__}. Leave them out, or install a newer torch."
                )
            settings["ignored_params"] = ignored
        return settings


def _check_device(device: torch.device) -> None:
    if device.type == "cpu" and not hasattr(torch.cpu.Stream, "record_event"):
        raise ConfigError(
            f"Models cannot be sharded on the CPU with torch {torch.__version__}: its `fully_shard` asks for events "
            f"that the CPU does not have there. Install a newer torch, use a GPU, or leave out what asks for shards."
        )


def _shape(process: Process, options: FullyShardedDataParallelPlugin) -> MeshShape:
    """The mesh that was asked for; without one, all processes share one copy, or those of each node where hybrid."""
    topology = process.topology
    by_node = MeshShape(dp_replicate=topology.num_nodes, dp_shard=topology.local_world_size)
    if process.settings.mesh is not None:
        if options.hybrid and topology.shape != by_node:
            raise ConfigError(
                f"A hybrid sharding strategy shards within each of {topology.num_nodes} node(s) of "
                f"{topology.local_world_size} process(es), and the mesh that was asked for is {topology.shape}. "
                f"Leave the strategy out, or the sizes."
            )
        return topology.shape
    return by_node if options.hybrid else MeshShape(dp_shard=topology.world_size)


def _check_reshard(options: FullyShardedDataParallelPlugin, mesh: Mesh) -> None:
    size, sharing = options.reshard_after_forward, mesh.data.size(-1)
    if isinstance(size, int) and not isinstance(size, bool) and sharing % size:
        fitting = [number for number in range(2, sharing + 1) if sharing % number == 0]
        remedy = f"Use {', '.join(map(str, fitting))}, or True" if fitting else "Use True"
        raise ConfigError(
            f"`reshard_after_forward={size}` reshards to groups of {size} processes, and {sharing} share a copy of the "
            f"model, which do not make such groups. {remedy}."
        )


def _refuse_weights_unread(models: Sequence[nn.Module], options: FullyShardedDataParallelPlugin) -> None:
    tensors = chain.from_iterable(chain(model.parameters(), model.buffers()) for model in models)
    if options.weights_path is not None and models and not any(tensor.is_meta for tensor in tensors):
        raise ConfigError(
            f"`weights_path={str(options.weights_path)!r}` fills what is on the meta device, and nothing of "
            f"{', '.join(type(model).__name__ for model in models)} is, so that the file would not be read. Build the "
            f"model under `init_empty_weights()` or `torch.device('meta')`, or leave `weights_path` out."
        )


def _fully_shard(unit: nn.Module, *, is_root: bool, settings: Mapping[str, Any]) -> None:
    from torch.distributed.fsdp import fully_shard

    reshard = settings["reshard_after_forward"]
    if is_root and reshard is not False:
        reshard = None  # torch keeps the root, whose backward begins as its forward ends
    fully_shard(unit, **{**settings, "reshard_after_forward": reshard})


def _prefetch_forward(units: Sequence[Any]) -> None:
    for unit, following in pairwise(units):
        unit.set_modules_to_forward_prefetch([following])


def _refuse_sharded(model: nn.Module) -> None:
    from torch.distributed.fsdp import FSDPModule

    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            raise ConfigError(
                f"`{name or type(model).__name__}` is sharded by `fully_shard` already, of this script or of another "
                f"Accelerator. Pass the model before it is sharded, or leave it out of `prepare`."
            )


def _reshard(model: nn.Module) -> None:
    """Give up gathered parameters: after a forward without a backward, some modules would show those."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _reshard_unless_training(model: nn.Module, args: Any, output: Any) -> None:
    """After a forward that no backward follows, which would otherwise leave gathered parameters for the model's own.

    torch keeps what it does not reshard after forward until backward. Until then ``parameters()`` and whatever takes
    them from there, such as ``zero_grad()`` and clipping, would see copies without gradients.
    """
    if not (model.training and torch.is_grad_enabled()):
        _reshard(model)


def _only_shards(parameters: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Refuse trained parameters that are whole, whose gradients are elsewhere or nobody's.

    Raises:
        ConfigError: saying how many there are.
    """
    given = list(parameters)
    odd = [each for each in given if each.requires_grad and not is_sharded(each)]
    if odd:
        raise ConfigError(
            f"{len(odd)} of the {len(given)} parameters to clip, the first of shape {tuple(odd[0].shape)}, are whole, "
            f"and every trained parameter of a prepared model is sharded. They were taken from the model after a "
            f"forward without a backward, while it holds gathered copies, or belong to a model that was not prepared. "
            f"Clip right after `backward`; evaluate under `torch.no_grad()` or after `model.eval()`."
        )
    return given


def _refuse_gathered(optimizer: Optimizer, given: Mapping[Any, object]) -> None:
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    odd = [each for each in parameters if each.requires_grad and each not in given and not is_sharded(each)]
    if odd:
        raise ConfigError(
            f"{len(odd)} of the {len(parameters)} parameters of the {type(optimizer).__name__}, the first of shape "
            f"{tuple(odd[0].shape)}, are gathered copies, which a model shows between a forward and its backward, so "
            f"that nothing would be trained. Make the optimizer before the forward, best before `prepare`."
        )


def _follow(optimizer: Optimizer, successors: Mapping[torch.Tensor, torch.Tensor]) -> None:
    """Let an optimizer hold the sharded parameters, its state divided as they are."""
    for group in optimizer.param_groups:
        # In place, for some optimizers keep a reference to the list.
        group["params"][:] = [successors.get(parameter, parameter) for parameter in group["params"]]
    for old in list(optimizer.state):
        new = successors.get(old, old)
        if new is not old:
            entries = optimizer.state.pop(old)
            optimizer.state[new] = {key: _as_divided(value, new) for key, value in entries.items()}


def _as_divided(value: Any, parameter: torch.Tensor | None) -> Any:
    """An entry of an optimizer's state as this rank holds it: divided like its parameter where it has its shape."""
    if parameter is None or not is_sharded(parameter) or is_sharded(value):
        return in_memory(value)
    if getattr(value, "shape", None) != parameter.shape or not len(parameter.shape):
        return in_memory(value)
    own = part_of(value, parameter)
    return like(own.to(local_of(parameter).device, copy=True), parameter)
