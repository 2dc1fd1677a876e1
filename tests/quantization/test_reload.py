"""Weights loaded again into a running engine: afterwards it answers as one that was started with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import reference
from tests.quantization.comparison import FIXTURES, TOKENS, each, edited, per_expert, text_only, without
from tests.support.engine import engine
from vllm_gemma4_spec.errors import CheckpointError

TOLERANCE = 1e-3
NAMES = [
    "31b-awq-full",
    *(pytest.param(p.name, marks=pytest.mark.slow) for p in sorted(FIXTURES.iterdir()) if p.name != "31b-awq-full"),
]
OPTIONS: dict[str, Any] = {"max_model_len": 64, "max_num_batched_tokens": 64, "max_num_seqs": 1, "max_logprobs": -1}
OPTIONS |= {"num_gpu_blocks_override": 64}


@pytest.fixture(autouse=True)
def fresh_rotary_embeddings() -> Iterator[None]:
    """A reload leaves vLLM's cache of rotary embeddings on the meta device; the next engine here starts anew."""
    yield
    from vllm.model_executor.layers import rotary_embedding

    rotary_embedding._ROPE_DICT.clear()


def logprobs(llm: Any) -> torch.Tensor:
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=-1, detokenize=False)
    with torch.compiler.set_stance("force_eager"):
        (out,) = llm.generate([{"prompt_token_ids": TOKENS}], sampling, use_tqdm=False)
    return torch.stack([torch.tensor([row[t].logprob for t in range(len(row))]) for row in out.prompt_logprobs[1:]])


def reload(llm: Any, folder: Path) -> None:
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})


def halved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Other values under the same names: global scales, norms, and the codes of half the rows."""
    tensors = each("weight_scale_2", lambda s: s / 2)(tensors)
    tensors = each("layernorm.weight", lambda w: (w.float() * 1.1).to(w.dtype))(tensors)
    return each("_proj.weight", lambda w: torch.cat((w[: len(w) // 2].flip(0), w[len(w) // 2 :])))(tensors)


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_the_new_weights_and_of_the_old_again(name: str, tmp_path: Path) -> None:
    first = FIXTURES / name
    second = edited(first, tmp_path / "second", halved)
    with engine(first, **OPTIONS, **text_only(first)) as llm:
        before = logprobs(llm)
        reload(llm, second)
        torch.testing.assert_close(logprobs(llm), reference.logprobs(second, TOKENS), atol=TOLERANCE, rtol=0)
        reload(llm, first)
        torch.testing.assert_close(logprobs(llm), before, atol=0, rtol=0)
    assert (reference.logprobs(second, TOKENS) - before).abs().max() > 100 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["packed", "dequantized"])
def test_experts(weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_GEMMA4_SPEC_NVFP4_WEIGHTS", weights)
    first = edited(FIXTURES / "26b-mm-awq-lite", tmp_path / "first", per_expert)
    second = edited(first, tmp_path / "second", halved)
    with engine(first, **OPTIONS, **text_only(first)) as llm:
        before = logprobs(llm)
        reload(llm, second)
        torch.testing.assert_close(logprobs(llm), reference.logprobs(second, TOKENS), atol=TOLERANCE, rtol=0)
        reload(llm, first)
        torch.testing.assert_close(logprobs(llm), before, atol=0, rtol=0)


def test_what_the_new_weights_lack_or_have_more(tmp_path: Path) -> None:
    """Scales that are gone multiply by one; one that was not there before has no place in a compiled model."""
    with_scales = FIXTURES / "31b-awq-full"
    plain = edited(with_scales, tmp_path / "plain", without("pre_quant_scale"))
    with engine(with_scales, **OPTIONS) as llm:
        reload(llm, plain)
        torch.testing.assert_close(logprobs(llm), reference.logprobs(plain, TOKENS), atol=TOLERANCE, rtol=0)
    with engine(plain, **OPTIONS) as llm, pytest.raises(CheckpointError, match=r"pre_quant_scale: .* that has none"):
        reload(llm, with_scales)


@pytest.mark.slow
def test_nan_scales_of_the_new_weights_are_repaired_and_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the first load: repaired by the rule, and not loaded at all in strict mode."""
    broken = FIXTURES / "31b-awq-full"  # ModelOpt's own NaN scales
    whole = edited(broken, tmp_path / "whole", each("weight_scale", lambda s: s.float().nan_to_num(0.0).to(s.dtype)))
    with engine(whole, **OPTIONS) as llm:
        reload(llm, broken)
        torch.testing.assert_close(logprobs(llm), reference.logprobs(broken, TOKENS), atol=TOLERANCE, rtol=0)
        reload(llm, whole)
        monkeypatch.setenv("VLLM_GEMMA4_SPEC_NAN_SCALES", "strict")
        with pytest.raises(CheckpointError, match="NaN block scales in"):
            reload(llm, broken)
