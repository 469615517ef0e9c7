"""The command `accel plan`: where the layers of a model should lie, what that costs, and a picture of it."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from accel_state.config import did_you_mean
from accel_state.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from accel_bigmodel.model_source import ModelDescription
    from accel_bigmodel.placing import Explanation, Machine, Plan, Workload

__all__ = ["HELP", "main"]

HELP = "Plan where the layers of a model lie, before anything is loaded."

_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")

_NOTES = """\
MODEL is a folder with a config.json, such a file itself, safetensors or their index. No weight is read and no device is
touched, so the memory may be that of another machine. What does not fit on accelerators stays in host memory (`cpu`),
then on `disk`, and is streamed to the main device in each forward. Times are predicted from speeds that are assumed;
give those of your machine.

examples
  accel plan ./llama --memory 0=20GiB,cpu=60GiB
      will it fit, what lies where, how long does a forward take
  accel plan ./llama --memory 0=20GiB,1=20GiB,cpu=60GiB --dtype bf16 --batch-size 4 --sequence-length 8192
      with room for activations and the KV cache of that workload
  accel plan ./llama --memory 0=12GiB,cpu=60GiB --phase decode --bus 25
      as fast as can be for one token after the other, over a bus of 25 GB/s
  accel plan ./llama --memory 0=20GiB,cpu=60GiB --picture map.html --map-output map.json
      a picture, and the map as `load_checkpoint_and_dispatch(device_map=...)` takes it
  accel plan model.safetensors --memory 0=8GiB --json
      from the headers of a checkpoint alone; numbers for programs"""


_FLAGS = {
    "max_memory": "--memory", "main_device": "--main-device", "no_split_module_classes": "--no-split",
    "staging_slots": "--slots", "workload.dtype": "--activation-dtype", "offload_buffers": "--offload-buffers",
}  # fmt: skip
"""What errors name, and what the one who typed the command calls it."""


def main(argv: Sequence[str]) -> int:
    """Run the command and return the exit code.

    Args:
        argv: what follows ``accel plan``.

    Raises:
        ConfigError: if the words make no sense, or nothing fits.
        CheckpointError: if the safetensors of the model are damaged.
    """
    parser = _parser()
    if any(word in ("-h", "--help") for word in argv):
        print(parser.format_help().rstrip())
        return 0
    options = parser.parse_args(list(argv))
    try:
        explanation = _explain(options)
    except ConfigError as error:
        raise ConfigError(_in_flags(str(error))) from error
    print(json.dumps(explanation.to_dict(), indent=1) if options.json else explanation)
    if options.picture:
        page = options.picture.suffix.lower() in (".html", ".htm")
        _write(options.picture, explanation.to_html() if page else explanation.to_svg())
    if options.map_output:
        _write(options.map_output, json.dumps(explanation.plan.device_map(), indent=1) + "\n")
    return 0


def _in_flags(said: str) -> str:
    """What Python's settings are called here."""
    for setting, flag in _FLAGS.items():
        said = said.replace(f"`{setting}`", f"`{flag}`").replace(f"`{setting}[", f"`{flag} [").replace(
            f"`{setting}=", f"`{flag} "
        )  # fmt: skip
    return said


def _explain(options: argparse.Namespace) -> Explanation:
    from accel_bigmodel.model_source import describe_model
    from accel_bigmodel.placing import Explanation

    _check_options(options)
    found = describe_model(options.model, model_class=options.model_class, trust_remote_code=options.trust_remote_code)
    workload = _workload(options, found)
    plan = _plan(found, options, workload)
    return Explanation(plan=plan, title=found.title, notes=tuple(_notes(found, plan, workload)))


