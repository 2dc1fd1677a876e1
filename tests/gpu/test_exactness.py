"""float32, head sizes 256 / 512, CUDA graphs: padding, async scheduling, graphs and sleep change no token."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gpu import device
from tests.gpu.exactness import WAYS, Exactness
from tests.gpu.parts import REHEARSAL

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def exactness(tmp_path_factory: pytest.TempPathFactory) -> Exactness:
    return Exactness(device.models(tmp_path_factory.mktemp("models")))


@pytest.mark.parametrize("way", WAYS)
def test_answers_equal_plain_decoding(exactness: Exactness, measured: Any, way: str) -> None:
    if WAYS[way].sleeps and REHEARSAL:
        pytest.skip("a CPU does not sleep")
    measured(**exactness.check(WAYS[way]))
