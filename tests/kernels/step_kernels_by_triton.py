"""Greedy sampling and copies of block tables, interpreted: ``-m tests.kernels.step_kernels_by_triton RESULTS``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    from tests.support.step_cases import wrong_copies, wrong_greedy_steps

    results = {
        "greedy": wrong_greedy_steps(9000) + wrong_greedy_steps(50),
        "used": wrong_copies("cpu", True, 60),
        "whole": wrong_copies("cpu", False, 20),
    }
    Path(sys.argv[1]).write_text(json.dumps(results))
