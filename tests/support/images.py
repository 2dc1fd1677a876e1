"""Chats with images, as requests and as transformers sees them."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, Gemma4ForConditionalGeneration

from tests.support import tiny_models, tiny_multimodal
from tests.support.engine import engine
from tests.support.tiny_multimodal import IMAGE_TOKEN_ID, PLACEHOLDERS

# As in tests/engine/test_truth.py; measured here: 2e-5.
TOLERANCE = 2e-4
NARROW = 40  # an image of CHATS has 64 or 60 tokens


def picture(seed: int, width: int = 64, height: int = 64) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def part(content: str | Image.Image) -> dict[str, Any]:
    """One part of a chat message."""
    if isinstance(content, str):
        return {"type": "text", "text": content}
    file = io.BytesIO()
    content.save(file, "PNG")  # lossless, so transformers sees the same pixels
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


# Contents of one user message each: an image, two of other shapes, text only. No answer has a placeholder.
CHATS: list[list[str | Image.Image]] = [
    ["w20 w21", picture(0), "w30 w31"],
    ["w90", picture(1, 48, 80), "w30 w31", picture(0), "w99"],
    [" ".join(f"w{50 + i}" for i in range(70))],
]


@contextmanager
def chatting(model: Path, drafter: Path | None = None, **options: Any) -> Iterator[Any]:
    """An engine as :func:`tests.support.engine.engine`'s, with a tokenizer and images."""
    settings: dict[str, Any] = {
        "skip_tokenizer_init": False,
        "max_model_len": 512,
        "max_num_seqs": 4,
        "limit_mm_per_prompt": {"image": 2, "video": 0},
    }
    with engine(model, drafter, **(settings | options)) as llm:
        yield llm


def chat(llm: Any, contents: list[list[str | Image.Image]], tokens: int, **sampling: Any) -> list[Any]:
    """Outputs of vLLM's chat API, greedy, for one user message each."""
    from vllm import SamplingParams

    messages = [[{"role": "user", "content": [part(c) for c in content]}] for content in contents]
    values = {"max_tokens": tokens, "temperature": 0.0, "ignore_eos": True} | sampling
    return llm.chat(messages, SamplingParams(**values), use_tqdm=False)


def answers(outputs: list[Any]) -> list[list[int]]:
    return [list(o.outputs[0].token_ids) for o in outputs]


def found(outputs: list[Any]) -> list[dict[str, Any]]:
    """What :func:`distance` compares, of outputs with ``logprobs=512``."""
    return [
        {
            "request": output.request_id,
            "prompt": list(output.prompt_token_ids),
            "answer": list(output.outputs[0].token_ids),
            "logprobs": [[step[token].logprob for token in range(512)] for step in output.outputs[0].logprobs],
        }
        for output in outputs
    ]


class Chunks:
    """Which tokens of each request a step computes: ``(request id, first, one past the last)``."""

    def __init__(self, runner: Any) -> None:
        self.steps: list[tuple[str, int, int]] = []
        original = runner.execute_model

        def execute_model(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            starts = {r.req_id: r.num_computed_tokens for r in scheduled.scheduled_new_reqs}
            cached = scheduled.scheduled_cached_reqs
            starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
            self.steps += [(r, starts[r], starts[r] + n) for r, n in scheduled.num_scheduled_tokens.items()]
            return original(scheduled, *args, **kwargs)

        runner.execute_model = execute_model

    def cut(self, first: int, end: int) -> bool:
        """Whether a chunk ended inside positions ``first`` to ``end``."""
        return any(first < stop < end for _, _, stop in self.steps)


def save_both_ways(folder: Path, **changes: Any) -> None:
    """Checkpoints whose images attend both ways.

    ``target`` has a window of 64, ``target-narrow`` the same weights and a window of 40, and ``drafter`` is their
    language model.
    """
    config = {"use_bidirectional_attention": "vision", "num_hidden_layers": 3} | changes
    target = tiny_multimodal.save(tiny_models.target_config(**config), folder / "target")
    shutil.copytree(target, folder / "target-narrow")
    narrow = json.loads((target / "config.json").read_text())
    narrow["text_config"]["sliding_window"] = NARROW
    (folder / "target-narrow" / "config.json").write_text(json.dumps(narrow))
    # It keeps the target's `use_bidirectional_attention`, and is to be causal all the same.
    drafter = tiny_models.target_config(architectures=["Gemma4ForCausalLM"], dtype="float32", **config)
    drafter.save_pretrained(folder / "drafter")
    prefix = "model.language_model."
    weights = load_file(target / "model.safetensors")
    weights = {f"model.{n.removeprefix(prefix)}": w for n, w in weights.items() if n.startswith(prefix)}
    save_file(weights, folder / "drafter" / "model.safetensors", {"format": "pt"})


def mask_by_hand(images: list[tuple[int, int]], length: int, window: int) -> torch.Tensor:
    """``(causal or same image) and nearer than the window`` -> ``[1, 1, length, length]`` bool."""
    at = torch.arange(length)
    same = torch.zeros(length, length, dtype=torch.bool)
    for first, last in images:
        same[first : last + 1, first : last + 1] = True
    near = (at[:, None] - at[None, :]).abs() < window
    return (((at[None, :] <= at[:, None]) | same) & near)[None, None]


def spans(prompt: list[int]) -> list[tuple[int, int]]:
    """First and last position of each image."""
    inside = [token == IMAGE_TOKEN_ID for token in [*prompt, 0]]
    firsts = [i for i, now in enumerate(inside) if now and not inside[i - 1]]
    return [(first, inside.index(False, first) - 1) for first in firsts]


def farthest(hf: Any, output: dict[str, Any], **inputs: Any) -> float:
    """Largest difference of any log-probability of an answer, an entry of :func:`found`, to those of ``hf``."""
    with torch.no_grad():
        logits = hf(input_ids=torch.tensor([output["prompt"] + output["answer"]]), **inputs).logits[0]
    wanted = logits[len(output["prompt"]) - 1 : -1].log_softmax(-1)
    return (torch.tensor(output["logprobs"]) - wanted).abs().max().item()


def distance(model: Path, chats: list[dict[str, Any]], by_hand: bool = False) -> list[float]:
    """Largest difference of any log-probability to transformers' per chat; ``by_hand``: with Google's mask."""
    hf = Gemma4ForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(model)
    distances = []
    for output in chats:
        prompt, answer = output["prompt"], output["answer"]
        assert not PLACEHOLDERS & set(answer)  # transformers would take one for a missing image
        content = next(c for c in CHATS if sum(not isinstance(p, str) for p in c) == len(spans(prompt)))
        images = [c for c in content if not isinstance(c, str)]
        text = "<bos> " + " ".join(c if isinstance(c, str) else "<|image|>" for c in content)
        inputs = dict(processor(text=text, images=images or None, return_tensors="pt"))
        assert inputs.pop("input_ids")[0].tolist() == prompt
        kinds = torch.nn.functional.pad(inputs.pop("mm_token_type_ids"), (0, len(answer)))
        mask: Any = torch.ones_like(kinds)
        if by_hand:
            length = len(prompt) + len(answer)
            window = hf.config.text_config.sliding_window
            mask = {
                "full_attention": mask_by_hand([], length, length),
                "sliding_attention": mask_by_hand(spans(prompt), length, window),
            }
        extra = {k: v for k, v in inputs.items() if k in ("pixel_values", "image_position_ids")}
        distances.append(farthest(hf, output, attention_mask=mask, mm_token_type_ids=kinds, **extra))
    return distances
