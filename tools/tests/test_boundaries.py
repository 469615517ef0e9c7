"""Each rule is seen to catch what it is for, and the repository keeps them all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from boundaries import check
from repository import ROOT


def violations(root: Path, files: dict[str, str]) -> list[str]:
    """Rules broken by the given modules, as ``file:line rule``; files are named ``package/module.py``."""
    for name, text in files.items():
        path = root / "packages" / name.split("/")[0].replace("_", "-") / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return [f"{Path(each.file).name}:{each.line} {each.rule}" for each in check(root)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import os\nx = os.environ['A']\n", ["m.py:2 environment"]),
        ("from os import getenv\n", ["m.py:1 environment"]),
        ("import os\nx = os.getpid()\n", []),
        ("def f():\n    global _x\n    _x = 1\n", ["m.py:2 global"]),
        ("import pickle\n", ["m.py:1 pickle"]),
        ("from pickle import loads\n", ["m.py:1 pickle"]),
        ("import torch\nx = torch.load('f')\n", ["m.py:2 pickle"]),
        ("from torch import save\n", ["m.py:1 pickle"]),
        ("import torch\nx = torch.tensor(1)\n", []),
        ("try:\n    x = 1\nexcept Exception:\n    x = 2\n", ["m.py:3 broad-except"]),
        ("try:\n    x = 1\nexcept:\n    x = 2\n", ["m.py:3 broad-except"]),
        ("try:\n    x = 1\nexcept Exception as error:\n    x = str(error)\n", ["m.py:3 broad-except"]),
        ("try:\n    x = 1\nexcept Exception as error:\n    x = error\n", []),
        ("try:\n    x = 1\nexcept BaseException:\n    x = 2\n    raise\n", []),
        ("import os\ntry:\n    x = 1\nexcept BaseException:\n    os._exit(1)\n", []),
        ("try:\n    x = 1\nexcept ValueError:\n    x = 2\n", []),
        ("x = 1\n" * 501, ["m.py:1 size"]),
        ("x = 1\n" * 500, []),
        ("def f():\n" + "    x = 1\n" * 61, ["m.py:1 size"]),
        ('def f():\n    """\n' + "    Long.\n" * 80 + '    """\n    return 1\n', []),
    ],
)
def test_rule_of_one_module(tmp_path: Path, text: str, expected: list[str]) -> None:
    assert violations(tmp_path, {"accel_data/m.py": text}) == expected


@pytest.mark.parametrize("name", ["utils", "helpers", "common", "dataclasses", "_utils"])
def test_a_file_named_by_nothing_is_refused(tmp_path: Path, name: str) -> None:
    assert violations(tmp_path, {f"accel_data/sub/{name}.py": ""}) == [f"{name}.py:1 name"]


def test_accelerator_has_a_limit_of_its_own(tmp_path: Path) -> None:
    assert violations(tmp_path, {"accel/accelerator.py": "x = 1\n" * 599}) == []
    assert violations(tmp_path, {"accel/accelerator.py": "x = 1\n" * 600}) == ["accelerator.py:1 size"]


def test_owners_may_do_what_others_may_not(tmp_path: Path) -> None:
    allowed = {
        "accel_state/env.py": "import os\nx = os.environ\n",
        "accel_state/process.py": "_current = None\ndef f():\n    global _current\n    _current = 1\n",
        "accel_state/testing.py": "import pickle\n",
        "accel_state/testing/ranks.py": "import pickle\n",
    }
    assert violations(tmp_path, allowed) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import torch\nfrom pickle import UnpicklingError\nx = torch.load('f', weights_only=True)\n", []),
        ("import torch\nx = torch.load('f', weights_only=False)\n", ["foreign.py:2 pickle"]),
        ("import torch\nx = torch.load('f', weights_only=y)\n", ["foreign.py:2 pickle"]),
        ("import torch\nx = torch.save('f', weights_only=True)\n", ["foreign.py:2 pickle"]),
        ("from pickle import UnpicklingError, loads\n", ["foreign.py:1 pickle"]),
    ],
)
def test_the_converter_reads_weights_only(tmp_path: Path, text: str, expected: list[str]) -> None:
    assert violations(tmp_path, {"accel_parallel/checkpoint_commands/convert/foreign.py": text}) == expected


@pytest.mark.parametrize(
    "back",
    [
        "from accel_data import a\n",
        "import accel_data.a\n",
        "from .a import x\n",
        "from accel_data.a import x\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from accel_data.a import x\n",
        "def f():\n    from accel_data.a import x\n",
    ],
)
def test_cycle_is_found_however_it_is_hidden(tmp_path: Path, back: str) -> None:
    files = {"accel_data/__init__.py": "", "accel_data/a.py": "from accel_data import b\n", "accel_data/b.py": back}
    assert violations(tmp_path, files) == ["a.py:1 cycle"]


def test_lazy_names_of_a_package_are_no_cycle(tmp_path: Path) -> None:
    lazy = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from accel_data.a import x as x\n"
    files = {"accel_data/__init__.py": lazy, "accel_data/a.py": "from accel_data import __version__\n"}
    assert violations(tmp_path, files) == []


def test_cycle_over_three_modules_names_the_path(tmp_path: Path) -> None:
    files = {f"accel_data/{a}.py": f"import accel_data.{b}\n" for a, b in [("a", "b"), ("b", "c"), ("c", "a")]}
    violations(tmp_path, files)
    (found,) = check(tmp_path)
    assert "accel_data.a -> accel_data.b -> accel_data.c -> accel_data.a" in found.message


def test_torch_behind_another_module_is_found(tmp_path: Path) -> None:
    files = {
        "accel_launch/__init__.py": "",
        "accel_launch/cli.py": "import accel_launch.host\n",
        "accel_launch/host.py": "import torch\n",
        "accel_state/config.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n",
        "accel_state/env.py": "def f():\n    import torch\n",
    }
    assert violations(tmp_path, files) == ["host.py:1 torch-free"]


def test_the_repository_keeps_every_boundary() -> None:
    """The star, the leaves' independence, declared dependencies and the rules above, all as ``hatch run imports``."""
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "imports.py"], capture_output=True, text=True, timeout=110, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
