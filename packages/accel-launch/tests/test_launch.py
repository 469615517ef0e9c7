"""Real launches, as from a shell."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHOW = """
import json, os, sys
if "RANK" in os.environ or "show" in sys.argv:
    seen = {name: os.environ.get(name) for name in
            ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
             "OMP_NUM_THREADS", "ACCEL_RUN_CONFIG")}
    sys.stdout.write(json.dumps({**seen, "argv": sys.argv[1:]}) + "\\n")
"""

IDENTITY = """
import json, sys
main = sys.modules["__main__"]
print(json.dumps([sys.argv, main.__file__, main.__name__, __name__, sys.path[0], repr(__spec__ and __spec__.name),
                  sys.stdout.write_through, sys.executable]))
"""

ALL_REDUCE = """
import torch, torch.distributed as dist
from accel_state import Process
with Process.open() as process:
    value = torch.tensor([float(process.topology.rank + 1)])
    dist.all_reduce(value)
    print(f"sum {value.item()} of {process.topology.world_size}\\n", end="")
"""


def lines(text: str) -> list[dict[str, Any]]:
    return sorted((json.loads(line) for line in text.splitlines()), key=lambda each: int(each["RANK"] or 0))


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_gets_its_place(launcher: Any, world_size: int) -> None:
    done = launcher.run("--num-processes", str(world_size), "--mixed-precision", "bf16", launcher.script(SHOW))
    assert (done.returncode, done.stderr) == (0, "")
    seen = lines(done.stdout)
    assert [each["RANK"] for each in seen] == [each["LOCAL_RANK"] for each in seen]
    assert [each["RANK"] for each in seen] == [str(rank) for rank in range(world_size)]
    assert {each["MASTER_ADDR"] for each in seen} == {"127.0.0.1"}
    assert len({each["MASTER_PORT"] for each in seen}) == 1
    assert json.loads(seen[0]["ACCEL_RUN_CONFIG"])["settings"] == {"mixed_precision": "bf16"}


def test_one_process_has_no_variables(launcher: Any) -> None:
    done = launcher.run("--num-processes", "1", launcher.script(SHOW), "show")
    (seen,) = lines(done.stdout)
    assert {name for name, value in seen.items() if value} == {"OMP_NUM_THREADS", "argv"}


def test_arguments_of_the_script_are_its_own(launcher: Any) -> None:
    words = ["--num-processes", "9", "--", "-m", "--help", "", "a b", "--lr=1"]
    done = launcher.run("--num_processes=2", launcher.script(SHOW), *words)
    assert [each["argv"] for each in lines(done.stdout)] == [words, words]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("name", ["script.py", "a folder/my script.py"])
def test_a_script_is_run_exactly_as_by_python(launcher: Any, world_size: int, name: str) -> None:
    launcher.script(IDENTITY, name)
    plain = subprocess.run(
        [sys.executable, name, "x", "y z"],
        cwd=launcher.folder,
        env=launcher.env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    done = launcher.run("--num-processes", str(world_size), name, "x", "y z")
    assert done.stdout.splitlines() == [plain.stdout.strip()] * world_size


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_module_is_run_exactly_as_by_python(launcher: Any, world_size: int) -> None:
    launcher.script("", "pkg/__init__.py")
    launcher.script(IDENTITY, "pkg/train.py")
    plain = subprocess.run(
        [sys.executable, "-m", "pkg.train", "-m"],
        cwd=launcher.folder,
        env=launcher.env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    done = launcher.run("--num-processes", str(world_size), "-m", "pkg.train", "-m")
    assert done.stdout.splitlines() == [plain.stdout.strip()] * world_size


@pytest.mark.parametrize("world_size", ["1", "2"])
def test_a_program_is_run_as_it_is(launcher: Any, world_size: int) -> None:
    done = launcher.run("--num-processes", world_size, "--no-python", "sh", "-c", "echo rank ${RANK:-none}")
    assert sorted(done.stdout.splitlines()) == (["rank none"] if world_size == "1" else ["rank 0", "rank 1"])


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_meet(launcher: Any, world_size: int) -> None:
    done = launcher.run("--cpu", "--num-processes", str(world_size), launcher.script(ALL_REDUCE))
    total = world_size * (world_size + 1) / 2
    assert done.stdout.splitlines() == [f"sum {total} of {world_size}"] * world_size, done.stderr


@pytest.mark.parametrize("attempt", range(3))
def test_two_launches_at_once_just_work(launcher: Any, attempt: int) -> None:
    script = launcher.script(ALL_REDUCE)
    both = [launcher.start("--cpu", "--num-processes", "2", script) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=60)
        assert out.splitlines() == ["sum 3.0 of 2"] * 2, err
        assert process.returncode == 0


def test_two_machines_meet_at_a_given_port(launcher: Any) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = ["--cpu", "--num-machines", "2", "--num-processes", "4"]
    flags += ["--main-process-ip", "127.0.0.1", "--main-process-port", str(port)]
    script = launcher.script(ALL_REDUCE)
    both = [launcher.start(*flags, "--machine-rank", str(rank), script) for rank in range(2)]
    for process in both:
        out, err = process.communicate(timeout=60)
        assert out.splitlines() == ["sum 10.0 of 4"] * 2, err


def test_a_given_port_that_is_taken_is_refused_before_anything_starts(launcher: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = launcher.run(
            "--num-processes", "2", "--main-process-port", str(port), launcher.script("print('started')")
        )
    assert done.returncode == 2
    assert f"accel: `--main-process-port {port}` was given, but port {port} is taken" in done.stderr
    assert done.stdout == ""


def test_dry_run_starts_nothing(launcher: Any) -> None:
    done = launcher.run("--dry-run", "--num-processes", "2", launcher.script("open('ran', 'w')"), "a b")
    assert done.returncode == 0
    assert "script.py 'a b'" in done.stdout
    assert not (launcher.folder / "ran").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian.py"], r"The script `trian.py` does not exist: there is no such file in .*Did you mean 'train.py'\?"),
        (["nowhere/train.py"], r"neither does its folder `nowhere`"),
        (["--no-python", "no-such-program"], r"there is no program 'no-such-program'"),
        ([], r"was given no script, so there is nothing to start"),
        (["--cpu", "--multi-gpu", "train.py"], r"`--cpu` and `--multi-gpu` were both given"),
        (["--num-processes", "0", "train.py"], r"`--num-processes 0` is not a count"),
    ],
)
def test_refusals_end_with_2(launcher: Any, words: list[str], message: str) -> None:
    launcher.script("", "train.py")
    done = launcher.run(*words)
    assert done.returncode == 2
    assert re.search(message, done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("world_size", ["1", "2"])
def test_a_script_that_cannot_be_parsed_is_pythons_own_error(launcher: Any, world_size: str) -> None:
    done = launcher.run("--quiet", "--num-processes", world_size, launcher.script("def (:\n"))
    plain = subprocess.run(
        [sys.executable, str(launcher.folder / "script.py")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == plain.returncode == 1
    assert done.stderr == plain.stderr


def test_one_process_keeps_its_exit_code_and_signals(launcher: Any) -> None:
    assert launcher.run("--num-processes", "1", launcher.script("raise SystemExit(7)")).returncode == 7
    process = launcher.start("--num-processes", "1", launcher.script("import time; open('up', 'w'); time.sleep(60)"))
    launcher.wait_for_files("up")
    assert launcher.alive() == [process.pid], "the launcher was to become the script"
    process.terminate()
    assert process.wait(10) == -15
    process.communicate()


def test_rank_0_alone_has_the_terminal(launcher: Any) -> None:
    script = launcher.script("""
