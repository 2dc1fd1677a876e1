"""What HF transformers computes from the same weights, float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Gemma4ForCausalLM

from tests.support.engine import engine, generate, random_prompts
from tests.support.recorder import Recorder

# Measured here: 1e-6 at 5 tokens, 5e-5 at 700, on log-probabilities of both kinds.
TOLERANCE = 2e-4


@pytest.mark.parametrize("kind", ["target", "drafter"])
def test_logits_are_those_of_transformers(tiny: dict[str, Path], kind: str) -> None:
    from vllm import SamplingParams

    prompts = random_prompts((1, 5, 40, 200, 700))
    with engine(tiny[kind], max_logprobs=512) as llm:
        params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, detokenize=False, logprobs=512)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    model = Gemma4ForCausalLM.from_pretrained(tiny[kind], dtype=torch.float32).eval()
    for prompt, output in zip(prompts, outputs, strict=True):
        answer = list(output.outputs[0].token_ids)
        with torch.no_grad():
            wanted = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        for step, found in zip(wanted, output.outputs[0].logprobs, strict=True):
            assert len(found) == 512
            got = torch.tensor([found[token].logprob for token in range(512)])
            assert (got - step).abs().max() < TOLERANCE


@pytest.fixture
def recorded(tiny: dict[str, Path]) -> list[tuple[list[int], list[int]]]:
    with engine(tiny["target"], tiny["drafter"], 4) as llm:
        recorder = Recorder(llm)
        generate(llm, random_prompts((3, 33, 70, 300)), 10)
    return recorder.drafts


def test_drafts_are_what_transformers_would_draft(
    tiny: dict[str, Path], recorded: list[tuple[list[int], list[int]]]
) -> None:
    """An E4B-like drafter beside a 31B-like target: sixteen groups between them, every draft its own greedy one."""
    model = Gemma4ForCausalLM.from_pretrained(tiny["drafter"], dtype=torch.float32).eval()
    assert len(recorded) >= 4 * 9
    for context, draft in recorded:
        with torch.no_grad():
            logits = model(torch.tensor([context + draft[:-1]])).logits[0, len(context) - 1 :]
        assert logits.argmax(-1).tolist() == draft
