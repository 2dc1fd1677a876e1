"""Draft writes stay in their request's blocks; without the patch they do not."""

from __future__ import annotations

from pathlib import Path

import pytest

import vllm_gemma4_spec
from tests.support.configs import vllm_config
from tests.support.engine import acceptance, engine, generate, random_prompts
from tests.support.stock import without
from vllm_gemma4_spec import scope

# A prompt that ends with its block: the first draft already needs a block the prompt did not.
PROMPTS = random_prompts((16, 32, 48, 16, 32, 64))


def test_stock_writes_drafts_where_the_request_owns_nothing(tiny: dict[str, Path]) -> None:
    from vllm_gemma4_spec.spec_decode.invariants import InvariantError
    from vllm_gemma4_spec.spec_decode.patches import OWN_BLOCKS

    with engine(tiny["target"], tiny["target"], 3) as llm:  # also applies all patches
        generate(llm, PROMPTS, 4)
    with (
        without(OWN_BLOCKS),
        engine(tiny["target"], tiny["target"], 3) as llm,
        pytest.raises(InvariantError, match=r"position \d+ of KV cache group \d+ .*does not own"),
    ):
        generate(llm, PROMPTS, 4)


def test_first_step_looks_ahead(tiny: dict[str, Path]) -> None:
    """Blocks for the drafts are there in the first step, so those drafts are right, too."""
    with engine(tiny["target"], tiny["target"], 5) as llm:
        before = acceptance(llm)
        generate(llm, PROMPTS, 12)
        counts = acceptance(llm) - before
    assert counts.accepted == counts.proposed > 0


def test_rows_keep_nothing_of_a_request_that_left(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from vllm.v1.worker.block_table import BlockTable

    def rows() -> list[list[int]]:
        table = BlockTable(16, 3, 6, 64, False, torch.device("cpu"), 16, 1)
        table.add_row([1, 2, 3, 4], 0)
        table.add_row([5, 6, 7, 8, 9], 2)
        table.clear_row(0)
        table.move_row(2, 0)  # condense
        table.add_row([10], 2)
        table.add_row([11, 12], 0)  # the row's request left and another came
        return table.block_table.np.tolist()

    vllm_gemma4_spec.apply()
    stock = rows()  # no engine of Gemma 4 is being made
    assert stock[2] == [10, 6, 7, 8, 9, 0]
    assert stock[0] == [11, 12, 7, 8, 9, 0]
    monkeypatch.setattr(scope, "current_config", vllm_config)
    assert rows()[2] == [10, 0, 0, 0, 0, 0]
    assert rows()[0] == [11, 12, 0, 0, 0, 0]
