"""What a placement costs: bytes in every place and seconds a forward. Pure; one formula for every planner.

**Memory** of a place that computes: weights and buffers that lie there; keys and values of the layers that run there;
the largest activations of one of them; and on the main one, while others are streamed, the largest of these layers,
`Machine.staging_slots` of them, and buffers of streamed layers unless they are offloaded too. Of a place that only
keeps: what is streamed from it.

**Time** of one forward, among many that follow each other. Layer `l` computes in ``c_l``, by the roofline of the place
where it runs, and if it is streamed arrives in ``t_l``, its bytes by the speed of the way. Copies follow each other and
overlap with computing, but no more layers than there are slots arrive ahead of their turn. So with ``R`` the computing
of resident layers, ``S`` that of streamed ones and ``T'`` the copies of all streamed layers behind the first slots::

    max(R + S, sum(t), R + T') + overlap_loss * min(R + S, sum(t)) + hops

A hop is what the activations of a layer take to another device, once for each device besides the first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from accel_bigmodel.placing.chain import Chain, Layer
from accel_bigmodel.placing.memory import UNLIMITED, is_store
from accel_bigmodel.placing.workload import Machine, Workload

__all__ = ["PlaceUse", "Prediction", "Problem", "evaluate", "largest"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlaceUse:
    """What one place holds and does."""

    place: int | str
    budget_bytes: int
    """`UNLIMITED` where there is none."""
    layers: tuple[int, ...]
    """Numbers of the layers that lie there."""
    weight_bytes: int = 0
    """Of parameters and buffers."""
    kv_bytes: int = 0
    activation_bytes: int = 0
    staging_bytes: int = 0
    compute_s: float = 0.0
    """Of the layers that run there."""
    copy_s: float = 0.0
    """Of the layers that are streamed from there."""

    @property
    def used_bytes(self) -> int:
        """Of all kinds."""
        return self.weight_bytes + self.kv_bytes + self.activation_bytes + self.staging_bytes

    @property
    def share(self) -> float:
        """Part of the budget that is used; more than 1 does not fit."""
        if self.budget_bytes >= UNLIMITED or not self.used_bytes:
            return 0.0
        return self.used_bytes / self.budget_bytes if self.budget_bytes else float("inf")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """Bytes by place, and seconds of a forward."""

    uses: tuple[PlaceUse, ...]
    main: int | str
    """The place where streamed layers run."""
    seconds: float
    streamed_bytes: int
    """What is copied in every forward."""
    bound: str
    """What the time is spent on: ``"compute"`` or ``"copies"``."""

    @property
    def fits(self) -> bool:
        """Whether every place is within its budget."""
        return all(use.used_bytes <= use.budget_bytes for use in self.uses)

    @property
    def largest_share(self) -> float:
        """Of the places that compute: how evenly they are filled."""
        return max((use.share for use in self.uses if use.compute_s or use.place == self.main), default=0.0)


class Problem:
    """A chain, places with budgets, and what each unit costs where. Places that compute come first.

    Args:
        chain: of the model.
        budgets: bytes by place, in the order in which they are filled.
        main: the place where streamed layers run; ``None``: the first.
        workload: what runs; ``None`` plans for weights alone, of which one token reads all.
        machine: speeds.
        offload_buffers: whether buffers of streamed layers are streamed as well.
        kv_bytes: of each layer of the chain.
    """

    def __init__(
        self,
        chain: Chain,
        budgets: dict[int | str, int],
        *,
        main: int | str | None = None,
        workload: Workload | None = None,
        machine: Machine | None = None,
        offload_buffers: bool = False,
        kv_bytes: Sequence[int] | None = None,
    ) -> None:
        devices = [place for place in budgets if not is_store(place)]
        computing = devices or [place for place in budgets if place == "cpu"]
        self.chain = chain
        self.places = (*computing, *(place for place in budgets if place not in computing))
        self.budgets = tuple(budgets[place] for place in self.places)
        self.num_computing = len(computing)
        self.main = computing.index(main) if main is not None else 0
        self.machine = machine or Machine()
        self.workload = workload
        self.offload_buffers = offload_buffers
        on_host = self.places[self.main] == "cpu"
        # The host reads mapped files in place.
        self.num_slots = 0 if on_host else self.machine.staging_slots
        self.copy_bytes_s = [
            self.machine.copy_gb_s(place, to_cpu=on_host) * 1e9 if number >= self.num_computing else float("inf")
            for number, place in enumerate(self.places)
        ]
        self.kv_bytes = layer_kv = list(kv_bytes) if kv_bytes is not None else [0] * len(chain.layers)
        self._count_units(chain, layer_kv)
        self._time_units(chain, layer_kv)

    def with_workload(self, workload: Workload) -> Problem:
        """The same places and chain for another workload of which the KV cache takes as much."""
        return Problem(
            self.chain,
            dict(zip(self.places, self.budgets, strict=True)),
            main=self.places[self.main],
            workload=workload,
            machine=self.machine,
            offload_buffers=self.offload_buffers,
            kv_bytes=self.kv_bytes,
        )

    def _count_units(self, chain: Chain, layer_kv: list[int]) -> None:
        buffers_too = self.offload_buffers
        size = 0.0 if self.workload is None else self.workload.element_bytes(chain.dtype)
        measured = None if self.workload is None else self.workload.activation_bytes
        tokens = 0 if self.workload is None else self.workload.num_tokens
        acts = [int(tokens * size * _width(each)) if measured is None else measured for each in chain.layers]
        staged = [each.total_bytes if buffers_too else each.weight_bytes for each in chain.layers]
        units = chain.units
        self.resident = [unit.weight_bytes + unit.buffer_bytes for unit in units]
        self.streamed = [unit.weight_bytes + (unit.buffer_bytes if buffers_too else 0) for unit in units]
        self.staying = [0 if buffers_too else unit.buffer_bytes for unit in units]
        self.kv = [sum(layer_kv[each] for each in unit.layers) for unit in units]
        self.activations = [max(acts[each] for each in unit.layers) for unit in units]
        self.staged = [largest((staged[each] for each in unit.layers), self.num_slots) for unit in units]
        self.hop_s = tokens * size * chain.hidden / (self.machine.peer_gb_s * 1e9)

    def _time_units(self, chain: Chain, layer_kv: list[int]) -> None:
        speeds = [self.machine.speed(place) for place in self.places[: self.num_computing]]
        self.seconds: list[list[float]] = []
        rows: dict[Any, list[float]] = {}
        for speed in speeds:
            if speed not in rows:
                layers = [
                    speed.seconds(operations=self._operations(each), read_bytes=self._reads(each) + kv)
                    for each, kv in zip(chain.layers, layer_kv, strict=True)
                ]
                rows[speed] = [sum(layers[each] for each in unit.layers) for unit in chain.units]
            self.seconds.append(rows[speed])
        self.is_uniform = len(rows) == 1

    def _operations(self, layer: Layer) -> float:
        if self.workload is None:
            return 2.0 * layer.matrix_elements
        work = self.workload
        total = 2.0 * work.num_tokens * layer.matrix_elements
        if layer.is_block:
            # Scores and their product with values; a causal prefill looks at half of the pairs.
            seen = work.sequence_length * (0.5 if work.phase == "prefill" else 1.0)
            total += 4.0 * work.num_tokens * seen * layer.narrow
        return total

    def _reads(self, layer: Layer) -> float:
        if not layer.is_lookup:
            return float(layer.total_bytes)
        tokens = 1 if self.workload is None else self.workload.num_tokens
        return float(min(layer.total_bytes, tokens * layer.narrow * self.chain.dtype.itemsize))

    def copy_s(self, unit: int, place: int) -> float:
        """Seconds in which a unit arrives from a place that keeps it."""
        return self.streamed[unit] / self.copy_bytes_s[place]


def evaluate(problem: Problem, placement: Sequence[int]) -> Prediction:
    """Bytes and seconds of a placement.

    Args:
        problem: what is placed, and where.
        placement: for each unit the number of its place in `Problem.places`.
    """
    count, main = problem.num_computing, problem.main
    uses = [
        PlaceUse(place=place, budget_bytes=budget, layers=())
        for place, budget in zip(problem.places, problem.budgets, strict=True)
    ]
    held: list[list[int]] = [[] for _ in uses]
    for unit, place in enumerate(placement):
        held[place].append(unit)
    streamed = [unit for unit, place in enumerate(placement) if place >= count]
    for number, units in enumerate(held):
        uses[number] = _use(problem, uses[number], number, units, streamed)
    runs = [number for number in range(count) if held[number] or (number == main and streamed)]
    resident_s = sum(problem.seconds[number][unit] for number in range(count) for unit in held[number])
    streamed_s = sum(problem.seconds[main][unit] for unit in streamed)
    copies = [problem.copy_s(unit, placement[unit]) for unit in streamed]
    compute_s, copy_s = resident_s + streamed_s, sum(copies)
    behind_s = resident_s + sum(copies[problem.machine.staging_slots :]) if streamed else 0.0
    shown_s = problem.machine.overlap_loss * min(compute_s, copy_s)
    return Prediction(
        uses=tuple(uses),
        main=problem.places[main],
        seconds=max(compute_s, copy_s, behind_s) + shown_s + problem.hop_s * max(len(runs) - 1, 0),
        streamed_bytes=sum(problem.streamed[unit] for unit in streamed),
        bound="compute" if compute_s >= max(copy_s, behind_s) else "copies",
    )


def largest(sizes: Iterable[int], count: int) -> list[int]:
    """The largest of some sizes, `count` of them at most."""
    return sorted(sizes, reverse=True)[:count]


def _use(problem: Problem, use: PlaceUse, number: int, units: list[int], streamed: list[int]) -> PlaceUse:
    layers = tuple(sorted(layer for unit in units for layer in problem.chain.units[unit].layers))
    if number >= problem.num_computing:
        return replace(
            use,
            layers=layers,
            weight_bytes=sum(problem.streamed[unit] for unit in units),
            copy_s=sum(problem.copy_s(unit, number) for unit in units),
        )
    guests = streamed if number == problem.main else []
    runs = [*units, *guests]
    return replace(
        use,
        layers=layers,
        weight_bytes=sum(problem.resident[unit] for unit in units) + sum(problem.staying[unit] for unit in guests),
        kv_bytes=sum(problem.kv[unit] for unit in runs),
        activation_bytes=max((problem.activations[unit] for unit in runs), default=0),
        staging_bytes=sum(largest((size for unit in guests for size in problem.staged[unit]), problem.num_slots)),
        compute_s=sum(problem.seconds[number][unit] for unit in runs),
    )


def _width(layer: Layer) -> float:
    """Features that a token has in memory at the peak of a layer: an estimate from shapes.

    Of a block its input, the same normalised, and inside two wide ones with their product, as in a gated feed-forward.
    Attention is taken to keep no scores. Of a single matrix, what goes in and what comes out.
    """
    if layer.is_block:
        return 2.0 * layer.narrow + 3.0 * layer.wide
    return float(layer.wide) if layer.is_lookup else float(layer.wide + layer.narrow)
