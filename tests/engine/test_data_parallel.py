"""Two data-parallel engines behind one server: each drafts for its own requests.

A dense model's engines know nothing of each other: vLLM gives each a data-parallel size of one.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support import tiny_tokenizer
from tests.support.commands import counted, post, vllm_server
from tests.support.engine import engine, generate, random_prompts

PROMPTS = random_prompts([5 + 11 * i for i in range(8)])
TOKENS = 24


def complete(url: str, prompt: list[int]) -> list[int]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    return list(post(f"{url}/v1/completions", body | {"return_token_ids": True})["choices"][0]["token_ids"])


@pytest.mark.slow
def test_every_engine_drafts(tiny: dict[str, Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny["target"], model)
    tiny_tokenizer.save(model)
    with engine(model, max_model_len=512) as llm:
        want = generate(llm, PROMPTS, TOKENS)
    speculative = {"method": "draft_model", "model": str(model), "num_speculative_tokens": 3}
    arguments = ("--data-parallel-size", "2", "--api-server-count", "1", "--served-model-name", "tiny")
    arguments += ("--speculative-config", json.dumps(speculative))
    with vllm_server(model, tmp_path / "log", *arguments) as url, ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(lambda prompt: complete(url, prompt), PROMPTS)) == want
        proposed, accepted = (counted(url, f"spec_decode_num_{name}_tokens") for name in ("draft", "accepted"))
    assert set(proposed) == {"0", "1"}
    assert min(proposed.values()) > 0
    assert accepted == proposed
