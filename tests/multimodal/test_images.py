"""A Gemma 4 target with a vision tower, images through the chat API, and drafters that read tokens only.

transformers owns the logits; plain decoding owns the tokens; the language model alone, given the ids of the
prompt with its placeholders, owns the drafts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma4ForCausalLM

from tests.support import tiny_models, tiny_multimodal
from tests.support.commands import counted, post, vllm_server
from tests.support.engine import acceptance
from tests.support.images import CHATS, TOLERANCE, Chunks, answers, chat, chatting, distance, found, part
from tests.support.recorder import Recorder
from tests.support.stock import without
from tests.support.tiny_multimodal import IMAGE_TOKEN_ID
from vllm_gemma4_spec.multimodal.patches import EMBEDDER_NORM

TOKENS = 24


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``target`` (31B-like) and ``drafter`` (E4B-like) with vision towers; ``text``: the drafter's language model."""
    folder = tmp_path_factory.mktemp("multimodal")
    drafter = tiny_multimodal.save(tiny_models.drafter_config(), folder / "drafter", seed=1)
    tiny_models.drafter_config(architectures=["Gemma4ForCausalLM"], dtype="float32").save_pretrained(folder / "text")
    weights = load_file(drafter / "model.safetensors")
    prefix = "model.language_model."
    text = {f"model.{n.removeprefix(prefix)}": w for n, w in weights.items() if n.startswith(prefix)}
    save_file(text, folder / "text" / "model.safetensors", {"format": "pt"})
    return {
        "target": tiny_multimodal.save(tiny_models.target_config(), folder / "target"),
        "drafter": drafter,
        "text": folder / "text",
    }


@pytest.fixture(scope="module")
def plain(models: dict[str, Path]) -> list[Any]:
    """What the target answers without speculation, with all log-probabilities."""
    with chatting(models["target"], max_logprobs=512) as llm:
        return chat(llm, CHATS, TOKENS, logprobs=512)


def check_truth(model: Path, outputs: list[Any]) -> None:
    assert [list(output.prompt_token_ids).count(IMAGE_TOKEN_ID) for output in outputs] == [64, 124, 0]
    assert max(distance(model, found(outputs))) < TOLERANCE


def test_logits_after_images_are_those_of_transformers(models: dict[str, Path], plain: list[Any]) -> None:
    check_truth(models["target"], plain)


def test_stock_projects_before_it_normalises(models: dict[str, Path], plain: list[Any]) -> None:
    """Without the patch the logits are others, and not transformers'."""
    with without(EMBEDDER_NORM), chatting(models["target"], max_logprobs=512) as llm:
        stock = chat(llm, CHATS, TOKENS, logprobs=512)
    with pytest.raises(AssertionError):
        check_truth(models["target"], stock)


