"""What was found in somebody else's checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field

from accel_parallel.checkpoint.codec import Leaf
from accel_parallel.checkpoint.item import Item

__all__ = ["Asked", "Found", "numbered"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What the user said about the source."""

    parameter_names: tuple[str, ...] | None = None
    """Names of the parameters that the optimizers hold, in their order."""
    ties: tuple[tuple[str, str], ...] = ()
    """Further names of tensors, and the names they are written under."""
    model_key: str | None = None
    """Under which key a nested checkpoint of torch holds the model."""
    optimizer_key: str | None = None
    """Likewise the optimizer."""


@dataclass(kw_only=True, slots=True)
class Found:
    """Items for the new checkpoint, and what the user is to know."""

    source: str
    """Whose layout it is."""
    items: list[Item] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """How something was settled that the source does not say."""
    left_out: list[str] = field(default_factory=list)
    """What the new checkpoint will lack, and why."""
    step: int | None = None
    """Optimizer steps, where an optimizer says."""
    world_size: int = 1

    def models(self) -> dict[str, dict[str, Leaf]]:
        """Tensors of each model by name."""
        return {item.name: item.state for item in self.items if item.kind == "model"}


def numbered(kind: str, index: int) -> str:
    """What an item is called, as `Accelerator` calls it."""
    return kind if index == 0 else f"{kind}_{index}"
