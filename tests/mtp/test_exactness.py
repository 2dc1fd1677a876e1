"""Answers with an assistant are plain decoding's, in every way of running and at every draft length."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.mtp import pairs
from tests.mtp.drafts import Watched
from tests.mtp.shared import Done, agreement, counter, do
from tests.support.engine import engine, random_prompts

pytestmark = pytest.mark.slow

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunked-prefill": {"max_num_batched_tokens": 96, "max_num_seqs": 8},
    "prefix-caching": {"enable_prefix_caching": True},
    "one-group": {"disable_hybrid_kv_cache_manager": True},
    "preemption": {"num_gpu_blocks_override": 120, "max_num_seqs": 8},
    "replaced-requests": {"max_num_seqs": 3},
}
LENGTHS = (1, 15, 16, 17, 63, 65, 200, 700)


def work(way: str) -> tuple[list[list[int]], list[int]]:
    """Prompts and answer lengths for one way of running."""
    prompts = random_prompts(LENGTHS)
    if way == "prefix-caching":  # the same prompts and their prefixes again
        prompts = random_prompts((15, 17, 65, 200, 700))
        prompts += [[*p[: len(p) * 2 // 3 + 1], 7, 8, 9] for p in prompts] + prompts
        return prompts, [6] * len(prompts)
    if way == "preemption":  # all of them grow, and together they do not fit
        return random_prompts([60 + i for i in range(8)]), [120] * 8
    limits = [3, 40, 7, 25, 1, 12, 33, 20] if way == "replaced-requests" else [32] * len(prompts)
    return prompts, limits


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
