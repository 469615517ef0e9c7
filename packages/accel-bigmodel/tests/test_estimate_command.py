"""`accel estimate` and `estimate_memory`: whole answers, what cannot be known, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from accel_bigmodel.estimate.options import EstimateOptions
from accel_bigmodel.estimate.predict import estimate_memory
from accel_bigmodel.estimate_command import HELP, main
from accel_bigmodel.model_source import ModelDescription
from accel_state.errors import ConfigError
from accel_state.tensor_format import TensorShape, file_header


class Embedder(nn.Module):
    """Takes tokens by the name that models of the field give them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        states = self.embed(input_ids)
        for layer in self.layers:
            states = layer(states).relu()
        return states


class ByValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.layer(input_ids.float().expand(-1, 4)) if input_ids.sum().item() > 0 else self.layer.weight


@pytest.fixture
def headers(tmp_path: Path) -> str:
    shapes = {"weight": TensorShape((1024, 1024), torch.bfloat16)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_header(shapes) + bytes(2 * 1024 * 1024))
    return str(path)


def test_a_whole_estimate_as_text_and_as_data() -> None:
    said: list[str] = []
    options = EstimateOptions(batch_size=2, sequence_length=8, optimizer="sgd", device="cpu")
    found = estimate_memory(Embedder(), options, on_progress=said.append)
    assert found.inference.total_bytes
    assert found.training is not None
    assert found.training.total_bytes
    assert found.training.total_bytes > found.inference.total_bytes > found.weights[0].total_bytes
    text = found.text()
    for words in ("Embedder", "float32", "training (batch 2, length 8, sgd)", "gradients", "at its worst moment:"):
        assert words in text
    data = json.loads(json.dumps(found.to_dict()))
    assert data["training"]["total_bytes"] == found.training.total_bytes
    assert data["options"]["batch_size"] == 2
    assert data["weights"][0]["name"] == "float32"
    assert "tracing training steps" in said


def test_a_batch_and_a_loss_may_be_given() -> None:
    model = nn.Bilinear(8, 8, 4)
    batch = (torch.empty(16, 8, device="meta"), torch.empty(16, 8, device="meta"))
    found = estimate_memory(model, EstimateOptions(device="cpu"), inputs=batch, loss=lambda outputs: outputs.sum())
    assert found.training is not None
    assert found.training.peak is not None
    assert found.training.peak.parts["inputs"] == 2 * 16 * 8 * 4
    assert "training (the batch given, adamw)" in found.text()


def test_what_cannot_be_traced_is_said_and_no_figure_is_given() -> None:
    found = estimate_memory(ByValue(), EstimateOptions(device="cpu", sequence_length=1))
    assert found.inference.peak is None
    assert "goes on differently by the values" in found.inference.unknown
    assert "training: not known. The model goes on differently" in found.text()
    assert found.to_dict()["training"]["total_bytes"] is None
    odd = estimate_memory(nn.Linear(2, 2), EstimateOptions())
    assert "begins with 'input', which is neither" in odd.inference.unknown
    wrong = estimate_memory(nn.Linear(2, 2), EstimateOptions(), inputs=torch.empty(3, 7))
    assert "could not be run on tensors without values (RuntimeError" in wrong.inference.unknown
    assert wrong.weights[0].total_bytes == 24


def test_a_model_without_a_cache_generates_nothing() -> None:
    found = estimate_memory(Embedder(), EstimateOptions(device="cpu", sequence_length=4, new_tokens=3))
    assert found.generation is not None
    assert "keeps no cache" in found.generation.unknown


def test_checkpointing_needs_blocks() -> None:
    found = estimate_memory(
        nn.Bilinear(2, 2, 2), EstimateOptions(checkpointing=True), inputs=(torch.ones(1, 2), torch.ones(1, 2))
    )
    assert found.training is not None
    assert "has no repeated blocks" in found.training.unknown


def test_frozen_models_are_not_trained() -> None:
    found = estimate_memory(Embedder().requires_grad_(False), EstimateOptions(sequence_length=2))
    assert found.training is not None
    assert "no parameter requires a gradient" in found.training.unknown


def test_headers_alone_give_the_weights(headers: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([headers, "--dtypes", "float32,fp8"]) == 0
    text = capsys.readouterr().out
    assert "as stored" in text
    assert "4.00 MiB" in text
    assert "float8_e4m3fn" in text
    assert "inference: not known. Only the headers" in text
    assert "training: not known." in text
    assert main([headers, "--inference-only", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["training"] is None
    assert data["weights"][0]["total_bytes"] == 2 * 1024 * 1024


def test_flags_become_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def describe(name: str, **_: Any) -> ModelDescription:
        return ModelDescription(title=name, model=Embedder())

    monkeypatch.setattr("accel_bigmodel.model_source.describe_model", describe)
    words = "tiny --batch-size 3 --sequence-length 5 --optimizer adafactor --mixed-precision bf16 --checkpointing"
    more = "--accumulation-steps 4 --drop-outputs --ranks 2 --device cpu --dtype float32 --json"
    assert main([*words.split(), *more.split()]) == 0
    data = json.loads(capsys.readouterr().out)
    expected = {
        "batch_size": 3, "sequence_length": 5, "optimizer": "adafactor", "mixed_precision": "bf16",
        "checkpointing": True, "accumulation_steps": 4, "keeps_outputs": False, "ranks": 2, "sharding": "fsdp",
        "device": "cpu", "dtype": "float32", "attention": "auto", "training": True,
    }  # fmt: skip
    assert {name: data["options"][name] for name in expected} == expected
    assert data["training"]["parts"]["gathered weights"] > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["m", "--batch-sise", "3"], "Did you mean '--batch-size'"),
        (["m", "--batch-size", "0"], "`batch_size=0` is not a count of at least 1"),
        (["m", "--new-tokens", "-1"], "`new_tokens=-1` is not a count of at least 0"),
        (["m", "--mixed-precision", "bf61"], "Did you mean 'bf16'"),
        (["m", "--sharding", "fspd"], "Did you mean 'fsdp'"),
        (["m", "--sharding", "none", "--ranks", "2"], "without `sharding`"),
        (["m", "--dtype", "int8"], "no floating-point dtype"),
        (["m", "--dtype", "float61"], "Did you mean 'float64'"),
        (["m", "--attention", "flush"], "Did you mean 'flash'"),
        (["m", "--device", "cud"], "Did you mean 'cuda'"),
        (["m", "--optimizer", "adamww"], "Did you mean 'adamw'"),
    ],
)
def test_words_that_make_no_sense(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        main(words)


def test_help_teaches_without_torch() -> None:
    program = (
        "import sys; from accel_bigmodel.estimate_command import main; code = main(['--help']); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for words in (HELP, "MODEL is one of", "How to bring the peak down", "examples", "--checkpointing"):
        assert words in done.stdout


def test_no_words_show_the_help_as_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: accel estimate" in capsys.readouterr().err
