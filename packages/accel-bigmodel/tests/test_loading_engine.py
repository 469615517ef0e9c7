"""Pieces, batches, and threads that read them: nothing is lost, read twice, or copied from memory used again."""

from __future__ import annotations

import math
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_bigmodel.loading.box import cut, meet, offset_of, shape_of, whole
from accel_bigmodel.loading.delivery import Delivery, OpenFiles, Piece, ReadSettings, batches, pieces_of
from accel_bigmodel.loading.engine import deliver
from accel_bigmodel.loading.progress import Progress
from accel_bigmodel.stored import StoredTensor, read_file_header
from accel_bigmodel.testing import save_file
from accel_state.errors import CheckpointError, ConfigError

shapes = st.lists(st.integers(1, 7), min_size=0, max_size=4).map(tuple)


@given(shapes, st.integers(1, 60))
def test_boxes_cover_a_tensor_once_in_order_and_each_lies_in_one_piece(shape: tuple[int, ...], limit: int) -> None:
    flat = torch.arange(math.prod(shape)).reshape(shape)
    seen: list[int] = []
    for box in cut(shape, limit):
        part = flat[tuple(slice(*each) for each in box)]
        values = part.reshape(-1).tolist()
        assert 1 <= len(values) <= limit
        assert values == list(range(offset_of(box, shape), offset_of(box, shape) + len(values)))
        assert tuple(part.shape) == shape_of(box)
        seen += values
    assert seen == list(range(math.prod(shape)))


@given(shapes.filter(bool), st.integers(1, 60), st.data())
def test_only_the_rows_that_are_wanted_are_cut(shape: tuple[int, ...], limit: int, data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, shape[0] - 1))
    end = data.draw(st.integers(begin + 1, shape[0]))
    found = list(cut(shape, limit, (begin, end)))
    assert sum(math.prod(shape_of(box)) for box in found) == (end - begin) * math.prod(shape[1:])
    assert all(begin <= box[0][0] < box[0][1] <= end for box in found)


def test_boxes_meet_where_they_overlap() -> None:
    assert meet(((0, 4), (2, 6)), ((3, 9), (0, 3))) == ((3, 4), (2, 3))
    assert meet(((0, 4),), ((4, 5),)) is None
    assert meet((), ()) == ()


def some_source(shape: tuple[int, ...]) -> StoredTensor:
    return StoredTensor(Path("x"), "x", torch.bfloat16, shape, 0)


@given(st.lists(shapes, max_size=6), st.integers(64, 400))
def test_batches_hold_every_piece_without_overlap(given_shapes: list[tuple[int, ...]], limit: int) -> None:
    pieces = [piece for shape in given_shapes for piece in pieces_of(some_source(shape), limit)]
    found = list(batches(pieces, limit))
    assert [piece for batch in found for piece, _ in batch] == pieces
    for batch in found:
        end = 0
        for piece, place in batch:
            assert place >= end
            assert place % 64 == 0
            end = place + piece.nbytes
        assert end <= limit


class LateLane:
    """Copies only when it is waited for, as late as a device may: memory used again before that gives wrong values."""

    def __init__(self, device: torch.device) -> None:
        self.thread = threading.get_ident()

    def copy(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
        assert threading.get_ident() == self.thread
        return pairs

    def wait(self, mark: Any) -> None:
        for target, values in mark:
            target.copy_(values)


def stored_file(folder: Path, tensors: dict[str, torch.Tensor]) -> dict[str, StoredTensor]:
    save_file(tensors, folder / "x.safetensors")
    return read_file_header(folder / "x.safetensors")


def targets(stored: dict[str, StoredTensor], dtype: torch.dtype) -> list[Delivery]:
    return [Delivery(each, whole(each.shape), torch.empty(each.shape, dtype=dtype)) for each in stored.values()]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(shapes, min_size=1, max_size=8),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(1, 5),
    st.booleans(),
)
def test_values_arrive_whatever_the_sizes_dtypes_threads_and_delays(
    tmp_path_factory: pytest.TempPathFactory,
    given_shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
    num_threads: int,
    late: bool,
) -> None:
    tensors = {f"t{number}": torch.randn(*shape, 13) for number, shape in enumerate(given_shapes)}
    stored = stored_file(tmp_path_factory.mktemp("any"), tensors)
    deliveries = targets(stored, dtype)
    settings_ = ReadSettings(num_threads=num_threads, chunk_bytes=4096)
    more = {"make_lane": LateLane} if late else {}
    with Progress(0, shown=False) as progress:
        num_bytes = deliver(deliveries, settings_, progress=progress, **more)  # type: ignore[arg-type]
    assert num_bytes == sum(each.nbytes for each in stored.values())
    for each in deliveries:
        assert torch.equal(each.target, tensors[each.source.name].to(dtype))


def test_many_chunks_share_few_buffers_and_none_is_used_too_early(tmp_path: Path) -> None:
    tensors = {"x": torch.arange(100_000, dtype=torch.float32)}
    deliveries = targets(stored_file(tmp_path, tensors), torch.float64)
    with Progress(0, shown=False) as progress:
        deliver(deliveries, ReadSettings(num_threads=3, chunk_bytes=4096), progress=progress, make_lane=LateLane)
    assert torch.equal(deliveries[0].target, tensors["x"].double())


