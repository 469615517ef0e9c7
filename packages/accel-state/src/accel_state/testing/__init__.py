"""For tests: a function on several real processes, and a guard against what tests leave behind."""

from __future__ import annotations

from accel_state.testing.leaks import leak_guard
from accel_state.testing.ranks import RankError, rank_environment, run_ranks

__all__ = ["RankError", "leak_guard", "rank_environment", "run_ranks"]
