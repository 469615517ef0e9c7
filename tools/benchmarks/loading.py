"""P3: a checkpoint of bfloat16 in several files, read into a model without values; from the page cache.

Besides what `run.py` compares, this can be run alone, from a checkout with nothing installed but torch::

    python tools/benchmarks/loading.py --device cuda:0 --size-gb 8.6 --threads 8 16 --chunk-mb 4 8 16

It then prints the speed of every side that this interpreter has, and of ours by its settings. Time counts from a model
without values and an accelerator without cached memory until all values can be used: on the CPU until every page of
them was looked at, as mapping a file alone reads nothing. There two things are compared: weights with memory of their
own, for which the others, who map the file, have to copy it; and weights that are mapped.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

TOOLS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TOOLS))

from benchmarks.compare import Comparison, Sampler  # noqa: E402 - once the path is set
from benchmarks.processes import workers  # noqa: E402
from benchmarks.sides import PACKAGE_OF, SOURCES, Side  # noqa: E402

__all__ = ["block", "comparisons", "main"]

ROWS, COLUMNS = 8192, 4096
LAYER_BYTES = 2 * (ROWS * COLUMNS + ROWS)
SIZES_GB = {"cpu": 1.0, "mapped": 1.0, "cuda": 8.6}
"""By variant: to memory of the CPU, to a mapped file, to an accelerator."""
GPU_GOAL_GB_S = 40.0
NUM_FILES = 4
SIDES = ("accel", "accelerate", "torch")


def comparisons(sides: dict[str, Side]) -> list[Comparison]:
    """Against accelerate, and beside it the format's own library (`torch`); to a GPU too, where there is one."""
    having = {name: side for name, side in sides.items() if name in SIDES}
    reference = next(name for name in ("accelerate", "torch") if name in having)
    rows: list[tuple[str, str, str | None, float]] = [
        ("cpu", "to memory of its own on the CPU", reference, 1.0),
        ("mapped", "by mapping it on the CPU", reference, 1.0),
    ]
    if Path("/dev/nvidia0").exists():
        rows.append(("cuda", "to a GPU", None, SIZES_GB["cuda"] / GPU_GOAL_GB_S))
    return [
        Comparison(
            key="P3",
            title=f"{SIZES_GB[variant]:g} GB of bfloat16 from the page cache {how} (torch: safetensors' own)",
            reference=against,
            by="time" if against is None else "ratio",
            goal=goal,
            samplers={name: partial(_loading, side, variant) for name, side in having.items()},
        )
        for variant, how, against, goal in rows
    ]


@contextmanager
def _loading(side: Side, variant: str) -> Iterator[Sampler]:
    folder = _checkpoint(SIZES_GB[variant]).name
    with workers(side, "loading", f"{variant}={folder}")() as sample:
        yield sample


