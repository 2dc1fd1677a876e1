"""Assistants in the real engine: transformers owns the drafts, plain decoding the answers, the target its cache."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from tests.mtp import pairs
from tests.mtp.digest import digest
from tests.mtp.drafts import Watched
from tests.support.engine import Acceptance, acceptance, engine, generate, random_prompts
from tests.support.stock import without
from vllm_gemma4_spec.mtp.patches import MTP_SCHEDULING
from vllm_gemma4_spec.spec_decode.patches import PREFIX_HITS

RECORDED = Path(__file__).parent / "recorded"
K = 8
# A random network makes about ten of one rounding in each pass. Measured on the CPU over 383 drafts of eight passes:
# beside the reference on the engine's own state and KV, the first other token is that of pass 6 (10 drafts in all);
# beside transformers, whose target rounds otherwise, that of pass 4 (60 drafts in all).
SURE = 3


@functools.cache
def recorded(kind: str) -> dict[str, Any]:
    """What ``record_with_transformers.py`` wrote."""
    made: dict[str, Any] = json.loads((RECORDED / f"{kind}.json").read_text())
    return made


def agreement(drafts: list[tuple[list[int], list[int]]]) -> float:
    """Share of drafts that are equal as a whole; their first ``SURE`` passes must be in all."""
    assert [made[:SURE] for made, _ in drafts] == [wanted[:SURE] for _, wanted in drafts]
    return sum(made == wanted for made, wanted in drafts) / len(drafts)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``pair(kind)``: folders of a target and its assistant, each kind written once."""
    folder = tmp_path_factory.mktemp("pairs")
    return functools.cache(lambda kind: pairs.save_pair(kind, folder))


def speculative(assistant: Path, k: int, **changes: Any) -> dict[str, Any]:
    return {"speculative_config": {"model": str(assistant), "num_speculative_tokens": k} | changes}


@pytest.mark.parametrize(
    "kind", [k if k in ("31b", "e4b") else pytest.param(k, marks=pytest.mark.slow) for k in pairs.KINDS]
)
def test_drafts_are_those_of_transformers(pair: Any, kind: str) -> None:
    """Every draft of every step, eight passes deep; the target's cache stays bit for bit what it was."""
    target, assistant = pair(kind)
    made = recorded(kind)
    assert [digest(target), digest(assistant)] == made["weights"], "other weights than were recorded"
    wanted = {
        tuple(row["prompt"] + row["answer"][: i + 1]): draft
        for row in made["rows"]
        for i, draft in enumerate(row["drafts"])
    }
    with engine(target, num_gpu_blocks_override=512, **speculative(assistant, K)) as llm:
        drafter = Watched(llm, assistant)
        answers = generate(llm, [row["prompt"] for row in made["rows"]], len(made["rows"][0]["answer"]))
        groups = drafter.runner.kv_cache_config.kv_cache_groups
        donors = set(drafter.donors.values())
        assert all(any(d in g.layer_names for g in groups) for d in donors)
    assert answers == [row["answer"] for row in made["rows"]]
    compared = [(d, wanted[tuple(d.context)]) for d in drafter.drafts if tuple(d.context) in wanted]
    assert len(compared) >= 4 * len(made["rows"])
    assert agreement([(d.made, theirs) for d, theirs in compared]) > 0.75
    assert agreement([(d.wanted, theirs) for d, theirs in compared]) > 0.75  # so it may stand in for transformers
    assert agreement([(d.made, d.wanted) for d in drafter.drafts]) > 0.9
    assert drafter.changed == 0