import os, sys
text = sys.stdin.read()
sys.stdout.write(f"{os.environ['RANK']} {text!r}\\n")
""")
    read, write = os.pipe()
    os.write(write, b"typed")
    os.close(write)
    done = launcher.run("--num-processes", "2", script, stdin=read)
    os.close(read)
    assert sorted(done.stdout.splitlines()) == ["0 'typed'", "1 ''"]


def test_log_folder_keeps_everything(launcher: Any) -> None:
    script = launcher.script("""
import os, sys
print("out", os.environ.get("RANK")); print("err", os.environ.get("RANK"), file=sys.stderr)
""")
    for world_size, ranks in (("2", ["0", "1"]), ("1", ["None"])):
        logs = launcher.folder / f"logs{world_size}" / "here"
        done = launcher.run("--log-dir", str(logs), "--num-processes", world_size, script)
        assert sorted(done.stdout.splitlines()) == [f"out {rank}" for rank in ranks]
        assert sorted(done.stderr.splitlines()) == [f"err {rank}" for rank in ranks]
        for index, rank in enumerate(ranks):
            assert (logs / f"rank{index}.stdout.log").read_text() == f"out {rank}\n"
            assert (logs / f"rank{index}.stderr.log").read_text() == f"err {rank}\n"
        assert len(list(logs.iterdir())) == 2 * len(ranks)


def test_no_torch_in_the_launcher(launcher: Any) -> None:
    """Neither for help nor before the script of one process: what is loaded is seen at the moment of exec."""
    code = """
import os, sys
def stop(*args):
    heavy = {"torch", "numpy", "importlib.metadata"} & set(sys.modules)
    assert not heavy, heavy
    print(len(sys.modules)); sys.exit(0)
os.execvpe = stop
from accel_launch.cli import main
main(["launch", "--num-processes", "1", sys.argv[1]])
sys.exit("exec was not reached")
"""
    script = launcher.script("")
    done = subprocess.run([sys.executable, "-c", code, script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    code = "import sys; from accel_launch.cli import main; main(['--help']); main(['launch', '--help']); "
    code += "assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=60)


def test_no_torch_in_the_launcher_of_several(launcher: Any) -> None:
    code = """
import sys
from accel_launch.cli import main
code = main(["launch", "--num-processes", "2", sys.argv[1]])
assert "torch" not in sys.modules and "ctypes" not in sys.modules
sys.exit(code)
"""
    script = launcher.script("")
    subprocess.run([sys.executable, "-c", code, script], check=True, env=launcher.env, timeout=60)


def test_an_interpreter_that_is_gone_is_named(launcher: Any) -> None:
    from accel_launch import Host, LaunchOptions, plan_launch
    from accel_launch.run import run
    from accel_state.errors import ConfigError

    host = Host(python=str(Path(launcher.folder) / "no-python"))
    plan = plan_launch(LaunchOptions(num_processes=2), host, "a.py")
    with pytest.raises(
        ConfigError, match=r"Rank 0 could not be started as `.*no-python a.py`: .*Check that the program"
    ):
        run(plan, launcher.env)
