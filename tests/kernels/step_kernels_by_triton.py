"""Greedy sampling, tables and corrected counts, interpreted: ``-m tests.kernels.step_kernels_by_triton RESULTS``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    from tests.support.step_cases import wrong_copies, wrong_counts, wrong_greedy_steps
    from vllm_gemma4_spec.kernels import computed_counts

    results = {
        "greedy": wrong_greedy_steps(9000) + wrong_greedy_steps(50),
        "used": wrong_copies("cpu", True, 60),
        "counts": wrong_counts(computed_counts.update),
        "whole": wrong_copies("cpu", False, 20),
    }
    Path(sys.argv[1]).write_text(json.dumps(results))
