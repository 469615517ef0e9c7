"""Why a device map is what it is: a table, numbers for programs, and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from accel_bigmodel.placing.check import plan_of_map
from accel_bigmodel.placing.cost import PlaceUse
from accel_bigmodel.placing.memory import UNLIMITED, shown_place
from accel_bigmodel.placing.picture import html, svg
from accel_bigmodel.placing.plan import Plan
from accel_bigmodel.placing.shown import format_seconds, layers_text
from accel_bigmodel.placing.workload import Machine, Workload
from accel_bigmodel.sizes import format_bytes

__all__ = ["Explanation", "explain_device_map"]

_HEADS = (
    "device", "layers", "weights", "KV cache", "activations", "staging", "in all", "budget", "share", "seconds",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What lies where, with sizes, and how long a forward takes. ``str()`` is the table."""

    plan: Plan
    title: str = "model"
    """What the model is called in pictures."""
    notes: tuple[str, ...] = ()
    """Further lines below the table."""

    def __str__(self) -> str:
        """An aligned table, one line a place, and what was assumed."""
        rows = self.rows()
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADS))]
        lines = [
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, "", *self.statements()])

    def statements(self) -> list[str]:
        """What the table cannot say: the time of a forward, ties, and assumptions."""
        plan, prediction = self.plan, self.plan.prediction
        chain = plan.chain
        dtype = str(chain.dtype).removeprefix("torch.")
        streamed = "nothing is streamed"
        if prediction.streamed_bytes:
            streamed = f"{format_bytes(prediction.streamed_bytes)} streamed to {shown_place(prediction.main)}"
        size = f"{format_bytes(chain.total_bytes)} of weights and buffers in {dtype}, {len(chain.layers)} layers"
        time = f"{format_seconds(prediction.seconds)} predicted, bound by {prediction.bound}"
        said = [f"{size}; {self._workload()}.", f"One forward: {time}; {streamed}."]
        if chain.ties:
            shown = ["/".join(group) for group in chain.ties[:3]]
            more = f" and {len(chain.ties) - 3} more" if len(chain.ties) > 3 else ""
            said.append(f"Tied, kept together and counted once: {', '.join(shown)}{more}.")
        said.append(f"Assumed speeds: {plan.problem.machine.described()}.")
        return [*said, *self.notes]

    def to_dict(self) -> dict[str, Any]:
        """All numbers, as JSON takes them."""
        plan, prediction = self.plan, self.plan.prediction
        chain = plan.chain
        return {
            "title": self.title,
            "dtype": str(chain.dtype).removeprefix("torch."),
            "total_bytes": chain.total_bytes,
            "num_layers": len(chain.layers),
            "seconds": prediction.seconds,
            "bound": prediction.bound,
            "streamed_bytes": prediction.streamed_bytes,
            "main_device": prediction.main,
            "fits": prediction.fits,
            "tied": [list(group) for group in chain.ties],
            "places": [_place_dict(plan, use) for use in prediction.uses],
            "assumptions": plan.problem.machine.described(),
            "device_map": plan.device_map(),
        }

    def to_svg(self) -> str:
        """A picture: the model as a strip in order, and each place as a bar with what is in it. Stands alone."""
        return svg(self)

    def to_html(self) -> str:
        """A page with the picture and the table. Stands alone: no scripts, no fonts, nothing fetched."""
        return html(self)

    def shown_uses(self) -> list[PlaceUse]:
        """All places but a disk that is there without limit and not needed."""
        uses = self.plan.prediction.uses
        return [use for use in uses if use.used_bytes or use.layers or use.budget_bytes < UNLIMITED]

    def rows(self) -> list[tuple[str, ...]]:
        """Heads and cells of the table."""
        return [_HEADS, *(self._row(use) for use in self.shown_uses())]

    def _row(self, use: PlaceUse) -> tuple[str, ...]:
        limited = use.budget_bytes < UNLIMITED
        copies = f" + {format_seconds(use.copy_s)} copying" if use.copy_s else ""
        time = format_seconds(use.compute_s) if use.compute_s or not copies else ""
        return (
            str(use.place),
            layers_text(self.plan, use),
            format_bytes(use.weight_bytes),
            format_bytes(use.kv_bytes),
            format_bytes(use.activation_bytes),
            format_bytes(use.staging_bytes),
            format_bytes(use.used_bytes),
            format_bytes(use.budget_bytes) if limited else "no limit",
            f"{use.share:.1%}" if limited else "-",
            f"{time}{copies}".removeprefix(" + "),
        )

    def _workload(self) -> str:
        work = self.plan.problem.workload
        if work is None:
            return "no workload was given, so activations and the KV cache are not counted, and one token is timed"
        what = f"{work.batch_size} x {work.sequence_length} tokens"
        return f"{what} computed at once" if work.phase == "prefill" else f"one token for each sequence of {what}"


def explain_device_map(
    model: nn.Module,
    device_map: Mapping[str, int | str | torch.device],
    max_memory: Mapping[int | str, int | str] | None = None,
    *,
    no_split_module_classes: Iterable[str] | str | None = None,
    dtype: torch.dtype | str | None = None,
    special_dtypes: Mapping[str, torch.dtype | str] | None = None,
    offload_buffers: bool = False,
    main_device: int | str | torch.device | None = None,
    workload: Workload | None = None,
    machine: Machine | None = None,
    tied_parameters: Iterable[Sequence[str]] | None = None,
) -> Explanation:
    """What a device map, inferred or written by hand, costs in memory and time. Print it, or see `Explanation`.

    Args:
        model: as for `infer_auto_device_map`, as are all that follow.
        device_map: names of modules to places. It may exceed budgets, which the table then shows.
        max_memory: budgets, see `get_max_memory`; by default none are shown.
        no_split_module_classes: likewise.
        dtype: likewise.
        special_dtypes: likewise.
        offload_buffers: likewise.
        main_device: likewise.
        workload: likewise.
        machine: likewise.
        tied_parameters: likewise.

    Raises:
        ConfigError: as `check_device_map` does, except for budgets.
    """
    plan = plan_of_map(
        model,
        device_map,
        max_memory=max_memory,
        no_split_module_classes=no_split_module_classes,
        dtype=dtype,
        special_dtypes=special_dtypes,
        offload_buffers=offload_buffers,
        main_device=main_device,
        workload=workload,
        machine=machine,
        tied_parameters=tied_parameters,
    )
    return Explanation(plan=plan, title=type(model).__name__)


def _place_dict(plan: Plan, use: PlaceUse) -> dict[str, Any]:
    return {
        "place": use.place,
        "layers": [plan.chain.layers[layer].name for layer in use.layers],
        "weight_bytes": use.weight_bytes,
        "kv_bytes": use.kv_bytes,
        "activation_bytes": use.activation_bytes,
        "staging_bytes": use.staging_bytes,
        "used_bytes": use.used_bytes,
        "budget_bytes": use.budget_bytes if use.budget_bytes < UNLIMITED else None,
        "compute_s": use.compute_s,
        "copy_s": use.copy_s,
    }
