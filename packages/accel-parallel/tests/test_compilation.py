"""Compiling in place: how often, what stays, in which order with the other things that are done to a model."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from accel_parallel.compilation import (
    TorchDynamoPlugin,
    compile_model,
    compile_regions,
    has_compiled_regions,
    is_compiled,
    uncompile,
)
from accel_parallel.recompute import checkpoint_activations
from accel_state.blocks import find_blocks
from accel_state.errors import ConfigError
from accel_state.testing import run_ranks

DEPTH = 24
"""Where it matters that there are many; elsewhere few are built, since tracing them takes its time."""


class Counting:
    """A backend that runs graphs as they are and says how many there were."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward


class Cache(list[torch.Tensor]):
    def get_seq_length(self) -> int:
        return len(self)


class Block(nn.Module):
    def __init__(self, width: int, number: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.inner = nn.Linear(width, 2 * width)
        self.outer = nn.Linear(2 * width, width)
        self.number = number

    def forward(self, hidden: torch.Tensor, cache: Any = None) -> torch.Tensor:
        if cache is not None:
            cache.append(hidden)
        queries, keys, values = self.attention(self.norm(hidden)).chunk(3, dim=-1)
        hidden = hidden + (queries @ keys.transpose(-1, -2)).softmax(-1) @ values
        result: torch.Tensor = hidden + self.outer(torch.nn.functional.gelu(self.inner(hidden)))
        return result


class Numbered(Block):
    def forward(self, hidden: torch.Tensor, cache: Any = None) -> torch.Tensor:
        return super().forward(hidden, cache) / (self.number + 1)


class Model(nn.Module):
    def __init__(self, kind: type[Block] = Block, depth: int = 3, width: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.blocks = nn.ModuleList([kind(width, number) for number in range(depth)])
        self.head = nn.Linear(width, 11)

    def forward(self, tokens: torch.Tensor, cache: Any = None) -> torch.Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            hidden = block(hidden, cache=cache)
        logits = self.head(hidden)
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def build(kind: type[Block] = Block, depth: int = 3, width: int = 4) -> Model:
    torch.manual_seed(0)
    return Model(kind, depth, width).double()


def tokens(length: int = 5, rank: int = 0) -> torch.Tensor:
    return torch.randint(11, (2, length), generator=torch.Generator().manual_seed(1 + rank))


def step(model: nn.Module, given: torch.Tensor, **kwargs: Any) -> list[torch.Tensor]:
    """The loss and all gradients."""
    model.zero_grad()
    loss = model(given, **kwargs)
    loss.backward()
    return [loss.detach(), *(each.grad.clone() for each in model.parameters() if each.grad is not None)]


def assert_close(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(found) == len(wanted) > 1
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Each test compiles anew, inductor without processes of its own, and none leaves the compiler's memory behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_all_blocks_of_a_class_are_compiled_once() -> None:
    plain, model, backend = build(depth=DEPTH), build(depth=DEPTH), Counting()
    compile_regions(model, backend=backend, fullgraph=True)
    for _ in range(2):
        assert_close(step(model, tokens()), step(plain, tokens()))
    assert len(backend.graphs) == 1


def test_a_model_as_a_whole_is_one_graph_with_every_block_in_it() -> None:
    plain, model, whole, part = build(), build(), Counting(), Counting()
    compile_model(model, TorchDynamoPlugin(backend=whole, fullgraph=True))
    assert_close(step(model, tokens()), step(plain, tokens()))
    compile_regions(plain, backend=part)
    step(plain, tokens())
    assert len(whole.graphs) == len(part.graphs) == 1
    assert len(whole.graphs[0].graph.nodes) > 2 * len(part.graphs[0].graph.nodes)


def test_the_plugin_chooses_between_whole_and_regions() -> None:
    model, backend = build(), Counting()
    compile_model(model, TorchDynamoPlugin(backend=backend, use_regional_compilation=True))
    assert has_compiled_regions(model)
    assert is_compiled(model)
    assert not is_compiled(model.head)
    uncompile(model)
    assert not is_compiled(model)
    compile_model(model, TorchDynamoPlugin(backend=backend))
    assert is_compiled(model)
    assert not has_compiled_regions(model)
    uncompile(model)
    compile_model(model, TorchDynamoPlugin(backend=backend, disable=True))
    assert not is_compiled(model)
    step(model, tokens())
    assert not backend.graphs


def test_classes_are_compiled_each_and_do_not_use_up_each_others_turns() -> None:
    """A decorator's code is one for all functions that it decorates, and dynamo compiles one code 8 times at most."""

    def decorated(function: Any) -> Any:
        def forward(self: nn.Module, hidden: torch.Tensor, cache: Any = None) -> Any:
            return function(self, hidden)

        return forward

    classes = [type(f"Block{index}", (Block,), {"forward": decorated(Block.forward)}) for index in range(10)]
    assert len({each.forward.__code__ for each in classes}) == 1  # type: ignore[attr-defined]
    model, backend = build(), Counting()
    model.blocks = nn.ModuleList([each(4, 0).double() for each in classes for _ in range(2)])
    compile_regions(model, backend=backend, fullgraph=True)
    step(model, tokens())
    assert len(backend.graphs) == len(classes)


@pytest.mark.skipif(not hasattr(torch._dynamo, "patch_dynamo_config"), reason="torch before 2.8 cannot")
def test_numbers_of_layers_cost_no_compilation_each() -> None:
    plain, model, backend = build(Numbered, DEPTH), build(Numbered, DEPTH), Counting()
    compile_regions(model, backend=backend, fullgraph=True)
    for _ in range(2):
        assert_close(step(model, tokens()), step(plain, tokens()))
    assert len(backend.graphs) == 2  # the first one, and one for all other numbers


def test_other_lengths_and_modes_cost_one_compilation_each() -> None:
    plain, model, backend = build(), build(), Counting()
    compile_regions(model, backend=backend)
    step(model, tokens(5))
    assert len(backend.graphs) == 1
    for length in (6, 7, 8):
        assert_close(step(model, tokens(length)), step(plain, tokens(length)))
    assert len(backend.graphs) == 2  # `dynamic=None`: now for all lengths
    with torch.no_grad():
        model(tokens(9))
    assert len(backend.graphs) == 3
    static = build()
    other = Counting()
    compile_regions(static, backend=other, dynamic=False)
    for length in (5, 6, 7):
        step(static, tokens(length))
    assert len(other.graphs) == 3


def test_names_identity_state_signature_and_hooks_stay() -> None:
    for regional in (False, True):
        plain, model = build(), build()
        block, seen = model.blocks[0], list[str]()
        block.register_forward_pre_hook(lambda *_, seen=seen: seen.append("before"))
        compile_model(model, TorchDynamoPlugin(backend="eager", use_regional_compilation=regional))
        step(model, tokens())
        assert seen == ["before"]
        assert list(model.state_dict()) == list(plain.state_dict())
        assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
        assert model.blocks[0] is block
        assert type(block) is Block
        assert inspect.signature(model.forward) == inspect.signature(plain.forward)
        assert inspect.signature(block.forward) == inspect.signature(plain.blocks[0].forward)
        assert find_blocks(model)[0] == ("blocks.0", block)
        model.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("regional", [False, True])
def test_a_copy_runs_the_copy_and_what_was_pickled_is_plain(regional: bool) -> None:
    model, backend = build(), Counting()
    compile_model(model, TorchDynamoPlugin(backend=backend, use_regional_compilation=regional))
    step(model, tokens())
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    plain = build()
    plain.load_state_dict(copied.state_dict())
    wanted = step(plain, tokens())
    assert_close(step(copied, tokens()), wanted)
    assert len(backend.graphs) == 1  # the copy shares what was compiled
    buffer = io.BytesIO()
    torch.save(copied, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert_close(step(loaded, tokens()), wanted)
    assert not is_compiled(loaded)


@pytest.mark.parametrize("by", ["whole", "regions", "torch.compile", "module.compile", "forward", "part"])
def test_compiling_twice_is_refused(by: str) -> None:
    model: Any = build()
    if by in ("whole", "regions"):
        compile_model(model, TorchDynamoPlugin(backend="eager", use_regional_compilation=by == "regions"))
        said = "by accel"
    elif by == "torch.compile":
        model, said = torch.compile(model, backend="eager"), "by `torch.compile.module.`"
    elif by == "module.compile":
        model.compile(backend="eager")
        said = "by `module.compile..`"
    elif by == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
        said = "by `torch.compile.module.forward.`"
    else:
        model.blocks[1].compile(backend="eager")
        said = "its part `blocks.1` is compiled already, by `module.compile..`"
    assert is_compiled(model)
    for plugin in (TorchDynamoPlugin(), TorchDynamoPlugin(use_regional_compilation=True)):
        with pytest.raises(ConfigError, match=f"was to be compiled, and .*{said}.*Compile it once"):
            compile_model(model, plugin)


def test_what_is_put_over_a_compiled_forward_is_not_taken_for_it() -> None:
    plain, model, inner, outer = build(), build(), Counting(), Counting()
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend=inner)
    checkpoint_activations(model)
    # Dynamo compiles what a compiled function was made from, and would leave the recomputing out.
    assert not any(hasattr(block.forward, "_torchdynamo_orig_callable") for block in model.blocks)
    assert is_compiled(model)
    with pytest.raises(ConfigError, match=r"its part `blocks\.0` is compiled already, by"):
        compile_model(model, TorchDynamoPlugin(backend=outer))
    assert_close(step(model, tokens()), step(plain, tokens()))


def test_undoing_in_the_wrong_order_is_refused() -> None:
    model, plain = build(), build()
    undo = checkpoint_activations(model)
    compile_regions(model, backend="eager")
    with pytest.raises(ConfigError, match="Undoing activation checkpointing would give a `Block` back"):
        undo()
    uncompile(model)
    undo()
    assert_close(step(model, tokens()), step(plain, tokens()))
    assert "forward" not in vars(model.blocks[0])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mode": "default", "options": {"a": 1}}, "`mode='default'` and `options={'a': 1}` were both given"),
        ({"backend": "eager", "mode": "max-autotune"}, "has no effect with `backend='eager'`"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TorchDynamoPlugin(**given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"backend": "inducter"}, "refuses backend='inducter'.*inducter.*Change"),
        ({"mode": "fast"}, "mode='fast'.*Change"),
        ({"options": {"no_such_option": 1}}, "no_such_option.*Change"),
    ],
)
@pytest.mark.parametrize("regional", [False, True])
def test_settings_that_torch_refuses_are_refused(given: dict[str, Any], said: str, regional: bool) -> None:
    model = build()
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        compile_model(model, TorchDynamoPlugin(**given, use_regional_compilation=regional))
    assert not is_compiled(model)


def test_a_sharded_model_as_a_whole_is_refused_and_goes_by_regions_by_default() -> None:
    model = build()
    with pytest.raises(ConfigError, match="`use_regional_compilation=False` was given for `Model`, which is sharded"):
        compile_model(model, TorchDynamoPlugin(use_regional_compilation=False), sharded=True)
    compile_model(model, TorchDynamoPlugin(backend="eager"), sharded=True)
    assert has_compiled_regions(model)


def test_no_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="`Linear` was to be compiled by its repeated blocks, and none were found"):
        compile_model(nn.Linear(2, 2), TorchDynamoPlugin(use_regional_compilation=True))


