"""Chat with a language model that is larger than the memory it may use.

    python docs/examples/chat.py --budget 48MiB

The model is a Llama with random weights, made on the spot and written to a folder layer by layer, so what it answers
means nothing; ``--model FOLDER`` takes a real one, with its tokenizer. What fits into the budget is in memory, and the
rest stays in the file and is used there. With an accelerator the budget is that of the device, and the rest is streamed
to it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, logging

from accel_bigmodel import (
    explain_device_map,
    format_bytes,
    infer_auto_device_map,
    init_empty_weights,
    load_checkpoint_and_dispatch,
    total_size_bytes,
)  # fmt: skip

BYTES = 256
"""Characters are tokens of their own: nothing has to be trained or downloaded."""


def write_model(folder: Path, *, width: int, layers: int) -> None:
    """A checkpoint of many shards, of which no more than one is in memory at a time."""
    config = LlamaConfig(
        vocab_size=BYTES, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512, bos_token_id=0, eos_token_id=0,
        pad_token_id=0, architectures=["LlamaForCausalLM"], dtype="float32",
    )  # fmt: skip
    config.save_pretrained(folder)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        shards.setdefault(".".join(name.split(".")[:3]), {})[name] = parameter
    generator, weight_map = torch.Generator().manual_seed(0), {}
    for number, tensors in enumerate(shards.values(), 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        values = {
            name: torch.randn(each.shape, generator=generator) / each.shape[-1] ** 0.5 if each.dim() > 1
            else torch.ones(each.shape)
            for name, each in tensors.items()
        }  # fmt: skip
        save_file(values, folder / file)
        weight_map.update(dict.fromkeys(values, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def load(folder: Path, budget: str) -> Any:
    """The model of a folder, with no more of it in memory than `budget`."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
    place: int | str = 0 if torch.accelerator.is_available() else "cpu"
    memory = {place: budget, "disk": "1TiB"}
    device_map = infer_auto_device_map(model, max_memory=memory)
    print(f"{format_bytes(total_size_bytes(model))} of weights, and {budget} to hold them:")
    print(explain_device_map(model, device_map, max_memory=memory))
    return load_checkpoint_and_dispatch(model, folder, device_map)


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode("latin-1")


def answer(model: Any, tokenizer: Any, text: str, length: int) -> str:
    """What the model writes behind `text`."""
    tokens = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        found = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=length, do_sample=False, pad_token_id=0
        )
    return tokenizer.decode(found[0, tokens.shape[1] :].tolist())


def anonymous_bytes() -> int:
    """Memory of this process that is no file's (Linux), without what was freed."""
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder with config.json and safetensors; default: made on the spot")
    parser.add_argument("--budget", default="48MiB", help="memory for weights (default 48MiB)")
    parser.add_argument("--width", type=int, default=768, help="of the model that is made (default 768)")
    parser.add_argument("--layers", type=int, default=8, help="of the model that is made (default 8)")
    parser.add_argument("--length", type=int, default=24, help="tokens of an answer (default 24)")
    args = parser.parse_args()
    if args.width % 8:
        parser.error("--width is divided among 8 heads: give a multiple of 8")
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.model or Path(temporary)
        if args.model is None:
            write_model(folder, width=args.width, layers=args.layers)
        before = anonymous_bytes()
        tokenizer = Bytes() if args.model is None else AutoTokenizer.from_pretrained(folder)
        model = load(folder, args.budget)
        print("Say something (an empty line ends it).", flush=True)
        for line in sys.stdin:
            if not line.strip():
                break
            print(f"> {line.strip()}\n{answer(model, tokenizer, line.strip(), args.length)!r}", flush=True)
        print(f"The model took {format_bytes(anonymous_bytes() - before)} of memory besides its files.")


if __name__ == "__main__":
    main()
