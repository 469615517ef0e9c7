"""One training script for every way to spread a model: only `--spread` says which.

    python docs/examples/train_digits.py
    accel launch --num-processes 2 docs/examples/train_digits.py                          # copies, averaged (DDP)
    accel launch --num-processes 2 docs/examples/train_digits.py --spread fsdp            # sharded by FSDP2
    accel launch --num-processes 2 docs/examples/train_digits.py --spread zero3           # divided by DeepSpeed
    accel launch --num-processes 2 docs/examples/train_digits.py --spread my_config.json  # as DeepSpeed's file says

All of them give the same losses, to rounding: `--batch-size` is that of all processes together, and every image weighs
the same, in the last window of an epoch too, which is shorter. Metrics go to `--project-dir`.
"""

import argparse
import json
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from accel import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin, set_seed


def spreading(how: str) -> dict[str, Any]:
    """What the `Accelerator` is told. Nothing else in this script knows of it."""
    if how == "fsdp":
        return {"fsdp_plugin": FullyShardedDataParallelPlugin()}
    if how in ("zero0", "zero1", "zero2", "zero3"):
        return {"deepspeed_plugin": DeepSpeedPlugin(zero_stage=int(how[-1]))}
    if how.endswith(".json"):
        return {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=how)}
    return {}


def load_images() -> tuple[Any, Any]:
    """1,437 images to learn from and 359 held out, of those that ship with scikit-learn.

    Two processes cannot share either evenly: in the last batch one of them repeats an image, which must not count.
    """
    digits = load_digits()
    dataset = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
    train_set, test_set, _ = random_split(dataset, [1437, 359, 1], generator=torch.Generator().manual_seed(0))
    return train_set, test_set


def train(args: argparse.Namespace) -> None:
    set_seed(args.seed)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.accumulate,
        project_dir=args.project_dir,
        log_with="jsonl",
        **spreading(args.spread),
    )
    train_set, test_set = load_images()
    train_loader = DataLoader(train_set, batch_size=args.batch_size // accelerator.num_processes, shuffle=True)
    test_loader = DataLoader(test_set, batch_size=50)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64), nn.GELU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 8) / (1 + step / 40))

    model, optimizer, train_loader, test_loader, schedule = accelerator.prepare(
        model, optimizer, train_loader, test_loader, schedule
    )
    accelerator.init_trackers("digits", config=vars(args))
    window = torch.zeros(2, device=accelerator.device)  # losses and images since the last step, on this process
    for epoch in range(args.epochs):
        model.train()
        for images, labels in train_loader:
            real = train_loader.batch_info.real_rows[accelerator.process_index]  # the rest repeats other images
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(images)[:real].float(), labels[:real], reduction="sum")
                accelerator.backward(loss, num_items=real)
                norm = accelerator.clip_grad_norm_(model.parameters(), args.max_norm)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            window += torch.stack([loss.detach(), loss.new_tensor(real)])
            if accelerator.sync_gradients:
                total, num_images = accelerator.reduce(window, "sum").tolist()
                accelerator.log(
                    {"loss": total / num_images, "norm": float(norm), "lr": schedule.get_last_lr()[0], "epoch": epoch},
                    step=optimizer.steps_taken,
                )
                window.zero_()

    model.eval()
    correct = evaluated = 0
    for images, labels in test_loader:
        with torch.no_grad():
            predictions = model(images).argmax(dim=1)
        predictions, labels = accelerator.gather_for_metrics((predictions, labels))
        correct += int((predictions == labels).sum())
        evaluated += len(labels)
    accelerator.print(json.dumps({"correct": correct, "evaluated": evaluated, "steps": optimizer.steps_taken}))
    accelerator.end_training()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Teach a small network to read handwritten digits, spread at will.")
    parser.add_argument(
        "--spread",
        default="default",
        metavar="HOW",
        help="default (one process, or DDP on several), fsdp, zero0, zero1, zero2, zero3, or a JSON file of DeepSpeed",
    )
    parser.add_argument("--project-dir", default="runs/train_digits", help="metrics go here")
    parser.add_argument("--epochs", type=int, default=4, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=32, help="images of a micro-batch, on all processes together")
    parser.add_argument("--accumulate", type=int, default=4, help="micro-batches of a step")
    parser.add_argument("--max-norm", type=float, default=0.5, help="largest norm of the gradients")
    parser.add_argument("--lr", type=float, default=1e-2, help="largest learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the order")
    args = parser.parse_args()
    if not args.spread.endswith(".json") and args.spread not in ("default", "fsdp", "zero0", "zero1", "zero2", "zero3"):
        parser.error(f"--spread {args.spread} is not known: give one of the names that --help lists, or a JSON file")
    return args


if __name__ == "__main__":
    train(parse_args())
