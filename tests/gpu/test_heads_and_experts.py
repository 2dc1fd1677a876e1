"""EAGLE heads and 26B-A4B-like targets on several cards: the answers of one card."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.eagle.reference_head import save_head
from tests.gpu import device, ranks
from tests.gpu.device import CARDS

pytestmark = pytest.mark.gpu
SLIDING, FULL = "sliding_attention", "full_attention"
HEADS: dict[str, tuple[str, list[str], str]] = {
    "eagle": ("eagle", [FULL], "LlamaForCausalLM"),
    "eagle3, one group": ("eagle3", [FULL], "LlamaForCausalLMEagle3"),
    "eagle3, two groups": ("eagle3", [SLIDING, FULL], "LlamaForCausalLMEagle3"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return ranks.save(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def plain(folders: dict[str, Path]) -> Callable[[str], list[list[int]]]:
    return ranks.plain_answers(folders)


@pytest.mark.parametrize("name", HEADS)
def test_a_head(folders: dict[str, Path], plain: Any, tmp_path: Path, measured: Any, name: str) -> None:
    method, layer_types, architecture = HEADS[name]
    head = save_head(tmp_path / "head", method, layer_types, [32] * len(layer_types), architecture, heads=4)
    wanted = plain("target")
    found = ranks.on_ranks(CARDS, folders["target"], head, speculative={"method": method})
    one = ranks.on_ranks(1, folders["target"], head, speculative={"method": method})
    measured(ranks=CARDS, **found.numbers(), accepted_on_one=one.accepted)
    device.same_answers(found.tokens, wanted)
    device.same_answers(one.tokens, wanted)
    assert found.proposed > 0
    # A random head is right now and then; sums in another order may turn a near tie of its own.
    assert abs(found.accepted - one.accepted) <= 3


@pytest.mark.parametrize("parallel", [False, True], ids=["tensor parallel", "expert parallel"])
def test_experts(folders: dict[str, Path], plain: Any, measured: Any, parallel: bool) -> None:
    """26B-A4B-like by itself: every draft accepted."""
    wanted = plain("experts")
    model = folders["experts"]
    found = ranks.on_ranks(CARDS, model, model, enable_expert_parallel=parallel)
    measured(ranks=CARDS, **found.numbers())
    device.same_answers(found.tokens, wanted)
    device.replayed(found)
    assert found.accepted == found.proposed > 0


def test_experts_with_an_e4b_like_drafter(folders: dict[str, Path], plain: Any, measured: Any) -> None:
    wanted = plain("experts")
    found = ranks.on_ranks(CARDS, folders["experts"], folders["drafter"], enable_expert_parallel=True)
    measured(ranks=CARDS, **found.numbers())
    device.same_answers(found.tokens, wanted)
    device.replayed(found)
    assert found.proposed > 0