def test_logits_with_per_layer_embeddings_too(models: dict[str, Path]) -> None:
    """E4B as the target: its per-layer embeddings take the padding token where an image stands."""
    with chatting(models["drafter"], max_logprobs=512) as llm:
        check_truth(models["drafter"], chat(llm, CHATS, TOKENS, logprobs=512))


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("drafter", "plain"),
        ("text", "plain"),
        ("drafter", "chunked-prefill"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("text", "chunked-prefill"), ("drafter", "prefix-caching"), ("text", "prefix-caching"))
        ),
    ],
)
def test_an_answer_to_an_image_is_that_of_plain_decoding(
    models: dict[str, Path], plain: list[Any], kind: str, way: str
) -> None:
    """The drafter as published (with towers) and as text only; its drafts are those of its language model."""
    options: dict[str, Any] = {
        "plain": {},
        "chunked-prefill": {"max_num_batched_tokens": 48, "max_num_seqs": 2},
        "prefix-caching": {"enable_prefix_caching": True},
    }[way]
    with chatting(models["target"], models[kind], **options) as llm:
        before, recorder = acceptance(llm), Recorder(llm)
        chunks = Chunks(recorder.runner)
        for _ in range(2 if way == "prefix-caching" else 1):
            assert answers(chat(llm, CHATS, TOKENS)) == answers(plain)
        counts = acceptance(llm) - before
    assert counts.drafts >= len(CHATS) * (TOKENS // 4)
    if way == "chunked-prefill":
        at = list(plain[0].prompt_token_ids).index(IMAGE_TOKEN_ID)
        assert chunks.cut(at, at + 64)
    hf = Gemma4ForCausalLM.from_pretrained(models["text"], dtype=torch.float32).eval()
    with_image = [(context, draft) for context, draft in recorder.drafts if IMAGE_TOKEN_ID in context]
    finished = [(c, d) for c, d in with_image if c.count(IMAGE_TOKEN_ID) in (64, 124)]
    assert len(finished) >= TOKENS
    for context, draft in finished[:: 1 if way == "plain" else 5]:
        with torch.no_grad():
            logits = hf(torch.tensor([context + draft[:-1]])).logits[0, len(context) - 1 :]
        assert logits.argmax(-1).tolist() == draft


@pytest.mark.slow
def test_images_over_http(models: dict[str, Path], plain: list[Any], tmp_path: Path) -> None:
    speculative = {"method": "draft_model", "model": str(models["drafter"]), "num_speculative_tokens": 3}
    arguments = ("--speculative-config", json.dumps(speculative), "--served-model-name", "tiny")
    options = {"model": "tiny", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    with vllm_server(models["target"], tmp_path / "log", *arguments) as url:
        for content, output in zip(CHATS, plain, strict=True):
            messages = [{"role": "user", "content": [part(c) for c in content]}]
            given = post(f"{url}/v1/chat/completions", options | {"messages": messages})
            assert given["prompt_token_ids"] == list(output.prompt_token_ids)
            assert given["choices"][0]["token_ids"] == list(output.outputs[0].token_ids)
        drafts = counted(url, "spec_decode_num_drafts")
    assert drafts["0"] >= len(CHATS) * (TOKENS // 4)


def test_towers_of_a_drafter_are_neither_built_nor_loaded(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes: the drafter in the engine is as large as its language model on disk, not as its checkpoint."""
    from vllm.model_executor.models.gemma4 import Gemma4ForCausalLM as Loaded

    tensors = load_file(models["drafter"] / "model.safetensors")
    for name in [n for n in tensors if n.endswith("layer_scalar")]:
        del tensors[name]  # a buffer in vLLM, not a parameter
    whole = sum(t.numel() * t.element_size() for t in tensors.values())
    towers = sum(t.numel() * t.element_size() for n, t in tensors.items() if "language_model" not in n)
    assert towers > 0
    built: dict[int, int] = {}
    original = Loaded.load_weights

    def load_weights(self: Any, weights: Any) -> Any:
        # Counted here: on the CPU vLLM replaces weights by packed copies once they are loaded.
        built[id(self)] = sum(t.numel() * t.element_size() for t in self.parameters())
        return original(self, weights)

    monkeypatch.setattr(Loaded, "load_weights", load_weights)
    with chatting(models["target"], models["drafter"]) as llm:
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        drafter = runner.drafter
        assert type(drafter.model) is Loaded
        names = [n for n, _ in drafter.model.named_modules()]
        assert not any("tower" in n or "embed_vision" in n for n in names)
        assert not drafter.supports_mm_inputs
        assert drafter.model.config.image_token_index == IMAGE_TOKEN_ID == runner.model.config.image_token_id
        size = built[id(drafter.model)]
    print(f"checkpoint {whole} bytes, of them towers {towers}; drafter in the engine {size}")
    # vLLM also allocates k_proj, v_proj and k_norm of layers that reuse KV, which transformers does not write:
    # 48 x 32 five times, 48 x 64 once, float32.
    assert size - (whole - towers) == 4 * (5 * (2 * 48 * 32 + 32) + (2 * 48 * 64 + 64))


def test_the_target_as_its_own_drafter(models: dict[str, Path], plain: list[Any]) -> None:
    """Text: every draft accepted. Image: fewer, as the drafter embeds the placeholders, the target the picture."""
    with chatting(models["target"], models["target"]) as llm:
        before = acceptance(llm)
        assert answers(chat(llm, CHATS[2:], TOKENS)) == answers(plain[2:])
        text = acceptance(llm) - before
        assert text.accepted == text.proposed > 0
        assert answers(chat(llm, CHATS[:2], TOKENS)) == answers(plain[:2])
        image = acceptance(llm) - before - text
        assert image.drafts > 0
        assert image.accepted < image.proposed
        before = acceptance(llm)
        assert answers(chat(llm, CHATS[2:], TOKENS)) == answers(plain[2:])
        after = acceptance(llm) - before
        assert after.accepted == after.proposed > 0
