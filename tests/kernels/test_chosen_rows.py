"""Which kernel gets which batches: from times measured once per card and shape, and kept."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_gemma4_spec.kernels import chosen_rows

TIMES = {1: (25.0, 29.0), 16: (26.0, 30.0), 64: (70.0, 60.0), 128: (80.0, 120.0)}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "cache" / "nvfp4-rows.json"
    monkeypatch.setattr(chosen_rows, "path", lambda: file)
    monkeypatch.setattr(chosen_rows, "card", lambda: "Card, 3 multiprocessors")
    monkeypatch.setattr(chosen_rows, "_chosen", {})
    return file


@given(st.dictionaries(st.integers(1, 128), st.tuples(st.floats(1, 99), st.floats(1, 99))))
def test_no_batch_up_to_the_choice_was_slower_and_the_next_was(times: chosen_rows.Times) -> None:
    most = chosen_rows.most_rows(times)
    assert all(ours <= marlins for rows, (ours, marlins) in times.items() if rows <= most)
    above = sorted(rows for rows in times if rows > most)
    assert not above or times[above[0]][0] > times[above[0]][1]


def test_measured_once_and_kept(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, ...]] = []

    def measure(rows: tuple[int, ...]) -> chosen_rows.Times:
        asked.append(rows)
        return TIMES

    for _ in range(2):
        assert chosen_rows.rows_for(512, 256, "a", measure) == 16
    monkeypatch.setattr(chosen_rows, "_chosen", {})  # another process
    assert chosen_rows.rows_for(512, 256, "a", measure) == 16
    assert asked == [chosen_rows.ROWS]
    assert chosen_rows.rows_for(512, 512, "a", measure) == 16  # another shape
    monkeypatch.setattr(chosen_rows, "_chosen", {})
    assert chosen_rows.rows_for(512, 256, "b", measure) == 16  # another kernel
    assert len(asked) == 3
    assert set(json.loads(file.read_text())["Card, 3 multiprocessors"]) == {"512x256", "512x512"}
    assert [p.name for p in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "text", ["", "[]", '{"Card, 3 multiprocessors": 3}', '{"Card, 3 multiprocessors": {"8x8": {}}}']
)
def test_a_cache_that_cannot_be_read_is_written_anew(file: Path, text: str) -> None:
    file.parent.mkdir()
    file.write_text(text)
    assert chosen_rows.of_card("Card, 3 multiprocessors") == {}
    assert chosen_rows.rows_for(8, 8, "a", lambda _: TIMES) == 16
    assert chosen_rows.of_card("Card, 3 multiprocessors") == {
        "8x8": "streams up to 16 rows (16 rows: 26 us, Marlin 30)"
    }


def test_a_cache_that_cannot_be_written_is_one_line(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.parent.write_text("a file where the folder should be")
    logger = logging.getLogger("vllm.plugins.gemma4_spec")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.INFO, logger.name):
            assert chosen_rows.rows_for(8, 8, "a", lambda _: {1: (3.0, 2.0)}) == 0
    finally:
        logger.removeHandler(caplog.handler)
    assert "cannot be written" in caplog.text
    assert "NVFP4 GEMM 8x8: Marlin (1 row: 3 us, Marlin 2)" in caplog.text
