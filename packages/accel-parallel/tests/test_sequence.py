"""Who holds which tokens, and batches cut to that: pure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from accel_parallel.sequence.layout import SequenceKind, SequenceLayout, shard_sequence
from accel_state import ConfigError

KINDS: tuple[SequenceKind, ...] = ("context", "ulysses")
kinds = st.sampled_from(KINDS)


def layouts(kind: SequenceKind, size: int) -> list[SequenceLayout]:
    return [SequenceLayout(kind=kind, size=size, rank=rank) for rank in range(size)]


def shards(batch: dict[str, Any], kind: SequenceKind, size: int, **options: Any) -> list[dict[str, Any]]:
    return [shard_sequence(batch, layout, **options) for layout in layouts(kind, size)]


def whole(parts: list[dict[str, Any]], name: str, kind: SequenceKind, dim: int = 1) -> torch.Tensor:
    return layouts(kind, len(parts))[0].join([part[name] for part in parts], dim=dim)


@given(kind=kinds, size=st.integers(2, 1024), width=st.integers(1, 3))
def test_every_token_is_held_once_and_by_all_alike(kind: SequenceKind, size: int, width: int) -> None:
    layout = SequenceLayout(kind=kind, size=size, rank=0)
    length = width * layout.shortest
    spans = [layout.spans(length, rank) for rank in range(size)]
    pieces = sorted(span for each in spans for span in each)
    assert [first for first, _ in pieces] == [0, *(end for _, end in pieces[:-1])]
    assert pieces[-1][1] == length
    assert {sum(end - first for first, end in each) for each in spans} == {length // size}


@given(size=st.integers(2, 64), width=st.integers(1, 5))
def test_context_gives_every_rank_as_many_causal_pairs(size: int, width: int) -> None:
    length = 2 * size * width
    layout = SequenceLayout(kind="context", size=size, rank=0)
    # The query at position p is compared with p + 1 keys.
    pairs = [sum(p + 1 for span in layout.spans(length, rank) for p in range(*span)) for rank in range(size)]
    assert set(pairs) == {length * (length + 1) // 2 // size}


@given(kind=kinds, size=st.integers(2, 9), width=st.integers(1, 4), dim=st.integers(0, 2))
def test_join_undoes_take(kind: SequenceKind, size: int, width: int, dim: int) -> None:
    shape = [2, 3, 2]
    shape[dim] = 2 * size * width
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    parts = [layout.take(tensor, dim=dim) for layout in layouts(kind, size)]
    assert torch.equal(layouts(kind, size)[-1].join(parts, dim=dim), tensor)
    places = torch.cat([layout.positions(shape[dim]) for layout in layouts(kind, size)])
    assert torch.equal(torch.cat(parts, dim), tensor.index_select(dim, places))


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_shifted_before_they_are_cut(kind: SequenceKind) -> None:
    tokens = torch.arange(32).view(2, 16)
    parts = shards({"input_ids": tokens, "labels": tokens, "number": 7}, kind, 4)
    for part in parts:
        real = part["shift_labels"] != -100
        # Each token is its own place here: what it has to predict is the next one.
        assert torch.equal(part["shift_labels"][real], part["input_ids"][real] + 1)
        assert torch.equal(part["position_ids"], part["input_ids"] % 16)
        assert "labels" not in part
        assert part["number"] == 7
    assert sum(int((part["shift_labels"] != -100).sum()) for part in parts) == 30


@given(kind=kinds, size=st.integers(2, 5), length=st.integers(10, 40))
def test_padding_counts_nothing_and_cuts_off_again(kind: SequenceKind, size: int, length: int) -> None:
    tokens = torch.arange(1, length + 1).expand(2, -1)
    mask = torch.ones_like(tokens)
    parts = shards({"input_ids": tokens, "labels": tokens, "attention_mask": mask}, kind, size)
    assert torch.equal(whole(parts, "input_ids", kind)[:, :length], tokens)
    labels = whole(parts, "shift_labels", kind)
    assert torch.equal(labels[:, : length - 1], tokens[:, 1:])
    assert (labels[:, length - 1 :] == -100).all()
    padded = whole(parts, "attention_mask", kind)
    assert torch.equal(padded, (torch.arange(padded.shape[1]) < length).long().expand(2, -1))
    assert torch.equal(whole(parts, "position_ids", kind)[0], torch.arange(padded.shape[1]))


def test_what_is_no_sequence_stays() -> None:
    batch = {
        "input_ids": torch.zeros(3, 8, dtype=torch.long),
        "inputs": torch.randn(3, 8, 5),
        "pixels": torch.randn(3, 4, 8, 8),
        "lookalike": torch.randn(3, 8),
        "weight": torch.ones(3),
        "turned": torch.randn(8, 3),
        "position_ids": torch.arange(8).expand(3, 1, -1),
    }
    part = shard_sequence(
        batch, SequenceLayout(kind="context", size=2, rank=1), seq_dims={"lookalike": None, "turned": 0}
    )
    assert {name: tuple(value.shape) for name, value in part.items()} == {
        "input_ids": (3, 4), "inputs": (3, 4, 5), "pixels": (3, 4, 8, 8), "lookalike": (3, 8), "weight": (3,),
        "turned": (4, 3), "position_ids": (3, 1, 4),
    }  # fmt: skip
    assert torch.equal(part["turned"], batch["turned"][2:6])
    assert part["position_ids"][0, 0].tolist() == [2, 3, 4, 5]


def test_positions_that_were_given_go_on_in_the_padding() -> None:
    batch = {"input_ids": torch.zeros(1, 9, dtype=torch.long), "position_ids": torch.arange(5, 14).view(1, -1)}
    parts = shards(batch, "context", 2)
    assert whole(parts, "position_ids", "context").tolist() == [list(range(5, 17))]


def test_labels_of_each_token_stay_in_place() -> None:
    labels = torch.arange(8).view(1, 8)
    parts = shards({"inputs_embeds": torch.randn(1, 8, 2), "labels": labels}, "ulysses", 2, causal=False)
    assert [part["labels"].tolist() for part in parts] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    assert "shift_labels" not in parts[0]


def test_labels_that_are_shifted_already_are_cut_only() -> None:
    tokens = torch.arange(8).view(1, 8)
    parts = shards({"input_ids": tokens, "labels": tokens, "shift_labels": tokens + 1}, "context", 2)
    assert torch.equal(whole(parts, "shift_labels", "context"), tokens + 1)


def test_masks_of_four_dimensions_are_cut_as_attention_takes_them() -> None:
    batch = {"input_ids": torch.zeros(1, 8, dtype=torch.long), "attention_mask": torch.ones(1, 1, 8, 8).tril()}
    rows = shards(batch, "context", 2)
    assert rows[1]["attention_mask"].shape == (1, 1, 4, 8)
    assert torch.equal(rows[1]["attention_mask"], batch["attention_mask"][:, :, 2:6])
    assert shards(batch, "ulysses", 2)[1]["attention_mask"].shape == (1, 1, 8, 8)


def test_where_nobody_shares_a_sequence_the_names_are_the_same() -> None:
    tokens = torch.arange(26).view(2, 13)
    batch = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}
    alone = shard_sequence(batch, None)
    parts = shards(batch, "context", 2)
    assert torch.equal(alone.pop("labels"), tokens)  # as they were: a model shifts them itself, of one sequence
    assert list(alone) == list(parts[0])
    for name, value in alone.items():
        assert torch.equal(value, whole(parts, name, "context")[:, :13])


TOKENS = torch.zeros(2, 10, dtype=torch.long)


@pytest.mark.parametrize(
    ("batch", "options", "message"),
    [
        ({"input_ids": TOKENS[:, :3]}, {}, r"3 token\(s\) cannot be divided over 2 ranks.*takes 4"),
        ({"input_ids": TOKENS}, {"pad": False}, "10 tokens.*multiple of 4. Cut it to 8, or pad it to 12"),
        ({"input_ids": TOKENS}, {"causal": False}, "10 tokens.*multiple of 4"),
        ({"pixels": TOKENS}, {}, "`pixels` was to be cut.*none of `input_ids`"),
        ({}, {}, "nothing in it was to be cut"),
        ([TOKENS, TOKENS], {}, "A list was to be cut along its sequence.*Give a mapping"),
        ({"input_ids": TOKENS}, {"seq_dims": {"inputs": 1}}, "`seq_dims` names `inputs`.*has `input_ids`"),
        ({"input_ids": TOKENS, "attention_mask": torch.ones(2, 1, 10, 10)}, {}, r"\(2, 1, 10, 10\).*padded to 12"),
        ({"input_ids": TOKENS, "labels": TOKENS, "attention_mask": torch.ones(2, 10).tril(5)}, {}, "count tokens that"),
        ({"input_ids": TOKENS, "position_ids": torch.arange(10) % 5}, {}, "start again.*several documents"),
    ],
)  # fmt: skip
def test_batches_that_cannot_be_cut_rightly(batch: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shard_sequence(batch, SequenceLayout(kind="context", size=2, rank=0), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 1, "rank": 0}, r"group of 1 process\(es\).*`cp_size` or `sp_size` to 2"),
        ({"rank": 2}, r"rank=2.*outside 0\.\.1"),
        ({"kind": "ring"}, "kind='ring'.*Use 'context' or 'ulysses'"),
    ],
)
def test_layouts_that_are_none(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SequenceLayout(**{"kind": "context", "size": 2, "rank": 0, **change})
