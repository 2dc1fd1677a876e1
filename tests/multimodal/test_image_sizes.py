"""Images of any shape and of several resolutions."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import tiny_models, tiny_multimodal
from tests.support.images import chatting, picture
from tests.support.stock import without
from vllm_gemma4_spec.multimodal import image_sizes
from vllm_gemma4_spec.multimodal.patches import IMAGE_SIZES

SIDES = st.tuples(st.integers(1, 20), st.integers(1, 400)).flatmap(st.permutations)


@given(sides=SIDES)
@settings(max_examples=60, deadline=None)
def test_tokens_are_as_many_as_the_image_processor_makes(sides: list[int]) -> None:
    """Whatever the shape; three by three patches that are not padding make a token."""
    width, height = sides
    processor = tiny_multimodal.processor().image_processor
    made = processor([picture(0, width, height)], return_tensors="pt")
    patches = (made["image_position_ids"] >= 0).all(-1).sum().item()
    vision = SimpleNamespace(**tiny_multimodal.VISION)
    info = SimpleNamespace(get_hf_config=lambda: SimpleNamespace(vision_config=vision))
    assert image_sizes.compute_num_soft_tokens(lambda *a: 0)(info, width, height) == patches // 9 > 0


def test_a_request_cannot_end_the_process() -> None:
    def processor(*args: Any) -> Any:
        raise SystemExit(1)

    with pytest.raises(ValueError, match="max_soft_tokens must be one of 70, 140"):
        image_sizes.call_hf_processor(processor)(None, "", {}, {}, {})


def two_resolutions() -> dict[str, list[torch.Tensor]]:
    """What a step of three images, one of them with more tokens, hands to the model."""
    processor = tiny_multimodal.processor().image_processor
    inputs = [
        processor([picture(n, 40 + 30 * n, 64)], return_tensors="pt", max_soft_tokens=tokens)
        for n, tokens in enumerate((70, 140, 70))
    ]
    return {
        "pixel_values": [each["pixel_values"][0] for each in inputs],
        "pixel_position_ids": [each["image_position_ids"][0] for each in inputs],
    }


def model_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model


@pytest.mark.slow
def test_stock_takes_one_resolution(tmp_path: Path) -> None:
    target = tiny_multimodal.save(tiny_models.target_config(num_hidden_layers=2), tmp_path)
    with (
        without(IMAGE_SIZES),
        chatting(target) as llm,
        torch.inference_mode(),
        pytest.raises((AttributeError, TypeError, ValueError)),
    ):
        model_of(llm).embed_multimodal(**two_resolutions())


def test_several_resolutions_one_image_at_a_time(tmp_path: Path) -> None:
    """What the model makes of images in one step is what it makes of each, and the tower sees one at a time."""
    target = tiny_multimodal.save(tiny_models.target_config(num_hidden_layers=2), tmp_path)
    inputs = two_resolutions()
    with chatting(target) as llm, torch.inference_mode():
        model = model_of(llm)
        seen: list[tuple[int, ...]] = []
        hook = model.vision_tower.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
        together = model.embed_multimodal(**inputs)
        hook.remove()
        each = [
            model.embed_multimodal(pixel_values=pixel[None], pixel_position_ids=position[None])[0]
            for pixel, position in zip(*inputs.values(), strict=True)
        ]
    assert [shape[0] for shape in seen] == [1, 1, 1]
    assert [len(e) for e in each] == [len(t) for t in together]
    assert all(torch.equal(a, b) for a, b in zip(together, each, strict=True))
