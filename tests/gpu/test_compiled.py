"""As ``test_exactness.py``, with torch.compile (mode 3) and piecewise graphs beside the full ones."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gpu import device
from tests.gpu.exactness import WAYS, Exactness

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def exactness(tmp_path_factory: pytest.TempPathFactory) -> Exactness:
    return Exactness(device.models(tmp_path_factory.mktemp("models")), mode=3)


@pytest.mark.usefixtures("cuda")  # 0.19.1's CPU platform compiles otherwise
@pytest.mark.parametrize("way", ["self", "self, async", "near copy, async", "E4B-like, async"])
def test_answers_equal_plain_decoding(exactness: Exactness, measured: Any, way: str) -> None:
    measured(**exactness.check(WAYS[way]))
