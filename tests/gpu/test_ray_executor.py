"""vLLM's Ray executor with a rank on each card: the answers of one card, and every draft accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.gpu import device, ranks
from tests.gpu.device import CARDS
from tests.support import engine

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]  # on a CPU: tests/engine/test_ray.py
ray = pytest.importorskip("ray", reason="ray is not installed")


def test_ranks_of_ray_answer_as_one_card(tmp_path: Path, measured: Any) -> None:
    model = ranks.save(tmp_path)["target"]
    with engine.engine(model, **device.options(None)) as llm:
        wanted = device.ask(llm, ranks.PROMPTS, ranks.TOKENS).tokens
    ray.init(num_gpus=CARDS, include_dashboard=False, object_store_memory=1 << 30)
    settings = device.options(**device.ranks(CARDS, "ray"))
    try:
        with engine.engine(model, model, device.K, **settings) as llm:
            found = device.ask(llm, ranks.PROMPTS, ranks.TOKENS)
            executor = type(llm.llm_engine.model_executor).__name__
    finally:
        ray.shutdown()
    measured(ranks=CARDS, executor=executor, **found.numbers())
    assert executor == "RayDistributedExecutor"
    device.same_answers(found.tokens, wanted)
    assert found.accepted == found.proposed > 0
