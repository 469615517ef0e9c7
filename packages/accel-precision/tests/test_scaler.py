"""Loss scaling: the same numbers as torch's scaler, and the bookkeeping that differs on purpose."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_precision import DynamicLossScaler, NoScaler
from accel_state.errors import AccelError, CheckpointError, ConfigError
from accel_state.protocols import LossScaler, Stateful

GOOD = {"scale": 1.0, "growth_tracker": 0, "stepped": False, "found_inf": False}


def _parameter(*values: float, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=dtype))


def _gradients(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        for each in group["params"]:
            if each.grad is not None:
                yield each.grad


def _step(scaler: LossScaler, optimizer: torch.optim.Optimizer) -> bool:
    scaler.unscale_(optimizer, _gradients(optimizer))
    return scaler.step(optimizer, optimizer.step)


def _backward(scaler: LossScaler, parameter: torch.Tensor, *, bad: bool = False) -> None:
    loss = (parameter * torch.tensor([1.0, 2.0])).sum()
    scaler.scale(loss * math.inf if bad else loss).backward()


@settings(deadline=None, max_examples=40)
@given(
    bad=st.lists(st.booleans(), min_size=1, max_size=25),
    init=st.sampled_from([1.0, 3.7, 65536.0, 1e30]),
    growth=st.sampled_from([2.0, 1.3]),
    backoff=st.sampled_from([0.5, 0.77]),
    interval=st.integers(1, 4),
)
def test_equals_torch_on_any_sequence(
    bad: list[bool], init: float, growth: float, backoff: float, interval: int
) -> None:
    ours = DynamicLossScaler(init_scale=init, growth_factor=growth, backoff_factor=backoff, growth_interval=interval)
    theirs = torch.amp.GradScaler(
        "cpu", init_scale=init, growth_factor=growth, backoff_factor=backoff, growth_interval=interval
    )
    mine, yours = _parameter(1.0, -2.0), _parameter(1.0, -2.0)
    my_optimizer, your_optimizer = torch.optim.SGD([mine], lr=0.1), torch.optim.SGD([yours], lr=0.1)
    for each in bad:
        my_optimizer.zero_grad()
        your_optimizer.zero_grad()
        _backward(ours, mine, bad=each)
        _backward(theirs, yours, bad=each)  # type: ignore[arg-type]
        assert mine.grad is not None
        assert torch.equal(mine.grad.nan_to_num(), yours.grad.nan_to_num())  # type: ignore[union-attr]
        taken = _step(ours, my_optimizer)
        before = yours.detach().clone()
        theirs.step(your_optimizer)
        assert taken == (not torch.equal(before, yours))
        ours.update()
        theirs.update()
        assert torch.equal(mine, yours)
        assert ours.get_scale() == theirs.get_scale()
        assert ours.state_dict()["growth_tracker"] == theirs.state_dict()["_growth_tracker"]


def test_scale_is_differentiable_and_lifts_a_16_bit_loss() -> None:
    scaler = DynamicLossScaler(init_scale=65536.0)
    loss = torch.tensor(3.0, dtype=torch.float16, requires_grad=True)
    scaled = scaler.scale(loss)
    assert scaled.dtype is torch.float32
    assert scaled.item() == 3.0 * 65536.0
    scaled.backward()
    assert scaler.scale(torch.tensor(1.0, dtype=torch.float64)).dtype is torch.float64


def test_unscale_twice_divides_once() -> None:
    scaler = DynamicLossScaler(init_scale=8.0)
    parameter = _parameter(0.0, 0.0)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    _backward(scaler, parameter)
    scaler.unscale_(optimizer, _gradients(optimizer))
    scaler.unscale_(optimizer, _gradients(optimizer))
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [1.0, 2.0]
    assert scaler.step(optimizer, optimizer.step)
    optimizer.zero_grad()
    _backward(scaler, parameter)
    scaler.unscale_(optimizer, _gradients(optimizer))
    assert parameter.grad.tolist() == [1.0, 2.0]


def test_step_without_unscale_is_refused() -> None:
    scaler = DynamicLossScaler()
    optimizer = torch.optim.SGD([_parameter(0.0)], lr=1.0)
    with pytest.raises(AccelError, match=r"`step` was called for `SGD`.*carry the loss scale 65536.*Call `unscale_`"):
        scaler.step(optimizer, optimizer.step)
    scaler.unscale_(optimizer, [])
    scaler.update()
    with pytest.raises(AccelError, match="or `update` came in between"):
        scaler.step(optimizer, optimizer.step)


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_step_leaves_parameters_and_optimizer_state(fused: bool) -> None:
    scaler = DynamicLossScaler(init_scale=4.0)
    parameter = _parameter(1.0, 2.0)
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=fused)
    _backward(scaler, parameter)
    assert _step(scaler, optimizer)
    scaler.update()
    before, moment = parameter.detach().clone(), optimizer.state[parameter]["exp_avg"].clone()
    optimizer.zero_grad()
    _backward(scaler, parameter, bad=True)
    assert not _step(scaler, optimizer)
    scaler.update()
    assert torch.equal(parameter, before)
    assert torch.equal(optimizer.state[parameter]["exp_avg"], moment)
    assert optimizer.state[parameter]["step"].item() == 1
    assert scaler.get_scale() == 2.0


def test_fused_optimizer_sees_unscaled_gradients() -> None:
    plain, fused = _parameter(1.0, 2.0), _parameter(1.0, 2.0)
    for parameter, is_fused in ((plain, False), (fused, True)):
        scaler = DynamicLossScaler(init_scale=1024.0)
        optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=is_fused)
        _backward(scaler, parameter)
        assert _step(scaler, optimizer)
    assert torch.allclose(plain, fused)


def test_two_optimizers_share_one_scale_and_skip_apart() -> None:
    scaler = DynamicLossScaler(init_scale=16.0, growth_interval=1)
    good, bad = _parameter(0.0, 0.0), _parameter(0.0, 0.0)
    of_good, of_bad = torch.optim.SGD([good], lr=1.0), torch.optim.SGD([bad], lr=1.0)
    _backward(scaler, good)
    _backward(scaler, bad, bad=True)
    scaler.unscale_(of_good, _gradients(of_good))
    scaler.unscale_(of_bad, _gradients(of_bad))
    assert scaler.step(of_good, of_good.step)
    assert not scaler.step(of_bad, of_bad.step)
    scaler.update()
    assert good.tolist() == [-1.0, -2.0]
    assert bad.tolist() == [0.0, 0.0]
    assert scaler.get_scale() == 8.0


def test_several_steps_of_one_optimizer_adapt_the_scale_once() -> None:
    scaler = DynamicLossScaler(init_scale=16.0)
    parameter = _parameter(0.0, 0.0)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    taken = []
    for bad in (True, True, False):
        optimizer.zero_grad()
        _backward(scaler, parameter, bad=bad)
        taken.append(_step(scaler, optimizer))
    scaler.update()
    assert taken == [False, False, True]
    assert scaler.get_scale() == 8.0
    scaler.update()
    assert scaler.get_scale() == 8.0


def test_update_without_a_step_keeps_the_scale_and_gives_up_what_was_unscaled() -> None:
    scaler = DynamicLossScaler(init_scale=16.0, growth_interval=1)
    parameter = _parameter(0.0, 0.0)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    _backward(scaler, parameter, bad=True)
    scaler.unscale_(optimizer, _gradients(optimizer))
    scaler.update()
    assert scaler.state_dict() == {**GOOD, "scale": 16.0}
    optimizer.zero_grad()
    _backward(scaler, parameter)
    assert _step(scaler, optimizer)
    assert parameter.tolist() == [-1.0, -2.0]


def test_the_scale_does_not_grow_past_float32() -> None:
    scaler = DynamicLossScaler(init_scale=2.0**127, growth_interval=1)
    optimizer = torch.optim.SGD([_parameter(0.0)], lr=1.0)
    _step(scaler, optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**127


def test_a_scale_that_vanishes_is_an_error() -> None:
    scaler = DynamicLossScaler(init_scale=2.0**-126, backoff_factor=0.5)
    parameter = _parameter(0.0, 0.0)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    _backward(scaler, parameter, bad=True)
    _step(scaler, optimizer)
    with pytest.raises(AccelError, match=r"has shrunk from .* NaN or infinite themselves\. Look for the first loss"):
        scaler.update()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_dtype_but_float16_is_unscaled(dtype: torch.dtype) -> None:
    scaler = DynamicLossScaler(init_scale=4.0)
    optimizer = torch.optim.SGD([_parameter(0.0)], lr=1.0)
    gradients = [torch.tensor([8.0, 4.0], dtype=dtype), torch.tensor([4.0])]
    scaler.unscale_(optimizer, gradients)
    assert [each.tolist() for each in gradients] == [[2.0, 1.0], [1.0]]


def test_float16_gradients_are_refused() -> None:
    scaler = DynamicLossScaler()
    optimizer = torch.optim.SGD([_parameter(0.0)], lr=1.0)
    with pytest.raises(ConfigError, match=r"1 gradient\(s\) of `SGD` are float16.*model\.float\(\)"):
        scaler.unscale_(optimizer, [torch.zeros(2, dtype=torch.float16)])


def test_sparse_gradients_are_unscaled_and_checked() -> None:
    scaler = DynamicLossScaler(init_scale=4.0)
    table = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), lr=1.0)
    scaler.scale(table(torch.tensor([1, 1])).sum()).backward()
    scaler.unscale_(optimizer, _gradients(optimizer))
    assert table.weight.grad is not None
    assert table.weight.grad.to_dense().tolist() == [[0.0, 0.0], [2.0, 2.0], [0.0, 0.0], [0.0, 0.0]]
    assert scaler.step(optimizer, optimizer.step)


def test_a_sharded_gradient_is_treated_by_its_local_part() -> None:
    class Sharded(torch.Tensor):
        def to_local(self) -> torch.Tensor:
            return local

    local = torch.tensor([8.0, math.nan])
    scaler = DynamicLossScaler(init_scale=4.0)
    optimizer = torch.optim.SGD([_parameter(0.0)], lr=1.0)
    scaler.unscale_(optimizer, [torch.zeros(4).as_subclass(Sharded)])
    assert local[0].item() == 2.0
    assert not scaler.step(optimizer, optimizer.step)


def test_the_hook_combines_the_flag_once_for_each_unscaling() -> None:
    seen: list[float] = []

    def another_rank_found_one(flag: torch.Tensor) -> None:
        seen.append(flag.item())
        assert flag.shape == ()
        assert flag.dtype is torch.float32
        flag.fill_(1.0)

    scaler = DynamicLossScaler(init_scale=4.0, reduce_found_inf=another_rank_found_one)
    parameter = _parameter(0.0, 0.0)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    scaler.unscale_(optimizer, [])
    scaler.unscale_(optimizer, [])
    assert seen == [0.0]
    assert not scaler.step(optimizer, optimizer.step)
    scaler.update()
    assert scaler.get_scale() == 2.0


def test_gradients_on_another_device_are_counted_in() -> None:
    scaler = DynamicLossScaler(device="meta")
    optimizer = torch.optim.SGD([_parameter(0.0)], lr=1.0)
    scaler.unscale_(optimizer, [torch.zeros(2), torch.zeros(2, device="meta")])
    assert scaler._unscaled[optimizer].device.type == "meta"


@given(
    scale=st.floats(min_value=2.0**-100, max_value=2.0**100, width=32),
    tracker=st.integers(0, 10**6),
    stepped=st.booleans(),
    found_inf=st.booleans(),
)
def test_state_survives_json_to_the_bit(scale: float, tracker: int, stepped: bool, found_inf: bool) -> None:
    state = {"scale": scale, "growth_tracker": tracker, "stepped": stepped, "found_inf": found_inf}
    scaler = DynamicLossScaler()
    scaler.load_state_dict(json.loads(json.dumps(state)))
    assert scaler.state_dict() == state
    assert scaler.get_scale().hex() == scale.hex()


@settings(deadline=None, max_examples=40)
@given(bad=st.lists(st.booleans(), min_size=1, max_size=12), data=st.data())
def test_resuming_anywhere_continues_as_if_never_interrupted(bad: list[bool], data: st.DataObject) -> None:
    def train(interrupted_after: int | None, before_update: bool) -> list[float]:
        scaler = DynamicLossScaler(growth_interval=2)
        scales = []
        for index, each in enumerate(bad):
            optimizer = torch.optim.SGD([_parameter(0.0)], lr=1.0)
            scaler.unscale_(optimizer, [torch.tensor([math.inf if each else 1.0])])
            scaler.step(optimizer, lambda: None)
            for save_here in (True, False):
                if index == interrupted_after and before_update is save_here:
                    state = scaler.state_dict()
                    scaler = DynamicLossScaler(growth_interval=2)
                    scaler.load_state_dict(json.loads(json.dumps(state)))
                if save_here:
                    scaler.update()
            scales.append(scaler.get_scale())
        return scales

    interrupted = train(data.draw(st.integers(0, len(bad) - 1)), data.draw(st.booleans()))
    assert interrupted == train(None, False)


def test_loading_forgets_the_window_in_progress_and_the_old_inverse() -> None:
    scaler = DynamicLossScaler(init_scale=16.0)
    optimizer = torch.optim.SGD([_parameter(0.0)], lr=1.0)
    scaler.unscale_(optimizer, [torch.ones(1)])
    scaler.load_state_dict({**GOOD, "scale": 2.0})
    gradient = torch.ones(1)
    scaler.unscale_(optimizer, [gradient])
    assert gradient.item() == 0.5


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"holds nothing, but it must hold \['found_inf', 'growth_tracker', 'scale', 'stepped'\]"),
        ({"scale": 1.0}, r"holds \['scale'\]"),
        ({**GOOD, "scale": -1.0}, r"`scale=-1.0`.*damaged"),
        ({**GOOD, "scale": 0.0}, r"`scale=0.0`"),
        ({**GOOD, "scale": math.inf}, "`scale=inf`"),
        ({**GOOD, "scale": "1"}, "`scale='1'`"),
        ({**GOOD, "growth_tracker": -1}, "`growth_tracker=-1`"),
        ({**GOOD, "growth_tracker": True}, "`growth_tracker=True`"),
        ({**GOOD, "stepped": 1}, "`stepped=1`, which is no such value as False"),
    ],
)
def test_a_damaged_state_is_refused(state: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        DynamicLossScaler().load_state_dict(state)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("init_scale", 0.0),
        ("init_scale", -1.0),
        ("init_scale", math.inf),
        ("init_scale", math.nan),
        ("init_scale", True),
        ("growth_factor", 1.0),
        ("growth_factor", "2"),
        ("backoff_factor", 1.0),
        ("backoff_factor", 0.0),
        ("growth_interval", 0),
        ("growth_interval", 1.5),
        ("growth_interval", True),
    ],
)
def test_nonsense_settings_are_refused(setting: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"`{setting}={value!r}` would not keep.*Give "):
        DynamicLossScaler(**{setting: value})  # type: ignore[arg-type]


def test_no_scaler_changes_and_skips_nothing() -> None:
    scaler = NoScaler()
    parameter = _parameter(1.0, 1.0)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    loss = parameter.sum()
    assert scaler.scale(loss) is loss
    loss.backward()
    assert _step(scaler, optimizer)
    scaler.update()
    assert parameter.tolist() == [0.0, 0.0]
    assert scaler.get_scale() == 1.0
    scaler.load_state_dict(scaler.state_dict())
    with pytest.raises(CheckpointError, match=r"holds the state of a loss scaler \(scale\).*mixed_precision='fp16'"):
        scaler.load_state_dict({"scale": 1.0})


@pytest.mark.parametrize("scaler", [NoScaler(), DynamicLossScaler()])
def test_scalers_fit_the_protocols(scaler: object) -> None:
    assert isinstance(scaler, LossScaler)
    assert isinstance(scaler, Stateful)
