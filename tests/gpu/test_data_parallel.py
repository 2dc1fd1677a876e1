"""Data-parallel engines behind one server on CUDA: 2 on two cards, 2 of two tensor-parallel ranks on four.

The requests and the models of ``tests/engine/test_data_parallel.py``: dense engines know nothing of each other, those
of a model with experts make every pass together.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import device
from tests.gpu.device import CARDS
from tests.gpu.parts import REHEARSAL
from tests.support import tiny_models, tiny_tokenizer
from tests.support.commands import counted, post, vllm_server
from tests.support.engine import engine, generate, random_prompts

pytestmark = pytest.mark.gpu
PROMPTS = random_prompts([5 + 11 * i for i in range(8)])
TOKENS = 24


def complete(url: str, prompt: list[int]) -> list[int]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    return list(post(f"{url}/v1/completions", body | {"return_token_ids": True})["choices"][0]["token_ids"])


@pytest.mark.parametrize("experts", [{}, tiny_models.RANKS["experts"]], ids=["dense", "experts"])
def test_every_engine_drafts(tmp_path: Path, measured: Any, experts: dict[str, Any]) -> None:
    model = tiny_models.save(
        tiny_models.target_config(**device.HEADS, **tiny_models.RANKS["target"], **experts), tmp_path / "model"
    )
    tiny_tokenizer.save(model)
    with engine(model, **device.options(None, max_model_len=512)) as llm:
        want = generate(llm, PROMPTS, TOKENS)
    speculative = {"method": "draft_model", "model": str(model), "num_speculative_tokens": device.K}
    arguments = ["--data-parallel-size", "2", "--api-server-count", "1", "--served-model-name", "tiny"]
    arguments += ["--speculative-config", json.dumps(speculative)]
    per_engine = max(1, CARDS // 2)
    if per_engine > 1:
        arguments += ["--tensor-parallel-size", str(per_engine)]
    if experts:
        arguments += ["--enable-expert-parallel"]
    if not REHEARSAL:
        compilation = device.options()["compilation_config"]
        arguments += ["--no-enforce-eager", "--compilation-config", json.dumps(compilation)]
        arguments += ["--gpu-memory-utilization", "0.05", "--kv-cache-memory-bytes", str(1 << 29)]
    with vllm_server(model, tmp_path / "log", *arguments) as url, ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(lambda prompt: complete(url, prompt), PROMPTS)) == want
        assert complete(url, PROMPTS[0]) == want[0]  # one engine has nothing to do
        proposed, accepted = (counted(url, f"spec_decode_num_{name}_tokens") for name in ("draft", "accepted"))
    measured(tensor_parallel=per_engine, proposed=proposed, accepted=accepted)
    assert set(proposed) == {"0", "1"}
    assert min(proposed.values()) > 0
    assert accepted == proposed
