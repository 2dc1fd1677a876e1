"""An assistant whose queries are normed and turned by one operator drafts what it drafts without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.mtp import pairs
from tests.support.engine import acceptance, engine, generate, random_prompts
from vllm_gemma4_spec import scope
from vllm_gemma4_spec.kernels import head_norms as kernel
from vllm_gemma4_spec.performance import compile_settings, head_norms

K = 3


def by_torch(
    qkv: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    q_weight: Tensor,
    _: Tensor,
    q_heads: int,
    kv_heads: int,
    eps: float,
) -> Tensor:
    """What ``norm_heads`` gives for a layer without keys of its own."""
    assert kv_heads == 0
    x = qkv.view(len(qkv), q_heads, -1).double()
    x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * q_weight.double()
    cos, sin = (half.double().unsqueeze(1) for half in cos_sin[positions].chunk(2, -1))
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(qkv.dtype).flatten()


@pytest.mark.parametrize("kind", ["31b", "e4b"])
def test_drafts_and_answers_are_the_same(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, assistant = pairs.save_pair(kind, tmp_path)
    prompts, limits = random_prompts([5, 40, 17]), [20, 26, 32]
    config = {"model": str(assistant), "num_speculative_tokens": K}
    called: list[tuple[int, int]] = []

    def norm_heads(*given: Any) -> Tensor:
        called.append((given[5], len(given[3])))
        return by_torch(*given[:8])

    def assistants(vllm_config: Any, name: str) -> bool:
        return getattr(vllm_config.model_config.hf_config, "model_type", "") == scope.ASSISTANT

    found = []
    for one in (False, True):
        with monkeypatch.context() as patched:
            if one:
                patched.setattr(compile_settings, "marked", assistants)
                patched.setattr(head_norms, "turns", lambda rotary, size: True)
                patched.setattr(head_norms, "norms", lambda norm, weighted: True)
                patched.setattr(kernel, "available", lambda *heads: True)
                patched.setattr(kernel, "norm_heads", norm_heads)
            with engine(target, speculative_config=config, max_num_seqs=4) as llm:
                before = acceptance(llm)
                found.append((generate(llm, prompts, limits), acceptance(llm) - before))
        assert bool(called) == one
    assert found[0] == found[1]
    assert len(set(called)) == 2, "sliding and full layers"


@pytest.mark.parametrize("kind", ["31b", "e4b"])
def test_the_operator_suits_an_assistants_layers(kind: str, tmp_path: Path) -> None:
    """In bfloat16, as published: their norm, and their rotary embedding where heads are not as small as these."""
    target, assistant = pairs.save_pair(kind, tmp_path)
    config = {"model": str(assistant), "num_speculative_tokens": 1}
    found = set()
    with engine(target, speculative_config=config, dtype="bfloat16") as llm:
        drafter = llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter
        for attention in (layer.self_attn for layer in drafter.model.model.layers):
            size = attention.head_dim
            suits = head_norms.turns(attention.rotary_emb, size), head_norms.norms(attention.q_norm, weighted=True)
            found.add((size, *suits))
    assert found == {(32, False, True), (64, True, True)}
