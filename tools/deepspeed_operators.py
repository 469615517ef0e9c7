"""Compiles DeepSpeed's operators, so that no test waits for a compiler. Run by `hatch run deepspeed:install`."""

from __future__ import annotations

from accel_parallel.deepspeed.operators import build_operators

if __name__ == "__main__":
    print(f"compiled: {', '.join(build_operators())}", flush=True)
