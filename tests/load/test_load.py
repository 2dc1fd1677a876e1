"""Sixty-four clients on the demo's server: nothing leaks, nothing fails, every greedy answer is the one given alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.load.run import run
from vllm_gemma4_spec.demo import build


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("speculate", [True, False], ids=["speculation", "plain"])
def test_under_load(tmp_path: Path, speculate: bool) -> None:
    """vLLM's own decoding has to have the property as well, else it could not be asked for. The chat output stays ours:
    what stock vLLM's parsers make of the same tokens depends on how they are cut into deltas."""
    pair, _ = build.ensure(build.default_folder())
    result = run(pair, tmp_path / "server.log", requests=3000 if speculate else 600, speculate=speculate)
    print(*result.lines(), sep="\n")
    assert result.errors == []
    assert result.different == []
    assert not any(result.left.values()), result.left
    assert result.counts["hung up"] > 0
    assert (result.accepted > 0) == speculate
    first, *later = result.rounds
    assert all((held.handles, held.processes) == (first.handles, first.processes) for held in later)
    # The allocator and the caches settle in the first half.
    assert result.rounds[-1].memory < 1.03 * result.rounds[len(result.rounds) // 2].memory