def _plan(found: ModelDescription, options: argparse.Namespace, workload: Workload) -> Plan:
    from accel_bigmodel.placing import census_of_headers, get_max_memory, plan_device_map, plan_model
    from accel_bigmodel.placing.memory import place_key

    memory = _memory(options.memory)
    dtype = options.dtype or _usual_dtype(found)
    machine = _machine(options)
    main_device = None if options.main_device is None else _place(options.main_device)
    if found.model is not None:
        return plan_model(
            found.model,
            memory,
            no_split_module_classes=options.no_split,
            dtype=dtype,
            offload_buffers=options.offload_buffers,
            strategy=options.strategy,
            main_device=main_device,
            workload=workload,
            machine=machine,
        )
    assert found.stored is not None
    if options.no_split:
        raise ConfigError(
            f"`--no-split {options.no_split[0]}` names a class, but of `{options.model}` only names of tensors are "
            f"known. Put its `config.json` beside it, or leave the flag out: what is numbered stays whole."
        )
    return plan_device_map(
        census_of_headers(found.stored, dtype=dtype),
        get_max_memory(memory),
        strategy=options.strategy,
        main=None if main_device is None else place_key(main_device, setting="--main-device"),
        workload=workload,
        machine=machine,
        offload_buffers=options.offload_buffers,
    )


def _notes(found: ModelDescription, plan: Plan, workload: Workload) -> list[str]:
    from dataclasses import replace

    from accel_bigmodel.placing.shown import format_seconds

    if workload.phase == "prefill":
        other = replace(workload, phase="decode")
        notes = [f"One more token for each sequence: {format_seconds(plan.seconds_for(other))} predicted."]
    else:
        other = replace(workload, phase="prefill")
        notes = [f"All tokens at once: {format_seconds(plan.seconds_for(other))} predicted."]
    if workload.kv_cache and not any(plan.problem.kv_bytes):
        why = "there is no configuration that tells its size" if found.config is None else "the model keeps none"
        notes.append(f"The KV cache is not counted: {why}.")
    if found.model is None:
        notes.append("Layers were told from names of tensors, and what is tied after loading is not known.")
    return notes


def _usual_dtype(found: ModelDescription) -> torch.dtype | None:
    """What the weights are stored in, or the configuration says."""
    from collections import Counter

    import torch

    if found.stored:
        counts: Counter[torch.dtype] = Counter()
        for tensor in found.stored.values():
            if tensor.dtype.is_floating_point:
                counts[tensor.dtype] += tensor.nbytes
        return counts.most_common(1)[0][0] if counts else None
    named = getattr(found.config, "dtype", None)
    return named if isinstance(named, torch.dtype) else None


def _workload(options: argparse.Namespace, found: ModelDescription) -> Workload:
    from accel_bigmodel.placing import Workload

    most = getattr(found.config, "max_position_embeddings", None)
    length = options.sequence_length or (min(2048, most) if isinstance(most, int) and most > 0 else 2048)
    if isinstance(most, int) and 0 < most < length:
        raise ConfigError(
            f"`--sequence-length {length}` is longer than the {most} positions that `{options.model}` knows "
            f"(`max_position_embeddings`). Give at most {most}."
        )
    return Workload(
        batch_size=options.batch_size,
        sequence_length=length,
        phase=options.phase,
        kv_cache=options.kv_cache,
        dtype=options.activation_dtype,
    )


def _machine(options: argparse.Namespace) -> Machine:
    from accel_bigmodel.placing import DeviceSpeed, Machine

    plain = Machine()
    given: dict[str, float | None] = {"bus_gb_s": options.bus, "disk_gb_s": options.disk, "peer_gb_s": options.peer}
    speed = DeviceSpeed(
        tflops=options.tflops or plain.accelerator.tflops,
        memory_gb_s=options.memory_speed or plain.accelerator.memory_gb_s,
    )
    named = options.tflops is not None or options.memory_speed is not None
    return Machine(
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
        staging_slots=options.slots,
        accelerator=speed,
        cpu=speed if named and not _has_accelerator(options.memory) else plain.cpu,
    )


def _has_accelerator(memory: str | None) -> bool:
    if memory is not None:
        return any(each not in ("cpu", "disk") for each in _memory(memory) or ())
    from accel_state.device import available_kind

    return available_kind().type != "cpu"


