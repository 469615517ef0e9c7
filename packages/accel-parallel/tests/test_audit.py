"""What is refused or told before the first step: wrapped models, shared parameters, stale optimizers, other ranks."""

from __future__ import annotations

import copy
import logging
from dataclasses import astuple
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW

from accel_parallel.audit import audit_model, audit_optimizer
from accel_parallel.audit_ranks import Entry, _checksums, _sum_of_bits, audit_ranks, differing_values, first_difference
from accel_parallel.dtype_table import changed_dtypes, dtype_table, dtypes_of, format_dtype_table
from accel_state import ConfigError, Process
from accel_state.testing import run_ranks

# Wrapped twice


def wrapped_models() -> dict[str, str]:
    """On a rank: what is said of a model that exchanges gradients by itself, by how it does."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    def linear() -> nn.Module:
        return nn.Linear(2, 2)

    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    cases = {
        "parallel": nn.DataParallel(linear()),
        "data parallel": DistributedDataParallel(linear()),
        "compiled": nn.ModuleDict({"_orig_mod": DistributedDataParallel(linear())}),  # as torch.compile holds it
        "inside": nn.ModuleDict({"head": linear(), "body": DistributedDataParallel(linear())}),
        "sharded": fully_shard(linear(), mesh=mesh),
        "sharded by FSDP1": FullyShardedDataParallel(linear(), device_id=torch.device("cpu")),
    }
    told = {}
    for name, model in cases.items():
        with pytest.raises(ConfigError, match="would average its gradients twice") as caught:
            audit_model(model, name="model number 0", prepared=[])
        told[name] = str(caught.value)
    return told


def test_a_model_that_exchanges_gradients_already_is_refused() -> None:
    for told in run_ranks(wrapped_models, 2):
        assert "model number 0 is a DataParallel already" in told["parallel"]
        assert "model number 0 is a DistributedDataParallel already" in told["data parallel"]
        assert "model number 0 is a DistributedDataParallel already" in told["compiled"]
        assert "holds, as `body`, a DistributedDataParallel already" in told["inside"]
        assert "Pass model.module" in told["inside"]
        assert "is a FSDPModule already" in told["sharded"]
        assert "before `fully_shard`" in told["sharded"]
        assert "is a FullyShardedDataParallel already" in told["sharded by FSDP1"]


def test_a_class_of_that_name_elsewhere_is_no_wrapper() -> None:
    class DataParallel(nn.Linear): ...

    audit_model(DataParallel(1, 1), name="it", prepared=[])


class Shared(nn.Module):
    """Something around a part that others may have too."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.own = nn.Linear(1, 1)


def test_a_trained_part_of_two_models_is_refused_where_gradients_are_exchanged() -> None:
    part = nn.Linear(2, 3)
    first, second = Shared(part), nn.Sequential(part)
    with pytest.raises(ConfigError, match=r"`0.weight` of it \(Sequential\) is a parameter of a Shared.*or freeze"):
        audit_model(second, name="it", prepared=[first], is_exchanged=True)
    audit_model(second, name="it", prepared=[first])
    audit_model(nn.Sequential(copy.deepcopy(part)), name="it", prepared=[first], is_exchanged=True)
    part.requires_grad_(False)
    audit_model(second, name="it", prepared=[first], is_exchanged=True)


# Stale optimizers


def said_of(optimizer: torch.optim.Optimizer, *models: nn.Module) -> str:
    with pytest.raises(ConfigError, match="that belong to no prepared model") as caught:
        audit_optimizer(optimizer, name="it", models=models, others=[])
    return str(caught.value)


def test_the_likely_cause_of_a_stale_optimizer_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = SGD(model.parameters(), lr=0.1)
    replaced = copy.deepcopy(model).bfloat16()
    message = said_of(optimizer, nn.Linear(9, 9), replaced)
    assert "They have the shapes of parameters of the Sequential, such as `0.weight`" in message
    assert "`assign=True` or by building or copying the model anew (float32 on cpu there, bfloat16 on cpu" in message
    assert "prepare both together" in message


