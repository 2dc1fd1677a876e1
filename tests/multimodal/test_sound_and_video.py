"""Sound and video for an E4B-like target with an audio tower: answers as without speculation, drafts from token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import tiny_models, tiny_multimodal
from tests.support.engine import acceptance, engine
from tests.support.tiny_multimodal import CONTROL

TOKENS = 24
RATE = 16_000


def sound(seed: int, seconds: float) -> tuple[np.ndarray, int]:
    return np.random.default_rng(seed).standard_normal(int(RATE * seconds)).astype(np.float32), RATE


def video(seed: int, frames: int = 3) -> tuple[np.ndarray, dict[str, Any]]:
    pixels = np.random.default_rng(seed).integers(0, 255, (frames, 64, 64, 3), dtype=np.uint8)
    about = {"fps": 1.0, "duration": float(frames), "total_num_frames": frames, "frames_indices": list(range(frames))}
    return pixels, about | {"video_backend": "opencv", "do_sample_frames": False}


# Prompt, data, and how many of which placeholder the prompt must hold.
PROMPTS: list[tuple[str, dict[str, Any], str]] = [
    ("<bos> w20 w21 <|audio|> w30 w31", {"audio": [sound(0, 1.5)]}, "audio_token"),
    ("<bos> w90 <|video|> w99", {"video": [video(1)]}, "video_token"),
]


def answers(llm: Any) -> list[Any]:
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    requests = [{"prompt": text, "multi_modal_data": data} for text, data, _ in PROMPTS]
    return llm.generate(requests, params, use_tqdm=False)


@pytest.mark.slow
def test_answers_to_sound_and_video(tmp_path: Path) -> None:
    text = tiny_models.drafter_config()
    target = tiny_multimodal.save(text, tmp_path / "target", audio_config=tiny_multimodal.AUDIO)
    options = {"skip_tokenizer_init": False, "max_model_len": 512, "max_num_seqs": 4}
    options |= {"limit_mm_per_prompt": {"image": 0, "audio": 1, "video": 1}}
    with engine(target, **options) as llm:
        plain = answers(llm)
    for output, (_, _, token) in zip(plain, PROMPTS, strict=True):
        assert list(output.prompt_token_ids).count(CONTROL[token][1]) > 20
    with engine(target, target, 3, **options) as llm:
        before = acceptance(llm)
        outputs = answers(llm)
        counts = acceptance(llm) - before
    want, got = ([list(o.outputs[0].token_ids) for o in outs] for outs in (plain, outputs))
    assert got == want
    assert 0 < counts.accepted <= counts.proposed