def test_defaults_are_those_of_torch_and_none_stays_none() -> None:
    parameters = inspect.signature(torch.compile).parameters
    given = TorchDynamoPlugin().arguments()
    assert given.pop("backend") == "inductor"
    assert given == {name: parameters[name].default for name in given}
    assert TorchDynamoPlugin(dynamic=False).arguments()["dynamic"] is False


def test_blocks_with_a_cache_run_as_they_were_written() -> None:
    model, backend = build(), Counting()
    compile_regions(model, backend=backend)
    cache = Cache()
    with torch.no_grad():
        model(tokens(), cache=cache)
    assert len(cache) == 3
    assert not backend.graphs
    with pytest.warns(UserWarning, match="class `Block` were given a cache of keys and values in training.*uncompiled"):
        step(model, tokens(), cache=Cache())


def test_blocks_that_recompute_get_no_cache_and_are_compiled() -> None:
    plain, model, backend = build(), build(), Counting()
    checkpoint_activations(model)
    compile_regions(model, backend=backend)
    with pytest.warns(UserWarning, match="stays empty"):
        found = step(model, tokens(), cache=Cache())
    assert_close(found, step(plain, tokens()))
    assert len(backend.graphs) == 1


@pytest.mark.parametrize("regional", [False, True])
@pytest.mark.parametrize("save", ["nothing", "matmuls"])
@pytest.mark.parametrize("order", ["recompute first", "compile first"])
def test_recomputing_with_compiling(regional: bool, save: Any, order: str) -> None:
    plain, model = build(), build()
    if order == "recompute first":
        checkpoint_activations(model, save=save)
    compile_model(model, TorchDynamoPlugin(backend="aot_eager", use_regional_compilation=regional))
    if order == "compile first":
        checkpoint_activations(model, save=save)
    for _ in range(2):
        assert_close(step(model, tokens()), step(plain, tokens()))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(3)))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.blocks(hidden).square().sum()
        return result


