"""Which kernel gets which batches: from times measured once per card and shape, and kept."""

from __future__ import annotations

import itertools
import json
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from vllm_gemma4_spec.kernels import chosen_rows, stream_gemm

TIMES = {1: (25.0, 29.0), 8: (26.0, 30.0), 9: (50.0, 30.0), 64: (70.0, 80.0), 65: (80.0, 120.0), 128: (90.0, 120.0)}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "cache" / "nvfp4-rows.json"
    monkeypatch.setattr(chosen_rows, "path", lambda: file)
    monkeypatch.setattr(chosen_rows, "card", lambda: "Card, 3 multiprocessors")
    monkeypatch.setattr(chosen_rows, "_chosen", {})
    monkeypatch.setattr(chosen_rows, "worth", lambda: chosen_rows.WORTH)  # wherever the tests run
    return file


@given(st.lists(st.tuples(st.floats(1, 99), st.floats(1, 99)), max_size=12))
def test_no_form_that_was_slower_anywhere(us: list[tuple[float, float]]) -> None:
    times = dict(enumerate(us[: len(us) // 2 * 2]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chosen_rows, "worth", lambda: chosen_rows.WORTH)
        mask = chosen_rows.faster(times)
    for rows, (ours, marlins) in times.items():
        if mask >> rows // 2 & 1:
            assert ours < marlins
        else:
            other = times[rows ^ 1]
            assert max(ours / marlins, other[0] / other[1]) > 0.96


def test_measured_once_and_kept(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure() -> chosen_rows.Times:
        asked.append(1)
        return TIMES

    for _ in range(2):
        assert chosen_rows.chosen(512, 256, "a", measure) == 0b101
    monkeypatch.setattr(chosen_rows, "_chosen", {})  # another process
    assert chosen_rows.chosen(512, 256, "a", measure) == 0b101
    assert len(asked) == 1
    assert chosen_rows.chosen(512, 512, "a", measure) == 0b101  # another shape
    monkeypatch.setattr(chosen_rows, "_chosen", {})
    assert chosen_rows.chosen(512, 256, "b", measure) == 0b101  # another kernel
    assert len(asked) == 3
    assert set(json.loads(file.read_text())["Card, 3 multiprocessors"]) == {"512x256", "512x512"}
    assert {p.name for p in file.parent.iterdir()} <= {file.name, f"{file.name}.lock"}


def test_ranks_that_start_together_choose_alike(file: Path) -> None:
    """One measures, the other waits and takes what it found."""
    together, asked = Barrier(2), []

    def rank(number: int) -> int:
        def measure() -> chosen_rows.Times:
            asked.append(number)
            time.sleep(0.2)
            return {1: (25.0, 24.0 + 9 * len(asked)), 8: (25.0, 24.0 + 9 * len(asked))}

        together.wait()
        return chosen_rows.chosen(512, 256, "a", measure)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(rank, range(2))
    assert first == second == 1
    assert len(asked) == 1


def test_who_holds_the_lock_for_ever_is_waited_for_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chosen_rows, "_patience", 0.1)
    file.parent.mkdir()
    with FileLock(f"{file}.lock"):
        assert chosen_rows.chosen(512, 256, "a", lambda: TIMES) == 0b101
        assert chosen_rows._patience == 0.0
        assert chosen_rows.chosen(512, 512, "a", lambda: TIMES) == 0b101
    assert set(json.loads(file.read_text())["Card, 3 multiprocessors"]) == {"512x256", "512x512"}


@pytest.mark.parametrize(("early", "streams"), [(True, 0b11), (False, 0b01)])
def test_a_tie_goes_to_the_kernel_that_overlaps(monkeypatch: pytest.MonkeyPatch, early: bool, streams: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9 if early else 8, 0))
    chosen_rows.worth.cache_clear()
    try:
        times = {1: (25.0, 29.0), 8: (26.0, 30.0), 9: (19.4, 19.0), 16: (20.0, 20.0), 17: (21.0, 20.0), 32: (9.0, 20.0)}
        assert chosen_rows.faster(times) == streams
    finally:
        chosen_rows.worth.cache_clear()


@pytest.mark.parametrize(
    "text", ["", "[]", '{"Card, 3 multiprocessors": 3}', '{"Card, 3 multiprocessors": {"8x8": {}}}']
)
def test_a_cache_that_cannot_be_read_is_written_anew(file: Path, text: str) -> None:
    file.parent.mkdir()
    file.write_text(text)
    assert chosen_rows.of_card("Card, 3 multiprocessors") == {}
    assert chosen_rows.chosen(8, 8, "a", lambda: TIMES) == 0b101
    us = "26/30, 70/80, 90/120 us, this kernel's and Marlin's, at 8, 64, 128 rows"
    assert chosen_rows.of_card("Card, 3 multiprocessors") == {"8x8": f"streams 1 to 8 and 65 to 128 rows ({us})"}


def test_a_cache_that_cannot_be_written_is_one_line(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.parent.write_text("a file where the folder should be")
    logger = logging.getLogger("vllm.plugins.gemma4_spec")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, logger.name):
            assert chosen_rows.chosen(8, 8, "a", lambda: {1: (3.0, 2.0), 8: (3.0, 4.0)}) == 0
    finally:
        logger.removeHandler(caplog.handler)
    assert "cannot be written" in caplog.text
    assert "NVFP4 GEMM 8x8: Marlin (3/4 us, this kernel's and Marlin's, at 8 rows)" in caplog.text


def test_a_measurement_that_fails_leaves_marlin(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> chosen_rows.Times:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    said: list[str] = []
    monkeypatch.setattr(stream_gemm, "_times", fails)
    monkeypatch.setattr(stream_gemm, "_maker", lambda _: "a")
    monkeypatch.setattr(stream_gemm.logger, "info", lambda text, *values: said.append(text % values))
    layer: Any = SimpleNamespace(output_size_per_partition=8, input_size_per_partition=16)
    assert stream_gemm.faster(layer) == 0
    assert said == ["NVFP4 GEMM 8x16 stays on Marlin: CUDA out of memory."]
    assert not file.exists()


KERNELS = {8: {"8x16": 4.0, "other": 9.0}, 64: {"8x16": 30.0, "64x16": 14.9, "other": 15.0}}


def test_the_fastest_kernel_is_kept_beside_the_streamed_batches(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure() -> chosen_rows.Kernels:
        asked.append(1)
        return KERNELS

    assert chosen_rows.chosen(512, 256, "a", lambda: TIMES) == 0b101
    for _ in range(2):
        assert chosen_rows.fastest("512x256, few rows", "a", measure) == {8: "8x16", 64: "other"}
        monkeypatch.setattr(chosen_rows, "_chosen", {})  # another process
    assert len(asked) == 1
    said = chosen_rows.of_card("Card, 3 multiprocessors")
    us = "4.0/9.0, 15.0/15.0 us there, this and other"
    assert said["512x256, few rows"] == f"8x16 to 8 rows, other to 64 rows ({us})"
    assert said["512x256"].startswith("streams 1 to 8")


def test_other_makers_times_do_not_count_in_one_process_either(file: Path) -> None:
    assert chosen_rows.fastest("8x8", "a", lambda: KERNELS) == {8: "8x16", 64: "other"}
    assert chosen_rows.fastest("8x8", "b", lambda: {8: {"8x16": 4.0, "other": 4.0}}) == {8: "other"}


@pytest.mark.parametrize("us", [{"8": {"8x16": 4.0}}, {"8": [4.0, 9.0]}, {"8": {"other": "fast"}}])
def test_times_of_another_kind_are_measured_anew(file: Path, us: Any) -> None:
    file.parent.mkdir()
    file.write_text(json.dumps({"Card, 3 multiprocessors": {"8x8": {"made_by": "a", "us": us}}}))
    assert chosen_rows.fastest("8x8", "a", lambda: KERNELS) == {8: "8x16", 64: "other"}


def test_times_while_the_card_waited_for_the_host_are_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy host that needs 0.3 ms to launch what the card runs in 20 us; each filling of memory takes the card 40.

    Most calls share the card with another engine that starts.
    """
    now = {"host": 0.0, "card": 0.0}
    others = itertools.cycle([0, 9, 31, 12])

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            now["card"] = self.at = max(now.values())

        def query(self) -> bool:
            return self.at <= now["host"]

        def synchronize(self) -> None:
            now["host"] = max(now.values())

        def elapsed_time(self, other: Event) -> float:
            return (other.at - self.at) / 1000

    class Memory:
        def zero_(self) -> None:
            now["card"] = max(now.values()) + 40

    def call() -> None:
        now["host"] += 300
        now["card"] = max(now.values()) + 20 + next(others)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: Memory())
    assert chosen_rows.clock("cuda")(call) == pytest.approx(20)
