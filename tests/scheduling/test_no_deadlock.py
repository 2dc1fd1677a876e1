"""Property: whatever the pool, an accepted request ends, and every step has the blocks that it uses."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import vllm_gemma4_spec
from tests.scheduling.simulation import Job, Simulation, World
from tests.support.stock import without
from vllm_gemma4_spec.multimodal import image_attention
from vllm_gemma4_spec.patching.patch import Patch
from vllm_gemma4_spec.scheduling import waiting
from vllm_gemma4_spec.scheduling.patches import LONG_PROMPTS, WAITING_REQUESTS

GROUPS = st.lists(
    st.tuples(st.sampled_from([0, 0, 3, 8, 13, 40]), st.sampled_from([1, 1, 2, 4])), min_size=1, max_size=5
)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    k = draw(st.integers(0, 4))
    seqs = draw(st.integers(1, 4))
    caching = draw(st.booleans())
    # One spec for all groups is another coordinator, and with prefix caching needs a single group.
    groups = tuple(draw(GROUPS.filter(lambda g: len(set(g)) > 1 or (len(g) == 1 and g[0][1] == 1))))
    return World(
        groups=groups,
        num_blocks=draw(st.integers(2 + 4 * len(groups), 120)),
        batched_tokens=draw(st.integers(seqs * (k + 1), 60)),
        max_num_seqs=seqs,
        k=k,
        asynchronous=draw(st.booleans()),
        prefix_caching=caching,
        reserve=draw(st.booleans()),
        uncut_images=draw(st.booleans()),
        encoder_cache=draw(st.integers(16, 60)),
        acceptance=draw(st.sampled_from([0.0, 0.5, 1.0])),
    )


@st.composite
def jobs(draw: st.DrawFn, world: World) -> list[Job]:
    """Up to the longest that the pool holds, and images up to the encoder's cache."""
    longest = world.longest()
    made = []
    for _ in range(draw(st.integers(1, 6))):
        prompt = draw(st.integers(1, longest - 1))
        shared = draw(st.integers(0, prompt))
        images, at = [], shared
        while draw(st.booleans()):
            length = draw(st.integers(1, 16))
            at += draw(st.integers(0, 20))
            if at + length > prompt:
                break
            images.append((at, length))
            at += length
        made.append(Job(shared, prompt - shared, draw(st.integers(1, longest)), tuple(images)))
    return made


@given(data=st.data())
@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_every_request_ends(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch, data: st.DataObject) -> None:
    vllm_gemma4_spec.apply()
    world = data.draw(worlds().filter(lambda w: w.longest() >= 2))
    monkeypatch.setattr(image_attention, "trained_both_ways", lambda _: world.uncut_images)
    work = data.draw(jobs(world))
    simulation = Simulation(world, tiny["target"], seed=data.draw(st.integers(0, 99)))
    # Were each job computed alone, token by token, and begun anew at every token of the others: far more than needed.
    tokens = sum(min(job.prompt + job.output, simulation.longest) for job in work)
    assert simulation.run(work, limit=20 * tokens + 100), f"{simulation.scheduler.waiting} still wait"
    for number, job in enumerate(work):
        assert simulation.answers[str(number)] == min(job.output, simulation.longest - job.prompt)


WORLD = World(groups=((0, 1), (8, 1), (8, 1)), num_blocks=50, batched_tokens=8, max_num_seqs=2)
LONG = [Job(0, 100, 4)]


def test_stock_waits_for_ever(tiny: dict[str, Path]) -> None:
    """The property can fail: 0.19.1 admits no prompt that does not fit in sliding-window groups whole."""
    vllm_gemma4_spec.apply()
    assert WORLD.longest() > 104
    assert Simulation(WORLD, tiny["target"]).run(LONG, limit=200)
    with without(LONG_PROMPTS):
        assert not Simulation(WORLD, tiny["target"]).run(LONG, limit=200)


class Lines(logging.Handler):
    """The log's lines, once each, wherever else they go."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def said(model: Path, caplog: pytest.LogCaptureFixture, *patches: Patch) -> list[str]:
    """Lines about a request that is never admitted, without ``patches``."""
    caplog.set_level(logging.WARNING, logger=waiting.logger.name)
    handler = Lines()
    waiting.logger.addHandler(handler)
    try:
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(without(patch))
            assert not Simulation(WORLD, model).run(LONG, limit=200)
    finally:
        waiting.logger.removeHandler(handler)
    return [line for line in handler.lines if "has waited" in line]


def test_a_request_that_waits_is_named_once(
    tiny: dict[str, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not said(tiny["target"], caplog, LONG_PROMPTS)  # not before a minute
    monkeypatch.setattr(waiting, "PATIENCE", 0.0)
    (line,) = said(tiny["target"], caplog, LONG_PROMPTS)
    assert line.startswith("Request 0 of 100 tokens (WAITING) has waited for 0 s although 49 of 50 ")


def test_stock_waits_in_silence(
    tiny: dict[str, Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "PATIENCE", 0.0)
    assert not said(tiny["target"], caplog, LONG_PROMPTS, WAITING_REQUESTS)


def test_what_is_longer_never_ends(tiny: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """``longest_request`` is not merely small enough. (The last token of all is never computed and needs no slot.)"""
    vllm_gemma4_spec.apply()
    world = World(groups=((0, 1),), num_blocks=10, batched_tokens=8, max_num_seqs=2)
    assert world.longest() == 36
    assert Simulation(world, tiny["target"]).run([Job(0, 30, 100)], limit=200)
    monkeypatch.setattr(World, "longest", lambda self: 38)
    assert not Simulation(world, tiny["target"]).run([Job(0, 30, 100)], limit=200)