def test_inductor_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    written = "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"  # by inductor, into the environment of its process
    monkeypatch.setenv(written, "")
    monkeypatch.delenv(written)
    torch.manual_seed(0)
    plain, hidden = Small().double(), torch.randn(2, 4, dtype=torch.float64)
    model = copy.deepcopy(plain)
    compile_model(model, TorchDynamoPlugin(use_regional_compilation=True, fullgraph=True))
    with config.patch(compile_threads=1):  # no processes that compile
        assert_close(step(model, hidden), step(plain, hidden))


@dataclass(frozen=True)
class Case:
    wrapper: str
    regional: bool | None
    recompute: bool = False
    late: bool = False
    """Whether compiling comes after wrapping."""
    graphs: int = 1


CASES = [
    # Hooks at each sharded unit are not compiled, so only blocks are, though nobody asked for that.
    Case("fsdp", regional=True, recompute=True),
    Case("fsdp", regional=None, late=True),
    Case("ddp", regional=True, recompute=True),
    # Dynamo cuts the graph of a whole model at DDP's buckets, so that these are exchanged during backward.
    Case("ddp", regional=None, graphs=2),
    Case("ddp", regional=False, late=True, graphs=2),
]


def run_cases_on_two_ranks() -> list[int]:
    """How many graphs each case compiled. Its gradients are compared with one process."""
    torch.set_num_threads(1)
    plain = build(width=112)
    both = [step(plain, tokens(rank=rank))[1:] for rank in range(2)]
    wanted = [(first + second) / 2 for first, second in zip(*both, strict=True)]
    return [run_case(case, wanted) for case in CASES]


