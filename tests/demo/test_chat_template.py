"""The demo's chat template against the published one, on typical dialogues."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from vllm_gemma4_spec.demo.template import chat_template

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Name of the city"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                "days": {"type": "integer"},
            },
            "required": ["city"],
        },
    },
}
NESTED: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "book",
        "description": "",
        "parameters": {
            "type": "object",
            "properties": {
                "guests": {"type": "array", "items": {"type": "string"}, "description": "Who comes"},
                "seats": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"row": {"type": "integer"}, "side": {"type": "string"}},
                        "required": ["row"],
                    },
                },
                "when": {
                    "type": "object",
                    "description": "Day and hour",
                    "nullable": True,
                    "properties": {"day": {"type": "string"}, "hour": {"type": "number"}},
                    "required": ["day", "hour"],
                },
                "quiet": {"type": "boolean", "nullable": True},
            },
            "required": ["guests", "when"],
        },
    },
}
PLAIN: dict[str, Any] = {"type": "function", "function": {"name": "now", "description": "The time now."}}


def call(name: str, arguments: dict[str, Any], id: str = "a") -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


ASK = {"role": "user", "content": "  What is the weather in Paris? "}
CALL = {"role": "assistant", "content": None, "tool_calls": [call("get_weather", {"unit": "celsius", "city": "Paris"})]}
RESULT = {"role": "tool", "tool_call_id": "a", "content": '{"sky": "sunny"}'}
ODD = {"b": [1, 2.5, True, None, "x"], "a": {"k": "v", "d": {}}, "c": ""}
DIALOGUES: dict[str, list[dict[str, Any]]] = {
    "one question": [ASK],
    "system": [{"role": "system", "content": " Be brief.\n"}, ASK],
    "developer": [{"role": "developer", "content": "Be brief."}, ASK],
    "system in parts and text parts": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "One "}, {"type": "text", "text": " two"}]},
    ],
    "two turns": [ASK, {"role": "assistant", "content": "Sunny."}, {"role": "user", "content": "And in Rome?"}],
    "reasoning before the last question is dropped": [
        ASK,
        {"role": "assistant", "reasoning": "Hm.", "content": "<|channel>thought\nHm.\n<channel|>Sunny."},
        {"role": "user", "content": "And in Rome?"},
    ],
    "reasoning kept in the last turn": [ASK, {"role": "assistant", "reasoning_content": "Hm.", "content": "Sunny."}],
    "open call": [ASK, CALL],
    "call with reasoning": [ASK, {**CALL, "reasoning": "I need the weather."}, RESULT],
    "call and result": [ASK, CALL, RESULT],
    "result in parts": [ASK, CALL, {**RESULT, "content": [{"type": "text", "text": "sunny "}]}],
    "result of an unknown call": [ASK, CALL, {"role": "tool", "tool_call_id": "z", "content": "sunny"}],
    "result with a name": [ASK, CALL, {"role": "tool", "name": "get_weather", "content": "sunny"}],
    "call, result, answer": [ASK, CALL, RESULT, {"role": "assistant", "content": "It is sunny."}],
    "call, result, answer, question": [
        ASK,
        {**CALL, "reasoning": "Old."},
        RESULT,
        {"role": "assistant", "content": "It is sunny."},
        {"role": "user", "content": "And in Rome?"},
    ],
    "text with a call": [ASK, {**CALL, "content": "Let me look."}, RESULT],
    "two calls": [
        ASK,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [call("get_weather", {"city": "Paris"}), call("now", {}, id="b")],
        },
        RESULT,
        {"role": "tool", "tool_call_id": "b", "content": "12:00"},
    ],
    "a call after a result": [ASK, CALL, RESULT, {**CALL, "tool_calls": [call("now", {}, id="b")]}],
    "odd arguments": [ASK, {"role": "assistant", "content": "", "tool_calls": [call("book", ODD)]}, RESULT],
    "no arguments": [ASK, {"role": "assistant", "content": "", "tool_calls": [call("now", None)]}, RESULT],  # type: ignore[arg-type]
}


def render(template: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, **options: Any) -> str:
    texts, _ = render_jinja_template(
        conversations=[messages], tools=tools, chat_template=template, bos_token="<bos>", **options
    )
    return texts[0]


@pytest.fixture(scope="module")
def published() -> str:
    root = os.environ.get("GEMMA4_ARTIFACTS")
    if not root:
        pytest.skip("GEMMA4_ARTIFACTS does not name the folder with the published templates")
    (path,) = Path(root).glob("gemma4/chat_templates/google-official-2026-07-large-*.jinja")
    return path.read_text()


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("tools", [None, [WEATHER], [NESTED, PLAIN, WEATHER]], ids=["no tools", "tool", "tools"])
@pytest.mark.parametrize("name", DIALOGUES)
def test_renders_what_the_published_template_renders(
    published: str, name: str, tools: list[dict[str, Any]] | None, prompt: bool, thinking: bool
) -> None:
    for preserve in (False, True):
        options = {"add_generation_prompt": prompt, "enable_thinking": thinking, "preserve_thinking": preserve}
        wanted = render(published, DIALOGUES[name], tools, **options)
        assert render(chat_template(), DIALOGUES[name], tools, **options) == wanted


def test_the_wire_format_spelled_out() -> None:
    messages = [ASK, {**CALL, "reasoning": "I need it."}, RESULT]
    assert render(chat_template(), messages, [WEATHER], add_generation_prompt=True, enable_thinking=True) == (
        "<bos><|turn>system\n<|think|>\n<|tool>declaration:get_weather{"
        'description:<|"|>The weather in a city.<|"|>,parameters:{properties:{'
        'city:{description:<|"|>Name of the city<|"|>,type:<|"|>STRING<|"|>},days:{type:<|"|>INTEGER<|"|>},'
        'unit:{enum:[<|"|>celsius<|"|>,<|"|>fahrenheit<|"|>],type:<|"|>STRING<|"|>}},'
        'required:[<|"|>city<|"|>],type:<|"|>OBJECT<|"|>}}<tool|><turn|>\n'
        "<|turn>user\nWhat is the weather in Paris?<turn|>\n"
        "<|turn>model\n<|channel>thought\nI need it.\n<channel|>"
        '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,unit:<|"|>celsius<|"|>}<tool_call|>'
        '<|tool_response>response:get_weather{value:<|"|>{"sky": "sunny"}<|"|>}<tool_response|><|channel>thought\n'
    )
    assert render(chat_template(), [ASK], None, add_generation_prompt=True) == (
        "<bos><|turn>user\nWhat is the weather in Paris?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>"
    )


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "user", "content": [{"type": "image"}]}, "reads text only, not image"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            "tool call f: arguments must be a mapping",
        ),
    ],
)
def test_refuses_what_it_cannot_write(message: dict[str, Any], says: str) -> None:
    with pytest.raises(jinja2.TemplateError, match=says):
        render(chat_template(), [message], None)