@cache
def _checkpoint(size_gb: float) -> tempfile.TemporaryDirectory[str]:
    """Files of random values, removed when the interpreter ends. Written without torch, as this process has none."""
    folder = tempfile.TemporaryDirectory(prefix="loading-")
    num_layers = max(NUM_FILES, round(size_gb * 1e9 / LAYER_BYTES))
    random = os.urandom(1 << 20) * (LAYER_BYTES // (1 << 20) + 1)
    weight_map = {}
    for number in range(NUM_FILES):
        layers = range(number, num_layers, NUM_FILES)
        file = f"model-{number + 1:05}-of-{NUM_FILES:05}.safetensors"
        header, end = {}, 0
        for layer in layers:
            for name, shape in ((f"{layer}.weight", [ROWS, COLUMNS]), (f"{layer}.bias", [ROWS])):
                size = 2 * ROWS * (COLUMNS if len(shape) == 2 else 1)
                header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
                weight_map[name] = file
                end += size
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
        text += b" " * (-len(text) % 8)
        with open(Path(folder.name) / file, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for _ in layers:
                stream.write(memoryview(random)[:LAYER_BYTES])
    index = {"metadata": {"total_size": num_layers * LAYER_BYTES}, "weight_map": weight_map}
    (Path(folder.name) / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def block(side: str, variant: str) -> Callable[[], float]:
    """Load once in the way, from the folder, that `variant` names."""
    way, _, folder = variant.partition("=")
    device = "cuda" if way == "cuda" else "cpu"
    load: Callable[[Any], None]
    if side == "accel":
        load = partial(_ours, folder, device, mmap=way == "mapped")
    else:
        load = partial({"accelerate": _peer, "torch": _plain}[side], folder, device, copies=way == "cpu")
    return partial(_measured, load, folder, device)


def _measured(load: Callable[[Any], None], folder: str, device: str) -> float:
    import torch

    model = _empty(folder)
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    load(model)
    if device == "cpu":
        for each in model.parameters():
            each.detach().view(torch.int16).flatten()[::2048].sum()
    else:
        torch.cuda.synchronize(device)
    took = time.perf_counter() - start
    assert all(each.device.type == torch.device(device).type for each in model.parameters())
    return took


def _empty(folder: str) -> Any:
    import torch

    names = json.loads((Path(folder) / "model.safetensors.index.json").read_text())["weight_map"]
    layers = len(names) // 2
    with torch.device("meta"):
        return torch.nn.Sequential(*(torch.nn.Linear(COLUMNS, ROWS, dtype=torch.bfloat16) for _ in range(layers)))


def _ours(folder: str, device: str, model: Any, *, mmap: bool = False, **reading: Any) -> None:
    loading = import_module("accel_bigmodel.loading")
    settings = loading.ReadSettings(**reading)
    loading.load_checkpoint_in_model(model, folder, {"": device}, mmap=mmap, progress=False, reading=settings)


def _peer(folder: str, device: str, model: Any, *, copies: bool) -> None:
    where = 0 if device.startswith("cuda") else device
    import_module(PACKAGE_OF["accelerate"]).load_checkpoint_in_model(model, folder, {"": where})
    _own_memory(model, copies)


def _own_memory(model: Any, copies: bool) -> None:
    for each in model.parameters() if copies else ():
        each.data = each.data.clone()


def _plain(folder: str, device: str, model: Any, *, copies: bool) -> None:
    """The format's own library, file by file."""
    load_file = import_module("safetensors.torch").load_file
    for file in sorted(Path(folder).glob("*.safetensors")):
        model.load_state_dict(load_file(file, device=device), strict=False, assign=True)
    _own_memory(model, copies)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    options = _parser().parse_args(argv)
    sys.path[1:1] = [str(each) for each in SOURCES]
    import torch

    folder = _checkpoint(options.size_gb).name
    size_gb = sum(each.stat().st_size for each in Path(folder).glob("*.safetensors")) / 1e9
    name = torch.cuda.get_device_name(options.device) if options.device != "cpu" else "cpu"
    print(f"torch {torch.__version__}, {name}, {os.cpu_count()} processors, {size_gb:.2f} GB")
    if options.device != "cpu":
        print(f"{'a copy from pinned memory':<34} {_bus(options.device):6.1f} GB/s")
    runs: dict[str, Callable[[Any], None]] = {"ours": partial(_ours, folder, options.device)}
    for threads in options.threads:
        for chunk_mb in options.chunk_mb or [8]:
            title = f"ours, {threads} threads of {chunk_mb} MiB"
            runs[title] = partial(_ours, folder, options.device, num_threads=threads, chunk_bytes=chunk_mb << 20)
    on_cpu = options.device == "cpu"
    for title, peer in (("accelerate", _peer), ("safetensors", _plain)):
        runs[title] = partial(peer, folder, options.device, copies=on_cpu)
        if on_cpu:
            runs[f"{title}, mapped"] = partial(peer, folder, options.device, copies=False)
    if on_cpu:
        runs["ours, large pages"] = partial(_ours, folder, options.device, large_pages=True)
        runs["ours, mapped"] = partial(_ours, folder, options.device, mmap=True)
    times: dict[str, list[float]] = {title: [] for title in runs}
    for turn in range(options.repeats + 1):
        for title, load in runs.items():
            try:
                took = _measured(load, folder, options.device)
            except ModuleNotFoundError as error:
                print(f"{title}: {error}") if turn == 0 else None
                continue
            times[title] += [took] if turn else []  # the first one warms up
    for title, found in times.items():
        if found:
            print(f"{title:<34} {size_gb / median(found):6.1f} GB/s  (best {size_gb / min(found):.1f})")
    return 0


def _bus(device: str) -> float:
    """GB/s from pinned memory, which no load exceeds."""
    import torch

    host = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(host, device=device)
    times = []
    for _ in range(5):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        target.copy_(host, non_blocking=True)
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return host.numel() / 1e9 / min(times)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu, or cuda:0 and the like")
    parser.add_argument("--size-gb", type=float, default=1.0)
    parser.add_argument("--threads", type=int, nargs="*", default=[], help="numbers of reading threads to try")
    parser.add_argument("--chunk-mb", type=int, nargs="*", default=[], help="sizes of chunks in MiB to try")
    parser.add_argument("--repeats", type=int, default=5)
    return parser


if __name__ == "__main__":
    sys.exit(main())