@pytest.mark.parametrize(
    "mistake", ["position", *(pytest.param(m, marks=pytest.mark.slow) for m in ("order", "scale", "donor"))]
)
def test_a_mistake_changes_most_drafts(pair: Any, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above has teeth: by transformers' own record, a drafter with one part wrong is far off."""
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    target, assistant = pair("31b")
    with engine(target, num_gpu_blocks_override=512, **speculative(assistant, 3)) as llm:
        drafter = Watched(llm, assistant)
        inner = drafter.runner.drafter.model.model
        if mistake == "position":
            monkeypatch.setattr("vllm_gemma4_spec.mtp.proposer.POSITION", 0)
        elif mistake == "order":
            half = inner.pre_projection.weight.shape[1] // 2
            inner.pre_projection.weight.data = inner.pre_projection.weight.data.roll(half, 1).contiguous()
        elif mistake == "scale":
            inner.normalizer.fill_(1.0)
        else:
            # Another sliding layer of the target: groups share their tensors, so that its blocks are what differs.
            groups = drafter.runner.kv_cache_config.kv_cache_groups
            mine = next(
                g for g in drafter.runner.drafter.draft_attn_groups if isinstance(g.kv_cache_spec, SlidingWindowSpec)
            )
            mine.kv_cache_group_id = next(
                gid
                for gid, group in enumerate(groups)
                if gid != mine.kv_cache_group_id and group.kv_cache_spec == groups[mine.kv_cache_group_id].kv_cache_spec
            )
        generate(llm, random_prompts((33, 70)), 24)
    assert drafter.changed == 0
    # Beside the right draft of the same hidden state; a random network agrees by chance in few places.
    assert len(drafter.drafts) > 20
    assert sum(d.made[0] == d.wanted[0] for d in drafter.drafts) < 0.5 * len(drafter.drafts)


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


def counter(llm: Any, name: str) -> int:
    return sum(int(m.value) for m in llm.get_metrics() if m.name == name)


@functools.cache
def plain(model: Path, way: str) -> tuple[list[list[int]], int]:
    """Answers, and prompt tokens found in the prefix cache."""
    prompts, limits = work(way)
    with engine(model, **WAYS[way]) as llm:
        before = counter(llm, "vllm:prefix_cache_hits")
        answers = generate(llm, prompts, limits)
        if way == "prefix-caching":
            assert generate(llm, prompts, limits) == answers
        return answers, counter(llm, "vllm:prefix_cache_hits") - before


def check(pair: Any, kind: str, k: int, way: str) -> Acceptance:
    target, assistant = pair(kind)
    prompts, limits = work(way)
    want, hits = plain(target, way)
    with engine(target, **speculative(assistant, k), **WAYS[way]) as llm:
        drafter = Watched(llm, assistant)
        before, preempted = acceptance(llm), counter(llm, "vllm:num_preemptions")
        cached = counter(llm, "vllm:prefix_cache_hits")
        for _ in range(2 if way == "prefix-caching" else 1):
            assert generate(llm, prompts, limits) == want
        assert counter(llm, "vllm:prefix_cache_hits") - cached == hits
        assert (counter(llm, "vllm:num_preemptions") > preempted) == (way == "preemption")
        spent = acceptance(llm) - before
    assert (hits > 0) == (way == "prefix-caching")
    assert drafter.changed == 0
    assert drafter.drafts
    assert agreement([(d.made, d.wanted) for d in drafter.drafts]) > 0.9
    return spent


def test_prefix_hits_are_those_of_plain_decoding(pair: Any) -> None:
    check(pair, "31b", 3, "prefix-caching")


@pytest.mark.slow
def test_stock_loses_prefix_hits(pair: Any) -> None:
    target, assistant = pair("31b")
    prompts, limits = work("prefix-caching")
    with (
        without(MTP_SCHEDULING),
        without(PREFIX_HITS),
        engine(target, **speculative(assistant, 3), **WAYS["prefix-caching"]) as llm,
    ):
        before = counter(llm, "vllm:prefix_cache_hits")
        for _ in range(2):
            generate(llm, prompts, limits)
        found = counter(llm, "vllm:prefix_cache_hits") - before
    assert found < plain(target, "prefix-caching")[1]


def longest_context(target: Path, assistant: Path) -> int:
    """Tokens before the last draft of a request that ends at the maximum length of 256; its answer is plain's."""
    prompts, options = random_prompts((224,)), {"max_model_len": 256, "num_gpu_blocks_override": 512}
    with engine(target, **options) as llm:
        want = generate(llm, prompts, 32)
    with engine(target, **speculative(assistant, K), **options) as llm:
        drafter = Watched(llm, assistant)
        assert generate(llm, prompts, 32) == want
    assert drafter.changed == 0
    return max(len(d.context) for d in drafter.drafts)


def test_drafts_go_on_to_the_maximum_length(pair: Any) -> None:
    assert longest_context(*pair("31b")) > 256 - K + 1


def test_stock_scheduling_stops_before_the_maximum_length(pair: Any) -> None:
    with without(MTP_SCHEDULING):
        assert longest_context(*pair("31b")) <= 256 - K + 1


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("k", [1, 2, 5, 8])
@pytest.mark.parametrize("kind", pairs.KINDS)
def test_answers_and_drafts_in_every_way_of_running(pair: Any, kind: str, k: int, way: str) -> None:
    check(pair, kind, k, way)
