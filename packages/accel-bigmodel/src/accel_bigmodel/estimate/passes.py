"""A forward, or whole training steps, run on fakes, and what was alive at the worst moment of each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from accel_bigmodel.estimate.blocks import Blocks, checkpoint_blocks
from accel_bigmodel.estimate.fakes import GroupedProducts, fake_like, fake_model, one_sequence_each, quiet_fakes
from accel_bigmodel.estimate.leftovers import TracingMode
from accel_bigmodel.estimate.optimizers import make_optimizer
from accel_bigmodel.estimate.options import EstimateOptions
from accel_bigmodel.estimate.rules import CudaRules
from accel_bigmodel.estimate.tracker import OTHER, AllocationTracker, Peak
from accel_state.dtypes import DTYPE_OF_PRECISION
from accel_state.errors import ConfigError

__all__ = ["CACHE", "Loss", "cached_tensors", "trace_generation", "trace_inference", "trace_training"]

CACHE = "key-value cache"
_CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What models of transformers call it, the newest name first: those that know it warn of the others."""

Loss = Callable[[Any], torch.Tensor]
"""From the outputs of a model to the number that backward begins with."""

_CUDA_GRANULARITY_BYTES = 512
"""Sizes that CUDA's caching allocator hands out are multiples of it (c10/cuda/CUDACachingAllocator.h)."""
_STEP = "temporaries of the optimizer"
_DIVIDES: Mapping[str, tuple[str, ...]] = {
    "none": (), "ddp": (), "zero1": ("states",), "zero2": ("states", "gradients"),
    "zero3": ("states", "gradients", "weights"), "fsdp": ("states", "gradients", "weights"),
}  # fmt: skip


def trace_inference(model: nn.Module, batch: Any, options: EstimateOptions) -> Peak:
    """The peak of a forward without gradients: of a model that generates, the prompt's, and its cache."""
    return _with_cache_named(lambda known: _infer(model, batch, None, options, known))


def trace_generation(model: nn.Module, batch: Any, options: EstimateOptions) -> Peak | None:
    """The peak of the forward of one more token after those of `batch`; ``None`` where the model keeps no cache."""
    accepted = inspect.signature(model.forward).parameters
    name = next((each for each in _CACHE_NAMES if each in accepted), None)
    if name is None:
        return None
    return _with_cache_named(lambda known: _infer(model, batch, name, options, known))


def _with_cache_named(run: Callable[[Mapping[int, str]], tuple[Peak, set[int]]]) -> Peak:
    """Run twice: what is cache is known only once the forward is over."""
    _, cached = run({})
    return run(dict.fromkeys(cached, CACHE))[0]


def _infer(
    model: nn.Module, batch: Any, cache_name: str | None, options: EstimateOptions, known: Mapping[int, str]
) -> tuple[Peak, set[int]]:
    with _fakes(options, autocast=False, packed=_packed(batch), known=known) as (mode, tracker), torch.no_grad():
        copied = fake_model(model, mode, dtype=options.weights_dtype).eval()
        _register_model(copied, tracker)
        given = fake_like(batch, mode, dtype=_batch_dtype(copied))
        tracker.register("inputs", tree_leaves(given))
        tracker.reset_peak()
        tracker.moment = "forward"
        outputs = _call(copied, given)
        if cache_name is not None:
            cache = _cache_of(outputs)
            tracker.register(CACHE, cached_tensors(cache))
            following = _next_token(given, outputs, cache_name, cache)
            del outputs, given
            tracker.reset_peak()
            outputs = copied(**following)
        return tracker.peak, tracker.order_of(cached_tensors(_cache_of(outputs)))


def _next_token(batch: Mapping[str, torch.Tensor], outputs: Any, name: str, cache: Any) -> dict[str, Any]:
    """The arguments of the next token's forward."""
    if "decoder_input_ids" in batch:
        token = batch["decoder_input_ids"][:, :1].clone()
        encoded = (outputs.encoder_last_hidden_state,)
        return {"decoder_input_ids": token, "encoder_outputs": encoded, name: cache, "use_cache": True}
    return {"input_ids": batch["input_ids"][:, :1].clone(), name: cache, "use_cache": True}


