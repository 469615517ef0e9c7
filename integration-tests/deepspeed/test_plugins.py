"""Several plugins by name, models of several Accelerators, scripts of the field's own documentation, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from accel import Accelerator, FullyShardedDataParallelPlugin
from accel_parallel import ParallelismConfig, TorchDynamoPlugin
from accel_parallel.deepspeed.placeholders import DummyOptim, DummyScheduler
from accel_parallel.deepspeed.plugin import DeepSpeedPlugin
from accel_parallel.deepspeed.strategy import DeepSpeedStrategy
from accel_state.errors import ConfigError
from accel_state.process import DistributedType, Process
from accel_state.testing import run_ranks


def model(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))


def rows(rank: int, number: int = 0) -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * number + rank))


# Student and teacher


def distilled(teacher_stage: int) -> dict[str, Any]:
    plugins = {"student": DeepSpeedPlugin(zero_stage=3), "teacher": DeepSpeedPlugin(zero_stage=teacher_stage)}  # type: ignore[arg-type]
    accelerator = Accelerator(deepspeed_plugins=plugins)
    state = accelerator.state
    assert state.deepspeed_plugin is plugins["student"]
    student = model()
    optimizer: Any = torch.optim.SGD(student.parameters(), lr=0.1)
    student, optimizer = accelerator.prepare(student, optimizer)
    state.select_deepspeed_plugin("teacher")
    assert accelerator.state.deepspeed_plugin is plugins["teacher"]
    teacher = accelerator.prepare(model(1)).eval()
    assert not teacher.training
    for number in range(3):
        batch = rows(accelerator.process_index, number)
        with torch.no_grad():
            target = teacher(batch)
        accelerator.backward((student(batch) - target).pow(2).mean())
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(ConfigError, match=r"'techer'.*Did you mean 'teacher'"):
        accelerator.state.select_deepspeed_plugin("techer")
    weights = accelerator.strategy.full_state(student)
    return {
        "weights": {name: value.clone() for name, value in weights.items()},
        "teacher is an engine": hasattr(teacher, "optimizer"),
        "type": accelerator.distributed_type,
    }


@pytest.mark.parametrize("stage", [2, 3])
def test_a_student_learns_from_a_teacher(stage: int) -> None:
    student, teacher = model(), model(1)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for number in range(3):
        losses = [(student(rows(rank, number)) - teacher(rows(rank, number)).detach()).pow(2).mean() for rank in (0, 1)]
        torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call, unused-ignore]
        optimizer.step()
        optimizer.zero_grad()
    for found in run_ranks(distilled, 2, stage):
        assert found["teacher is an engine"] is (stage == 3)
        assert found["type"] is DistributedType.DEEPSPEED
        for name, value in student.state_dict().items():
            torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=1e-6)


def disjoint() -> list[dict[str, torch.Tensor]]:
    accelerators = [
        Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=stage))
        for stage in (2, 3)  # type: ignore[arg-type]
    ]
    trained: list[Any] = []
    for seed, accelerator in enumerate(accelerators):
        made = model(seed)
        trained.append(accelerator.prepare(made, torch.optim.SGD(made.parameters(), lr=0.1)))
    for number in range(3):
        for accelerator, (each, optimizer) in zip(accelerators, trained, strict=True):
            accelerator.backward(each(rows(accelerator.process_index, number)).pow(2).mean())
            optimizer.step()
            optimizer.zero_grad()
    return [
        {name: value.clone() for name, value in accelerator.strategy.full_state(each).items()}
        for accelerator, (each, _) in zip(accelerators, trained, strict=True)
    ]


def test_two_models_are_trained_by_two_accelerators() -> None:
    expected = []
    for seed in (0, 1):
        made = model(seed)
        optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
        for number in range(3):
            torch.stack([made(rows(rank, number)).pow(2).mean() for rank in (0, 1)]).mean().backward()  # type: ignore[no-untyped-call, unused-ignore]
            optimizer.step()
            optimizer.zero_grad()
        expected.append(made.state_dict())
    for found, wanted in zip(run_ranks(disjoint, 2)[0], expected, strict=True):
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


# The scripts that people bring


def counting_by_itself(folder: str) -> dict[str, Any]:
    """As in the field's READMEs: the script divides nothing, counts itself, and saves what `unwrap_model` gives."""
    from transformers import LlamaConfig, LlamaForCausalLM

    plugin = DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=2)
    accelerator = Accelerator(deepspeed_plugin=plugin)
    assert accelerator.gradient_accumulation_steps == 2
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    llama = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(llama.parameters(), lr=0.01)
    tokens = torch.randint(64, (1, 12), generator=torch.Generator().manual_seed(1)).expand(16, 12)
    prepared: Any = accelerator.prepare(llama, optimizer, DataLoader(list(tokens), batch_size=2))  # type: ignore[arg-type]
    llama, optimizer, loader = prepared
    losses = []
    for step, batch in enumerate(loader):
        loss = llama(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        losses.append(loss.item())
        if (step + 1) % accelerator.gradient_accumulation_steps == 0:
            optimizer.step()
            optimizer.zero_grad()
    accelerator.wait_for_everyone()
    unwrapped = accelerator.unwrap_model(llama)
    state = accelerator.get_state_dict(llama)
    if accelerator.is_main_process:
        unwrapped.save_pretrained(folder, save_function=accelerator.save, state_dict=state)
    accelerator.wait_for_everyone()
    again = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        same = torch.equal(again(input_ids=tokens[:2]).logits, unwrapped(input_ids=tokens[:2]).logits)
    return {"losses": losses, "same": same}


def test_a_script_that_counts_by_itself_and_saves_a_pretrained_model(tmp_path: Path) -> None:
    for found in run_ranks(counting_by_itself, 2, str(tmp_path / "model")):
        assert found["losses"][-1] < found["losses"][0]
        assert found["same"]


def compiled(stage: int, regional: bool | None) -> list[float]:
    plugin = None if regional is None else TorchDynamoPlugin(backend="aot_eager", use_regional_compilation=regional)
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=stage), dynamo_plugin=plugin)  # type: ignore[arg-type]
    made = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)))
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter) * (number + 1) / 4)
    optimizer: Any = torch.optim.SGD(made.parameters(), lr=0.1)
    prepared: Any = accelerator.prepare(made, optimizer)
    engine, optimizer = prepared
    losses = []
    for number in range(3):
        loss = engine(rows(accelerator.process_index, number)).pow(2).mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_compiling_in_place_changes_nothing() -> None:
    plain = run_ranks(compiled, 2, 2, None)[0]
    for stage, regional in ((2, False), (2, True), (3, True)):
        assert run_ranks(compiled, 2, stage, regional)[0] == pytest.approx(plain, abs=1e-6), (stage, regional)


