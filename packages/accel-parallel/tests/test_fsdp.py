"""Sharding itself: units, precision, where values come from and how much memory that takes, what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker

from accel_parallel import Bundle, FullyShardedDataParallelPlugin
from accel_parallel.fsdp.strategy import FSDPStrategy
from accel_parallel.fsdp.units import (
    check_ignored,
    check_separate,
    check_shardable,
    ignored_parameters,
    plan_units,
)
from accel_parallel.sharded import Box, box_of, is_sharded, local_of, total_norm, whole
from accel_state.errors import CheckpointError, ConfigError
from accel_state.process import Process
from accel_state.testing import run_ranks

Plugin = FullyShardedDataParallelPlugin


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = hidden + self.down(torch.relu(self.up(hidden)))
        return out


class Net(nn.Module):
    """An embedding tied to the head, blocks, a buffer; optionally a tie between two blocks."""

    def __init__(self, width: int = 8, depth: int = 3, *, tied_blocks: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Linear(width, 12, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.linspace(0.5, 1.5, width))
        if tied_blocks:
            cast(Block, self.blocks[2]).up.weight = cast(Block, self.blocks[0]).up.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens) * self.scale
        for block in self.blocks:
            hidden = block(hidden)
        out: torch.Tensor = self.head(hidden)
        return out


def _net(seed: int = 0, **options: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**options)


def _loss(model: nn.Module, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(12, (6,), generator=generator)
    logits = model(tokens).float() if next(model.parameters()).dtype is not torch.float64 else model(tokens)
    return nn.functional.cross_entropy(logits, tokens.roll(1))


# Units


def _unit_names(model: nn.Module, **settings: Any) -> list[str]:
    return [name for name, _ in plan_units(model, Plugin(**settings))]


def test_units_are_the_repeated_blocks_inner_ones_first() -> None:
    assert _unit_names(_net()) == ["blocks.2", "blocks.1", "blocks.0"]
    assert _unit_names(_net(), auto_wrap_policy="no_wrap") == []
    assert _unit_names(_net(), transformer_cls_names_to_wrap=["Block"]) == ["blocks.2", "blocks.1", "blocks.0"]
    assert _unit_names(_net(), auto_wrap_policy=lambda module: isinstance(module, nn.Linear))[:2] == [
        "blocks.2.down",
        "blocks.2.up",
    ]
    assert "blocks.1.up" in _unit_names(_net(), min_num_params=100)


def test_a_tie_between_units_puts_both_into_the_unit_around_them() -> None:
    assert _unit_names(_net(tied_blocks=True)) == ["blocks.1"]
    assert "head" not in _unit_names(_net(), auto_wrap_policy=lambda module: not list(module.children()))


def test_an_unknown_class_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="Block"):
        _unit_names(_net(), transformer_cls_names_to_wrap=["Blok"])
    with pytest.raises(ConfigError, match=r"found no repeated layers in Linear"):
        _unit_names(nn.Linear(2, 2), auto_wrap_policy="transformer_based_wrap")


def test_ignored_parameters_are_found_and_have_to_be_frozen() -> None:
    model = _net()
    cast(Block, model.blocks[1]).requires_grad_(False)
    found = ignored_parameters(model, Plugin(ignored_modules=r"blocks\.1"))
    assert {id(p) for p in found} == {id(p) for p in model.blocks[1].parameters()}
    assert ignored_parameters(model, Plugin(ignored_modules=[model.blocks[1]])) == found
    with pytest.raises(ConfigError, match=r"`blocks\.0\.up\.weight` is ignored by sharding and yet trained"):
        ignored_parameters(model, Plugin(ignored_params=[cast(Block, model.blocks[0]).up.weight]))
    for_another = Plugin(ignored_modules=iter([_net().blocks[1]]))
    with pytest.raises(ConfigError, match=r"names no module with parameters of Net.*'embed'"):
        check_ignored([model], Plugin(ignored_modules="block"))
    with pytest.raises(ConfigError, match=r"hold no parameter of Net, Linear.*not of a copy"):
        check_ignored([model, nn.Linear(2, 2)], for_another)
    check_ignored([nn.Linear(2, 2), model], Plugin(ignored_modules=r"blocks\.1"))  # in one of them
    check_ignored([], for_another)


def test_a_model_on_several_devices_is_refused() -> None:
    class Parameter:  # a stand-in, since a machine may have one device only
        def __init__(self, device: str) -> None:
            self.device, self.requires_grad, self.dtype = torch.device(device), False, torch.float32

            self.shape = torch.Size([2])

    spread = SimpleNamespace(
        named_parameters=lambda: [("a", Parameter("cuda:0")), ("b", Parameter("cuda:1"))], named_modules=list
    )
    with pytest.raises(ConfigError, match=r"`a` on cuda:0, `b` on cuda:1.*without a device map"):
        check_shardable(cast(nn.Module, spread), [], set())


def test_a_unit_that_trains_two_dtypes_is_refused() -> None:
    model = _net()
    cast(Block, model.blocks[1]).down.to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"`blocks.1` trains `blocks.1.up.weight` in torch.float32 and .*bfloat16"):
        check_shardable(model, plan_units(model, Plugin()), set())


def test_tensors_that_cannot_be_cut_are_refused() -> None:
    number = nn.Linear(2, 2)
    number.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(ConfigError, match=r"`scale` is a single number.*shape \(1,\)"):
        check_shardable(number, [], set())
    check_shardable(number, [], {number.scale})
    with pytest.raises(ConfigError, match=r"`0` has sparse gradients"):
        check_shardable(nn.Sequential(nn.Embedding(2, 2, sparse=True)), [], set())
    with pytest.raises(ConfigError, match=r"chose `blocks`, a ModuleList, which has no forward"):
        plan_units(_net(), Plugin(auto_wrap_policy=lambda module: isinstance(module, nn.ModuleList)))


def test_models_that_share_a_parameter_are_refused() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ConfigError, match=r"`1.weight` of the Sequential is `weight` of the Linear"):
        check_separate([frozen, nn.Sequential(nn.ReLU(), frozen)])
    check_separate([nn.Sequential(frozen, frozen), nn.Linear(2, 2)])  # twice in one model is one place


# Parts and norms


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (Box((0,), (4,)), Box((2,), (4,)), Box((2,), (2,))),
        (Box((0, 1), (2, 2)), Box((1, 0), (3, 2)), Box((1, 1), (1, 1))),
        (Box((0,), (2,)), Box((2,), (2,)), None),
        (Box((), ()), Box((), ()), Box((), ())),
    ],
)
def test_boxes_meet(one: Box, other: Box, expected: Box | None) -> None:
    assert one.meet(other) == other.meet(one) == expected


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
def test_the_norm_of_plain_tensors_is_that_of_torch(norm_type: float) -> None:
    gradients = [torch.randn(3, 4), torch.randn(5), torch.zeros(0)]
    expected = torch.linalg.vector_norm(torch.cat([each.flatten() for each in gradients]), norm_type)
    torch.testing.assert_close(total_norm(gradients, norm_type), expected)
    assert total_norm([], norm_type) == 0


def test_a_norm_of_narrow_gradients_is_wide() -> None:
    assert total_norm([torch.ones(3, dtype=torch.bfloat16)], 2.0).dtype is torch.float32


def _norms(norm_types: list[float]) -> list[float]:
    strategy = FSDPStrategy(Process.current())
    model = _net().double()
    strategy.prepare(Bundle((model,)))
    strategy.backward(_loss(model, 0))
    return [strategy.grad_norm(model.parameters(), norm_type).item() for norm_type in norm_types]


def test_every_norm_of_shards_is_that_of_the_whole() -> None:
    kinds = [1.0, 2.0, 3.0, float("inf")]
    model = _net().double()
    _loss(model, 0).backward()
    wanted = [nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None], n) for n in kinds]
    for norms in run_ranks(_norms, 3, kinds):
        assert norms == pytest.approx([each.item() for each in wanted], abs=1e-10)


# Training


def _trained(options: Plugin, steps_before: int, dtype: torch.dtype) -> dict[str, Any]:
    process = Process.current()
    strategy = FSDPStrategy(process, options=options)
    model = _net().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(steps_before):
        optimizer.zero_grad()
        _loss(model, step).backward()
        optimizer.step()
    strategy.prepare(Bundle((model,), (optimizer,)))
    dtypes = {(p.dtype, is_sharded(p)) for p in model.parameters()}
    output = model(torch.arange(4)).dtype
    for step in range(steps_before, 6):
        optimizer.zero_grad()
        strategy.backward(_loss(model, step))
        dtypes |= {(p.grad.dtype, is_sharded(p.grad)) for p in model.parameters() if p.grad is not None}
        optimizer.step()
    held = sum(local_of(p).numel() for p in model.parameters())
    return {"state": strategy.full_state(model), "dtypes": dtypes, "held": held, "output": output}


def _trained_alone(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = _net().to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(6):
        optimizer.zero_grad()
        _loss(model, step).backward()
        optimizer.step()
    return model.state_dict()


def _assert_states(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("steps_before", [0, 3])
def test_an_optimizer_follows_its_parameters_with_the_state_that_it_has(steps_before: int) -> None:
    for answer in run_ranks(_trained, 2, Plugin(forward_prefetch=True), steps_before, torch.float64):
        _assert_states(answer["state"], _trained_alone(torch.float64), 1e-10)
        total = sum(parameter.numel() for parameter in _net().parameters())
        assert total * 0.4 < answer["held"] < total * 0.6


def test_bf16_gathers_and_computes_narrow_and_keeps_parameters_and_gradients_wide() -> None:
    options = Plugin(mixed_precision_policy="bf16")
    for answer in run_ranks(_trained, 2, options, 0, torch.float32):
        assert answer["dtypes"] == {(torch.float32, True)}
        assert answer["output"] is torch.bfloat16
        # AdamW moves by about the learning rate, 0.01, whatever the size of a gradient: a sign that bfloat16 turns
        # over costs two of them.
        _assert_states(answer["state"], _trained_alone(torch.float32), 0.06)


def _local_then_exchanged() -> tuple[bool, dict[str, torch.Tensor]]:
    strategy = FSDPStrategy(Process.current())
    model = _net().double()
    strategy.prepare(Bundle((model,)))
    rank = Process.current().topology.rank
    with strategy.no_sync(model):
        strategy.backward(_loss(model, rank))
        kept = all(parameter.grad is None for parameter in model.parameters())
        loss = _loss(model, 10 + rank)
        with strategy.sync_in_backward(model):
            strategy.backward(loss)
        before = {n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
        strategy.backward(_loss(model, 40 + rank))  # the outer block goes on
        kept &= all(torch.equal(before[n], whole(p.grad)) for n, p in model.named_parameters() if p.grad is not None)
    with strategy.sync_in_backward(model):  # nothing is kept here, and nothing must be afterwards
        strategy.backward(_loss(model, 20 + rank))
    strategy.backward(_loss(model, 30 + rank))
    return kept, {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}


def test_gradients_kept_local_are_exchanged_with_the_next_ones() -> None:
    model = _net().double()
    for seed in (0, 1, 10, 11, 20, 21, 30, 31, 40, 41):
        (_loss(model, seed) / 2).backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    for kept, gradients in run_ranks(_local_then_exchanged, 2):
        assert kept
        _assert_states(gradients, cast("dict[str, torch.Tensor]", wanted), 1e-10)


def _evaluated_state() -> dict[str, torch.Tensor]:
    strategy = FSDPStrategy(Process.current())
    model = _net().double()
    strategy.prepare(Bundle((model,)))
    with torch.no_grad():
        model(torch.arange(4))  # leaves the root's parameters gathered
    return {name: torch.tensor(local_of(value).shape) for name, value in strategy.model_state(model).items()}


def test_a_state_taken_after_an_evaluation_is_sharded_too() -> None:
    for shapes in run_ranks(_evaluated_state, 2):
        assert shapes["embed.weight"].tolist() == [6, 8]


# Where values come from


_WIDTH, _DEPTH = 64, 8
_UNIT_BYTES = 4 * (2 * 2 * _WIDTH * _WIDTH + 3 * _WIDTH)
_MODEL_BYTES = _DEPTH * _UNIT_BYTES + 4 * (12 * _WIDTH + _WIDTH)


def _meta_net() -> Net:
    """On the meta device but for its buffer, as models that are built empty are."""
    with torch.device("meta"):
        model = Net(_WIDTH, _DEPTH)
    model.scale = torch.zeros(_WIDTH)
    return model


def _peak_of(act: Callable[[], object]) -> int:
    """Bytes of tensors that were alive at once while `act` ran, beyond those from before."""
    tracker = MemTracker()
    with tracker:
        act()
    peaks = tracker.get_tracker_snapshot("peak")
    return int(peaks[torch.device("cpu")]["Total"])


def _loaded(weights_path: str | None) -> tuple[int, dict[str, torch.Tensor], float]:
    process = Process.current()
    options = Plugin(weights_path=weights_path, cpu_ram_efficient_loading=weights_path is None)
    strategy = FSDPStrategy(process, options=options)
    real = weights_path is None and process.topology.is_main
    model = _net(1, width=_WIDTH, depth=_DEPTH) if real else _meta_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    peak = _peak_of(lambda: strategy.prepare(Bundle((model,), (optimizer,))))
    state = strategy.full_state(model)
    strategy.backward(_loss(model, 0))
    optimizer.step()
    moved = sum(float((whole(p) - state[n]).abs().sum()) for n, p in model.named_parameters())
    return peak, state, moved


@pytest.mark.parametrize("source", ["rank 0", "one file", "an index"])
def test_no_process_holds_more_than_its_shards_and_one_unit(source: str, tmp_path: Path) -> None:
    model = _net(1, width=_WIDTH, depth=_DEPTH)
    path = None if source == "rank 0" else _write(model.state_dict(), tmp_path, indexed=source == "an index")
    answers = run_ranks(_loaded, 2, path)
    for rank, (peak, state, moved) in enumerate(answers):
        _assert_states({n: v for n, v in state.items() if n != "scale"}, _without_scale(model), 0.0)
        assert moved > 0
        if source != "rank 0" or rank > 0:  # rank 0 was given all of it
            assert peak <= _MODEL_BYTES / 2 + _UNIT_BYTES, f"{peak / _MODEL_BYTES:.2f} of the model"


def _without_scale(model: Net) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if name != "scale"}


def _write(state: dict[str, torch.Tensor], folder: Path, *, indexed: bool = False) -> str:
    kept = {name: value for name, value in state.items() if name != "head.weight"}  # tied: stored once
    if not indexed:
        save_file(kept, folder / "model.safetensors")
        return str(folder)
    names = sorted(kept)
    parts = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, inside in parts.items():
        save_file({name: kept[name] for name in inside}, folder / file)
    index = {"weight_map": {name: file for file, inside in parts.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(folder / "model.safetensors.index.json")


def _refusal(options: Plugin, meta: Iterable[str], dtype: torch.dtype = torch.float32) -> str:
    strategy = FSDPStrategy(Process.current(), options=options)
    model = _net().to(dtype)
    for name in meta:
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        if key in module._parameters:
            setattr(module, key, nn.Parameter(getattr(module, key).to("meta")))
        else:
            module.register_buffer(key, getattr(module, key).to("meta"), persistent=key != "scale")
    try:
        strategy.prepare(Bundle((model,)))
    except (ConfigError, CheckpointError) as error:
        return str(error)
    return "nothing"


def _damaged(folder: Path) -> dict[str, tuple[Plugin, list[str], torch.dtype, str]]:
    state = _net().state_dict()
    names = list(state)
    empty = ["blocks.0.up.weight"]
    (folder / "good").mkdir()
    good = Plugin(weights_path=_write(state, folder / "good"))
    cases = {"no file": (Plugin(weights_path=folder / "none"), empty, torch.float32, "there is no such file")}
    for case, changed, message in (
        ("missing", {k: v for k, v in state.items() if k != empty[0]}, "lacks `blocks.0.up.weight`"),
        ("shape", {**state, empty[0]: torch.zeros(3, 3)}, r"has shape \(3, 3\) in"),
        ("dtype", {**state, empty[0]: state[empty[0]].double()}, "would round it"),
    ):
        (folder / case).mkdir()
        cases[case] = (Plugin(weights_path=_write(changed, folder / case)), empty, torch.float32, message)
    (folder / "cut").mkdir()
    cut = Path(_write(state, folder / "cut")) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-10])
    cases["cut"] = (Plugin(weights_path=cut), empty, torch.float32, "no readable safetensors file")
    (folder / "index").mkdir()
    index = Path(_write(state, folder / "index", indexed=True))
    (index.parent / "b.safetensors").unlink()
    cases["absent"] = (Plugin(weights_path=index), empty, torch.float32, "names `b.safetensors`, which is not beside")
    cases["buffer"] = (good, ["scale"], torch.float32, "The buffer `scale` is on the meta device")
    cases["rank 0"] = (Plugin(cpu_ram_efficient_loading=True), empty, torch.float32, "is on the meta device too")
    assert names
    return cases


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for case, (options, meta, dtype, message) in _damaged(tmp_path).items():
        (found,) = run_ranks(_refusal_or_refused, 1, options, meta, dtype)
        assert re.search(message, found), f"{case}: {found}"


def _refusal_or_refused(options: Plugin, meta: list[str], dtype: torch.dtype) -> str:
    try:
        return _refusal(options, meta, dtype)
    except (ConfigError, CheckpointError) as error:
        return str(error)


def _twice() -> list[str]:
    found = []
    process = Process.current()
    model = _net()
    FSDPStrategy(process).prepare(Bundle((model,)))
    for act in (
        lambda: FSDPStrategy(process).prepare(Bundle((model,))),
        lambda: FSDPStrategy(process).join([model]),
        lambda: FSDPStrategy(process, place=False),
        lambda: FSDPStrategy(process).prepare(Bundle((nn.Sequential(model.head),))),
        lambda: FSDPStrategy(process, options=Plugin(reshard_after_forward=3)),
    ):
        with pytest.raises(ConfigError) as caught:
            act()
        found.append(str(caught.value))
    return found


def test_what_cannot_be_is_refused_before_the_first_step() -> None:
    (found,) = run_ranks(_twice, 1)
    assert "is sharded by `fully_shard` already" in found[0]
    assert "whose every forward needs all ranks" in found[1]
    assert "`device_placement=False`" in found[2]
    assert "`0.weight` is divided over processes already" in found[3]
    assert "groups of 3 processes, and 1 share a copy" in found[4]


def _box(world: int) -> list[Any]:
    strategy = FSDPStrategy(Process.current())
    model = nn.Linear(3, 2)  # fewer rows than ranks
    strategy.prepare(Bundle((model,)))
    return [box_of(model.weight), [box_of(model.bias).is_empty, tuple(whole(model.weight).shape)]]


def test_ranks_without_a_row_hold_an_empty_part() -> None:
    answers = run_ranks(_box, 3, 3)
    assert [box.offset for box, _ in answers[:2]] == [(0, 0), (1, 0)]
    assert answers[2][0].is_empty
    assert answers[2][1] == [True, (2, 3)]
