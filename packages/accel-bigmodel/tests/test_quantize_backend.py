"""Whether a library that quantizes is here, and new enough."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from accel_bigmodel.quantize.backend import require
from accel_state.errors import ConfigError, MissingDependencyError


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `quantizer_of_this_test` without a version; the folder it is in."""
    (tmp_path / "quantizer_of_this_test.py").write_text("answer = 42\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "quantizer_of_this_test", raising=False)
    return tmp_path


@pytest.mark.parametrize("version", ["0.46", "0.46.0", "0.50.2", "1.0", "0.47.0.dev0", "0.46+cpu"])
def test_new_enough(library: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    assert require("quantizer_of_this_test", "0.46", "this").answer == 42


@pytest.mark.parametrize("version", ["0.45.9", "0.9", "0.4+cu126"])
def test_too_old(library: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    with pytest.raises(ConfigError, match=r"is installed, but this needs 0\.46 or newer.*pip install 'quant.*>=0\.46'"):
        require("quantizer_of_this_test", "0.46", "this")


def test_absent_or_only_a_folder_of_that_name(library: Path) -> None:
    with pytest.raises(MissingDependencyError, match="`quantizer_of_no_test` is needed for this"):
        require("quantizer_of_no_test", "1", "this")
    with pytest.raises(MissingDependencyError, match="`quantizer_of_this_test` is needed for this"):
        require("quantizer_of_this_test", "1", "this")


def test_what_the_library_lacks_itself_is_not_blamed_on_it(library: Path) -> None:
    (library / "quantizer_of_this_test.py").write_text("import library_of_the_quantizer\n")
    with pytest.raises(ModuleNotFoundError, match="library_of_the_quantizer") as raised:
        require("quantizer_of_this_test", "1", "this")
    assert not isinstance(raised.value, MissingDependencyError)
