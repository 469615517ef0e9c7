from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import accel_launch.port as port_module
from accel_launch.port import candidate_ports, hold_free_port, hold_port
from accel_state.errors import ConfigError


@settings(max_examples=20, deadline=None)
@given(low=st.integers(1024, 40_000), width=st.integers(1, 30_000), start=st.integers(0, 2**32 - 1))
def test_candidates_are_each_once_and_not_the_kernels(low: int, width: int, start: int) -> None:
    high = min(low + width, 60_000)
    ports = list(candidate_ports(low, high, start))
    assert len(set(ports)) == len(ports) > 0
    assert all(1024 <= port <= 65_535 for port in ports)
    assert not any(low <= port <= high for port in ports)


def test_candidates_where_the_kernel_uses_all_ports() -> None:
    assert min(candidate_ports(1024, 60_999, 7)) == 61_000
    assert len(list(candidate_ports(1024, 65_535, 7))) == 10_000


def test_ports_held_at_once_differ() -> None:
    with ExitStack() as stack:
        ports = [stack.enter_context(hold_free_port()) for _ in range(50)]
        assert len(set(ports)) == 50


def test_a_held_port_is_not_found_free_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both begin at the same candidate: without the lock both would take it, since nobody listens yet."""
    monkeypatch.setattr(port_module.os, "urandom", lambda count: b"\0" * count)
    with hold_free_port() as first, hold_free_port() as second:
        assert first != second
    with hold_free_port() as again:
        assert again == first


def test_a_port_that_is_listened_on_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_module.os, "urandom", lambda count: b"\0" * count)
    with hold_free_port() as first:
        pass
    with socket.create_server(("127.0.0.1", first)), hold_free_port() as second:
        assert second != first


def test_a_held_port_can_be_served_by_rank_0() -> None:
    with hold_free_port() as port, socket.create_server(("0.0.0.0", port)):
        pass


def test_a_given_port_that_is_taken_is_refused_by_name() -> None:
    with hold_free_port() as port:
        message = rf"`--main-process-port {port}`.*is taken.*Give another port"
        with pytest.raises(ConfigError, match=message), hold_port(port):
            pass
    server = socket.create_server(("127.0.0.1", port))
    with server, pytest.raises(ConfigError, match=rf"port {port} is taken"), hold_port(port):
        pass
    with hold_port(port) as held:
        assert held == port


def test_no_port_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(port_module, "_is_free", lambda port: False)
    monkeypatch.setattr(port_module, "candidate_ports", lambda low, high, start: range(15_000, 15_010))
    with pytest.raises(ConfigError, match=r"needs a TCP port, but every one .* is taken"), hold_free_port():
        pass


def test_range_of_the_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(port_module, "_EPHEMERAL", tmp_path / "range")
    assert port_module._ephemeral_range() == (32_768, 60_999)
    (tmp_path / "range").write_text("15000\t61000\n")
    assert port_module._ephemeral_range() == (15_000, 61_000)
