"""Prompts with sound and video, as vLLM and as transformers see them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support.images import farthest
from tests.support.tiny_multimodal import FIRST_WORD

RATE = 16_000


def sound(seed: int, seconds: float) -> tuple[np.ndarray, int]:
    return np.random.default_rng(seed).standard_normal(int(RATE * seconds)).astype(np.float32), RATE


def video(seed: int, frames: int = 3) -> tuple[np.ndarray, dict[str, Any]]:
    pixels = np.random.default_rng(seed).integers(0, 255, (frames, 64, 64, 3), dtype=np.uint8)
    about = {"fps": 1.0, "duration": float(frames), "total_num_frames": frames, "frames_indices": list(range(frames))}
    return pixels, about | {"video_backend": "opencv", "do_sample_frames": False}


# Prompt, data, and how many of which placeholder the prompt must hold.
SOUND: tuple[str, dict[str, Any], str] = (
    "<bos> w20 w21 <|audio|> w30 w31",
    {"audio": [sound(0, 1.5)]},
    "audio_token",
)
VIDEO: tuple[str, dict[str, Any], str] = ("<bos> w90 <|video|> w99", {"video": [video(1)]}, "video_token")


def ask(llm: Any, prompts: list[tuple[str, dict[str, Any], str]], tokens: int) -> list[Any]:
    """Greedy answers of words only, with the log-probability of every token; needs ``max_logprobs=512``."""
    from vllm import SamplingParams

    words = list(range(FIRST_WORD, 512))  # transformers would take a placeholder for missing data
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, logprobs=512, allowed_token_ids=words)
    requests = [{"prompt": text, "multi_modal_data": data} for text, data, _ in prompts]
    return llm.generate(requests, params, use_tqdm=False)


def distance(model: Path, prompt: tuple[str, dict[str, Any], str], found: dict[str, Any]) -> float:
    """Largest difference of any log-probability to transformers'.

    Args:
        found: one entry of ``tests.support.images.found``.
    """
    from transformers import AutoProcessor, Gemma4ForConditionalGeneration
    from transformers.video_utils import VideoMetadata

    text, data, _ = prompt
    given: dict[str, Any] = {}
    if "audio" in data:
        ((wave, rate),) = data["audio"]
        given = {"audio": [wave], "sampling_rate": rate}
    else:
        ((pixels, about),) = data["video"]
        about = {name: value for name, value in about.items() if name != "do_sample_frames"}
        given = {"videos": [torch.from_numpy(pixels).permute(0, 3, 1, 2)], "video_metadata": [VideoMetadata(**about)]}
        given["do_sample_frames"] = False
    inputs = dict(AutoProcessor.from_pretrained(model)(text=text, return_tensors="pt", **given))
    assert inputs.pop("input_ids")[0].tolist() == found["prompt"]
    kinds = torch.nn.functional.pad(inputs.pop("mm_token_type_ids"), (0, len(found["answer"])))
    inputs["attention_mask"] = torch.ones_like(kinds)
    hf = Gemma4ForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    return farthest(hf, found, mm_token_type_ids=kinds, **inputs)
