"""What each stage of a pipeline needs, computes and holds: stages run one after another, in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from accel_parallel.pipeline.absent import Absent
from accel_parallel.pipeline.division import Division, divide
from accel_parallel.pipeline.rehearsal import rehearse
from accel_parallel.pipeline.stage import StageModule
from accel_state import AccelError, ConfigError
from accel_state.tree import tensor_leaves

CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        y: torch.Tensor = self.down(torch.tanh(self.up(x))) * self.scale
        return x + (y if mask is None else y * mask.unsqueeze(-1))


class Chain(nn.Module):
    """Embedding, blocks and a head that is tied to the embedding."""

    def __init__(self, num_blocks: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.place = nn.Embedding(11, 6), nn.Parameter(torch.randn(16, 6))
        self.blocks = nn.ModuleList(Block() for _ in range(num_blocks))
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.steps: torch.Tensor
        self.register_buffer("steps", torch.arange(16))
        self.double().eval()

    def start(self, ids: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.embed(ids)
        return embedded + self.place[self.steps[: ids.shape[1]]]

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        x = self.start(ids)
        for block in self.blocks:
            x = block(x, mask=mask)
        return {"logits": self.head(self.norm(x)), "hidden": (x, None)}


def run_stages(
    make: Callable[[], nn.Module], num_stages: int, kwargs: dict[str, Any], *, splits: str | Sequence[str] = "auto"
) -> tuple[Any, list[Division]]:
    """The last stage's output, and what each stage has."""
    divisions = []
    received: Any = (torch.zeros(1),)
    buffers = []
    for stage in range(num_stages):
        division = divide(make(), splits, None, {"args": (), "kwargs": kwargs}, num_stages=num_stages, device=CPU)
        division.place(stage)
        route = rehearse(division.cast, (), kwargs, starts=division.starts, owners=division.owners)
        module = StageModule(division.cast, route, stage, is_last=stage == num_stages - 1)
        module.chunks = [{"args": (), "kwargs": kwargs}]
        with torch.no_grad():
            sent = module(*received, index=torch.tensor([0]))
        buffers += received
        received = tuple(tensor.clone() for tensor in sent)
        divisions.append(division)
    arrived = {tensor.untyped_storage().data_ptr() for tensor in buffers}
    assert all(tensor.untyped_storage().data_ptr() not in arrived for tensor in tensor_leaves(module.outputs[0]))
    return module.outputs[0], divisions


def rows(kind: Callable[[], nn.Module] = Chain) -> dict[str, Any]:
    ids = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(1))
    return {"ids": ids, "mask": (ids > 2).double()}


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_stages_one_after_another_are_the_model(num_stages: int) -> None:
    result, divisions = run_stages(Chain, num_stages, rows())
    with torch.no_grad():
        expected = Chain()(**rows())
    assert torch.equal(result["logits"], expected["logits"])
    assert torch.equal(result["hidden"][0], expected["hidden"][0])
    assert result["hidden"][1] is None
    assert divisions[0].starts == divisions[-1].starts


def held(division: Division) -> set[str]:
    model = division.cast.model
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    return {name for name, tensor in tensors if not isinstance(tensor, Absent)}


def test_each_stage_holds_its_own_weights_only() -> None:
    _, divisions = run_stages(Chain, 3, rows())
    assert divisions[0].starts == ("blocks.1", "blocks.3")
    block = ["up.weight", "up.bias", "down.weight", "down.bias", "scale"]
    inner = {index: {f"blocks.{index}.{name}" for name in block} for index in range(4)}
    assert held(divisions[0]) == {"embed.weight", "head.weight", "place", "steps", *inner[0]}
    assert held(divisions[1]) == {"steps", *inner[1], *inner[2]}
    # The head is tied to the embedding: one tensor under two names, and each of both ends has a copy.
    assert held(divisions[2]) == {
        "steps", "embed.weight", "head.weight", "norm.weight", "norm.bias", *inner[3]
    }  # fmt: skip
    for stage, division in enumerate(divisions):
        own = sum(weight.tensor.nbytes for weight in division.cast.weights if weight.tensor is not None)
        assert own == division.stage_bytes(stage)


def test_absent_weights_take_no_memory() -> None:
    _, divisions = run_stages(Chain, 2, rows())
    weight = divisions[1].cast.model.get_parameter("place")
    assert isinstance(weight, Absent)
    assert isinstance(weight, nn.Parameter)
    assert repr(weight) == "Absent('place', shape=(16, 6), dtype=torch.float64, device=cpu)"
    assert weight.untyped_storage().nbytes() == 0 or weight.shadow.is_meta


