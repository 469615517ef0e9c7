"""Blocks that are computed again in backward: the same gradients, fewer tensors kept, nothing else changed."""

from __future__ import annotations

import copy
import inspect
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from accel_parallel.recompute import checkpoint_activations, is_checkpointed, without_cache
from accel_state.blocks import find_blocks
from accel_state.errors import ConfigError
from accel_state.testing import run_ranks

Outcome = tuple[torch.Tensor, list[torch.Tensor]]
"""The loss and all gradients."""


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 4 * width)
        self.outer = nn.Linear(4 * width, width)
        self.calls = 0
        self.kept: list[Any] = []

    def forward(self, hidden: torch.Tensor, *, scale: float = 1.0, cache: Any = None) -> torch.Tensor:
        self.calls += 1
        if cache is not None:
            cache.append(hidden)
        wide = self.inner(hidden)  # the backward of what comes next needs it
        self.kept.append(StorageWeakRef(wide.untyped_storage()))  # type: ignore[no-untyped-call]
        dropped = torch.nn.functional.dropout(torch.nn.functional.gelu(wide), 0.5, self.training)
        result: torch.Tensor = hidden + scale * self.outer(dropped)
        return result


class Cache(list[torch.Tensor]):
    def get_seq_length(self) -> int:
        return len(self)


class Model(nn.Module):
    def __init__(self, depth: int = 3, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(width) for _ in range(depth)])
        self.head = nn.Linear(width, 1)

    def forward(self, hidden: torch.Tensor, cache: Any = None) -> torch.Tensor:
        for block in self.blocks:
            hidden = block(hidden, scale=0.5, cache=cache)
        result: torch.Tensor = self.head(hidden).square().mean()
        return result


def blocks_of(model: Model) -> list[Block]:
    return [block for block in model.blocks if isinstance(block, Block)]


def build(dtype: torch.dtype = torch.float64) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype)


def inputs(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def step(model: nn.Module, given: torch.Tensor, **kwargs: Any) -> Outcome:
    torch.manual_seed(2)  # dropout
    model.zero_grad()
    loss = model(given, **kwargs)
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def assert_same(found: Outcome, wanted: Outcome) -> None:
    assert torch.equal(found[0], wanted[0])
    assert len(found[1]) == len(wanted[1]) > 0
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[1], wanted[1], strict=True))


@pytest.mark.parametrize("save", ["nothing", "matmuls"])
@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_are_the_same_bit_for_bit_with_dropout(save: Any, autocast: bool) -> None:
    dtype = torch.float32 if autocast else torch.float64
    plain, model = build(dtype), build(dtype)
    checkpoint_activations(model, save=save)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        wanted = step(plain, inputs(dtype))
        found = step(model, inputs(dtype))
    assert_same(found, wanted)
    assert [block.calls for block in blocks_of(model)] == [2, 2, 2]


def test_backward_may_run_outside_of_autocast() -> None:
    plain, model = build(torch.float32), build(torch.float32)
    checkpoint_activations(model)
    for each in (plain, model):
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16):
            loss = each(inputs(torch.float32))
        loss.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


def test_what_a_block_computes_is_not_kept_until_backward() -> None:
    plain, model = build(), build()
    checkpoint_activations(model)
    for each, kept in ((plain, True), (model, False)):
        loss = each(inputs())
        assert [not reference.expired() for block in blocks_of(each) for reference in block.kept] == [kept] * 3
        del loss


class CountProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += func is torch.ops.aten.addmm.default
        return func(*args, **(kwargs or {}))


def products(model: nn.Module) -> int:
    with CountProducts() as count:  # type: ignore[no-untyped-call]
        model(inputs()).backward()
    return int(count.found)


def test_matrix_products_may_be_kept() -> None:
    nothing, matmuls = build(), build()
    checkpoint_activations(nothing)
    checkpoint_activations(matmuls, save="matmuls")
    # Six in the blocks and one in the head; nobody needs the last one of a block again.
    assert products(nothing) == 7 + 3
    assert products(matmuls) == 7


@pytest.mark.parametrize("situation", ["evaluation", "no gradients"])
def test_nothing_is_recomputed_where_there_is_no_training(situation: str) -> None:
    model = build()
    checkpoint_activations(model)
    if situation == "evaluation":
        step(model.eval(), inputs())
    else:
        with torch.no_grad():
            model(inputs())
    assert [block.calls for block in blocks_of(model)] == [1, 1, 1]


