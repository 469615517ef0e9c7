"""Matrices divided over ranks by DeepSpeed's AutoTP: what it can divide, which rank has what, and putting it together.

AutoTP replaces the linear layers of a model by its own, each of which holds a part of the weight, and keeps the names.
What it leaves whole, such as norms, every rank has; their gradients are alike as long as inputs and dropout are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from accel_state.errors import ConfigError

__all__ = ["Division", "ReplicaAudit", "TensorDivision", "check_tensor_parallel"]

_META = "ds_autotp_universal_checkpoint_meta"
"""Where AutoTP notes at a parameter how it was cut."""


@dataclass(frozen=True, slots=True)
class Division:
    """How ranks divide one tensor: into blocks along a dimension, of each of which every rank has a run. Pure."""

    shape: tuple[int, ...]
    """Of the whole, a matrix or a vector."""
    view: tuple[int, ...]
    """As which it is cut."""
    dim: int
    """Of `view`, along which it is."""
    widths: tuple[tuple[int, ...], ...]
    """For each block, such as one of three fused projections, how much each rank has of it."""

    def part_shape(self, rank: int) -> tuple[int, ...]:
        """Of what one rank holds."""
        sizes = list(self.view)
        sizes[self.dim] = sum(block[rank] for block in self.widths)
        return self._flattened(sizes)

    def part(self, whole: torch.Tensor, rank: int) -> torch.Tensor:
        """What one rank holds of a tensor, a copy."""
        blocks = torch.split(whole.reshape(self.view), [sum(block) for block in self.widths], dim=self.dim)
        runs = zip(blocks, self.widths, strict=True)
        own = [torch.split(block, list(widths), dim=self.dim)[rank] for block, widths in runs]
        return torch.cat(own, dim=self.dim).reshape(self.part_shape(rank))

    def whole(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensor from what the ranks hold, in order of rank: the inverse of `part`."""
        cut = []
        for rank, part in enumerate(parts):
            sizes = list(self.view)
            sizes[self.dim] = sum(block[rank] for block in self.widths)
            cut.append(torch.split(part.reshape(sizes), [block[rank] for block in self.widths], dim=self.dim))
        return torch.cat([run for block in zip(*cut, strict=True) for run in block], dim=self.dim).reshape(self.shape)

    def _flattened(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """The shape in which a part of `view` is held: matrices keep their last dimension, the rest is one."""
        return (prod(sizes),) if len(self.shape) == 1 else (prod(sizes[:-1]), sizes[-1])


class TensorDivision:
    """What AutoTP made of one model, asked parameter by parameter."""

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: inside an engine that was made with ``tensor_parallel.autotp_size``.

        Raises:
            ConfigError: for a layer whose parts cannot be put together.
        """
        self.group: dist.ProcessGroup | None = None
        """The ranks that share each matrix; ``None`` where AutoTP divided nothing."""
        self._divisions: dict[int, Division] = {}
        for name, parameter, group in _divided(model):
            self.group = group
            self._divisions[id(parameter)] = _division_of(name, parameter)

    def __bool__(self) -> bool:
        return self.group is not None

    def of(self, parameter: torch.Tensor) -> Division | None:
        """How a parameter is divided; ``None`` where every rank has all of it."""
        return self._divisions.get(id(parameter))

    def shape_of(self, parameter: torch.Tensor) -> torch.Size:
        """The shape of all of it."""
        division = self.of(parameter)
        return torch.Size(getattr(parameter, "ds_shape", parameter.shape) if division is None else division.shape)

    def gather(self, parameter: torch.Tensor, held: torch.Tensor) -> torch.Tensor:
        """Every rank along tp must call this. All of a tensor from what each holds of it.

        Args:
            parameter: by which it is divided.
            held: this rank's part of the parameter, its gradient, or a state of its optimizer.
        """
        division = self.of(parameter)
        if division is None:
            return held
        assert self.group is not None
        shapes = [division.part_shape(rank) for rank in range(self.group.size())]
        longest = max(prod(shape) for shape in shapes)
        own = held.detach().reshape(-1)
        padded = torch.cat([own, own.new_zeros(longest - own.numel())]) if own.numel() < longest else own.contiguous()
        rows = [torch.empty_like(padded) for _ in shapes]
        dist.all_gather(rows, padded, group=self.group)
        return division.whole([row[: prod(shape)].view(shape) for row, shape in zip(rows, shapes, strict=True)])

    def cut(self, parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a tensor: the inverse of `gather`."""
        division = self.of(parameter)
        if division is None:
            return whole
        assert self.group is not None
        return division.part(whole, self.group.rank())


class ReplicaAudit:
    """Compares, once, the gradients of parameters that every rank along tp has whole.

    They differ where inputs do, or dropout drops others, and from then on so would the parameters, without a trace.
    """

    def __init__(self, model: nn.Module, division: TensorDivision) -> None:
        """Watches the next backward of the model."""
        self._division = division
        self._names: list[str] = []
        self._prints: dict[str, torch.Tensor] = {}
        self._hooks = []
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and division.of(parameter) is None:
                self._names.append(name)
                self._hooks.append(parameter.register_hook(self._noting(name)))  # type: ignore[no-untyped-call]

    def verify(self) -> bool:
        """Every rank along tp must call this, after a backward. Whether there was anything to compare by then.

        Raises:
            ConfigError: naming the parameter whose gradients differ most.
        """
        if not self._prints or self._division.group is None:
            return False
        for hook in self._hooks:
            hook.remove()
        nothing = torch.tensor([-1.0, 0.0], dtype=torch.float64)
        own = torch.stack([self._prints.get(name, nothing.to(self._device)) for name in self._names])
        rows = [torch.empty_like(own) for _ in range(self._division.group.size())]
        dist.all_gather(rows, own, group=self._division.group)
        everybody = torch.stack(rows)  # (ranks, parameters, 2)
        spread = (everybody.amax(0) - everybody.amin(0)).amax(1)
        worst = int((spread / everybody.abs().amax((0, 2)).clamp(min=1e-12)).argmax())
        if float(spread[worst]) > _AGREES * float(everybody[:, worst].abs().max()):
            raise ConfigError(
                f"Gradients of `{self._names[worst]}`, which every tensor-parallel rank has whole, differ from rank to "
                f"rank, so that its copies would part. Give these ranks the same batches, and the same random state "
                f"where there is dropout (`set_seed(seed)` on all of them), or set the dropout to 0."
            )
        return True

    @property
    def _device(self) -> torch.device:
        return next(iter(self._prints.values())).device

    def _noting(self, name: str) -> Any:
        def note(gradient: torch.Tensor) -> None:
            exact = gradient.detach().double()
            self._prints[name] = self._prints.get(name, 0.0) + torch.stack([exact.sum(), exact.norm()])

        return note


_AGREES = 1e-3
"""Largest difference, relative, of two copies of a gradient that were computed from the same numbers."""


def check_tensor_parallel(model: nn.Module, section: Mapping[str, Any]) -> None:
    """Refuse a model that AutoTP could not divide, and groups other than those that DeepSpeed keeps. Changes nothing.

    Args:
        model: before it is divided.
        section: ``tensor_parallel`` of the configuration; empty without AutoTP.

    Raises:
        ConfigError: saying which, and what to do.
    """
    size = int(section.get("autotp_size") or 1)
    _check_groups(size)
    if size == 1:
        return
    name = type(model).__name__
    if any(hasattr(parameter, "ds_tensor") for parameter in model.parameters()):
        raise ConfigError(
            f"`{name}` was divided while it was built (ZeRO stage 3), and AutoTP (`autotp_size={size}`) would replace "
            f"parameters that the optimizer holds. Build it whole (`zero3_init_flag=False`)."
        )
    if section.get("partition_config") or section.get("preset_model"):
        return
    from deepspeed.module_inject.auto_tp import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
        AutoTP,
    )
    from deepspeed.module_inject.tp_plan_converter import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
        TPPlanConverter,
    )

    try:
        plan = _plan_of(model)
        if not plan or TPPlanConverter.convert(plan) is None:
            AutoTP.tp_parser(model)
    except (AssertionError, ValueError) as error:
        raise ConfigError(
            f"DeepSpeed's AutoTP (`autotp_size={size}`) does not know how to divide `{name}`: {error} Give "
            f"`tensor_parallel.partition_config` in DeepSpeed's configuration, or take FSDP, whose `tp_plan` divides "
            f"any model."
        ) from error


