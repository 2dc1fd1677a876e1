"""Assistants in the real engine: transformers owns the drafts, plain decoding the answers, the target its cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.mtp import pairs
from tests.mtp.rerun import Rerun
from tests.mtp.shared import K, Shared, agreement, cache, of_transformers, recorded, shared
from vllm_gemma4_spec.performance.draft_graphs import GRAPHS

FAST = ("31b", "e4b")


@pytest.fixture(
    scope="module", params=[k if k in FAST else pytest.param(k, marks=pytest.mark.slow) for k in pairs.KINDS]
)
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    with shared(request.param, tmp_path_factory.mktemp("mtp")) as made:
        yield made
        assert made.watched.changed == 0, "a draft changed the target's cache"


def test_drafts_are_those_of_transformers(running: Shared) -> None:
    """Every draft of every step, eight passes deep, on the target's own cache."""
    wanted = of_transformers(recorded(running.kind))
    done = running.do("recorded")
    assert done.answers == [row["answer"] for row in recorded(running.kind)["rows"]]
    compared = [(d, wanted[tuple(d.context)]) for d in done.drafts if tuple(d.context) in wanted]
    assert len(compared) >= 16
    assert agreement([(d.made, theirs) for d, theirs in compared]) > 0.75
    assert agreement([(d.wanted, theirs) for d, theirs in compared]) > 0.75  # so it may stand in for transformers
    assert agreement([(d.made, d.wanted) for d in done.drafts]) > 0.9
    assert running.watched.changed == 0


@contextmanager
def wrong(running: Shared, mistake: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The drafter with one part wrong."""
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    inner = running.drafter.model.model
    before, project = inner.normalizer.clone(), inner.pre_projection.forward
    groups = running.watched.runner.kv_cache_config.kv_cache_groups
    mine = next(g for g in running.drafter.draft_attn_groups if isinstance(g.kv_cache_spec, SlidingWindowSpec))
    gid = mine.kv_cache_group_id
    if mistake == "position":
        monkeypatch.setattr("vllm_gemma4_spec.mtp.proposer.POSITION", 0)
    elif mistake == "order":
        # Its inputs and not its weights: with oneDNN (AVX-512) vLLM keeps those in a form of its own alone.
        monkeypatch.setattr(inner.pre_projection, "forward", lambda x: project(x.roll(x.shape[-1] // 2, -1)))
    elif mistake == "scale":
        inner.normalizer.fill_(1.0)
    else:
        # Another sliding layer of the target: groups share their tensors, so that its blocks are what differs.
        mine.kv_cache_group_id = next(
            i for i, g in enumerate(groups) if i != gid and g.kv_cache_spec == groups[gid].kv_cache_spec
        )
    try:
        yield
    finally:
        monkeypatch.undo()
        mine.kv_cache_group_id = gid
        inner.normalizer.copy_(before)


@pytest.mark.parametrize("mistake", ["position", "order", "scale", "donor"])
def test_a_mistake_changes_most_drafts(running: Shared, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above has teeth: a drafter with one part wrong is far off, and answers stay what they are."""
    wanted = of_transformers(recorded(running.kind))
    with wrong(running, mistake, monkeypatch):
        done = running.do("recorded")
    compared = [(d.made[0], wanted[tuple(d.context)][0]) for d in done.drafts if tuple(d.context) in wanted]
    assert len(compared) >= 16
    # By chance a random network agrees in few places.
    assert sum(made == theirs for made, theirs in compared) < 0.5 * len(compared)


def test_no_kv_of_its_own(running: Shared) -> None:
    """No group, no byte, no slot, no look-ahead: the cache is that of the target alone."""
    layers = frozenset(running.drafter._draft_attn_layer_names)
    assert len(layers) == 4
    assert cache(running.llm, without=layers) == running.plain_cache
    scheduler = running.llm.llm_engine.engine_core.engine_core.scheduler
    assert (scheduler.num_lookahead_tokens, scheduler.use_eagle) == (0, False)
    own = running.watched.runner.compilation_config.static_forward_context
    donors = {own[name].kv_sharing_target_layer_name for name in layers}
    assert donors == set(running.watched.donors.values())
    assert all(
        own[name].kv_cache.data_ptr() == own[own[name].kv_sharing_target_layer_name].kv_cache.data_ptr()
        for name in layers
    )


def test_prefix_hits_are_those_of_plain_decoding(running: Shared) -> None:
    done = running.do("prefixes")
    assert done.hits == running.plain["prefixes"].hits > 0


def test_drafts_go_on_to_the_maximum_length(running: Shared) -> None:
    done = running.do("longest")
    assert max(len(d.context) for d in done.drafts) > 256 - K + 1


def test_replays_draft_what_the_reference_drafts(running: Shared) -> None:
    """Every step is a replay: decode, mixed with a prompt's chunks, and padded to the next batch size."""
    graphs = Rerun(running.drafter, [1, 2, 4], [K])
    graphs.capture(None)
    setattr(running.drafter, GRAPHS, graphs)
    try:
        done = running.do("replayed")
    finally:
        delattr(running.drafter, GRAPHS)
    assert graphs.replays > 20
    assert graphs.padded > 0
    assert agreement([(d.made, d.wanted) for d in done.drafts]) > 0.9
    assert running.watched.changed == 0
