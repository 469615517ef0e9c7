"""`accel checkpoint prune`: old checkpoints removed, and what dead processes left."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accel_parallel.checkpoint.layout import discard
from accel_parallel.checkpoint.location import is_remote
from accel_parallel.checkpoint.shelf import shelf_of
from accel_parallel.checkpoint_commands.arguments import Arguments, whole_number
from accel_parallel.checkpoint_commands.places import Place, survey
from accel_parallel.checkpoint_commands.text import size_text
from accel_state.errors import CheckpointError, ConfigError

__all__ = ["Plan", "main", "plan_removal"]

_NOTES = """\
Keeps the N newest complete `checkpoint_<n>`, the latest always among them. Removes the older ones, and temporary
folders of processes of this machine that no longer live. Leaves alone: checkpoints under other names, damaged and
incomplete ones, and what another machine may still be writing. Asks first; without a terminal it needs `--yes`.

A checkpoint leaves its name by one rename before its files go, so none is ever half there.

examples
  accel checkpoint prune runs/7b --keep 3 --dry-run
  accel checkpoint prune runs/7b --keep 3 --every 10     and checkpoint_0, checkpoint_10, checkpoint_20 ...
  accel checkpoint prune runs/7b --keep 1 --yes          in a script"""


@dataclass(frozen=True, slots=True)
class Plan:
    """What goes and what stays."""

    checkpoints: tuple[Place, ...]
    """Complete ones that go, oldest first."""
    leftovers: tuple[Place, ...]
    """Folders that no process will ever finish, which go too."""
    kept: tuple[Place, ...]
    """Complete numbered ones that stay."""


def main(argv: Sequence[str]) -> int:
    """Remove them."""
    arguments = Arguments("prune", notes=_NOTES)
    arguments.add_argument("folder", metavar="FOLDER", help="a project folder, or the one its checkpoints lie in")
    arguments.add_argument("--keep", type=whole_number(1), required=True, metavar="N", help="how many newest ones stay")
    arguments.add_argument(
        "--every", type=whole_number(1), metavar="K", help="also keep those whose number is a multiple of K"
    )
    arguments.add_argument("--dry-run", action="store_true", help="say what would go, and remove nothing")
    arguments.add_argument("--yes", action="store_true", help="do not ask")
    options = arguments.read(argv)
    if options is None:
        return 0
    plan = plan_removal(survey(options.folder), keep=options.keep, every=options.every)
    going = [*plan.checkpoints, *plan.leftovers]
    if not going:
        print(f"Nothing to remove: {_count(len(plan.kept), 'complete checkpoint')} under {options.folder}.")
        return 0
    for place in going:
        print(f"{'would remove' if options.dry_run else 'remove'}  {place.location}  {_about(place)}")
    total = sum(place.size_bytes or 0 for place in going)
    print(
        f"{_count(len(plan.checkpoints), 'checkpoint')} of {size_text(total)}, and "
        f"{_count(len(plan.leftovers), 'leftover')}; {len(plan.kept)} stay."
    )
    if options.dry_run:
        return 0
    if not options.yes and not _agreed(len(going)):
        print("Nothing was removed.")
        return 0
    if is_remote(options.folder):
        _remove_remote(plan, options.keep)
    else:
        _remove(plan)
    return 0


def plan_removal(places: Sequence[Place], *, keep: int, every: int | None = None) -> Plan:
    """Decide what goes. Pure.

    Args:
        places: what was found.
        keep: how many of the newest complete numbered ones stay, at least one.
        every: whether others whose number is a multiple of it stay too.
    """
    complete = [place for place in places if place.number is not None and place.is_complete]
    complete.sort(key=lambda place: place.number or 0)
    newest = {id(place) for folder in {place.folder for place in complete} for place in _newest(complete, folder, keep)}
    going = [
        place
        for place in complete
        if id(place) not in newest and not place.is_latest and (every is None or (place.number or 0) % every)
    ]
    leftovers = [place for place in places if place.state == "left behind"]
    return Plan(tuple(going), tuple(leftovers), tuple(place for place in complete if place not in going))


def _newest(complete: Sequence[Place], folder: str, count: int) -> Sequence[Place]:
    return [place for place in complete if place.folder == folder][-count:]


def _remove(plan: Plan) -> None:
    failed = [problem for place in [*plan.checkpoints, *plan.leftovers] if (problem := _problem_removing(place))]
    if failed:
        raise CheckpointError(
            f"{len(failed)} could not be removed: {', '.join(failed)}. Make them writable, then run this again."
        )


def _remove_remote(plan: Plan, keep: int) -> None:
    """The same in an object store, which knows by itself what else is left there."""
    for folder in {place.folder for place in plan.checkpoints}:
        shelf_of(folder).prune(total_limit=keep, keep=[place.location for place in plan.kept])


def _problem_removing(place: Place) -> str | None:
    """Remove a folder; why it is still there, if it is. The run itself may have removed it meanwhile."""
    path, problem = Path(place.location), ""
    try:
        # By one rename first: a writer that outlived its run may be about to let it take its name.
        discard(path)
    except OSError as error:
        problem = f" ({error})"
    return f"`{path}`{problem}" if path.exists() else None


def _agreed(count: int) -> bool:
    if not sys.stdin.isatty():
        raise ConfigError(
            f"`accel checkpoint prune` would remove {_count(count, 'folder')} and cannot ask, since its input is no "
            f"terminal; nothing was removed. Give `--yes` once `--dry-run` shows what you expect."
        )
    return input(f"Remove {_count(count, 'folder')}? [y/N] ").strip().lower() in ("y", "yes")


def _about(place: Place) -> str:
    if place.manifest is None:
        return f"({place.state})"
    return f"(step {place.manifest.step:,}, {size_text(place.size_bytes or 0)})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
