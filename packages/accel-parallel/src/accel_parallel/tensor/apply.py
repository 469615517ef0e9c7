"""Tensor parallel: each matrix of a plan divided over ranks that see the same data (Megatron-LM, arXiv:1909.08053)."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.modules.dropout import _DropoutNd

from accel_parallel.tensor.layers import all_gather, divide_module, localize_module
from accel_parallel.tensor.plan import TensorPlan
from accel_state.errors import ConfigError
from accel_state.tree import tensor_leaves

__all__ = ["FirstInputs", "apply_tensor_parallel", "audit_replicas"]

_TOLERANCE = 1e-3
"""Relative difference of gradients that a device's order of summation may explain, also in 16 bits."""


def apply_tensor_parallel(model: nn.Module, plan: TensorPlan, tp_mesh: DeviceMesh) -> None:
    """Divide `model` in place as `plan` says. Every rank must call this, before `fully_shard`.

    Every parameter becomes a `DTensor` on `tp_mesh`, also those that stay whole, so that norms and optimizers see one
    mesh. Tied parameters stay one parameter. Values are those of the first rank along `tp_mesh`, buffers too, as data
    parallel takes them from rank 0: a model that was initialised without a common seed would else be no model at all.
    Parameters on the CPU move to the mesh's device one by one, and only the rank's part stays there; those on the meta
    device stay there. Modules keep taking and giving plain tensors.

    Args:
        model: the module that `plan` was made for.
        plan: what `plan_tensor_parallel` gave.
        tp_mesh: the ranks that share each matrix, along one axis.

    Raises:
        ConfigError: for another mesh or model than the plan's, and for dropout that would differ between the ranks.
    """
    _refuse_other(model, plan, tp_mesh)
    _refuse_other_masks(model, tp_mesh)
    _distribute(model, plan, tp_mesh)
    _install(model, plan, tp_mesh)
    _share_buffers(model, tp_mesh)


def audit_replicas(model: nn.Module, plan: TensorPlan, tp_mesh: DeviceMesh) -> None:
    """Compare the gradients of undivided parameters along `tp_mesh`. Every rank must call this, after a backward.

    One small exchange. It finds what no plan shows: dropout with other masks, data that differ, and modules that act
    inside a divided part unknown to the plan. Worth one call after the first backward.

    Raises:
        ConfigError: naming the parameter whose gradients differ most.
    """
    names = [name for name, each in plan.parameters.items() if each.dim is None]
    parameters = dict(model.named_parameters())
    if not names:
        return
    own = torch.stack([_summary(parameters[name].grad) for name in names])  # (parameters, 2)
    everybody = own.new_empty((tp_mesh.size() * len(names), 2))
    all_gather(everybody, own.to(tp_mesh.device_type), group=tp_mesh.get_group())
    values = everybody.view(tp_mesh.size(), len(names), 2)
    apart = (values.amax(0) - values.amin(0)).amax(-1)
    relative = (apart / values[..., 1].amax(0).clamp_min(torch.finfo(values.dtype).tiny)).tolist()
    worst = max(range(len(names)), key=relative.__getitem__)
    if relative[worst] > _TOLERANCE:
        raise ConfigError(
            f"The gradient of `{names[worst]}` differs between tensor-parallel ranks by {relative[worst]:.1%}, and "
            f"every rank holds this parameter whole: they would drift apart. Give these ranks the same data and seed; "
            f"or, if the parameter acts inside a divided part, add its module to the plan as "
            f"'replicated_with_grad_allreduce'."
        )


class FirstInputs:
    """The integers, such as tokens and labels, that a model is first called with, to be compared along tp.

    A table divided by rows adds up what each rank looked up, so that ranks with other tokens go on with one mixture of
    both, and no gradient tells.
    """

    def __init__(self, model: nn.Module) -> None:
        self._digest = 0
        self._name = type(model).__name__
        self._handle = model.register_forward_pre_hook(self._look, with_kwargs=True)

    def refuse_other(self, tp_mesh: DeviceMesh) -> None:
        """Every rank must call this, once. One small exchange.

        Raises:
            ConfigError: if they differ between ranks.
        """
        self._handle.remove()
        own = torch.tensor([self._digest], device=tp_mesh.device_type)
        everybody = own.new_empty(tp_mesh.size())
        all_gather(everybody, own, group=tp_mesh.get_group())
        if not torch.equal(everybody, own.expand(tp_mesh.size())):
            raise ConfigError(
                f"`{self._name}` was called with other tokens or labels on one tensor-parallel rank than on another, "
                f"which compute parts of one result. Give these ranks the same batches, as a prepared loader does."
            )

    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._digest:
            for tensor in tensor_leaves([args, kwargs]):
                if not tensor.is_floating_point() and not tensor.is_complex():
                    values = tensor.detach().to("cpu", torch.int64).contiguous().numpy()
                    self._digest = zlib.crc32(values.tobytes(), self._digest)


