"""Skips what cannot run here, visibly, and writes down what did."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.parts import PARTS, REHEARSAL

Measured = Callable[..., None]
_FOUND: dict[str, dict[str, Any]] = {}


def _why_not(part: str) -> str | None:
    """Why a part cannot run in this process."""
    import torch

    wanted = PARTS[part]
    if not REHEARSAL:
        if not torch.cuda.is_available():
            return "no CUDA device"
        if torch.cuda.device_count() < wanted.cards:
            return f"needs {wanted.cards} cards, and there are {torch.cuda.device_count()}"
    missing = {name: value for name, value in wanted.env.items() if os.environ.get(name) != value}
    if missing:  # some of them are read at import
        return f"run it with `python -m tests.gpu {part}`, which sets {', '.join(missing)}"
    return None


@pytest.fixture(scope="module", autouse=True)
def _runs_here(request: pytest.FixtureRequest) -> None:
    reason = _why_not(request.path.stem.removeprefix("test_"))
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def cuda() -> None:
    """For tests of what a CPU does not have: they are left out of a rehearsal."""
    if REHEARSAL:
        pytest.skip("needs CUDA")


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Measured:
    """``measured(name=value)``: a number that goes into the results file beside the test's outcome."""

    def note(**values: Any) -> None:
        _FOUND.setdefault(request.node.name, {}).setdefault("measured", {}).update(values)
        print(request.node.name, json.dumps(values), flush=True)

    return note


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    name = report.nodeid.rpartition("::")[2]
    row = _FOUND.setdefault(name, {})
    row["seconds"] = round(row.get("seconds", 0.0) + report.duration, 1)
    if report.when == "call" or report.outcome != "passed":
        row["outcome"] = report.outcome
    if report.failed:
        row["why"] = str(report.longrepr)[-4000:]
    elif report.skipped:
        row["why"] = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if target := os.environ.get("GEMMA4_GPU_RESULTS"):  # after every test: a part that is killed keeps what it found
        Path(target).write_text(json.dumps(_FOUND, indent=1))
