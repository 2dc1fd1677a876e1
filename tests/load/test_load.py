"""Sixty-four clients on the demo's server: nothing leaks, nothing fails, every greedy answer is the one given alone."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from tests.load.run import Result, run
from vllm_gemma4_spec.demo import build

Load = Callable[[bool], Result]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Speculating or not -> the result of one run."""
    pair, _ = build.ensure(build.default_folder())

    @functools.cache
    def once(speculate: bool) -> Result:
        log = tmp_path_factory.mktemp("load") / "server.log"
        result = run(pair, log, requests=3000 if speculate else 600, speculate=speculate)
        print(*result.lines(), sep="\n")
        return result

    return once


@pytest.mark.parametrize("speculate", [True, False], ids=["speculation", "plain"])
def test_under_load(load: Load, speculate: bool) -> None:
    """vLLM's own decoding has to have the property as well, else it could not be asked for. The chat output stays ours:
    what stock vLLM's parsers make of the same tokens depends on how they are cut into deltas."""
    result = load(speculate)
    assert result.errors == []
    assert result.different == []
    assert not any(result.left.values()), result.left
    assert result.counts["hung up"] > 0
    assert (result.accepted > 0) == speculate
    first, *later = result.rounds
    assert all((held.handles, held.processes) == (first.handles, first.processes) for held in later)
    # The allocator and the caches settle in the first half.
    assert result.rounds[-1].memory < 1.03 * result.rounds[len(result.rounds) // 2].memory


def test_answers_are_those_of_plain_decoding(load: Load) -> None:
    assert load(True).alone == load(False).alone
