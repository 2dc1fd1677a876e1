"""Images that attend both ways, as 31B and 26B-A4B were trained to.

transformers owns the logits where an image is not wider than the window; where it is, 5.5 leaves the window out of
account, and Google's own mask is written down here. The engine is vLLM's on the CPU, TRITON_ATTN interpreted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma4ForCausalLM

from tests.support import sound_and_video
from tests.support.fresh import interpreted
from tests.support.images import CHATS, TOLERANCE, Chunks, chat, chatting, distance, save_both_ways, spans
from tests.support.tiny_multimodal import IMAGE_TOKEN_ID
from vllm_gemma4_spec.multimodal import image_attention

WINDOW = 64  # of `target`; an image of CHATS has 64 tokens or fewer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("both-ways")
    save_both_ways(made)
    return made


def ran(folder: Path, *cases: str) -> list[dict[str, Any]]:
    """Results of ``images_by_triton.py``, run for those that are not there yet."""
    missing = [case for case in cases if not (folder / f"{case}.pt").exists()]
    if missing:
        interpreted("tests.multimodal.images_by_triton", folder, *missing)
    return [torch.load(folder / f"{case}.pt", weights_only=False) for case in cases]


def steps(found: dict[str, Any]) -> Iterator[tuple[list[tuple[int, int, list[tuple[int, int]]]], bool]]:
    """Per step: first token, one past the last and the images of each request in it; whether a full graph may run."""
    images = {output["request"]: spans(output["prompt"]) for output in found["answers"]}
    for computed, full in found["steps"]:
        yield [(start, end, images[request.partition("-")[0]]) for request, start, end in computed], full


@pytest.mark.parametrize("case", ["one-image", pytest.param("plain", marks=pytest.mark.slow)])
def test_logits_after_images_are_those_of_transformers(folder: Path, case: str) -> None:
    (plain,) = ran(folder, case)
    assert max(distance(folder / "target", plain["answers"])) < TOLERANCE
    assert max(distance(folder / "target", plain["answers"], by_hand=True)) < TOLERANCE
    # Full CUDA graphs hold a kernel without ranges: they are left to the steps that compute no image.
    # Sliding layers walk an image and its window, and the block that the window begins in.
    assert 0 < max(plain["walked"]) < 64 + WINDOW + 16
    seen = {True: 0, False: 0}
    for computed, full in steps(plain):
        assert full is not any(first < end and start <= last for start, end, all in computed for first, last in all)
        seen[full] += 1
    assert min(seen.values()) > 0


@pytest.mark.slow
def test_frames_of_a_video_attend_both_ways(folder: Path) -> None:
    (found,) = ran(folder, "video")
    (answer,) = found["answers"]
    assert sound_and_video.distance(folder / "target", sound_and_video.VIDEO, answer) < TOLERANCE
    assert found["walked"]


@pytest.mark.slow
def test_stock_attends_causally(folder: Path) -> None:
    (stock,) = ran(folder, "stock")
    one, two, text = distance(folder / "target", stock["answers"])
    assert text < TOLERANCE < 10 * TOLERANCE < min(one, two)


@pytest.mark.slow
def test_an_image_wider_than_the_window_attends_within_it(folder: Path) -> None:
    (narrow,) = ran(folder, "narrow")
    model = folder / "target-narrow"
    assert max(distance(model, narrow["answers"], by_hand=True)) < TOLERANCE
    assert distance(model, narrow["answers"])[0] > TOLERANCE  # transformers 5.5 does not heed the window there


@pytest.mark.slow
@pytest.mark.parametrize("way", ["speculation", "chunks", "prefix-caching"])
def test_speculation_chunks_and_prefix_caching_change_nothing(folder: Path, way: str) -> None:
    """The drafter attends causally, as a model that reads ids does."""
    plain, other = ran(folder, "plain", way)
    by_prompt = {tuple(o["prompt"]): o["answer"] for o in plain["answers"]}
    assert all(o["answer"] == by_prompt[tuple(o["prompt"])] for o in other["answers"])
    assert max(distance(folder / "target", other["answers"])) < TOLERANCE
    assert 0 < other["counts"].accepted < other["counts"].proposed
    hf = Gemma4ForCausalLM.from_pretrained(folder / "drafter", dtype=torch.float32).eval()
    drafts = [(context, draft) for context, draft in other["drafts"] if context[-1] != IMAGE_TOKEN_ID]
    assert sum(IMAGE_TOKEN_ID in context for context, _ in drafts) > 5
    for context, draft in drafts:
        with torch.no_grad():
            logits = hf(torch.tensor([context + draft[:-1]])).logits[0, len(context) - 1 :]
        assert logits.argmax(-1).tolist() == draft
    computed = [request for requests, _ in steps(other) for request in requests]
    assert not any(first < end <= last for _, end, images in computed for first, last in images)
    if way == "chunks":
        assert any(end in (first - 1, first) for _, end, images in computed for first, _ in images)
    if way == "prefix-caching":  # the cache ends inside an image: its blocks are smaller
        assert any(first < start <= last for start, _, images in computed for first, last in images)


def test_a_step_without_prompts_looks_at_no_request() -> None:
    """It is on the way of every decode step."""
    batch = SimpleNamespace(req_ids=["a", "b"], num_reqs=2)
    batch.num_computed_tokens_cpu, batch.num_prompt_tokens = np.array([9, 40, 0]), np.array([9, 12, 7])
    runner = SimpleNamespace(input_batch=batch, requests=None, **{image_attention.BOTH_WAYS: True})
    assert image_attention._in_step(runner, [4, 4]) == []


def test_a_backend_that_cannot_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU_ATTN; the scheduler keeps images whole all the same, also one whose embeddings are cached."""
    said: list[str] = []
    monkeypatch.setattr(image_attention.logger, "warning", lambda text, *args: said.append(text % args))
    with chatting(folder / "target", max_num_batched_tokens=100, max_num_seqs=2) as llm:
        chunks = Chunks(llm.llm_engine.model_executor.driver_worker.worker.model_runner)
        outputs = chat(llm, [CHATS[0], ["w90", CHATS[0][1], "w31"]], 2)
    (line,) = said
    assert line.startswith("Images attend causally: CPU_ATTN cannot do otherwise")
    images = {output.request_id: spans(list(output.prompt_token_ids)) for output in outputs}
    ends = [(end, images[request.partition("-")[0]]) for request, _, end in chunks.steps]
    assert not any(first < end <= last for end, all in ends for first, last in all)
    assert any(end in (first - 1, first) for end, all in ends for first, _ in all)
