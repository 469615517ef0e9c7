"""A model divided over real ranks gives what it gives on one, whatever the batch, or says why not."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from accel_parallel.audit import audit_model
from accel_parallel.pipeline import PipelinedModel, prepare_pippy
from accel_parallel.pipeline.absent import Absent
from accel_state import CollectiveError, ConfigError, MeshShape, Process, ProcessSettings
from accel_state.testing import RankError, run_ranks


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor]:
        return (x + self.down(torch.tanh(self.up(x))) * mask.unsqueeze(-1),)


class Output(NamedTuple):
    logits: torch.Tensor
    pooled: dict[str, torch.Tensor | None]
    kind: str


class Chain(nn.Module):
    def __init__(self, num_blocks: int = 4, *, fails: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(Block(6) for _ in range(num_blocks))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        if fails is not None:
            self.blocks[fails].get_submodule("up").register_forward_pre_hook(self.fail)
        self.double().eval()

    def fail(self, module: nn.Module, args: Any) -> None:
        if not isinstance(args[0], torch._subclasses.FakeTensor):
            raise ValueError("this block is broken")

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor | None = None, *, scale: float = 1.0, kind: str = ""
    ) -> Output:
        x = self.embed(ids) * scale
        mask = torch.ones(ids.shape, dtype=x.dtype, device=x.device) if mask is None else mask
        for block in self.blocks:
            (x,) = block(x, mask)
        return Output(self.head(x), {"first": x[:, 0].float(), "none": None}, kind)


def batch(rows: int, length: int, offset: int = 0) -> torch.Tensor:
    return torch.randint(0, 11, (rows, length), generator=torch.Generator().manual_seed(rows + length + offset))


def compare(got: Any, ids: torch.Tensor, **kwargs: Any) -> None:
    with torch.no_grad():
        expected = Chain()(ids, **kwargs)
    assert type(got) is Output
    assert got.kind == expected.kind
    assert got.pooled["none"] is None
    first, same = got.pooled["first"], expected.pooled["first"]
    assert first is not None
    assert same is not None
    for one, other in ((got.logits, expected.logits), (first, same)):
        assert (one.dtype, one.shape, one.requires_grad) == (other.dtype, other.shape, False)
        tolerance = 1e-12 if one.dtype == torch.float64 else 1e-6
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def every_batch(gather_output: bool) -> tuple[tuple[str, ...], int, list[str]]:
    world_size, rank = Process.current().topology.world_size, Process.current().topology.rank
    model = prepare_pippy(Chain(), example_args=(batch(4, 5),), num_chunks=3, gather_output=gather_output)
    for rows, length in ((4, 5), (6, 5), (7, 5), (2, 5), (1, 5), (5, 9), (6, 5)):
        ids = batch(rows, length)
        for kwargs in ({}, {"mask": (ids > 2).double(), "scale": 0.5, "kind": "x"}, {"mask": torch.zeros(1, length)}):
            got = model(ids, **kwargs)
            if gather_output or rank == world_size - 1:
                compare(got, ids, **kwargs)
            else:
                assert got is None
    # What comes out is the caller's: a later call does not write to it.
    first = model(batch(1, 5))
    model(batch(1, 5, offset=1))
    if first is not None:
        compare(first, batch(1, 5))
    assert (model.stage, model.num_stages) == (rank, world_size)
    own = [weight for weight in model.parameters() if not isinstance(weight, Absent)]
    assert model.stage_bytes == sum(weight.nbytes for weight in own)
    return model.split_points, model.stage_bytes, sorted(model.state_dict())


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_batch_gives_what_one_process_gives(world_size: int) -> None:
    found = run_ranks(every_batch, world_size, world_size != 3)
    total = sum(each.nbytes for each in Chain().parameters())
    assert [points for points, _, _ in found] == [found[0][0]] * world_size
    assert sum(size for _, size, _ in found) == total + 11 * 6 * 8  # the tied weight is at both ends
    assert max(size for _, size, _ in found) < total
    names = [set(state) for _, _, state in found]
    assert set.union(*names) == set(Chain().state_dict())
    assert set.intersection(*names[:2]) <= {"embed.weight", "head.weight"}


def rank_zero_counts() -> bool:
    model = prepare_pippy(Chain(), example_args=(batch(4, 5),), gather_output=True)
    ids, counted = batch(4, 5, offset=Process.current().topology.rank), batch(4, 5)
    compare(model(ids, (ids > 2).double()), counted, mask=(counted > 2).double())
    return True


def test_the_inputs_of_rank_zero_count() -> None:
    assert run_ranks(rank_zero_counts, 2) == [True, True]


def many_shapes() -> int:
    model = prepare_pippy(Chain(), example_args=(batch(4, 5),), gather_output=True)
    for length in (*range(1, 20), 1):
        compare(model(batch(4, length)), batch(4, length))
    return len(model._runs)


def test_the_stages_of_old_shapes_are_let_go() -> None:
    assert run_ranks(many_shapes, 2) == [16, 16]


def refusal(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    try:
        return f"nothing: {call(*args, **kwargs)}"
    except (CollectiveError, ConfigError) as error:
        return str(error)


def refusals() -> list[str]:
    ids = batch(4, 5)
    cases: tuple[tuple[nn.Module, dict[str, Any]], ...] = (
        (Chain(1), {"example_args": (ids,), "no_split_module_classes": Block}),
        (Chain(), {}),
        (Chain(), {"example_args": (ids,), "example_kwargs": {"masc": ids}}),
        (Chain(), {"example_args": (ids,), "split_points": ["block.1"]}),
        (Chain(), {"example_args": (ids,), "split_points": "blocks.1"}),
        (Chain(), {"example_args": (ids,), "num_chunks": 0}),
        (Chain().train(), {"example_args": (ids,)}),
        (Chain().to("meta"), {"example_args": (ids,)}),
        (Chain(), {"example_args": (ids,), "no_split_module_classes": "Blok"}),
        (nn.parallel.DistributedDataParallel(Chain()).eval(), {"example_args": (ids,)}),
    )
    found = [refusal(prepare_pippy, model, **options) for model, options in cases]
    model = prepare_pippy(Chain(), example_args=(ids,), gather_output=True)
    found += [refusal(model, ids, ids[:3]), refusal(model, 3), refusal(model.train), refusal(prepare_pippy, model)]
    model.module.train()
    found.append(refusal(model, ids))
    model.eval()
    compare(model(ids), ids)  # after all that, the ranks are still together
    return found


def test_what_cannot_work_is_refused_on_every_rank() -> None:
    found = run_ranks(refusals, 2)
    assert found[0] == found[1]
    expected = [
        r"2 pipeline stages were asked for, and the model has 1 block\(s\)",
        r"The forward of Chain was followed.*with the inputs \(\), and failed: TypeError.*Give `example_args`",
        r"with the inputs \(\[0\]: int64\[4, 5\], masc: int64\[4, 5\]\), and failed: TypeError.*masc",
        r"names 'block.1', which is no module of `Chain`.*Did you mean 'blocks.1'",
        r"`split_points='blocks.1'` is neither 'auto' nor a list.*\['blocks.1'\]",
        r"`num_chunks=0` is not a number of micro-batches",
        r"Chain is in training mode.*Call `eval\(\)`",
        r"`embed.weight` of Chain is on the meta device",
        r"has the class `Blok`.*nearest name is `Block`",
        r"The model is a DistributedDataParallel.*Pass the module inside",
        r"Input `\[0\]` has 4 rows and `\[1\]` has 3",
        r"without a tensor that has a dimension",
        r"`train\(\)` was called.*before dividing it",
        r"The model is a PipelinedModel",
        r"The model inside is in training mode.*Call `eval\(\)`",
    ]
    assert len(found[0]) == len(expected)
    for message, pattern in zip(found[0], expected, strict=True):
        assert re.search(pattern, message), message


def ranks_that_differ() -> list[str]:
    rank, ids = Process.current().topology.rank, batch(4, 5)
    model = prepare_pippy(Chain(), example_args=(ids,), gather_output=True)
    found = [
        refusal(model, batch(4, 5 + rank)),
        refusal(model, ids, kind=str(rank)),
        refusal(model, ids if rank else ids[0, 0]),
        refusal(prepare_pippy, Chain(), example_args=(ids,), num_chunks=1 + rank),
        refusal(prepare_pippy, Chain(), example_args=(ids,), num_chunks=rank),
    ]
    compare(model(ids), ids)
    return found


def test_ranks_that_differ_hear_of_it_at_once() -> None:
    zero, one = run_ranks(ranks_that_differ, 2)
    assert zero[0] == one[0]
    for message in (zero[0], zero[1], zero[3]):
        assert "Rank(s) [1] gave" in message
        assert "other shapes or settings than rank 0" in message
    assert "without a tensor that has a dimension" in zero[2]
    assert "Rank(s) [0] refused what the pipelined model was given" in one[2]
    assert "`num_chunks=0`" in zero[4]
    assert "Rank(s) [0] refused what prepare_pippy was given" in one[4]


def of_other_values() -> list[str]:
    ids, model = batch(4, 5), Chain()
    with torch.no_grad():
        model.blocks[2].get_submodule("up").get_parameter("bias")[1] += Process.current().topology.rank
    found = [refusal(prepare_pippy, model, example_args=(ids,))]
    if Process.current().topology.is_main:
        with torch.no_grad():
            compare(model(ids), ids)  # whole still
    with pytest.raises(ConfigError, match=r"model number 0 was divided by `prepare_pippy`, for inference"):
        audit_model(prepare_pippy(Chain(), example_args=(ids,)), name="model number 0", prepared=())
    return found


def test_a_model_of_other_values_somewhere_is_refused() -> None:
    for (message,) in run_ranks(of_other_values, 3):
        assert re.search(r"`blocks\.2\.up\.bias` of the model has other values on rank\(s\) 1, 2 than on", message)


def broken_stage() -> tuple[str, float]:
    points = ["blocks.1", "blocks.2"]
    model = prepare_pippy(Chain(fails=1), example_args=(batch(4, 5),), split_points=points)
    start = time.monotonic()
    try:
        model(batch(4, 5))
    except RuntimeError as error:
        waited = time.monotonic() - start
        if model.stage == 1:
            time.sleep(8)  # alive, and silent
        return f"{error} {error.__cause__}", waited
    return "nothing", 0.0


def test_a_rank_that_raises_in_its_stage_does_not_hang_the_others() -> None:
    found = run_ranks(broken_stage, 3, settings=ProcessSettings(device="cpu", timeout_s=5))
    assert "this block is broken" in found[1][0]
    assert found[2][0] != "nothing"  # it waits for the broken one
    assert 3 < found[2][1] < 20


def divided_otherwise() -> None:
    prepare_pippy(Chain(), example_args=(batch(4, 5),))


def test_other_parallelism_besides_is_refused() -> None:
    settings = ProcessSettings(device="cpu", mesh=MeshShape(tp=2))
    with pytest.raises(RankError, match=r"divided as tp=2, and `prepare_pippy` makes every process a stage"):
        run_ranks(divided_otherwise, 2, settings=settings)


@pytest.fixture
def process() -> Iterator[Process]:
    with Process.open(ProcessSettings(device="cpu")) as opened:
        yield opened


def test_one_process_runs_the_model(process: Process) -> None:
    model = prepare_pippy(Chain())
    assert isinstance(model, PipelinedModel)
    compare(model(batch(4, 5), scale=0.5), batch(4, 5), scale=0.5)
    assert (model.stage, model.num_stages, model.split_points) == (0, 1, ())
    assert model.stage_bytes == sum(each.nbytes for each in Chain().parameters())
    assert set(model.state_dict()) == set(Chain().state_dict())


def test_it_needs_an_open_process() -> None:
    with pytest.raises(ConfigError, match="No process is open"):
        prepare_pippy(Chain())


def on_devices() -> float:
    torch.backends.cuda.matmul.allow_tf32 = False
    process = Process.current()
    model = prepare_pippy(Chain(), example_args=(batch(4, 5),), gather_output=True)
    got = model(batch(5, 7))
    assert got.logits.device == process.device
    with torch.no_grad():
        return float((got.logits.cpu() - Chain()(batch(5, 7)).logits).abs().max())


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices, one a stage")
def test_stages_on_gpus() -> None:
    assert max(run_ranks(on_devices, 2, settings=ProcessSettings(device="cuda", timeout_s=60))) < 1e-12
