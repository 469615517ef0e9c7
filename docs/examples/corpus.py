"""Train a small language model on the sources of Python's standard library, read with Hugging Face ``datasets``.

    pip install accel datasets transformers
    python docs/examples/corpus.py
    accel launch --num-processes 2 docs/examples/corpus.py --read streaming

Nothing is downloaded. The first start trains a tokenizer on the sources, cuts them into passages and writes those into
four Parquet files. Then a model with random weights learns from them, every passage once an epoch, which is checked.

    accel launch --num-processes 2 docs/examples/corpus.py --stop-after 20
    accel launch --num-processes 2 docs/examples/corpus.py

Stopped in the middle of an epoch, or killed, it goes on with the passages that are left when it is started again. The
lines that make a raw loop run anywhere are marked with `# accel`.
"""

from __future__ import annotations

import argparse
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars, load_dataset
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from accel import Accelerator, DataLoaderConfiguration, set_seed, tqdm

NUM_FILES = 4
"""Parquet files, so that up to four processes have as many each when they are streamed."""
IGNORED = -100
"""Label of a token that is not to be predicted."""


def sources(num_modules: int) -> list[str]:
    """The modules of the standard library, in order of name."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:num_modules]
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def passages(texts: Iterable[str], tokenizer: ByteLevelBPETokenizer, length: int) -> Iterator[dict[str, Any]]:
    """Every text cut into passages of `length` tokens; the last one of a text is shorter."""
    number = 0
    for encoded in tokenizer.encode_batch(list(texts)):
        for start in range(0, len(encoded.ids) - 1, length):  # a passage of one token has nothing to predict
            tokens = encoded.ids[start : start + length]
            if len(tokens) > 1:
                yield {"number": number, "input_ids": tokens}
                number += 1


def build(folder: Path, *, num_modules: int, vocabulary: int, length: int) -> None:
    """Write the tokenizer and the passages into `folder`, which appears when all of it is there."""
    if folder.exists():
        return
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    unfinished.mkdir(parents=True)
    texts = sources(num_modules)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=vocabulary, show_progress=False)
    tokenizer.save(str(unfinished / "tokenizer.json"))
    found = Dataset.from_list(list(passages(texts, tokenizer, length)))
    # Shuffled once when it is written: a stream then needs no buffer to be mixed, and resumes without reading it again.
    mixed = found.shuffle(seed=0)
    for number in range(NUM_FILES):
        mixed.shard(NUM_FILES, number).to_parquet(unfinished / f"passages-{number}.parquet")
    (unfinished / "corpus.json").write_text(
        json.dumps({"passages": len(found), "tokens": sum(map(len, found["input_ids"])), "modules": len(texts)})
    )
    unfinished.rename(folder)


def read(folder: Path, how: str) -> Any:
    """The passages as a `Dataset`, which can be read at any index, or as an `IterableDataset`."""
    files = sorted(str(file) for file in folder.glob("*.parquet"))
    if how == "map":
        return load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / "cache"))
    return load_dataset("parquet", data_files=files, split="train", streaming=True)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Passages of different lengths, padded on the right. Shapes (rows, longest passage), `number` (rows,)."""
    longest = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(input_ids, IGNORED)
    for row, passage in enumerate(rows):
        tokens = torch.tensor(passage["input_ids"])
        input_ids[row, : len(tokens)] = labels[row, : len(tokens)] = tokens
    return {
        "input_ids": input_ids,
        "attention_mask": (labels != IGNORED).long(),
        "labels": labels,
        "number": torch.tensor([row["number"] for row in rows]),
    }


def new_model(vocabulary: int, length: int) -> LlamaForCausalLM:
    """A Llama of two layers with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=length,
            tie_word_embeddings=True,
        )
    )


class Seen:
    """The passages of the epoch in progress that any process has trained on. Saved with every checkpoint."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"numbers": list(self.numbers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.numbers = list(state["numbers"])

    def finish_epoch(self, num_passages: int) -> int:
        """Check that each was there exactly once, and forget them. Returns how many there were."""
        found, self.numbers = self.numbers, []
        if sorted(found) != list(range(num_passages)):
            missing, again = num_passages - len(set(found)), len(found) - len(set(found))
            raise SystemExit(f"{missing} of {num_passages} passages were left out, {again} came again.")
        return len(found)


