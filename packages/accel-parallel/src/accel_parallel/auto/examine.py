"""From a module to its profile."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from accel_parallel.auto.formula import TransformerSizes, transformer_profile
from accel_parallel.auto.profile import Footprint, ModelProfile
from accel_state.config import MixedPrecision
from accel_state.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from accel_parallel.auto.census import Census
    from accel_parallel.auto.passes import Inputs, Measuring

__all__ = ["profile_model"]

_COMPOSITE_COPIES = 8
"""What GELU by ``tanh`` keeps where it is written in single operations."""

_LARGEST_TP = 64
"""Most ranks of tensor parallel that are thought of: more devices than a node of today holds."""


def profile_model(
    model: nn.Module,
    *,
    sequence_length: int | None = None,
    example_inputs: torch.Tensor | tuple[Any, ...] | Mapping[str, Any] | None = None,
    loss: Callable[[Any], torch.Tensor] | None = None,
    precision: MixedPrecision = "no",
    tp_plan: Mapping[str, str] | None = None,
    device: torch.device | str = "cuda",
    measured: bool = True,
) -> ModelProfile:
    """What `model` costs to train. Takes no memory for activations and computes nothing; the model is not changed.

    One forward and one backward run on fake tensors, as in training, without the values of any weight: the model may be
    on the meta device. Models of token ids, whose ``config`` has a ``vocab_size``, are given ids of `sequence_length`,
    with labels if they take any; they are measured at two lengths, so that others can be predicted. Others need
    `example_inputs`, and are predicted for batches of such samples.

    Args:
        model: not prepared yet. Parameters that are frozen in training are frozen already.
        sequence_length: tokens of a sample. Refused with `example_inputs`, which have their own.
        example_inputs: what forward takes: a tensor, a tuple, or a mapping of keyword arguments. The first dim of its
            tensors is the batch. Only shapes and dtypes count.
        loss: gives the loss from what forward returns; by default its ``loss``, or else the sum of its tensors.
        precision: mixed precision of the run.
        tp_plan: how modules are divided for tensor parallel; ``None`` takes the plan that the model brings.
        device: what it will be trained on. On a CPU attention with dropout is not fused, and keeps all its scores.
        measured: ``False`` takes activations and operations from the sizes in ``model.config`` by formula instead,
            which knows nothing of the model's code: expect a tenth to a fifth less memory than there is.

    Raises:
        ConfigError: where nothing says what the model is given, or it cannot run on fake tensors.
    """
    from accel_parallel.auto.census import take_census
    from accel_parallel.auto.passes import Measuring

    tp_sizes, divided = _tensor_parallel(model, tp_plan)
    census = take_census(model, divided=divided)
    if not measured:
        if example_inputs is not None or loss is not None:
            raise ConfigError(
                "`measured=False` takes activations from the model's sizes, so `example_inputs` and `loss` have no "
                "effect. Leave them out, or measure."
            )
        footprints, head_share, notes = _by_formula(model, census, sequence_length, precision)
    else:
        measuring = Measuring(model=model, census=census, loss=loss, precision=precision, device=str(device))
        footprints, head_share = _by_measure(measuring, _inputs(model, sequence_length, example_inputs))
        notes = ()
    return ModelProfile(
        name=type(model).__name__, root=census.root, blocks=census.kinds, whole=footprints[0], sharded=footprints[1],
        precision=precision, dtype=census.dtype, buffer_bytes=census.buffer_bytes, head_share=head_share,
        tied_share=census.tied_share,
        hidden_size=census.hidden_size, num_heads=census.num_heads, num_kv_heads=census.num_kv_heads,
        tp_sizes=tp_sizes, sequence_length=sequence_length, notes=notes,
    )  # fmt: skip


def _tensor_parallel(model: nn.Module, plan: Mapping[str, str] | None) -> tuple[tuple[int, ...], frozenset[str]]:
    """Sizes that the plan can divide the model into, and the names of the parameters that it divides."""
    from accel_parallel.tensor.plan import plan_tensor_parallel

    sizes, divided = [], frozenset[str]()
    size = 2
    while size <= _LARGEST_TP:
        try:
            made = plan_tensor_parallel(model, plan=plan, tp_size=size)
        except ConfigError:
            if plan is not None and size == 2:
                raise  # the user's own plan has to fit
        else:
            sizes.append(size)
            divided = frozenset(name for name, each in made.parameters.items() if each.dim is not None)
        size *= 2
    return tuple(sizes), divided


def _by_measure(measuring: Measuring, inputs: tuple[Inputs, ...]) -> tuple[tuple[Footprint, Footprint], float]:
    whole, head_share = measuring.run(inputs, gathered=False)
    if measuring.precision == "no":
        return (whole, whole), head_share
    sharded, _ = measuring.run(inputs, gathered=True)
    return (whole, sharded), head_share


def _inputs(model: nn.Module, sequence_length: int | None, example_inputs: Any) -> tuple[Inputs, ...]:
    from accel_parallel.auto.passes import Inputs

    if example_inputs is not None:
        if sequence_length is not None:
            raise ConfigError(
                f"`sequence_length={sequence_length}` has no effect with `example_inputs`, which have a shape already. "
                f"Leave one of them out."
            )
        return (Inputs.of(example_inputs),)
    accepted = inspect.signature(model.forward).parameters
    if not hasattr(getattr(model, "config", None), "vocab_size") or "input_ids" not in accepted:
        raise ConfigError(
            f"{type(model).__name__} does not say what it is given: its `config` has no `vocab_size`, or its forward "
            f"no `input_ids`. Pass `example_inputs`, such as the first batch of its loader."
        )
    if sequence_length is None or sequence_length < 1:
        raise ConfigError(
            f"`sequence_length={sequence_length}` says nothing about the activations of {type(model).__name__}. Give "
            f"the number of tokens of a sample, or `example_inputs`."
        )
    names = [name for name in ("input_ids", "labels") if name in accepted]
    lengths = (sequence_length,) if sequence_length == 1 else (sequence_length, sequence_length // 2)
    return tuple(Inputs.of_tokens(names, length) for length in lengths)


def _by_formula(
    model: nn.Module, census: Census, sequence_length: int | None, precision: MixedPrecision
) -> tuple[tuple[Footprint, Footprint], float, tuple[str, ...]]:
    config: Any = getattr(model, "config", None)
    config = getattr(config, "text_config", config)
    missing = [name for name in ("hidden_size", "num_heads") if getattr(census, name) is None]
    if len(census.kinds) != 1 or missing or not hasattr(config, "vocab_size") or sequence_length is None:
        raise ConfigError(
            f"`measured=False` needs a model of equal blocks, whose `config` names `hidden_size`, "
            f"`num_attention_heads` and `vocab_size`, and a `sequence_length`; {type(model).__name__} has "
            f"{len(census.kinds)} kind(s) of blocks. Measure it, or pass a `ModelProfile` of your own."
        )
    assert census.hidden_size is not None
    assert census.num_heads is not None
    sizes = TransformerSizes(
        hidden_size=census.hidden_size, num_layers=census.kinds[0].count, num_heads=census.num_heads,
        num_kv_heads=census.num_kv_heads, vocab_size=config.vocab_size,
        intermediate_size=getattr(config, "intermediate_size", None), head_size=getattr(config, "head_dim", None),
        inner_copies=_COMPOSITE_COPIES if getattr(config, "activation_function", "") == "gelu_new" else None,
        dropout=bool(getattr(config, "resid_pdrop", 0) or getattr(config, "hidden_dropout_prob", 0)),
    )  # fmt: skip
    numel = census.kinds[0].weights.numel
    sizes = min((replace(sizes, gated=gated) for gated in (False, True)), key=lambda s: abs(s.matrix_numel - numel))
    made = transformer_profile(sizes, precision=precision, dtype=census.dtype, sequence_length=sequence_length)
    return (made.whole, made.sharded), made.head_share, made.notes
