"""What vLLM's own rules for drafters with hidden states would cost an assistant."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mtp import pairs
from tests.mtp.drafts import Watched
from tests.mtp.shared import OPTIONS, K, do, jobs
from tests.support.engine import engine
from tests.support.stock import without
from vllm_gemma4_spec.mtp.patches import MTP_SCHEDULING
from vllm_gemma4_spec.spec_decode.patches import PREFIX_HITS


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return pairs.save_pair("31b", tmp_path_factory.mktemp("mtp"))


def test_stock_scheduling_stops_before_the_maximum_length(pair: tuple[Path, Path]) -> None:
    target, assistant = pair
    drafting = {"speculative_config": {"model": str(assistant), "num_speculative_tokens": K}}
    with without(MTP_SCHEDULING), engine(target, **drafting, **OPTIONS) as llm:
        done = do(llm, jobs("31b")["longest"], Watched(llm, assistant))
    assert max(len(d.context) for d in done.drafts) <= 256 - K + 1


@pytest.mark.slow
def test_stock_loses_prefix_hits(pair: tuple[Path, Path]) -> None:
    target, assistant = pair
    job = jobs("31b")["prefixes"]
    with engine(target, **OPTIONS) as llm:
        plain = do(llm, job)
    drafting = {"speculative_config": {"model": str(assistant), "num_speculative_tokens": K}}
    with without(MTP_SCHEDULING), without(PREFIX_HITS), engine(target, **drafting, **OPTIONS) as llm:
        assert do(llm, job).hits < plain.hits
