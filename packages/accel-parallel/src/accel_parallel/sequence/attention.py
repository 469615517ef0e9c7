"""Attention of prepared models, sent over a group that shares each sequence: `SequenceParallel`."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from accel_parallel.forwards import Forward, dress, forward_of, is_replaced, replace_forward, restore_forward
from accel_parallel.parallelism import ContextBackend, TorchContextParallelConfig
from accel_parallel.sequence.arguments import CallAdapter, check_model
from accel_parallel.sequence.context import attend_in_context, gather_sequence
from accel_parallel.sequence.layout import SequenceKind, SequenceLayout, shard_sequence
from accel_parallel.sequence.ring import TorchRing
from accel_parallel.sequence.ulysses import attend_by_heads
from accel_state.errors import ConfigError

__all__ = ["SequenceParallel", "exchanges"]

_ATTENTION = functional.scaled_dot_product_attention
_HEADS = functional.multi_head_attention_forward
_KIND = "sequence"


class SequenceParallel:
    """Lets models work on parts of sequences as if each rank had the whole.

    `shard` cuts a batch, `attach` makes the attention of a model reach over all parts, `unshard` puts outputs together.
    Everything else in a model works on one token at a time and needs nothing; what mixes neighbouring tokens by other
    means, such as a convolution along the sequence, is not seen here and would stop at the edges of a part.

    Attention is caught where torch's ``scaled_dot_product_attention`` is called, while a forward of an attached module
    or of any part of it runs; so too when activation checkpointing runs that part again in backward. A forward in which
    none was caught raises. One object serves several models.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        kind: SequenceKind,
        backend: ContextBackend = "native",
        options: TorchContextParallelConfig | None = None,
        device_type: str = "cpu",
        tp_size: int = 1,
    ) -> None:
        """
        Args:
            group: the ranks that share each sequence, two or more.
            kind: what is exchanged in attention.
            backend: ``"torch"`` leaves ``"context"`` to torch's ring attention, inside `context_parallel`.
            options: of that backend.
            device_type: where the models are.
            tp_size: into how many parts tensor parallel divides the heads.

        Raises:
            ConfigError: for a group of one, and a backend that the device has no kernels for.
        """
        self.group = group
        self.layout = SequenceLayout(kind=kind, size=group.size(), rank=group.rank())
        self._tp_size = tp_size
        self._ring: TorchRing | None = None
        if backend == "torch":
            self._ring = TorchRing(group, device_type=device_type, options=options)
        # Compiled graphs end before an exchange and go on after it; what is between runs as it is.
        eagerly: Callable[..., Any] = torch.compiler.disable
        self._mode = _Catcher(eagerly(self._attend), eagerly(self._attend_heads))
        self._calls = _Calls()
        self._cut: dict[int, bool] = {}
        """Lengths of the parts that were handed out, and whether the last of that length was of a padded sequence."""
        self._ring_open = False

    def check(self, model: nn.Module) -> None:
        """Refuse what `attach` would. Changes nothing.

        Raises:
            ConfigError: for a model whose attention cannot be divided, or that is attached already.
        """
        if is_replaced(model, _KIND):
            raise ConfigError(
                f"{type(model).__name__} is attached to a group already, and would exchange everything twice. Attach a "
                f"model once."
            )
        check_model(model, self.layout, tp_size=self._tp_size)
        self._adapter_of(model)

    def attach(self, model: nn.Module) -> None:
        """Called once for each model, by `Strategy.prepare`, before it is wrapped, recomputed or compiled.

        A copy of the model made later is attached too.

        Raises:
            ConfigError: as of `check`.
        """
        self.check(model)
        made: dict[Forward, Forward] = {}
        for module in model.modules():
            inner = forward_of(module)
            if module is model:
                replace_forward(module, _KIND, self._whole_forward(inner, self._adapter_of(model)), inner)
            elif self._ring is None and _may_attend(module):
                if inner not in made:
                    made[inner] = self._part_forward(inner)
                replace_forward(module, _KIND, made[inner], inner)

    def detach(self, model: nn.Module) -> None:
        """Undo `attach`, on the model or a copy. One that is not attached stays as it is.

        Raises:
            ConfigError: if its forward was replaced again since then.
        """
        for module in model.modules():
            restore_forward(module, _KIND, how="Detaching from sequence parallelism")

    def shard(
        self,
        batch: Mapping[str, Any],
        *,
        causal: bool = True,
        pad: bool = True,
        seq_dims: Mapping[str, int | None] | None = None,
    ) -> dict[str, Any]:
        """This rank's part of a batch that is the same on every rank of the group. See `shard_sequence`."""
        self._refuse_ring("`shard`")
        part = shard_sequence(batch, self.layout, causal=causal, pad=pad, seq_dims=seq_dims)
        length = part["position_ids"].shape[-1]
        tokens = next(batch[name] for name in ("input_ids", "inputs_embeds", "labels", "shift_labels") if name in batch)
        self._cut[length] = length * self.layout.size != tokens.shape[1]
        return part

    def unshard(self, tensor: torch.Tensor, *, dim: int = 1, length: int | None = None) -> torch.Tensor:
        """Every rank must call this. The whole sequence in its order, on each rank, from its parts along `dim`.

        Gradients flow back: each rank gets the sum of what all ranks want of its part. So a loss that every rank
        computes alike from the whole counts once where gradients are averaged over the ranks, as strategies do.

        Args:
            tensor: this rank's part, of one shape on all ranks.
            dim: of the sequence.
            length: of the sequence before it was padded; what comes after is cut off.
        """
        self._refuse_ring("`unshard`")
        whole = gather_sequence((tensor,), self.layout, self.group, dim=dim)[0]
        return whole if length is None else whole.narrow(dim, 0, length)

    @contextmanager
    def context_parallel(
        self,
        *,
        buffers: Sequence[torch.Tensor] | None = None,
        buffer_seq_dims: Sequence[int] | None = None,
        no_restore_buffers: set[torch.Tensor] | None = None,
    ) -> Iterator[None]:
        """While open, each of `buffers` holds this rank's part of itself, and afterwards the whole again, uncopied.

        Labels are cut as they are: shift them before, and give them as ``shift_labels``.

        Args:
            buffers: tensors that hold whole sequences, the same on every rank. None that gradients flow to.
            buffer_seq_dims: the dimension of the sequence in each.
            no_restore_buffers: those of them that keep the part, so that the whole is freed at once.

        Raises:
            ConfigError: for lengths that cannot be divided, and arguments that do not belong together.
        """
        buffers, dims = list(buffers or ()), list(buffer_seq_dims or ())
        kept = no_restore_buffers or set()
        _check_buffers(buffers, dims, kept)
        for buffer, dim in zip(buffers, dims, strict=True):
            self.layout.check_length(buffer.shape[dim])
        if self._ring is not None:
            self._ring_open = True
            try:
                with self._ring.open(buffers, dims, kept):
                    yield
            finally:
                self._ring_open = False
            return
        whole = [None if any(buffer is each for each in kept) else buffer.data for buffer in buffers]
        for buffer, dim in zip(buffers, dims, strict=True):
            buffer.data = self.layout.take(buffer.data, dim=dim)
            self._cut[buffer.shape[dim]] = False
        try:
            yield
        finally:
            for buffer, data in zip(buffers, whole, strict=True):
                if data is not None:
                    buffer.data = data

    def _adapter_of(self, model: nn.Module) -> CallAdapter | None:
        like_transformers = hasattr(getattr(model, "config", None), "_attn_implementation")
        return CallAdapter(model, self.layout, self.group) if like_transformers else None

    def _part_forward(self, inner: Forward) -> Forward:
        """The forward of a part of a model: alone where activation checkpointing runs that part again."""

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self._run(inner, module, args, kwargs)

        dress(forward, inner)
        return forward

    def _whole_forward(self, inner: Forward, adapter: CallAdapter | None) -> Forward:
        """The forward of an attached model, which has to have called attention."""

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls = self._calls
            before, padding = calls.attended, calls.ends_in_padding
            if adapter is not None:
                args, kwargs, calls.ends_in_padding = adapter.adapt(args, kwargs)
            try:
                output = self._run(inner, module, args, kwargs)
            finally:
                calls.ends_in_padding = padding
            self._check_attended(module, calls.attended - before)
            return output

        dress(forward, inner)
        return forward

    def _run(self, inner: Forward, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calls = self._calls
        if calls.entered or self._ring is not None:
            return inner(module, *args, **kwargs)
        calls.entered = True
        try:
            with self._mode:
                return inner(module, *args, **kwargs)
        finally:
            calls.entered = False

    def _check_attended(self, module: nn.Module, times: int) -> None:
        name = type(module).__name__
        if self._ring is not None:
            if not self._ring_open:
                raise ConfigError(
                    f"`{name}` was called outside `maybe_context_parallel`, where `cp_backend='torch'` exchanges "
                    f"nothing, so that attention saw one rank's tokens only. Put forward and backward inside it."
                )
        elif times == 0:
            raise ConfigError(
                f"No attention of `{name}` was seen in its forward, though each of {self.layout.size} ranks has a part "
                f"of the sequence only: what it computes by other means ends at the edge of that part. Have it call "
                f"`torch.nn.functional.scaled_dot_product_attention`, or prepare it without `cp_size` and `sp_size`."
            )

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """In place of torch's function, with its arguments."""
        calls = self._calls
        if calls.inside:
            return _ATTENTION(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        self._check_call(query, key, attn_mask, is_causal)
        query, key, value = _as_autocast(query, key, value)
        attend: Callable[..., torch.Tensor] = attend_in_context if self.layout.kind == "context" else attend_by_heads
        calls.attended += 1
        calls.inside = True
        try:
            return attend(
                query, key, value, layout=self.layout, group=self.group, attn_mask=attn_mask, dropout_p=dropout_p,
                is_causal=is_causal, scale=scale, enable_gqa=enable_gqa,
            )  # fmt: skip
        finally:
            calls.inside = False

    def _check_call(
        self, query: torch.Tensor, key: torch.Tensor, attn_mask: torch.Tensor | None, is_causal: bool
    ) -> None:
        tokens, layout = query.shape[-2], self.layout
        if query.dim() != 4 or key.shape[-2] != tokens:
            raise ConfigError(
                f"Attention was called with queries of shape {tuple(query.shape)} and keys of {tuple(key.shape)}; what "
                f"is exchanged over {layout.size} ranks are parts of one sequence, of shape (batch, heads, tokens, "
                f"width) and as many tokens in both. Cut both alike, and use no cache."
            )
        if is_causal and attn_mask is not None:
            raise ConfigError("Attention was called with `attn_mask` and `is_causal=True`. Give one of them.")
        if tokens not in self._cut:
            raise ConfigError(
                f"Attention was called with {tokens} tokens, and no batch was cut to parts of that length: the whole "
                f"would be taken for a part. Cut the batch with `shard_sequence` or `maybe_context_parallel` first, in "
                f"evaluation too."
            )
        if not is_causal and attn_mask is None and (self._cut[tokens] or self._calls.ends_in_padding):
            raise ConfigError(
                f"Attention that is not causal was called on a sequence that ends in padding, which the other tokens "
                f"would attend to. Give sequences of one length, a multiple of {layout.multiple}, or a mask of four "
                f"dimensions (batch, 1, queries, all keys)."
            )

    def _attend_heads(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the function behind ``nn.MultiheadAttention``, which hides what it calls from modes."""
        attended = self._calls.attended
        names = {**vars(functional), "scaled_dot_product_attention": self._attend}
        copy = types.FunctionType(_HEADS.__code__, names, _HEADS.__name__, _HEADS.__defaults__, _HEADS.__closure__)
        copy.__kwdefaults__ = _HEADS.__kwdefaults__
        answer = copy(*args, **kwargs)
        if self._calls.attended == attended:
            raise ConfigError(
                "`nn.MultiheadAttention` was asked for its weights, which it computes from one rank's tokens. Call it "
                "with `need_weights=False`."
            )
        return answer

    def _refuse_ring(self, what: str) -> None:
        if self._ring is not None:
            raise ConfigError(
                f"{what} was called with `cp_backend='torch'`, which cuts sequences in its own way, inside "
                f"`maybe_context_parallel` only. Use that, or set `cp_backend='native'`."
            )


class _Catcher(TorchFunctionMode):
    """Sees every torch function of the thread while it is entered, and passes on all but attention."""

    def __init__(self, attend: Callable[..., Any], attend_heads: Callable[..., Any]) -> None:
        super().__init__()
        self._attend = attend
        self._attend_heads = attend_heads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ATTENTION:
            return self._attend(*args, **(kwargs or {}))
        if func is _HEADS:
            return self._attend_heads(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Calls(threading.local):
    """What one thread is in. Backward may run a part of a model again in a thread of its own."""

    def __init__(self) -> None:
        self.entered = False
        """Whether attention is being caught."""
        self.attended = 0
        """How often it has been, so far."""
        self.inside = False
        """Whether the attention that runs is the one over all ranks."""
        self.ends_in_padding = False
        """Whether the mask of the outermost forward says so."""


def exchanges(module: nn.Module) -> bool:
    """Whether attention in this part of a model reaches over the tokens of other ranks."""
    return is_replaced(module, _KIND)


def _may_attend(module: nn.Module) -> bool:
    """Anything but torch's own layers without parts, which call no attention."""
    return not type(module).__module__.startswith("torch.nn.") or next(module.children(), None) is not None


def _as_autocast(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """What autocast would make of attention's arguments, so that the smaller ones travel."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [tensor.to(dtype) if tensor.dtype in _ROUNDED else tensor for tensor in tensors]


_ROUNDED = (torch.float32, torch.float16, torch.bfloat16)


def _check_buffers(buffers: Sequence[torch.Tensor], dims: Sequence[int], kept: set[torch.Tensor]) -> None:
    if len(buffers) != len(dims):
        raise ConfigError(
            f"{len(buffers)} buffer(s) came with {len(dims)} `buffer_seq_dims`. Give one dimension for each."
        )
    strangers = [tuple(each.shape) for each in kept if not any(each is buffer for buffer in buffers)]
    if strangers:
        raise ConfigError(
            f"`no_restore_buffers` holds a tensor of shape {strangers[0]} that is none of `buffers`. Name only those."
        )
    if any(buffer.requires_grad for buffer in buffers):
        raise ConfigError(
            "A buffer that requires gradients was to be cut in place, where they would be lost. Cut what it is made of."
        )
