"""Plans of tensor parallelism: patterns, what follows from them, and every refusal, without a process."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from accel_parallel.tensor.audit import fitting_sizes
from accel_parallel.tensor.plan import match_plan, plan_tensor_parallel
from accel_state import ConfigError


class Attention(nn.Module):
    def __init__(self, width: int = 32, heads: int = 4, kv_heads: int = 2, *, norm: bool = False) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, kv_heads * self.head_dim)
        self.v = nn.Linear(width, kv_heads * self.head_dim)
        self.o = nn.Linear(width, width)
        if norm:
            self.q_norm = nn.LayerNorm(self.head_dim)


class Layer(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.attn = Attention(**options)
        self.mlp = nn.ModuleDict({"up": nn.Linear(32, 64), "down": nn.Linear(64, 32)})


class Model(nn.Module):
    def __init__(self, *, tied: bool = False, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(48, 32)
        self.layers = nn.ModuleList(Layer(**options) for _ in range(2))
        self.head = nn.Linear(32, 48, bias=False)
        if tied:
            self.head.weight = self.embed.weight


PLAN = {
    "layers.*.attn.q": "colwise",
    "layers.*.attn.k": "colwise",
    "layers.*.attn.v": "colwise",
    "layers.*.attn.o": "rowwise",
    "layers.*.mlp.up": "colwise",
    "layers.*.mlp.down": "rowwise",
}


def planned(model: nn.Module, tp_size: int = 2, **options: Any) -> Any:
    return plan_tensor_parallel(model, tp_size=tp_size, **{"plan": PLAN, **options})


def test_a_plan_lists_modules_and_the_parts_of_parameters() -> None:
    with torch.device("meta"):
        model = Model()
    plan = planned(model, plan={**PLAN, "embed": "embedding_rowwise", "head": "colwise_gather_output"})
    assert plan.modules["layers.1.attn.o"].name == "rowwise"
    assert plan.parameters["layers.0.attn.k.weight"].local_shape == (8, 32)
    assert plan.parameters["layers.0.attn.k.bias"].local_shape == (8,)
    assert plan.parameters["layers.0.mlp.down.weight"].local_shape == (32, 32)
    assert plan.parameters["layers.0.mlp.down.bias"].dim is None
    assert plan.parameters["embed.weight"].local_shape == (24, 32)
    assert plan.parameters["layers.0.norm.weight"].local_shape == (32,)
    assert plan.origin == "given"
    text = str(plan)
    assert "over 2 ranks" in text
    assert "layers.0.attn.q: colwise" in text
    assert "22 of 30 parameters are divided" in text


@pytest.mark.parametrize(
    ("spelling", "meant"),
    [
        ("colwise_rep", "colwise_gather_output"),
        ("rowwise_rep", "rowwise_split_input"),
        ("local_colwise", "colwise"),
        ("replicated", "replicate"),
    ],
)
def test_spellings_of_transformers_4(spelling: str, meant: str) -> None:
    name = "layers.*.mlp.up" if spelling == "local_colwise" else "layers.*.norm" if spelling == "replicated" else "head"
    plan = planned(Model(), plan={**PLAN, name: spelling})
    assert plan.modules[name.replace("*", "0")].name == meant


def test_a_table_divided_as_torch_names_it() -> None:
    assert planned(Model(), plan={**PLAN, "embed": "rowwise"}).modules["embed"].name == "embedding_rowwise"
    assert planned(Model(), plan={**PLAN, "embed": "colwise_rep"}).modules["embed"].name == "embedding_colwise"


def test_the_plan_of_the_model_itself() -> None:
    model: Any = Model()
    model.tp_plan = {**PLAN, "layers.*.experts": "moe_tp_experts"}
    plan = plan_tensor_parallel(model, tp_size=2)
    assert (plan.origin, plan.unmatched, len(plan.modules)) == ("model", ("layers.*.experts",), 12)


def test_the_plan_of_a_base_model_is_read_from_the_config() -> None:
    outer: Any = nn.Module()
    outer.base_model_prefix, outer.model = "model", Model()
    outer.config = SimpleNamespace(base_model_tp_plan=PLAN)
    assert "model.layers.0.attn.q" in plan_tensor_parallel(outer, tp_size=2).modules


def test_ties_are_followed() -> None:
    plan = planned(Model(tied=True), plan={**PLAN, "head": "colwise_gather_output"})
    assert plan.modules["embed"].name == "embedding_rowwise"
    assert plan.derived["embed"] == "shares its weight with head"
    assert plan.parameters["embed.weight"].dim == 0
    plan = planned(Model(tied=True), plan={**PLAN, "embed": "embedding_rowwise"})
    assert plan.modules["head"].name == "colwise_gather_output"


def test_ties_that_cannot_be_followed() -> None:
    with pytest.raises(ConfigError, match=r"`embed` \('embedding_colwise'\) and `head` \('colwise_gather_output"):
        planned(Model(tied=True), plan={**PLAN, "embed": "embedding_colwise", "head": "colwise_gather_output"})
    with pytest.raises(ConfigError, match=r"`embed` \('embedding_colwise'\) and `head` \(None\) share one weight"):
        planned(Model(tied=True), plan={**PLAN, "embed": "embedding_colwise"})


def test_norms_inside_heads_are_summed() -> None:
    plan = planned(Model(norm=True))
    assert plan.modules["layers.0.attn.q_norm"].sums_gradients
    assert "inside each head" in plan.derived["layers.0.attn.q_norm"]
    assert "layers.0.norm" not in plan.modules


def test_loss_parallel_keeps_the_logits_divided() -> None:
    plan = planned(Model(), plan={**PLAN, "head": "colwise_gather_output"}, loss_parallel=True)
    assert plan.modules["head"].exit == "kept"
    model: Any = Model()
    model.get_output_embeddings = lambda: model.head
    assert planned(model, plan={**PLAN, "head": "colwise"}, loss_parallel=True).modules["head"].exit == "kept"
    with pytest.raises(ConfigError, match="divides no output layer"):
        planned(Model(), loss_parallel=True)


def test_numbers_and_parameters_that_modules_hold_themselves() -> None:
    class Counting(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.sinks = 4, nn.Parameter(torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q(x).view(*x.shape[:-1], self.num_heads, -1)  # type: ignore[no-any-return]

    model = nn.ModuleDict({"attn": Counting()})
    plan = {name.removeprefix("layers.*."): style for name, style in PLAN.items() if "attn" in name}
    with pytest.raises(ConfigError, match=r"reads `num_heads=4`.*add 'attn.num_heads': 'divide'.*reads 2"):
        planned(model, plan=plan)
    plan["attn.num_heads"] = "divide"
    with pytest.raises(ConfigError, match=r"`attn.sinks` lies beside divided modules in `attn`.*Add 'attn.sinks'"):
        planned(model, plan=plan)
    result = planned(model, plan={**plan, "attn.sinks": "colwise"})
    assert {name: style.name for name, style in result.values.items()} == {
        "attn.num_heads": "divide",
        "attn.sinks": "divide",
    }
    assert result.parameters["attn.sinks"].local_shape == (2,)
    with pytest.raises(ConfigError, match=r"`attn.num_heads` the style 'rowwise', but it is a whole number"):
        planned(model, plan={**plan, "attn.num_heads": "rowwise"})
    with pytest.raises(ConfigError, match=r"gives `attn.q` the style 'colwise' and names its own `attn.q.bias` too"):
        planned(model, plan={**plan, "attn.sinks": "divide", "attn.q.bias": "replicate"})


SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 48}


@pytest.mark.parametrize(
    ("tp_size", "message"),
    [
        (3, "`tp_size=3` does not divide `num_attention_heads=4`.*Set `tp_size` to 2;"),
        (4, "`tp_size=4` does not divide `num_key_value_heads=2`.*Set `tp_size` to 2;"),
        (1, "`tp_size=1` divides nothing"),
        (True, "`tp_size=True` divides nothing"),
    ],
)
def test_sizes_that_do_not_fit(tp_size: int, message: str) -> None:
    model: Any = Model()
    model.config = SimpleNamespace(**SIZES)
    with pytest.raises(ConfigError, match=message):
        planned(model, tp_size)


def test_sizes_are_called_as_users_know_them() -> None:
    mlp = {name: style for name, style in PLAN.items() if "mlp" in name}
    model: Any = Model()
    with pytest.raises(ConfigError, match=r"divide `layers.0.mlp.up.weight.shape\[0\]=64`.*2 or 4 or 8 or 16 or 32"):
        planned(model, 3, plan=mlp)
    with pytest.raises(ConfigError, match=r"`tp_size=4` does not divide `layers.0.attn.k.heads=2`"):
        planned(model, 4)
    model.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**SIZES))
    with pytest.raises(ConfigError, match=r"`tp_size=3` does not divide `intermediate_size=64`"):
        planned(model, 3, plan=mlp)
    with pytest.raises(ConfigError, match=r"`tp_size=32` does not divide `vocab_size=48`.*to 2 or 4 or 8 or 16;"):
        planned(model, 32, plan={**mlp, "embed": "embedding_rowwise"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.*.mpl.up": "colwise"}, r"'layers.\*.mpl.up' .* matches nothing.*nearest is 'layers.\*.mlp.up'"),
        ({"layers.*.mlp.up": "columnwise"}, "'columnwise', which is no style.*Supported: 'colwise'"),
        ({"layers.*.norm": "sequence_parallel"}, "along the sequence, which this version does not"),
        ({"layers.*.mlp.up": "packed_colwise"}, "Use 'colwise_gather_output' and"),
        ({"layers.*.mlp": "moe_tp_experts"}, "mixture of experts"),
        ({"layers.*.norm": "colwise"}, "`layers.0.norm` the style 'colwise', which divides a torch.nn.Linear"),
        ({"head": "embedding_rowwise"}, "divides a torch.nn.Embedding, but it is a torch.nn.modules.linear.Linear"),
        ({"embed": "colwise"}, "`embed` the style 'colwise', which divides a torch.nn.Linear"),
        ({"head": "divide"}, "module `head` the style 'divide', which is for a parameter"),
        ({"head": "colwise"}, "`head` is 'colwise', so each rank has a part.*Use 'colwise_gather_output'"),
        ({"head": "rowwise"}, "`head` is 'rowwise', so it takes each rank's part.*Use 'rowwise_split_input'"),
        ({"layers.*.mlp.down": "replicate"}, "`layers.0.mlp.up` is 'colwise', so each rank has a part"),
        ({"layers.*.attn.*": "replicate"}, r"`layers.0.attn.q` the style 'colwise' by .* and 'replicate' by"),
    ],
)  # fmt: skip
def test_refused(change: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(Model(), plan={**PLAN, **change})


def test_nothing_to_divide() -> None:
    with pytest.raises(ConfigError, match="Model brings no tensor-parallel plan, and `tp_plan=None` names nothing"):
        plan_tensor_parallel(Model(), tp_size=2)
    with pytest.raises(ConfigError, match=r"`tp_plan=\{\}` names nothing"):
        planned(Model(), plan={})
    with pytest.raises(ConfigError, match="divides nothing"):
        planned(Model(), plan={"head": "replicate"})


def test_a_plan_whose_names_a_wrapper_has_changed_is_refused() -> None:
    wrapper: Any = nn.ModuleDict({"base_model": Model()})
    wrapper.tp_plan = PLAN
    with pytest.raises(ConfigError, match=r"None of the \d+ patterns.*ModuleDict brings.*wrapper.*`dp_shard_size`"):
        plan_tensor_parallel(wrapper, tp_size=2)


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(8, 24), nn.Linear(8, 8)


def test_fused_matrices_need_a_word() -> None:
    with pytest.raises(ConfigError, match=r"`qkv` is 'colwise', and by its name .*or 'colwise_by_head'"):
        planned(Fused(), plan={"qkv": "colwise", "o": "rowwise"})
    planned(Fused(), plan={"qkv": "colwise_by_head", "o": "rowwise"})
    planned(Fused(), plan={"qkv": "colwise_gather_output", "o": "rowwise_split_input"})
    model: Any = Fused()
    model.tp_plan = {"qkv": "colwise", "o": "rowwise"}  # its author knows
    plan_tensor_parallel(model, tp_size=2)
    planned(model, plan=model.tp_plan)


def test_a_partner_further_away_in_the_same_layer() -> None:
    """As BERT has it: attention.self.query and attention.output.dense, in each of several layers."""
    inner, outer = (nn.ModuleDict({name: nn.Linear(8, 8)}) for name in ("query", "dense"))
    layer = nn.ModuleDict({"self": inner, "output": outer})
    model = nn.ModuleDict({"layers": nn.ModuleList([layer])})
    planned(model, plan={"layers.*.self.query": "colwise", "layers.*.output.dense": "rowwise"})
    with pytest.raises(ConfigError, match=r"`layers.0.self.query` is 'rowwise', so it takes each rank's part"):
        planned(model, plan={"layers.*.self.query": "rowwise", "layers.*.output.dense": "colwise"})


@pytest.mark.parametrize(
    ("extra", "refused"),
    [
        (lambda: nn.LayerNorm(8), False),  # acts on the whole width: a part of it has another size
        (lambda: nn.LayerNorm(5), False),
        (lambda: nn.Embedding(16, 8), False),
        (lambda: nn.LayerNorm(4), True),  # may act on groups of a part
        (lambda: nn.Linear(8, 1), True),  # may be a gate of a part
        (lambda: nn.PReLU(), True),
    ],
)
def test_neighbours_that_may_act_on_a_part(extra: Any, refused: bool) -> None:
    plan = {"up": "colwise", "down": "rowwise"}
    model = nn.ModuleDict({"up": nn.Linear(8, 32), "extra": extra(), "down": nn.Linear(32, 8)})
    if refused:
        with pytest.raises(ConfigError, match=r"`extra\..*` lies beside .* in `ModuleDict`.* Add 'extra' to the plan"):
            planned(model, plan=plan)
    else:
        planned(model, plan=plan)
    planned(model, plan={**plan, "extra": "replicate"})


@pytest.mark.parametrize("option", ["max_norm", "scale_grad_by_freq", "sparse"])
def test_tables_that_need_all_rows(option: str) -> None:
    options: dict[str, Any] = {option: True}
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4, **options)})
    with pytest.raises(ConfigError, match=f"`embed` has `{option}="):
        planned(model, plan={"embed": "embedding_rowwise"})


def test_modules_that_do_not_call_their_parts() -> None:
    attention = nn.ModuleDict({"inner": nn.MultiheadAttention(8, 2)})
    with pytest.raises(ConfigError, match=r"`inner.out_proj` is in a MultiheadAttention"):
        planned(attention, plan={"inner.out_proj": "rowwise_split_input"})
    model = nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8), "rnn": nn.LSTM(8, 8)})
    with pytest.raises(ConfigError, match=r"`rnn` is in a LSTM"):
        planned(model, plan={"up": "colwise", "down": "rowwise"})


def test_weights_that_are_computed() -> None:
    model = nn.ModuleDict({"up": nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), "down": nn.Linear(8, 8)})
    with pytest.raises(ConfigError, match="`up` computes its weight by a parametrization"):
        planned(model, plan={"up": "colwise", "down": "rowwise"})


class Offset(nn.Embedding):
    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return super().forward(index + 2)


def test_tables_with_a_forward_of_their_own_need_trust() -> None:
    model: Any = nn.ModuleDict({"embed": Offset(8, 4)})
    with pytest.raises(ConfigError, match="Offset, whose forward is another"):
        planned(model, plan={"embed": "embedding_rowwise"})
    model.tp_plan = {"embed": "embedding_rowwise"}
    plan_tensor_parallel(model, tp_size=2)


COMPONENT = st.sampled_from(["layers", "0", "1", "17", "attn", "q"])
NAMES = st.lists(st.lists(COMPONENT, min_size=1, max_size=4).map(".".join), unique=True)


@given(names=NAMES, data=st.data())
def test_a_star_is_one_component(names: list[str], data: st.DataObject) -> None:
    if not names:
        return
    name = data.draw(st.sampled_from(names))
    stars = data.draw(st.lists(st.booleans(), min_size=name.count(".") + 1, max_size=name.count(".") + 1))
    pattern = ".".join("*" if star else part for part, star in zip(name.split("."), stars, strict=True))
    found, unmatched = match_plan({pattern: "colwise"}, names)
    expected = {
        other
        for other in names
        if other.count(".") == name.count(".")
        and all(a in ("*", b) for a, b in zip(pattern.split("."), other.split("."), strict=True))
    }
    assert set(found) == expected
    assert not unmatched
    assert match_plan({pattern: "colwise", name: "rowwise"}, names)[0][name] == "rowwise"


@given(sizes=st.dictionaries(st.text(), st.integers(1, 512), max_size=5), size=st.integers(2, 600))
def test_fitting_sizes_divide_everything(sizes: dict[str, int], size: int) -> None:
    assert (size in fitting_sizes(sizes)) == (bool(sizes) and all(each % size == 0 for each in sizes.values()))
    assert math.prod(fitting_sizes(sizes)[:1]) in {1, *fitting_sizes(sizes)}


def test_dots_in_patterns_are_dots() -> None:
    with pytest.raises(ConfigError, match=re.escape("'a.b' in the tensor-parallel plan matches nothing")):
        match_plan({"a.b": "colwise"}, ["axb"])
