"""NVFP4_AWQ and NVFP4_SVD cut over several cards: scales, low-rank factors and small-batch copies of each rank's part.

float16 through Marlin, bfloat16 through the small-batch GEMM where it takes over. Ranks add in another order, so a
rounding may turn an answer: the log-probabilities of first tokens are compared with one card's, and a model accepts
nearly all of its own drafts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.gpu import device
from tests.gpu.device import CARDS
from tests.gpu.parts import REHEARSAL
from tests.support import engine, random_nvfp4

pytestmark = pytest.mark.gpu
VOCAB = 512
PROMPTS = engine.random_prompts((3, 17, 40), vocab=VOCAB)
SMALL: dict[str, Any] = {"max_model_len": 128, "max_num_batched_tokens": 128, "num_gpu_blocks_override": 256}
# Mean difference of log-probabilities between one rank and several. Two H200 gave 0.011 and 0.21; on a CPU bfloat16 is
# 0.11 from float32 with either form, and a checkpoint without its scales 0.64.
LIMITS = {"float32": 1e-4} if REHEARSAL else {"float16": 0.02, "bfloat16": 0.3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("nvfp4")
    made = {
        form: random_nvfp4.save(random_nvfp4.tiny_config("31B", **device.HEADS), folder / form, algorithm)
        for form, algorithm in (("awq", "NVFP4_AWQ"), ("svd", "NVFP4_SVD"))
    }
    made["drafter"] = random_nvfp4.save(
        random_nvfp4.tiny_config("E4B", **device.HEADS), folder / "drafter", "NVFP4_AWQ"
    )
    return made


def run(count: int, dtype: str, target: Path, drafter: Path | None) -> tuple[device.Run, list[dict[int, float]]]:
    """Answers, and the 20 best log-probabilities of each first token."""
    from vllm import SamplingParams

    changes: dict[str, Any] = {**SMALL, "dtype": dtype, "max_logprobs": 20, "speculative": {"quantization": "modelopt"}}
    if drafter is None:
        del changes["speculative"]
    settings = device.options(None if drafter is None else device.K, **changes, **device.ranks(count))
    with engine.engine(target, drafter, device.K, **settings) as llm:
        found = device.ask(llm, PROMPTS, 32)
        params = SamplingParams(max_tokens=1, temperature=0, detokenize=False, logprobs=20)
        outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
    return found, [{t: row.logprob for t, row in o.outputs[0].logprobs[0].items()} for o in outputs]


@pytest.fixture(scope="module")
def one_card(folders: dict[str, Path]) -> Callable[[str, str], list[dict[int, float]]]:
    @cache
    def get(form: str, dtype: str) -> list[dict[int, float]]:
        return run(1, dtype, folders[form], None)[1]

    return get


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("form", ["awq", "svd"])
def test_by_itself(folders: dict[str, Path], one_card: Any, measured: Any, form: str, dtype: str) -> None:
    wanted = one_card(form, dtype)
    found, rows = run(CARDS, dtype, folders[form], folders[form])
    pairs = [(a[t], b[t]) for a, b in zip(rows, wanted, strict=True) for t in set(a) & set(b)]
    far = sum(abs(a - b) for a, b in pairs) / len(pairs)
    measured(ranks=CARDS, apart=round(far, 6), compared=len(pairs), **found.numbers())
    assert len(pairs) >= 10 * len(PROMPTS)
    assert far < LIMITS[dtype]
    assert found.acceptance > 0.9


def test_an_e4b_like_drafter(folders: dict[str, Path], one_card: Any, measured: Any) -> None:
    dtype = next(iter(LIMITS))
    wanted = one_card("awq", dtype)
    found, rows = run(CARDS, dtype, folders["awq"], folders["drafter"])
    pairs = [(a[t], b[t]) for a, b in zip(rows, wanted, strict=True) for t in set(a) & set(b)]
    measured(ranks=CARDS, **found.numbers())
    assert sum(abs(a - b) for a, b in pairs) / len(pairs) < LIMITS[dtype]
    assert found.proposed > 0
