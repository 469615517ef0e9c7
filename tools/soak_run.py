"""The training that tools/soak.py kills: scikit-learn's digits, on as many processes as it is launched with.

Whatever a checkpoint carries has a say in every loss: weights, Adam's moments, the schedule, the order of the images,
the generators of torch, numpy and Python on each rank, and an object of the user's own. A run that is started again in
the same folder goes on from the latest checkpoint there. What happens is written to a journal, one JSON object a line,
each by one write to the operating system: a killed process loses none.
"""

# ruff: noqa: E402
from __future__ import annotations

import gc

gc.disable()  # while torch is imported, which is most of a start: a seventh of that time

import argparse
import hashlib
import itertools
import json
import math
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from accel import Accelerator, ProjectConfiguration, set_seed
from accel_parallel.checkpoint import PendingSave

SPOILS = ("generators", "custom", "weight")
"""What `--spoil` can leave wrong after a resume, to show that the comparison notices."""


class Journal:
    """Appends events to a file that all ranks share."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def write(self, event: str, **values: Any) -> None:
        """Hand one line to the operating system, which keeps it whatever becomes of this process."""
        os.write(self._file, (json.dumps({"event": event, **values}) + "\n").encode())

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._file)


class Brightness:
    """Scales images by draws of its own: something of the user's that only `register_for_checkpointing` carries."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._mean = 1.0

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        drawn = torch.rand((), generator=self._generator).item()
        self._mean = 0.9 * self._mean + 0.1 * (0.5 + drawn)
        return images * self._mean

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state(), "mean": self._mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.set_state(state["generator"])
        self._mean = state["mean"]


def disturb(images: torch.Tensor) -> torch.Tensor:
    """Noise of numpy's generator, and columns shifted by a draw of Python's."""
    noise = torch.from_numpy(np.random.normal(0.0, 0.05, images.shape).astype(np.float32))
    return torch.roll(images + noise, random.randrange(3), dims=1)


def load_images(path: Path) -> TensorDataset:
    """What tools/soak.py wrote: loading scikit-learn here would take a second of every start."""
    with np.load(path, allow_pickle=False) as held:
        return TensorDataset(torch.from_numpy(held["images"]), torch.from_numpy(held["labels"]))


def spoil(what: str, model: nn.Module, brightness: Brightness) -> None:
    """Undo a part of a resume."""
    if what == "generators":
        set_seed(0, device_specific=True)
    elif what == "custom":
        brightness.load_state_dict(Brightness(0).state_dict())
    else:
        with torch.no_grad():
            next(reversed(list(model.parameters())))[0] += 1e-3


def hash_of(model: nn.Module) -> str:
    """Of all weights, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Saver:
    """Saves every few steps, in the foreground and in the background by turns, and says when one is complete."""

    def __init__(self, accelerator: Accelerator, journal: Journal, *, every: int, blocking_only: bool) -> None:
        self._accelerator = accelerator
        self._journal = journal
        self._every = every
        self._blocking_only = blocking_only
        self._pending: tuple[int, PendingSave] | None = None
        """The step of a save in the background, and its handle."""

    def after_step(self, step: int) -> None:
        """Every rank must call this."""
        if self._pending is not None and self._pending[1].done:
            self._say(self._pending[0])
            self._pending = None
        if not self._every or step % self._every:
            return
        if self._blocking_only or step // self._every % 2:
            self._accelerator.save_state()
            self._say(step)
        else:
            self._pending = (step, self._accelerator.save_state(blocking=False))

    def _say(self, step: int) -> None:
        if self._accelerator.is_main_process:
            self._journal.write("saved", step=step)


def train(args: argparse.Namespace, journal: Journal) -> None:
    """Train from the latest checkpoint, or from the beginning, to `--last-step` or for as long as it is let."""
    project = ProjectConfiguration(project_dir=args.project_dir, total_limit=args.total_limit)
    accelerator = Accelerator(project_config=project)
    set_seed(args.seed, device_specific=True)
    torch.manual_seed(args.seed)
    model: Any = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Dropout(0.3), nn.Linear(48, 10))
    set_seed(args.seed, device_specific=True)
    optimizer: Any = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.6 + 0.4 * math.cos(step / 50))
    loader: Any = DataLoader(load_images(args.data), batch_size=32, shuffle=True)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    brightness = Brightness(args.seed)
    accelerator.register_for_checkpointing(brightness)

    journal.write("begun", rank=accelerator.process_index, pid=os.getpid())
    folder = accelerator.load_state()
    if accelerator.is_main_process:
        journal.write("resumed", step=optimizer.steps_taken, folder=None if folder is None else Path(folder).name)
    if folder is not None and args.spoil is not None:
        spoil(args.spoil, model, brightness)

    saver = Saver(accelerator, journal, every=args.save_every, blocking_only=args.blocking_only)
    for _ in itertools.count(loader.epoch):
        for images, labels in loader:
            optimizer.zero_grad()
            # With smoothed labels no loss comes near zero, where equality would say little.
            loss = nn.functional.cross_entropy(model(brightness(disturb(images))), labels, label_smoothing=0.1)
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            mean_loss = accelerator.reduce(loss.detach(), "mean").item()
            if accelerator.is_main_process:
                journal.write("step", step=optimizer.steps_taken, loss=mean_loss)
            saver.after_step(optimizer.steps_taken)
            if optimizer.steps_taken == args.last_step:
                if accelerator.is_main_process:
                    journal.write("ended", step=args.last_step, weights=hash_of(accelerator.unwrap_model(model)))
                accelerator.end_training()
                return


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="images and labels, as tools/soak.py writes them")
    parser.add_argument("--project-dir", type=Path, required=True, help="checkpoints lie here, and are resumed from")
    parser.add_argument("--journal", type=Path, required=True, help="what happens is appended to this file")
    parser.add_argument("--last-step", type=int, help="end after this step (default: never)")
    parser.add_argument("--at-most-s", type=int, default=600, help="die after so many seconds, come what may")
    parser.add_argument("--save-every", type=int, default=5, help="steps between checkpoints; 0: none (default 5)")
    parser.add_argument("--total-limit", type=int, default=3, help="checkpoints that are kept (default 3)")
    parser.add_argument("--blocking-only", action="store_true", help="save in the foreground only")
    parser.add_argument("--seed", type=int, default=0, help="of everything")
    parser.add_argument("--spoil", choices=SPOILS, help="leave this wrong after a resume, to see it found")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    gc.enable()
    signal.alarm(args.at_most_s)  # whoever started this may be dead
    journal = Journal(args.journal)
    try:
        train(args, journal)
    finally:
        journal.close()


if __name__ == "__main__":
    main()
