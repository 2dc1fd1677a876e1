"""``benchmarks/plan_accuracy.py`` on a results file whose values are those of the plan: it must find no difference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import ROOT, environment

ARTIFACTS = os.environ.get("GEMMA4_ARTIFACTS")


@pytest.mark.skipif(not ARTIFACTS, reason="GEMMA4_ARTIFACTS is unset: no genuine configs")
def test_a_run_that_is_as_planned(tmp_path: Path) -> None:
    """31B in NVFP4 reads 19.4 GB and E4B 3.6 GB a pass: at 1 TB/s 19 and 3.6 ms, and some KV."""
    step = {"verify": 20.0, "sampling": 0.5, "gap": 0.5, "draft": 12.0, "step": 33.0}
    runs = [{"concurrency": 1, "acceptance": rate, "tokens_per_s": tokens / 33e-3, **step}
            for rate, tokens in ((1.0, 4.0), (0.5, 1.875))]  # fmt: skip
    results = {
        "args": {"target": "31B", "drafter": "E4B", "k": 3, "prompt": 128, "tokens": 128},
        "engines": {
            "stock": {"runs": [{"concurrency": 1, "acceptance": None, "tokens_per_s": 50.0, "step": 20.0}]},
            "spec": {"bandwidth": 1000.0, "target": 19.35, "drafter": 3.61, "runs": runs,
                     "draft_parts": {"1": {"first": 4.0, "further": 4.0}}},
        },
    }  # fmt: skip
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results))
    command = [sys.executable, str(ROOT / "benchmarks" / "plan_accuracy.py"), str(file)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for role in ("target", "drafter"):
        (line,) = [line for line in lines if line.startswith(f"{role}: ")]
        planned, loaded = (float(word) for word in line.split() if word[0].isdigit())
        assert planned == pytest.approx(loaded, rel=0.01)
    assert [line.split("|")[5].strip() for line in lines if line.startswith("| 1 | 1.0 ")] == ["1.00"]
    assert [line.split("|")[5].strip() for line in lines if line.startswith("| 1 | 0.5 ")] == ["1.00"]
    assert len([line for line in lines if line.startswith("| 1 | ")]) == 6 + 2
