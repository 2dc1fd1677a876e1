"""Assistants beside what else an engine can do: plain decoding owns the answers, the reference the drafts.

What requests can ask for is in ``tests/engine/test_request_features.py``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import Gemma4TextConfig

from tests.mtp import pairs
from tests.mtp.drafts import Draft, Watched
from tests.mtp.shared import SURE, agreement
from tests.support import images, tiny_models, tiny_multimodal
from tests.support.engine import engine, generate, random_prompts
from vllm_gemma4_spec.checkpoints import assistants, nvfp4
from vllm_gemma4_spec.checkpoints.files import Checkpoint

pytestmark = pytest.mark.slow
FIXTURES = Path(__file__).parents[1] / "checkpoints" / "fixtures"
K = 4


def drafting(assistant: Path, k: int = K) -> dict[str, Any]:
    return {"speculative_config": {"model": str(assistant), "num_speculative_tokens": k}}


def right(drafts: list[Draft]) -> float:
    return agreement([(d.made, d.wanted) for d in drafts])


@pytest.mark.parametrize("target", ["31b-nvfp4", "31b-awq-full", "31b-svdquant"])
def test_a_quantized_target(target: str, tmp_path: Path) -> None:
    """The assistant is none of the target's quantization."""
    config = Gemma4TextConfig.from_pretrained(FIXTURES / target)
    assistant = pairs.save_assistant(pairs.Kind(config, heads=4), tmp_path)
    limits: dict[str, Any] = {"max_model_len": 128, "max_num_batched_tokens": 128, "max_num_seqs": 4}
    limits["num_gpu_blocks_override"] = 256
    prompts = random_prompts((3, 17, 40), vocab=88)
    with engine(FIXTURES / target, **limits) as llm:
        plain = generate(llm, prompts, 24)
    with engine(FIXTURES / target, **drafting(assistant), **limits) as llm:
        watched = Watched(llm, assistant)
        assert generate(llm, prompts, 24) == plain
    assert len(watched.drafts) > 20
    assert right(watched.drafts) > 0.9
    assert watched.changed == 0


@pytest.mark.parametrize("way", [{}, {"max_num_batched_tokens": 48, "max_num_seqs": 2}], ids=["whole", "in chunks"])
def test_images(tmp_path: Path, way: dict[str, Any]) -> None:
    """A target with a vision tower: drafts go on after its images, in whose keys they attend to pictures."""
    target = tiny_multimodal.save(tiny_models.target_config(), tmp_path / "target")
    assistant = pairs.save_assistant(pairs.KINDS["31b"](), tmp_path / "assistant")
    with images.chatting(target, **way) as llm:
        plain = images.answers(images.chat(llm, images.CHATS, 24))
    with images.chatting(target, **drafting(assistant), **way) as llm:
        watched = Watched(llm, assistant)
        assert images.answers(images.chat(llm, images.CHATS, 24)) == plain
    assert any(images.IMAGE_TOKEN_ID in d.context for d in watched.drafts)
    assert right(watched.drafts) > 0.9
    assert watched.changed == 0


def record(worker: Any) -> None:
    """In a rank: keep what it drafts."""
    runner = getattr(worker, "model_runner", None) or worker.worker.model_runner
    propose, runner.drafter.made = runner.drafter.propose, []

    def recording(**kwargs: Any) -> Any:
        drafts = propose(**kwargs)
        runner.drafter.made += drafts.tolist()
        return drafts

    runner.drafter.propose = recording


def recorded(worker: Any) -> list[list[int]]:
    runner = getattr(worker, "model_runner", None) or worker.worker.model_runner
    made: list[list[int]] = runner.drafter.made
    return made


@pytest.mark.parametrize("kind", ["31b", "e2b"])
def test_two_ranks_draft_as_one(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """31B's head is split over the ranks; each rank has all of E2B's head by centroids."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    monkeypatch.setenv("VLLM_SLEEP_WHEN_IDLE", "1")
    target, assistant = pairs.save_pair(kind, tmp_path)
    prompts, found = random_prompts((1, 17, 65, 200)), []
    for ranks in ({}, {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}):
        with engine(target, **drafting(assistant), **ranks, max_num_seqs=4) as llm:
            llm.collective_rpc(record)
            answers = generate(llm, prompts, 24)
            found.append((answers, *llm.collective_rpc(recorded)))
    (answers, drafts), (again, *of_ranks) = found
    assert again == answers
    assert of_ranks[0] == of_ranks[1]
    assert [d[:SURE] for d in of_ranks[0]] == [d[:SURE] for d in drafts]


def test_an_assistant_in_nvfp4(tmp_path: Path) -> None:
    """What ``quantize --recipe w4a16`` writes drafts what its dequantized weights draft."""
    target, assistant = pairs.save_pair("31b", tmp_path)
    assistants.quantize(Checkpoint(assistant), tmp_path / "nvfp4")
    tensors, plain = load_file(tmp_path / "nvfp4" / "model.safetensors"), load_file(assistant / "model.safetensors")
    for name in [n for n in tensors if n.endswith(".weight_scale")]:
        module = name.removesuffix(".weight_scale")
        parts = (tensors[f"{module}.{part}"] for part in ("weight", "weight_scale", "weight_scale_2"))
        plain[f"{module}.weight"] = nvfp4.dequantize(*parts)
    save_file(plain, assistant / "model.safetensors", {"format": "pt"})
    prompts = random_prompts((3, 33, 70))
    with engine(target, max_num_seqs=4) as llm:
        answers = generate(llm, prompts, 24)
    with engine(target, **drafting(tmp_path / "nvfp4"), max_num_seqs=4) as llm:
        watched = Watched(llm, assistant)
        assert generate(llm, prompts, 24) == answers
    assert right(watched.drafts) > 0.9
    assert watched.changed == 0
