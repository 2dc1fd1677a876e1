"""Answers with an assistant are plain decoding's, in every way of running and at every draft length."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.mtp import pairs
from tests.mtp.drafts import Watched
from tests.mtp.shared import Done, agreement, counter, do
from tests.support import ways
from tests.support.engine import engine, random_prompts
from tests.support.ways import WAYS

pytestmark = pytest.mark.slow


def work(way: str) -> tuple[list[list[int]], list[int]]:
    """Prompts and answer lengths for one way of running."""
    if way == "prefix-caching":
        prompts = ways.with_prefixes(random_prompts((15, 17, 65, 200, 700)))
        return prompts, [6] * len(prompts)
    return ways.work(way)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``pair(kind)``: folders of a target and its assistant, each kind written once."""
    folder = tmp_path_factory.mktemp("pairs")
    return functools.cache(lambda kind: pairs.save_pair(kind, folder))


@functools.cache
def plain(model: Path, way: str) -> Done:
    with engine(model, **WAYS[way]) as llm:
        return do(llm, work(way))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("kind", pairs.KINDS)
def test_answers_and_drafts_in_every_way_of_running(pair: Any, kind: str, k: int, way: str) -> None:
    target, assistant = pair(kind)
    want = plain(target, way)
    drafting = {"speculative_config": {"model": str(assistant), "num_speculative_tokens": k}}
    with engine(target, **drafting, **WAYS[way]) as llm:
        watched, preempted = Watched(llm, assistant), counter(llm, "vllm:num_preemptions")
        done = do(llm, work(way), watched)
        assert (counter(llm, "vllm:num_preemptions") > preempted) == (way == "preemption")
    assert done.answers == want.answers
    assert done.hits == want.hits
    assert (want.hits > 0) == (way == "prefix-caching")
    assert watched.changed == 0
    assert {len(d.made) for d in done.drafts} == {k}
    assert agreement([(d.made, d.wanted) for d in done.drafts]) > 0.9
