"""Prompts of every template revision: where the output begins, and that history round-trips through the parser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_gemma4_spec.chat.machine import Options, OutputParser, Tools
from vllm_gemma4_spec.chat.tokens import vocabulary

from . import tokenizer as tokenizers_
from .scenarios import TOOLS
from .test_serving import AFTER_TOOL, USER

ROOT = tokenizers_.artifacts()
FOLDERS = [] if ROOT is None else [*(ROOT / "chat_templates").glob("*.jinja"), *(ROOT / "models").glob("*/*.jinja")]
NAMES = [f.stem if f.parent.name == "chat_templates" else f.parent.name for f in FOLDERS]
ARGUMENTS = {
    "city": 'Zürich "x" {y}: [z], \\n',
    "n": [1, -2.5, True, None, {"k": "v", "e": {}}],
    "o": {"b": False, "s": ""},
}


@pytest.fixture(scope="module", params=[None, *FOLDERS], ids=["small", *NAMES])
def render(request: Any, small_folder: Path, tokenizer: Any) -> Any:
    """Messages to prompt token ids, with one template."""
    if request.param is None:
        from transformers import AutoTokenizer

        chosen, template = AutoTokenizer.from_pretrained(small_folder), None
    else:
        chosen, template = tokenizer, request.param.read_text()

    def ids(messages: list[dict[str, Any]], **fields: Any) -> list[int]:
        messages = json.loads(json.dumps(messages))
        for call in (c for m in messages for c in m.get("tool_calls") or ()):
            if isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        text = chosen.apply_chat_template(messages, tokenize=False, chat_template=template, **fields)
        return chosen.encode(text, add_special_tokens=False)

    ids.tokenizer = chosen
    ids.named = request.param.name if request.param else "small"
    return ids


def first_event(render: Any, prompt: list[int]) -> str:
    word = render.tokenizer.encode("is", add_special_tokens=False)
    parser = OutputParser(vocabulary(render.tokenizer), Options(), prompt)
    return next(p.kind for p in parser.read(word) if p.kind is not None)


@pytest.mark.parametrize("thinking", [True, False])
def test_a_question_is_answered_with_content(render: Any, thinking: bool) -> None:
    prompt = render(USER, add_generation_prompt=True, enable_thinking=thinking)
    assert first_event(render, prompt) == "content"


def test_after_a_tools_response(render: Any) -> None:
    """The revisions of July 2026 open a channel here if thinking is on; the earlier ones do not."""
    prompt = render(AFTER_TOOL, add_generation_prompt=True, enable_thinking=True, tools=TOOLS)
    text = render.tokenizer.decode(prompt)
    opened = text.endswith("<|channel>thought\n")
    assert first_event(render, prompt) == ("reasoning" if opened else "content")
    if "2026-07" in render.named:
        assert opened


def test_calls_in_the_history_parse_back(render: Any) -> None:
    """What a template writes of a call is what the model learned to write: the parser reads the same call."""
    if render.named == "small":
        pytest.skip("the small template writes no calls")
    call = {"id": "c", "type": "function", "function": {"name": "set-it", "arguments": ARGUMENTS}}
    messages = [*USER, {"role": "assistant", "content": None, "tool_calls": [call, call]}]
    prompt = render(messages, tools=TOOLS)
    begin = prompt.index(48)
    parser = OutputParser(vocabulary(render.tokenizer), Options(tools=Tools.AUTO))
    arguments = ["", ""]
    for piece in parser.read(prompt[begin:]):
        for event in piece.calls:
            assert event.name in ("", "set-it")
            arguments[event.call] += event.text
    assert [json.loads(a) for a in arguments] == [ARGUMENTS, ARGUMENTS]
