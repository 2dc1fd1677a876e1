"""Runs a module of tests in a process of its own, in which Triton's kernels are interpreted on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Read when triton is imported. With no visible device vLLM keeps triton without a driver for it.
_ENVIRONMENT = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_PLUGINS": ""}


def interpreted(module: str, *args: str | Path) -> None:
    """``python -m MODULE ARGS``; vLLM loads no plugin there: a script applies the patches that it wants."""
    env = os.environ | _ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", module, *args], cwd=ROOT, env=env, check=True)
