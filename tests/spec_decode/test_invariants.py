"""``VLLM_GEMMA4_SPEC_CHECK=1``: each invariant is found broken when it is, in passes of the real engine."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.engine import engine, generate, random_prompts
from tests.support.stock import without
from vllm_gemma4_spec import settings
from vllm_gemma4_spec.spec_decode import acceptance, invariants, kv_cache_groups
from vllm_gemma4_spec.spec_decode.acceptance import CHANCE, WINDOW, AcceptanceWatch
from vllm_gemma4_spec.spec_decode.invariants import InvariantError
from vllm_gemma4_spec.spec_decode.patches import ACCEPTANCE_WATCH


def another_requests_block(cad: Any, positions: torch.Tensor, slots: torch.Tensor) -> None:
    first, second = cad.query_start_loc[:2].tolist()
    slots[0, first] = slots[0, second]


def another_positions_slot(cad: Any, positions: torch.Tensor, slots: torch.Tensor) -> None:
    slots[-1, 0] += 1


def a_longer_sequence(cad: Any, positions: torch.Tensor, slots: torch.Tensor) -> None:
    cad.seq_lens[0] += 1


def a_length_of_one(cad: Any, positions: torch.Tensor, slots: torch.Tensor) -> None:
    cad.seq_lens[0] = 1


def swapped_positions(cad: Any, positions: torch.Tensor, slots: torch.Tensor) -> None:
    positions[1], positions[2] = positions[2].clone(), positions[1].clone()


def test_each_broken_invariant_is_named(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass of a short run is checked as it is, and then with one thing wrong at a time."""
    cases: dict[Callable[..., None], str] = {
        another_requests_block: "would be written to block",
        another_positions_slot: "another position's|does not own",
        a_longer_sequence: "but a sequence length of",
        a_length_of_one: "but a sequence length of 1",
        swapped_positions: "out of order",
    }
    found: dict[str, int] = {}
    passes: list[int] = []
    original = invariants.check_pass

    def checked(runner: Any, gids: Any, cad: Any, positions: torch.Tensor, slots: torch.Tensor) -> None:
        original(runner, gids, cad, positions, slots)
        passes.append(cad.num_reqs)
        for wrong, message in cases.items():
            if wrong is swapped_positions and len(positions) < cad.num_reqs * 3:
                continue  # a pass of one token a request has no order
            if wrong is another_requests_block and cad.num_reqs < 2:
                continue
            mine = copy.copy(cad)
            mine.seq_lens = cad.seq_lens.clone()
            args = (positions.clone(), slots.clone())
            wrong(mine, *args)
            with pytest.raises(InvariantError, match=message):
                original(runner, gids, mine, *args)
            found[wrong.__name__] = found.get(wrong.__name__, 0) + 1

    monkeypatch.setattr(kv_cache_groups, "check_pass", checked)
    with engine(tiny["target"], tiny["target"], 3) as llm:
        generate(llm, random_prompts((20, 33, 50)), 9)
    assert {w.__name__ for w in cases} == set(found)
    assert len(passes) >= 3 * 3


def test_past_the_maximum_length_nothing_is_reported(tiny: dict[str, Path]) -> None:
    """There positions are clamped and nothing is written."""
    with engine(tiny["target"], tiny["target"], 5, max_model_len=64) as llm:
        assert [len(a) for a in generate(llm, random_prompts((50, 58)), 64)] == [14, 6]


def test_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(settings.CHECK.name)
    assert not settings.CHECK.on()
    original = object()
    assert acceptance.make_spec_decoding_stats(original) is original  # type: ignore[arg-type]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(acceptance.logger, "warning", lambda text, *args: lines.append(text % args))
    return lines


def test_chance_is_said_once(said: list[str]) -> None:
    watch = AcceptanceWatch()
    for _ in range(WINDOW - 1):
        watch.add(0)
    assert not said
    for _ in range(3 * WINDOW):
        watch.add(0)
    assert len(said) == 1
    assert f"of the last {WINDOW} drafts 0 had their first token accepted" in said[0]


def test_acceptance_that_falls_is_said_and_a_middling_one_is_not(said: list[str]) -> None:
    watch = AcceptanceWatch()
    enough = round(1 / CHANCE)
    for i in range(4 * WINDOW):
        watch.add(2 if i % enough == 0 else 0)
    assert not said
    for _ in range(WINDOW):
        watch.add(0)
    assert len(said) == 1


def counted(llm: Any) -> int:
    return llm.llm_engine.engine_core.engine_core.scheduler._gemma4_spec_acceptance._first.maxlen


def test_a_drafter_that_knows_nothing_is_reported(
    tiny: dict[str, Path], said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance, "WINDOW", 100)
    for drafter, reports in (("drafter", 1), ("close", 0)):
        with engine(tiny["target"], tiny[drafter], 1) as llm:
            generate(llm, random_prompts([20] * 8), 30)
            assert counted(llm) == 100
        assert len(said) == reports, drafter
        said.clear()


def test_stock_says_nothing_about_acceptance(tiny: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    with (
        without(ACCEPTANCE_WATCH),
        caplog.at_level(logging.WARNING),
        engine(tiny["target"], tiny["drafter"], 1) as llm,
    ):
        generate(llm, random_prompts([20] * 8), 80)
        assert not hasattr(llm.llm_engine.engine_core.engine_core.scheduler, acceptance.WATCH)
    assert not [r for r in caplog.records if "accept" in r.getMessage()]
