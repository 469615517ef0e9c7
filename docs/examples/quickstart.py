"""Teach a small convolutional network to read handwritten digits, on whatever this is launched on.

    python docs/examples/quickstart.py
    torchrun --nproc-per-node 2 docs/examples/quickstart.py
    accel launch --num-processes 4 docs/examples/quickstart.py

Run it again after an interruption: it goes on where the last checkpoint was taken. The lines that make a raw loop run
anywhere are marked with `# accel`.
"""

import argparse
import json

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from accel import Accelerator, set_seed, tqdm


class Reader(nn.Module):
    """Two convolutions and a linear layer over images of 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.25),
            nn.Linear(32 * 4 * 4, 10),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)


def load_images() -> tuple[TensorDataset, TensorDataset]:
    """The 1,797 images that ship with scikit-learn: four fifths to learn from, one fifth held out."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    dataset = TensorDataset(images, torch.tensor(digits.target))
    return random_split(dataset, [0.8, 0.2], generator=torch.Generator().manual_seed(0))


def train(args: argparse.Namespace) -> None:
    set_seed(args.seed)
    accelerator = Accelerator(project_dir=args.project_dir, log_with="jsonl")  # accel

    train_set, test_set = load_images()
    train_loader = DataLoader(train_set, batch_size=args.batch_size, shuffle=True)
    test_loader = DataLoader(test_set, batch_size=50)
    model = Reader()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 200))

    model, optimizer, train_loader, test_loader, schedule = accelerator.prepare(  # accel
        model, optimizer, train_loader, test_loader, schedule
    )
    accelerator.init_trackers("digits", config=vars(args))
    accelerator.load_state()  # accel: go on from the latest complete checkpoint, if there is one

    for epoch in range(train_loader.epoch, args.epochs):
        model.train()
        for images, labels in tqdm(train_loader, desc=f"epoch {epoch}"):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            accelerator.backward(loss)  # accel
            optimizer.step()
            schedule.step()
            mean_loss = accelerator.reduce(loss.detach(), "mean").item()
            accelerator.log({"loss": mean_loss}, step=optimizer.steps_taken)
        accelerator.save_state()

    model.eval()
    correct = evaluated = 0
    for images, labels in test_loader:
        with torch.no_grad():
            predictions = model(images).argmax(dim=1)
        predictions, labels = accelerator.gather_for_metrics((predictions, labels))  # accel: each image once
        correct += int((predictions == labels).sum())
        evaluated += len(labels)
    accelerator.print(json.dumps({"accuracy": correct / evaluated, "evaluated": evaluated}))
    accelerator.end_training()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Teach a small network to read handwritten digits.")
    parser.add_argument("--project-dir", default="runs/quickstart", help="checkpoints and metrics go here")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=32, help="images per process and step")
    parser.add_argument("--lr", type=float, default=8e-3, help="learning rate at the beginning")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights, the order and dropout")
    return parser.parse_args()


if __name__ == "__main__":
    train(parse_args())
