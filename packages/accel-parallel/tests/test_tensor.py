"""Tensor parallel on real processes: equal to one process in float64, with and without shards, tied and frozen."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from accel_parallel.tensor.apply import apply_tensor_parallel, audit_replicas
from accel_parallel.tensor.loss import loss_parallel
from accel_parallel.tensor.plan import TensorPlan, plan_tensor_parallel
from accel_state import ConfigError
from accel_state.testing import run_ranks

VOCABULARY, WIDTH, HEADS, KV_HEADS = 24, 32, 8, 4


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head_dim = WIDTH // HEADS
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, KV_HEADS * self.head_dim, bias=False) for _ in range(2))
        self.norm = nn.LayerNorm(self.head_dim)  # inside each head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (self.q, self.k, self.v))
        k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], dim=1) for each in (self.norm(k), v))
        out = F.scaled_dot_product_attention(self.norm(q), k, v, is_causal=True)
        return self.o(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Layer(nn.Module):
    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.before, self.attn, self.after = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 8 * WIDTH), nn.Linear(4 * WIDTH if fused else 8 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.before(x))
        inner = self.up(self.after(x))
        inner = F.glu(inner) if self.fused else F.gelu(inner)
        return x + self.down(inner)  # type: ignore[no-any-return]


class Scales(nn.Module):
    """Holds parameters in a list, which is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.each = nn.ParameterList([nn.Parameter(torch.rand(WIDTH) + 0.5) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = x * self.each[0] + self.each[1]
        return scaled


class Model(nn.Module):
    def __init__(self, *, tied: bool = False, fused: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH, padding_idx=13)
        self.position = nn.Parameter(torch.randn(6, WIDTH))
        self.layers = nn.ModuleList(Layer(fused=fused) for _ in range(2))
        self.scales, self.head = Scales(), nn.Linear(WIDTH, VOCABULARY, bias=not tied)
        self.register_buffer("shift", torch.randn(WIDTH))
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.position[: tokens.shape[1]] + self.shift
        for layer in self.layers:
            x = layer(x)
        return self.head(self.scales(x))  # type: ignore[no-any-return]


ATTENTION = {**{f"layers.*.attn.{name}": "colwise" for name in "qkv"}, "layers.*.attn.o": "rowwise"}
MLP = {"layers.*.up": "colwise", "layers.*.down": "rowwise"}
FUSED_MLP = {"layers.*.up": "colwise_gather_output", "layers.*.down": "rowwise_split_input"}
ENDS = {"embed": "embedding_rowwise", "head": "colwise_gather_output"}


def network(seed: int = 0, **options: bool) -> Model:
    torch.manual_seed(seed)
    return Model(**options).double()


def batch(step: int, rows: slice = slice(None)) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(step))[rows]


def loss_of(model: nn.Module, tokens: torch.Tensor, *, divided: bool = False) -> torch.Tensor:
    if divided:
        with loss_parallel():
            return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: full(each.grad) for name, each in model.named_parameters() if each.grad is not None}


def apart(model: nn.Module, wanted: dict[str, torch.Tensor]) -> float:
    """The largest difference of gradients."""
    found = gradients(model)
    assert list(found) == list(wanted)
    return max((found[name] - each).abs().max().item() for name, each in wanted.items())


def backward(loss: torch.Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call, unused-ignore]


def divided(
    model: nn.Module, plan: dict[str, str], *, shards: int = 1, loss: bool = False
) -> tuple[TensorPlan, Any, int]:
    """Divide and, where asked for, shard. Returns the plan, the mesh and this rank's place among the data."""
    tp_size = dist.get_world_size() // shards
    root = init_device_mesh("cpu", (shards, tp_size), mesh_dim_names=("shard", "tp"))
    made = plan_tensor_parallel(model, plan=plan, tp_size=tp_size, loss_parallel=loss)
    apply_tensor_parallel(model, made, root["tp"])
    if shards > 1:
        for layer in model.layers:  # type: ignore[union-attr]
            fully_shard(layer, mesh=root["shard"])
        fully_shard(model, mesh=root["shard"])
    return made, root, root["shard"].get_local_rank()