class Recomputed(nn.Module):
    """Its middle is computed again in backward, by DeepSpeed's own function."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """(rows, 8) to (rows, 8)."""
        from deepspeed import checkpointing

        hidden: torch.Tensor = checkpointing.checkpoint(self.second, self.first(batch))
        return hidden


def recomputed() -> tuple[bool, float]:
    from deepspeed import checkpointing

    section = {"partition_activations": False, "number_checkpoints": 1}
    config = {"zero_optimization": {"stage": 2}, "activation_checkpointing": section}
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    made = Recomputed()
    prepared: Any = accelerator.prepare(made, torch.optim.SGD(made.parameters(), lr=0.1))
    accelerator.backward(prepared[0](rows(accelerator.process_index)).pow(2).mean())
    return checkpointing.is_configured(), float(accelerator.clip_grad_norm_(made.parameters(), 1.0))


def test_the_section_configures_deepspeeds_own_recomputing() -> None:
    for configured, norm in run_ranks(recomputed, 2):
        assert configured
        assert norm > 0


def automatic() -> tuple[int, str]:
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage="auto"))
    made = model()
    prepared: Any = accelerator.prepare(made, torch.optim.AdamW(made.parameters()))
    strategy: Any = accelerator.strategy
    rows_said = {key: (value, source) for key, value, source in strategy._only.config.rows}
    value, source = rows_said["zero_optimization.stage"]
    assert prepared is not None
    return value, source


def test_a_stage_is_chosen_with_its_reason() -> None:
    (first, source), (second, _) = run_ranks(automatic, 2)
    assert first == second == 0  # nothing of a tiny model needs dividing
    assert source.startswith("chosen by the cost model: ")


# Refused


def refusals() -> dict[str, str]:
    found: dict[str, str] = {}

    def refused(name: str, call: Any) -> None:
        try:
            call()
        except ConfigError as error:
            found[name] = str(error)
        else:
            found[name] = "(nothing was refused)"

    zero2 = DeepSpeedPlugin(zero_stage=2)
    refused("two engines", lambda: Accelerator(deepspeed_plugin=zero2, fsdp_plugin=FullyShardedDataParallelPlugin()))
    refused("plugin twice", lambda: Accelerator(deepspeed_plugin=zero2, deepspeed_plugins={"a": zero2}))
    refused("other strategy", lambda: Accelerator(deepspeed_plugin=zero2, strategy="ddp"))
    refused(
        "precision",
        lambda: Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config={"bf16": {"enabled": True}}), mixed_precision="no"
        ),
    )
    refused(
        "steps",
        lambda: Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(gradient_accumulation_steps=2), gradient_accumulation_steps=4
        ),
    )
    refused("no placement", lambda: Accelerator(deepspeed_plugin=zero2, device_placement=False))
    refused(
        "loss parallel",
        lambda: DeepSpeedStrategy.settle_options(
            zero2,
            process=Process.current(),
            parallelism=ParallelismConfig(tp_size=2, loss_parallel=True),
            precision="no",
        ),
    )

    def accelerator(**settings: Any) -> Accelerator:
        return Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=2, **settings))

    made = model()
    for name, given, made_by in (
        ("other buffers", {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1},
                           "data_types": {"grad_accum_dtype": "fp32"}}, torch.optim.AdamW),
        ("flat weights", {"bf16": {"enabled": True}, "zero_optimization": {"stage": 0},
                          "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}, DummyOptim),
    ):  # fmt: skip
        narrow, odd = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=given)), model()
        refused(name, lambda n=narrow, o=odd, by=made_by: n.prepare(o, by(o.parameters(), lr=0.1)))
    later, apart = accelerator(), model()
    later.prepare(apart)
    refused("optimizer later", lambda: later.prepare(torch.optim.SGD(apart.parameters(), lr=0.1)))
    refused("optimizer alone", lambda: accelerator().prepare(torch.optim.SGD(made.parameters(), lr=0.1)))
    refused(
        "double",
        lambda: accelerator().prepare(double := model().double(), torch.optim.SGD(double.parameters(), lr=0.1)),
    )
    two, other = accelerator(), model()
    two.prepare(made, torch.optim.SGD(made.parameters(), lr=0.1))
    refused("second model", lambda: two.prepare(other, torch.optim.SGD(other.parameters(), lr=0.1)))
    refused("norm type", lambda: two.clip_grad_norm_(made.parameters(), 1.0, norm_type=1.0))
    refused("some parameters", lambda: two.clip_grad_norm_([next(made.parameters())], 1.0))
    refused("create_graph", lambda: two.backward(made(rows(0)).sum(), create_graph=True))
    refused("placeholder", lambda: Accelerator().prepare_scheduler(DummyScheduler(DummyOptim(made.parameters()))))
    clipping, third = accelerator(gradient_clipping=0.5), model()
    third, _ = clipping.prepare(third, torch.optim.SGD(third.parameters(), lr=0.1))
    clipping.backward(third(rows(clipping.process_index)).pow(2).mean())
    refused("other clipping", lambda: clipping.clip_grad_norm_(third.parameters(), 1.0))
    loader = DataLoader(list(rows(0)), batch_size=2)  # type: ignore[arg-type]
    sized, fourth = (
        Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config={"train_micro_batch_size_per_gpu": 8})),
        model(),
    )
    refused("batch size", lambda: sized.prepare(fourth, torch.optim.SGD(fourth.parameters(), lr=0.1), loader))
    return found


MESSAGES = {
    "two engines": "`fsdp_plugin` and `deepspeed_plugin` were both given",
    "plugin twice": "`deepspeed_plugin` and `deepspeed_plugins` were both given",
    "other strategy": "no effect on the strategy `ddp`",
    "precision": "`mixed_precision='no'` was given to the Accelerator, and `bf16.enabled`",
    "steps": "`gradient_accumulation_steps=4` was given to the Accelerator",
    "no placement": "`device_placement=False`",
    "loss parallel": "`ParallelismConfig(loss_parallel=...)`",
    "optimizer alone": "belong to no prepared model",
    "other buffers": "Use `zero_stage=2`",
    "flat weights": "Use `zero_stage=1`, or an optimizer of torch",
    "optimizer later": "SGD belongs to no model of the same call",
    "double": "`0.weight` is float64",
    "second model": "Make an `Accelerator` for each model",
    "norm type": "`clip_grad_norm_(norm_type=1.0)`",
    "some parameters": "was given 1 of 4 trained parameters",
    "create_graph": "`create_graph`",
    "placeholder": "DummyOptim",
    "other clipping": "`gradient_clipping` is 0.5",
    "batch size": "8",
}


@pytest.mark.timeout(200)
def test_what_cannot_work_is_refused_with_its_reason() -> None:
    found = run_ranks(refusals, 2, timeout_s=150)[0]
    for name, message in MESSAGES.items():
        assert message in found[name], (name, found[name])
