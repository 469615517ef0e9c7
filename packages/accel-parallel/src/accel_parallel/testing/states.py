"""What a strategy gives away of models and optimizers, and what it takes back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from accel_parallel.naming import parameter_names
from accel_parallel.sharded import is_sharded, local_of, whole
from accel_parallel.strategy import Bundle, OptimizerState, Strategy
from accel_parallel.testing.scenarios import batch, build, loss_of
from accel_state.errors import CheckpointError, ConfigError
from accel_state.process import Process

__all__ = ["ReadGradients", "demand", "state_failures", "whole_gradients"]


def demand(condition: bool, problem: str) -> None:
    """Raise an `AssertionError` that says what is wrong, unless all is well."""
    if not condition:
        raise AssertionError(problem)


ReadGradients = Callable[[Strategy, nn.Module], dict[str, torch.Tensor]]


def whole_gradients(strategy: Strategy, model: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by parameter name, gathered where they are distributed tensors."""
    found = {}
    for name, parameter in strategy.unwrap(model).named_parameters():
        if parameter.grad is not None:
            found[name] = whole(parameter.grad).clone()
    return found


class _NoScaler:
    """Scales nothing."""

    enabled = False
    reduce_found_inf: Callable[[torch.Tensor], None] | None = None

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss

    def unscale_(self, optimizer: Optimizer, gradients: Iterable[torch.Tensor]) -> None: ...

    def step(self, optimizer: Optimizer, step: Callable[[], Any]) -> bool:
        step()
        return True

    def update(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class _Trained:
    """One model and its optimizer, prepared."""

    def __init__(
        self, make: Callable[[], Strategy], dtype: torch.dtype, *, seed: int = 0, width: int = 6, deep: bool = False
    ) -> None:
        self.strategy = make()
        (self.raw,), optimizers = build(1, dtype, seed=seed, width=width, deep=deep)
        self.own_state = {name: value.clone() for name, value in self.raw.state_dict().items()}
        bundle = self.strategy.prepare(Bundle((self.raw,), tuple(optimizers)))
        self.model: nn.Module = bundle.models[0]
        self.optimizer: Optimizer = bundle.optimizers[0]

    def loss(self, index: int) -> torch.Tensor:
        tokens, targets, _ = batch(0, index, Process.current().topology.data_rank)
        return loss_of(self.model(tokens), targets, None)

    def step(self, index: int) -> None:
        self.strategy.zero_grad(self.optimizer)
        self.strategy.backward(self.loss(index))
        self.strategy.step(self.optimizer, scaler=_NoScaler())

    def names(self) -> dict[torch.Tensor, str]:
        return parameter_names([("model", self.strategy.unwrap(self.model))])

    def model_state(self) -> dict[str, torch.Tensor]:
        return {name: value.clone() for name, value in self.strategy.model_state(self.model).items()}

    def optimizer_state(self) -> OptimizerState:
        found = self.strategy.optimizer_state(self.optimizer, self.names())
        copied = {
            name: {key: value.clone() if hasattr(value, "clone") else value for key, value in entries.items()}
            for name, entries in found.state.items()
        }
        return OptimizerState(state=copied, groups=[dict(group) for group in found.groups])


def state_failures(
    make: Callable[[], Strategy], dtype: torch.dtype, *, gradients: ReadGradients = whole_gradients
) -> list[str]:
    """Everything that is wrong with a strategy's states, in words. Every rank must call this.

    Args:
        make: the strategy, a new one each time.
        dtype: of the models.
        gradients: reads a model's gradients at the end of a window; another than the default for a strategy that keeps
            them elsewhere than in ``grad``, and so has nowhere to show those inside `no_sync`.
    """
    trained = _Trained(make, dtype)
    for index in range(3):
        trained.step(index)
    return [
        *_unwrap_failures(trained),
        *_round_trip_failures(trained, make, dtype),
        *_refusal_failures(trained, make, dtype),
        *_no_sync_failures(make, dtype, gradients),
        *_join_failures(make, dtype),
    ]


def _unwrap_failures(trained: _Trained) -> Iterator[str]:
    if trained.strategy.unwrap(trained.model) is not trained.raw:
        yield "`unwrap` gives another module than the one that was handed in"
    whole = trained.strategy.full_state(trained.model)
    if set(whole) != set(trained.own_state):
        yield f"`full_state` has other names than the model: {sorted(set(whole) ^ set(trained.own_state))}"
    for name in sorted(set(whole) & set(trained.own_state)):
        if whole[name].shape != trained.own_state[name].shape:
            yield f"`full_state` holds `{name}` in shape {tuple(whole[name].shape)}"
    if set(trained.optimizer_state().state) - set(trained.names().values()):
        yield "`optimizer_state` is keyed by other names than it was given"


def _round_trip_failures(trained: _Trained, make: Callable[[], Strategy], dtype: torch.dtype) -> Iterator[str]:
    model_state, optimizer_state = trained.model_state(), trained.optimizer_state()
    fresh = _Trained(make, dtype, seed=77)
    fresh.strategy.load_model_state(fresh.model, model_state)
    fresh.strategy.load_optimizer_state(fresh.optimizer, fresh.names(), optimizer_state)
    if not _same(fresh.model_state(), trained.model_state()):
        yield "the model that was restored is not bitwise the same"
    ours, theirs = fresh.optimizer_state(), trained.optimizer_state()
    if ours.state.keys() != theirs.state.keys():
        yield "the optimizer that was restored holds state of other parameters"
    elif not all(_same(ours.state[name], theirs.state[name]) for name in ours.state):
        yield "the state of the optimizer that was restored is not bitwise the same"
    if ours.groups != theirs.groups:
        yield "the groups of the optimizer that was restored are not the same"
    trained.step(3)
    fresh.step(3)
    # Not bitwise: a backend may add up the ranks' gradients in another order in a first step than later.
    after, wanted = fresh.model_state(), trained.model_state()
    tolerance = 1e-10 if dtype is torch.float64 else 1e-4
    if not all(torch.allclose(whole(after[name]), whole(wanted[name]), rtol=0, atol=tolerance) for name in wanted):
        yield "the next step after restoring is another one"


def _refusal_failures(trained: _Trained, make: Callable[[], Strategy], dtype: torch.dtype) -> Iterator[str]:
    other_dtype = torch.float32 if dtype is torch.float64 else torch.float64
    others = {
        "lacks a parameter": (trained, _Trained(make, dtype, deep=True), "deeper"),
        "holds a parameter too many": (_Trained(make, dtype, deep=True), trained, "deeper"),
        "has other shapes": (_Trained(make, dtype, width=5), trained, "body|embed|offset|frozen|head"),
    }
    with suppress(ConfigError):  # a strategy that trains in one dtype only refuses to prepare another
        others["has another dtype"] = (_Trained(make, other_dtype), trained, "body|embed|offset|frozen|head")
    for what, (source, target, names) in others.items():
        if source is not trained:
            source.step(0)
        before, before_optimizer = target.model_state(), target.optimizer_state()
        for kind, refused in (("model", _refused_model), ("optimizer", _refused_optimizer)):
            message = refused(source, target)
            if message is None:
                yield f"a {kind} state that {what} was loaded"
            elif not any(name in message for name in names.split("|")):
                yield f"a {kind} state that {what} was refused without naming a parameter: {message}"
        if not _same(target.model_state(), before):
            yield f"a state that {what} was refused, but changed the model"
        after = target.optimizer_state()
        if after.state.keys() != before_optimizer.state.keys() or not all(
            _same(after.state[name], before_optimizer.state[name]) for name in after.state
        ):
            yield f"a state that {what} was refused, but changed the optimizer"


def _refused_model(source: _Trained, target: _Trained) -> str | None:
    try:
        target.strategy.load_model_state(target.model, source.model_state())
    except CheckpointError as error:
        return str(error)
    return None


def _refused_optimizer(source: _Trained, target: _Trained) -> str | None:
    try:
        target.strategy.load_optimizer_state(target.optimizer, target.names(), source.optimizer_state())
    except CheckpointError as error:
        return str(error)
    return None


def _no_sync_failures(make: Callable[[], Strategy], dtype: torch.dtype, gradients: ReadGradients) -> Iterator[str]:
    """Inside, a strategy that averages keeps gradients local; after an exchange they are the average of all sums."""
    trained = _Trained(make, dtype)
    with trained.strategy.no_sync(trained.model):
        trained.strategy.backward(trained.loss(0))
    ranks = range(trained.strategy.average_size)
    own = Process.current().topology.data_rank
    local = _plain_gradients(dtype, [(0, own)])
    hidden = gradients is not whole_gradients or any(is_sharded(parameter) for parameter in trained.names())
    if not hidden and not _near(trained, local, gradients):
        yield "gradients inside `no_sync` are not those of this rank alone"
    trained.strategy.backward(trained.loss(1))
    both = _plain_gradients(dtype, [(index, rank) for index in (0, 1) for rank in (ranks if len(ranks) > 1 else [own])])
    if not _near(trained, {name: value / len(ranks) for name, value in both.items()}, gradients):
        yield "gradients exchanged after `no_sync` are not the average over ranks of the sums over micro-batches"


def _join_failures(make: Callable[[], Strategy], dtype: torch.dtype) -> Iterator[str]:
    """Ranks leave one after the other; a strategy that cannot do with fewer refuses at the entry."""
    trained = _Trained(make, dtype)
    own = Process.current().topology.data_rank
    averaged = trained.strategy.average_size
    counts = {rank: 1 + 2 * rank for rank in (range(averaged) if averaged > 1 else [own])}
    settled: list[int] = []
    with ExitStack() as stack:
        try:
            stack.enter_context(trained.strategy.join([trained.model], settle=settled.append))
        except ConfigError:
            return
        for index in range(counts[own]):
            trained.step(index)
    (model,), (optimizer,) = build(1, dtype)
    for index in range(max(counts.values())):
        optimizer.zero_grad()
        there = [batch(0, index, rank) for rank, count in counts.items() if count > index]
        losses = [loss_of(model(tokens), targets, None) for tokens, targets, _ in there]
        torch.stack(losses).mean().backward()  # type: ignore[no-untyped-call, unused-ignore]
        optimizer.step()
    found, wanted = trained.strategy.full_state(trained.model), model.state_dict()
    tolerance = 1e-10 if dtype is torch.float64 else 2e-4
    if not all(torch.allclose(found[name], wanted[name], rtol=0, atol=tolerance) for name in wanted):
        yield "after `join`, the model is not that of steps on the mean over the ranks that were there"
    if settled != ([max(counts)] if averaged > 1 else []):
        yield f"`join` settled with rank(s) {settled}, and the last to leave was {max(counts)}"


def _plain_gradients(dtype: torch.dtype, parts: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    (model,), _ = build(1, dtype)
    for index, rank in parts:
        tokens, targets, _ = batch(0, index, rank)
        loss_of(model(tokens), targets, None).backward()  # type: ignore[no-untyped-call, unused-ignore]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _near(trained: _Trained, expected: dict[str, torch.Tensor], gradients: ReadGradients) -> bool:
    found = gradients(trained.strategy, trained.model)
    return found.keys() == expected.keys() and all(
        torch.allclose(found[name], expected[name], rtol=0, atol=1e-10 if found[name].dtype is torch.float64 else 1e-5)
        for name in found
    )


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(local_of(first[name]), local_of(second[name])) and first[name].dtype == second[name].dtype
        for name in first
    )
