"""Each package alone, as a user gets it: ``hatch run alone:check [PACKAGE ...] [-- PYTEST ARGUMENTS]``.

For each package a virtual environment without pip is made that holds

- a ``.pth`` to the base, which is the environment this tool runs in: torch, numpy, pytest, pytest-timeout, hypothesis;
- the package and the siblings it declares, from wheels built just now, never from the checkout;
- the third parties that these declare, so that one that is used and not declared is missing.

There ``pip check`` must agree with every version range, every module must be importable, and the package's own tests
must pass. The tests run from an empty folder, with the sources out of reach.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from dataclasses import dataclass
from pathlib import Path

from repository import ROOT, Package, packages
from wheels import build

__all__ = ["needed_siblings", "third_parties"]

STEP_TIMEOUT_S = 300.0
TESTS_TIMEOUT_S = 900.0
BASE = ("torch", "numpy")
"""What every environment sees anyway; all else that a package declares is installed beside it."""


def needed_siblings(name: str, known: dict[str, Package]) -> list[str]:
    """The package and every sibling that it needs, directly or through another, in order of name."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        each = waiting.pop()
        if each not in found:
            found.add(each)
            waiting += [other for other in known[each].requirements if other in known]
    return sorted(found)


def third_parties(names: list[str], known: dict[str, Package]) -> list[str]:
    """What these packages declare that is neither a sibling nor in the base."""
    found = {}
    for name in names:
        for other, requirement in known[name].requirements.items():
            if other not in known and other not in BASE:
                found[f"{other} {requirement}"] = requirement
    return [found[key] for key in sorted(found)]


@dataclass(frozen=True)
class Check:
    """One package's turn."""

    name: str
    folder: Path
    """Where its environment and its working folder go."""
    wheels: dict[str, Path]
    known: dict[str, Package]

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        return self.folder / "env" / "bin" / "python"

    def run(self, pytest_arguments: list[str]) -> bool:
        """Make the environment, look at it, run the tests. Prints as it goes; False at the first failure."""
        self._make()
        return self._consistent() and self._imports() and self._tests(pytest_arguments)

    def _make(self) -> None:
        venv.create(self.folder / "env", with_pip=False, symlinks=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        site = self.folder / "env" / "lib" / version / "site-packages"
        (site / "base.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        siblings = needed_siblings(self.name, self.known)
        self._pip("install", "--no-deps", *(str(self.wheels[each]) for each in siblings))
        others = third_parties(siblings, self.known)
        if others:
            self._pip("install", *others)

    def _pip(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """pip of the base, acting on the environment: its base.pth tells it what is there already."""
        done = subprocess.run(
            [sys.executable, "-m", "pip", "--python", str(self.python), "--disable-pip-version-check", *arguments],
            capture_output=True,
            text=True,
            timeout=STEP_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
        if check and done.returncode:
            raise SystemExit(f"alone {self.name}: pip {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
        return done

    def _consistent(self) -> bool:
        done = self._pip("check", check=False)
        broken = [line for line in done.stdout.splitlines() if line.startswith("accel")]
        for line in broken:
            print(f"alone {self.name}: {line}")
        return not broken

    def _imports(self) -> bool:
        code = (
            "import importlib, pkgutil, sys\n"
            f"package = importlib.import_module({self.known[self.name].import_name!r})\n"
            f"assert {str(self.folder)!r} in package.__file__, package.__file__\n"
            "for each in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
            "    if not each.name.endswith('__main__'): importlib.import_module(each.name)\n"
        )
        return self._python("-c", code, timeout_s=STEP_TIMEOUT_S) == 0

    def _tests(self, pytest_arguments: list[str]) -> bool:
        tests = self.known[self.name].folder / "tests"
        if not list(tests.glob("test_*.py")):
            print(f"alone {self.name}: no tests in {tests.relative_to(ROOT)}")
            return False
        settings = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider", "-q"]
        return self._python("-m", "pytest", *settings, *pytest_arguments, str(tests), timeout_s=TESTS_TIMEOUT_S) == 0

    def _python(self, *arguments: str, timeout_s: float) -> int:
        work = self.folder / "work"
        work.mkdir(exist_ok=True)
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COVERAGE"))}
        environment["PATH"] = f"{self.python.parent}{os.pathsep}{environment.get('PATH', '')}"
        environment["VIRTUAL_ENV"] = str(self.python.parent.parent)
        command = [str(self.python), *arguments]
        process = subprocess.Popen(command, cwd=work, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            print(f"alone {self.name}: not finished after {timeout_s:.0f} s")
            return 1
        finally:
            _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End whatever is left of the group that `process` leads."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        return
    process.wait(10)


def _arguments(known: dict[str, Package]) -> tuple[list[str], list[str]]:
    arguments, pytest_arguments = sys.argv[1:], []
    if "--" in arguments:
        cut = arguments.index("--")
        arguments, pytest_arguments = arguments[:cut], arguments[cut + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help=f"by default all: {', '.join(known)}")
    names = parser.parse_args(arguments).packages or list(known)
    for name in names:
        if name not in known:
            parser.error(f"{name!r} is not a package here. The packages are {', '.join(known)}.")
    return names, pytest_arguments


def main() -> int:
    """Check the packages asked for; 1 if any failed."""
    known = packages()
    names, pytest_arguments = _arguments(known)
    summary = []
    folder = Path(tempfile.mkdtemp(prefix="accel-alone-"))
    try:
        wheels = build(folder / "wheels")
        for name in names:
            print(f"alone {name}:", flush=True)
            begin = time.monotonic()
            good = Check(name, folder / name, wheels, known).run(pytest_arguments)
            summary.append((name, good, time.monotonic() - begin))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    for name, good, seconds in summary:
        print(f"alone {name:<16} {'ok' if good else 'FAILED':<6} {seconds:5.1f} s")
    return 0 if all(good for _, good, _ in summary) else 1


if __name__ == "__main__":
    sys.exit(main())
