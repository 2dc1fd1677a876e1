"""Norms and rotary embedding of heads as one kernel, beside float64; in bfloat16: ``tests/gpu/test_kernels.py``."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.fresh import interpreted


def test_heads_are_what_float64_rounds_to(tmp_path: Path) -> None:
    interpreted("tests.kernels.heads_by_triton", tmp_path / "wrong.json")
    assert json.loads((tmp_path / "wrong.json").read_text()) == []
