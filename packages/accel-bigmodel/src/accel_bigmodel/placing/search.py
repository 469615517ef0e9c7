"""Placements of a chain: the fastest by dynamic programming, the most even, and the first that fits. Pure.

Every placement has one shape. Units that fit into no device are streamed, wherever they are. Of the others a prefix is
resident, cut into one run for each device in order, and the suffix is streamed. For a given length of the prefix the
room on the main device is known, so that the fastest cut is a shortest path; lengths are tried from the longest down,
and those left out whose lower bound is no better than what was found.

Where something has to be streamed, the same is done once more with the layers behind the last block at the front.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

from accel_bigmodel.placing.cost import Problem, evaluate, largest

__all__ = ["Strategy", "search"]

Strategy = Literal["auto", "balanced", "balanced_low_0", "sequential"]

_EVEN_STEPS = 24
"""Halvings in the search for the most even filling: to a part in 2^24 of a budget."""
_EQUAL = 1 + 1e-9
"""Times within this factor count as the same."""


def search(problem: Problem, strategy: Strategy, *, around_large: bool = True) -> list[int] | None:
    """The place of each unit as a number in `Problem.places`, or ``None`` if none fits.

    Args:
        problem: what is placed, and where.
        strategy: ``auto`` takes the least predicted seconds, and the most even filling among those; ``balanced`` the
            fewest streamed bytes, then the most even filling of all devices; ``balanced_low_0`` that with as little as
            possible on the first device; ``sequential`` fills one place after the other.
        around_large: whether units behind one that fits into no device may still be resident. ``False`` is for
            ``sequential``; the others always look.
    """
    if strategy == "sequential":
        return _Search(problem, around_large=around_large).longest(strategy)
    found = _Search(problem).place(strategy)
    tail = _tail(problem)
    if not tail or (found is not None and not evaluate(problem, found).streamed_bytes):
        return found
    other = _Search(problem, first=tail).place(strategy)
    if found is None or other is None:
        return other if found is None else found
    one, two = evaluate(problem, found), evaluate(problem, other)
    if strategy == "auto":
        return other if two.seconds * _EQUAL < one.seconds else found
    return other if two.streamed_bytes < one.streamed_bytes else found


def _tail(problem: Problem) -> list[int]:
    """Units behind the last block, such as an output layer.

    They are often larger than a block, and so is the slot of one that is streamed. So if anything is streamed,
    having them resident before all others is tried as well.
    """
    layers = problem.chain.layers
    blocks = [
        number for number, unit in enumerate(problem.chain.units) if any(layers[each].is_block for each in unit.layers)
    ]
    return list(range(blocks[-1] + 1, len(problem.chain.units))) if blocks else []


class _Search:
    def __init__(self, problem: Problem, *, around_large: bool = True, first: Sequence[int] = ()) -> None:
        self.problem = problem
        self.in_order = not around_large
        count = problem.num_computing
        needs = [problem.resident[u] + problem.kv[u] + problem.activations[u] for u in range(len(problem.resident))]
        widest = max(problem.budgets[:count])
        self.large = [unit for unit, need in enumerate(needs) if around_large and need > widest]
        apart = {*self.large, *first}
        behind = [unit for unit in range(len(needs)) if unit not in apart]
        self.order = [*(unit for unit in first if unit not in self.large), *behind]
        self.length = len(self.order)
        self.activations = [problem.activations[unit] for unit in self.order]
        self.has_activations = any(self.activations)
        self.sums = [0, *accumulate(problem.resident[unit] + problem.kv[unit] for unit in self.order)]
        self.times = [[0.0, *accumulate(problem.seconds[place][unit] for unit in self.order)] for place in range(count)]
        quickest = [min(problem.seconds[place][unit] for place in range(count)) for unit in self.order]
        self.quickest = [0.0, *accumulate(quickest)]
        self.large_time = sum(problem.seconds[problem.main][unit] for unit in self.large)
        self.kept_budget = sum(problem.budgets[count:])
        self._count_suffixes()

    def _count_suffixes(self) -> None:
        """What is streamed, for each length of the resident prefix."""
        problem, size = self.problem, self.length + 1
        self.room, self.floor, self.copied = [0] * size, [0] * size, [0] * size
        fixed = floor = copied = 0
        slots: list[int] = []
        for place in range(self.length, -1, -1):
            for unit in self.large if place == self.length else [self.order[place]]:
                slots = largest([*slots, *problem.staged[unit]], problem.num_slots)
                fixed += problem.staying[unit] + problem.kv[unit]
                floor = max(floor, problem.activations[unit])
                copied += problem.streamed[unit]
            self.room[place] = fixed + sum(slots)
            self.floor[place], self.copied[place] = floor, copied

    def streams(self, prefix: int) -> bool:
        """Whether anything is streamed beside a resident prefix of that length."""
        return prefix < self.length or bool(self.large)

    # What fits

    def limits(self, prefix: int, scale: float = 1.0, only: Sequence[int] | None = None) -> list[int] | None:
        """Bytes for resident units, by device; ``None`` where streaming alone takes more than the main one has."""
        problem = self.problem
        found = [int(size * scale) for size in problem.budgets[: problem.num_computing]]
        if self.streams(prefix):
            found[problem.main] -= self.room[prefix]
            if found[problem.main] < self.floor[prefix]:
                return None
        return found if only is None else [size if place in only else -1 for place, size in enumerate(found)]

    def fill(self, prefix: int, limits: Sequence[int]) -> list[int]:
        """Where the run of each device ends, if each takes what fits before the next one does."""
        ends, begin = [], 0
        for place, limit in enumerate(limits):
            end = begin
            if not self.has_activations:
                end = max(begin, min(prefix, bisect_right(self.sums, self.sums[begin] + limit) - 1))
            else:
                peak = self.floor[prefix] if place == self.problem.main and self.streams(prefix) else 0
                base = self.sums[begin] + limit
                while end < prefix:
                    peak = max(peak, self.activations[end])
                    if self.sums[end + 1] - base + peak > 0:
                        break
                    end += 1
            ends.append(end)
            begin = end
        return ends

    def first_fit(self, prefix: int) -> list[int] | None:
        """Ends of the runs, if the prefix fits."""
        limits = self.limits(prefix)
        if limits is None:
            return None
        ends = self.fill(prefix, limits)
        return ends if ends[-1] == prefix else None

    def feasible(self, start: int) -> int | None:
        """The longest prefix of at most `start` units that fits, with what is behind it."""
        prefix = start
        while prefix >= 0 and self.copied[prefix] <= self.kept_budget:
            limits = self.limits(prefix)
            if limits is None:
                return None  # a shorter prefix streams more, which takes more room
            reach = self.fill(prefix, limits)[-1]
            if reach == prefix and self.kept(prefix) is not None:
                return prefix
            # With more streamed there is no more room than now, so no prefix between would fit either.
            prefix = min(reach, prefix - 1)
        return None

    def kept(self, prefix: int) -> dict[int, int] | None:
        """The place of each streamed unit: each in the first that has room, or in order for a sequential plan."""
        return self._keep(sorted([*self.large, *self.order[prefix:]]))

    def _keep(self, units: Sequence[int]) -> dict[int, int] | None:
        problem = self.problem
        left = list(problem.budgets)
        found: dict[int, int] = {}
        first = problem.num_computing
        for unit in units:
            size = problem.streamed[unit]
            for place in range(first, len(left)):
                if size <= left[place]:
                    left[place] -= size
                    found[unit] = place
                    first = place if self.in_order else first
                    break
            else:
                return None
        return found

    # Strategies

    def place(self, strategy: Strategy) -> list[int] | None:
        """The placement that a strategy looks for."""
        return self.fastest() if strategy == "auto" else self.longest(strategy)

    def longest(self, strategy: Strategy) -> list[int] | None:
        """The placement with the longest resident prefix, cut as the strategy says."""
        prefix = self.feasible(self.length)
        if prefix is None:
            return None
        ends = self.first_fit(prefix)
        assert ends is not None
        if strategy != "sequential":
            ends = self.even(prefix, low_first=strategy == "balanced_low_0" and not self.streams(prefix))
        return self.placement(prefix, ends)

    def fastest(self) -> list[int] | None:
        """The placement with the least predicted seconds, and the most even filling among those."""
        prefix = self.feasible(self.length)
        if prefix is None:
            return None
        best_s, best = self._fastest_of(prefix)
        shorter = self.feasible(prefix - 1)
        if shorter is None:
            return best
        least = self._least_resident_s(shorter)
        for each in range(shorter, -1, -1):
            if self._least_seconds(each, least[each]) * _EQUAL < best_s and self.feasible(each) == each:
                seconds, placement = self._fastest_of(each)
                if seconds * _EQUAL < best_s:
                    best_s, best = seconds, placement
        return best

    def _fastest_of(self, prefix: int) -> tuple[float, list[int]]:
        """The most even of the fastest cuts of one prefix that are known."""
        found = []
        for ends in self.cuts(prefix):
            placement = self.placement(prefix, ends)
            found.append((evaluate(self.problem, placement).seconds, placement))
        least_s = min(seconds for seconds, _ in found)
        return next(each for each in reversed(found) if each[0] <= least_s * _EQUAL)

    def _least_resident_s(self, longest: int) -> list[float]:
        """No resident prefix of each length computes faster, hops counted, if all up to `longest` leave some streamed.

        One pass for all: as the longest leaves the most room on the main device, none has more than it counts with.
        """
        if self.problem.is_uniform and not self.problem.hop_s:
            return self.times[0]
        return self._paths(longest)[0]

    def _least_seconds(self, prefix: int, resident_s: float) -> float:
        """No placement with this resident prefix is faster, if computing it takes at least `resident_s`."""
        problem = self.problem
        main = self.times[problem.main]
        streamed_s = main[self.length] - main[prefix] + self.large_time
        copy_s = self._least_copy_s(prefix)
        bound = max(resident_s + streamed_s, copy_s, resident_s + copy_s - self._ahead_s(prefix))
        return bound + problem.machine.overlap_loss * min(self.quickest[prefix] + streamed_s, copy_s)

    def _least_copy_s(self, prefix: int) -> float:
        problem, left, seconds = self.problem, self.copied[prefix], 0.0
        stores = range(problem.num_computing, len(problem.budgets))
        for place in sorted(stores, key=lambda each: -problem.copy_bytes_s[each]):
            taken = min(left, problem.budgets[place])
            seconds += taken / problem.copy_bytes_s[place]
            left -= taken
        return seconds

    def _ahead_s(self, prefix: int) -> float:
        """How much of the copying is done ahead of its turn: that of the first streamed units."""
        problem = self.problem
        slots = problem.machine.staging_slots
        first = sorted([*self.large[:slots], *self.order[prefix : prefix + slots]])[:slots]
        places = self._keep(first)
        return 0.0 if places is None else sum(problem.copy_s(unit, place) for unit, place in places.items())

    def cuts(self, prefix: int) -> list[list[int]]:
        """The fastest cut of a prefix, and a more even one on the same devices, which may be as fast."""
        if self.problem.is_uniform and not self.problem.hop_s:
            return [self.even(prefix)]
        fastest = self.shortest_path(prefix)
        begins = [0, *fastest[:-1]]
        used = [place for place, end in enumerate(fastest) if end > begins[place]]
        return [fastest, self.even(prefix, only=used)]

    def even(self, prefix: int, *, only: Sequence[int] | None = None, low_first: bool = False) -> list[int]:
        """Ends of runs that leave the fullest device as empty as possible.

        Args:
            prefix: units that are resident; they fit.
            only: devices that may be used, by default all.
            low_first: whether the first device takes only what the others have no room for.
        """
        fixed = self._least_first(prefix) if low_first and self.problem.num_computing > 1 else None
        best = self._scaled(prefix, 1.0, only, fixed)
        assert best is not None
        low, high = 0.0, 1.0
        for _ in range(_EVEN_STEPS):
            middle = (low + high) / 2
            ends = self._scaled(prefix, middle, only, fixed)
            if ends is None:
                low = middle
            else:
                high, best = middle, ends
        return best

    def _scaled(self, prefix: int, scale: float, only: Sequence[int] | None, fixed: int | None) -> list[int] | None:
        limits = self.limits(prefix, scale, only)
        if limits is None:
            return None
        if fixed is not None:
            limits[0] = fixed
        ends = self.fill(prefix, limits)
        return ends if ends[-1] == prefix else None

    def _least_first(self, prefix: int) -> int:
        """Bytes that the first device must take, as the others have no room for them."""
        limits = self.limits(prefix)
        assert limits is not None
        low, high = -2, limits[0]
        while high - low > 1:
            middle = (low + high) // 2
            if self.fill(prefix, [middle, *limits[1:]])[-1] == prefix:
                high = middle
            else:
                low = middle
        return high

    def shortest_path(self, prefix: int) -> list[int]:
        """Ends of the runs that compute fastest, hops counted. The prefix fits."""
        _, back = self._paths(prefix)
        ends, end = [], prefix
        for begins in reversed(back):
            ends.append(end)
            end = begins[end]
        return ends[::-1]

    def _paths(self, prefix: int) -> tuple[list[float], list[list[int]]]:
        """Least times of the first units, for each number of them, and for each device where its run then begins.

        ``least[i]`` is the least time of the first `i` units on the devices so far. A device takes units `j` to `i` in
        ``times[i] - times[j]``, so the best `j` is the least ``least[j] - times[j]`` in a window that slides with `i`.
        """
        limits = self.limits(prefix)
        assert limits is not None
        least = [0.0] + [float("inf")] * prefix
        back: list[list[int]] = []
        for place, limit in enumerate(limits):
            hosts = place == self.problem.main and self.streams(prefix)
            floor = self.floor[prefix] if hosts else 0
            hop_s = 0.0 if hosts else self.problem.hop_s
            least, begins = self._extend(prefix, least, self.times[place], limit, floor, hop_s)
            back.append(begins)
        return least, back

    def _extend(
        self, prefix: int, before: list[float], times: list[float], limit: int, floor: int, hop_s: float
    ) -> tuple[list[float], list[int]]:
        """Least times with one device more, and where its run begins for each end."""
        least, begins = list(before), list(range(prefix + 1))
        window: deque[tuple[float, int]] = deque()  # ascending values, candidates for a begin
        peaks: deque[tuple[int, int]] = deque()  # descending activations
        low = 0
        for end in range(1, prefix + 1):
            value = before[end - 1] - times[end - 1]
            while window and window[-1][0] >= value:
                window.pop()
            window.append((value, end - 1))
            size = self.activations[end - 1]
            while peaks and peaks[-1][0] <= size:
                peaks.pop()
            peaks.append((size, end - 1))
            while low < end and self.sums[end] - self.sums[low] + max(floor, peaks[0][0] if peaks else 0) > limit:
                low += 1
                while peaks and peaks[0][1] < low:
                    peaks.popleft()
            while window and window[0][1] < low:
                window.popleft()
            if window and window[0][0] + times[end] + hop_s < least[end]:
                least[end], begins[end] = window[0][0] + times[end] + hop_s, window[0][1]
        return least, begins

    def placement(self, prefix: int, ends: Sequence[int]) -> list[int]:
        """The place of each unit of the chain."""
        kept = self.kept(prefix)
        assert kept is not None
        found = [0] * len(self.problem.resident)
        begin = 0
        for place, end in enumerate(ends):
            for number in range(begin, end):
                found[self.order[number]] = place
            begin = end
        for unit, place in kept.items():
            found[unit] = place
        return found
