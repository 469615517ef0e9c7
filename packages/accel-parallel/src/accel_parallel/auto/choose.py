"""`parallelism="auto"`: from sizes to the fastest plan that fits. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from accel_parallel.auto.cost import predict_time
from accel_parallel.auto.hardware import Hardware
from accel_parallel.auto.layout import Workload
from accel_parallel.auto.optimizers import OptimizerCost, optimizer_cost
from accel_parallel.auto.plan import Candidate, Plan
from accel_parallel.auto.profile import ModelProfile
from accel_parallel.auto.reasons import reasons_for
from accel_parallel.auto.remedy import refusal
from accel_parallel.auto.search import Search
from accel_state.errors import ConfigError

__all__ = ["select_plan"]


def select_plan(
    profile: ModelProfile,
    hardware: Hardware,
    *,
    world_size: int,
    batch_size: int,
    sequence_length: int | None = None,
    gradient_accumulation_steps: int = 1,
    optimizer: str | OptimizerCost = "adamw",
    reserve: float = 0.1,
    offload: bool = True,
    tensor_parallel: bool = True,
) -> Plan:
    """The fastest plan whose predicted memory fits, the simpler one where two are equally fast.

    Pure: the same arguments give the same plan on every rank, and no process is needed. Candidates are one process or
    DDP; sharding over all or some of the processes, copies of that over the rest (HSDP), with and without resharding;
    tensor parallel within a node inside of these; each with and without activation checkpointing, and sharded ones with
    and without offload to the host. They are compared by seconds a sample, as all of them see the same samples in some
    order; tensor parallel takes fewer at once, since its ranks share theirs.

    Args:
        profile: what the model costs, from `profile_model` or `transformer_profile`.
        hardware: what it runs on, from `detect_hardware` or by hand.
        world_size: number of processes.
        batch_size: samples of a micro-batch on each process that sees data of its own, as the loader gives them.
        sequence_length: tokens of a sample; by default those of the profile.
        gradient_accumulation_steps: micro-batches between two steps.
        optimizer: its name, or what it costs (`optimizer_cost` of one that exists).
        reserve: part of the device's memory that is left alone, for the driver's context, for buffers of collectives
            and for what allocators lose between blocks.
        offload: whether parameters may be kept in host memory.
        tensor_parallel: whether matrices may be divided.

    Raises:
        ConfigError: if nothing fits, with the least memory that would do and what would help; or for impossible sizes.
    """
    _check(world_size, reserve)
    work = Workload(
        batch_size=batch_size,
        sequence_length=_length(profile, sequence_length),
        accumulation_steps=gradient_accumulation_steps,
    )
    cost = optimizer_cost(optimizer)
    if not hardware.steps_at_once:
        cost = replace(cost, step_extra=0.0)
    if not tensor_parallel:
        profile = replace(profile, tp_sizes=())
    search = Search(
        profile=profile, hardware=hardware, work=work, optimizer=cost, reserve=reserve,
        offload=offload and hardware.host is not None,
    )  # fmt: skip
    candidates = sorted(_candidates(search, world_size), key=lambda each: (not each.fits, *each.rank))
    chosen = candidates[0]
    if not chosen.fits:
        raise ConfigError(refusal(search, world_size, candidates))
    return Plan(
        chosen=chosen, candidates=tuple(candidates), profile=profile, hardware=hardware, work=work, optimizer=cost,
        limit_bytes=search.limit_bytes, reasons=reasons_for(chosen, candidates),
    )  # fmt: skip


def _check(world_size: int, reserve: float) -> None:
    if not isinstance(world_size, int) or isinstance(world_size, bool) or world_size < 1:
        raise ConfigError(f"`world_size={world_size!r}` leaves no process to plan for. Give a positive integer.")
    if not 0 <= reserve < 1:
        raise ConfigError(f"`reserve={reserve!r}` is no part of a device's memory. Give 0 or more, and less than 1.")


def _candidates(search: Search, world_size: int) -> Iterator[Candidate]:
    for layout in search.layouts(world_size):
        memory = search.memory(layout)
        time = predict_time(search.profile, layout, search.work, search.optimizer, search.hardware)
        yield Candidate(layout=layout, memory=memory, time=time, fits=search.fits(memory, world_size))


def _length(profile: ModelProfile, given: int | None) -> int:
    if given is None:
        return profile.sequence_length or 1
    if profile.sequence_length is None:
        raise ConfigError(
            f"`sequence_length={given}` has no effect: `{profile.name}` was measured with samples that have no length "
            f"of their own. Leave it out, or profile the model with a `sequence_length`."
        )
    return given
