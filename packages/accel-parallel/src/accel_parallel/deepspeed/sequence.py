"""Sequences divided over ranks by DeepSpeed's own attention, as its ALST has it (arXiv:2506.13996).

Outside attention each rank holds a part of every sequence; inside, DeepSpeed's ``UlyssesSPAttentionHF`` exchanges heads
for tokens and calls what the model was loaded with. DeepSpeed would register it for every model of the process, under
groups of its own making, and drop every mask. Here it is called with the group that there is, for the models that are
attached, and with the masks that it can take; others are refused.

No ``mpu`` is handed to ``deepspeed.initialize``. Ranks of one sequence are averaged over like any others, and with a
loss that counts each token once that is exact at every stage. Given DeepSpeed's own ``mpu``, stages 0 to 2 of 0.19 add
up where stage 3 averages.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from accel_parallel.forwards import Forward
from accel_parallel.parallelism import REFUSED_ATTENTION, DeepSpeedSequenceParallelConfig, ParallelismConfig
from accel_parallel.sequence.arguments import attention_configs
from accel_parallel.sequence.attention import SequenceParallel
from accel_parallel.sequence.ulysses import check_heads
from accel_state.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["DeepSpeedUlysses", "sequence_along"]

_REGISTRY = "ALL_ATTENTION_FUNCTIONS"
"""What the modules that define models of transformers call the table in which attention is looked up."""

Attention = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class _Caught:
    """One entry of such a table, and what stands there instead."""

    registry: MutableMapping[str, Any]
    name: str
    core: Attention
    caught: Attention


class DeepSpeedUlysses(SequenceParallel):
    """As `SequenceParallel`, with the attention of DeepSpeed, for models of transformers.

    Attention is caught where a model looks its implementation up by name, while a forward of an attached module or of
    any part of it runs. Other models of the process find what they did before.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        options: DeepSpeedSequenceParallelConfig | None = None,
        tp_size: int = 1,
    ) -> None:
        """
        Args:
            group: the ranks that share each sequence, two or more.
            options: what the user says about lengths and attention.
            tp_size: into how many parts tensor parallel divides the heads.

        Raises:
            ConfigError: for a group of one.
        """
        super().__init__(group, kind="ulysses", tp_size=tp_size)
        self.options = options or DeepSpeedSequenceParallelConfig()
        self._caught: list[_Caught] = []
        self._attached: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._made: dict[tuple[Any, ...], nn.Module] = {}
        """DeepSpeed's attention, which is made for one shape, by what it was made for."""

    def check(self, model: nn.Module) -> None:
        """Refuse what `attach` would. Changes nothing.

        Raises:
            ConfigError: also for anything but a model of transformers that looks its attention up.
        """
        name = type(model).__name__
        implementation = self._implementation_of(model)
        if implementation == "sdpa":
            super().check(model)
        else:
            self._check_other(model, implementation)
        for config in attention_configs(model):
            self._check_key_heads(config, name)
        if not self._entries(model, implementation):
            raise ConfigError(
                f"`{name}` does not look its attention up under {implementation!r} in transformers' "
                f"`{_REGISTRY}`, where `sp_backend='deepspeed'` replaces it, so that each rank would attend to its own "
                f"tokens only. Use a model that does, or `sp_backend='native'`."
            )

    def attach(self, model: nn.Module) -> None:
        self.check(model)
        for registry, name in self._entries(model, self._implementation_of(model)):
            if not any(each.registry is registry and each.name == name for each in self._caught):
                core = registry[name]
                caught = self._instead_of(core, name)
                registry[name] = caught
                self._caught.append(_Caught(registry, name, core, caught))
        super().attach(model)
        self._attached.add(model)

    def detach(self, model: nn.Module) -> None:
        super().detach(model)
        self._attached.discard(model)
        if not self._attached:
            self.release()

    def release(self) -> None:
        """Put back what attention was looked up as; attached models cannot be called any more."""
        for each in reversed(self._caught):
            if each.registry.get(each.name) is not each.caught:
                continue  # another one stands on it, and goes on to what was there before
            del each.registry[each.name]  # an entry of its own, above those that come with transformers
            if each.registry.get(each.name) is not each.core:
                each.registry[each.name] = each.core
        self._caught.clear()
        self._made.clear()

    def shard(self, batch: Mapping[str, Any], **options: Any) -> dict[str, Any]:
        """As of `SequenceParallel`.

        Raises:
            ConfigError: also for another length than `sp_seq_length`.
        """
        part = super().shard(batch, **options)
        length, whole = self.options.sp_seq_length, part["position_ids"].shape[-1] * self.layout.size
        if length is not None and whole != length:
            raise ConfigError(
                f"A batch of sequences of {whole} tokens was to be divided, and `sp_seq_length={length}` says what all "
                f"have. Pad or cut them to it, or leave `sp_seq_length` out."
            )
        return part

    # What is refused

    def _implementation_of(self, model: nn.Module) -> str:
        """How the model computes attention.

        Raises:
            ConfigError: for other models than those of transformers, and other attention than was asked for.
        """
        name = type(model).__name__
        found = {str(config._attn_implementation) for config in attention_configs(model)}
        if not found:
            raise ConfigError(
                f"`{name}` is no model of transformers (no `config` of it names an attention), and DeepSpeed's "
                f"attention is for those. Use `sp_backend='native'`."
            )
        asked = self.options.sp_attn_implementation
        implementation = asked or min(found)
        if found != {implementation}:
            raise ConfigError(
                f"`{name}` computes attention by {' and '.join(map(repr, sorted(found)))}, and "
                + (f"`sp_attn_implementation={asked!r}`" if asked else "DeepSpeed replaces one of them")
                + f'. Load it with `attn_implementation="{implementation}"`.'
            )
        if implementation in REFUSED_ATTENTION:
            raise ConfigError(
                f"`{name}` computes attention by {implementation!r}, with {REFUSED_ATTENTION[implementation]}. Load it "
                f'with `attn_implementation="sdpa"`.'
            )
        return implementation

    def _check_other(self, model: nn.Module, implementation: str) -> None:
        """What `check_model` says about models whose attention is not torch's."""
        name = type(model).__name__
        for config in attention_configs(model):
            if getattr(config, "is_encoder_decoder", False):
                raise ConfigError(
                    f"`{name}` has an encoder and a decoder (`is_encoder_decoder=True`), two sequences of which one "
                    f"attends to the other, and one sequence is what is divided. Prepare it without `sp_size`."
                )
            rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
            kind = rope.get("rope_type", rope.get("type"))
            if kind in ("dynamic", "longrope"):
                raise ConfigError(
                    f"`{name}` scales its rotary embeddings by the length in sight (`rope_type={kind!r}`), which "
                    f"differs from rank to rank. Choose one that does not depend on it, such as 'linear' or 'yarn'."
                )
        self._adapter_of(model)

    def _check_key_heads(self, config: Any, name: str) -> None:
        heads = getattr(config, "num_attention_heads", None)
        if not isinstance(heads, int):
            return
        size, shared = self.layout.size, getattr(config, "num_key_value_heads", None) or heads
        check_heads(heads // self._tp_size, size, what=f"`{name}`")
        shared //= self._tp_size
        if shared % size and size % shared:
            raise ConfigError(
                f"`{name}` has {shared} key head(s), and DeepSpeed deals out to {size} ranks what one of the two "
                f"numbers divides. Use `sp_backend='native'`, which repeats heads as often as needed, or another "
                f"`sp_size`."
            )

    def _entries(self, model: nn.Module, implementation: str) -> list[tuple[MutableMapping[str, Any], str]]:
        """Where the modules of a model look their attention up."""
        found: dict[int, MutableMapping[str, Any]] = {}
        for module in model.modules():
            for cls in type(module).__mro__:
                registry = getattr(sys.modules.get(cls.__module__), _REGISTRY, None)
                if isinstance(registry, MutableMapping) and registry.get(implementation) is not None:
                    found[id(registry)] = registry
        return [(registry, implementation) for registry in found.values()]

    # While a model runs

    def _run(self, inner: Forward, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        calls = self._calls
        if calls.entered:
            return inner(module, *args, **kwargs)
        calls.entered = True
        try:
            return inner(module, *args, **kwargs)
        finally:
            calls.entered = False

    def _instead_of(self, core: Attention, name: str) -> Attention:
        # Compiled graphs end before an exchange and go on after it; what is between runs as it is.
        eagerly: Callable[..., Any] = torch.compiler.disable
        exchanged = eagerly(partial(self._exchange, core, name))

        def attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return exchanged(module, *args, **kwargs) if self._calls.entered else core(module, *args, **kwargs)

        return attend

    def _exchange(
        self,
        core: Attention,
        name: str,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """In place of an attention of transformers, with its arguments."""
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        self._check_call(query, key, attention_mask, bool(causal) and attention_mask is None)
        self._check_shapes(query, key, value, attention_mask, name)
        tokens = query.shape[-2]
        places = kwargs.get("position_ids")
        if not isinstance(places, torch.Tensor) or places.dim() != 2:  # DeepSpeed insists on some
            places = self.layout.positions(tokens * self.layout.size, query.device).expand(query.shape[0], -1)
        kwargs["position_ids"] = places.contiguous()
        self._calls.attended += 1
        with _same_groups(module):
            attention = self._attention_for(core, query, key)
            answer, weights = attention(module, query, key, value, attention_mask, *args, **kwargs)
        # (batch, tokens, heads * width), where transformers' own have heads apart, and some models count on it
        return answer.unflatten(-1, (query.shape[1], query.shape[-1])), weights

    def _check_shapes(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        name: str,
    ) -> None:
        if key.shape != value.shape or query.shape[-1] != key.shape[-1]:
            raise ConfigError(
                f"Attention was called with queries, keys and values of widths {query.shape[-1]}, {key.shape[-1]} and "
                f"{value.shape[-1]}, and DeepSpeed's takes one width. Use `sp_backend='native'`."
            )
        if attention_mask is None:
            return
        if name != "sdpa":
            raise ConfigError(
                f"Attention was called with a mask of shape {tuple(attention_mask.shape)} under {name!r}, which leaves "
                f'such masks out. Load the model with `attn_implementation="sdpa"`, or pass no mask.'
            )
        whole = query.shape[-2] * self.layout.size
        shape = tuple(attention_mask.shape)
        if len(shape) != 4 or shape[1] != 1 or shape[2] not in (1, whole) or shape[3] != whole:
            raise ConfigError(
                f"Attention was called with a mask of shape {shape}, and it runs over {whole} tokens, of which this "
                f"rank holds {query.shape[-2]}: a mask over those says nothing of the others. Pass none, or one of "
                f"shape (batch, 1, {whole}, {whole})."
            )

    def _attention_for(self, core: Attention, query: torch.Tensor, key: torch.Tensor) -> nn.Module:
        batch, heads, tokens, width = query.shape
        length = None if self.options.is_variable else tokens
        made_for = (core, batch, heads, key.shape[1], width, length)
        if made_for not in self._made:
            from deepspeed.runtime.sequence_parallel.ulysses_sp import (  # type: ignore[import-not-found,import-untyped,unused-ignore]
                UlyssesSPAttentionHF,
            )

            self._made[made_for] = UlyssesSPAttentionHF(
                attn=core,
                batch_size=batch,
                attn_head_count=heads,
                attn_head_size=width,
                kv_head_count=key.shape[1],
                num_hidden_layers=1,  # counted in a mode for debugging only
                process_group=self.group,
                seq_length_is_variable=length is None,
                local_seq_length=length,
                global_seq_length=None if length is None else length * self.layout.size,
            )
        return self._made[made_for]


def sequence_along(mesh: DeviceMesh, parallelism: ParallelismConfig) -> SequenceParallel | None:
    """What divides sequences along ``sp`` of a mesh with that axis and ``tp``; ``None`` where there is one rank."""
    if mesh["sp"].size() == 1:
        return None
    group, tp_size = mesh["sp"].get_group(), mesh["tp"].size()
    if parallelism.sp_backend == "native":
        return SequenceParallel(group, kind="ulysses", tp_size=tp_size)
    return DeepSpeedUlysses(group, options=parallelism.sp_handler, tp_size=tp_size)


@contextmanager
def _same_groups(module: nn.Module) -> Iterator[None]:
    """Keep the module's number of queries to a key, which DeepSpeed writes where it repeats keys."""
    times = getattr(module, "num_key_value_groups", None)
    try:
        yield
    finally:
        if times is not None:
            module.num_key_value_groups = times