def trace_training(model: nn.Module, batch: Any, options: EstimateOptions, loss: Loss | None = None) -> Peak:
    """The peak of a training step, from the second one on, when the optimizer has its states.

    Raises:
        ConfigError: if the outputs hold no loss and no tensor that one could be made of.
    """
    flat = options.sharding in ("zero3", "fsdp") and options.mixed_precision != "no"
    compute = DTYPE_OF_PRECISION[options.mixed_precision]
    with _fakes(options, autocast=compute is not None and not flat, packed=_packed(batch)) as (mode, tracker):
        copied = fake_model(model, mode, dtype=compute if flat else options.weights_dtype).train()
        _weigh(tracker, options, _widening(model, copied, options) if flat else 1.0)
        if options.checkpointing:
            _checkpoint(copied, options)
        divided = _DIVIDES[options.sharding]
        blocks = Blocks(
            copied, tracker, gathers="weights" in divided, reduces="gradients" in divided, ranks=options.ranks
        )
        _register_model(copied, tracker)
        given = fake_like(batch, mode, dtype=_batch_dtype(copied))
        tracker.register("inputs", tree_leaves(given))
        on_gpu = options.device == "cuda"
        optimizer = make_optimizer(options.optimizer, copied.parameters(), on_gpu=on_gpu)
        if options.sharding == "ddp" and options.ranks > 1:
            trained = [each for each in copied.parameters() if each.requires_grad]
            tracker.add("DDP's buckets", sum(each.numel() * each.element_size() for each in trained))
        held: list[Any] = []
        for number in range(2):
            if number == 1:
                tracker.reset_peak()
            _step(copied, given, options, _Run(tracker, blocks, optimizer, loss or _loss_of, held, flat))
        return tracker.peak


class _Run:
    """What a step works with."""

    def __init__(
        self,
        tracker: AllocationTracker,
        blocks: Blocks,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        held: list[Any],
        flat: bool,
    ) -> None:
        self.tracker = tracker
        self.blocks = blocks
        self.optimizer = optimizer
        self.loss = loss
        self.held = held
        self.flat = flat


def _step(model: nn.Module, batch: Any, options: EstimateOptions, run: _Run) -> None:
    tracker = run.tracker
    # A third micro-batch finds what the second one found.
    for _ in range(min(options.accumulation_steps, 2)):
        tracker.moment = "forward"
        with _autocast(None if run.flat else DTYPE_OF_PRECISION[options.mixed_precision]):
            outputs = _call(model, batch)
            loss = run.loss(outputs)
        run.held[:] = [outputs, loss] if options.keeps_outputs else []
        del outputs
        run.blocks.begin_backward()
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
        run.blocks.end_backward()
    run.blocks.give_gradients()
    tracker.moment, tracker.category, tracker.answer_item = "optimizer step", _STEP, 1.0
    run.optimizer.step()
    tracker.category, tracker.answer_item = OTHER, None
    states = [each for state in run.optimizer.state.values() for each in tree_leaves(dict(state))]
    tracker.register("optimizer states", states)
    run.optimizer.zero_grad()


@contextmanager
def _fakes(
    options: EstimateOptions, *, autocast: bool, packed: bool, known: Mapping[int, str] | None = None
) -> Iterator[tuple[FakeTensorMode, AllocationTracker]]:
    on_gpu = options.device == "cuda"
    tracker = AllocationTracker(granularity_bytes=_CUDA_GRANULARITY_BYTES if on_gpu else 1, known=known)
    with ExitStack() as stack:
        mode = stack.enter_context(TracingMode(allow_non_fake_inputs=True))
        # Kernels that compute a whole layer take memory inside that no trace sees.
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(GroupedProducts())  # type: ignore[no-untyped-call]
        stack.enter_context(quiet_fakes())
        if not packed:
            stack.enter_context(one_sequence_each())
        if on_gpu:
            stack.enter_context(CudaRules(attention=options.attention, autocast=autocast))
        stack.enter_context(tracker)
        yield mode, tracker


