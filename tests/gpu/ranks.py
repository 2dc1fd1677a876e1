"""Models whose heads and widths several ranks divide, with fewer KV heads than ranks, as E4B, 31B and 26B-A4B have."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tests.gpu import device
from tests.gpu.device import Run
from tests.gpu.parts import REHEARSAL
from tests.support import engine, tiny_models

# 31B-like: four KV heads in sliding layers and two in full ones (31B: 16 and 4). E4B-like: two (E4B: 2).
TARGET = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_global_key_value_heads": 2}
DRAFTER = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "intermediate_size": 128}
# 26B-A4B-like: two KV heads in full layers, as there.
EXPERTS = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32}
PROMPTS = engine.random_prompts((5, 17, 65, 200))
TOKENS = 32


def save(folder: Path) -> dict[str, Path]:
    """``target``, ``drafter``, ``close`` and ``experts``."""
    target = tiny_models.save(tiny_models.target_config(**device.HEADS, **TARGET), folder / "target")
    return {
        "target": target,
        "drafter": tiny_models.save(tiny_models.drafter_config(**device.HEADS, **DRAFTER), folder / "drafter", seed=1),
        "close": tiny_models.perturbed(target, folder / "close"),
        "experts": tiny_models.save(tiny_models.target_config(**device.HEADS, **TARGET, **EXPERTS), folder / "experts"),
    }


def plain_answers(folders: dict[str, Path]) -> Callable[[str], list[list[int]]]:
    """Which model -> its answers by plain decoding on one card."""

    @cache
    def get(name: str) -> list[list[int]]:
        with engine.engine(folders[name], **device.options(None)) as llm:
            return device.ask(llm, PROMPTS, TOKENS).tokens

    return get


def on_ranks(count: int, target: Path, drafter: Path | None, *, backend: str = "mp", **changes: Any) -> Run:
    """Answers of ``count`` ranks, drafts compared on each rank with the original's where graphs made them."""
    if not REHEARSAL:
        changes = {"async_scheduling": True} | changes
    settings = device.options(None if drafter is None else device.K, **changes, **device.ranks(count, backend))
    with engine.engine(target, drafter, device.K, **settings) as llm:
        method = changes.get("speculative", {}).get("method", "draft_model")
        run = device.drafted if drafter is not None and method == "draft_model" else device.ask
        return run(llm, PROMPTS, TOKENS)