def train(model: nn.Module, rows: slice, root: Any = None, *, steps: int = 10, divided: bool = False) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, batch(step, rows), divided=divided)
        backward(loss)
        if step == 0:
            found["gradients"] = gradients(model)
        found["norms"].append(full(nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        total = loss.detach().clone()
        if root is not None and root["shard"].size() > 1:
            dist.all_reduce(total, group=root["shard"].get_group())
            total /= root["shard"].size()
        found["losses"].append(total)
        optimizer.step()
    found["parameters"] = {name: full(each) for name, each in model.named_parameters()}
    return found


def compare(plan: dict[str, str], shards: int, loss: bool, options: dict[str, bool]) -> float:
    """The largest difference from one process, each rank its own reference."""
    rank = dist.get_rank()
    expected = train(network(**options), slice(None), divided=False)
    model = network(seed=rank, **options)  # the first rank's values are everybody's along tp
    if shards > 1:
        model = network(**options)
    made, root, place = divided(model, plan, shards=shards, loss=loss)
    size = 4 // shards
    found = train(model, slice(place * size, (place + 1) * size), root, divided=loss)
    if options.get("tied"):
        assert model.head.weight is model.embed.weight
    assert list(found["gradients"]) == list(expected["gradients"]) == list(made.parameters)
    pairs = [
        *zip(found["losses"], expected["losses"], strict=True),
        *zip(found["norms"], expected["norms"], strict=True),
        *((found[kind][name], each) for kind in ("gradients", "parameters") for name, each in expected[kind].items()),
    ]
    return max(float((ours - wanted).abs().max()) for ours, wanted in pairs)


CASES: dict[str, tuple[int, dict[str, str], int, bool, dict[str, bool]]] = {
    "mlp": (2, MLP, 1, False, {}),
    "all": (2, {**ATTENTION, **MLP, **ENDS}, 1, False, {}),
    "all over four": (4, {**ATTENTION, **MLP, **ENDS}, 1, False, {}),
    "tied": (2, {**ATTENTION, **MLP, "head": "colwise_gather_output"}, 1, False, {"tied": True}),
    "gathered inside": (2, {**FUSED_MLP, "embed": "embedding_colwise"}, 1, False, {"fused": True}),
    "divided loss": (2, {**ATTENTION, **MLP, **ENDS}, 1, True, {}),
    "tied, divided loss": (2, {**MLP, **ENDS}, 1, True, {"tied": True}),
    "shards": (4, {**ATTENTION, **MLP, **ENDS}, 2, False, {}),
    "shards, tied, divided loss": (4, {**ATTENTION, **MLP, **ENDS}, 2, True, {"tied": True}),
}


def compare_cases(names: list[str]) -> dict[str, float]:
    return {name: compare(*CASES[name][1:]) for name in names}


@pytest.mark.parametrize("world_size", [2, 4])
def test_ten_steps_equal_one_process(world_size: int) -> None:
    names = [name for name, case in CASES.items() if case[0] == world_size]
    for found in run_ranks(compare_cases, world_size, names):
        assert list(found) == names
        assert not {name: apart for name, apart in found.items() if not apart < 1e-10}


def properties() -> dict[str, Any]:
    model = network(tied=True)
    model.layers[0].up.requires_grad_(False)
    model.position.tag = "kept"  # type: ignore[attr-defined]
    plain = copy.deepcopy(model)
    plan, root, _ = divided(model, {**ATTENTION, **MLP, **ENDS})
    tokens = batch(0)
    expected = loss_of(plain, tokens)
    backward(expected)
    found: dict[str, Any] = {"tag": model.position.tag, "frozen": model.layers[0].up.weight.requires_grad}  # type: ignore[attr-defined, union-attr]
    # What is saved is whole again, and a copy computes the same.
    whole = {name: full(each) for name, each in model.state_dict().items()}
    found["state"] = all(torch.equal(whole[name], each) for name, each in plain.state_dict().items())
    twin = copy.deepcopy(model)
    found["copy"] = loss_of(twin, tokens).item() - expected.item()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    found["still"] = loss_of(model, tokens).item() - expected.item()
    # Recomputing stops early, by an exception that leaves nothing behind; memory is freed with the step.
    seen: list[Any] = []
    after: Any = model.layers[1].after
    handle = after.register_forward_hook(lambda module, args, output: seen.append(weakref.ref(output)))
    x = model.embed(tokens) + model.position.to_local()[:6] + model.shift  # type: ignore[attr-defined]
    for layer in model.layers:
        x = checkpoint(layer, x, use_reentrant=False)
    backward(F.cross_entropy(model.head(model.scales(x))[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))
    handle.remove()
    del x
    found["freed"] = [each() is None for each in seen]
    found["left"] = [key for each in model.modules() for key in ("weight", "bias", "position") if key in vars(each)]
    found["padding"] = model.embed.padding_idx
    found["gradients"] = apart(model, gradients(plain))
    audit_replicas(model, plan, root["tp"])
    return found


def test_copies_recomputing_memory_and_whole_states() -> None:
    for found in run_ranks(properties, 2):
        assert found.pop("gradients") < 1e-10
        assert abs(found.pop("copy")) < 1e-12
        assert abs(found.pop("still")) < 1e-12
        assert found.pop("freed") in ([True] * 2, [True] * 3)
        assert found == {"tag": "kept", "frozen": False, "state": True, "left": [], "padding": 13}


def mixed() -> tuple[int, float]:
    """Frozen embeddings, an encoder that reads its parts' weights, and heads that a module counts itself."""
    torch.manual_seed(0)

    class Counting(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.sinks = HEADS, nn.Parameter(torch.randn(HEADS))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q = self.q(x).view(*x.shape[:-1], self.num_heads, -1) + self.sinks[:, None]
            return self.o(q.flatten(2)) + 0 * (self.k(x) + self.v(x)).sum()  # type: ignore[no-any-return]

    model = nn.Sequential(nn.TransformerEncoderLayer(WIDTH, 2, 8, dropout=0.0, batch_first=True), Counting()).double()
    x = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    plain = copy.deepcopy(model)
    backward(plain(x).square().sum())
    plan = {"1.q": "colwise", "1.k": "colwise_gather_output", "1.v": "colwise_gather_output", "1.o": "rowwise"}
    divided(model, {**plan, "1.num_heads": "divide", "1.sinks": "divide"})
    assert model[1].num_heads == HEADS // 2
    backward(model(x).square().sum())
    return len(gradients(plain)), apart(model, gradients(plain))


def test_numbers_parameters_and_modules_that_read_the_weights_of_others() -> None:
    for count, difference in run_ranks(mixed, 2):
        assert count > 15
        assert difference < 1e-10


def changed_in_place() -> float:
    """An activation that two divided modules take, the second after it was changed."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.first, self.second = (nn.Linear(8, 8) for _ in range(3))
            self.down = nn.Linear(8, 8)
            self.first.requires_grad_(False)  # so that nothing needs the activation as it was

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.enter(x)
            first = self.first(x)
            x.mul_(2)
            return self.down(first + self.second(x))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = Scaled().double(), torch.randn(3, 8, dtype=torch.float64)
    plain = copy.deepcopy(model)
    backward(plain(x).square().sum())
    divided(model, {"first": "colwise", "second": "colwise", "down": "rowwise"})
    backward(model(x).square().sum())
    return apart(model, gradients(plain))


def test_an_activation_changed_between_two_modules_enters_twice() -> None:
    assert max(run_ranks(changed_in_place, 2)) < 1e-10


def errors() -> list[str]:
    rank, said = dist.get_rank(), []
    model = network()
    plan, root, _ = divided(model, {**ATTENTION, **MLP})
    with pytest.raises(ConfigError, match="a DTensor already") as caught:
        apply_tensor_parallel(model, plan, root["tp"])
    said.append(str(caught.value))
    other = network()
    other.add_module("extra", nn.Linear(1, 1))
    with pytest.raises(ConfigError, match=r"`extra.weight` is of shape \(1, 1\), and the plan knows it not at all"):
        apply_tensor_parallel(other, plan, root["tp"])
    with pytest.raises(ConfigError, match=r"divides over 2 ranks, and the mesh has shape \(1, 2\)"):
        apply_tensor_parallel(network(), plan, root)
    embedding = nn.ModuleDict({"embed": nn.Embedding(8, 4)})
    divided(embedding, {"embed": "embedding_rowwise"})
    with pytest.raises(IndexError, match="out of range"):
        embedding["embed"](torch.tensor([8]))
    dropping = nn.ModuleDict({"up": nn.Linear(4, 4), "drop": nn.Dropout(0.1), "down": nn.Linear(4, 4)})
    torch.manual_seed(rank)
    with pytest.raises(ConfigError, match=r"`drop` drops activations, .* have different random states"):
        divided(dropping, MLP_OF_TWO)
    torch.manual_seed(7)
    divided(dropping, MLP_OF_TWO)
    backward(loss_of(model, batch(rank)))  # other data on each rank
    with pytest.raises(ConfigError, match=r"The gradient of `.*` differs between tensor-parallel ranks by .*%"):
        audit_replicas(model, plan, root["tp"])
    return said


MLP_OF_TWO = {"up": "colwise", "down": "rowwise"}


def test_refused_on_ranks() -> None:
    first, second = run_ranks(errors, 2)
    assert first == second


def compiled(fullgraph: bool) -> float:
    model = network()
    divided(model, {**ATTENTION, **MLP, **ENDS})
    expected = loss_of(model, batch(0))
    backward(expected)
    wanted = gradients(model)
    model.zero_grad()
    for part in (model.layers[0], model.embed):
        part.compile(backend="aot_eager", fullgraph=fullgraph)
    backward(loss_of(model, batch(0)))
    return apart(model, wanted)


BREAKS = pytest.mark.skipif(
    torch.__version__ < "2.13",  # compared as versions
    reason="torch before 2.13 cannot trace how a module gets its parameters back, and breaks the graph there",
)


@pytest.mark.parametrize("fullgraph", [False, pytest.param(True, marks=BREAKS)])
def test_layers_compile(fullgraph: bool) -> None:
    assert max(run_ranks(compiled, 2, fullgraph, timeout_s=110)) < 1e-10


@pytest.fixture
def fake_world() -> Any:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=5, world_size=32, store=FakeStore())
    yield init_device_mesh("cpu", (4, 8), mesh_dim_names=("shard", "tp"))
    dist.destroy_process_group()


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_parts_on_thirty_two_ranks(fake_world: Any, device: str) -> None:
    with torch.device(device):
        model = nn.Module()
        model.embed, model.head = nn.Embedding(96, 64), nn.Linear(64, 96, bias=False)
        model.attn = nn.ModuleDict({"q": nn.Linear(64, 64), "o": nn.Linear(64, 64)})
        model.head.weight = model.embed.weight
    plan = plan_tensor_parallel(model, plan={"attn.q": "colwise", "attn.o": "rowwise", **ENDS}, tp_size=8)
    apply_tensor_parallel(model, plan, fake_world["tp"])
    locals_ = {name: tuple(each.to_local().shape) for name, each in model.named_parameters()}  # type: ignore[attr-defined]
    assert locals_ == {name: each.local_shape for name, each in plan.parameters.items()}
    assert locals_["embed.weight"] == (12, 64)
    assert locals_["attn.o.weight"] == (64, 8)
    fully_shard(model, mesh=fake_world["shard"])
    shards = {name: tuple(each.to_local().shape) for name, each in model.named_parameters()}  # type: ignore[attr-defined]
    assert shards == {
        "embed.weight": (3, 64),
        "attn.q.weight": (2, 64),
        "attn.q.bias": (2,),
        "attn.o.weight": (16, 8),
        "attn.o.bias": (16,),
    }
    assert model.head.weight is model.embed.weight
    assert all(each.device_mesh.mesh_dim_names == ("shard", "tp") for each in model.parameters())  # type: ignore[attr-defined]
