"""The benchmark's arithmetic; the engine it drives needs a GPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_expected_tokens_of_a_step() -> None:
    tokens = load("best_k").acceptance_length
    assert tokens(0.0, 3) == 1.0
    assert tokens(1.0, 3) == 4.0
    assert tokens(0.5, 2) == pytest.approx(1 + 0.5 + 0.25)


def test_best_k_follows_acceptance_and_pass_time() -> None:
    best = load("best_k").best_k
    step = {"verify": 10.0, "other": 1.0, "first": 3.0, "further": 2.5, "plain": 11.0}
    assert best(step, 0.0)[0] == 0  # no draft is ever accepted: plain decoding
    assert best(step, 1.0)[0] == max(range(9))
    ks = [best(step, a)[0] for a in (0.2, 0.5, 0.7, 0.9, 0.95)]
    assert ks == sorted(ks)
    eager = step | {"first": 32.0, "further": 32.0}
    assert best(eager, 0.9)[0] == 0


def test_table_shows_ratios_to_stock() -> None:
    """A prompt's length has rows of its own."""
    stock, fast = {"concurrency": 1, "acceptance": None}, {"concurrency": 1, "acceptance": 1.0}
    runs = [
        {**stock, "prompt": 128, "tokens_per_s": 80.0, "step": 12.5},
        {**stock, "prompt": 3000, "tokens_per_s": 40.0, "step": 25.0},
    ]
    drafts = [
        {**fast, "prompt": 128, "tokens_per_s": 160.0, "step": 25.0, "verify": 11.0},
        {**fast, "prompt": 3000, "tokens_per_s": 120.0, "step": 33.3},
    ]
    text = load("full_shape").table({"stock": {"runs": runs}, "spec": {"runs": drafts}})
    assert [line.split()[5] for line in text.splitlines()[1:]] == ["1.00", "1.00", "2.00", "3.00"]


def test_equal_tokens_are_counted_until_the_first_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    equal = load("equal_tokens")
    seen = equal.compared([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 3, 4], [5, 9, 7, 8]])
    assert (seen["equal_answers"], seen["tokens_until_the_first_difference"], seen["tokens"]) == (1, 5, 8)
    assert seen["decided_otherwise"] == pytest.approx(1 / 6, abs=1e-6)


def test_an_engine_is_compared_with_plain_decoding_of_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    reference = load("equal_tokens").reference
    engines = ["stock", "plain", "plain+A=1", "self@3", "self@3+A=1", "mtp@4+B=1"]
    assert [reference(e, engines) for e in engines] == [None, "stock", None, "plain", "plain+A=1", None]
