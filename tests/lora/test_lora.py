"""LoRA adapters on the target: the drafter drafts without them, answers are those of plain decoding with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.mtp import pairs
from tests.mtp.drafts import Watched
from tests.mtp.shared import agreement
from tests.support.engine import acceptance, engine, random_prompts
from tests.support.stock import without
from tests.support.tiny_models import target_config
from vllm_gemma4_spec.lora.patches import LORA_ALIASES

RANK, TOKENS = 4, 24
PROMPTS = random_prompts((5, 40, 100))
OPTIONS = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2, "enable_prefix_caching": True}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As PEFT writes one, for q_proj, o_proj and down_proj of every layer."""
    folder, config, g = tmp_path_factory.mktemp("adapter"), target_config(), torch.Generator().manual_seed(5)
    tensors = {}
    for layer, kind in enumerate(config.layer_types):
        heads = config.num_attention_heads * (config.global_head_dim if "full" in kind else config.head_dim)
        for module, rows, columns in (
            ("self_attn.q_proj", heads, config.hidden_size),
            ("self_attn.o_proj", config.hidden_size, heads),
            ("mlp.down_proj", config.hidden_size, config.intermediate_size),
        ):
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, columns, generator=g) / columns**0.5
            tensors[f"{name}.lora_B.weight"] = torch.randn(rows, RANK, generator=g) / RANK**0.5
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "bias": "none"}
    settings |= {"target_modules": ["q_proj", "o_proj", "down_proj"], "base_model_name_or_path": ""}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def answers(llm: Any, adapter: Path) -> tuple[list[list[int]], list[list[int]]]:
    """One batch in which half of the requests have the adapter: answers without and with it."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True, detokenize=False)
    request = LoRARequest("adapter", 1, str(adapter))
    prompts = [{"prompt_token_ids": p} for p in PROMPTS for _ in range(2)]
    outputs = llm.generate(prompts, params, lora_request=[None, request] * len(PROMPTS), use_tqdm=False)
    ids = [list(o.outputs[0].token_ids) for o in outputs]
    return ids[::2], ids[1::2]


@pytest.mark.parametrize("drafter", ["target", pytest.param("close", marks=pytest.mark.slow)])
def test_requests_with_and_without_an_adapter(tiny: dict[str, Path], adapter: Path, drafter: str) -> None:
    with engine(tiny["target"], **OPTIONS) as llm:
        want = answers(llm, adapter)
    assert want[0] != want[1]
    with engine(tiny["target"], tiny[drafter], 3, **OPTIONS) as llm:
        before = acceptance(llm)
        assert answers(llm, adapter) == want
        counts = acceptance(llm) - before
    assert 0 < counts.accepted < counts.proposed
    if drafter == "target":  # every draft of the requests without an adapter is accepted
        assert counts.accepted >= len(PROMPTS) * (TOKENS - 1) * 3 // 4


@pytest.mark.slow
def test_an_assistant_drafts_for_requests_with_an_adapter(tiny: dict[str, Path], adapter: Path, tmp_path: Path) -> None:
    """It reads the keys that the adapter made, and embeds tokens without it."""
    assistant = pairs.save_assistant(pairs.KINDS["31b"](), tmp_path)
    with engine(tiny["target"], **OPTIONS) as llm:
        want = answers(llm, adapter)
    with engine(tiny["target"], assistant, 3, speculative={"method": "mtp"}, **OPTIONS) as llm:
        watched = Watched(llm, assistant)
        assert answers(llm, adapter) == want
    assert len(watched.drafts) > TOKENS
    assert agreement([(d.made, d.wanted) for d in watched.drafts]) > 0.9
    assert watched.changed == 0


@pytest.mark.slow
def test_stock_ignores_the_adapter(tiny: dict[str, Path], adapter: Path) -> None:
    with without(LORA_ALIASES), engine(tiny["target"], **OPTIONS) as llm:
        plain, adapted = answers(llm, adapter)
    assert plain == adapted
