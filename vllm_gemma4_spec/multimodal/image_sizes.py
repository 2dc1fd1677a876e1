"""Images of any shape and of several resolutions: as many tokens in the prompt as the vision tower makes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def compute_num_soft_tokens(original: Callable[..., int]) -> Callable[..., int]:
    """``Gemma4ProcessingInfo._compute_num_soft_tokens``: counted as transformers' image processor resizes.

    It clamps the longer side of an image that is narrower than one token; vLLM's own arithmetic does not.

    Patch: ``image-sizes``. Evidence: ``tests/multimodal/test_image_sizes.py::test_stock_takes_one_resolution``. Related
    upstream change: none found by number; fixed in 0.21.0 and 0.22.1.
    """
    from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size

    @functools.wraps(original)
    def wrapper(self: Any, image_width: int, image_height: int, max_soft_tokens: int | None = None) -> int:
        vision = self.get_hf_config().vision_config
        patches = vision.pooling_kernel_size**2  # of one soft token
        height, width = get_aspect_ratio_preserving_size(
            height=image_height,
            width=image_width,
            patch_size=vision.patch_size,
            max_patches=(max_soft_tokens or vision.default_output_length) * patches,
            pooling_kernel_size=vision.pooling_kernel_size,
        )
        return int((height // vision.patch_size) * (width // vision.patch_size) // patches)

    return wrapper


def call_hf_processor(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Gemma4MultiModalProcessor._call_hf_processor``: what is wrong with one request ends that request alone.

    The original ends the process where a request's ``max_soft_tokens`` is none of Gemma 4's.

    Patch: ``image-sizes``. Evidence: ``tests/multimodal/test_image_sizes.py::test_stock_takes_one_resolution``. Related
    upstream change: none found by number; fixed in 0.21.0 and 0.22.1.
    """

    @functools.wraps(original)
    def wrapper(self: Any, prompt: str, mm_data: Any, mm_kwargs: Any, tok_kwargs: Any) -> Any:
        try:
            return original(self, prompt, mm_data, mm_kwargs, tok_kwargs)
        except SystemExit:
            raise ValueError("mm_processor_kwargs: max_soft_tokens must be one of 70, 140, 280, 560, 1120") from None

    return wrapper


def embed_multimodal(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Gemma4ForConditionalGeneration.embed_multimodal``: images of several resolutions, one resolution at a time.

    They come as a list of ``[patches, patch_pixels]`` where they cannot be stacked; the order stays. Within a
    resolution the original runs the tower for one image after another, so its memory does not grow with their number.

    Patch: ``image-sizes``. Evidence: ``tests/multimodal/test_image_sizes.py::test_stock_takes_one_resolution``. Related
    upstream change: none found by number; fixed in 0.21.0 and 0.22.1.
    """

    @functools.wraps(original)
    def wrapper(self: Any, **kwargs: Any) -> Any:
        pixels, positions = kwargs.get("pixel_values"), kwargs.get("pixel_position_ids")
        if not isinstance(pixels, list) or not isinstance(positions, list):
            return original(self, **kwargs)
        del kwargs["pixel_values"], kwargs["pixel_position_ids"]
        made: list[torch.Tensor] = []
        for pixel, position in zip(pixels, positions, strict=True):
            made += original(self, pixel_values=pixel[None], pixel_position_ids=position[None])
        return made + list(original(self, **kwargs)) if kwargs else made

    return wrapper
