"""``reload_weights`` on a running engine: graphs, second copies of weights and scales are those of the new weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import tiny
from tests.gpu import device
from tests.gpu.parts import REHEARSAL
from tests.quantization.comparison import FIXTURES, WIDE_FIXTURES, edited, per_expert, text_only
from tests.support import engine, tiny_models

pytestmark = pytest.mark.gpu
PROMPTS = engine.random_prompts((3, 17, 40), vocab=tiny.VOCAB - 8)
SMALL: dict[str, Any] = {"max_model_len": 128, "max_num_batched_tokens": 128, "num_gpu_blocks_override": 256}
NVFP4 = (FIXTURES / "31b-{}") if REHEARSAL else (WIDE_FIXTURES / "wide-31b-{}")


def other_weights(llm: Any, folder: Path) -> list[list[int]]:
    """Answers after the target's weights were replaced by those of ``folder``."""
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
    return engine.generate(llm, PROMPTS, 24)


@pytest.mark.parametrize("form", ["awq-full", "svdquant"])
def test_an_nvfp4_target(form: str, measured: Any) -> None:
    """The same weights again: the same answers and as many accepted drafts, through the graphs captured before."""
    folder = Path(str(NVFP4).format(form))
    changes = {**SMALL, "dtype": "float32" if REHEARSAL else "float16", "speculative": {"quantization": "modelopt"}}
    with engine.engine(folder, folder, device.K, **device.options(**changes)) as llm:
        before = device.ask(llm, PROMPTS, 24)
        llm.collective_rpc("reload_weights")
        after = device.ask(llm, PROMPTS, 24)
    measured(before=before.acceptance, after=after.acceptance)
    device.same_answers(after.tokens, before.tokens)
    assert after.accepted == before.accepted > 0


def test_nvfp4_experts(tmp_path: Path, measured: Any) -> None:
    """Routers and every expert's scales are written anew: memory that nothing has written yet holds NaN meanwhile."""
    folder = FIXTURES / "26b-mm-awq-lite" if REHEARSAL else WIDE_FIXTURES / "wide-26b-awq-lite"
    folder = edited(folder, tmp_path / "experts", per_expert)
    changes = {**SMALL, **text_only(folder), "dtype": "float32" if REHEARSAL else "float16"}
    with engine.engine(folder, **device.options(None, **changes)) as llm:
        before = engine.generate(llm, PROMPTS, 24)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            llm.collective_rpc("reload_weights")
        finally:
            torch.use_deterministic_algorithms(False)
        after = engine.generate(llm, PROMPTS, 24)
    measured(distinct=len({token for answer in before for token in answer}))
    device.same_answers(after, before)


def test_weights_of_another_checkpoint(tmp_path: Path) -> None:
    """The engine answers as one that was started with them, and as it did before when they are put back."""
    one = tiny_models.save(tiny_models.target_config(**device.HEADS), tmp_path / "one")
    two = tiny_models.save(tiny_models.target_config(**device.HEADS), tmp_path / "two", seed=7)
    with engine.engine(two, **device.options(None, **SMALL)) as llm:
        wanted = engine.generate(llm, PROMPTS, 24)
    with engine.engine(one, one, device.K, **device.options(**SMALL)) as llm:
        first = engine.generate(llm, PROMPTS, 24)
        assert first != wanted
        device.same_answers(other_weights(llm, two), wanted)
        device.same_answers(other_weights(llm, one), first)