def test_an_optimizer_of_a_model_without_weights_is_told_so() -> None:
    with torch.device("meta"):
        empty = nn.Linear(2, 3)
    optimizer = AdamW(empty.parameters())
    empty.load_state_dict(nn.Linear(2, 3).state_dict(), assign=True)
    assert "while the model was on the meta device" in said_of(optimizer, empty)


def test_an_optimizer_of_another_model_is_told_so() -> None:
    model = nn.Linear(2, 3)
    assert "belong to another model" in said_of(SGD(nn.Linear(2, 4).parameters(), lr=0.1), model)
    # What the optimizer holds rightly is no candidate for what it lacks.
    assert "belong to another model" in said_of(SGD([*model.parameters(), nn.Parameter(torch.ones(3))], lr=0.1), model)


def stale_after_sharding() -> str:
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(4, 2)
    optimizer = SGD(model.parameters(), lr=0.1)
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
    return said_of(optimizer, model)


def test_an_optimizer_from_before_sharding_is_told_so() -> None:
    for message in run_ranks(stale_after_sharding, 2):
        assert "before an earlier `prepare` replaced those by their shards. Prepare both together, in one" in message


# Other ranks


def build(kind: str) -> tuple[list[nn.Module], list[torch.optim.Optimizer]]:
    """On a rank: models and optimizers that are the same everywhere but for what `kind` says of rank 1."""
    torch.manual_seed(0)
    odd = Process.current().topology.rank == 1
    model: Any = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    models: list[nn.Module] = [model]
    if kind == "seed" and odd:
        nn.init.normal_(model[0].weight)
        model[1].running_mean.fill_(1)
    elif kind == "frozen":
        model.requires_grad_(False)
        model[0].bias.data += float(odd)
    elif odd:
        match kind:
            case "shape":
                model[0] = nn.Linear(2, 4)
            case "dtype":
                model[0].bfloat16()
            case "freezing":
                model[0].bias.requires_grad_(False)
            case "more":
                model.append(nn.Linear(3, 1))
            case "less":
                del model[1]
            case "order":
                models = [nn.Sequential(model[1], model[0])]
            case "class":
                models = [nn.ModuleList(model)]
            case "models":
                models.append(nn.Linear(1, 1))
    parameters = list(model.parameters())
    optimizers = [SGD(parameters[:-1] if kind == "optimizer" and odd else parameters, lr=0.1)]
    return models, optimizers


def audited(kinds: list[str]) -> dict[str, tuple[str | None, list[str]]]:
    """On a rank: for each kind, the refusal, and what was logged."""
    return {kind: audited_one(kind) for kind in kinds}


def audited_one(kind: str) -> tuple[str | None, list[str]]:
    models, optimizers = build(kind)
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("accel_parallel.audit_ranks")
    logger.addHandler(handler)
    try:
        audit_ranks(models, optimizers, first=3)
    except ConfigError as error:
        return str(error), records
    finally:
        logger.removeHandler(handler)
    return None, records


REFUSALS = {
    "shape": "`0.weight` of model number 3 is a trained torch.float32 of shape (3, 2) on rank 0 and a trained "
    "torch.float32 of shape (4, 2) on rank 1",
    "dtype": "`0.weight` of model number 3 is a trained torch.float32 of shape (3, 2) on rank 0 and a trained "
    "torch.bfloat16 of",
    "freezing": "`0.bias` of model number 3 is a trained torch.float32 of shape (3,) on rank 0 and a constant",
    "more": "Where rank 0 has `1.running_mean` of model number 3, rank 1 has `2.weight` of model number 3",
    "less": "Where rank 0 has `1.weight` of model number 3, rank 1 has optimizer number 0 of the call",
    "class": "model number 3 is a Sequential on rank 0 and a ModuleList on rank 1",
    "models": "Where rank 0 has optimizer number 0 of the call, rank 1 has model number 4",
    "optimizer": "is a SGD of [4] parameters in its groups on rank 0 and a SGD of [3] parameters",
    "order": "`0.weight` of model number 3 is a trained torch.float32 of shape (3, 2) on rank 0 and a trained "
    "torch.float32 of shape (3,) on rank 1",
}


def test_ranks_that_built_something_else_are_refused() -> None:
    for told in run_ranks(audited, 3, list(REFUSALS)):
        for kind, expected in REFUSALS.items():
            refusal, _ = told[kind]
            assert refusal is not None, kind
            assert expected in refusal
            assert "Build the same models and optimizers on every rank" in refusal


