"""A plan: what lies where, what that costs, and as a device map; or why there is none. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn, get_args

from accel_bigmodel.placing.chain import Chain
from accel_bigmodel.placing.cost import Prediction, Problem, evaluate, largest
from accel_bigmodel.placing.memory import UNLIMITED, DeviceMap, describe_budgets, is_store, shown_place
from accel_bigmodel.placing.search import Strategy, search
from accel_bigmodel.placing.workload import Machine, Workload
from accel_bigmodel.sizes import format_bytes
from accel_state.config import did_you_mean
from accel_state.errors import ConfigError

__all__ = ["Plan", "plan_device_map", "with_disk"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A placement of every layer of a chain, and what it was planned for."""

    problem: Problem
    placement: tuple[int, ...]
    """For each unit of the chain the number of its place in `Problem.places`."""

    @cached_property
    def prediction(self) -> Prediction:
        """Bytes in every place, and seconds of a forward."""
        return evaluate(self.problem, self.placement)

    def seconds_for(self, workload: Workload) -> float:
        """What a forward of another workload, with a KV cache of the same size, takes with this placement."""
        return evaluate(self.problem.with_workload(workload), self.placement).seconds

    @property
    def chain(self) -> Chain:
        """What was placed."""
        return self.problem.chain

    def place_of(self, layer: int) -> int | str:
        """Where a layer lies."""
        return self.problem.places[self.placement[self.chain.unit_of_layer[layer]]]

    def device_map(self, *, clean: bool = True) -> DeviceMap:
        """Names to places: of the largest modules that lie in one place as a whole, or of every layer."""
        places = {layer.name: self.place_of(number) for number, layer in enumerate(self.chain.layers)}
        return _merged(places) if clean else dict(places)


def plan_device_map(
    chain: Chain,
    budgets: Mapping[int | str, int],
    *,
    strategy: Strategy = "auto",
    main: int | str | None = None,
    workload: Workload | None = None,
    machine: Machine | None = None,
    offload_buffers: bool = False,
    kv_bytes: Sequence[int] | None = None,
    around_large: bool = True,
) -> Plan:
    """Place the layers of a chain. Reads no device, so it plans for any machine.

    Args:
        chain: see `accel_bigmodel.placing.census`.
        budgets: bytes by place, as `get_max_memory` gives them. Without ``"disk"`` what fits nowhere else goes there.
        strategy: see `infer_auto_device_map`.
        main: the place where streamed layers run; ``None``: the first that computes.
        workload: what runs. ``None`` counts weights only.
        machine: speeds that the time is predicted from.
        offload_buffers: whether buffers of streamed layers are streamed too.
        kv_bytes: of keys and values, for each layer of the chain.
        around_large: see `search`.

    Raises:
        ConfigError: if the strategy or the main place is none, or if no placement fits.
    """
    if strategy not in get_args(Strategy):
        known = list(get_args(Strategy))
        raise ConfigError(
            f"`strategy={strategy!r}` is no way to place layers.{did_you_mean(str(strategy), known)} Use one of "
            f"{', '.join(known)}."
        )
    places = with_disk(budgets)
    _check_main(places, main)
    problem = Problem(
        chain,
        places,
        main=main,
        workload=workload,
        machine=machine,
        offload_buffers=offload_buffers,
        kv_bytes=kv_bytes,
    )
    placement = search(problem, strategy, around_large=around_large)
    if placement is None:
        _refuse(problem)
    return Plan(problem=problem, placement=tuple(placement))


def with_disk(budgets: Mapping[int | str, int]) -> dict[int | str, int]:
    """The same places, with a disk without limit if none is named."""
    return dict(budgets) if "disk" in budgets else {**budgets, "disk": UNLIMITED}


def _check_main(budgets: Mapping[int | str, int], main: int | str | None) -> None:
    devices = [place for place in budgets if not is_store(place)]
    computing = devices or [place for place in budgets if place == "cpu"]
    if not computing:
        raise ConfigError(
            f"`max_memory` offers {describe_budgets(budgets)}, and none of that computes. Add an accelerator, such as "
            f"`0: '20GiB'`, or 'cpu'."
        )
    if main is not None and main not in computing:
        why = "it only keeps weights beside accelerators" if main == "cpu" else "`max_memory` does not offer it"
        raise ConfigError(
            f"`main_device={main!r}` cannot run what is streamed: {why}. Use one of {', '.join(map(repr, computing))}."
        )


