"""Bytes of keys and values, by the attributes that configurations of the field have."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accel_bigmodel.kv_cache import kv_cache_bytes_per_layer
from accel_state.errors import ConfigError


def config(**entries: Any) -> SimpleNamespace:
    base = {"use_cache": True, "num_hidden_layers": 3, "num_attention_heads": 8, "hidden_size": 64}
    return SimpleNamespace(**{**base, **entries})


def sizes(config: Any, **options: Any) -> list[int]:
    return kv_cache_bytes_per_layer(config, **{"batch_size": 2, "length": 10, "dtype": "float32", **options})


TOKENS_BYTES = 2 * 10 * 4
"""Two sequences of ten tokens in float32, for each number that a layer keeps."""


@pytest.mark.parametrize(
    ("entries", "width"),
    [
        ({}, 2 * 64),
        ({"num_key_value_heads": 2}, 2 * 16),
        ({"num_key_value_heads": 2, "head_dim": 32}, 2 * 64),
        ({"multi_query": True}, 2 * 8),
        ({"kv_lora_rank": 24, "qk_rope_head_dim": 8}, 32),
        ({"new_decoder_architecture": False, "multi_query": True}, 2 * 8),
        ({"new_decoder_architecture": True, "multi_query": True, "num_kv_heads": 2}, 2 * 64),
    ],
    ids=["all heads", "grouped", "head size", "one head", "latent", "older falcon", "newer falcon"],
)
def test_what_a_layer_keeps(entries: dict[str, Any], width: int) -> None:
    assert sizes(config(**entries)) == [TOKENS_BYTES * width] * 3


def test_other_names_of_the_same() -> None:
    other = SimpleNamespace(use_cache=True, n_layer=2, n_head=8, n_embd=64)
    assert sizes(other) == [TOKENS_BYTES * 128] * 2


@pytest.mark.parametrize(("length", "kept"), [(3, (3, 3)), (10, (4, 10))])
def test_a_window_bounds_the_layers_that_have_one(length: int, kept: tuple[int, int]) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    found = sizes(config(layer_types=kinds, sliding_window=4), length=length)
    assert found == [2 * each * 4 * 128 for each in (kept[0], kept[1], kept[0])]


def test_a_window_that_is_not_used_bounds_nothing() -> None:
    assert sizes(config(sliding_window=4, use_sliding_window=False)) == [TOKENS_BYTES * 128] * 3
    assert sizes(config(sliding_window=4)) == [2 * 4 * 4 * 128] * 3


def test_recurrent_layers_and_those_that_share_keep_nothing() -> None:
    kinds = ["linear_attention", "full_attention", "full_attention"]
    assert sizes(config(layer_types=kinds, num_kv_shared_layers=1)) == [0, TOKENS_BYTES * 128, 0]
    assert sizes(SimpleNamespace(use_cache=True, num_hidden_layers=2, hidden_size=8)) == [0, 0]


def test_layers_with_configurations_of_their_own() -> None:
    layers = [config(num_key_value_heads=each) for each in (1, 2, 4)]
    assert sizes(config(per_layer_config=layers)) == [TOKENS_BYTES * 16 * each for each in (1, 2, 4)]


def test_an_encoder_decoder_keeps_what_it_looks_at_as_well() -> None:
    both = SimpleNamespace(is_encoder_decoder=True, num_layers=9, num_decoder_layers=2, num_heads=4, d_kv=8, d_model=5)
    assert sizes(both) == [2 * (10 + 10) * 4 * 64] * 2
    assert sizes(both, encoder_length=7) == [2 * (10 + 7) * 4 * 64] * 2
    both.max_source_positions = 1500
    assert sizes(both) == [2 * 1510 * 4 * 64] * 2


@pytest.mark.parametrize(
    "entries", [{"is_decoder": False, "type_vocab_size": 2}, {"use_cache": None}], ids=["BERT", "no cache"]
)
def test_an_encoder_keeps_nothing(entries: dict[str, Any]) -> None:
    encoder = config(**entries)
    if encoder.use_cache is None:
        del encoder.use_cache
    assert sizes(encoder) == [0, 0, 0]


def test_a_composite_model_keeps_what_its_language_model_does() -> None:
    assert sizes(SimpleNamespace(text_config=config(num_key_value_heads=1))) == [TOKENS_BYTES * 16] * 3


def test_nothing_is_known_of_no_layers() -> None:
    assert sizes(SimpleNamespace()) == []


@given(batch=st.integers(1, 64), length=st.integers(1, 10_000), heads=st.sampled_from([1, 2, 4, 8]))
def test_bytes_grow_with_batch_length_and_heads(batch: int, length: int, heads: int) -> None:
    each = config(num_key_value_heads=heads)
    assert sizes(each, batch_size=batch, length=length, dtype="int8") == [batch * length * heads * 16] * 3
    assert sizes(each, batch_size=batch, length=length, dtype="int4") == [batch * length * heads * 8] * 3


@pytest.mark.parametrize("name", ["batch_size", "length", "encoder_length"])
@pytest.mark.parametrize("value", [0, -1, True, 1.5])
def test_a_size_that_is_none(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"`{name}={value!r}` is no size"):
        sizes(config(), **{name: value})


def test_heads_of_no_known_size() -> None:
    with pytest.raises(ConfigError, match="tells neither of `num_attention_heads` nor of `hidden_size`"):
        sizes(SimpleNamespace(use_cache=True, num_hidden_layers=1, num_attention_heads=4))