def _summary(gradient: torch.Tensor | None) -> torch.Tensor:
    """Sum and norm of what this rank holds; (-1, 0) for no gradient."""
    if gradient is None:
        return torch.tensor([-1.0, 0.0])
    local = (gradient.to_local() if isinstance(gradient, DTensor) else gradient).detach().float()
    return torch.stack([local.sum(), local.norm()]).cpu()


def _refuse_other(model: nn.Module, plan: TensorPlan, tp_mesh: DeviceMesh) -> None:
    if tp_mesh.ndim != 1 or tp_mesh.size() != plan.tp_size:
        raise ConfigError(
            f"The plan divides over {plan.tp_size} ranks, and the mesh has shape {tuple(tp_mesh.shape)}. Make the plan "
            f"with `tp_size={tp_mesh.size()}`, or pass the mesh's tensor-parallel axis alone."
        )
    for name, parameter in model.named_parameters():
        planned = plan.parameters.get(name)
        if planned is None or planned.shape != tuple(parameter.shape) or isinstance(parameter, DTensor):
            found = "a DTensor already" if isinstance(parameter, DTensor) else f"of shape {tuple(parameter.shape)}"
            raise ConfigError(
                f"`{name}` is {found}, and the plan knows it "
                f"{f'as {planned.shape}' if planned else 'not at all'}. Make the plan for this very model, and apply "
                f"it once, before anything else wraps it."
            )


def _refuse_other_masks(model: nn.Module, tp_mesh: DeviceMesh) -> None:
    """Dropout between the divided parts must drop the same on all ranks, or their copies are no copies."""
    name = next(_dropouts(model), None)
    if name is None:
        return
    device = tp_mesh.device_type
    module = getattr(torch, device, None)
    states = [torch.get_rng_state()] + ([module.get_rng_state()] if device != "cpu" and module is not None else [])
    own = torch.tensor([zlib.crc32(state.cpu().numpy().tobytes()) for state in states], device=device)
    everybody = own.new_empty(tp_mesh.size() * len(states))
    all_gather(everybody, own, group=tp_mesh.get_group())
    if not torch.equal(everybody.view(tp_mesh.size(), -1), own.expand(tp_mesh.size(), -1)):
        raise ConfigError(
            f"`{name}` drops activations, and tensor-parallel ranks have different random states: each would drop "
            f"others, and their copies of one activation would differ. Seed these ranks alike (for example "
            f"`set_seed(seed)`, or `seed + data_rank`), or set the dropout to 0."
        )


def _dropouts(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, _DropoutNd) and module.p > 0:
            yield name or "dropout"
        for key, value in vars(module).items():
            if "dropout" in key and isinstance(value, float) and value > 0:
                yield f"{name}.{key}" if name else key


def _distribute(model: nn.Module, plan: TensorPlan, tp_mesh: DeviceMesh) -> None:
    dims = {id(parameter): plan.parameters[name].dim for name, parameter in model.named_parameters()}
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # the old one is kept, or its id might be another's
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                dim = dims[id(parameter)]
                placement = Replicate() if dim is None else Shard(dim)
                whole = parameter.detach().contiguous()
                part = distribute_tensor(whole, tp_mesh, [placement])
                new = nn.Parameter(part, requires_grad=parameter.requires_grad)
                new.__dict__.update(parameter.__dict__)
                made[id(parameter)] = parameter, new
            module._parameters[key] = made[id(parameter)][1]


def _install(model: nn.Module, plan: TensorPlan, tp_mesh: DeviceMesh) -> None:
    """Hooks on every module that holds parameters, and each rank's part of the numbers that the plan divides."""
    summed = [name for name, style in chain(plan.modules.items(), plan.values.items()) if style.sums_gradients]
    styles = {id(model.get_submodule(name)): style for name, style in plan.modules.items()}
    for name, module in model.named_modules():
        style = styles.get(id(module))
        if style is not None and style.divides:
            divide_module(module, style, tp_mesh)
        elif not isinstance(module, (nn.ParameterList, nn.ParameterDict)):
            prefix = f"{name}." if name else ""
            own = [key for key, _ in module.named_parameters() if key.count(".") < 2]
            if own:
                localize_module(module, {key for key in own if _lies_in(f"{prefix}{key}", summed)}, tp_mesh)
    for name, style in plan.values.items():
        owner, key = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        value = getattr(owner, key)
        if isinstance(value, int) and style.divides:
            setattr(owner, key, value // plan.tp_size)


def _lies_in(name: str, parts: list[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def _share_buffers(model: nn.Module, tp_mesh: DeviceMesh) -> None:
    group = tp_mesh.get_group()
    source = dist.get_global_rank(group, 0)
    for buffer in model.buffers():
        if not buffer.is_meta:
            moved = buffer.detach().to(tp_mesh.device_type)
            dist.broadcast(moved, source, group=group)
            buffer.data.copy_(moved)