def run_case(case: Case, wanted: list[torch.Tensor]) -> int:
    from torch._dynamo.backends.debugging import aot_eager
    from torch.distributed.fsdp import fully_shard

    torch._dynamo.reset()
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    inner = build(width=112)
    wrapped: nn.Module = inner
    plugin = TorchDynamoPlugin(backend=backend, use_regional_compilation=case.regional)
    names = [name for name, _ in inner.named_parameters()]
    if case.recompute:
        checkpoint_activations(inner)
    sharded = case.wrapper == "fsdp"
    if not case.late:
        compile_model(inner, plugin, sharded=sharded)
    if sharded:
        for block in inner.blocks:
            fully_shard(block)
        fully_shard(inner)
    else:
        wrapped = DistributedDataParallel(inner, bucket_cap_mb=1)
    if case.late:
        compile_model(inner, plugin, sharded=sharded)
    for _ in range(2):
        _, *gradients = step(wrapped, tokens(rank=torch.distributed.get_rank()))
        assert_close([getattr(each, "full_tensor", lambda each=each: each)() for each in gradients], wanted)
    assert [name for name, _ in inner.named_parameters()] == names
    return len(graphs)


def test_spread_over_ranks_it_is_exact() -> None:
    wanted = [case.graphs for case in CASES]
    assert run_ranks(run_cases_on_two_ranks, 2, timeout_s=110) == [wanted, wanted]
