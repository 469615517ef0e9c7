"""Which tokens of a sequence each rank of a group holds, and batches cut to those. Pure: nothing is exchanged here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn import functional

from accel_state.errors import ConfigError

__all__ = ["IGNORED_LABEL", "SequenceKind", "SequenceLayout", "shard_sequence"]

SequenceKind = Literal["context", "ulysses"]
"""``"context"`` exchanges keys and values in attention, ``"ulysses"`` heads for tokens."""

IGNORED_LABEL = -100
"""What cross entropy leaves out of its sum, by torch's own default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceLayout:
    """How `size` ranks divide one sequence. Every method is a pure function of the arguments.

    For ``"context"`` the sequence is cut into ``2 * size`` chunks and rank *r* holds chunks *r* and
    ``2 * size - 1 - r``, so that every rank has as many pairs of query and key under a causal mask (Llama 3 report,
    arXiv:2407.21783, section 3.3.2). For ``"ulysses"`` it holds part *r* of `size` (arXiv:2309.14509).
    """

    kind: SequenceKind
    """Which of the two."""
    size: int
    """Ranks that share the sequence."""
    rank: int
    """This rank's number among them."""

    def __post_init__(self) -> None:
        if self.kind not in ("context", "ulysses"):
            raise ConfigError(f"`kind={self.kind!r}` is no way to divide a sequence. Use 'context' or 'ulysses'.")
        if self.size < 2:
            raise ConfigError(
                f"A group of {self.size} process(es) was to share a sequence, and there is nobody to share it with. "
                f"Set `cp_size` or `sp_size` to 2 or more, or leave sequence parallelism out."
            )
        if not 0 <= self.rank < self.size:
            raise ConfigError(f"`rank={self.rank}` lies outside 0..{self.size - 1}. Pass the rank within the group.")

    @property
    def multiple(self) -> int:
        """What the length of a sequence has to be a multiple of."""
        return 2 * self.size if self.kind == "context" else self.size

    @property
    def shortest(self) -> int:
        """The least length: of two tokens on each rank, as transformers takes one alone for a step of generation."""
        return 2 * self.size

    def padded(self, length: int) -> int:
        """`length` up to the next length that can be divided.

        Raises:
            ConfigError: for a sequence so short that a rank would hold nothing but padding.
        """
        if length < self.shortest:
            raise ConfigError(
                f"A sequence of {length} token(s) cannot be divided over {self.size} ranks: each holds two or more, "
                f"which takes {self.shortest}. Give longer sequences, or fewer ranks along that axis."
            )
        return -(-length // self.multiple) * self.multiple

    def check_length(self, length: int) -> None:
        """Refuse a length that would need padding.

        Raises:
            ConfigError: with the lengths around it.
        """
        if self.padded(length) != length:
            below = length // self.multiple * self.multiple
            raise ConfigError(
                f"A sequence of {length} tokens cannot be divided evenly over {self.size} ranks, which takes a "
                f"multiple of {self.multiple}. Cut it to {below}, or pad it to {self.padded(length)}."
            )

    def spans(self, length: int, rank: int | None = None) -> tuple[tuple[int, int], ...]:
        """First token and end of each piece that a rank (this one) holds, in the order in which it holds them."""
        self.check_length(length)
        rank = self.rank if rank is None else rank
        width = length // self.multiple
        chunks = (rank, self.multiple - 1 - rank) if self.kind == "context" else (rank,)
        return tuple((chunk * width, (chunk + 1) * width) for chunk in chunks)

    def take(self, tensor: torch.Tensor, *, dim: int, rank: int | None = None) -> torch.Tensor:
        """The part of a rank (this one) of a tensor that holds the whole sequence along `dim`: a copy, contiguous."""
        spans = self.spans(tensor.shape[dim], rank)
        return torch.cat([tensor.narrow(dim, first, end - first) for first, end in spans], dim)

    def join(self, parts: Sequence[torch.Tensor], *, dim: int) -> torch.Tensor:
        """The whole sequence from the parts of all ranks, in order of rank: the inverse of `take`."""
        if self.kind == "ulysses":
            return torch.cat(list(parts), dim)
        width = parts[0].shape[dim] // 2
        heads = [part.narrow(dim, 0, width) for part in parts]
        tails = [part.narrow(dim, width, width) for part in reversed(parts)]
        return torch.cat(heads + tails, dim)

    def positions(self, length: int, device: torch.device | str | None = None) -> torch.Tensor:
        """Where the tokens of this rank stand in the whole sequence: integers, one a token."""
        return torch.cat([torch.arange(first, end, device=device) for first, end in self.spans(length)])


def shard_sequence(
    batch: Mapping[str, Any],
    layout: SequenceLayout | None,
    *,
    causal: bool = True,
    pad: bool = True,
    seq_dims: Mapping[str, int | None] | None = None,
) -> dict[str, Any]:
    """A batch of whole sequences, the same on every rank of the group -> this rank's part of it.

    The length is that of ``input_ids`` (or ``inputs_embeds``, or ``labels``). Every tensor that has it in its second
    dimension is cut there; everything else passes as it is. Beyond that:

    * ``labels`` of a causal model are shifted first, since position *i* is compared with label *i + 1*, which may be on
      another rank. They come back as ``shift_labels``, the name under which transformers' losses take them, and
      ``labels`` is gone: a model would shift it again, within the part.
    * ``position_ids`` are added, or cut: places in the whole sequence, of the shape of the tokens.
    * a length that cannot be divided is padded at the end: ids and masks with 0, labels with -100.
    * a mask of four dimensions (..., queries, keys) is cut along the queries for ``"context"`` and kept for
      ``"ulysses"``, which is what attention takes there.

    Args:
        batch: tensors by name, and anything else.
        layout: who holds what. ``None``, where nobody shares a sequence, cuts nothing and gives the same names, so that
            a loop runs alike in any world; ``labels`` stay there too, for a model that computes its own loss.
        causal: whether a token attends to earlier ones only. ``False`` keeps ``labels`` in place, cut, and refuses
            padding, which the other tokens would attend to.
        pad: ``False`` refuses a length that cannot be divided, instead of padding it.
        seq_dims: for names that the rule above would get wrong, the dimension of the sequence; ``None``: do not cut.

    Raises:
        ConfigError: for a batch without a sequence, one too short, padding that was excluded, packed documents, and
            labels that count padding.
    """
    length = _length_of(batch)
    padded = length if layout is None else layout.padded(length)
    if layout is not None and not (causal and pad):
        layout.check_length(length)
    dims = seq_dims or {}
    _refuse_unknown(batch, dims)
    whole = dict(batch)
    if causal:
        _check_causal(whole)
        labels = whole.get("labels") if layout is None else whole.pop("labels", None)
        if isinstance(labels, torch.Tensor) and whole.get("shift_labels") is None:
            whole["shift_labels"] = functional.pad(labels[..., 1:], (0, 1), value=IGNORED_LABEL)
    shard: dict[str, Any] = {}
    for name, value in whole.items():
        dim = dims[name] if name in dims else _sequence_dim(name, value, length)
        shard[name] = value if dim is None or layout is None else _cut(name, value, dim, padded, layout)
    if shard.get("position_ids") is None:
        shard["position_ids"] = _position_ids(batch, padded, layout)
    return shard


def _length_of(batch: Mapping[str, Any]) -> int:
    if not isinstance(batch, Mapping):
        raise ConfigError(
            f"A {type(batch).__name__} was to be cut along its sequence, and which of it are tokens and labels is told "
            f"by names. Give a mapping, such as {{'input_ids': ..., 'labels': ...}}."
        )
    for name in ("input_ids", "inputs_embeds", "labels", "shift_labels"):
        value = batch.get(name)
        if isinstance(value, torch.Tensor) and value.dim() >= 2:
            return int(value.shape[1])
    raise ConfigError(
        f"A batch with {', '.join(f'`{name}`' for name in batch) or 'nothing in it'} was to be cut along its sequence, "
        f"and how long that is shows in none of `input_ids`, `inputs_embeds` and `labels`. Give one of these, of shape "
        f"(batch, sequence, ...), or cut tensors by themselves with `context_parallel`."
    )


def _sequence_dim(name: str, value: object, length: int) -> int | None:
    """Along which dimension a tensor is cut, if at all."""
    if not isinstance(value, torch.Tensor):
        return None
    if name == "position_ids" and value.shape[-1] == length:
        return value.dim() - 1  # (batch, sequence), or with rotary sections in front
    if name == "attention_mask" and value.dim() == 4:
        return 2
    return 1 if value.dim() >= 2 and value.shape[1] == length else None


def _cut(name: str, value: torch.Tensor, dim: int, padded: int, layout: SequenceLayout) -> torch.Tensor:
    if name == "attention_mask" and value.dim() == 4:
        if padded != value.shape[-1]:
            raise ConfigError(
                f"`attention_mask` of shape {tuple(value.shape)} came with a sequence that has to be padded to "
                f"{padded} tokens, and what padding may attend to is not known. Pad the batch and its mask to {padded}."
            )
        if layout.kind == "ulysses" or value.shape[dim] == 1:
            return value
    missing = padded - value.shape[dim]
    if missing:
        if name == "position_ids":  # going on, so that nothing looks like a second document
            more = torch.arange(1, missing + 1, device=value.device, dtype=value.dtype)
            value = torch.cat([value, value[..., -1:] + more], -1)
        else:
            fill = IGNORED_LABEL if name in ("labels", "shift_labels") else 0
            value = functional.pad(value, [0, 0] * (value.dim() - 1 - dim) + [0, missing], value=fill)
    return layout.take(value, dim=dim)


def _position_ids(batch: Mapping[str, Any], padded: int, layout: SequenceLayout | None) -> torch.Tensor:
    tokens = next(batch[name] for name in ("input_ids", "inputs_embeds", "labels", "shift_labels") if name in batch)
    assert isinstance(tokens, torch.Tensor)
    device = tokens.device
    places = torch.arange(padded, device=device) if layout is None else layout.positions(padded, device)
    return places.expand(tokens.shape[0], -1)


def _check_causal(batch: Mapping[str, Any]) -> None:
    """What cannot be seen any more once the sequence is cut. Only looks at values where there is something to check."""
    mask, labels, positions = (batch.get(name) for name in ("attention_mask", "labels", "position_ids"))
    has_mask = isinstance(mask, torch.Tensor) and mask.dim() == 2
    if has_mask and isinstance(labels, torch.Tensor) and bool(((mask == 0) & (labels != IGNORED_LABEL)).any()):
        raise ConfigError(
            "`labels` count tokens that `attention_mask` calls padding, and what those predict depends on the mask, "
            f"which is not applied to them. Set the labels of padding to {IGNORED_LABEL}."
        )
    if mask is None and isinstance(positions, torch.Tensor) and bool((positions.diff(dim=-1) != 1).any()):
        raise ConfigError(
            "`position_ids` start again within a sequence, so several documents are packed in it, and attention over "
            "the whole would mix them. Give one document a sequence, or an `attention_mask` of four dimensions (batch, "
            "1, sequence, sequence) that keeps them apart."
        )


def _refuse_unknown(batch: Mapping[str, Any], names: Iterable[str]) -> None:
    unknown = [name for name in names if not isinstance(batch.get(name), torch.Tensor)]
    if unknown:
        raise ConfigError(
            f"`seq_dims` names {', '.join(f'`{name}`' for name in unknown)}, and the batch has no such tensor. "
            f"It has {', '.join(f'`{name}`' for name in batch)}."
        )
