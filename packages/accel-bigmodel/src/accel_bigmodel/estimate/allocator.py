"""What torch's allocator for the CPU handed out, as its own profiler saw it: a check of what a tracker says."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

__all__ = ["allocator_peak_bytes"]


def allocator_peak_bytes(run: Callable[[], object]) -> int:
    """The most that was allocated at once while `run` ran, over what was there before.

    It counts what kernels take and give back inside as well, which no tracker of tensors sees. Memory that was there
    before and is freed meanwhile does not count as freed, so let `run` begin and end with the same tensors alive.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    results = recorded.profiler.kineto_results
    events = [each for each in results.events() if each.name() == "[memory]"]
    current = peak = 0
    for each in sorted(events, key=lambda event: event.start_ns()):
        current += each.nbytes()
        peak = max(peak, current)
    return peak
