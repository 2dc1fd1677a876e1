"""An fp8 KV cache: answers with speculation are plain decoding's, and a checkpoint's own scales are applied.

With an fp8 cache a last-bit difference between two batch shapes can round a key to the next fp8 value, and 0.19.1
rounds queries and attention weights to fp8, too. So this part runs with VLLM_BATCH_INVARIANT=1, under which a token's
numbers do not depend on what else is in the batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu import device
from tests.gpu.exactness import WAYS, Exactness
from tests.quantization.comparison import each, edited
from tests.support import engine, kv_scales
from tests.support.stock import without
from vllm_gemma4_spec.quantization.patches import KV_SCALES

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return device.models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def exactness(models: dict[str, Path]) -> Exactness:
    return Exactness(models, kv_cache_dtype="fp8")


@pytest.mark.parametrize("way", ["self", "near copy, async"])
def test_answers_equal_plain_decoding(exactness: Exactness, measured: Any, way: str) -> None:
    measured(**exactness.check(WAYS[way]))


def first_logprobs(llm: Any, prompts: list[list[int]]) -> torch.Tensor:
    """``[len(prompts), 512]``: of every token as the first of the answer."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0, detokenize=False, logprobs=512)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    rows = [o.outputs[0].logprobs[0] for o in outputs]
    return torch.tensor([[row[token].logprob for token in range(512)] for row in rows])


def test_scales_of_a_checkpoint_are_applied(models: dict[str, Path], tmp_path: Path, measured: Any) -> None:
    """Mean distance of the first answer token's log-probabilities from those with a 16-bit cache.

    The scaled model's keys are 512 times larger, past what fp8 holds, and its queries as much smaller: the same
    attention. Powers of two change no rounding, so with scales applied right the distance is that of an fp8 cache of
    the model as it was, or less: queries then stay in 16 bits. ``stock`` is the scaled model without the patch, and
    ``unscaled`` what a cache without scales makes of its keys. The scaled model also drafts for itself.
    """
    # Random weights are chaotic: a rounding moves every logit as far as garbage would. With attention that adds a tenth
    # as much to the residual, what moves them stays in proportion.
    quieter = each("post_attention_layernorm.weight", lambda weight: 0.1 * weight)
    model = edited(models["drafter"], tmp_path / "quiet", quieter)
    scaled = kv_scales.with_kv_scales(model, tmp_path / "scaled", k_scale=8.0, v_scale=2.0, k_gain=512.0)
    unscaled = kv_scales.with_kv_scales(model, tmp_path / "unscaled", k_scale=1.0, v_scale=1.0, k_gain=512.0)
    prompts = engine.random_prompts(device.LENGTHS)
    found: dict[str, torch.Tensor] = {}
    settings: dict[str, Any] = {"dtype": "bfloat16", "max_num_seqs": 4, "max_logprobs": 512}
    settings |= {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 29}

    def run(way: str, which: Path, dtype: str, drafter: Path | None = None) -> device.Run:
        with engine.engine(which, drafter, device.K, kv_cache_dtype=dtype, **settings) as llm:
            found[way] = first_logprobs(llm, prompts)
            return device.ask(llm, prompts, device.TOKENS)

    run("16 bits", model, "auto")
    run("fp8", model, "fp8")
    run("unscaled", unscaled, "auto")  # the checkpoint asks for fp8
    self_drafting = run("scaled", scaled, "auto", scaled)
    with without(KV_SCALES):
        run("stock", scaled, "auto")
    distance = {way: float((rows - found["16 bits"]).abs().mean()) for way, rows in found.items()}
    measured(**{way: round(d, 5) for way, d in distance.items()}, **self_drafting.numbers())
    far = min(distance["stock"], distance["unscaled"])
    assert distance["scaled"] <= 1.2 * distance["fp8"] < far / 2
    assert self_drafting.acceptance > 0.9  # bfloat16: ties in the last bit


def test_a_trained_assistant_is_accepted_as_often(measured: Any) -> None:
    """The demo's assistant reads the target's own cache: what fp8 costs it, over a 16-bit cache."""
    from transformers import AutoTokenizer
    from vllm import SamplingParams

    from vllm_gemma4_spec.demo import build, measure
    from vllm_gemma4_spec.demo.template import prompt_text

    pair, _ = build.ensure(build.default_folder())
    tokenizer = AutoTokenizer.from_pretrained(pair.target)
    prompts = [tokenizer(prompt_text(d))["input_ids"] for d in measure.held_out(256)]
    params = SamplingParams(max_tokens=96, temperature=0, detokenize=False, stop_token_ids=measure.END_IDS)
    speculative = {"model": str(pair.assistant), "num_speculative_tokens": 4}
    accepted: dict[str, float] = {}
    for dtype in ("auto", "fp8"):
        settings = device.options(4, dtype="bfloat16", kv_cache_dtype=dtype, max_model_len=384)
        settings["attention_backend"] = "TRITON_ATTN"  # batch invariance asks for a name
        with engine.engine(pair.target, speculative_config=speculative, **settings) as llm:
            before = engine.acceptance(llm)
            llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
            spent = engine.acceptance(llm) - before
        assert spent.proposed > 1000
        accepted[dtype] = spent.accepted / spent.proposed
    measured(ratio=round(accepted["fp8"] / accepted["auto"], 4), **{k: round(v, 4) for k, v in accepted.items()})
    assert accepted["auto"] > 0.3
    assert accepted["fp8"] >= 0.98 * accepted["auto"]
