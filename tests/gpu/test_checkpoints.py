"""Whole models that ModelOpt 0.42.0 exported, head sizes 256 / 512, in the real engine against the float32 reference.

bfloat16 is how they are served; float16 has eight times less rounding, so it shows more.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import reference
from tests.gpu.parts import REHEARSAL
from tests.quantization.comparison import (
    FIXTURES,
    TOKENS,
    WIDE_FIXTURES,
    edited,
    engine_logprobs,
    mistakes,
    per_expert,
    text_only,
)

pytestmark = pytest.mark.gpu
ROOT = FIXTURES if REHEARSAL else WIDE_FIXTURES
NAMES = sorted(p.name for p in ROOT.iterdir())
EXPERTS = next(n for n in NAMES if "26b" in n)
CASES = [*NAMES, f"{EXPERTS}, experts too"]  # experts in NVFP4, one NaN block
OPTIONS: dict[str, Any] = {} if REHEARSAL else {"gpu_memory_utilization": 0.03, "kv_cache_memory_bytes": 1 << 28}
# Of a linear's largest output; a mistake makes 0.2 and more.
LIMITS = {"bfloat16": 0.02, "float16": 0.004}


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", CASES)
def test_logprobs_are_the_references(name: str, dtype: str, tmp_path: Path, measured: Any) -> None:
    folder = ROOT / name.partition(",")[0]
    if name.endswith("too"):
        folder = edited(folder, tmp_path / "experts", per_expert)
    truth = reference.logprobs(folder, TOKENS)
    wrong: dict[str, float] = {}
    for number, (mistake, edit) in enumerate(mistakes(folder).items()):
        made = edited(folder, tmp_path / f"wrong {number}", edit)
        wrong[mistake] = float((reference.logprobs(made, TOKENS) - truth).abs().mean())
    layers: dict[str, float] = {}
    ours = engine_logprobs(folder, layers, dtype=dtype, **OPTIONS, **text_only(folder))
    mean, worst = float((ours - truth).abs().mean()), max(layers.values())
    measured(
        mean=round(mean, 5), linears=len(layers), worst_linear=round(worst, 5), nearest_mistake=min(wrong.values())
    )
    assert worst < LIMITS[dtype], {n: e for n, e in layers.items() if e >= LIMITS[dtype]}
    assert min(wrong.values()) > 5 * mean, wrong
