"""Two data-parallel engines behind one server: each drafts for its own requests.

A dense model's engines know nothing of each other: vLLM gives each a data-parallel size of one. Engines of a model with
experts share those, so every pass of target or drafter is one of both, and an engine without requests runs along.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support import tiny_models, tiny_tokenizer
from tests.support.commands import counted, post, vllm_server
from tests.support.engine import engine, generate, random_prompts

PROMPTS = random_prompts([5 + 11 * i for i in range(8)])
TOKENS = 24
EXPERTS = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}


def complete(url: str, prompt: list[int]) -> list[int]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    return list(post(f"{url}/v1/completions", body | {"return_token_ids": True})["choices"][0]["token_ids"])


@pytest.mark.slow
@pytest.mark.parametrize("experts", [{}, {"enable_moe_block": True, **EXPERTS}], ids=["dense", "experts"])
def test_every_engine_drafts(tmp_path: Path, experts: dict[str, Any]) -> None:
    model = tiny_models.save(tiny_models.target_config(**experts), tmp_path / "model")
    tiny_tokenizer.save(model)
    with engine(model, max_model_len=512) as llm:
        want = generate(llm, PROMPTS, TOKENS)
    speculative = {"method": "draft_model", "model": str(model), "num_speculative_tokens": 3}
    arguments = ("--data-parallel-size", "2", "--api-server-count", "1", "--served-model-name", "tiny")
    arguments += ("--speculative-config", json.dumps(speculative))
    with vllm_server(model, tmp_path / "log", *arguments) as url, ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(lambda prompt: complete(url, prompt), PROMPTS)) == want
        assert complete(url, PROMPTS[0]) == want[0]  # one engine has nothing to do
        proposed, accepted = (counted(url, f"spec_decode_num_{name}_tokens") for name in ("draft", "accepted"))
    assert set(proposed) == {"0", "1"}
    assert min(proposed.values()) > 0
    assert accepted == proposed
