"""Two tensor-parallel ranks on the CPU give what one gives: scales and low-rank factors are cut where they must be."""

from __future__ import annotations

import pytest
import torch

from tests.checkpoints import reference
from tests.quantization.comparison import FIXTURES, TOKENS, engine_logprobs, text_only

NAMES = sorted(p.name for p in FIXTURES.iterdir())
TOLERANCE = 1e-3  # as in test_nvfp4_engine.py

# SVDQuant has everything that is cut: pre_quant_scale and A along the inputs, B along the outputs, one KV head for two.
FAST = "31b-svdquant"


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == FAST else pytest.mark.slow) for n in NAMES])
def test_two_ranks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # as in the engine tests, for the workers
    monkeypatch.setenv("VLLM_SLEEP_WHEN_IDLE", "1")
    folder = FIXTURES / name
    ours = engine_logprobs(folder, tensor_parallel_size=2, distributed_executor_backend="mp", **text_only(folder))
    torch.testing.assert_close(ours, reference.logprobs(folder, TOKENS), atol=TOLERANCE, rtol=0)