def test_values_that_differ_are_told_once() -> None:
    first, *others = run_ranks(audited, 3, ["none", "seed", "frozen"])
    assert all(told == (None, []) for other in others for told in other.values())
    assert first["none"] == (None, [])
    assert first["seed"][0] is first["frozen"][0] is None
    (message,) = first["seed"][1]
    assert "on rank(s) 1: `0.weight` of model number 3, `1.running_mean` of model number 3. Those of rank" in message
    assert "`set_seed`" in message
    (message,) = first["frozen"][1]
    assert "`0.bias` of model number 3. Nothing sends them, since that model has nothing to train" in message


def test_one_process_has_nobody_to_differ_from() -> None:
    assert run_ranks(audited, 1, ["shape"]) == [{"shape": (None, [])}]


NAMES = st.sampled_from(["a", "b", "c"])
ENTRIES = st.lists(st.builds(Entry, NAMES, NAMES, st.none() | NAMES), max_size=4)


@given(st.lists(ENTRIES, min_size=1, max_size=4))
def test_a_difference_is_found_where_there_is_one(of_ranks: list[list[Entry]]) -> None:
    structures = [[(entry.name, entry.described) for entry in entries] for entries in of_ranks]
    found = first_difference(of_ranks)
    assert (found is None) == all(structure == structures[0] for structure in structures)
    if found is None:
        for entry, ranks in differing_values(of_ranks):
            index = next(i for i, each in enumerate(of_ranks[0]) if each is entry)  # equal ones may stand before it
            assert ranks
            assert all(of_ranks[rank][index].checksum != entry.checksum for rank in ranks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.complex64])
def test_checksums_tell_values_apart(dtype: torch.dtype) -> None:
    one = torch.arange(8).to(dtype)
    same, other, again, strided = _checksums([one, one.flip(0), one.clone(), torch.stack([one, one]).t()[:, 0]])
    assert same == again == strided != other


def test_what_has_no_values_has_no_checksum() -> None:
    assert _checksums([torch.ones(2, device="meta"), torch.eye(2).to_sparse()]) == [None, None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8, torch.complex64])
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU whose way of adding could be tried"),
            ],
        ),
    ],
)
def test_sums_of_bits_tell_values_apart(device: str, dtype: torch.dtype) -> None:
    one = torch.arange(8).to(dtype).to(device)
    other = one.clone()
    other[3] += 1
    assert _sum_of_bits(one).item() == _sum_of_bits(one.flip(0)).item() != _sum_of_bits(other).item()


# Dtypes


def mixed() -> nn.Module:
    layers = (nn.Embedding(10, 4), nn.Linear(4, 4).bfloat16(), nn.BatchNorm1d(4), nn.Linear(4, 10, bias=False))
    model = nn.Sequential(*layers)
    model[3].weight = model[0].weight
    model[1].requires_grad_(False)
    return model


def test_a_table_counts_each_kind_once() -> None:
    rows = [astuple(row) for row in dtype_table(mixed())]
    assert rows == [
        ("parameter", torch.float32, True, 3, 48, 192, "0.weight"),
        ("parameter", torch.bfloat16, False, 2, 20, 40, "1.weight"),
        ("buffer", torch.float32, False, 2, 8, 32, "2.running_mean"),
        ("buffer", torch.int64, False, 1, 1, 8, "2.num_batches_tracked"),
    ]


def test_a_table_is_printed_in_columns() -> None:
    first, second, *_ = format_dtype_table(dtype_table(mixed())).splitlines()
    assert first.split() == ["kind", "dtype", "trained", "tensors", "elements", "MiB", "such", "as"]
    assert second.split() == ["parameter", "float32", "yes", "3", "48", "0.00", "0.weight"]
    assert first.index("such as") == second.index("0.weight")


def test_changes_are_found_by_name() -> None:
    model = mixed()
    before = dtypes_of(model)
    assert changed_dtypes(before, model) == {}
    model[1].float()
    assert changed_dtypes(before, model) == {
        "1.weight": (torch.bfloat16, torch.float32),
        "1.bias": (torch.bfloat16, torch.float32),
    }
