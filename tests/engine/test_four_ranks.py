"""Four tensor-parallel ranks on the CPU, KV heads fewer than ranks: the answers of one, and every draft as good."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest

from tests.eagle.reference_head import save_head
from tests.support import random_nvfp4, tiny_models
from tests.support.engine import Acceptance, acceptance, engine, generate, random_prompts

pytestmark = pytest.mark.slow
RANKS = {"tensor_parallel_size": 4, "distributed_executor_backend": "mp", "max_num_seqs": 4}
PROMPTS = random_prompts((1, 17, 65, 120))
WHOLE = {"draft_tensor_parallel_size": 1}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "self": ("target", "target", {}),
    "self, local argmax": ("target", "target", {"speculative": {"use_local_argmax_reduction": True}}),
    "near copy": ("target", "close", {}),
    "E4B-like": ("target", "drafter", {}),
    "E4B-like by itself": ("drafter", "drafter", {}),
    "experts": ("experts", "experts", {}),
    # Not with expert parallelism: 0.19.1's experts on a CPU look a rank's own ones up by their global numbers.
    "self, a whole copy on each rank": ("target", "target", {"speculative": WHOLE}),
    "E4B-like, a whole copy on each rank": ("target", "drafter", {"speculative": WHOLE}),
    "NVFP4_AWQ": ("awq", "awq", {"speculative": {"quantization": "modelopt"}}),
    "NVFP4_SVD": ("svd", "svd", {"speculative": {"quantization": "modelopt"}}),
}


@pytest.fixture(autouse=True)
def workers_that_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setenv("VLLM_SLEEP_WHEN_IDLE", "1")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("ranks")
    made = tiny_models.save_for_ranks(folder)
    config = random_nvfp4.tiny_config("31B")
    for form, algorithm in (("awq", "NVFP4_AWQ"), ("svd", "NVFP4_SVD")):
        made[form] = random_nvfp4.save(config, folder / form, algorithm)
    return made


def answers(target: Path, drafter: Path | None = None, **options: Any) -> tuple[list[list[int]], Acceptance]:
    with engine(target, drafter, 3, **({"max_num_seqs": 4} | options)) as llm:
        before = acceptance(llm)
        return generate(llm, PROMPTS, 24), acceptance(llm) - before


@functools.cache
def plain(target: Path) -> list[list[int]]:
    return answers(target)[0]


@pytest.mark.parametrize("case", CASES)
def test_four_ranks_draft_as_one(folders: dict[str, Path], case: str) -> None:
    target, drafter, options = CASES[case]
    got, counts = answers(folders[target], folders[drafter], **RANKS, **options)
    assert got == plain(folders[target])
    if target == drafter:
        assert counts.accepted == counts.proposed > 0
    elif drafter == "close":
        assert 0 < counts.accepted < counts.proposed
    else:
        assert counts.proposed > 0


@pytest.mark.parametrize("method", ["eagle", "eagle3"])
def test_four_ranks_of_a_head(folders: dict[str, Path], tmp_path: Path, method: str) -> None:
    architecture = {"eagle": "LlamaForCausalLM", "eagle3": "LlamaForCausalLMEagle3"}[method]
    head = save_head(tmp_path / "head", method, ["full_attention"], [32], architecture, heads=4)
    speculative = {"method": method}
    got, counts = answers(folders["target"], head, speculative=speculative, **RANKS)
    one, counted = answers(folders["target"], head, speculative=speculative)
    assert got == one == plain(folders["target"])
    assert counts == counted
