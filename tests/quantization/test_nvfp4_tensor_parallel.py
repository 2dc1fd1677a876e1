"""Two tensor-parallel ranks on the CPU give what one gives: scales and low-rank factors are cut where they must be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.checkpoints import reference
from tests.quantization.comparison import FIXTURES, TOKENS, engine_logprobs, text_only
from tests.support import fresh

NAMES = sorted(p.name for p in FIXTURES.iterdir())
TOLERANCE = 1e-3  # as in test_nvfp4_engine.py

# SVDQuant has everything that is cut: pre_quant_scale and A along the inputs, B along the outputs, one KV head for two.
FAST = "31b-svdquant"


TWO = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
SCRIPT = f"""
import sys
from pathlib import Path
import torch
from tests.quantization.comparison import engine_logprobs, text_only
folder = Path(sys.argv[1])
torch.save(engine_logprobs(folder, **{TWO}, **text_only(folder)), sys.argv[2])
"""


def workers_environment() -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name.startswith("VLLM_")}
    return own | {"TORCHDYNAMO_DISABLE": "1", "VLLM_SLEEP_WHEN_IDLE": "1"}


def test_two_ranks(tmp_path: Path) -> None:
    """With workers that have the libraries imported, and nothing of vLLM."""
    folder = FIXTURES / FAST
    done = fresh.run(
        fresh.FORKED_CHILDREN + SCRIPT, str(folder), str(tmp_path / "logprobs.pt"), **workers_environment()
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    ours = torch.load(tmp_path / "logprobs.pt")
    torch.testing.assert_close(ours, reference.logprobs(folder, TOKENS), atol=TOLERANCE, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_that_vllm_starts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in workers_environment().items():
        monkeypatch.setenv(variable, value)
    folder = FIXTURES / name
    ours = engine_logprobs(folder, **TWO, **text_only(folder))
    torch.testing.assert_close(ours, reference.logprobs(folder, TOKENS), atol=TOLERANCE, rtol=0)
