"""The overlay's own counters against what really happened in the engine."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support.engine import engine, generate, random_prompts
from tests.support.recorder import Recorder
from tests.support.stock import without
from vllm_gemma4_spec.checkpoints.files import Checkpoint
from vllm_gemma4_spec.checkpoints.inspection import inspect
from vllm_gemma4_spec.metrics import reports
from vllm_gemma4_spec.spec_decode.patches import SKIPPED_DRAFTS

FIXTURES = Path(__file__).parents[1] / "checkpoints" / "fixtures"


def shown() -> Counter[tuple[str, ...]]:
    """The counters of this process as ``/metrics`` would show them: name and label -> value."""
    return Counter(
        {
            (s.name, *(v for k, v in s.labels.items() if k not in ("process", "pid"))): s.value
            for family in reports.Collector().collect()
            for s in family.samples
            if s.name.endswith("_total")
        }
    )


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(reports.FOLDER, str(tmp_path))
    reports.write()


def test_every_counter_is_there_from_the_start() -> None:
    assert set(shown()) == {
        ("gemma4_spec_nan_blocks_repaired_total", "saturated"),
        ("gemma4_spec_nan_blocks_repaired_total", "zeroed"),
        ("gemma4_spec_drafts_skipped_total",),
        ("gemma4_spec_drafts_left_out_total",),
    }


def test_drafts_skipped_are_the_requests_that_were_not_drafted_for(tiny: dict[str, Path]) -> None:
    """Near the maximum length the drafter is not run: proposals and skips together are all that were sampled."""
    prompts = random_prompts([40, 20, 30])
    with engine(tiny["target"], tiny["close"], 3, max_model_len=64, max_num_batched_tokens=256) as llm:
        recorder = Recorder(llm)
        runner, sampled = recorder.runner, []
        original = runner._sample

        def sample(*args: Any) -> Any:
            sampled.append(runner.input_batch.num_reqs)
            return original(*args)

        runner._sample = sample
        before = shown()
        generate(llm, prompts, [64 - len(p) for p in prompts])
        skipped = (shown() - before)["gemma4_spec_drafts_skipped_total",]
    assert skipped > 0
    assert skipped + len(recorder.given) == sum(sampled)


def test_nothing_is_skipped_without_speculation(tiny: dict[str, Path]) -> None:
    before = shown()
    with engine(tiny["target"], max_model_len=64, max_num_batched_tokens=256) as llm:
        generate(llm, random_prompts([40]), 24)
    assert shown() == before


@pytest.mark.parametrize("name", ["31b-awq-full", "e4b-awq-clip"])
def test_nan_blocks_repaired_are_those_that_inspect_finds(name: str) -> None:
    found = inspect(Checkpoint(FIXTURES / name)).nan
    assert found
    before = shown()
    with engine(FIXTURES / name, max_model_len=64, max_num_batched_tokens=64, max_num_seqs=1):
        pass
    repaired = shown() - before
    assert repaired["gemma4_spec_nan_blocks_repaired_total", "zeroed"] == sum(n.destroyed for n in found)
    assert repaired["gemma4_spec_nan_blocks_repaired_total", "saturated"] == sum(n.intact for n in found)


@pytest.mark.slow
def test_stock_counts_no_skipped_draft(tiny: dict[str, Path]) -> None:
    before = shown()
    with without(SKIPPED_DRAFTS), engine(tiny["target"], tiny["close"], 3, max_model_len=64) as llm:
        generate(llm, random_prompts([40]), 24)
    assert shown() == before
