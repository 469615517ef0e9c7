"""Settings in sections keep what was written, and where it came from."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_parallel.deepspeed.settings import Settings, table
from accel_state.errors import ConfigError

leaf = st.one_of(st.integers(), st.booleans(), st.just("auto"), st.lists(st.integers(), max_size=2))
section = st.recursive(
    leaf, lambda inner: st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3), max_leaves=8
)
sections = st.dictionaries(st.text("abc", min_size=1, max_size=2), section, max_size=4)


@given(values=sections, data=st.data())
@settings(max_examples=60, deadline=None)
def test_settings_hold_what_was_written_and_where_from(values: dict[str, Any], data: st.DataObject) -> None:
    held = Settings(values, "file")
    assert held.values == values
    assert [key for key, _, source in held.rows() if source != "file"] == []
    rebuilt = Settings()
    for key, value, source in held.rows():
        rebuilt.set(key, value, source)
    assert rebuilt.values == values
    assert rebuilt.rows() == held.rows()
    if held.names():
        key = data.draw(st.sampled_from(held.names()))
        held.set(key, {"x": 1}, "argument")
        assert (held.get(f"{key}.x"), held.source(f"{key}.x"), held.source(key)) == (1, "argument", "argument")
        held.remove(key)
        assert held.get(key) is None
        assert all(not name.startswith(f"{key}.") for name in held.names())
    assert values == Settings(values).values


def test_true_and_one_are_not_the_same_setting() -> None:
    held = Settings({"a": True}, "file")
    with pytest.raises(ConfigError, match=r"`a` is True \(file\) and 1 \(argument\)"):
        held.merge("a", 1, "argument")
    assert table(()) == ""
