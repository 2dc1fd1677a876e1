"""vLLM's engine on the CPU with its attention backend for GPUs, TRITON_ATTN, whose kernels Triton interprets.

``python -m tests.multimodal.images_by_triton FOLDER CASE…``: what ``FOLDER/target`` (``target-narrow``: with a window
narrower than an image) answers to the chats of ``tests/support/images.py``, saved as ``FOLDER/CASE.pt``.
"""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

CASES: dict[str, dict[str, Any]] = {
    "one-image": {},
    "plain": {},
    "stock": {},
    "narrow": {},
    "video": {"limit_mm_per_prompt": {"image": 0, "video": 1}},
    "speculation": {},
    "chunks": {"max_num_batched_tokens": 100},
    "prefix-caching": {"enable_prefix_caching": True, "max_num_batched_tokens": 100},
}
PLAIN = ("one-image", "plain", "stock", "narrow", "video")
TOKENS = 6


class Steps:
    """Per step: what it computes, ``(request id, first, one past the last)``, and whether a full CUDA graph may run."""

    def __init__(self, runner: Any) -> None:
        from tests.support.images import Chunks

        self.all: list[tuple[list[tuple[str, int, int]], bool]] = []
        self.dispatch = runner.cudagraph_dispatcher.dispatch
        self.chunks = Chunks(runner)
        runner.cudagraph_dispatcher.dispatch = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.all.append((self.chunks.steps[:], kwargs["invalid_modes"] is None))
        self.chunks.steps.clear()
        return self.dispatch(*args, **kwargs)


def run(folder: Path, case: str, **options: Any) -> dict[str, Any]:
    from tests.support.engine import acceptance
    from tests.support.images import CHATS, chat, chatting, found
    from tests.support.recorder import Recorder
    from tests.support.sound_and_video import VIDEO, ask
    from tests.support.stock import without
    from tests.support.tiny_multimodal import FIRST_WORD
    from vllm_gemma4_spec.multimodal import image_attention, segments
    from vllm_gemma4_spec.multimodal.patches import IMAGE_ATTENTION

    target = folder / ("target-narrow" if case == "narrow" else "target")
    drafter = None if case in PLAIN else folder / "drafter"
    walked: list[int] = []  # the longest context of a step with images, in tokens

    def lay_out(metadata: Any, pieces: Any) -> Any:
        walked.append(pieces.layout.max_seq_len)
        return segments.lay_out(metadata, pieces)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(image_attention, "lay_out", lay_out))
        stack.enter_context(mock.patch.object(segments, "TEXT", 16))
        if case == "stock":
            stack.enter_context(without(IMAGE_ATTENTION))
        llm = stack.enter_context(chatting(target, drafter, max_logprobs=512, max_num_seqs=2, **CASES[case], **options))
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        steps, before = Steps(runner), acceptance(llm)
        recorder = None if drafter is None else Recorder(llm)
        words = list(range(FIRST_WORD, 512))  # no placeholder
        outputs = ask(llm, [VIDEO], TOKENS) if case == "video" else []
        rounds = {"video": [], "one-image": [CHATS[:1]], "prefix-caching": [CHATS, CHATS[::-1]]}.get(case, [CHATS])
        for chats in rounds:
            outputs += chat(llm, chats, TOKENS, logprobs=512, allowed_token_ids=words)
        return {
            "answers": found(outputs),
            "steps": steps.all,
            "walked": walked,
            "drafts": [] if recorder is None else recorder.drafts,
            "counts": acceptance(llm) - before,
        }


def main(folder: Path, *cases: str) -> None:
    import torch
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.ops import triton_unified_attention

    from tests.support import stock

    if stock.LEAVE_OUT in os.environ:
        stock.pytest_configure()
    backend = AttentionBackendEnum.TRITON_ATTN.get_path()
    CpuPlatform.get_attn_backend_cls = classmethod(lambda *_, **__: backend)  # type: ignore[method-assign]
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # asked for launch sizes
    # One kernel for all: the one for single tokens runs each of its 16 segments as a program.
    triton_unified_attention.is_batch_invariant = True
    for case in cases:
        torch.save(run(folder, case), folder / f"{case}.pt")


if __name__ == "__main__":
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling the ranks of log-probabilities takes longer than all the rest
    main(Path(sys.argv[1]), *sys.argv[2:])
