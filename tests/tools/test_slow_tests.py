"""``tools.slow_tests``: which tests run in one process, in which order, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path

from tools.slow_tests import SECONDS, TOGETHER, Group, groups

TESTS = Path(__file__).parents[1]


def test_what_is_said_of_files_is_said_of_files_that_exist() -> None:
    files = {name.partition("::")[0] for name in {**SECONDS, **TOGETHER}}
    assert [name for name in files if not (TESTS / name).exists()] == []


def test_tests_that_share_an_engine_run_in_one_process() -> None:
    file = "tests/mtp/test_exactness.py::test_answers"
    made = groups(
        f"{file}[{kind}-{k}-{way}]" for way in ("plain", "one-group") for k in (1, 2) for kind in ("31b", "e4b")
    )
    assert sorted(group.tests for group in made) == sorted(
        [[f"{file}[{kind}-{k}-{way}]" for k in (1, 2)] for kind in ("31b", "e4b") for way in ("plain", "one-group")]
    )
    assert len({group.name for group in made}) == 4


def test_long_tests_run_alone_and_first() -> None:
    short = [f"tests/fuzz/test_scaling.py::test_it[{number}]" for number in range(100)]
    long = [f"tests/engine/test_soak.py::test_{name}" for name in ("nothing_decays", "other")]
    made = groups([*short, *long])
    assert [group.tests for group in made[:2]] == [[test] for test in long]
    assert [test for group in made[2:] for test in group.tests] == short
    assert {group.seconds for group in made[2:-1]} == {120}


def test_the_worst_counts_and_what_never_ran_is_said(tmp_path: Path) -> None:
    group = Group("some", ["a", "b", "c", "d", "e"], 1)
    came = [("a", "passed"), ("b", "passed"), ("b", "error"), ("c", "skipped"), ("d", "failed"), ("d", "passed")]
    lines = [json.dumps({"test": test, "outcome": outcome, "seconds": 1, "why": "so"}) for test, outcome in came]
    (tmp_path / "some.jsonl").write_text("\n".join([*lines, '{"test": "e", "outco']))
    group.read(tmp_path)
    assert group.outcomes == {"a": "passed", "b": "error", "c": "skipped", "d": "failed", "e": "not run"}
    assert group.skipped == {"c": "so"}
