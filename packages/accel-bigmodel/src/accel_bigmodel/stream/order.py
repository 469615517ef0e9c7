"""Which unit is needed next, learnt from the order in which units were needed."""

from __future__ import annotations

__all__ = ["Order"]


class Order:
    """Remembers what followed each pair of units, the last time.

    A pair and not one unit, since backward passes the blocks in the other direction, and a decoder comes again where an
    encoder does not. What followed one unit, whatever was before it, is the second guess. The last one is the unit that
    was defined next, and the first one behind the last, so that most of the first pass and the beginning of the second
    are right already. A wrong guess costs time, and is replaced by what really came.
    """

    def __init__(self) -> None:
        self._before: int | None = None
        self._now: int | None = None
        self._after_two: dict[tuple[int | None, int], int] = {}
        self._after_one: dict[int, int] = {}

    def saw(self, unit: int) -> None:
        """`unit` is needed now. Being needed twice in a row counts once."""
        if unit == self._now:
            return
        if self._now is not None:
            self._after_two[self._before, self._now] = unit
            self._after_one[self._now] = unit
        self._before, self._now = self._now, unit

    def following(self, count: int, num_units: int) -> list[int]:
        """The next `count` of `num_units` units as far as one can tell, each once, without the one needed now."""
        found: list[int] = []
        before, now = self._before, self._now
        for _ in range(2 * count):
            if now is None or len(found) == count:
                break
            guess = self._after_two.get((before, now), self._after_one.get(now, (now + 1) % num_units))
            before, now = now, guess
            if guess != self._now and guess not in found:
                found.append(guess)
        return found
