"""Tensor, context and sequence parallel composed with shards and copies equal one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from accel_parallel import Bundle, FullyShardedDataParallelPlugin, ParallelismConfig
from accel_parallel.fsdp.strategy import FSDPStrategy
from accel_parallel.sharded import whole
from accel_state.errors import ConfigError
from accel_state.process import Process, ProcessSettings
from accel_state.testing import run_ranks

_VOCAB, _WIDTH, _HEADS, _LENGTH = 16, 8, 4, 16
_PLAN = {
    "embed": "replicate",
    "layers.*.query": "colwise",
    "layers.*.key": "colwise",
    "layers.*.value": "colwise",
    "layers.*.out": "rowwise",
    "layers.*.up": "colwise",
    "layers.*.down": "rowwise",
}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(_WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(_WIDTH, _WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self.norm(hidden)
        # (batch, tokens, width) -> (batch, heads, tokens, width of a head)
        parts = [
            project(normed).unflatten(-1, (-1, _WIDTH // _HEADS)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        ]
        mixed = functional.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(2)
        hidden = hidden + self.out(mixed)
        return hidden + self.down(functional.gelu(self.up(hidden)))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(_VOCAB, _WIDTH)
        self.places = nn.Embedding(_LENGTH, _WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(_WIDTH, _VOCAB, bias=False)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens) + self.places(positions)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: torch.Tensor = self.head(hidden)
        return logits


def _build(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer().double()


def _batch(step: int, data_rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + data_rank)
    tokens = torch.randint(_VOCAB, (2, _LENGTH), generator=generator)
    labels = tokens.clone()
    labels[:, : 3 + data_rank] = -100  # ranks count other numbers of tokens
    return {"input_ids": tokens, "labels": labels}


def _token_losses(logits: torch.Tensor, shifted: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="sum")


def _train(parallelism: ParallelismConfig, options: FullyShardedDataParallelPlugin | None) -> list[Any]:
    process = Process.current()
    strategy = FSDPStrategy(process, options=options, parallelism=parallelism)
    model = _build(seed=process.topology.rank)  # other values on each rank: those of rank 0 count
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    strategy.prepare(Bundle((model,), (optimizer,)))
    trace: list[Any] = []
    for step in range(10):
        batch = _batch(step, process.topology.data_rank)
        sequence = strategy.sequence
        if sequence is None:
            part = {
                "input_ids": batch["input_ids"],
                "shift_labels": functional.pad(batch["labels"][:, 1:], (0, 1), value=-100),
                "position_ids": torch.arange(_LENGTH).expand(2, -1),
            }
        else:
            part = sequence.shard(batch)
        optimizer.zero_grad()
        loss = _token_losses(model(part["input_ids"], part["position_ids"]), part["shift_labels"])
        items = strategy.sum_over_data((part["shift_labels"] != -100).sum().double())
        strategy.backward(loss * strategy.average_size / items)
        gradients = {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
        norm = strategy.clip_grad_norm_(model.parameters(), 0.5)
        total = strategy.sum_over_data(loss.detach()) / items
        optimizer.step()
        trace.append((total.item(), norm.item(), gradients))
    return [trace, strategy.full_state(model)]


def _expected(num_data: int) -> list[Any]:
    model = _build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    trace: list[Any] = []
    for step in range(10):
        optimizer.zero_grad()
        batches = [_batch(step, rank) for rank in range(num_data)]
        shifted = [functional.pad(each["labels"][:, 1:], (0, 1), value=-100) for each in batches]
        positions = torch.arange(_LENGTH).expand(2, -1)
        losses = [_token_losses(model(b["input_ids"], positions), s) for b, s in zip(batches, shifted, strict=True)]
        total = torch.stack(losses).sum() / sum(int((each != -100).sum()) for each in shifted)
        total.backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        trace.append((total.item(), norm.item(), gradients))
    return [trace, model.state_dict()]


_MESHES = [
    ParallelismConfig(tp_size=2, tp_plan=_PLAN),
    ParallelismConfig(cp_size=2),
    ParallelismConfig(sp_size=2),
    ParallelismConfig(dp_shard_size=2, tp_size=2, tp_plan=_PLAN),
    ParallelismConfig(dp_replicate_size=2, tp_size=2, tp_plan=_PLAN),
    ParallelismConfig(dp_shard_size=2, cp_size=2),
    ParallelismConfig(dp_replicate_size=2, sp_size=2),
    ParallelismConfig(cp_size=2, tp_size=2, tp_plan=_PLAN),
    ParallelismConfig(sp_size=2, tp_size=2, tp_plan=_PLAN),
]


def _name(parallelism: ParallelismConfig) -> str:
    return str(parallelism.mesh_shape())


_MANY = pytest.mark.matrix


@pytest.mark.parametrize(
    "parallelism",
    [pytest.param(each, marks=[_MANY] if index in (4, 6, 7, 8) else []) for index, each in enumerate(_MESHES)],
    ids=_name,
)
def test_ten_steps_equal_those_of_one_process(parallelism: ParallelismConfig) -> None:
    _compare(parallelism, None)


@pytest.mark.parametrize("parallelism", [pytest.param(_MESHES[3], marks=_MANY), _MESHES[5]], ids=_name)
def test_recomputing_and_offloading_change_nothing(parallelism: ParallelismConfig) -> None:
    _compare(parallelism, FullyShardedDataParallelPlugin(activation_checkpointing=True, cpu_offload=True))


def _compare(parallelism: ParallelismConfig, options: FullyShardedDataParallelPlugin | None) -> None:
    mesh = parallelism.mesh_shape()
    settings = ProcessSettings(device="cpu", mesh=mesh, timeout_s=60)
    answers = run_ranks(_train, mesh.size, parallelism, options, settings=settings, timeout_s=100)
    wanted, wanted_state = _expected(mesh.dp_replicate * mesh.dp_shard)
    for trace, state in answers:
        for (loss, norm, gradients), (wanted_loss, wanted_norm, wanted_gradients) in zip(trace, wanted, strict=True):
            assert loss == pytest.approx(wanted_loss, abs=1e-10)
            assert norm == pytest.approx(wanted_norm, abs=1e-10)
            assert gradients.keys() == wanted_gradients.keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, wanted_gradients[name], rtol=0, atol=1e-10, msg=name)
        assert state.keys() == wanted_state.keys()
        for name, value in state.items():
            torch.testing.assert_close(value, wanted_state[name], rtol=0, atol=1e-10, msg=name)


def _refusals_of_other_data(divide_table: bool) -> list[str]:
    process = Process.current()
    rank = process.topology.rank
    plan = {**_PLAN, **({"embed": "embedding_rowwise", "head": "colwise_gather_output"} if divide_table else {})}
    parallelism = ParallelismConfig(tp_size=2, tp_plan=plan)
    positions, batches = torch.arange(_LENGTH).expand(2, -1), [_batch(0, each) for each in range(2)]
    said = []
    for tokens, labels in ((rank, 0), (0, rank), (0, 0)):
        strategy = FSDPStrategy(process, parallelism=parallelism)
        model = _build()
        strategy.prepare(Bundle((model,)))
        try:
            logits = model(batches[tokens]["input_ids"], positions)
            strategy.backward(_token_losses(logits, batches[labels]["input_ids"]))
        except ConfigError as error:
            said.append(str(error))
        else:
            said.append("nothing")
    # Once is enough: a later exchange would cost every step.
    strategy.backward(_token_losses(model(batches[rank]["input_ids"], positions), batches[rank]["input_ids"]))
    return said


@pytest.mark.parametrize("divide_table", [False, True])
def test_ranks_along_tp_that_are_fed_other_data_are_refused_once(divide_table: bool) -> None:
    settings = ProcessSettings(device="cpu", mesh=ParallelismConfig(tp_size=2).mesh_shape(), timeout_s=60)
    for tokens, labels, alike in run_ranks(_refusals_of_other_data, 2, divide_table, settings=settings):
        assert "`Transformer` was called with other tokens or labels on one tensor-parallel rank" in tokens
        # Behind an output layer that is divided, no copy of a gradient shows whose labels it is of.
        assert labels == "nothing" if divide_table else "The gradient of `" in labels
        assert alike == "nothing"
