"""The memory of a model, from its name or as it is, before any of it is loaded."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from accel_bigmodel.estimate.batches import made_up_batch, sequence_length_of
from accel_bigmodel.estimate.fakes import NEEDS_VALUES
from accel_bigmodel.estimate.leftovers import forget_fakes
from accel_bigmodel.estimate.options import EstimateOptions
from accel_bigmodel.estimate.passes import Loss, trace_generation, trace_inference, trace_training
from accel_bigmodel.estimate.result import MemoryEstimate, Run
from accel_bigmodel.estimate.tracker import Peak
from accel_bigmodel.estimate.weights import DTYPES, stored_weights, weights_of
from accel_bigmodel.model_source import ModelDescription, describe_model
from accel_state.errors import ConfigError

__all__ = ["estimate_memory"]

_REFUSALS = (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError, ImportError, AssertionError)
"""What a forward raises that does not like its arguments, or a model that cannot be copied."""


def estimate_memory(
    model: str | nn.Module | ModelDescription,
    options: EstimateOptions | None = None,
    *,
    inputs: Mapping[str, torch.Tensor] | tuple[Any, ...] | torch.Tensor | None = None,
    loss: Loss | None = None,
    dtypes: tuple[str | torch.dtype, ...] = DTYPES,
    on_progress: Callable[[str], None] | None = None,
) -> MemoryEstimate:
    """What `model` needs on one device: its weights in every dtype, its inference, and the peak of its training.

    Weights are counted. Runs are traced: the model's own forward, backward and optimizer step run on tensors without
    values, and what is alive at the worst moment is the answer, so it holds for any model that can be traced. Nothing
    is allocated but bookkeeping, and `model` is left as it is. Caches of ``functools`` that took tensors of a trace are
    emptied; whether anything else did, such as a table in a global variable, the notes of the result say.

    Args:
        model: a name for `describe_model`, what that returned, or any module, on the meta device too.
        options: the run; by default a batch of one with AdamW on a GPU.
        inputs: a batch: arguments by name, a tuple of them, or the only one. Tensors on the meta device will do. With
            it, the sizes in `options` do not matter. Default: one made up by the model's kind. An attention mask is
            taken to hide something, as its values are not looked at.
        loss: from the outputs to the number that backward begins with. Default: ``outputs.loss``, else the mean of the
            first output.
        dtypes: for which weights have a row.
        on_progress: told what is done next.

    Raises:
        ConfigError: if the model is not known, or options cannot be as given. That a run cannot be traced raises
            nothing: its figure is missing, and the reason is there.
    """
    options = options or EstimateOptions()
    tell = on_progress or (lambda _: None)
    tell("reading the model")
    known = _described(model)
    module = known.model
    if module is None:
        stored = known.stored or {}
        return MemoryEstimate(
            title=known.title,
            options=options,
            weights=stored_weights(stored, dtypes=dtypes),
            inference=Run(unknown=_ONLY_HEADERS),
            training=Run(unknown=_ONLY_HEADERS) if options.training else None,
        )
    if options.sequence_length is None and inputs is None and getattr(known.config, "vocab_size", None):
        options = replace(options, sequence_length=sequence_length_of(known.config, options))
    tell("weights")
    weights = weights_of(module, dtypes=dtypes)

    def batch(*, labels: bool, more_tokens: int = 0) -> Any:
        if inputs is not None:
            return inputs
        return made_up_batch(module, known.config, options, labels=labels, more_tokens=more_tokens)

    tell("tracing a forward")
    inference = _run(lambda: trace_inference(module, batch(labels=False), options))
    generation = None
    if options.new_tokens:
        tell(f"tracing the last of {options.new_tokens} new tokens")
        generation = _run(
            lambda: trace_generation(module, batch(labels=False, more_tokens=options.new_tokens - 1), options)
        )
    training = None
    if options.training:
        tell("tracing training steps")
        begun = time.monotonic()
        opaque = _opaque(module, options)
        training = opaque or _run(lambda: trace_training(module, batch(labels=True), options, loss))
        tell(f"traced training steps in {time.monotonic() - begun:.1f} s")
    return MemoryEstimate(
        title=known.title,
        options=options,
        weights=weights,
        inference=inference,
        generation=generation,
        training=training,
        given_inputs=inputs is not None,
        notes=_notes(options, known.config, num_left=forget_fakes()),
    )


_ONLY_HEADERS = (
    "Only the headers of a checkpoint are known, and nothing that says how its model runs. Put the model's "
    "`config.json` beside it, or give the model itself to `estimate_memory`."
)


def _described(model: str | nn.Module | ModelDescription) -> ModelDescription:
    if isinstance(model, ModelDescription):
        return model
    if isinstance(model, nn.Module):
        return ModelDescription(title=type(model).__name__, model=model, config=getattr(model, "config", None))
    return describe_model(model)


def _run(trace: Callable[[], Peak | None]) -> Run:
    """The peak of a trace, or why there is none. Wrong options are still errors."""
    try:
        peak = trace()
    except NEEDS_VALUES as error:
        return Run(
            unknown=f"The model goes on differently by the values of its tensors ({_short(error)}), and a trace has no "
            f"values. Measure a real run with `AllocationTracker`."
        )
    except ConfigError as error:
        return Run(unknown=str(error))
    except _REFUSALS as error:
        return Run(
            unknown=f"The model could not be run on tensors without values ({type(error).__name__}: {_short(error)}). "
            f"If the batch that was made up is not what it takes, give `inputs`."
        )
    return Run(unknown="The model keeps no cache to generate with.") if peak is None else Run(peak=peak)


def _short(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _opaque(model: nn.Module, options: EstimateOptions) -> Run | None:
    """Why the training of a model cannot be traced whose layers keep memory for backward that torch does not show."""
    opaque = (nn.LSTM,) if options.device == "cpu" else (nn.RNN, nn.LSTM, nn.GRU)
    found = next((name for name, module in model.named_modules() if isinstance(module, opaque)), None)
    if found is None:
        return None
    kind = type(model.get_submodule(found)).__name__
    return Run(
        unknown=f"`{found or kind}` is an {kind}, whose kernels keep memory for backward that torch shows only when it "
        f"is taken. Measure a real run with `AllocationTracker`."
    )


def _notes(options: EstimateOptions, config: Any, *, num_left: int) -> tuple[str, ...]:
    notes = []
    if num_left:
        notes.append(
            f"The model's own code kept {num_left} tensors without values, as in a table that it makes once. What it "
            f"computes from now on may be without values too: estimate it in a process of its own."
        )
    if options.device == "cpu":
        notes.append(
            "Memory that kernels take and give back inside is not counted; convolutions need most of it, on small "
            "models more than 5 % of the whole."
        )
    if options.device == "cuda":
        notes.append(
            "By the rules of a GPU: sizes in steps of 512 bytes, attention by the kernel that torch would choose, "
            "optimizers over all parameters at once. The CUDA context, workspaces of libraries and fragmentation come "
            "on top; libraries that bring kernels of their own may need less."
        )
    if options.training:
        kept = "kept until the next ones replace them" if options.keeps_outputs else "let go of before backward"
        notes.append(f"Training from the second step on, with the batch's outputs {kept}.")
    if getattr(config, "quantization_config", None) is not None:
        notes.append("The checkpoint is quantized; runs are estimated as if its layers were not.")
    return tuple(notes)
