"""``zero_stage="auto"``: the fastest stage of ZeRO that fits, by the cost model of ``parallelism="auto"``. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from accel_parallel.auto.hardware import Hardware
from accel_parallel.auto.layout import Workload
from accel_parallel.auto.optimizers import OptimizerCost
from accel_parallel.auto.plan import Candidate, Plan
from accel_parallel.auto.profile import Footprint, ModelProfile, UnitPass
from accel_parallel.auto.reasons import reasons_for
from accel_parallel.auto.remedy import refusal
from accel_parallel.deepspeed.stage_layout import LEAN, HostDevice, ZeroLayout, ZeroSizes
from accel_parallel.deepspeed.stage_search import StageSearch, stepping_costs
from accel_state.config import MixedPrecision
from accel_state.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim import Optimizer

__all__ = ["StagePlan", "ZeroSizes", "choose_stage"]

_RESERVE = 0.1
"""Part of a device's memory that is left alone, as by `select_plan`."""
_RESERVE_FOR_ACTIVATIONS = 0.5
"""The same where nothing says what activations take."""
_UNKNOWN = (
    "nothing says what the model is given, so activations and computation count as nothing, and half of the device's "
    "memory is left for them; `sequence_length` or `example_inputs`, and `batch_size`, would say more"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """A stage of ZeRO and what is offloaded, chosen by `choose_stage`. ``print(plan.explain())`` says why."""

    plan: Plan
    """Candidates with what is predicted for them, as of `select_plan`."""
    layout: ZeroLayout
    """The chosen one."""
    sizes: ZeroSizes
    """Buffers that it was chosen with."""

    @property
    def stage(self) -> int:
        """0 to 3."""
        return self.layout.stage

    @property
    def offload_optimizer(self) -> HostDevice:
        """Where optimizer states are."""
        return "cpu" if self.layout.optimizer_on_host else "none"

    @property
    def offload_param(self) -> HostDevice:
        """Where parameters are while they are not computed with."""
        return "cpu" if self.layout.params_on_host else "none"

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why this one, and why not the others."""
        return self.plan.reasons

    def explain(self) -> str:
        """All of it as text: what was planned for, the candidates as a table, the parts of the chosen one, and why."""
        sizes = (f"{name}={getattr(self.sizes, name):,}" for name in ZeroSizes.__dataclass_fields__)
        return (
            f"{self.plan.explain()}\n\noptimizer states hold the copy of the weights in float32 as well; buffers, in "
            f"elements: {', '.join(sizes)}"
        )


def choose_stage(
    model: nn.Module | ModelProfile,
    *,
    hardware: Hardware,
    world_size: int,
    precision: MixedPrecision,
    optimizer: str | OptimizerCost | Optimizer = "adamw",
    batch_size: int | None = None,
    sequence_length: int | None = None,
    example_inputs: torch.Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
    loss: Callable[[Any], torch.Tensor] | None = None,
    num_steps: int = 1,
    allow_offload: bool = True,
    offload_optimizer: HostDevice | None = None,
    offload_param: HostDevice | None = None,
    checkpointing: bool = False,
    reserve: float | None = None,
    sizes: ZeroSizes | None = None,
    device: torch.device | str = "cuda",
) -> StagePlan:
    """The fastest stage of ZeRO that is predicted to fit, the simpler one where two are equally fast.

    Stages divide to save memory. So one that needs no less than a simpler one is left out, even if it were faster, and
    more memory never gives a higher stage unless it spares offload. What is kept on the device is simpler than what is
    offloaded.

    Args:
        model: not prepared yet, may be on the meta device; or its profile, from `profile_model` or
            `transformer_profile`, which makes this pure.
        hardware: what it runs on, the same on every rank.
        world_size: number of processes.
        precision: mixed precision, in which DeepSpeed keeps the weights.
        optimizer: its name, the optimizer itself, or what it costs.
        batch_size: samples of a micro-batch on each process. Needed as soon as activations are known.
        sequence_length: tokens of a sample, for models of token ids.
        example_inputs: what forward takes, for other models. Without either only weights, gradients and optimizer
            states count, half of the memory is left for activations, and all communication waits.
        loss: gives the loss from what forward returns, as of `profile_model`.
        num_steps: micro-batches between two steps.
        allow_offload: whether host memory may be used where nothing else says so.
        offload_optimizer: where optimizer states are, if that is settled.
        offload_param: where parameters are, likewise.
        checkpointing: whether blocks are computed a second time in backward.
        reserve: part of the device's memory that is left alone; ``None``: a tenth, or half without activations.
        sizes: DeepSpeed's buffers; ``None``: its defaults.
        device: what the model is measured for, as of `profile_model`.

    Raises:
        ConfigError: if nothing fits, with what would help; for impossible sizes; or for a model that was divided while
            it was built.
    """
    profile = _profile(
        model, precision, sequence_length=sequence_length, example_inputs=example_inputs, loss=loss, device=device
    )
    is_known = profile.sharded != _nothing(len(profile.blocks))
    _check(world_size, is_known, batch_size, reserve)
    _check_devices({"offload_optimizer": offload_optimizer, "offload_param": offload_param})
    work = Workload(
        batch_size=1 if batch_size is None else batch_size,
        sequence_length=(sequence_length or profile.sequence_length or 1) if is_known else 1,
        accumulation_steps=num_steps,
    )
    if reserve is None:
        reserve = _RESERVE if is_known else _RESERVE_FOR_ACTIVATIONS
    whole, flat, on_host = stepping_costs(optimizer, hardware)
    search = StageSearch(
        profile=profile, hardware=hardware, work=work, optimizer=whole, reserve=reserve,
        host_reserve=min(reserve, _RESERVE), offload=allow_offload and hardware.host is not None,
        sizes=ZeroSizes() if sizes is None else sizes, flat=flat, on_host=on_host, offload_optimizer=offload_optimizer,
        offload_param=offload_param, checkpointing=checkpointing,
    )  # fmt: skip
    return _choose(search, world_size)


def _choose(search: StageSearch, world_size: int) -> StagePlan:
    everything = list(search.candidates(world_size))
    useful, left_out = search.useful(everything, world_size)
    candidates = sorted(useful, key=lambda each: (not each.fits, *each.rank))
    if not candidates or not candidates[0].fits:
        raise ConfigError(f"{refusal(search, world_size, everything)}{_more_advice(search, world_size)}")
    chosen = candidates[0]
    plan = Plan(
        chosen=chosen, candidates=tuple(candidates), profile=search.profile, hardware=search.hardware,
        work=search.work, optimizer=search.optimizer, limit_bytes=search.limit_bytes,
        reasons=(*_reasons(chosen, candidates), *left_out),
    )  # fmt: skip
    return StagePlan(plan=plan, layout=cast("ZeroLayout", chosen.layout), sizes=search.sizes)


def _reasons(chosen: Candidate, candidates: Sequence[Candidate]) -> tuple[str, ...]:
    """Why not what is simpler, and why not the next best."""
    simpler = [each.layout for each in candidates if each.layout.simplicity < chosen.layout.simplicity]
    following = [each.layout for each in candidates[1:2] if each.fits]
    return reasons_for(chosen, candidates, neighbours=[*sorted(simpler, key=lambda each: each.simplicity), *following])


def _more_advice(search: StageSearch, world_size: int) -> str:
    """What else would do where nothing fits."""
    advice = ""
    if not search.checkpointing and _fits(replace(search, checkpointing=True), world_size):
        advice += " Computing blocks a second time in backward, by checkpointing their activations, would do as well."
    if _fits(replace(search, sizes=LEAN), world_size):
        named = (
            f"`{name}={getattr(LEAN, name)}`"
            for name in ZeroSizes.__dataclass_fields__
            if getattr(LEAN, name) < getattr(search.sizes, name)
        )
        advice += f" So would smaller buffers of DeepSpeed: {', '.join(named)} in `zero_optimization`."
    return advice


def _fits(search: StageSearch, world_size: int) -> bool:
    return any(each.fits for each in search.candidates(world_size))


def _check(world_size: int, is_known: bool, batch_size: int | None, reserve: float | None) -> None:
    if not isinstance(world_size, int) or isinstance(world_size, bool) or world_size < 1:
        raise ConfigError(f"`world_size={world_size!r}` leaves no process to plan for. Give a positive integer.")
    if reserve is not None and not 0 <= reserve < 1:
        raise ConfigError(f"`reserve={reserve!r}` is no part of a device's memory. Give 0 or more, and less than 1.")
    if is_known and batch_size is None:
        raise ConfigError(
            "`zero_stage='auto'` knows what a sample takes, and not how many samples a process computes at once. "
            "Give `batch_size`, such as that of the loader."
        )


def _check_devices(settled: Mapping[str, str | None]) -> None:
    for name, device in settled.items():
        if device not in (None, "none", "cpu"):
            raise ConfigError(
                f"`zero_stage='auto'` compares memory of devices and hosts, and `{name}` is settled to be {device!r}. "
                f"Set `zero_stage` yourself, or offload to 'cpu'."
            )


def _profile(
    model: nn.Module | ModelProfile,
    precision: MixedPrecision,
    *,
    sequence_length: int | None,
    example_inputs: Any,
    loss: Any,
    device: Any,
) -> ModelProfile:
    if isinstance(model, ModelProfile):
        if model.precision != precision:
            raise ConfigError(
                f"`precision={precision!r}` and a profile of {model.name} for precision {model.precision!r} were "
                f"given. Profile it again with `precision={precision!r}`."
            )
        if example_inputs is not None or loss is not None:
            raise ConfigError(
                f"`example_inputs` and `loss` have no effect: the profile of {model.name} says what a sample takes. "
                f"Leave them out, or pass the model instead."
            )
        if sequence_length is not None and model.sequence_length is None:
            raise ConfigError(
                f"`sequence_length={sequence_length}` has no effect: `{model.name}` was measured with samples that "
                f"have no length of their own. Leave it out, or profile the model with a `sequence_length`."
            )
        return model
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ConfigError(
            f"`zero_stage='auto'` was to choose a stage for {type(model).__name__}, which was divided while it was "
            f"built, as only stage 3 does. Set `zero_stage=3`, or build the model whole."
        )
    if sequence_length is None and example_inputs is None:
        return _states_only(model, precision)
    from accel_parallel.auto.examine import profile_model

    return profile_model(
        model, sequence_length=sequence_length, example_inputs=example_inputs, loss=loss, precision=precision,
        device=device,
    )  # fmt: skip


def _states_only(model: nn.Module, precision: MixedPrecision) -> ModelProfile:
    from accel_parallel.auto.census import take_census

    census = take_census(model)
    nothing = _nothing(len(census.kinds))
    return ModelProfile(
        name=type(model).__name__, root=census.root, blocks=census.kinds, whole=nothing, sharded=nothing,
        precision=precision, dtype=census.dtype, buffer_bytes=census.buffer_bytes, tied_share=census.tied_share,
        hidden_size=census.hidden_size,
        notes=(_UNKNOWN,),
    )  # fmt: skip


def _nothing(kinds: int) -> Footprint:
    """Of a micro-batch that nobody knows."""
    return Footprint(blocks=(UnitPass(),) * kinds)
