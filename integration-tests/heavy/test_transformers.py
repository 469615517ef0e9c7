"""A model of transformers and data of datasets train on two processes as on one, offline, from a configuration."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import faulthandler
import json
import sys

import torch
from accel import Accelerator
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup

faulthandler.dump_traceback_later(80, exit=True)  # a hang shows where
batch_size, target = int(sys.argv[1]), sys.argv[2]
accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=True,
)
model = LlamaForCausalLM(config)
tokens = torch.randint(0, 64, (22, 8), generator=torch.Generator().manual_seed(1))
dataset = Dataset.from_dict({"input_ids": tokens.tolist(), "number": list(range(22))}).with_format("torch")
loader = DataLoader(dataset, batch_size=batch_size)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
schedule = get_linear_schedule_with_warmup(optimizer, 2, 12)
model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

losses, numbers, rates = [], [], []
for epoch in range(2):
    for batch in loader:
        # The sum over tokens and their number, so that the unequal last batches are exact.
        output = model(input_ids=batch["input_ids"])
        labels = batch["input_ids"][:, 1:]
        real = loader.batch_info.real_rows[accelerator.process_index]
        loss = torch.nn.functional.cross_entropy(
            output.logits[:real, :-1].flatten(0, 1), labels[:real].flatten(), reduction="sum"
        )
        accelerator.backward(loss, num_items=labels[:real].numel())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "sum").item())
        numbers += accelerator.gather_for_metrics(batch["number"]).tolist()
        rates.append(schedule.get_last_lr()[0])
total = sum(parameter.double().sum().item() for parameter in model.parameters())
if accelerator.is_main_process:
    with open(target, "w") as file:
        json.dump({"losses": losses, "numbers": numbers, "rates": rates, "total": total}, file)
"""


def test_two_processes_train_as_one(run_command: Any, accel_command: list[str], tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    results = {}
    for processes, batch_size in [(1, 8), (2, 4)]:
        target = tmp_path / f"{processes}.json"
        command = [*accel_command, "launch", "--cpu", "--num-processes", str(processes), script, batch_size, target]
        run_command(command, timeout_s=110, env={"OMP_NUM_THREADS": "1"})
        results[processes] = json.loads(target.read_text())
    one, two = results[1], results[2]
    assert one["numbers"] == [*range(22)] * 2
    assert two["numbers"] == one["numbers"]
    assert two["rates"] == one["rates"]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert two["total"] == pytest.approx(one["total"], rel=1e-5)


def test_the_accel_command_is_this_environments(accel_command: list[str], run_command: Any) -> None:
    done = run_command([*accel_command, "env"], timeout_s=60)
    assert sys.prefix in done.stdout
