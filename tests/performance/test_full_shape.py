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
    runs = [{"concurrency": 1, "acceptance": None, "tokens_per_s": 80.0, "step": 12.5}]
    fast = [{"concurrency": 1, "acceptance": 1.0, "tokens_per_s": 160.0, "step": 25.0, "verify": 11.0}]
    text = load("full_shape").table({"stock": {"runs": runs}, "spec": {"runs": fast}})
    assert "1.00" in text.splitlines()[1]
    assert "2.00" in text.splitlines()[2]
