"""The command `accel estimate`: how much memory a model needs, before it is loaded."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from accel_state.config import did_you_mean
from accel_state.errors import ConfigError

if TYPE_CHECKING:
    from accel_bigmodel.estimate.options import EstimateOptions

__all__ = ["HELP", "main"]

HELP = "Estimate the memory of a model: its weights, inference and training."

_NOTES = """\
MODEL is one of
  a folder with `config.json`, safetensors, or both    runs/7b
  such a configuration, or a safetensors file or index runs/7b/config.json
  a model of timm                                      timm/resnet50
  the name of a model in the local cache of the hub    meta-llama/Llama-3.1-8B
No weights are read and nothing is downloaded: `hf download NAME config.json` gets what is needed of a hub.

What it does: it counts the weights, then runs the model's own forward, backward and optimizer step on tensors without
values, and adds up what is alive at the worst moment. The answer is therefore that of this batch size, length and
optimizer, not a rule of thumb. Of a model that decides by values how to go on, such as some mixtures of experts, runs
cannot be traced; the table says so and shows the weights.

How to bring the peak down, by what is largest in it
  activations        --checkpointing, a smaller --batch-size, --mixed-precision bf16
  optimizer states   --optimizer adamw_8bit, adafactor or sgd; --sharding zero1
  gradients          --sharding zero2
  weights            --dtype bfloat16, --sharding fsdp, quantization

examples
  accel estimate runs/7b
  accel estimate runs/7b --dtype bfloat16 --batch-size 8 --sequence-length 2048 --new-tokens 512 --inference-only
  accel estimate runs/7b/config.json --checkpointing --mixed-precision bf16 --sharding fsdp --ranks 8
  accel estimate runs/7b --json | jq .training.total_bytes"""


class _Arguments(argparse.ArgumentParser):
    """Flags are never shortened, so that one added later changes no command line."""

    def error(self, message: str) -> NoReturn:
        odd = re.match(r"unrecognized arguments: (-\S+)", message)
        known = [flag for action in self._actions for flag in action.option_strings]
        hint = did_you_mean(odd[1].partition("=")[0], known) if odd else ""
        raise ConfigError(f"`{self.prog}`: {message}.{hint} `{self.prog} --help` shows what it takes.")


def main(argv: Sequence[str]) -> int:
    """Print the estimate and return the exit code.

    Args:
        argv: what follows ``accel estimate``.

    Raises:
        ConfigError: if the words make no sense, or there is no such model.
    """
    arguments = _arguments()
    if not argv or any(word in ("-h", "--help") for word in argv):
        print(arguments.format_help().rstrip(), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    given = arguments.parse_args(list(argv))

    from accel_bigmodel.estimate.predict import estimate_memory
    from accel_bigmodel.estimate.weights import DTYPES
    from accel_bigmodel.model_source import describe_model

    options = _options(given)
    described = describe_model(given.model, model_class=given.model_class, trust_remote_code=given.trust_remote_code)
    dtypes = tuple(given.dtypes.replace(",", " ").split()) if given.dtypes else DTYPES
    status = _Status()
    try:
        estimate = estimate_memory(described, options, dtypes=dtypes, on_progress=status.show)
    finally:
        status.clear()
    print(json.dumps(estimate.to_dict(), indent=2) if given.json else estimate.text())
    return 0


def _arguments() -> _Arguments:
    arguments = _Arguments(
        prog="accel estimate",
        description=HELP,
        epilog=_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    arguments.add_argument("model", metavar="MODEL", help="see below")
    arguments.add_argument("--model-class", metavar="CLASS", help="of transformers, such as AutoModelForCausalLM")
    arguments.add_argument("--trust-remote-code", action="store_true", help="let code that comes with MODEL run")
    arguments.add_argument("--dtypes", metavar="LIST", help="rows of the table of weights, such as bf16,fp8,int4")
    arguments.add_argument("--json", action="store_true", help="figures in bytes, for programs")

    run = arguments.add_argument_group("the run")
    run.add_argument("--batch-size", type=int, default=1, metavar="N", help="samples at once, by default 1")
    run.add_argument("--sequence-length", type=int, metavar="N", help="tokens of each, by default 512 or the most")
    run.add_argument("--new-tokens", type=int, default=0, metavar="N", help="generated after these, by default none")
    run.add_argument("--image-size", type=int, metavar="N", help="pixels of a side, by default the model's")
    run.add_argument("--dtype", metavar="DTYPE", help="of the weights in runs, by default the model's")
    run.add_argument("--device", default="cuda", metavar="TYPE", help="by the rules of cuda (default) or cpu")
    run.add_argument(
        "--attention", default="auto", metavar="KERNEL", help="on cuda: auto (default), flash, efficient or math"
    )

    training = arguments.add_argument_group("training")
    training.add_argument("--inference-only", action="store_true", help="leave training out")
    training.add_argument("--optimizer", default="adamw", metavar="NAME", help="by default adamw")
    training.add_argument("--mixed-precision", default="no", metavar="TYPE", help="no (default), bf16 or fp16")
    training.add_argument("--checkpointing", action="store_true", help="blocks run again in backward")
    training.add_argument(
        "--accumulation-steps", type=int, default=1, metavar="N", help="micro-batches a step, by default 1"
    )
    training.add_argument(
        "--drop-outputs", action="store_true", help="the loop lets go of a batch's outputs before backward"
    )
    training.add_argument("--ranks", type=int, default=1, metavar="N", help="processes with a device each")
    training.add_argument(
        "--sharding", metavar="KIND", help="none, ddp, zero1, zero2, zero3 or fsdp; by default fsdp with several ranks"
    )
    return arguments


def _options(given: argparse.Namespace) -> EstimateOptions:
    from accel_bigmodel.estimate.options import EstimateOptions

    return EstimateOptions(
        batch_size=given.batch_size,
        sequence_length=given.sequence_length,
        new_tokens=given.new_tokens,
        image_size=given.image_size,
        dtype=given.dtype,
        training=not given.inference_only,
        optimizer=given.optimizer,
        mixed_precision=given.mixed_precision,
        checkpointing=given.checkpointing,
        accumulation_steps=given.accumulation_steps,
        keeps_outputs=not given.drop_outputs,
        ranks=given.ranks,
        sharding=given.sharding or ("fsdp" if given.ranks > 1 else "none"),
        device=given.device,
        attention=given.attention,
    )


class _Status:
    """One line on a terminal that says what is being done; nothing elsewhere."""

    def __init__(self) -> None:
        self._shows = sys.stderr.isatty()

    def show(self, text: str) -> None:
        """Put `text` in the place of what was there."""
        if self._shows:
            print(f"\r\033[K{text} ...", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Leave nothing."""
        if self._shows:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