@contextmanager
def _autocast(dtype: torch.dtype | None) -> Iterator[None]:
    if dtype is None:
        yield
        return
    with torch.autocast("cpu", dtype=dtype):
        yield


def _register_model(model: nn.Module, tracker: AllocationTracker) -> None:
    tracker.register("weights", model.parameters())
    tracker.register("buffers", model.buffers())


def _weigh(tracker: AllocationTracker, options: EstimateOptions, widening: float) -> None:
    """What part of each category one rank holds."""
    part = 1.0 / options.ranks
    divided = _DIVIDES[options.sharding]
    if "weights" in divided:
        tracker.weights["weights"] = widening * part
    if "gradients" in divided:
        tracker.weights["gradients"] = widening * part
    if "states" in divided:
        tracker.weights["optimizer states"] = tracker.weights[_STEP] = widening * part


def _widening(model: nn.Module, copied: nn.Module, options: EstimateOptions) -> float:
    """How much larger sharded parameters are than what `fully_shard` gathers of them in low precision."""
    wanted = options.weights_dtype
    stored = sum(
        each.numel() * (wanted if wanted is not None and each.is_floating_point() else each.dtype).itemsize
        for each in model.parameters()
    )
    gathered = sum(each.numel() * each.element_size() for each in copied.parameters())
    return stored / gathered if gathered else 1.0


def _checkpoint(model: nn.Module, options: EstimateOptions) -> None:
    autocast = options.mixed_precision != "no" and options.sharding not in ("zero3", "fsdp")

    def rules() -> AbstractContextManager[Any]:
        return CudaRules(attention=options.attention, autocast=autocast) if options.device == "cuda" else nullcontext()

    if checkpoint_blocks(model, again=rules) == 0:
        raise ConfigError(
            f"`checkpointing=True` was given, but `{type(model).__name__}` has no repeated blocks that could run "
            f"again in backward. Leave it out."
        )
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "use_cache", None):
            config.use_cache = False  # type: ignore[union-attr]  # a block that runs again would fill it twice


def _packed(batch: Any) -> bool:
    """Whether a batch says where each token stands, so that several sequences may share a row."""
    return isinstance(batch, Mapping) and "position_ids" in batch


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def _loss_of(outputs: Any) -> torch.Tensor:
    """The loss that a model tells, or the mean of the first output that has a gradient."""
    told = getattr(outputs, "loss", None)
    if isinstance(told, torch.Tensor):
        return told
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, torch.Tensor) and leaf.requires_grad and leaf.is_floating_point():
            return leaf if leaf.dim() == 0 else leaf.mean()
    raise ConfigError(
        "The outputs of the model hold no tensor with a gradient, so no loss can be made of them. Give `loss`, a "
        "function from the outputs to a scalar."
    )


def _batch_dtype(model: nn.Module) -> torch.dtype | None:
    """In what images and sounds come: as the weights, as they would be converted for the model."""
    return next((each.dtype for each in model.parameters() if each.is_floating_point()), None)


def _cache_of(outputs: Any) -> Any:
    found = (getattr(outputs, name, None) for name in _CACHE_NAMES)
    return next((each for each in found if each is not None), None)


def cached_tensors(cache: Any) -> list[torch.Tensor]:
    """The tensors of a cache, however it nests them in its layers."""
    found: list[torch.Tensor] = []
    waiting, seen = [cache], set()
    while waiting:
        each = waiting.pop()
        if id(each) in seen or each is None:
            continue
        seen.add(id(each))
        if isinstance(each, torch.Tensor):
            found.append(each)
        elif isinstance(each, Mapping):
            waiting.extend(each.values())
        elif isinstance(each, (list, tuple)):
            waiting.extend(each)
        elif hasattr(each, "__dict__") and type(each).__module__.split(".")[0] not in ("torch", "builtins"):
            waiting.extend(each for each in vars(each).values() if not isinstance(each, type))
    return found
