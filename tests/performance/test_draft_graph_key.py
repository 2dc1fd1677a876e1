"""Which compiled graph a drafter runs on a second start, with another drafter beside the same target."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support import engine as _engine  # sets the environment
from vllm_gemma4_spec import scope
from vllm_gemma4_spec.performance import draft_graph_key

assert _engine


def drafts(folder: Path, *factors: int, **env: str) -> list[float]:
    """What drafters with these factors make of 2, start by start; the target beside them is the same."""
    found = []
    for factor in factors:
        command = [sys.executable, "-m", "tests.performance.two_drafters", str(factor)]
        environment = {**os.environ, "VLLM_CACHE_ROOT": str(folder), **env}
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        result = json.loads(done.stdout.splitlines()[-1])
        assert result["target"] == 22.0
        found.append(result[scope.DRAFT_GRAPH])
    return found


def test_stock_runs_the_graph_of_the_drafter_before(tmp_path: Path) -> None:
    assert drafts(tmp_path, 3, 5, VLLM_GEMMA4_SPEC_PATCH_DRAFT_GRAPH_KEY="0") == [6.0, 6.0]


def test_a_drafter_runs_its_own_graph(tmp_path: Path) -> None:
    assert drafts(tmp_path, 3, 5) == [6.0, 10.0]
    folders = {path.parent.parent.name for path in tmp_path.glob("torch_compile_cache/*/rank_*/*")}
    assert len(folders) == 3, "the target's and each drafter's"


@pytest.mark.parametrize(
    ("drafter", "chosen", "asked"), [(True, False, ""), (True, True, "kept"), (False, False, "kept")]
)
def test_a_folder_that_the_user_chose_stays(
    drafter: bool, chosen: bool, asked: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(scope, "drafters_graph", lambda backend: drafter)
    folder = str(tmp_path / "mine" if chosen else tmp_path / "torch_compile_cache" / "0123456789")
    seen: list[str] = []

    def original(self: Any, graph: Any, inputs: Any) -> str:
        seen.append(self.compilation_config.cache_dir)
        self.compilation_config.cache_dir = self.compilation_config.cache_dir or "the drafter's"
        return "compiled"

    backend = SimpleNamespace(compilation_config=SimpleNamespace(cache_dir=folder))
    call: Any = draft_graph_key.compiled(original)
    assert call(backend, None, []) == "compiled"
    assert seen == [asked and folder]
    assert backend.compilation_config.cache_dir == folder