def test_any_module_may_begin_a_stage() -> None:
    with torch.no_grad():
        expected = Chain()(**rows())
    for splits in (["blocks.0"], ["blocks.2.up"], ["norm"]):  # the last gives what arrives there
        result, divisions = run_stages(Chain, 2, rows(), splits=splits)
        assert torch.equal(result["logits"], expected["logits"])
        assert divisions[0].starts == tuple(splits)
    with pytest.raises(ConfigError, match=r"Stage 1 needs argument `\[0\]` of `blocks.3`.*a connection that skips"):
        run_stages(Chain, 2, rows(), splits=["blocks.2.down"])  # inside the block, beside which its input passes
    _, divisions = run_stages(Unshared, 3, rows(), splits=["norm", "blocks.2"])
    assert divisions[0].starts == ("blocks.2", "norm")


class Unshared(Chain):
    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        x = self.start(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


@dataclass
class Output:
    logits: torch.Tensor
    name: str = "plain"


class Translator(nn.Module):
    """Blocks of a decoder that all look at what the encoder gave, and a bias that the first block computes for all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.encoder = nn.ModuleList(Block() for _ in range(3))
        self.decoder = nn.ModuleList(nn.TransformerDecoderLayer(6, 2, 8, batch_first=True) for _ in range(3))
        self.double().eval()

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> Output:
        memory = self.embed(ids)
        for block in self.encoder:
            memory = block(memory, mask)
        x = self.embed(ids.flip(1))
        for block in self.decoder:
            x = block(x, memory)
        return Output(x)


@pytest.mark.parametrize("num_stages", [2, 4, 5])
def test_what_later_blocks_share_goes_along(num_stages: int) -> None:
    result, _ = run_stages(Translator, num_stages, rows())
    with torch.no_grad():
        expected = Translator()(**rows())
    assert isinstance(result, Output)
    torch.testing.assert_close(result.logits, expected.logits, rtol=0, atol=1e-12)


class Skipping(Chain):
    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        x = early = self.start(ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x + early))


class Deciding(Chain):
    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        x = self.start(ids)
        for block in self.blocks:
            x = block(x) if x.sum() > 0 else block(-x)
        return x


class Writing(Chain):
    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        x = self.start(ids)
        log = torch.zeros(*ids.shape, 4, dtype=x.dtype)
        for index, block in enumerate(self.blocks):
            x = block(x)
            log[..., index] = x.mean(-1)
        return log


class WritingBlock(Block):
    def forward(self, x: torch.Tensor, log: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        log.add_(x)
        return super().forward(x)


class Logging(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(WritingBlock() for _ in range(4)).double()

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        x = self.start(ids)
        log = torch.zeros(*ids.shape, 6, dtype=x.dtype)
        for block in self.blocks:
            x = block(x, log)
        return log


class Unlisted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.eval()

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> Any:
        return self.two(self.one(mask.float().expand(6, 3, 5).transpose(0, 2)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Skipping, r"Stage 1 needs the output at `the top`, a tensor of shape \(3, 5, 11\).*skips stages.*Begin the"),
        (Deciding, r"asks for the values of a tensor \(`\w+`\).*`no_split_module_classes`"),
        (Writing, r"writes in place \(`copy_`\) into a tensor of shape \(3, 5\).*Compute a new tensor"),
        (Logging, r"`blocks.0` writes in place into its argument `\[1\]` of shape \(3, 5, 6\)"),
        (Unlisted, r"No blocks were found in `Unlisted`.*Name in `split_points` the 1 module"),
    ],
)
def test_what_stages_cannot_know_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_stages(make, 2, rows())


class Towers(nn.Module):
    """Two chains side by side: what the first gives passes the second by."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.sink = nn.Embedding(11, 6), nn.Parameter(torch.randn(6, 6))
        self.left, self.right = (nn.ModuleList(Block() for _ in range(3)) for _ in range(2))
        self.double().eval()

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        left: torch.Tensor
        left, right = self.embed(ids) @ self.sink, mask.unsqueeze(-1).expand(3, 5, 6)
        for block in self.left:
            left = block(left)
        for block in self.right:
            right = block(right)
        return left * right


def test_cuts_are_made_where_they_can_be() -> None:
    result, divisions = run_stages(Towers, 2, rows())
    assert divisions[0].starts == ("left.2",)  # the middle, `right.0`, takes nothing from before
    with torch.no_grad():
        assert torch.equal(result, Towers()(**rows()))
    with pytest.raises(ConfigError, match=r"4 pipeline stages .* of the 6 blocks of `Towers` only 3 can begin one"):
        run_stages(Towers, 4, rows())


class Handing(Chain):
    """Gives each block a weight that lies outside of the blocks."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        x = self.start(ids)
        for block in self.blocks:
            x = block(x) @ torch.eye(6, dtype=x.dtype)
            x = self.norm(x) if block is self.blocks[3] else block(self.place[: x.shape[1]]) + x
        return x


class Lending(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(LendBlock() for _ in range(4)).double()

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        x = self.start(ids)
        for block in self.blocks:
            x = block(x, self.norm.weight)
        return x


class LendBlock(Block):
    def forward(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x) * weight


@pytest.mark.parametrize("make", [Handing, Lending])
def test_a_weight_that_several_stages_use_is_on_each(make: Callable[[], nn.Module]) -> None:
    result, divisions = run_stages(make, 3, rows())
    with torch.no_grad():
        assert torch.equal(result, make()(**rows()))
    shared = "place" if make is Handing else "norm.weight"
    assert all(shared in held(division) for division in divisions)


def test_a_skip_within_one_stage_is_fine() -> None:
    result, _ = run_stages(Skipping, 2, rows(), splits=["norm"])
    with torch.no_grad():
        assert torch.equal(result, Skipping()(**rows()))


def test_a_module_that_is_not_called_begins_no_stage() -> None:
    with pytest.raises(ConfigError, match=r"names 'blocks', which the model did not call.*and not the list"):
        run_stages(Chain, 2, rows(), splits=["blocks"])
    with pytest.raises(ConfigError, match=r"to begin with `embed`, and nothing that was computed before"):
        run_stages(Chain, 2, rows(), splits=["embed"])


def test_a_model_that_was_refused_is_as_before() -> None:
    model = Deciding()
    with pytest.raises(ConfigError, match="asks for the values"):
        divide(model, "auto", None, {"args": (), "kwargs": rows()}, num_stages=2, device=CPU)
    with torch.no_grad():
        assert torch.equal(model(**rows()), Deciding()(**rows()))
    assert "forward" not in vars(model.blocks[0])


def test_weights_that_the_example_does_not_use_are_missed() -> None:
    class Sometimes(Chain):
        def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
            x = self.start(ids)
            for block in self.blocks:
                x = block(x)
            return x if mask is None else self.head(x)

    class Untied(Sometimes):
        def __init__(self) -> None:
            super().__init__()
            self.head.weight = nn.Parameter(torch.zeros(11, 6).double())

    example = {"ids": rows()["ids"]}
    division = divide(Untied(), "auto", None, {"args": (), "kwargs": example}, num_stages=2, device=CPU)
    assert "head.weight" not in division.owners
    with pytest.raises(ConfigError, match=r"needs the output at `the top`|uses `head.weight` with these inputs"):
        rehearse(division.cast, (), rows(), starts=division.starts, owners=division.owners)


class Choosing(Block):
    """Sends rows to experts by value, as mixtures do: its shapes cannot be followed."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        flat = x.reshape(-1, x.shape[-1])
        chosen = (flat.sum(-1) > 0).nonzero().flatten()
        return x + self.down(self.up(flat)).index_fill(0, chosen, 0.25).reshape(x.shape), mask


class Mixture(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Choosing() for _ in range(4)).double()

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        x = self.start(ids)
        for block in self.blocks:
            x, mask = block(x, mask)
        return x


def test_blocks_that_decide_by_values_are_learned() -> None:
    result, divisions = run_stages(Mixture, 3, rows())
    with torch.no_grad():
        assert torch.equal(result, Mixture()(**rows()))
    rule = divisions[2].cast.rules["blocks.0"]
    assert [each.path for each in rule.outputs] == [".args[0]", ".args[1]"]
    longer = {name: torch.cat([each, each], dim=1) for name, each in rows().items()}
    division = divisions[2]
    route = rehearse(division.cast, (), longer, starts=division.starts, owners=division.owners)
    assert route.result.shape == (3, 10, 6)


class Shrinking(Choosing):
    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        return super().forward(x)[0][:, (x > -9).all(-1).all(0).nonzero().flatten()[1:]]


def test_shapes_that_depend_on_values_are_refused() -> None:
    class Model(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Shrinking() for _ in range(4)).double()

    with pytest.raises(ConfigError, match=r"`blocks.0` decides by values.*Name in `no_split_module_classes`"):
        run_stages(Model, 2, rows())


def test_another_way_than_the_rehearsed_one_is_noticed() -> None:
    class Wavering(Chain):
        def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
            x = self.start(ids)
            for block in self.blocks if ids[0, 0] > 0 else reversed(list(self.blocks)):
                x = block(x)
            return x

    kwargs = rows() | {"ids": rows()["ids"].clamp(min=1)}
    division = divide(Wavering(), "auto", None, {"args": (), "kwargs": kwargs}, num_stages=2, device=CPU)
    division.place(0)
    route = rehearse(division.cast, (), kwargs, starts=division.starts, owners=division.owners)
    module = StageModule(division.cast, route, 0, is_last=False)
    module.chunks = [{"args": (), "kwargs": kwargs | {"ids": torch.zeros_like(kwargs["ids"])}}]
    with pytest.raises(AccelError, match=r"called `blocks.3`, and .* rehearsed with `blocks.0`: its way depends"):
        module(torch.zeros(1), index=torch.tensor([0]))
