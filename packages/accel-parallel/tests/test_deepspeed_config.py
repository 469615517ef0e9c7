"""A configuration of DeepSpeed from a file and arguments, completed from the facts of a run. Needs no DeepSpeed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from accel_parallel.deepspeed.config import (
    CompletedConfig,
    DeepSpeedConfig,
    Facts,
    OffloadDevices,
    ScheduleSection,
    class_names_of,
    hidden_size_of,
)
from accel_parallel.deepspeed.placeholders import DummyOptim, DummyScheduler
from accel_parallel.deepspeed.plugin import DeepSpeedPlugin
from accel_parallel.deepspeed.settings import Settings
from accel_state.errors import ConfigError

MODEL = nn.Linear(2, 3)
ALL_AUTO: dict[str, Any] = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale": "auto", "initial_scale_power": "auto"},
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "allgather_bucket_size": "auto",
        "offload_optimizer": {"device": "auto", "pin_memory": "auto"},
    },
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
            "warmup_type": "auto",
        },
    },
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": "auto",
    "communication_data_type": "auto",
    "managed_gradient_accumulation": "auto",
}
"""A file in which whatever can be left open is."""


def config(given: dict[str, Any] | None = None, **arguments: Any) -> DeepSpeedConfig:
    return DeepSpeedConfig.of(DeepSpeedPlugin(hf_ds_config=given, **arguments))


def complete(given: dict[str, Any] | None = None, facts: Facts | None = None, **arguments: Any) -> CompletedConfig:
    return config(given, **arguments).complete(facts or Facts())


def dummies(**schedule: Any) -> dict[str, Any]:
    optimizer = DummyOptim(MODEL.parameters(), lr=1e-4, betas=(0.9, 0.95))
    return {"optimizer": optimizer, "scheduler": DummyScheduler(optimizer, **schedule)}


def refused(message: str) -> Any:
    return pytest.raises(ConfigError, match=message)


def autos(values: Any) -> list[Any]:
    if isinstance(values, dict):
        return [found for value in values.values() for found in autos(value)]
    return [values] if values == "auto" else []


def test_everything_open_is_filled_from_the_facts() -> None:
    facts = Facts(
        world_size=2, micro_batch_size=4, num_steps=3, precision="bf16", hidden_size=64,
        **dummies(total_num_steps=10, warmup_num_steps=2),
    )  # fmt: skip
    completed = complete(ALL_AUTO, facts)
    assert completed.values == {
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": 64 * 64,
            "stage3_prefetch_bucket_size": int(0.9 * 64 * 64),
            "stage3_param_persistence_threshold": 640,
        },
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "weight_decay": 0.0}},
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.0,
        "managed_gradient_accumulation": False,
        "timers": {"throughput": {"enabled": False}},
    }
    assert completed.stage == 3
    assert completed.scheduler == ScheduleSection(
        "WarmupDecayLR",
        {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-4, "warmup_num_steps": 2, "total_num_steps": 10},
    )
    assert completed.warnings == ()


def test_every_value_is_printed_with_its_source() -> None:
    facts = Facts(
        world_size=2, micro_batch_size=4, num_steps=3, precision="bf16", hidden_size=64, loader_name="`train_loader`",
        **dummies(total_num_steps=10, warmup_num_steps=2),
    )  # fmt: skip
    lines = complete(ALL_AUTO, facts).explain().splitlines()
    for key, value, source in (
        ("zero_optimization.stage", "3", "`hf_ds_config`"),
        ("zero_optimization.reduce_bucket_size", "4096", "hidden_size², which is 64"),
        ("zero_optimization.allgather_bucket_size", "'auto'", "`hf_ds_config`: left to DeepSpeed's default"),
        ("bf16.enabled", "True", "`Accelerator(mixed_precision=...)`"),
        ("optimizer.params.lr", "0.0001", "`DummyOptim(lr=0.0001)`"),
        ("optimizer.params.weight_decay", "0.0", "default of `DummyOptim`"),
        ("train_micro_batch_size_per_gpu", "4", "`train_loader`"),
        ("train_batch_size", "24", "train_micro_batch_size_per_gpu x 3 micro-batch(es) x 2 rank(s)"),
        ("scheduler.params.total_num_steps", "10", "`DummyScheduler(total_num_steps=10)`"),
    ):
        row = next(line for line in lines if line.split()[0] == key)
        assert value in row
        assert source in row


@given(
    keys=st.sets(st.sampled_from(Settings(ALL_AUTO).names())),
    width=st.sampled_from([None, 8]),
    precision=st.sampled_from(["no", "bf16", "fp16"]),
)
@settings(max_examples=30, deadline=None)
def test_nothing_is_left_open_whatever_was(keys: set[str], width: int | None, precision: Any) -> None:
    written = Settings(ALL_AUTO)
    for key in keys - {"optimizer.type", "scheduler.type", "zero_optimization.stage"}:
        written.remove(key)
    facts = Facts(hidden_size=width, precision=precision, **dummies(total_num_steps=5))
    completed = complete(written.values, facts)
    assert autos(completed.values) == []
    assert completed.scheduler is not None
    assert autos(completed.scheduler.params) == []
    assert (completed.values["train_micro_batch_size_per_gpu"], completed.values["gradient_clipping"]) == (1, 0.0)
    assert "train_batch_size" not in completed.values
    assert [name for name in ("bf16", "fp16") if completed.values.get(name, {}).get("enabled")] == (
        [] if precision == "no" else [precision]
    )


@given(
    rows=st.integers(1, 64),
    steps=st.integers(1, 16),
    ranks=st.integers(1, 1024),
    said=st.integers(1, 64),
    total=st.integers(1, 4096),
    known=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_batch_sizes_agree_or_are_refused(
    rows: int, steps: int, ranks: int, said: int, total: int, known: bool
) -> None:
    facts = Facts(world_size=ranks, micro_batch_size=rows if known else None, num_steps=steps)
    for file in ({"train_batch_size": total}, {"train_micro_batch_size_per_gpu": said},
                 {"train_batch_size": total, "train_micro_batch_size_per_gpu": said},
                 {"train_batch_size": said * steps * ranks}):  # fmt: skip
        wanted = file.get("train_micro_batch_size_per_gpu", rows if known else None)
        whole = file.get("train_batch_size")
        if wanted is None and whole is not None and whole % (steps * ranks) == 0:
            wanted = whole // (steps * ranks)
        agree = wanted is not None and not (known and wanted != rows) and whole in (None, wanted * steps * ranks)
        if agree:
            assert complete(file, facts).values["train_micro_batch_size_per_gpu"] == wanted
        else:
            with refused("rows at a time|= \\d+. Set it to 'auto'|cannot share evenly. Set it to a multiple of"):
                complete(file, facts)


def test_a_batch_size_that_contradicts_the_loader_is_refused_with_both() -> None:
    facts = Facts(micro_batch_size=4, world_size=2, num_steps=2, loader_name="`loader`")
    with refused(
        r"`train_micro_batch_size_per_gpu` is 8 \(`hf_ds_config`\), and each rank takes 4 rows at a time from `loader`"
    ):
        complete({"train_micro_batch_size_per_gpu": 8}, facts)
    with refused(
        r"`train_batch_size` is 8 \(`hf_ds_config`\), and a step takes 4 rows \(`loader`\) x 2 micro-batch\(es\) x "
        r"2 rank\(s\) = 16"
    ):
        complete({"train_batch_size": 8}, facts)
    with refused(
        r"`train_batch_size` is 6 \(`hf_ds_config`\), which 2 micro-batch\(es\) x 2 rank\(s\) cannot share evenly. "
        r"Set it to a multiple of 4"
    ):
        complete({"train_batch_size": 6}, Facts(world_size=2, num_steps=2))
    with refused(r"`train_batch_size` is 0 .* which is no number of rows"):
        complete({"train_batch_size": 0}, facts)


def test_without_a_loader_the_size_is_one_and_said_so() -> None:
    completed = complete(None, Facts(world_size=2))
    assert completed.values["train_micro_batch_size_per_gpu"] == 1
    assert "unknown, for no loader was prepared" in completed.explain()


@pytest.mark.parametrize(
    ("file", "arguments", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, {"zero_stage": 2},
         r"`zero_optimization.stage` is 3 \(`.*ds.json`\) and 2 \(`DeepSpeedPlugin\(zero_stage=2\)`\)"),
        ({"gradient_accumulation_steps": 4}, {"gradient_accumulation_steps": 2},
         r"`gradient_accumulation_steps` is 4 \(`.*ds.json`\) and 2 \(`DeepSpeedPlugin"),
        ({"gradient_clipping": 1.0}, {"gradient_clipping": 0.5}, r"`gradient_clipping` is 1.0 .* and 0.5"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
         {"offload_optimizer_device": "none"}, r"offload_optimizer.device` is 'cpu' .* and 'none'"),
        ({"communication_data_type": "fp16"}, {"communication_data_type": "bf16"}, "Say it in one place"),
        ({"zero_optimization": {"stage": 3, "leaf_module": {"classes": ["A"]}}},
         {"transformer_moe_cls_names": "B"}, r"leaf_module.classes` is \['A'\] .* and \('B',\)"),
    ],
)  # fmt: skip
def test_a_conflict_names_both_values_and_their_sources(
    file: dict[str, Any], arguments: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(file))
    with refused(message):
        DeepSpeedConfig.of(DeepSpeedPlugin(hf_ds_config=path, **arguments))


def test_the_same_in_both_places_and_auto_in_one_are_no_conflict() -> None:
    said = config(
        {"zero_optimization": {"stage": 3}, "gradient_accumulation_steps": "auto", "gradient_clipping": 1},
        zero_stage=3, gradient_accumulation_steps=4, gradient_clipping="auto",
    )  # fmt: skip
    assert (said.stage, said.gradient_accumulation_steps, said.gradient_clipping) == (3, 4, 1.0)
    assert said.source("zero_optimization.stage") == "`hf_ds_config`"
    assert said.source("gradient_accumulation_steps") == "`DeepSpeedPlugin(gradient_accumulation_steps=4)`"


def test_what_is_known_before_a_model_exists() -> None:
    nothing = config()
    assert (nothing.stage, nothing.precision, nothing.gradient_accumulation_steps) == (2, None, None)
    assert (nothing.tp_size, nothing.offload_devices) == (1, OffloadDevices("none", "none"))
    assert (nothing.gradient_clipping, nothing.is_zero3_init) == (None, False)
    assert nothing.explain() == "zero_optimization.stage  2  default"
    assert config({}).stage == 0
    said = config(
        {"tensor_parallel": {"autotp_size": 2}, "bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
        offload_optimizer_device="cpu",
    )
    assert (said.tp_size, said.precision, said.offload_devices.optimizer) == (2, "bf16", "cpu")
    assert said.precision_source == "`bf16.enabled`, `hf_ds_config`"
    assert config({"zero_optimization": {"stage": "auto"}}).stage == "auto"
    assert config(zero_stage=3).is_zero3_init
    assert not config(zero_stage=3, zero3_init_flag=False).is_zero3_init


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"bfloat16": {"enabled": True}}, "bf16"),
        ({"bf16": {"enabled": False}, "fp16": {"enabled": False}}, "no"),
        ({"bf16": {"enabled": False}}, None),
        ({"bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}, None),
    ],
)
def test_precision_is_what_the_file_says(given: dict[str, Any], expected: str | None) -> None:
    assert config(given).precision == expected


def test_two_precisions_are_refused() -> None:
    with refused(r"`bf16.enabled` \(`hf_ds_config`\) and `fp16.enabled` \(`hf_ds_config`\) are both true"):
        config({"bf16": {"enabled": True}, "fp16": {"enabled": True}})
    with refused(
        r"`fp16.enabled` is True \(`hf_ds_config`\) and `mixed_precision` is 'bf16' \(`Accelerator\(mixed_precision"
    ):
        complete({"fp16": {"enabled": True}}, Facts(precision="bf16"))
    with refused(r"`bf16.enabled` is False .* and `mixed_precision` is 'bf16'"):
        complete({"bf16": {"enabled": False}}, Facts(precision="bf16"))
    with refused(r"`torch_autocast.enabled` is true .*Set `mixed_precision='no'`"):
        complete({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, Facts(precision="bf16"))
    with refused("`bf16` and its old name `bfloat16` are both given"):
        config({"bf16": {}, "bfloat16": {}})


def test_sections_of_other_precisions_are_turned_off() -> None:
    values = complete({"fp16": {"loss_scale": 128.0}}, Facts(precision="bf16")).values
    assert values["fp16"] == {"loss_scale": 128.0, "enabled": False}
    assert values["bf16"] == {"enabled": True}
    assert complete({"fp16": {"loss_scale": 128.0}}, Facts(precision="fp16")).values["fp16"]["enabled"] is True
    assert not {"bf16", "fp16"} & complete(None, Facts(precision="no")).values.keys()


def test_windows_are_the_accelerators() -> None:
    assert complete(None, Facts(num_steps=4)).values["gradient_accumulation_steps"] == 4
    with refused(r"`gradient_accumulation_steps` is 2 .* and 4 \(`Accelerator\(gradient_accumulation_steps"):
        complete(None, Facts(num_steps=4), gradient_accumulation_steps=2)
    with refused("`managed_gradient_accumulation` is True .* windows are the `Accelerator`'s"):
        config({"managed_gradient_accumulation": True})
    assert complete({"managed_gradient_accumulation": False}).values["managed_gradient_accumulation"] is False


def test_nothing_is_clipped_unless_asked_for() -> None:
    """DeepSpeed 0.19 clips to 1 where nothing is said."""
    assert complete().values["gradient_clipping"] == 0.0
    assert complete(None, gradient_clipping=0.5).values["gradient_clipping"] == 0.5
    assert config({"gradient_clipping": 0}).gradient_clipping is None
    with refused(r"`gradient_clipping` is 'max' \(`hf_ds_config`\), which is no norm"):
        complete({"gradient_clipping": "max"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"zero_optimisation": {}}, "`zero_optimisation` .*Did you mean 'zero_optimization'"),
        ({"something": 1}, "It reads activation_checkpointing, "),
        ({"optimizer": {"kind": "AdamW"}}, "`optimizer.kind` .* is nothing that DeepSpeed reads there"),
        ({"aio": {"queue_dept": 8}}, "Did you mean 'queue_depth'"),
        ({"torch_autocast": {"enable": True}}, "Did you mean 'enabled'"),
        ({"zero_optimization": True}, r"`zero_optimization` is True \(`hf_ds_config`\), and it is a section"),
        ({"zero_optimization": {"cpu_offload": True}}, r"Write `offload_optimizer: \{device: cpu\}`"),
        ({"nebula": {}}, "is no longer read by DeepSpeed 0.19. Take it out"),
        ({"amp": {"enabled": True}}, "Use `bf16`, `fp16` or `torch_autocast`"),
        ({"zero_optimization": {"stage": 5}}, "ZeRO has the stages 0, 1, 2 and 3"),
        ({"zero_optimization": {"stage": "three"}}, "ZeRO has the stages 0, 1, 2 and 3"),
        ({"dataloader_drop_last": True}, "Pass `drop_last=True` to your `DataLoader`"),
        ({"checkpoint": {"load_universal": True}}, "`save_state` and `load_state` write and read"),
        ({"data_efficiency": {"enabled": True}}, "order the data in your own sampler"),
        ({"autotuning": {"enabled": True}}, "or set `zero_stage='auto'`"),
        ({"pipeline": {"stages": 2}}, "which cannot be prepared"),
        ({"gradient_allreduce_op": "sum"}, "gradients that are averaged over processes"),
    ],
)
def test_names_and_duties_that_are_not_deepspeeds_are_refused(given: dict[str, Any], message: str) -> None:
    with refused(message):
        config(given)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"zero_optimization": {"stage": 2,}}', r"`.*ds.json` is no JSON: .* in line 1, column \d+"),
        (b'{"gradient_clipping": 1, "gradient_clipping": 2}', "says `gradient_clipping` twice in one section"),
        (b"[1, 2]", "holds a list. A configuration is an object"),
        (b"\xff\xfe", "cannot be read: "),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(text: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(text)
    with refused(message):
        DeepSpeedConfig.of(DeepSpeedPlugin(hf_ds_config=str(path)))


def test_a_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with refused(r"`hf_ds_config='.*none.json'` cannot be read: No such file or directory. Give the path"):
        DeepSpeedConfig.of(DeepSpeedPlugin(hf_ds_config=str(tmp_path / "none.json")))


def test_what_was_given_is_not_changed() -> None:
    given: dict[str, Any] = {"zero_optimization": {"stage": "auto"}, "bf16": {"enabled": "auto"}}
    said = config(given)
    first = said.complete(Facts(precision="bf16"), stage=2)
    second = said.complete(Facts(precision="no"), stage=3)
    assert given == {"zero_optimization": {"stage": "auto"}, "bf16": {"enabled": "auto"}}
    assert (first.stage, second.stage, said.stage) == (2, 3, "auto")
    assert (first.values["bf16"], second.values["bf16"]) == ({"enabled": True}, {"enabled": False})


def test_an_open_stage_has_to_be_chosen() -> None:
    said = config(None, zero_stage="auto")
    with refused("`zero_optimization.stage` is 'auto' .* nothing chose a stage"):
        said.complete(Facts())
    chosen = said.complete(Facts(), stage=3, offload_optimizer="cpu", offload_param="cpu", because="fits only so")
    assert chosen.values["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert "fits only so" in chosen.explain()
    with refused(r"is 2 \(`DeepSpeedPlugin\(zero_stage=2\)`\) and 3 \(chosen by memory and traffic\)"):
        config(None, zero_stage=2).complete(Facts(), stage=3)
    with refused("about parameters that are divided, and .* is 'auto' .* until a model is prepared"):
        config(None, zero_stage="auto", zero3_init_flag=True)


@pytest.mark.parametrize("name", ["zero3_init_flag", "zero3_save_16bit_model"])
def test_what_is_about_divided_parameters_needs_stage_3(name: str) -> None:
    with refused(f"`{name}=True` is about parameters that are divided, .* Set `zero_stage=3`"):
        config(None, zero_stage=2, **{name: True})
    config(None, zero_stage=2, **{name: False})
    config(None, zero_stage=3, **{name: True})


def test_leaf_classes_are_those_of_the_model() -> None:
    said = config(None, zero_stage=3, transformer_moe_cls_names="Linear,Experts")
    facts = Facts(module_classes=class_names_of(nn.Sequential(MODEL)))
    assert said.complete(facts).values["zero_optimization"]["leaf_module"] == {"classes": ["Linear", "Experts"]}
    wrong = config(None, zero_stage=3, transformer_moe_cls_names="Experts")
    with refused(r"is \['Experts'\] .*the model has no module of such a class. Its classes are Linear, Sequential"):
        wrong.complete(facts)
    wrong.complete(Facts())


def test_sizes_follow_the_width_where_they_are_open() -> None:
    names = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    for stage, width, expected in (
        (3, 10, {"reduce_bucket_size": 100, "stage3_prefetch_bucket_size": 90,
                 "stage3_param_persistence_threshold": 100}),
        (2, 10, {"reduce_bucket_size": 100}),
        (3, None, {}),
    ):  # fmt: skip
        section = {"stage": stage, **dict.fromkeys(names, "auto")}
        values = complete({"zero_optimization": section}, Facts(hidden_size=width)).values["zero_optimization"]
        assert {name: value for name, value in values.items() if name != "stage"} == expected
    unsaid = complete({"zero_optimization": {"stage": 3}}, Facts(hidden_size=10))
    assert unsaid.values["zero_optimization"] == {"stage": 3}


def test_the_width_is_where_models_tell_it() -> None:
    def model(**told: Any) -> nn.Module:
        module = nn.Linear(1, 1)
        module.config = SimpleNamespace(**told)  # type: ignore[assignment]
        return module

    assert hidden_size_of(model(hidden_size=8)) == 8
    assert hidden_size_of(model(hidden_sizes=[8, 32, 16])) == 32
    assert hidden_size_of(model(text_config=SimpleNamespace(hidden_size=4))) == 4
    assert hidden_size_of(model(text_config=SimpleNamespace(hidden_sizes=(4, 5)))) == 5
    assert hidden_size_of(model(d_model=8)) is None
    assert hidden_size_of(MODEL) is None


def test_ranks_that_share_are_those_of_the_mesh() -> None:
    divided = complete(None, Facts(tp_size=2, sp_size=4)).values["tensor_parallel"]
    assert divided == {"autotp_size": 2, "vocab_parallel_lm_head": False}
    assert complete(None, Facts(sp_size=4)).values["sequence_parallel_size"] == 4
    assert not {"tensor_parallel", "sequence_parallel_size"} & complete().values.keys()
    assert complete({"tensor_parallel": {"autotp_size": 0}}).values["tensor_parallel"] == {"autotp_size": 0}
    with refused(r"`tensor_parallel.autotp_size` is 4 .* and 2 \(`ParallelismConfig\(tp_size=2\)`\)"):
        complete({"tensor_parallel": {"autotp_size": 4}}, Facts(tp_size=2))
    with refused("`sequence_parallel_size` is 2 .* and 1"):
        complete({"sequence_parallel_size": 2})


def test_rates_are_timed_only_where_they_are_printed() -> None:
    assert complete().values["timers"] == {"throughput": {"enabled": False}}
    assert "timers" not in complete({"steps_per_print": 10}).values
    asked = {"timers": {"throughput": {"enabled": True}}}
    assert complete(asked).values["timers"] == asked["timers"]


def test_autos_of_deepspeeds_own_stay() -> None:
    given = {"data_types": {"keep_in_fp32_modules": "auto", "grad_accum_dtype": "auto"}}
    assert complete(given).values["data_types"] == {"keep_in_fp32_modules": "auto"}


def test_before_a_model_exists_its_division_is_described() -> None:
    values = config(ALL_AUTO).before_model(precision="bf16")
    assert values["zero_optimization"] == {"stage": 3}
    assert (values["bf16"], values["train_micro_batch_size_per_gpu"]) == ({"enabled": True}, 1)
    assert not {"optimizer", "scheduler", "train_batch_size", "gradient_accumulation_steps"} & values.keys()
    assert autos(values) == []
    assert config(None, zero_stage=3).before_model(precision="no", sp_size=2)["sequence_parallel_size"] == 2
    with refused(r"`zero_optimization.stage` is 2 .* which keeps parameters whole. Set `zero_stage=3`"):
        config(None, zero_stage=2).before_model(precision="no")
    with refused("`fp16.enabled` is True .* and `mixed_precision` is 'no'"):
        config({"fp16": {"enabled": True}, "zero_optimization": {"stage": 3}}).before_model(precision="no")


def test_a_message_has_its_three_parts() -> None:
    with pytest.raises(ConfigError) as caught:
        config({"zero_optimization": {"stage": 2}}, zero_stage=3)
    assert re.fullmatch(
        r"`zero_optimization.stage` is 2 \(`hf_ds_config`\) and 3 \(`DeepSpeedPlugin\(zero_stage=3\)`\), and one run "
        r"has one value. Say it in one place, or the same in both.",
        str(caught.value),
    )
