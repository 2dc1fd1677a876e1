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

PROMPTS = engine.random_prompts((5, 17, 65, 200))
TOKENS = [53, 46, 39, 32]  # batches of three are padded to four; no token of these answers is a near tie


def save(folder: Path) -> dict[str, Path]:
    """``target``, ``drafter``, ``close`` and ``experts``."""
    return tiny_models.save_for_ranks(folder, **device.HEADS)


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
