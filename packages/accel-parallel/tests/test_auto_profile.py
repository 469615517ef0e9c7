"""What is learnt from a module: its weights by unit, what a micro-batch keeps, and that the module stays as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from accel_parallel.auto import ModelProfile, TransformerSizes, profile_model, transformer_profile
from accel_parallel.auto.profile import Growth
from accel_state.config import MixedPrecision
from accel_state.errors import ConfigError


class Config:
    """As models of transformers have one."""

    hidden_size = 64
    num_attention_heads = 4
    num_key_value_heads = 2
    intermediate_size = 128
    vocab_size = 100


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 32), nn.Linear(64, 32)
        self.o, self.up, self.down = nn.Linear(64, 64), nn.Linear(64, 128), nn.Linear(128, 64)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(x)
        q, k, v = (each(hidden).unflatten(-1, (-1, 16)).transpose(1, 2) for each in (self.q, self.k, self.v))
        k, v = (each.repeat_interleave(2, 1) for each in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1 if self.training else 0.0)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        inner: torch.Tensor = self.dropout(self.down(F.gelu(self.up(x))))
        return x + inner


class Model(nn.Module):
    """Takes ids and labels, and has a config."""

    def __init__(self, layers: int = 3, *, tied: bool = False) -> None:
        super().__init__()
        self.config = Config()
        self.embed = nn.Embedding(100, 64)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.head = nn.Linear(64, 100, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(10))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten())}


PLAN = {
    "layers.*.q": "colwise",
    "layers.*.k": "colwise",
    "layers.*.v": "colwise",
    "layers.*.o": "rowwise",
    "layers.*.up": "colwise",
    "layers.*.down": "rowwise",
}
LAYER_NUMEL = sum(parameter.numel() for parameter in Layer().parameters())


def test_weights_are_counted_by_unit() -> None:
    profile = profile_model(Model(), sequence_length=32)
    assert [(kind.name, kind.count, kind.weights.numel) for kind in profile.blocks] == [("Layer", 3, LAYER_NUMEL)]
    assert profile.root.numel == 2 * 100 * 64
    assert profile.num_parameters == profile.num_trainable == 2 * 6400 + 3 * LAYER_NUMEL
    assert profile.size_bytes == 4 * profile.num_parameters
    assert profile.buffer_bytes == 40
    assert (profile.hidden_size, profile.num_heads, profile.num_kv_heads) == (64, 4, 2)
    assert profile.head_share == 0.5  # the head's gradient comes first, the embedding's last
    assert profile.tied_share == 0.0


def test_tied_weights_count_once() -> None:
    profile = profile_model(Model(tied=True), sequence_length=32)
    assert profile.root.numel == 6400
    assert profile.tied_share == 1.0
    assert profile.head_share == 1.0


def test_weights_that_blocks_share_belong_to_the_root() -> None:
    model = Model()
    first, second = list(model.layers)[:2]
    assert isinstance(first, Layer)
    assert isinstance(second, Layer)
    first.up.weight = second.up.weight
    profile = profile_model(model, sequence_length=32)
    assert profile.num_parameters == 2 * 6400 + 3 * LAYER_NUMEL - 64 * 128
    assert profile.root.numel == 2 * 6400 + 64 * 128


def test_frozen_weights_are_not_trained() -> None:
    model = Model()
    model.requires_grad_(False)
    for layer in model.layers:
        layer.q.requires_grad_(True)
    profile = profile_model(model, sequence_length=32)
    assert profile.num_trainable == 3 * (64 * 64 + 64)
    assert profile.trainable_bytes == 4 * profile.num_trainable
    assert profile.head_share == 0.0
    assert profile.whole.blocks[0].kept.at(1, 32) > 0


def test_blocks_of_two_kinds_are_kept_apart() -> None:
    model = nn.Sequential(
        nn.Linear(8, 8),
        nn.Sequential(*(nn.Linear(8, 8, bias=index < 3) for index in range(5))),
    )
    profile = profile_model(model, example_inputs=torch.zeros(2, 8))
    assert [(kind.count, kind.weights.numel) for kind in profile.blocks] == [(3, 72), (2, 64)]
    assert profile.root.numel == 72
    assert [each.output.at(1, 1) for each in profile.whole.blocks] == [32, 32]


def test_activations_grow_with_tokens_and_pairs() -> None:
    profile = profile_model(Model(), sequence_length=64, device="cpu")
    fused = profile_model(Model(), sequence_length=64)
    kept, without_scores = profile.whole.blocks[0].kept, fused.whole.blocks[0].kept
    assert kept.per_pair > 0  # dropout in attention is not fused on a CPU
    assert without_scores.per_pair == pytest.approx(0.0, abs=1.0)
    longer = profile_model(Model(), sequence_length=128, device="cpu").whole.blocks[0].kept
    assert kept.at(3, 128) == pytest.approx(longer.at(3, 128), rel=0.01)


def test_kept_bytes_are_those_that_autograd_saves() -> None:
    """Against the sum over saved tensors of a real forward, by hooks of torch."""
    model = Model().eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    storages: dict[int, tuple[torch.Tensor, int]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = (tensor, storage.nbytes())
        return tensor

    ids = torch.zeros(2, 64, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, labels=ids)["loss"]
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers(), ids)}
    saved = sum(size for pointer, (_, size) in storages.items() if pointer not in own)
    assert loss.requires_grad
    whole = profile_model(model, example_inputs={"input_ids": ids, "labels": ids}).whole
    kept = whole.stem.at(2, 1) + 3 * whole.blocks[0].kept.at(2, 1) + whole.head.at(2, 1)
    assert kept == pytest.approx(saved, rel=0.05)


def test_operations_are_counted() -> None:
    profile = profile_model(Model(), sequence_length=32)
    matrices = sum(parameter.numel() for parameter in Layer().parameters() if parameter.dim() == 2)
    forward = profile.whole.blocks[0].forward_flops.at(1, 32)
    backward = profile.whole.blocks[0].backward_flops.at(1, 32)
    assert forward == pytest.approx(2 * 32 * matrices + 4 * 32 * 32 * 64)
    assert backward == pytest.approx(2 * 2 * 32 * matrices + 10 * 32 * 32 * 64)  # attention computes its scores again
    assert profile.whole.root_forward_flops.at(1, 32) == pytest.approx(2 * 32 * 6400)


def test_mixed_precision_is_measured_for_whole_and_for_gathered_weights() -> None:
    full = profile_model(Model(), sequence_length=32)
    mixed = profile_model(Model(), sequence_length=32, precision="bf16")
    assert full.whole is full.sharded
    kept = [each.blocks[0].kept.at(1, 32) for each in (full.whole, mixed.whole, mixed.sharded)]
    assert kept[0] > kept[1] > kept[2]  # autocast keeps hidden states in float32
    assert kept[2] == pytest.approx(kept[0] / 2, rel=0.1)
    matrices = sum(parameter.numel() for parameter in Layer().parameters() if parameter.dim() == 2)
    assert mixed.whole.blocks[0].cast_bytes >= 2 * matrices
    assert mixed.whole.root_cast_bytes == 2 * 6400
    assert mixed.sharded.blocks[0].cast_bytes == mixed.sharded.root_cast_bytes == 0
    assert (mixed.compute_dtype, full.compute_dtype) == ("bfloat16", "float32")


def test_any_module_is_measured_with_an_example() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 30 * 30, 10))
    images = torch.zeros(4, 3, 32, 32)
    profile = profile_model(model, example_inputs=images, loss=lambda out: F.cross_entropy(out, torch.zeros(4).long()))
    assert profile.blocks == ()
    assert profile.sequence_length is None
    out = 8 * 30 * 30 * 4  # the convolution's output of one image, and the norm's
    assert profile.whole.head.at(1, 1) == pytest.approx(2 * out, rel=0.1)
    assert profile.whole.root_forward_flops.at(1, 1) == pytest.approx(2 * 900 * 8 * 27 + 2 * 7200 * 10)


def test_meta_models_are_measured_alike() -> None:
    with torch.device("meta"):
        model = Model()
    assert profile_model(model, sequence_length=32) == profile_model(Model(), sequence_length=32)


def test_the_model_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = Model(tied=True).eval()
    model.layers[1].train()
    before = copy.deepcopy(model.state_dict())
    parameters, generator = list(model.parameters()), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    profile_model(model, sequence_length=32, precision="bf16")
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert model.head.weight is model.embed.weight
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in parameters)
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(generator, torch.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_module_under_two_names_is_left_as_it_was() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    weight = shared.weight
    profile_model(model, example_inputs=torch.zeros(2, 8))
    assert shared.weight is weight


def test_a_model_that_fails_is_left_as_it_was() -> None:
    model = Model()
    with pytest.raises(ConfigError, match=r"Model could not be measured .*\("):
        profile_model(model, example_inputs={"input_ids": torch.zeros(2, 3), "labels": torch.zeros(2, 3)})
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(not isinstance(p, torch._subclasses.FakeTensor) for p in model.parameters())


def test_the_plan_of_tensor_parallel_says_what_is_divided() -> None:
    profile = profile_model(Model(), sequence_length=32, tp_plan=PLAN)
    biases_whole = 64 + 64  # those of row-wise layers, added once
    weights = profile.blocks[0].weights
    assert weights.tp_numel == LAYER_NUMEL - 2 * 64 - biases_whole
    assert profile.tp_sizes[0] == 2
    assert all(2 % size == 0 for size in profile.tp_sizes if size <= 2)
    assert profile.root.tp_numel == 0
    assert weights.share(2) == pytest.approx(1 - weights.tp_numel / weights.numel / 2)
    assert 0.3 < profile.whole.blocks[0].tp_share < 0.9
    assert profile_model(Model(), sequence_length=32).tp_sizes == ()


def test_a_plan_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="no_such"):
        profile_model(Model(), sequence_length=32, tp_plan={"no_such.*": "colwise"})


@pytest.mark.parametrize(
    ("model", "kwargs", "match"),
    [
        (nn.Linear(2, 2), {}, "Linear does not say what it is given"),
        (Model(), {}, "`sequence_length=None` says nothing"),
        (Model(), {"sequence_length": 0}, "`sequence_length=0` says nothing"),
        (Model(), {"sequence_length": 8, "example_inputs": torch.zeros(2, 8)}, "`sequence_length=8` has no effect"),
        (nn.Linear(2, 2), {"example_inputs": ()}, "`example_inputs` of type tuple hold no tensor with a batch"),
        (Model(), {"measured": False, "example_inputs": torch.zeros(2)}, "`measured=False` takes activations"),
        (nn.Linear(2, 2), {"measured": False, "sequence_length": 8}, "needs a model of equal blocks"),
    ],
)
def test_what_cannot_be_profiled_is_refused(model: nn.Module, kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        profile_model(model, **kwargs)


# By formula


def test_the_formula_is_the_papers() -> None:
    """Korthikanti et al., arXiv:2205.05198, equation 2: s b h (34 + 5 a s / h) bytes a block, in 16 bits."""
    sizes = TransformerSizes(
        hidden_size=1024, num_layers=4, num_heads=16, vocab_size=1000, attention="eager", dropout=True
    )
    for precision, dtype in (("bf16", "float32"), ("no", "bfloat16")):
        profile = transformer_profile(sizes, precision=precision, dtype=dtype)  # type: ignore[arg-type]
        batch, length = 3, 2048
        expected = length * batch * 1024 * (34 + 5 * 16 * length / 1024)
        assert profile.sharded.blocks[0].kept.at(batch, length) == expected


def test_the_formula_counts_weights_and_operations() -> None:
    sizes = TransformerSizes(hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=100, gated=True)
    profile = transformer_profile(sizes)
    matrices = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 256
    assert profile.blocks[0].weights.numel == matrices + 2 * 64
    assert profile.root.numel == 2 * 6400 + 64
    flops = profile.whole.blocks[0].forward_flops.at(1, 10)
    assert flops == 2 * 10 * matrices + 4 * 100 * 64
    assert profile.tp_sizes == (2,)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_formula_and_measure_agree(precision: MixedPrecision) -> None:
    """To a quarter: a formula knows nothing of the model's own code, such as keys that are repeated for each query."""
    measured, formula = (
        profile_model(Model(), sequence_length=64, precision=precision, measured=each) for each in (True, False)
    )
    assert formula.notes != ()
    assert measured.blocks == formula.blocks

    def sizes(profile: ModelProfile) -> tuple[float, float]:
        return profile.whole.blocks[0].kept.at(1, 64), profile.sharded.blocks[0].kept.at(1, 64)

    for one, other in zip(sizes(measured), sizes(formula), strict=True):
        assert other == pytest.approx(one, rel=0.25)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_layers": 0}, "`num_layers=0` makes no transformer"),
        ({"num_kv_heads": 3}, "does not divide `num_heads=4`"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], match: str) -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 100, **changes}
    with pytest.raises(ConfigError, match=match):
        TransformerSizes(**sizes)


def test_growth_is_a_polynomial() -> None:
    growth = Growth(per_sample=1, per_token=2, per_pair=3)
    assert growth.at(5, 7) == 5 * (1 + 2 * 7 + 3 * 49)
    assert (growth + growth).at(5, 7) == growth.times(2).at(5, 7) == 2 * growth.at(5, 7)
