"""Data parallel: a whole model on every process, gradients averaged while backward still runs.

Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", arXiv:2006.15704.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from accel_parallel.plugins import DDPCommunicationHookType, DistributedDataParallelKwargs
from accel_parallel.single import SingleStrategy
from accel_parallel.strategy import Bundle
from accel_state.errors import ConfigError
from accel_state.process import Process
from accel_state.protocols import LossScaler
from accel_state.topology import Axis

if TYPE_CHECKING:
    from accel_parallel.compilation import TorchDynamoPlugin
    from accel_parallel.parallelism import ParallelismConfig

__all__ = ["DDPStrategy"]

_DDP_ARGUMENTS = (
    "broadcast_buffers",
    "bucket_cap_mb",
    "find_unused_parameters",
    "gradient_as_bucket_view",
    "static_graph",
)


class DDPStrategy(SingleStrategy):
    """Wraps every model that has something to train in ``DistributedDataParallel``."""

    name = "ddp"
    options_type = DistributedDataParallelKwargs
    axes: frozenset[Axis] = frozenset({"dp_replicate"})

    def __init__(
        self,
        process: Process,
        *,
        place: bool = True,
        options: DistributedDataParallelKwargs | None = None,
        parallelism: ParallelismConfig | None = None,
        dynamo: TorchDynamoPlugin | None = None,
    ) -> None:
        super().__init__(process, place=place, parallelism=parallelism, dynamo=dynamo)
        if process.topology.world_size < 2:
            raise ConfigError(
                "Data parallel was asked for in a world of one process, which has nobody to average gradients with. "
                "Launch at least two processes, or leave the strategy to be chosen."
            )
        self.options = options or DistributedDataParallelKwargs()
        self._joining = False
        self._due: list[DistributedDataParallel] = []
        """Models whose next backward exchanges gradients, whatever their forward was told."""
        self._unproven: list[weakref.ref[DistributedDataParallel]] = []
        """Models of which no exchange of all gradients has been seen yet."""

    @property
    def average_size(self) -> int:
        return self.process.topology.world_size

    def sum_over_data(self, value: torch.Tensor) -> torch.Tensor:
        if self._joining:
            raise ConfigError(
                "A sum over all ranks, as `num_items` needs, was asked for inside the block for uneven inputs, and a "
                "rank that is through takes part in nothing but the exchange of gradients. Train with even batches, "
                "where `num_items` of the real rows is exact, or leave `num_items` out."
            )
        total = value.clone()
        dist.all_reduce(total)
        return total

    def prepare(self, bundle: Bundle) -> Bundle:
        """As of every strategy.

        Raises:
            ConfigError: if the backend cannot carry what the options' hook sends, as gloo for bfloat16.
        """
        bundle = super().prepare(bundle)
        return Bundle(tuple(self._wrap(model) for model in bundle.models), bundle.optimizers)

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        for model in self._due:
            # What a forward outside `no_sync` does: from here on, the reducer waits for every gradient.
            model.reducer.prepare_for_backward([loss] if model.find_unused_parameters else [])
        super().backward(loss, **kwargs)

    def step(self, optimizer: Optimizer, *, scaler: LossScaler, closure: Callable[[], Any] | None = None) -> bool:
        """As of every strategy.

        Raises:
            ConfigError: before the first step of a model some of whose parameters got no gradient.
        """
        if self._unproven:
            self._prove(optimizer)
        return super().step(optimizer, scaler=scaler, closure=closure)

    def no_sync(self, model: nn.Module) -> AbstractContextManager[Any]:
        if self._joining:
            raise ConfigError(
                "`no_sync` was called inside the block for uneven inputs, and a rank that is through would take its "
                "gradients along. Use `accumulate`, which exchanges every micro-batch there."
            )
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    @contextmanager
    def sync_in_backward(self, model: nn.Module) -> Iterator[None]:
        """As of every strategy.

        Raises:
            ConfigError: under ``static_graph``, which takes each backward for the one that it saw first.
        """
        wrapped = super().unwrap(model)
        if not isinstance(wrapped, DistributedDataParallel):
            yield
            return
        if self.options.static_graph:
            raise ConfigError(
                "`static_graph=True` was set, and DDP then counts on each forward and backward to be like the first "
                "ones, so an exchange cannot be asked for in between. Leave `static_graph` out, or let `accumulate` "
                "decide when gradients are exchanged."
            )
        self._due.append(wrapped)
        try:
            yield
        finally:
            self._due.remove(wrapped)
            wrapped.require_forward_param_sync = True  # buffers are sent again, as after any exchange

    @contextmanager
    def join(self, models: Sequence[nn.Module], *, settle: Callable[[int], None] | None = None) -> Iterator[None]:
        """As of every strategy, by DDP's own stand-ins.

        Raises:
            ConfigError: for a model that DDP does not wrap or whose forward waits for all ranks, for a communication
                hook, which divides by all ranks, and for ``static_graph``.
        """
        wrapped = self._joinable(models)
        self._joining = True
        try:
            from accel_parallel.join import joined  # torch's part of it is slow to import

            with joined(wrapped, settle):
                yield
        finally:
            self._joining = False

    def _joinable(self, models: Sequence[nn.Module]) -> list[DistributedDataParallel]:
        found = [super(DDPStrategy, self).unwrap(model) for model in models]
        wrapped = [model for model in found if isinstance(model, DistributedDataParallel)]
        if not wrapped or len(wrapped) < len(found):
            names = ", ".join(type(model).__name__ for model in found if not isinstance(model, DistributedDataParallel))
            raise ConfigError(
                f"The block for uneven inputs was given {names or 'no model'}, and ranks that are through can only "
                f"stand in for a model that exchanges gradients. Pass what `prepare` returned for models that are "
                f"trained."
            )
        if any(isinstance(part, nn.SyncBatchNorm) for model in wrapped for part in model.modules()):
            raise ConfigError(
                "The block for uneven inputs was given a model with `SyncBatchNorm`, whose forward waits for all "
                "ranks, also for those that are through. Use `BatchNorm` there, or train with even batches."
            )
        if self.options.static_graph:
            raise ConfigError(
                "`static_graph=True` was set, and DDP then exchanges gradients of its first steps in a way that a rank "
                "without inputs cannot stand in for. Leave `static_graph` out, or train with even batches."
            )
        kinds = DDPCommunicationHookType
        if self.options.comm_hook is not kinds.NO or self.options.comm_wrapper is not kinds.NO:
            raise ConfigError(
                f"`comm_hook={self.options.comm_hook.value!r}` with `comm_wrapper={self.options.comm_wrapper.value!r}` "
                f"divides gradients by all ranks, also by those that ran out of inputs, so the last steps would be too "
                f"small. Leave the hook out, or train with even batches."
            )
        if not all(model.require_backward_grad_sync for model in wrapped):
            raise ConfigError(
                "The block for uneven inputs was entered inside `no_sync` or `LocalSGD`, where a model exchanges no "
                "gradients for a rank that is through to stand in for. Enter it outside."
            )
        if self._joining:
            raise ConfigError(
                "The block for uneven inputs was entered inside another one, and a rank leaves only once. "
                "Enter one block, with all models."
            )
        return wrapped

    def unwrap(self, model: nn.Module) -> nn.Module:
        inner = super().unwrap(model)
        return super().unwrap(inner.module) if isinstance(inner, DistributedDataParallel) else inner

    def _wrap(self, model: nn.Module) -> nn.Module:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            return model  # DDP refuses a model without gradients, and there is nothing to average
        device = self.process.device
        # Only what differs from torch's own default is passed: some names are deprecated in newer versions.
        given = {name: getattr(self.options, name) for name in _DDP_ARGUMENTS}
        default = DistributedDataParallelKwargs()
        wrapped = DistributedDataParallel(
            model,
            device_ids=[device] if device.index is not None else None,
            **{name: value for name, value in given.items() if value != getattr(default, name)},
        )
        self._register_hook(wrapped)
        if not self.options.find_unused_parameters and not self.options.static_graph:
            self._unproven.append(weakref.ref(wrapped))
        return wrapped

    def _prove(self, optimizer: Optimizer) -> None:
        """Look at the first exchange of each model that `optimizer` steps; DDP itself tells only in the next forward.

        A bucket with a missing gradient is never exchanged, and the others in it stay those of this rank alone.
        """
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for reference in list(self._unproven):
            model = reference()
            if model is not None and not self._is_proven(model, stepped):
                continue
            self._unproven.remove(reference)

    def _is_proven(self, model: DistributedDataParallel, stepped: set[int]) -> bool:
        if not model.require_backward_grad_sync or not any(id(each) in stepped for each in model.parameters()):
            return False
        trained = [(name, each) for name, each in model.module.named_parameters() if each.requires_grad]
        missing = [name for name, each in trained if each.grad is None]
        try:
            model._check_reducer_finalized()  # type: ignore[no-untyped-call, unused-ignore]
        except RuntimeError as error:
            raise _without_gradient(model, missing, self.process.topology.rank) from error
        return len(missing) < len(trained)

    def _register_hook(self, wrapped: DistributedDataParallel) -> None:
        kinds, hook, wrapper = DDPCommunicationHookType, self.options.comm_hook, self.options.comm_wrapper
        if hook is kinds.NO and wrapper is kinds.NO:
            return
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

        state: Any = None
        if hook in (kinds.POWER_SGD, kinds.BATCHED_POWER_SGD):
            state = powerSGD_hook.PowerSGDState(process_group=None, **self.options.comm_state_option)
        function: Any = {
            kinds.NO: default_hooks.allreduce_hook,
            kinds.FP16: default_hooks.fp16_compress_hook,
            kinds.BF16: default_hooks.bf16_compress_hook,
            kinds.POWER_SGD: powerSGD_hook.powerSGD_hook,
            kinds.BATCHED_POWER_SGD: powerSGD_hook.batched_powerSGD_hook,
        }[hook]
        if wrapper is kinds.FP16:
            function = default_hooks.fp16_compress_wrapper(function)
        elif wrapper is kinds.BF16:
            function = default_hooks.bf16_compress_wrapper(function)
        try:
            wrapped.register_comm_hook(state, function)
        except TypeError as error:
            raise ConfigError(
                f"`comm_hook={hook.value!r}` with `comm_wrapper={wrapper.value!r}` cannot be used on "
                f"{self.process.device} with the {dist.get_backend()} backend ({error}). Use fp16, or leave it out."
            ) from error


def _without_gradient(model: DistributedDataParallel, names: Sequence[str], rank: int) -> ConfigError:
    shown = ", ".join(f"`{name}`" for name in names[:5]) or "Some parameters"
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ConfigError(
        f"{shown}{more} of {type(model.module).__name__} got no gradient in the backward before the first step on rank "
        f"{rank}, and DDP then leaves the gradients around them unexchanged, so that the ranks would part. Freeze what "
        f"is not used with `requires_grad_(False)` before `prepare`, or, where it changes what is used, set "
        f"`DistributedDataParallelKwargs(find_unused_parameters=True)`."
    )
