"""MTP assistants of the four kinds in float32, head sizes 256 / 512: answers, drafts, the target's cache, graphs.

Plain decoding owns the answers, the network in plain PyTorch on the keys and values that the engine holds the drafts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.gpu import device
from tests.gpu.parts import REHEARSAL
from tests.mtp import pairs
from tests.mtp.drafts import Watched
from tests.support import engine, tiny_models

pytestmark = pytest.mark.gpu

K = 4
WAYS: dict[str, dict[str, Any]] = {"eager": {"enforce_eager": True}, "graphs": {}, "async": {"async_scheduling": True}}
# A pass makes about ten of one rounding of the pass before it: later drafts of few steps may differ.
DIFFERENT = 0.02


class Answers:
    """Models of each kind, and plain decoding's answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pairs: dict[str, tuple[Path, Path]] = {}
        self._plain: dict[tuple[str, int], list[list[int]]] = {}
        self.prompts = engine.random_prompts(device.LENGTHS)
        self.limits = [device.TOKENS + 7 * i for i in range(len(self.prompts))]

    def pair(self, name: str) -> tuple[Path, Path]:
        if name not in self._pairs:
            kind, folder = pairs.KINDS[name](), self.folder / name
            kind.target.head_dim, kind.target.global_head_dim = device.HEADS.values()
            target = tiny_models.save(kind.target, folder / "target")
            self._pairs[name] = target, pairs.save_assistant(kind, folder / "assistant")
        return self._pairs[name]

    def plain(self, name: str, mode: int) -> list[list[int]]:
        if (name, mode) not in self._plain:
            with engine.engine(self.pair(name)[0], **device.options(None, mode)) as llm:
                self._plain[name, mode] = engine.generate(llm, self.prompts, self.limits)
        return self._plain[name, mode]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return Answers(tmp_path_factory.mktemp("models"))


def check(answers: Answers, measured: Any, name: str, mode: int, changes: dict[str, Any]) -> None:
    from vllm_gemma4_spec.performance.draft_graphs import GRAPHS

    target, assistant = answers.pair(name)
    plain = answers.plain(name, mode)
    options = device.options(K, mode, async_scheduling=False) | ({} if REHEARSAL else changes)
    options["speculative_config"] = {"model": str(assistant), "num_speculative_tokens": K}
    with engine.engine(target, **options) as llm:
        watched = Watched(llm, assistant)
        device.same_answers(engine.generate(llm, answers.prompts, answers.limits), plain)
        captured = watched.runner.drafter.__dict__.get(GRAPHS) is not None
        groups = len(watched.runner.kv_cache_config.kv_cache_groups)
    drafts = watched.drafts
    different = sum(d.made != d.wanted for d in drafts)
    measured(drafts=len(drafts), different=different, groups=groups, graphs=captured)
    assert len(drafts) > 20
    assert all(d.made[0] == d.wanted[0] for d in drafts)
    assert different <= DIFFERENT * len(drafts)
    assert watched.changed == 0
    assert captured == (not REHEARSAL and not changes.get("enforce_eager", False))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", pairs.KINDS)
def test_drafts_answers_and_the_cache(answers: Answers, measured: Any, name: str, way: str) -> None:
    check(answers, measured, name, 0, WAYS[way])


def test_compiled(answers: Answers, measured: Any, cuda: None) -> None:
    check(answers, measured, "31b", 3, {"async_scheduling": True})