def train(args: argparse.Namespace) -> None:
    set_seed(args.seed)
    disable_progress_bars()
    accelerator = Accelerator(  # accel
        project_dir=args.project_dir,
        log_with="jsonl",
        dataloader_config=DataLoaderConfiguration(dispatch_batches=args.read == "dispatch"),
    )
    folder = Path(args.project_dir) / "corpus"
    with accelerator.main_process_first():  # the others find it built
        build(folder, num_modules=args.modules, vocabulary=args.vocabulary, length=args.length)
        dataset = read(folder, args.read)
    corpus = json.loads((folder / "corpus.json").read_text())
    accelerator.print("{modules} modules, {passages} passages, {tokens} tokens".format_map(corpus))

    loader = DataLoader(dataset, batch_size=args.batch_size, shuffle=args.read == "map" or None, collate_fn=collate)
    model = new_model(args.vocabulary, args.length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)  # accel
    seen = Seen()
    accelerator.register_for_checkpointing(seen)
    accelerator.init_trackers("corpus", config=vars(args))
    resumed = accelerator.load_state()  # accel: go on from the latest complete checkpoint, if there is one
    if resumed is not None:
        accelerator.print(f"going on after step {optimizer.steps_taken}, in epoch {loader.epoch}")

    model.train()
    for epoch in range(loader.epoch, args.epochs):
        losses = []
        for batch in tqdm(loader, desc=f"epoch {epoch}"):
            loss, num_targets = sum_of_losses(model, batch, loader.batch_info.real_rows[accelerator.process_index])
            accelerator.backward(loss, num_items=num_targets)  # accel: each token weighs the same on every process
            optimizer.step()
            optimizer.zero_grad()

            numbers = accelerator.gather_for_metrics(batch["number"]).tolist()  # accel: without repeated rows
            total, tokens = accelerator.reduce(torch.stack([loss.detach(), num_targets.to(loss.dtype)]), "sum")
            losses.append((total / tokens).item())
            seen.numbers += numbers
            step = optimizer.steps_taken
            accelerator.log(
                {"loss": losses[-1], "tokens": int(tokens), "passages": str(numbers), "epoch": epoch}, step=step
            )
            if step == args.stop_after:
                accelerator.save_state()
                accelerator.print(f"stopped after step {step}, after {len(seen.numbers)} passages of epoch {epoch}")
                accelerator.end_training()
                return
            if step % args.save_every == 0:
                accelerator.save_state()
        count = seen.finish_epoch(corpus["passages"])
        result = {"epoch": epoch, "passages": count, "first_loss": losses[0], "last_loss": losses[-1]} if losses else {}
        accelerator.print(json.dumps(result))
    accelerator.save_state()
    accelerator.end_training()


def sum_of_losses(
    model: nn.Module, batch: dict[str, torch.Tensor], real_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy summed over the tokens to be predicted, and their number; rows that are repeats do not count."""
    labels = batch["labels"][:, 1:].clone()
    labels[real_rows:] = IGNORED
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss, (labels != IGNORED).sum()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small language model on the sources of Python's standard library.",
        epilog="Started again with the same --project-dir it goes on where the last checkpoint was taken, in the "
        "middle of an epoch too, on as many processes or on others.",
    )
    parser.add_argument(
        "--read",
        choices=["map", "streaming", "dispatch"],
        default="map",
        help="map: any passage can be read at any time, so each epoch has an order of its own; streaming: each process "
        "reads its own Parquet files from front to back; dispatch: the first process alone reads them, and hands each "
        "its passages (default: %(default)s)",
    )
    parser.add_argument("--project-dir", default="runs/corpus", help="corpus, checkpoints and metrics go here")
    parser.add_argument(
        "--stop-after", type=int, metavar="STEP", help="save and stop after this step, as if time was up"
    )
    parser.add_argument("--save-every", type=int, default=25, metavar="STEPS", help="steps between checkpoints")
    parser.add_argument("--epochs", type=int, default=2, help="passes over the passages")
    parser.add_argument("--batch-size", type=int, default=16, help="passages per process and step")
    parser.add_argument("--modules", type=int, default=30, help="modules of the library to learn from, by name")
    parser.add_argument(
        "--length", type=int, default=128, help="tokens of a passage; the last one of a module has less"
    )
    parser.add_argument("--vocabulary", type=int, default=512, help="tokens that the tokenizer learns")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the order")
    return parser.parse_args()


if __name__ == "__main__":
    train(parse_args())