def test_names_classes_signature_and_hooks_stay() -> None:
    plain, model = build(), build()
    seen: list[str] = []
    model.blocks[0].register_forward_pre_hook(lambda *_: seen.append("before"))
    checkpoint_activations(model)
    step(model, inputs())
    assert seen == ["before"]  # not again when it is recomputed
    assert list(model.state_dict()) == list(plain.state_dict())
    assert type(model.blocks[0]) is Block
    assert inspect.signature(model.blocks[0].forward) == inspect.signature(plain.blocks[0].forward)
    assert [is_checkpointed(module) for module in (model, model.blocks[0], model.blocks[0].inner)] == [
        False, True, False,
    ]  # fmt: skip


def test_a_copy_recomputes_itself_and_what_was_pickled_is_plain() -> None:
    model = build()
    checkpoint_activations(model)
    wanted = step(model, inputs())
    calls = [block.calls for block in blocks_of(model)]
    for block in blocks_of(model):
        block.kept.clear()  # weak references cannot be copied
    copied = copy.deepcopy(model)
    assert_same(step(copied, inputs()), wanted)
    assert [block.calls for block in blocks_of(model)] == calls
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert_same(step(loaded, inputs()), wanted)
    assert not any(is_checkpointed(module) for module in loaded.modules())


def test_undoing() -> None:
    model = build()
    undo = checkpoint_activations(model, find_blocks(model)[1:])
    step(model, inputs())
    assert [block.calls for block in blocks_of(model)] == [1, 2, 2]
    undo()
    undo()
    step(model, inputs())
    assert [block.calls for block in blocks_of(model)] == [2, 3, 3]
    assert "forward" not in vars(model.blocks[1])
    checkpoint_activations(model)


def test_a_forward_that_an_instance_has_already_is_kept() -> None:
    model = build()
    original = model.blocks[0].forward
    model.blocks[0].forward = lambda hidden, **kwargs: original(hidden, **kwargs) + 1
    wanted = step(model, inputs())
    undo = checkpoint_activations(model)
    assert_same(step(model, inputs()), wanted)
    undo()
    assert_same(step(model, inputs()), wanted)


@pytest.mark.parametrize("by", ["accel", "the model", "torch"])
def test_checkpointing_twice_is_refused(by: str) -> None:
    model: Any = build()
    if by == "accel":
        checkpoint_activations(model)
        said = "already does in `blocks.0`.*Ask for it once"
    elif by == "the model":
        model.blocks[1].gradient_checkpointing = True
        said = "does so itself.*in `blocks.1`.*gradient_checkpointing_disable"
    else:
        model.blocks[2] = checkpoint_wrapper(model.blocks[2])
        said = "`checkpoint_wrapper` does so in `blocks.2`.*Leave the wrapper out"
    with pytest.raises(ConfigError, match="checkpointed twice: .*" + said):
        checkpoint_activations(model)


def test_a_model_that_could_checkpoint_but_does_not_is_fine() -> None:
    model: Any = build()
    model.gradient_checkpointing = False
    checkpoint_activations(model)


def test_what_has_no_effect_is_refused() -> None:
    with pytest.raises(ConfigError, match="`Linear` was given for activation checkpointing, and no repeated blocks"):
        checkpoint_activations(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="`save='all'` names nothing"):
        checkpoint_activations(build(), save="all")  # type: ignore[arg-type]


def test_an_empty_cache_is_kept_from_the_blocks_and_a_full_one_refused() -> None:
    plain, model = build(), build()
    checkpoint_activations(model)
    wanted = step(plain, inputs())
    cache = Cache()
    with pytest.warns(UserWarning, match="were given an empty `cache`, which stays empty"):
        found = step(model, inputs(), cache=cache)
    assert_same(found, wanted)
    assert not cache
    with pytest.raises(ConfigError, match="was given `cache` with keys and values in it"):
        step(model, inputs(), cache=Cache([inputs()]))
    with torch.no_grad():
        model(inputs(), cache=cache)
    assert len(cache) == 3
    assert without_cache({"use_cache": True, "scale": 2}) == {"use_cache": False, "scale": 2}


def sharded_gradients(order: str) -> list[list[float]]:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    model = build().eval().train()  # dropout draws alike on both ranks, as they have the same seed
    if order == "before":
        checkpoint_activations(model)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    if order == "after":
        checkpoint_activations(model)
    for _ in range(2):
        _, gradients = step(model, inputs())
    assert all(block.calls == 2 * (1 if order == "never" else 2) for block in model.blocks)
    full: list[Any] = [gradient.full_tensor() for gradient in gradients]  # type: ignore[attr-defined]
    return [gradient.flatten().tolist() for gradient in full]


@pytest.mark.parametrize("order", ["before", "after"])
def test_sharded_blocks_are_recomputed_exactly(order: str) -> None:
    plain = build()
    _, wanted = step(plain, inputs())
    for found in run_ranks(sharded_gradients, 2, order):
        for ours, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), theirs.flatten(), rtol=0, atol=1e-14)
