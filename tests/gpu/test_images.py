"""Images that attend both ways, in float32: transformers' logits, and with speculation the same answers.

The cases of ``tests/multimodal/images_by_triton.py`` with the kernels compiled and CUDA graphs on. Without the patch
(``stock``) the distance is near 1 for images; any other case must stay below a tenth of that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.device import HEADS
from tests.multimodal.images_by_triton import run
from tests.support import images

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("cuda"),
]  # interpreted in tests/multimodal/test_image_attention.py
NEAR = 0.1
OPTIONS: dict[str, Any] = {
    "enforce_eager": False,
    "gpu_memory_utilization": 0.05,
    "kv_cache_memory_bytes": 1 << 29,
    "mm_encoder_attn_backend": "TORCH_SDPA",
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]},
}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[tuple[int, ...], list[int]], Any]]:
    """What an engine answered to each prompt, and its largest distances from transformers' log-probabilities."""
    folder: Path = tmp_path_factory.mktemp("images")
    images.save_both_ways(folder, **HEADS)

    @cache
    def get(name: str) -> tuple[dict[tuple[int, ...], list[int]], list[float], Any]:
        found = run(folder, name, **OPTIONS)
        narrow = name == "narrow"
        far = images.distance(folder / ("target-narrow" if narrow else "target"), found["answers"], by_hand=narrow)
        return {tuple(a["prompt"]): a["answer"] for a in found["answers"]}, far, found["counts"]

    return get  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["plain", "narrow", "speculation", "chunks", "prefix-caching"])
def test_as_transformers(case: Any, measured: Any, name: str) -> None:
    answers, far, counts = case(name)
    measured(distance=max(far), proposed=counts.proposed, accepted=counts.accepted)
    assert max(far) < NEAR
    if name not in ("plain", "narrow"):
        assert answers == case("plain")[0]
        assert counts.proposed > 0


def test_stock_is_far_off(case: Any, measured: Any) -> None:
    """Without the patch the two chats with images are; so the comparison above can fail."""
    far = case("stock")[1]
    measured(distance=max(far))
    assert max(far[:2]) > NEAR