def _plan_of(model: nn.Module) -> dict[str, str]:
    """Styles by pattern that a model of transformers brings, in its configuration, its class and itself."""
    found: dict[str, str] = {}
    for plan in (
        getattr(getattr(model, "config", None), "base_model_tp_plan", None),
        getattr(type(model), "_tp_plan", None),
        model.__dict__.get("_tp_plan"),
    ):
        if isinstance(plan, dict):
            found.update(plan)
    return found


def _check_groups(size: int) -> None:
    """DeepSpeed makes groups for AutoTP once in a process, and takes them for every engine from then on."""
    from deepspeed.utils import groups  # type: ignore[import-not-found,import-untyped,unused-ignore]

    kept = groups._TENSOR_MODEL_PARALLEL_GROUP
    before = 1 if kept is None else dist.get_world_size(kept)
    if kept is not None and before != size:
        raise ConfigError(
            f"This process trained with `autotp_size={before}` before, and DeepSpeed keeps its groups for every engine "
            f"from then on, so that `autotp_size={size}` would be taken for {before}. Use the same for all models of a "
            f"process, or another process."
        )
    if kept is None and size > 1 and groups._WORLD_GROUP is not None:
        raise ConfigError(
            f"This process has models that DeepSpeed trains without AutoTP, and `autotp_size={size}` would change the "
            f"groups that it averages them over. Use one `autotp_size` for all models of a process, or another process."
        )


def _divided(model: nn.Module) -> Iterator[tuple[str, torch.Tensor, dist.ProcessGroup]]:
    seen: set[int] = set()
    for name, module in model.named_modules():
        group = getattr(module, "mp_group", None)
        if group is None:
            continue
        for key, parameter in module.named_parameters(recurse=False):
            meta = getattr(parameter, _META, None)
            if meta is not None and not meta.get("replicated") and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{name}.{key}", parameter, group


def _division_of(name: str, parameter: torch.Tensor) -> Division:
    meta = getattr(parameter, _META)
    whole, view = meta["conversion"]["original_shape"], meta["logical_shape"]
    widths = meta["sub_param_shard_widths"] or (meta["partition_sizes"] and [meta["partition_sizes"]])
    if meta["conversion"]["unsupported_reason"] or not widths or meta["partition_dim"] is None or not whole:
        reason = meta["conversion"]["unsupported_reason"] or "where its parts come from is not noted"
        raise ConfigError(
            f"`{name}` was divided by DeepSpeed's AutoTP in a way that cannot be put together to save it ({reason}). "
            f"Give `tensor_parallel.partition_config` for it in DeepSpeed's configuration, or use `tp_size=1`."
        )
    return Division(
        shape=tuple(whole),
        view=tuple(view or whole),
        dim=int(meta["partition_dim"]),
        widths=tuple(tuple(int(width) for width in block) for block in widths),
    )
