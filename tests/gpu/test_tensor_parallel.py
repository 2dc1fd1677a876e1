"""Tensor parallelism over NCCL, one rank a card, CUDA graphs and async scheduling on: the answers of one card.

float32, head sizes 256 / 512, fewer KV heads than ranks. By itself every draft of a model is accepted; in every step
that a graph serves, each rank compares it with the original.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import device, ranks
from tests.gpu.device import CARDS

pytestmark = pytest.mark.gpu
WHOLE = {"draft_tensor_parallel_size": 1}
# name -> (target, drafter, what is unlike the default)
CASES: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "plain": ("target", None, {}),
    "self": ("target", "target", {}),
    "self, not async": ("target", "target", {"async_scheduling": False}),
    "self, local argmax": ("target", "target", {"speculative": {"use_local_argmax_reduction": True}}),
    "near copy": ("target", "close", {}),
    "E4B-like": ("target", "drafter", {}),
    "E4B-like by itself": ("drafter", "drafter", {}),
    "self, a whole copy on each rank": ("target", "target", {"speculative": WHOLE}),
    "E4B-like, a whole copy on each rank": ("target", "drafter", {"speculative": WHOLE}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return ranks.save(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def plain(folders: dict[str, Path]) -> Callable[[str], list[list[int]]]:
    return ranks.plain_answers(folders)


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_one_card(folders: dict[str, Path], plain: Any, measured: Any, case: str) -> None:
    target, drafter, changes = CASES[case]
    wanted = plain(target)  # first: its engine is in this process
    found = ranks.on_ranks(CARDS, folders[target], folders[drafter] if drafter else None, **changes)
    measured(ranks=CARDS, **found.numbers())
    device.same_answers(found.tokens, wanted)
    if drafter is None:
        return
    assert found.proposed > 0
    device.replayed(found)
    if drafter == target:
        assert found.accepted == found.proposed
    elif drafter == "close":
        assert 0 < found.accepted < found.proposed
