"""What each strategy does that others do not, how one is chosen, and what is refused beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

from accel_parallel import (
    Bundle,
    DDPCommunicationHookType,
    DDPStrategy,
    DistributedDataParallelKwargs,
    OptimizerState,
    SingleStrategy,
    audit_model,
    audit_optimizer,
    select_strategy,
    strategy_class,
)
from accel_parallel.clip import check_clip
from accel_parallel.naming import parameter_names
from accel_state import CheckpointError, ConfigError, Process, ProcessSettings
from accel_state.testing import run_ranks

Hook = DDPCommunicationHookType


@pytest.fixture
def process() -> Iterator[Process]:
    with Process.open(ProcessSettings(device="cpu")) as opened:
        yield opened


@pytest.mark.parametrize(("world_size", "name"), [(1, "single"), (2, "ddp"), (64, "ddp"), (1024, "ddp")])
def test_the_world_chooses(world_size: int, name: str) -> None:
    assert select_strategy(world_size=world_size) == name
    assert strategy_class(name).name == name


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`strategy='dpp'` is not provided.*'ddp'.*of ddp, deepspeed, fsdp, single"):
        strategy_class("dpp")


def test_third_parties_add_strategies(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        name = "mine"

        def load(self) -> Any:
            return SingleStrategy

    monkeypatch.setattr("accel_parallel.select.entry_points", lambda group: [Point()])
    assert strategy_class("mine") is SingleStrategy
    with pytest.raises(ConfigError, match="Use one of ddp, deepspeed, fsdp, mine, single"):
        strategy_class("other")


def test_data_parallel_needs_two(process: Process) -> None:
    with pytest.raises(ConfigError, match="in a world of one process"):
        DDPStrategy(process)


OPTIONS = DistributedDataParallelKwargs(
    broadcast_buffers=False,
    bucket_cap_mb=3,
    find_unused_parameters=True,
    gradient_as_bucket_view=True,
    static_graph=True,
)


def wrapped_settings(options: DistributedDataParallelKwargs | None) -> tuple[Any, ...]:
    (model,) = DDPStrategy(Process.current(), options=options).prepare(Bundle((nn.Linear(2, 2),))).models
    assert isinstance(model, DistributedDataParallel)
    return (
        model.broadcast_buffers,
        model.bucket_bytes_cap,
        model.find_unused_parameters,
        model.gradient_as_bucket_view,
        model.static_graph,
    )


def test_options_reach_ddp() -> None:
    assert run_ranks(wrapped_settings, 2, OPTIONS)[1] == (False, 3 * 2**20, True, True, True)
    assert run_ranks(wrapped_settings, 2, None)[1] == (True, 25 * 2**20, False, False, False)


def buffers_after_forward(broadcast: bool) -> float:
    model = nn.BatchNorm1d(1, momentum=1.0)
    strategy = DDPStrategy(Process.current(), options=DistributedDataParallelKwargs(broadcast_buffers=broadcast))
    (wrapped,) = strategy.prepare(Bundle((model,))).models
    for _ in range(2):
        wrapped(torch.arange(4.0).unsqueeze(1) + 10 * Process.current().topology.rank)
    wrapped.eval()
    wrapped(torch.zeros(1, 1))
    return float(model.running_mean)


def test_buffers_are_broadcast_unless_told_otherwise() -> None:
    assert run_ranks(buffers_after_forward, 2, False) == pytest.approx([1.5, 11.5])
    assert run_ranks(buffers_after_forward, 2, True)[0] == pytest.approx(1.5)


def hooked_gradient(options: DistributedDataParallelKwargs) -> torch.Tensor:
    torch.manual_seed(0)
    model = nn.Linear(16, 16)
    strategy = DDPStrategy(Process.current(), options=options)
    (wrapped,) = strategy.prepare(Bundle((model,))).models
    inputs = torch.randn(4, 16, generator=torch.Generator().manual_seed(Process.current().topology.rank))
    strategy.backward(wrapped(inputs).square().mean())
    assert model.weight.grad is not None
    return model.weight.grad


POWER = {"matrix_approximation_rank": 8, "start_powerSGD_iter": 2}


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"comm_hook": Hook.FP16}, 1e-3),
        ({"comm_wrapper": Hook.FP16}, 1e-3),
        ({"comm_hook": "fp16"}, 1e-3),
        ({"comm_hook": Hook.POWER_SGD, "comm_state_option": POWER}, 1e-5),
        ({"comm_hook": Hook.BATCHED_POWER_SGD, "comm_state_option": POWER, "comm_wrapper": Hook.FP16}, 1e-3),
    ],
    ids=["fp16", "fp16 wrapper", "by name", "power_sgd", "batched_power_sgd in fp16"],
)
def test_communication_hooks_stay_near(options: dict[str, Any], tolerance: float) -> None:
    stays_near(options, tolerance)


def stays_near(options: dict[str, Any], tolerance: float) -> None:
    exact = run_ranks(hooked_gradient, 2, DistributedDataParallelKwargs())
    hooked = run_ranks(hooked_gradient, 2, DistributedDataParallelKwargs(**options))
    assert torch.equal(hooked[0], hooked[1])
    assert torch.allclose(hooked[0], exact[0], atol=tolerance * exact[0].abs().max().item())
    if tolerance > 1e-4:
        assert not torch.equal(hooked[0], exact[0])


def refused_hook(options: DistributedDataParallelKwargs) -> str:
    with pytest.raises(ConfigError, match="with the gloo backend") as caught:
        DDPStrategy(Process.current(), options=options).prepare(Bundle((nn.Linear(2, 2),)))
    return str(caught.value)


SENDS_BF16 = torch.version.cuda is not None
"""What torch looks at, whatever the backend: builds without CUDA refuse the hook over gloo too."""
BF16 = pytest.mark.parametrize(
    "options", [{"comm_hook": Hook.BF16}, {"comm_wrapper": Hook.BF16}], ids=["hook", "wrapper"]
)


@BF16
@pytest.mark.skipif(not SENDS_BF16, reason="this build of torch refuses bfloat16 in hooks")
def test_bf16_stays_near_where_torch_can_send_it(options: dict[str, Any]) -> None:
    stays_near(options, 1e-2)


@BF16
@pytest.mark.skipif(SENDS_BF16, reason="this build of torch takes bfloat16 in hooks")
def test_bf16_is_refused_where_torch_cannot_send_it(options: dict[str, Any]) -> None:
    message, _ = run_ranks(refused_hook, 2, DistributedDataParallelKwargs(**options))
    assert "bf16" in message
    assert "Use fp16, or leave it out" in message


def frozen_and_compiled() -> list[bool]:
    strategy = DDPStrategy(Process.current())
    frozen, inner = nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2)
    compiled = torch.compile(inner, backend="eager")
    models = strategy.prepare(Bundle((frozen, compiled))).models
    with strategy.no_sync(models[0]):
        models[0](torch.ones(1, 2))
    return [
        models[0] is frozen,
        strategy.unwrap(models[1]) is inner,
        set(strategy.full_state(models[1])) == {"weight", "bias"},
        strategy.average_size == 2,
    ]


def test_models_without_gradients_are_not_wrapped_and_compiled_ones_unwrapped() -> None:
    assert run_ranks(frozen_and_compiled, 2) == [[True] * 4] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"comm_wrapper": Hook.POWER_SGD}, "`comm_wrapper='power_sgd'` is no rounding"),
        ({"comm_state_option": {"a": 1}}, "has no effect with `comm_hook='no'`"),
        ({"comm_hook": "fp8"}, "`comm_hook='fp8'` is no way"),
        ({"bucket_cap_mb": 0}, "`bucket_cap_mb=0` leaves no room"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DistributedDataParallelKwargs(**options)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_clipping_bounds_the_norm_and_returns_it(process: Process, norm_type: float) -> None:
    strategy = SingleStrategy(process)
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    weights[0].grad, weights[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([-4.0])
    expected = {1.0: 7.0, 2.0: 5.0}.get(norm_type, 4.0)
    assert strategy.grad_norm(weights, norm_type).item() == pytest.approx(expected)
    assert strategy.clip_grad_norm_(weights, 1.0, norm_type).item() == pytest.approx(expected)
    assert strategy.grad_norm(weights, norm_type).item() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(
    ("max_norm", "norm_type", "message"),
    [(-1.0, 2.0, "`max_norm=-1.0` is no bound"), (float("nan"), 2.0, "nan"), (1.0, 0.0, "`norm_type=0.0` does not")],
)
def test_bounds_that_are_none_are_refused(max_norm: float, norm_type: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_clip(max_norm, norm_type)


def test_a_model_is_prepared_once() -> None:
    model = nn.Linear(2, 2)
    audit_model(model, name="model number 1", prepared=[nn.Linear(2, 2)])
    with pytest.raises(ConfigError, match=r"model number 1 \(Linear\) is prepared already"):
        audit_model(model, name="model number 1", prepared=[model])


def test_models_without_values_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"`weight` of it .* is on the meta device"):
        audit_model(nn.Linear(2, 2, device="meta"), name="it", prepared=[])
    model = nn.Linear(2, 2)
    model.register_buffer("scale", torch.ones(1, device="meta"))
    with pytest.raises(ConfigError, match=r"`scale` of it .* is on the meta device"):
        audit_model(model, name="it", prepared=[])


def test_an_optimizer_of_strangers_is_refused() -> None:
    model, replaced = nn.Linear(2, 3), nn.Linear(2, 3)
    audit_optimizer(SGD(model.parameters(), lr=1.0), name="it", models=[model], others=[])
    with pytest.raises(ConfigError, match=r"it \(SGD\) holds 2 of 2 parameters, the first of shape \(3, 2\)"):
        audit_optimizer(SGD(replaced.parameters(), lr=1.0), name="it", models=[model], others=[])
    mixed = SGD([*model.parameters(), replaced.bias], lr=1.0)
    with pytest.raises(ConfigError, match=r"holds 1 of 3 parameters, the first of shape \(3,\)"):
        audit_optimizer(mixed, name="it", models=[model], others=[])


def test_two_optimizers_of_one_parameter_are_refused() -> None:
    model = nn.Linear(2, 3)
    others = [SGD([model.weight], lr=1.0), SGD([model.bias], lr=1.0)]
    with pytest.raises(ConfigError, match=r"prepared optimizer number 1 both hold a parameter of shape \(3,\)"):
        audit_optimizer(AdamW([model.bias]), name="it", models=[model], others=others)


def test_tied_parameters_have_the_first_of_their_names() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
    model["head"].weight = model["embed"].weight
    other = nn.Linear(1, 1, bias=False)
    names = parameter_names([("model", model), ("model_1", other), ("model_2", model)])
    assert list(names.values()) == ["model.embed.weight", "model_1.weight"]


def trained(make: Any = AdamW, dtype: torch.dtype = torch.float32, **kwargs: Any) -> tuple[nn.Module, Any]:
    model = nn.Linear(2, 2).to(dtype)
    optimizer = make(model.parameters(), **{"lr": 0.1, **kwargs})
    model(torch.ones(1, 2, dtype=dtype)).sum().backward()
    optimizer.step()
    return model, optimizer


def named(model: nn.Module) -> dict[torch.Tensor, str]:
    return parameter_names([("model", model)])


def test_a_state_moves_with_its_parameters(process: Process) -> None:
    model, optimizer = trained()
    bundle = SingleStrategy(process).prepare(Bundle((model,), (optimizer,)))
    assert bundle.models == (model,)
    assert bundle.optimizers == (optimizer,)
    assert len(optimizer.state) == 2
    assert SingleStrategy(process, place=False).prepare(bundle) is bundle


def test_reordered_parameters_find_their_state(process: Process) -> None:
    strategy = SingleStrategy(process)
    model, optimizer = trained()
    state = strategy.optimizer_state(optimizer, named(model))
    other = nn.Linear(2, 2)
    reordered = AdamW([other.bias, other.weight], lr=1.0)
    strategy.load_optimizer_state(reordered, named(other), state)
    assert torch.equal(reordered.state[other.bias]["exp_avg"], optimizer.state[model.bias]["exp_avg"])
    assert torch.equal(reordered.state[other.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
    assert reordered.param_groups[0]["lr"] == 0.1


def test_entries_keep_a_dtype_of_their_own(process: Process) -> None:
    strategy = SingleStrategy(process)
    model, optimizer = trained(dtype=torch.bfloat16)
    for entries in optimizer.state.values():  # as optimizers do that keep exact moments of rounded parameters
        entries["exp_avg"] = torch.full_like(entries["exp_avg"], 1 / 3, dtype=torch.float32)
    state = strategy.optimizer_state(optimizer, named(model))
    other, fresh = trained(dtype=torch.bfloat16)
    strategy.load_optimizer_state(fresh, named(other), state)
    assert fresh.state[other.bias]["exp_avg"].dtype is torch.float32
    assert torch.equal(fresh.state[other.bias]["exp_avg"], optimizer.state[model.bias]["exp_avg"])
    assert fresh.state[other.bias]["exp_avg"] is not optimizer.state[model.bias]["exp_avg"]


def test_optimizers_of_other_groups_are_refused(process: Process) -> None:
    strategy = SingleStrategy(process)
    model, optimizer = trained()
    state = strategy.optimizer_state(optimizer, named(model))
    two = SGD([{"params": [model.weight]}, {"params": [model.bias]}], lr=1.0)
    with pytest.raises(CheckpointError, match="has 1 parameter groups and this one has 2"):
        strategy.load_optimizer_state(two, named(model), state)
    part = SGD([model.weight], lr=1.0)
    with pytest.raises(CheckpointError, match=r"holds `model.bias` too"):
        strategy.load_optimizer_state(part, named(model), state)
    stray = OptimizerState(state={**state.state, "model.other": {}}, groups=state.groups)
    with pytest.raises(CheckpointError, match=r"holds `model.other` too"):
        strategy.load_optimizer_state(optimizer, named(model), stray)


def test_many_names_are_cut_short(process: Process) -> None:
    strategy = SingleStrategy(process)
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(4)))
    with pytest.raises(CheckpointError, match=r"lacks `0.bias`, .* and 3 more"):
        strategy.load_model_state(model, {})


class Stubborn(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 3}

    def set_extra_state(self, state: Any) -> None: ...


def test_state_that_is_no_tensor_is_refused(process: Process) -> None:
    with pytest.raises(CheckpointError, match="`_extra_state` in the model's state is a dict"):
        SingleStrategy(process).model_state(Stubborn(1, 1))
