"""Empty initialisation: what lands where, that ties hold, and that torch is left as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.parameter import UninitializedParameter

from accel_bigmodel import find_tied_parameters, init_empty_weights, init_on_device
from accel_state.errors import ConfigError

META, CPU = torch.device("meta"), torch.device("cpu")


@pytest.fixture(autouse=True)
def torch_is_left_as_it_was() -> Iterator[None]:
    methods = [nn.Module.register_parameter, nn.Module.register_buffer, torch.empty, torch.zeros]
    yield
    assert [nn.Module.register_parameter, nn.Module.register_buffer, torch.empty, torch.zeros] == methods
    assert not torch_module._global_parameter_registration_hooks
    assert not torch_module._global_buffer_registration_hooks
    assert torch.empty(1).device == CPU
    assert nn.Linear(1, 1).weight.device == CPU


class Block(nn.Module):
    """Parameters and buffers made in the ways that real models use."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.ones(4), requires_grad=False)
        self.register_parameter("nothing", None)
        self.register_buffer("position", torch.arange(4))
        self.register_buffer("from_numbers", torch.tensor([1.0, 2.0]).cumsum(0), persistent=False)
        self.many = nn.ParameterList([torch.zeros(2), torch.zeros(3)])
        nn.init.normal_(self.linear.weight)
        with torch.no_grad():
            self.linear.bias.zero_()


def _transformer() -> nn.Module:
    return nn.Transformer(16, 2, 1, 1, dim_feedforward=32, batch_first=True)


@pytest.mark.parametrize("make", [Block, _transformer, lambda: nn.LSTM(4, 4, 2), lambda: nn.Conv2d(3, 8, 3)])
def test_the_model_is_the_same_without_its_values(make: type[nn.Module]) -> None:
    real = make()
    with init_empty_weights():
        empty = make()
    assert {each.device for each in empty.parameters()} == {META}
    assert {each.device for each in empty.buffers()} <= {CPU}
    described = [
        [(name, type(each), each.shape, each.dtype, each.requires_grad) for name, each in model.named_parameters()]
        for model in (real, empty)
    ]
    assert described[0] == described[1]
    assert list(real.state_dict()) == list(empty.state_dict())
    empty.load_state_dict(real.state_dict(), assign=True)
    assert all(torch.equal(a, b) for a, b in zip(real.parameters(), empty.parameters(), strict=True))


def test_buffers_keep_their_values_unless_asked_for() -> None:
    with init_empty_weights():
        block = Block()
    assert block.position.tolist() == [0, 1, 2, 3]  # type: ignore[operator]
    assert block.from_numbers.tolist() == [1.0, 3.0]  # type: ignore[operator]
    with init_empty_weights(include_buffers=True):
        block = Block()
        assert torch.zeros(3).device == META
    assert {each.device for each in block.buffers()} == {META}
    assert {each.device for each in block.parameters()} == {META}


def test_buffers_made_elsewhere_go_along_too() -> None:
    kept = torch.ones(3)
    with init_empty_weights(include_buffers=True):
        module = nn.Module()
        module.register_buffer("mask", kept)
        module.register_buffer("nothing", None)
    assert module.mask.device == META
    assert kept.device == CPU


def test_ties_hold() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Embedding(5, 3)
            self.decoder = nn.Linear(3, 5, bias=False)
            self.decoder.weight = self.encoder.weight
            shared = nn.Parameter(torch.ones(2))
            self.first = shared
            self.second = shared

    with init_empty_weights():
        model = Tied()
    assert model.decoder.weight is model.encoder.weight
    assert model.first is model.second
    assert find_tied_parameters(model) == [["first", "second"], ["encoder.weight", "decoder.weight"]]


def test_parameters_of_a_class_of_their_own_keep_class_and_attributes() -> None:
    class Marked(nn.Parameter):
        pass

    class Wrapped(torch.Tensor):
        pass

    marked = Marked(torch.ones(2), requires_grad=False)
    marked.axis = 1  # type: ignore[attr-defined]
    with init_empty_weights():
        module = nn.Module()
        module.register_parameter("marked", marked)
        module.register_parameter("wrapped", nn.Parameter(torch.ones(2).as_subclass(Wrapped)))
        module.lazy = nn.LazyLinear(3, dtype=torch.float64)
    assert type(module.marked) is Marked
    assert module.marked.axis == 1
    assert module.marked.requires_grad is False
    assert isinstance(module.wrapped, nn.Parameter)
    assert isinstance(module.wrapped, Wrapped)
    assert module.wrapped.device == META
    lazy = module.lazy.weight
    assert type(lazy) is UninitializedParameter
    lazy.materialize((3, 2))
    assert lazy.device == META
    assert lazy.dtype == torch.float64


def test_an_exception_leaves_torch_as_it_was() -> None:
    with pytest.raises(ZeroDivisionError, match="division"), init_empty_weights(include_buffers=True):
        _ = 1 / 0
    assert nn.Linear(1, 1).weight.device == CPU


def test_nesting_and_using_it_twice() -> None:
    with init_empty_weights():
        with init_empty_weights(include_buffers=True):
            inner = Block()
        outer = Block()
    assert inner.position.device == META
    assert outer.position.device == CPU
    assert {each.device for model in (inner, outer) for each in model.parameters()} == {META}
    with init_on_device("cpu"), init_empty_weights():
        assert nn.Linear(1, 1).weight.device == META


def test_it_decorates() -> None:
    @init_empty_weights()
    def make(depth: int) -> nn.Module:
        return nn.Sequential(nn.Linear(1, 1), make(depth - 1)) if depth else nn.Linear(1, 1)

    assert {each.device for each in make(2).parameters()} == {META}


def test_modules_that_exist_already_are_left_alone() -> None:
    ready = nn.Linear(2, 2)
    with init_empty_weights():
        model = nn.Sequential(ready, nn.Linear(2, 2))
    assert ready.weight.device == CPU
    assert model[1].weight.device == META


def test_other_threads_are_left_alone() -> None:
    made: list[torch.device] = []

    def build() -> None:
        block = Block()
        made.extend([block.linear.weight.device, block.position.device])  # type: ignore[list-item]

    with init_empty_weights(include_buffers=True):
        thread = threading.Thread(target=build)
        thread.start()
        thread.join()
    assert made == [CPU, CPU]


def test_a_real_device() -> None:
    with init_on_device(torch.device("cpu"), include_buffers=True):
        block = Block()
    assert {each.device for each in [*block.parameters(), *block.buffers()]} == {CPU}


def test_values_cannot_come_back_from_meta() -> None:
    message = r"`Linear\.weight` is on the meta device and has no values.*'cpu'.*Leave `init_empty_weights` first"
    with pytest.raises(ConfigError, match=message), init_empty_weights(), init_on_device("cpu"):
        nn.Linear(1, 1)


def test_a_large_model_takes_no_memory() -> None:
    with init_empty_weights():
        model = nn.Transformer(4096, 32, 12, 12, dim_feedforward=16384, batch_first=True)
    assert sum(each.numel() for each in model.parameters()) > 5_000_000_000
