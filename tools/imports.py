"""All checks of who imports whom, in one command: ``hatch run imports``.

1. ``tools/boundaries.py``: cycles between modules, the environment, globals, pickle, sizes, names.
2. import-linter: the star and the independence of the leaves (contracts in pyproject.toml).
3. deptry in each package's folder: what is imported is declared, what is declared is imported.

All run even where one fails; exits with 1 if any did.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boundaries
from repository import ROOT, Package, packages

__all__ = ["deptry_command"]

UNUSED_ON_PURPOSE = {
    # `accel` offers their names, which it imports when they are first asked for; deptry does not see that.
    "accel": ("accel-bigmodel", "accel-launch"),
}


def deptry_command(package: Package) -> list[str]:
    """The call that checks one package, to be run in its folder."""
    command = [sys.executable, "-m", "deptry", "src", "--no-ansi", "--known-first-party", package.import_name]
    ignored = UNUSED_ON_PURPOSE.get(package.name, ())
    return [*command, "--per-rule-ignores", "DEP002=" + "|".join(ignored)] if ignored else command


def _deptry(package: Package) -> tuple[str, int, str]:
    done = subprocess.run(
        deptry_command(package),
        cwd=package.folder,
        capture_output=True,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    return package.name, done.returncode, done.stdout + done.stderr


def _import_linter() -> int:
    program = str(Path(sys.executable).with_name("lint-imports"))
    command = [program, "--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    return subprocess.run(command, cwd=ROOT, timeout=120, stdin=subprocess.DEVNULL).returncode


def main() -> int:
    """Run every check; 1 if any failed."""
    failed = []
    violations = boundaries.check(ROOT)
    for each in violations:
        print(each)
    print(f"boundaries: {len(violations)} violation(s)", flush=True)
    if violations:
        failed.append("boundaries")
    if _import_linter():
        failed.append("import-linter")
    with ThreadPoolExecutor(2) as pool:
        for name, code, output in pool.map(_deptry, packages().values()):
            print(f"deptry {name}: {'ok' if code == 0 else output.strip()}", flush=True)
            if code:
                failed.append(f"deptry {name}")
    print(f"imports: {', '.join(failed)} failed" if failed else "imports: all checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
