"""Images that attend both ways in sliding layers, as 31B and 26B-A4B were trained to (``use_bidirectional_attention``).

A token of an image, or of a frame of a video, sees those of the same image on both sides that are nearer than the
sliding window; full layers stay causal. So it is in Google's own model; transformers differ for images wider than the
window alone. TRITON_ATTN's kernel takes ranges of positions in which all see each other; see ``segments.py``.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any

from vllm_gemma4_spec.multimodal.image_turns import SHORT, WithoutRoom
from vllm_gemma4_spec.multimodal.segments import Layout, Range, Row, lay_out

logger = logging.getLogger("vllm.plugins.gemma4_spec")

# Attribute of a model runner: whether images attend both ways.
BOTH_WAYS = "_gemma4_spec_images_both_ways"


def trained_both_ways(model_config: Any) -> bool:
    """Whether the target is a multimodal Gemma 4 whose images attend both ways."""
    gemma4 = getattr(model_config.hf_config, "model_type", None) == "gemma4"
    return gemma4 and model_config.hf_text_config.use_bidirectional_attention == "vision"


def images(features: Iterable[Any], scheduler_config: Any, start: int, end: int) -> list[Range]:
    """Images and frames that tokens ``start`` to ``end - 1`` of a prompt take part in.

    One that fills a whole step cannot be computed in one and is left out: it attends causally, wherever it is cut.

    Args:
        features: the request's ``MultiModalFeatureSpec``.
    """
    step = scheduler_config.max_num_scheduled_tokens or scheduler_config.max_num_batched_tokens
    step = min(step, scheduler_config.long_prefill_token_threshold or step)
    return [
        (first, last)
        for feature in features
        if feature.modality in ("image", "video")
        and feature.mm_position.offset < end
        and start < feature.mm_position.offset + feature.mm_position.length
        for first, last in feature.mm_position.extract_embeds_range()
        if first < end and start <= last and last - first + 1 < step
    ]


def try_schedule_encoder_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    """``Scheduler._try_schedule_encoder_inputs``: a step computes all that is left of an image, or none of it.

    ``--disable-chunked-mm-input`` does not see to that: it passes over an image whose embeddings are cached, or whose
    beginning prefix caching has found. It also refuses videos longer than a step, whose frames attend by themselves.

    Patch: ``image-attention``. Evidence: ``tests/multimodal/test_image_attention.py::test_stock_attends_causally``.
    Related upstream change: #40106, #40534 (in 0.20.0), #47217 (in 0.26.0).
    """

    @functools.wraps(original)
    def wrapper(
        self: Any,
        request: Any,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> Any:
        if trained_both_ways(self.vllm_config.model_config):
            end = num_computed_tokens + num_new_tokens
            for first, last in images(request.mm_features, self.scheduler_config, num_computed_tokens, end):
                if end <= last:
                    # An EAGLE head reads one token further, for which the image's embeddings would be missing.
                    num_new_tokens = max(0, first - shift_computed_tokens - num_computed_tokens)
                    if num_new_tokens == 0:
                        setattr(self, SHORT, WithoutRoom(request, last + 1 - num_computed_tokens))
                    break
        return original(
            self, request, num_computed_tokens, num_new_tokens, encoder_compute_budget, shift_computed_tokens
        )

    return wrapper


def initialize_attn_backend(original: Callable[..., None]) -> Callable[..., None]:
    """``GPUModelRunner.initialize_attn_backend``: warns if a backend attends causally to images.

    Patch: ``image-attention``. Evidence: ``tests/multimodal/test_image_attention.py::test_stock_attends_causally``.
    Related upstream change: #40106, #40534 (in 0.20.0), #47217 (in 0.26.0).
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if not trained_both_ways(self.model_config):
            return
        backends = {group.backend for groups in self.attn_groups for group in groups}
        causal = sorted(name for name in {backend.get_name() for backend in backends} if name != "TRITON_ATTN")
        if self.parallel_config.use_ubatching:
            causal.append("micro-batching")
        setattr(self, BOTH_WAYS, not causal)
        if causal:
            logger.warning(
                "Images attend causally: %s cannot do otherwise. The model was trained with images that attend both "
                "ways, and answers to images differ from transformers'; text is not affected",
                " and ".join(causal),
            )

    return wrapper


def _in_step(runner: Any, num_scheduled_tokens: Iterable[int]) -> list[Row]:
    """Rows of the batch, with the images that this step computes tokens of; empty if it computes none."""
    if not getattr(runner, BOTH_WAYS, False):
        return []
    batch = runner.input_batch
    computed = batch.num_computed_tokens_cpu[: batch.num_reqs]
    if not (computed < batch.num_prompt_tokens[: batch.num_reqs]).any():  # images are in prompts
        return []
    rows = []
    for req_id, start, tokens in zip(batch.req_ids, computed.tolist(), num_scheduled_tokens, strict=False):
        end = start + int(tokens)
        rows.append(Row(start, end, images(runner.requests[req_id].mm_features, runner.scheduler_config, start, end)))
    return rows if any(row.images for row in rows) else []


def determine_batch_execution(original: Callable[..., Any]) -> Callable[..., Any]:
    """``GPUModelRunner._determine_batch_execution_and_padding``: no full CUDA graph for a step that computes an image.

    Full graphs hold the kernel as it was captured, without ranges. The last tokens of an image, left over by prefix
    caching, can be as many as a verification has.

    Patch: ``image-attention``. Evidence: ``tests/multimodal/test_image_attention.py::test_stock_attends_causally``.
    Related upstream change: #40106, #40534 (in 0.20.0), #47217 (in 0.26.0).
    """

    @functools.wraps(original)
    def wrapper(self: Any, **kwargs: Any) -> Any:
        if _in_step(self, kwargs["num_scheduled_tokens_np"]):
            kwargs["use_cascade_attn"] = True  # all it does here is to rule out full graphs
        return original(self, **kwargs)

    return wrapper


def build_attention_metadata(original: Callable[..., Any]) -> Callable[..., Any]:
    """``GPUModelRunner._build_attention_metadata``: images and text in pieces for the target's sliding layers.

    A step without image tokens is left as it is, and so keeps the kernel that skips what is outside the window. The
    drafter builds its metadata itself: it reads ids, not pictures, and attends causally.

    Patch: ``image-attention``. Evidence: ``tests/multimodal/test_image_attention.py::test_stock_attends_causally``.
    Related upstream change: #40106, #40534 (in 0.20.0), #47217 (in 0.26.0).
    """

    @functools.wraps(original)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        built = original(self, *args, **kwargs)
        scheduled = kwargs.get("num_scheduled_tokens")  # by request id; None in a dummy run
        rows = _in_step(self, (scheduled[req_id] for req_id in self.input_batch.req_ids)) if scheduled else []
        if rows:
            layers = self.compilation_config.static_forward_context
            originals, made = dict(built[0]), {}
            layouts: dict[tuple[int, int], Any] = {}  # groups differ in their block tables alone
            for group in (group for groups in self.attn_groups for group in groups):
                block_size = group.get_metadata_builder().kv_cache_spec.block_size
                for name in group.layer_names:
                    window, metadata = layers[name].sliding_window, originals[name]
                    if window is None:
                        continue
                    if (window, block_size) not in layouts:
                        layout = Layout.of(rows, window, block_size, slack=self.num_spec_tokens)
                        layouts[window, block_size] = layout.on(self.device)
                    key = (id(metadata), window)
                    if key not in made:
                        made[key] = lay_out(metadata, layouts[window, block_size])
                    built[0][name] = made[key]
        return built

    return wrapper