def _memory(text: str | None) -> Mapping[int | str, int | str] | None:
    """``0=20GiB,cpu=60GiB`` as a mapping; ``None`` stays, for what this machine has."""
    if text is None:
        return None
    found: dict[int | str, int | str] = {}
    for part in text.split(","):
        place, equals, size = (each.strip() for each in part.partition("="))
        if not equals or not place or not size:
            raise ConfigError(
                f"`--memory {text}` has the part {part!r}, which is no place with a size. Write it as "
                f"`--memory 0=20GiB,cpu=60GiB`."
            )
        key = _place(place)
        if key in found:
            raise ConfigError(f"`--memory {text}` names {place!r} twice. Leave one of the two.")
        found[key] = int(size) if size.isdecimal() else size
    return found


def _place(text: str) -> int | str:
    return int(text) if text.isdecimal() else text


def _check_options(options: argparse.Namespace) -> None:
    """What can be known to be wrong before the model is opened."""
    picture: Path | None = options.picture
    if picture is not None and picture.suffix.lower() not in (".svg", ".html", ".htm"):
        raise ConfigError(
            f"`--picture {picture}` is neither `.svg` nor `.html`, and nothing else is drawn. Name it accordingly."
        )
    for path in (picture, options.map_output):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"`{path}` cannot be written, as its folder does not exist. Make it first.")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"`{path}` could not be written ({error}). Name a place that can be.") from error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        odd = re.match(r"unrecognized arguments: (-\S+)", message)
        known = [flag for action in self._actions for flag in action.option_strings]
        hint = did_you_mean(odd[1].partition("=")[0], known) if odd else ""
        raise ConfigError(f"`accel plan`: {message}.{hint} `accel plan --help` shows what it takes.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="accel plan",
        description=HELP,
        epilog=_NOTES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="folder, config.json, safetensors or their index")
    parser.add_argument("--memory", metavar="PLACE=SIZE,...", help="budgets (default: what this machine has free)")
    parser.add_argument("--strategy", choices=_STRATEGIES, default="auto", help="how to place (default: the fastest)")
    parser.add_argument("--dtype", metavar="DTYPE", help="of the weights, such as bf16 (default: as stored)")
    parser.add_argument("--main-device", metavar="PLACE", help="where streamed layers run (default: the first device)")
    parser.add_argument("--no-split", metavar="CLASS", action="append", help="class that stays whole; may be repeated")
    parser.add_argument("--offload-buffers", action="store_true", help="stream buffers of streamed layers too")
    parser.add_argument("--model-class", metavar="CLASS", help="class of transformers, if the config names none")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with a configuration")
    work = parser.add_argument_group("workload")
    work.add_argument("--batch-size", type=_count, default=1, metavar="N", help="sequences at once (default 1)")
    work.add_argument("--sequence-length", type=_count, metavar="N", help="of each (default 2048, or the most)")
    work.add_argument("--phase", choices=("prefill", "decode"), default="prefill", help="all tokens, or one more")
    work.add_argument("--no-kv-cache", dest="kv_cache", action="store_false", help="keep no keys and values")
    work.add_argument("--activation-dtype", metavar="DTYPE", help="of activations and cache (default: as the weights)")
    speeds = parser.add_argument_group("speeds that are assumed")
    speeds.add_argument("--bus", type=_speed, metavar="GB/S", help="from host memory to an accelerator (default 50)")
    speeds.add_argument("--disk", type=_speed, metavar="GB/S", help="read from disk (default 5)")
    speeds.add_argument("--peer", type=_speed, metavar="GB/S", help="between accelerators (default 50)")
    speeds.add_argument("--tflops", type=_speed, metavar="N", help="of what computes (default 300; host 1)")
    speeds.add_argument("--memory-speed", type=_speed, metavar="GB/S", help="of its memory (default 2000; host 100)")
    speeds.add_argument("--slots", type=_count, default=3, metavar="N", help="room for streamed layers (default 3)")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print numbers for programs instead of a table")
    output.add_argument("--picture", type=Path, metavar="FILE", help="draw it: a .svg or a .html file")
    output.add_argument("--map-output", type=Path, metavar="FILE", help="write the device map as JSON")
    return parser


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _speed(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return value
