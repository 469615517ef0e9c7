"""Device maps of a model: inferred, and the memory that makes them even."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from accel_bigmodel.placing.census import census
from accel_bigmodel.placing.kept import kv_of_layers
from accel_bigmodel.placing.memory import DeviceMap, get_max_memory, place_key
from accel_bigmodel.placing.plan import Plan, plan_device_map
from accel_bigmodel.placing.search import Strategy
from accel_bigmodel.placing.workload import Machine, Workload

__all__ = ["get_balanced_memory", "infer_auto_device_map", "plan_model"]


def infer_auto_device_map(
    model: nn.Module,
    max_memory: Mapping[int | str, int | str] | None = None,
    no_split_module_classes: Iterable[str] | str | None = None,
    dtype: torch.dtype | str | None = None,
    special_dtypes: Mapping[str, torch.dtype | str] | None = None,
    verbose: bool = False,
    clean_result: bool = True,
    offload_buffers: bool = False,
    fallback_allocation: bool = False,
    *,
    strategy: Strategy = "auto",
    main_device: int | str | torch.device | None = None,
    workload: Workload | None = None,
    machine: Machine | None = None,
    tied_parameters: Iterable[Sequence[str]] | None = None,
) -> DeviceMap:
    """Where the modules of a model should lie: on accelerators, in host memory (``"cpu"``), or on ``"disk"``.

    What lies on accelerators stays there; the rest is streamed to the main device in each forward, which has room for
    that. Without an accelerator in `max_memory`, ``"cpu"`` computes what lies there and what is read from disk.
    Modules of a repeated class stay whole and tied parameters stay together. Nothing is moved, no value is read and no
    device is touched, so the model may be on the meta device and `max_memory` that of another machine.

    Args:
        model: any module.
        max_memory: bytes by place, see `get_max_memory`. What fits in none of these goes to the disk, unless
            ``"disk"`` is given a limit too. Default: what this machine has free.
        no_split_module_classes: classes of modules that stay whole. By default those that the model names itself, else
            its repeated blocks; an empty list splits down to modules without parts.
        dtype: to which floating-point tensors will be converted on loading. Default: as they are.
        special_dtypes: exceptions from that by the name of a tensor.
        verbose: print what lies where and why, as `explain_device_map` does.
        clean_result: name the largest modules that lie in one place as a whole; ``False`` names every layer.
        offload_buffers: whether buffers of streamed modules are streamed too; by default they lie on the main device.
        fallback_allocation: with ``sequential``, place what is behind a module too large for every device on devices
            nevertheless. The other strategies always do.
        strategy: ``auto`` is the fastest by prediction, and among those of equal time the one that fills devices most
            evenly: without a `workload`, all devices take part alike. ``balanced`` streams as little as possible and
            fills all devices alike; ``balanced_low_0`` too, but leaves the first as empty as possible, for what
            generation needs there; ``sequential`` fills one device after the other.
        main_device: where streamed modules run; by default the first device.
        workload: what memory and time are planned for: activations and the KV cache are counted besides weights.
        machine: speeds for the prediction; defaults are assumptions, see `Machine`.
        tied_parameters: groups of names of tensors that will be one after loading, besides those that are one already.

    Raises:
        ConfigError: if nothing fits, with sizes, or an argument makes no sense.
    """
    plan = plan_model(
        model,
        max_memory,
        no_split_module_classes=no_split_module_classes,
        dtype=dtype,
        special_dtypes=special_dtypes,
        offload_buffers=offload_buffers,
        fallback_allocation=fallback_allocation,
        strategy=strategy,
        main_device=main_device,
        workload=workload,
        machine=machine,
        tied_parameters=tied_parameters,
    )
    if verbose:
        from accel_bigmodel.placing.explain import Explanation

        print(Explanation(plan=plan, title=type(model).__name__))
    return plan.device_map(clean=clean_result)


def plan_model(
    model: nn.Module,
    max_memory: Mapping[int | str, int | str] | None = None,
    *,
    no_split_module_classes: Iterable[str] | str | None = None,
    dtype: torch.dtype | str | None = None,
    special_dtypes: Mapping[str, torch.dtype | str] | None = None,
    offload_buffers: bool = False,
    fallback_allocation: bool = False,
    strategy: Strategy = "auto",
    main_device: int | str | torch.device | None = None,
    workload: Workload | None = None,
    machine: Machine | None = None,
    tied_parameters: Iterable[Sequence[str]] | None = None,
) -> Plan:
    """The plan behind a device map, with what it costs. Arguments and errors are those of `infer_auto_device_map`."""
    chain = census(
        model,
        no_split_module_classes=no_split_module_classes,
        dtype=dtype,
        special_dtypes=special_dtypes,
        tied_parameters=tied_parameters,
    )
    return plan_device_map(
        chain,
        get_max_memory(max_memory),
        strategy=strategy,
        main=None if main_device is None else place_key(main_device, setting="main_device"),
        workload=workload,
        machine=machine,
        offload_buffers=offload_buffers,
        kv_bytes=kv_of_layers(chain, getattr(model, "config", None), workload),
        around_large=fallback_allocation or strategy != "sequential",
    )


def get_balanced_memory(
    model: nn.Module,
    max_memory: Mapping[int | str, int | str] | None = None,
    no_split_module_classes: Iterable[str] | str | None = None,
    dtype: torch.dtype | str | None = None,
    special_dtypes: Mapping[str, torch.dtype | str] | None = None,
    low_zero: bool = False,
) -> dict[int | str, int]:
    """`max_memory` cut down so that filling one device after the other fills them evenly.

    The last device keeps its whole budget, for what is added later. `infer_auto_device_map` with the strategies
    ``balanced`` and ``balanced_low_0`` does the same in one call.

    Args:
        model: as for `infer_auto_device_map`.
        max_memory: likewise.
        no_split_module_classes: likewise.
        dtype: likewise.
        special_dtypes: likewise.
        low_zero: whether the first device takes only what the others have no room for.
    """
    budgets = get_max_memory(max_memory)
    plan = plan_model(
        model,
        budgets,
        no_split_module_classes=no_split_module_classes,
        dtype=dtype,
        special_dtypes=special_dtypes,
        strategy="balanced_low_0" if low_zero else "balanced",
    )
    computing = plan.problem.places[: plan.problem.num_computing]
    uses = {use.place: use.used_bytes for use in plan.prediction.uses}
    return {place: uses[place] if place in computing[:-1] else size for place, size in budgets.items()}
