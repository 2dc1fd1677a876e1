"""vLLM's Ray executor with two ranks, on the CPU: the answers of one rank, and drafts as good."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.ray_engine import PROMPTS, TOKENS
from tests.support.engine import engine, generate
from tests.support.fresh import ROOT

pytestmark = pytest.mark.slow
pytest.importorskip("ray", reason="ray is not installed")


@pytest.mark.parametrize("drafter", ["target", "drafter"])
def test_two_ranks_answer_as_one(tiny: dict[str, Path], tmp_path: Path, drafter: str) -> None:
    with engine(tiny["target"]) as llm:
        wanted = generate(llm, PROMPTS, TOKENS)
    path = [str(ROOT / "tests/support/ray_on_cpu"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    subprocess.run(
        [sys.executable, "-m", "tests.engine.ray_engine", tiny["target"], tiny[drafter], tmp_path / "result.json"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "RAY_USAGE_STATS_ENABLED": "0"},
        check=True,
        timeout=600,
    )
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["executor"] == "RayDistributedExecutor"
    assert found["answers"] == wanted
    counts = found["counts"]
    assert counts["proposed"] >= 3 * len(PROMPTS) * (TOKENS // 4)
    if drafter == "target":
        assert counts["accepted"] == counts["proposed"]
