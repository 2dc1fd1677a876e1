"""The same patches in every process that vLLM starts, or in none."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import fresh

ROOT = Path(__file__).parents[2]
PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}

SCRIPT = """
import sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    spec = {} if sys.argv[2] == "plain" else {"speculative_config": {"method": "draft_model", "model": sys.argv[1],
                                                                     "num_speculative_tokens": 2}}
    llm = LLM(sys.argv[1], skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=256,
              max_num_seqs=4, block_size=16, num_gpu_blocks_override=256, distributed_executor_backend="mp", **spec)
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True, detokenize=False)
    print("answer", list(llm.generate([{"prompt_token_ids": [5, 6, 7]}], params)[0].outputs[0].token_ids))
"""


def run(model: Path, mode: str, **env: str) -> subprocess.CompletedProcess[str]:
    """In new processes from the start, vLLM's own included."""
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, str(model), mode],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | PROCESSES | env,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def run_forked(model: Path, mode: str) -> subprocess.CompletedProcess[str]:
    """In processes that have imported what vLLM builds on, and nothing of vLLM."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("VLLM_CPU")}
    return fresh.run(fresh.FORKED_CHILDREN + SCRIPT, str(model), mode, **kept, **PROCESSES)


def reports(text: str) -> dict[str, str]:
    """Process id -> what that process says is on."""
    return {pid: line for line, pid in re.findall(r"(vllm-gemma4-spec \S+: .*) \[process (\d+)\]", text)}


@pytest.mark.parametrize("start", [run_forked, pytest.param(run, marks=pytest.mark.slow)])
def test_every_process_reports_the_same_patches(
    tiny: dict[str, Path], start: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = start(tiny["target"], "draft")
    assert done.returncode == 0, done.stderr[-3000:]
    found = reports(done.stdout + done.stderr)
    assert len(found) == 3, found  # this process, the engine core, one worker
    assert len(set(found.values())) == 1
    assert "draft-groups" in next(iter(found.values()))


@pytest.mark.slow
@pytest.mark.parametrize("env", [{"VLLM_PLUGINS": ""}, {"VLLM_GEMMA4_SPEC": "0"}], ids=["plugins", "switch"])
def test_left_out_means_in_no_process(tiny: dict[str, Path], env: dict[str, str]) -> None:
    done = run(tiny["target"], "draft", **env)
    text = done.stdout + done.stderr
    assert done.returncode != 0
    assert "spec decode is not supported" in text  # the worker is stock: vLLM's error on the CPU
    assert "patches on" not in text
