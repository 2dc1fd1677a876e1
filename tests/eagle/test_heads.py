"""EAGLE and EAGLE3 heads beside a Gemma 4 target.

Plain decoding owns the answers, transformers the target's hidden states, a head in plain PyTorch the drafts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma4ForCausalLM

from tests.eagle.reference_head import AUX_LAYERS, ReferenceHead, save_head
from tests.support.engine import acceptance, engine, generate, random_prompts
from tests.support.recorder import Recorder
from tests.support.stock import without
from vllm_gemma4_spec.spec_decode.patches import CHUNK_BOUNDARIES

LENGTHS, TOKENS, K = (3, 33, 70, 200), 16, 3
# Hidden states go to about 20; measured differences stay below 1e-4.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Head:
    """A head and what is expected of it: KV cache groups, and whether the drafter's groups are ours."""

    method: str
    layer_types: list[str]
    head_dims: list[int]
    groups: int
    architecture: str = "LlamaForCausalLMEagle3"


SLIDING, FULL = "sliding_attention", "full_attention"
HEADS = {
    "eagle": Head("eagle", [FULL], [32], 1, "LlamaForCausalLM"),
    "eagle3-one-group": Head("eagle3", [FULL], [32], 1),
    "eagle3-two-groups": Head("eagle3", [SLIDING, FULL], [32, 32], 2),
    "eagle3-two-head-sizes": Head("eagle3", [SLIDING, FULL], [32, 64], 2, "Eagle3TwoHeadSizesForCausalLM"),
}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunked-prefill": {"max_num_batched_tokens": 96, "max_num_seqs": 8},
    "prefix-caching": {"enable_prefix_caching": True},
    "replaced-requests": {"max_num_seqs": 2},
}
FAST = {
    ("eagle", "plain"),
    ("eagle3-one-group", "plain"),
    ("eagle3-two-groups", "chunked-prefill"),
    ("eagle3-two-head-sizes", "plain"),
}


@functools.cache
def plain(model: Path) -> list[list[int]]:
    with engine(model) as llm:
        return generate(llm, random_prompts(LENGTHS), TOKENS)


@pytest.mark.parametrize(
    ("head", "way"),
    [pytest.param(h, w, marks=() if (h, w) in FAST else pytest.mark.slow) for h in HEADS for w in WAYS],
)
def test_a_head_drafts_as_its_reference(tiny: dict[str, Path], tmp_path: Path, head: str, way: str) -> None:
    from vllm import ModelRegistry

    from tests.eagle.two_head_sizes import Eagle3TwoHeadSizesForCausalLM

    ModelRegistry.register_model("Eagle3TwoHeadSizesForCausalLM", Eagle3TwoHeadSizesForCausalLM)
    kind = HEADS[head]
    folder = save_head(tmp_path / "head", kind.method, kind.layer_types, kind.head_dims, kind.architecture)
    want = plain(tiny["target"])
    with engine(tiny["target"], folder, K, speculative={"method": kind.method}, **WAYS[way]) as llm:
        recorder, before = Recorder(llm), acceptance(llm)
        for _ in range(2 if way == "prefix-caching" else 1):
            assert generate(llm, random_prompts(LENGTHS), TOKENS) == want
        assert (acceptance(llm) - before).proposed > 0
        drafter = recorder.runner.drafter
        gids = {g.kv_cache_group_id for g in drafter.draft_attn_groups}
        assert len(gids) == kind.groups
        # No layer of the head is in the group that comes first, which is the target's.
        assert min(gids) > 0
        assert (drafter._gemma4_spec_groups is not None) == (kind.groups > 1)

    target = Gemma4ForCausalLM.from_pretrained(tiny["target"], dtype=torch.float32).eval()
    reference = ReferenceHead(folder, target.get_input_embeddings().weight.detach())
    assert len(recorder.given) >= len(LENGTHS) * 4
    texts = [p + a for p, a in zip(random_prompts(LENGTHS), want, strict=True)]
    if way == "chunked-prefill":
        assert any(
            g.first == 0 and len(g.context) <= n and g.context == t[: len(g.context)]
            for g in recorder.given
            for n, t in zip(LENGTHS, texts, strict=True)
        )
    for given in recorder.given:
        # Also after a chunk of a prompt, what follows is the request's own next token.
        n = len(given.context)
        assert any(given.context[: len(t)] == t[:n] for t in texts)
        with torch.no_grad():
            seen = target.model(torch.tensor([given.context[:-1]]), output_hidden_states=True)
            if kind.method == "eagle3":
                hidden = torch.cat([seen.hidden_states[i][0] for i in AUX_LAYERS], -1)
            else:
                hidden = seen.last_hidden_state[0]
            assert (given.hidden - hidden[given.first :]).abs().max() < TOLERANCE
            assert given.draft == reference.draft(given.context, hidden, K)


def test_stock_follows_a_chunk_with_the_prompts_last_token(tiny: dict[str, Path], tmp_path: Path) -> None:
    folder = save_head(tmp_path / "head", "eagle3", [FULL], [32], "LlamaForCausalLMEagle3")
    (prompt,) = random_prompts((200,))
    options = WAYS["chunked-prefill"]
    with (
        without(CHUNK_BOUNDARIES),
        engine(tiny["target"], folder, K, speculative={"method": "eagle3"}, **options) as llm,
    ):
        recorder = Recorder(llm)
        generate(llm, [prompt], 2)
    chunk = recorder.given[0].context
    assert len(chunk) < len(prompt)
    assert chunk[:-1] == prompt[: len(chunk) - 1]
    assert chunk[-1] == prompt[-1] != prompt[len(chunk) - 1]


@pytest.mark.parametrize("head", ["eagle3-two-groups", pytest.param("eagle", marks=pytest.mark.slow)])
def test_prefix_hits_are_those_of_plain_decoding(tiny: dict[str, Path], tmp_path: Path, head: str) -> None:
    """Prompts that share most of their tokens, and one asked again; vLLM reports each request's hit."""
    kind = HEADS[head]
    folder = save_head(tmp_path / "head", kind.method, kind.layer_types, kind.head_dims, kind.architecture)
    first, other = random_prompts((400, 60), seed=9)
    prompts = [first, first, first[:333] + other, first[:150] + other]
    seen = {}
    for name, drafter in (("plain", None), ("head", folder)):
        with engine(
            tiny["target"],
            drafter,
            K,
            **({"speculative": {"method": kind.method}} if drafter else {}),
            enable_prefix_caching=True,
        ) as llm:
            seen[name] = [_asked(llm, prompt) for prompt in prompts]
    # The head's KV heads are half as wide, so its blocks hold 32 tokens and a hit ends where both kinds of block do.
    assert seen["head"] == [(answer, hit // 32 * 32) for answer, hit in seen["plain"]]
    assert [hit > 0 for _, hit in seen["plain"]] == [False, True, True, True]


def _asked(llm: Any, prompt: list[int]) -> tuple[list[int], int]:
    """Answer and tokens of the prompt that came from the cache."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    return list(output.outputs[0].token_ids), output.num_cached_tokens
