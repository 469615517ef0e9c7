"""The README's example runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_first_example(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)[0])
    done = subprocess.run(
        [sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=90, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