@pytest.mark.parametrize("rows", [(0, 3), (2, 7), (6, 7)])
@pytest.mark.parametrize("columns", [(0, 5), (1, 4)])
def test_a_part_of_a_tensor_goes_to_a_part_of_another(
    tmp_path: Path, rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    tensors = {"x": torch.randn(7, 5, 300)}
    source = stored_file(tmp_path, tensors)["x"]
    expected = tensors["x"][slice(*rows), slice(*columns)]
    memory = torch.zeros(300, columns[1] - columns[0], rows[1] - rows[0]).permute(2, 1, 0)  # not contiguous
    deliveries = [Delivery(source, (rows, columns, (0, 300)), memory)]
    with Progress(0, shown=False) as progress:
        read = deliver(deliveries, ReadSettings(chunk_bytes=4096), progress=progress)
    assert torch.equal(memory, expected)
    assert read <= (rows[1] - rows[0]) * 5 * 300 * 4, "rows that nobody wants were read"


def test_rows_that_nobody_wants_are_not_read(tmp_path: Path) -> None:
    source = stored_file(tmp_path, {"x": torch.arange(70.0).reshape(7, 10)})["x"]
    memory = torch.zeros(2, 10)
    with Progress(0, shown=False) as progress:
        read = deliver([Delivery(source, ((3, 5), (0, 10)), memory)], ReadSettings(), progress=progress)
    assert read == 2 * 10 * 4
    assert memory[0, 0].item() == 30.0


def test_an_interrupt_ends_the_threads_before_all_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = stored_file(tmp_path, {f"t{number}": torch.randn(1024) for number in range(100)})
    begun: list[Piece] = []
    read = OpenFiles.read

    def slow(files: OpenFiles, piece: Piece, destination: torch.Tensor) -> None:
        begun.append(piece)
        if len(begun) == 4:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # as Ctrl-C, wherever it waits
        time.sleep(0.02)
        read(files, piece, destination)

    monkeypatch.setattr(OpenFiles, "read", slow)
    with Progress(0, shown=False) as progress, pytest.raises(KeyboardInterrupt):
        deliver(targets(stored, torch.float32), ReadSettings(num_threads=2, chunk_bytes=4096), progress=progress)
    assert len(begun) < 100


def test_one_failing_thread_ends_the_others_and_is_told(tmp_path: Path) -> None:
    stored = stored_file(tmp_path, {f"t{number}": torch.randn(5000) for number in range(20)})
    path = stored["t0"].path
    path.write_bytes(path.read_bytes()[:-30000])
    with Progress(0, shown=False) as progress, pytest.raises(CheckpointError, match=r"ends within `t\d+`"):
        deliver(targets(stored, torch.float32), ReadSettings(num_threads=4, chunk_bytes=4096), progress=progress)


def test_files_are_closed_after_an_error(tmp_path: Path) -> None:
    stored = stored_file(tmp_path, {"x": torch.ones(3)})
    before = set(Path("/proc/self/fd").iterdir()) if Path("/proc/self/fd").exists() else set()
    with pytest.raises(FileNotFoundError):
        OpenFiles([stored["x"].path, tmp_path / "zzz"])
    after = set(Path("/proc/self/fd").iterdir()) if Path("/proc/self/fd").exists() else set()
    assert len(after) == len(before)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"num_threads": 0}, "`num_threads=0` leaves nobody"), ({"chunk_bytes": 100}, "`chunk_bytes=100` is less than")],
)
def test_settings_that_cannot_work_are_refused(arguments: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ReadSettings(**arguments)


def test_a_piece_hands_out_to_each_taker_its_part() -> None:
    source = some_source((4, 2))
    piece = Piece(source, ((1, 3), (0, 2)))
    first = Delivery(source, ((0, 2), (0, 2)), torch.zeros(2, 2))
    takers = [first, Delivery(source, ((3, 4), (0, 2)), torch.zeros(1, 2))]
    raw = torch.arange(4, dtype=torch.bfloat16).view(torch.uint8)
    pairs = piece.hand_out(raw, takers)
    assert [(target.tolist(), values.tolist()) for target, values in pairs] == [([[0.0, 0.0]], [[0.0, 1.0]])]


def test_a_bar_shows_up_only_where_it_is_asked_for_or_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress(10, shown=None) as progress:
        progress.add(4)
    assert capsys.readouterr().err == ""
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 3600)
    with Progress(10, shown=False) as progress:
        progress.add(4)
    assert capsys.readouterr().err == ""
    monkeypatch.undo()
    with Progress(10, shown=True) as progress:
        progress.add(10)
    assert "Loading weights: 100%" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_arrive_on_a_gpu(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {f"t{number}": torch.randn(1000, 701) for number in range(9)}
    stored = stored_file(tmp_path, tensors)
    deliveries = [
        Delivery(each, whole(each.shape), torch.empty(each.shape, dtype=dtype, device="cuda"))
        for each in stored.values()
    ]  # fmt: skip
    with Progress(0, shown=False) as progress:
        deliver(deliveries, ReadSettings(chunk_bytes=1 << 20), progress=progress)
    for each in deliveries:
        assert torch.equal(each.target.cpu(), tensors[each.source.name].to(dtype))
