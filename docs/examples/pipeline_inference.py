"""Score sequences with a language model whose layers are spread over the processes.

    python docs/examples/pipeline_inference.py
    torchrun --nproc-per-node 2 docs/examples/pipeline_inference.py
    accel launch --num-processes 4 docs/examples/pipeline_inference.py --check

Each process keeps the weights of its stage only. With ``--check``, the whole model is built once more on every process
and has to give the same.
"""

import argparse

import torch
from torch import nn

from accel import Accelerator, prepare_pippy


class LanguageModel(nn.Module):
    """A decoder: embedding, a list of layers, and a head that shares its weight with the embedding."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True) for _ in range(layers)
        )
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        causal = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).triu(1)
        for layer in self.layers:
            hidden = layer(hidden, src_mask=causal)
        return self.head(hidden)


def build(args: argparse.Namespace) -> LanguageModel:
    torch.manual_seed(0)  # the same weights on every process, as if loaded from one file
    return LanguageModel(vocabulary=256, width=args.width, layers=args.layers).eval()


def surprise(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of each sequence."""
    losses = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    return losses.mean(dim=1)


def score(args: argparse.Namespace) -> None:
    accelerator = Accelerator()
    example = torch.zeros(args.batch_size, 16, dtype=torch.long)
    model = prepare_pippy(build(args), example_args=(example,), num_chunks=args.chunks, gather_output=True)
    print(
        f"stage {model.stage + 1} of {model.num_stages} holds {model.stage_bytes / 2**20:.1f} MiB; "
        f"later stages begin with {', '.join(model.split_points) or 'nothing'}"
    )

    texts = [f"Stage {number} of a pipeline works while the others do." for number in range(3 * args.batch_size + 1)]
    for start in range(0, len(texts), args.batch_size):  # the last batch holds one text
        lines = [list(text.ljust(64).encode()) for text in texts[start : start + args.batch_size]]
        tokens = torch.tensor(lines, device=accelerator.device)
        scores = surprise(model(tokens), tokens)
        accelerator.print(f"{len(lines)} text(s): {scores.mean().item():.4f}")
        if args.check:
            with torch.no_grad():
                expected = surprise(build(args).to(accelerator.device)(tokens), tokens)
            torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)
    if args.check:
        accelerator.print("as on one process")
    accelerator.end_training()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score sequences with a model that is spread over the processes.")
    parser.add_argument("--layers", type=int, default=12, help="layers of the model")
    parser.add_argument("--width", type=int, default=64, help="width of the model")
    parser.add_argument("--batch-size", type=int, default=8, help="texts in a batch")
    parser.add_argument("--chunks", type=int, default=None, help="micro-batches in a batch; by default one a process")
    parser.add_argument("--check", action="store_true", help="compare with the whole model")
    return parser.parse_args()


if __name__ == "__main__":
    score(parse_args())
