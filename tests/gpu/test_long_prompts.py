"""A context of 131,072 tokens, which the quick start promises, on little more KV cache than start-up asks for.

0.19.1 admits a prompt only if blocks for its whole length are free in every KV cache group, although sliding groups
give theirs back meanwhile: here it would ask for three times the blocks that there are, and wait for ever.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.gpu import device
from tests.gpu.parts import REHEARSAL
from tests.support import engine, tiny_models

pytestmark = pytest.mark.gpu
CONTEXT, STEP = (2048, 512) if REHEARSAL else (131_072, 8192)
TOKENS = 16
# Two heads and one full layer: attention in float32 over the whole context takes seconds. Its KV is 64 KiB a block, of
# which the full layer needs 8,192 and each of five sliding layers 260: 0.58 GiB.
CACHE = 3 << 28
SHAPE: dict[str, Any] = {"max_position_embeddings": CONTEXT, "num_attention_heads": 2, "num_key_value_heads": 1}
PROMPTS = engine.random_prompts((CONTEXT - TOKENS - 8, 700))  # the second is served beside the first, or after it


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(
        tiny_models.target_config(**device.HEADS, **SHAPE), tmp_path_factory.mktemp("long") / "model"
    )


def answers(model: Path, k: int | None) -> device.Run:
    changes: dict[str, Any] = {
        "num_gpu_blocks_override": None,
        "max_model_len": CONTEXT,
        "max_num_batched_tokens": STEP,
    }
    settings = device.options(k, **changes)
    if not REHEARSAL:
        settings["kv_cache_memory_bytes"] = CACHE * (1 if k is None else 2)
    with engine.engine(model, None if k is None else model, k or 1, **settings) as llm:
        return device.ask(llm, PROMPTS, TOKENS)


@pytest.fixture(scope="module")
def plain(model: Path, _runs_here: None) -> device.Run:
    return answers(model, None)


def test_plain_decoding_serves_the_whole_context(plain: device.Run, measured: Any) -> None:
    measured(context=CONTEXT)
    assert [len(tokens) for tokens in plain.tokens] == [TOKENS, TOKENS]


def test_drafting_serves_it_with_the_same_answers(model: Path, plain: device.Run, measured: Any) -> None:
    found = answers(model, device.K)
    measured(context=CONTEXT, **found.numbers())
    device.same_answers(found.tokens, plain.tokens)
    assert found.proposed - found.accepted <= device.K  # one near tie at most
    assert found.accepted > 0
