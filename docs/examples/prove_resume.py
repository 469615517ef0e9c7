"""Run the quickstart undisturbed, run it again and kill it in the middle of an epoch, resume it, and compare.

    hatch run quickstart
    python docs/examples/prove_resume.py --num-processes 4

It starts `accel launch --num-processes 2 docs/examples/quickstart.py` three times, and exits with 1 if the accuracy is
under 97 %, if an image was left out or counted twice, or if a loss of the resumed run differs from the undisturbed one.
With more than two processes a loss may differ in its last digits: DDP lays its exchange buffers out anew after the
first step of a process, and a sum of three numbers depends on their order. The largest difference is printed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).with_name("quickstart.py")
HELD_OUT = 359
LEAST_ACCURACY = 0.97
LIMIT_S = 300


def command(project_dir: Path, num_processes: int) -> list[str]:
    """The line that a user would type."""
    launch = [sys.executable, "-m", "accel_launch", "launch", "--cpu", "--num-processes", str(num_processes)]
    return [*launch, str(SCRIPT), "--project-dir", str(project_dir)]


def run_to_the_end(project_dir: Path, num_processes: int) -> dict[str, float]:
    """Run it and return what it printed last."""
    done = subprocess.run(
        command(project_dir, num_processes), stdout=subprocess.PIPE, text=True, timeout=LIMIT_S, check=True
    )
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def run_and_kill(project_dir: Path, num_processes: int, *, at_step: int) -> int:
    """Start it, and send SIGKILL to all of its processes once it has logged step `at_step`. Returns the last step."""
    started = subprocess.Popen(command(project_dir, num_processes), stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + LIMIT_S
    try:
        while (last := max(losses(project_dir), default=0)) < at_step:
            if started.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"It ended by itself (exit code {started.poll()}) before step {at_step}.")
            time.sleep(0.005)
    finally:
        os.killpg(started.pid, signal.SIGKILL)  # the launcher; its workers die with it
        started.wait()
    return last


def losses(project_dir: Path) -> dict[int, set[float]]:
    """Every loss that was logged, by step. A step that was run again after the resume has one entry if both agree."""
    found: dict[int, set[float]] = {}
    # Not rglob: before Python 3.13 that raises where a folder is renamed under it, as a commit of a checkpoint does.
    logs = [Path(folder, "metrics.jsonl") for folder, _, files in os.walk(project_dir) if "metrics.jsonl" in files]
    for path in logs:
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                row = json.loads(line)
                found.setdefault(row["step"], set()).add(row["loss"])
    return found


def largest_difference(expected: dict[int, set[float]], found: dict[int, set[float]]) -> float:
    """Between the losses of two runs; infinite if they do not have the same steps."""
    if expected.keys() != found.keys():
        return float("inf")
    return max(abs(one - other) for step, values in expected.items() for one in values for other in found[step])


def main() -> int:
    parser = argparse.ArgumentParser(description="Prove that a killed and resumed run equals an undisturbed one.")
    parser.add_argument("--num-processes", type=int, default=2, help="processes of each run (default: 2)")
    num_processes = parser.parse_args().num_processes
    with tempfile.TemporaryDirectory(prefix="quickstart-") as folder:
        undisturbed, resumed = Path(folder) / "undisturbed", Path(folder) / "resumed"
        print(f"1. {num_processes} processes, undisturbed", flush=True)
        expected = run_to_the_end(undisturbed, num_processes)
        steps = losses(undisturbed)
        # Epochs are 20: a place that is two fifths through the ninth lies in the middle of one.
        kill_at = round(len(steps) / 20 * 8.4)
        print(f"\n2. the same, killed after step {kill_at} of {len(steps)}, in the middle of epoch 8", flush=True)
        last = run_and_kill(resumed, num_processes, at_step=kill_at)
        checkpoints = sorted(path.name for path in (resumed / "checkpoints").iterdir())
        print(f"\n   killed at step {last}; {len(checkpoints)} checkpoints were complete", flush=True)
        print("\n3. resumed", flush=True)
        result = run_to_the_end(resumed, num_processes)
        again = losses(resumed)
    difference = largest_difference(steps, again)
    same = difference == 0 if num_processes <= 2 else difference < 1e-4
    print(f"\naccuracy           {result['accuracy']:.2%} of held-out images (undisturbed: {expected['accuracy']:.2%})")
    print(f"images evaluated   {result['evaluated']} of {HELD_OUT}, each exactly once")
    verdict = "all equal to" if difference == 0 else f"at most {difference:.2g} away from"
    print(f"losses             {len(again)} steps, {verdict} the undisturbed run's")
    good = same and result["evaluated"] == HELD_OUT and result["accuracy"] >= LEAST_ACCURACY
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
