"""The tracker counts memory exactly as the allocator does, of real tensors and of fake ones."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from accel_bigmodel.estimate.allocator import allocator_peak_bytes
from accel_bigmodel.estimate.tracker import AllocationTracker


def test_a_view_is_no_memory_of_its_own_and_what_nobody_holds_is_gone() -> None:
    with AllocationTracker() as tracker:
        first = torch.ones(256)
        halves = first.view(2, 128)
        assert tracker.current_bytes == 1024
        del first
        assert tracker.current_bytes == 1024
        del halves
        assert tracker.current_bytes == 0
    assert tracker.peak.total_bytes == 1024


def test_registered_tensors_count_under_their_name_and_once() -> None:
    weight = nn.Parameter(torch.ones(8))
    with AllocationTracker() as tracker:
        tracker.register("weights", [weight, weight.detach(), {"again": weight}])
        weight * 2.0
    assert tracker.peak.parts == {"weights": 32, "activations": 32}
    assert tracker.peak.total_bytes == 64


def test_memory_that_is_renamed_or_resized_counts_once_at_its_size() -> None:
    with AllocationTracker() as tracker:
        made = torch.ones(16)
        tracker.register("gradients", [made])
        assert (tracker.live("gradients"), tracker.live("activations")) == (64, 0)
        made.resize_(32)
        assert tracker.live("gradients") == 128
        made.untyped_storage().resize_(0)
        made.detach()
        assert tracker.current_bytes == 0


def test_sizes_are_rounded_up_as_an_allocator_does() -> None:
    with AllocationTracker(granularity_bytes=512) as tracker:
        held = torch.ones(1), torch.ones(129)
        assert tracker.current_bytes == 512 + 1024
        del held


def test_a_weighted_category_counts_in_part_and_the_peak_is_of_the_weighted_sum() -> None:
    held = torch.ones(256)
    with AllocationTracker(weights={"weights": 0.25}) as tracker:
        tracker.register("weights", [held])
        tracker.add("gathered", 512)
        tracker.add("gathered", -512)
        assert tracker.current_bytes == 256
    assert tracker.peak.total_bytes == 768
    assert tracker.peak.parts == {"weights": 256, "gathered": 512}


def test_only_the_wanted_device_counts_and_meta_tensors_never_do() -> None:
    with AllocationTracker() as tracker:
        held = torch.ones(4, device="meta")
        assert tracker.current_bytes == 0
    with AllocationTracker(device="cuda") as tracker:
        other = torch.ones(4)
        assert tracker.current_bytes == 0
    del held, other


def test_an_order_names_the_same_memory_in_a_second_run() -> None:
    def run(known: dict[int, str]) -> tuple[dict[str, int], set[int]]:
        with AllocationTracker(known=known) as tracker:
            temporary = torch.ones(4)
            kept = torch.ones(8)
            del temporary
            return dict(tracker.peak.parts), tracker.order_of([kept])

    _, order = run({})
    assert run(dict.fromkeys(order, "kept"))[0] == {"activations": 16, "kept": 32}


@pytest.mark.parametrize("fake", [False, True])
def test_forward_and_backward_peak_where_the_allocator_does(fake: bool) -> None:
    def step(model: nn.Module, batch: torch.Tensor) -> None:
        model(batch).square().mean().backward()
        model.zero_grad()

    torch.manual_seed(0)
    layers = [nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 64), nn.LayerNorm(64)]
    model, batch = nn.Sequential(*layers), torch.randn(128, 64)
    step(model, batch)
    gc.collect()
    expected = allocator_peak_bytes(lambda: step(model, batch))
    tracker = AllocationTracker()
    if fake:
        with FakeTensorMode() as mode, tracker:
            copied = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Dropout(0.1), nn.Linear(256, 64), nn.LayerNorm(64))
            given = torch.empty(128, 64)
            base = tracker.current_bytes
            tracker.reset_peak()
            step(copied, given)
        assert mode is not None
    else:
        with tracker:
            tracker.register("there before", [*model.parameters(), batch])
            base = tracker.current_bytes
            step(model, batch)
    assert tracker.peak.total_bytes - base == pytest.approx(expected, rel=0.002)


def test_torch_is_as_before_after_an_error() -> None:
    tracker = AllocationTracker()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), tracker:
        torch.ones(2, 3) @ torch.ones(2, 3)
    before = tracker.peak
    torch.ones(1000)
    assert tracker.peak == before
