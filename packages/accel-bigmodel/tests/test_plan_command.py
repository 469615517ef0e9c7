"""`accel plan`: from headers of safetensors, so that no other package is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from accel_bigmodel.plan_command import HELP, main
from accel_state.errors import ConfigError
from accel_state.tensor_format import TensorShape, file_header


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (256, 64), "norm.weight": (64,), "head.weight": (256, 64)}
    for number in range(8):
        shapes |= {f"layers.{number}.up.weight": (256, 64), f"layers.{number}.down.weight": (64, 256)}
    tensors = {name: TensorShape(shape, torch.bfloat16) for name, shape in shapes.items()}
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_header(tensors) + bytes(sum(each.nbytes for each in tensors.values())))
    return path


SMALL = ["--memory", "0=400KiB,cpu=1MiB", "--batch-size", "1", "--sequence-length", "8"]


def test_the_table_and_what_is_not_known(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(checkpoint), *SMALL]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[:3]] == ["device", "0", "cpu"]
    assert "576.12 KiB of weights and buffers in bfloat16, 11 layers; 1 x 8 tokens computed at once." in out
    assert "One more token for each sequence:" in out
    assert "KV cache is not counted: there is no configuration" in out
    assert "told from names of tensors" in out


def test_numbers_and_files(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for picture in ("map.svg", "map.html"):
        files = ["--picture", str(tmp_path / picture), "--map-output", str(tmp_path / "map.json")]
        assert main([str(checkpoint.parent), *SMALL, "--json", *files]) == 0
    numbers = json.loads(capsys.readouterr().out.partition("\n}\n")[0] + "}")
    assert json.loads((tmp_path / "map.json").read_text()) == numbers["device_map"]
    assert numbers["total_bytes"] == 2 * (18 * 256 * 64 + 64)
    assert (tmp_path / "map.svg").read_text().startswith("<svg")
    assert (tmp_path / "map.html").read_text().startswith("<!doctype html>")


def test_settings_reach_the_plan(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--dtype", "fp32", "--bus", "2.5", "--tflops", "7", "--memory-speed", "11", "--disk", "3", "--peer", "4"]
    main([str(checkpoint), *SMALL, *more, "--slots", "2", "--phase", "decode", "--strategy", "sequential", "--json"])
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["dtype"] == "float32"
    assert numbers["assumptions"].startswith(
        "bus 2.5 GB/s, disk 3 GB/s, between devices 4 GB/s, an accelerator 7 TFLOP/s and 11 GB/s"
    )
    assert numbers["places"][0]["staging_bytes"] == 2 * 4 * 2 * 256 * 64
    main([str(checkpoint), "--memory", "cpu=9MiB", "--tflops", "7", "--json"])
    assert "the host 7 TFLOP/s" in json.loads(capsys.readouterr().out)["assumptions"]
    two = "0=1MiB,1=300KiB,cpu=1MiB"
    main([str(checkpoint), "--memory", two, "--main-device", "1", "--sequence-length", "4", "--json"])
    assert json.loads(capsys.readouterr().out)["main_device"] == 1


def test_the_memory_of_this_machine_is_the_default(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(checkpoint), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["device_map"].values()) <= {0, "cpu"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--memory", "20GiB"], r"`--memory 20GiB` has the part '20GiB'.*0=20GiB,cpu=60GiB"),
        (["--memory", "0=20Gib"], "is no size in bytes"),
        (["--memory", "0=1GB,0=2GB"], "names '0' twice"),
        (["--memory", "gpu=1GB"], "names 'gpu', which is no place"),
        (["--memory", "0=1KiB"], r"is no device|fits into no device|needs room"),
        (["--memori", "0=1GB"], r"unrecognized arguments: --memori.* Did you mean '--memory'\?"),
        (["--batch-size", "0"], "'0' is no whole number of at least 1"),
        (["--bus", "fast"], "'fast' is no positive number"),
        (["--strategy", "best"], "invalid choice: 'best'"),
        (["--picture", "map.png"], "neither `.svg` nor `.html`"),
        (["--map-output", "nowhere/map.json"], "its folder does not exist"),
        (["--no-split", "Block"], "only names of tensors are known"),
        (["--dtype", "bf17"], r"'bf17' is no dtype.*Did you mean 'bf16'\?"),
        (["--main-device", "3", "--memory", "0=1GB"], "`--memory` does not offer it"),
    ],
)
def test_words_that_make_no_sense(checkpoint: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        main([str(checkpoint), *words])


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing"):
        main([str(tmp_path / "nothing"), "--memory", "0=1GB"])


def test_help_teaches_and_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom accel_bigmodel.plan_command import main\n"
        "assert main(['--help']) == 0\nassert 'torch' not in sys.modules, 'torch'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "accel plan ./llama --memory 0=20GiB,cpu=60GiB" in done.stdout
    assert HELP in done.stdout


def test_a_length_that_the_model_does_not_know_is_refused() -> None:
    from types import SimpleNamespace

    from accel_bigmodel.plan_command import _parser, _workload

    found: Any = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=512))
    options = _parser().parse_args(["model"])
    assert _workload(options, found).sequence_length == 512
    options = _parser().parse_args(["model", "--sequence-length", "600"])
    with pytest.raises(ConfigError, match="longer than the 512 positions"):
        _workload(options, found)
