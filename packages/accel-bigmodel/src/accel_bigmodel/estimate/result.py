"""An estimate: its parts in bytes, and as a table that says how each was computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from accel_bigmodel.estimate.options import EstimateOptions
from accel_bigmodel.estimate.tracker import Peak
from accel_bigmodel.estimate.weights import Weights
from accel_bigmodel.sizes import format_bytes

__all__ = ["MemoryEstimate", "Run"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What one kind of run needs, or why that is not known."""

    peak: Peak | None = None
    """The worst moment; ``None`` if the run could not be traced."""
    unknown: str = ""
    """Why it could not."""

    @property
    def total_bytes(self) -> int | None:
        """At the worst moment."""
        return None if self.peak is None else self.peak.total_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """The memory that a model needs on one device."""

    title: str
    options: EstimateOptions
    weights: tuple[Weights, ...]
    inference: Run
    """A forward without gradients: of a model that generates, the prompt's, with its cache."""
    generation: Run | None = None
    """The forward of the last of `new_tokens`; ``None`` where none were asked for."""
    training: Run | None = None
    """``None`` where it was not asked for."""
    given_inputs: bool = False
    """Whether the batch was given, so that the sizes in `options` do not tell of it."""
    notes: tuple[str, ...] = field(default=())
    """What the figures leave out, and what they assume."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON takes it; bytes as integers."""
        return {
            "title": self.title,
            "options": {name: _plain(value) for name, value in asdict(self.options).items()},
            "weights": [asdict(each) for each in self.weights],
            **{name: _run_dict(getattr(self, name)) for name in ("inference", "generation", "training")},
            "given_inputs": self.given_inputs,
            "notes": list(self.notes),
        }

    def text(self) -> str:
        """The table."""
        rows = [("weights", "size", "largest layer", "how"), *map(_weights_row, self.weights)]
        lines = [self.title, "", *_table(rows)]
        runs = (("inference", self.inference), ("generation", self.generation), ("training", self.training))
        for name, run in runs:
            if run is not None:
                lines += ["", *_run_lines(name, run, self.options, self.given_inputs)]
        lines += ["", *(f"* {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines)


_HOW: Mapping[str, str] = {
    "weights": "parameters, tied ones once",
    "buffers": "tensors that are not trained, such as running means",
    "inputs": "the batch",
    "gradients": "of parameters whose backward is done at that moment",
    "gradients before reduction": "whole ones, of the block whose backward runs",
    "optimizer states": "what the optimizer keeps between steps",
    "temporaries of the optimizer": "while it steps",
    "gathered weights": "the root, the block that runs, and the next one ahead of time",
    "reduction buffers": "in which ranks sum a block's gradients",
    "DDP's buckets": "in which ranks sum gradients: as large as these",
    "key-value cache": "keys and values of all tokens so far",
    "activations": "all else alive at that moment: what backward needs, outputs, temporaries",
}


def _run_lines(name: str, run: Run, options: EstimateOptions, given: bool) -> list[str]:
    if run.peak is None:
        return [f"{name}: not known. {run.unknown}"]
    head = f"{name} ({_described(name, options, given)})"
    rows = [(head, "size", "how")]
    for part, size in sorted(run.peak.parts.items(), key=lambda item: -item[1]):
        how = _HOW.get(part, "")
        share = _share(part, options) if name == "training" else ""
        rows.append((f"  {part}", format_bytes(size), f"{how}{share}"))
    rows.append(("  peak", format_bytes(run.peak.total_bytes), f"at its worst moment: {run.peak.moment}"))
    return _table(rows)


def _described(name: str, options: EstimateOptions, given: bool) -> str:
    words = ["the batch given" if given else f"batch {options.batch_size}"]
    if options.sequence_length is not None and not given:
        words.append(f"length {options.sequence_length}")
    if name == "generation":
        words.append(f"{options.new_tokens} new tokens")
    if name == "training":
        words.append(options.optimizer)
        words += [f"{options.mixed_precision} autocast"] if options.mixed_precision != "no" else []
        words += ["checkpointing"] if options.checkpointing else []
        words += [f"{options.accumulation_steps} micro-batches"] if options.accumulation_steps > 1 else []
        words += [f"{options.sharding} over {options.ranks} ranks"] if options.sharding != "none" else []
    return ", ".join(words)


def _share(part: str, options: EstimateOptions) -> str:
    divided = {
        "optimizer states": ("zero1", "zero2", "zero3", "fsdp"),
        "temporaries of the optimizer": ("zero1", "zero2", "zero3", "fsdp"),
        "gradients": ("zero2", "zero3", "fsdp"),
        "weights": ("zero3", "fsdp"),
    }
    return f"; 1/{options.ranks} of them" if options.sharding in divided.get(part, ()) and options.ranks > 1 else ""


def _weights_row(row: Weights) -> tuple[str, ...]:
    largest = f"{format_bytes(row.largest_bytes)} {row.largest}" if row.largest else "-"
    return (f"  {row.name}", format_bytes(row.total_bytes), largest, row.how)


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column == 1 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, bool, str, type(None))) else str(value).removeprefix("torch.")


def _run_dict(run: Run | None) -> dict[str, Any] | None:
    if run is None:
        return None
    if run.peak is None:
        return {"total_bytes": None, "unknown": run.unknown}
    peak = run.peak
    return {"total_bytes": peak.total_bytes, "parts": dict(peak.parts), "moment": peak.moment}