def _merged(places: Mapping[str, int | str]) -> DeviceMap:
    """Names of the largest modules of which all layers lie in one place."""
    found: dict[str, int | str | None] = {}
    for name, place in places.items():
        for above in _and_above(name):
            found[above] = place if found.get(above, place) == place else None
    merged: DeviceMap = {}
    for name in places:
        largest = next(above for above in _and_above(name) if found[above] is not None)
        merged[largest] = places[name]
    return merged


def _and_above(name: str) -> list[str]:
    """The whole, and every module down to `name`."""
    parts = name.split(".")
    return [".".join(parts[:length]) for length in range(len(parts) + 1)]


def _refuse(problem: Problem) -> NoReturn:
    """Say what does not fit, the narrowest reason first."""
    widest = max(range(problem.num_computing), key=lambda each: problem.budgets[each])
    _refuse_layer(problem, widest)
    _refuse_room(problem)
    chain = problem.chain
    offered = sum(problem.budgets)
    running = sum(problem.kv)
    cache = f" and {format_bytes(running)} of keys and values" if running else ""
    need = chain.total_bytes + running
    missing = f"{format_bytes(need - offered)} more" if need > offered else "more, as whole layers leave gaps"
    raise ConfigError(
        f"The model takes {format_bytes(chain.total_bytes)} in {_dtype_name(chain)}{cache}, and `max_memory` offers "
        f"{_budgets(problem)}. Give {missing}, or leave 'disk' out of `max_memory`, which then takes what is left over."
    )


def _refuse_layer(problem: Problem, widest: int) -> None:
    """A layer that no device can run, not even alone."""
    chain = problem.chain
    budget = problem.budgets[widest]
    main_budget = problem.budgets[problem.main]
    for number, layer in enumerate(chain.layers):
        running = problem.activations[chain.unit_of_layer[number]]
        staged = layer.total_bytes if problem.offload_buffers else layer.weight_bytes
        streamed = running + (staged if problem.num_slots else 0)
        if layer.total_bytes + running <= budget or streamed <= main_budget:
            continue
        acts = f" with {format_bytes(running)} of activations" if running else ""
        split = ", or let it be split (`no_split_module_classes`)" if layer.is_block else ""
        raise ConfigError(
            f"The layer `{layer.name}` ({layer.kind}) takes {format_bytes(layer.total_bytes)} in "
            f"{_dtype_name(chain)}{acts}. That fits into no device: the largest is "
            f"{shown_place(problem.places[widest])} with {format_bytes(budget)}; and it cannot be streamed, as "
            f"{shown_place(problem.places[problem.main])}, where it would run, needs {format_bytes(streamed)} and has "
            f"{format_bytes(main_budget)}. Give a device more memory, use a smaller dtype"
            f"{' or workload' if running else ''}{split}."
        )


def _refuse_room(problem: Problem) -> None:
    """Streaming, or what runs, takes more of the main device than there is."""
    main, everything = problem.main, range(len(problem.resident))
    parts = {
        "slots for streamed layers": sum(
            largest((size for sizes in problem.staged for size in sizes), problem.num_slots)
        ),
        "keys and values": sum(problem.kv),
        "activations": max(problem.activations),
        "buffers": sum(problem.staying[unit] for unit in everything),
    }
    if sum(parts.values()) <= problem.budgets[main] or problem.chain.total_bytes > sum(problem.budgets):
        return
    told = ", ".join(f"{format_bytes(size)} of {what}" for what, size in parts.items() if size)
    raise ConfigError(
        f"The model takes {format_bytes(problem.chain.total_bytes)} in {_dtype_name(problem.chain)} and `max_memory` "
        f"offers {_budgets(problem)}: it is not resident as a whole, and to stream all of it "
        f"{shown_place(problem.places[main])} needs room for {told}. Give it more memory, or use a smaller dtype, "
        f"fewer `staging_slots`, or a smaller workload."
    )


def _budgets(problem: Problem) -> str:
    return describe_budgets(dict(zip(problem.places, problem.budgets, strict=True)))


def _dtype_name(chain: Chain) -> str:
    return str(chain.dtype).removeprefix("torch.")
