"""Requests keep their own meaning: n, logprobs, echo, tool_choice, parallel_tool_calls, ids, usage, batches."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vllm_gemma4_spec.chat.patches import CHAT_OUTPUT
from vllm_gemma4_spec.registry import PATCHER

from . import server
from .scenarios import THINK, TOOLS
from .server import Server, all_at_once, by, random_cut, whole_choice

USER = [{"role": "user", "content": "Hi"}]
CUTS = [by(1), by(2), by(3), by(6), all_at_once, random_cut(3)]
REASONED = "<|channel>thought\nHm.<channel|>Yes.<turn|>"
CALLED = '<|tool_call>call:get{city:<|"|>Paris<|"|>}<tool_call|><|tool_call>call:set-it{}<tool_call|><|tool_response>'
FORCED = [{"name": "get", "parameters": {"city": 'a "b" \\ {'}}, {"name": "set-it", "parameters": {"n": [1, {"x": 2}]}}]


@pytest.fixture(scope="module")
def tools_only(overlay: None, folder: Any) -> Server:
    return server.run(Server(str(folder), reasoning="").start())


@pytest.fixture(scope="module")
def reasoning_only(overlay: None, folder: Any) -> Server:
    return server.run(Server(str(folder), tools=None).start())


def ask(
    served: Server, *scripts: list[int], cut: server.Cut = server.ONE_BY_ONE, **request: Any
) -> list[dict[str, Any]]:
    served.script(*scripts, cut=cut)
    if request.get("stream"):
        request.setdefault("stream_options", {"include_usage": True})
    return server.run(served.chat(messages=request.pop("messages", USER), **request))


def every_way(served: Server, *scripts: list[int], **request: Any) -> list[dict[str, Any]]:
    """Whole and streamed in every cut: all the same."""
    whole = ask(served, *scripts, **request)
    for cut in CUTS:
        assert ask(served, *scripts, cut=cut, **request) == whole
        assert ask(served, *scripts, cut=cut, stream=True, **request) == whole
    return whole


def test_several_choices(both: Server, encode: Any) -> None:
    scripts = [
        encode(REASONED),
        encode(CALLED),
        encode("<|channel>thought\nLong enough to be last, I hope.<channel|>No.<turn|>"),
    ]
    request = {"n": 3, "tools": TOOLS, "temperature": 1.0, **THINK}
    choices = every_way(both, *scripts, **request)
    assert [c["content"] for c in choices] == ["Yes.", "", "No."]
    assert [c["reasoning"] for c in choices] == ["Hm.", "", "Long enough to be last, I hope."]
    assert [c["calls"] for c in choices] == [[], [["get", '{"city": "Paris"}'], ["set-it", "{}"]], []]
    assert [c["finish_reason"] for c in choices] == ["stop", "tool_calls", "stop"]


def test_choices_that_call_at_once(both: Server, encode: Any) -> None:
    """Their arguments arrive in turns, and what a chunk is made of is used again."""
    city = '<|tool_call>call:get{city:<|"|>%s, the capital<|"|>,n:1}<tool_call|>'
    scripts = [encode(city % a + city % b + "<|tool_response>") for a, b in (("Paris", "Rome"), ("Oslo", "Bern"))]
    for more in ({}, {"parallel_tool_calls": False}):
        choices = every_way(both, *scripts, n=2, tools=TOOLS, temperature=1.0, **more)
        called = [[json.loads(arguments)["city"][:5] for _, arguments in c["calls"]] for c in choices]
        wanted = [["Paris", "Rome,"], ["Oslo,", "Bern,"]]
        assert called == ([w[:1] for w in wanted] if more else wanted)


def test_every_token_has_its_logprobs(both: Server, encode: Any, tokenizer: Any) -> None:
    tokens = encode(REASONED)
    (choice,) = every_way(both, tokens, logprobs=True, top_logprobs=0, **THINK)
    assert choice["logprobs"] == [tokenizer.decode([t]) for t in tokens]
    (choice,) = every_way(both, encode(CALLED), logprobs=True, top_logprobs=0, tools=TOOLS)
    assert len(choice["logprobs"]) == len(encode(CALLED))


@pytest.mark.parametrize("shown", [False, True])
def test_beam_search(both: Server, encode: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, shown: bool) -> None:
    """It has taken the end of sequence off, or left it where it is to be shown; the rest is text."""
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput, RequestOutput

    script = [*encode("<|channel>thought\nHm.<channel|>Answer."), tokenizer.eos_token_id]
    begin: list[int] = []

    async def generate(prompt: Any, params: Any, request_id: str, **_: Any) -> Any:
        ids = list(prompt["prompt_token_ids"])
        begin.append(len(ids))
        at = len(ids) - begin[0]
        on_script = ids[begin[0] :] == script[:at] and at < len(script)
        first = script[at] if on_script else 236776
        others = {t: Logprob(-30.0 - t) for t in range(300, 300 + params.logprobs - 1)}
        logprobs = {first: Logprob(-0.1 if on_script else -29.0), **others}
        output = CompletionOutput(0, "", [first], None, [logprobs], finish_reason="length")
        yield RequestOutput(request_id, None, ids, None, [output], True)

    monkeypatch.setattr(both.engine, "generate", generate)
    request = {"use_beam_search": True, "n": 2, "max_tokens": len(script) + 1, "temperature": 0.0}
    best = ask(both, script, include_stop_str_in_output=shown, **request)[0]
    assert (best["reasoning"], best["content"], best["finish_reason"]) == ("Hm.", "Answer.", "stop")


def test_token_ids_come_back(both: Server, encode: Any) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    tokens = encode(REASONED)
    both.script(tokens, cut=by(3))

    async def stream() -> list[int]:
        request = ChatCompletionRequest(model=server.MODEL, messages=USER, stream=True, return_token_ids=True)
        chunks = await both.app.state.openai_serving_chat.create_chat_completion(request)
        lines = [json.loads(c[6:]) async for c in chunks if "[DONE]" not in c]
        return [t for line in lines for c in line["choices"] for t in c.get("token_ids") or ()]

    assert server.run(stream()) == tokens


def test_a_chunk_has_reasoning_or_content(both: Server, encode: Any) -> None:
    """Clients like vLLM's own example take the content only of chunks without reasoning."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    async def deltas(cut: server.Cut) -> list[dict[str, Any]]:
        both.script(encode(REASONED), cut=cut)
        request = ChatCompletionRequest(model=server.MODEL, messages=USER, stream=True)
        chunks = await both.app.state.openai_serving_chat.create_chat_completion(request)
        return [c["delta"] async for line in chunks if "[DONE]" not in line for c in json.loads(line[6:])["choices"]]

    for cut in CUTS:
        got = server.run(deltas(cut))
        assert "".join(d["content"] for d in got if d.get("content") and not d.get("reasoning")) == "Yes."
        assert "".join(d.get("reasoning") or "" for d in got) == "Hm."


def test_echo(both: Server, encode: Any) -> None:
    messages = [*USER, {"role": "assistant", "content": "So far "}]
    request = {"messages": messages, "echo": True, "add_generation_prompt": False, "continue_final_message": True}
    (choice,) = every_way(both, encode("so good.<turn|>"), **request)
    assert choice["content"] == "So far so good."


@pytest.mark.parametrize(("indent", "end"), [(None, ""), (2, ""), (2, "\n"), (None, " \n\n")])
def test_tool_choice_required(both: Server, encode: Any, indent: int | None, end: str) -> None:
    tokens = encode("<|channel>thought\nHm.<channel|>" + json.dumps(FORCED, indent=indent) + end + "<turn|>")
    (choice,) = every_way(both, tokens, tools=TOOLS, tool_choice="required", **THINK)
    assert [[n, json.loads(a)] for n, a in choice["calls"]] == [[c["name"], c["parameters"]] for c in FORCED]
    assert choice["reasoning"] == "Hm."
    assert choice["content"] == ""
    assert choice["finish_reason"] == "tool_calls"


def test_tool_choice_required_in_gemmas_own_form(both: Server, encode: Any) -> None:
    """Where the grammar is not applied (thinking not ended), the model calls in its own form."""
    (choice,) = every_way(both, encode(CALLED), tools=TOOLS, tool_choice="required")
    assert choice["calls"] == [["get", '{"city": "Paris"}'], ["set-it", "{}"]]
    assert choice["finish_reason"] == "tool_calls"


def test_tool_choice_named(both: Server, encode: Any) -> None:
    named = {"type": "function", "function": {"name": "get"}}
    tokens = encode("<|channel>thought\nHm.<channel|>" + json.dumps(FORCED[0]["parameters"]) + "<turn|>")
    (choice,) = every_way(both, tokens, tools=TOOLS, tool_choice=named, **THINK)
    assert [[n, json.loads(a)] for n, a in choice["calls"]] == [["get", FORCED[0]["parameters"]]]
    assert choice["finish_reason"] == "stop"
    assert choice["content"] == ""
    (choice,) = every_way(both, encode("I would rather not.<turn|>"), tools=TOOLS, tool_choice=named)
    assert choice["content"] == "I would rather not."
    assert choice["calls"] == []


@pytest.mark.parametrize("form", ["required", "named"])
def test_forced_call_cut_by_max_tokens(both: Server, encode: Any, form: str) -> None:
    named = {"type": "function", "function": {"name": "get"}}
    text = json.dumps(FORCED) if form == "required" else json.dumps(FORCED[0]["parameters"])
    tokens = encode(text)
    choice_ = "required" if form == "required" else named
    for limit in range(1, len(tokens), 4):
        (choice,) = every_way(both, tokens, tools=TOOLS, tool_choice=choice_, max_tokens=limit)
        for _, arguments in choice["calls"]:
            assert isinstance(json.loads(arguments), dict)


@pytest.mark.parametrize("form", ["required", "named"])
@pytest.mark.parametrize("between", ["<|channel>thought\nHm.<channel|>", "<|tool_call>call:set-it{n:2}<tool_call|>"])
def test_forced_call_ends_where_something_else_begins(both: Server, encode: Any, form: str, between: str) -> None:
    """Where no grammar is applied: what comes behind is no part of the call."""
    begin = '[{"name": "get", "parameters": ' if form == "required" else ""
    named = {"type": "function", "function": {"name": "get"}}
    tokens = encode(f'{begin}{{"city": "Par{between}is"}}<turn|>')
    (choice,) = every_way(both, tokens, tools=TOOLS, tool_choice=named if form == "named" else form)
    more = [] if "thought" in between else [["set-it", '{"n": 2}']]
    assert choice["calls"] == [["get", '{"city": "Par"}'], *more]
    assert choice["content"] == 'is"}'
    assert choice["finish_reason"] == "stop"


def test_parallel_tool_calls_off(both: Server, encode: Any) -> None:
    (choice,) = every_way(both, encode(CALLED), tools=TOOLS, parallel_tool_calls=False)
    assert choice["calls"] == [["get", '{"city": "Paris"}']]


def test_tool_choice_none(both: Server, encode: Any) -> None:
    (choice,) = every_way(both, encode(CALLED), tools=TOOLS, tool_choice="none")
    assert choice["calls"] == []
    assert choice["content"] == "call:get{city:Paris}call:set-it{}"
    assert choice["finish_reason"] == "stop"


def test_tool_parser_alone(tools_only: Server, encode: Any) -> None:
    """Without a reasoning parser reasoning is content, without its marks and label."""
    (choice,) = every_way(tools_only, encode("<|channel>thought\nHm.<channel|>Yes." + CALLED), tools=TOOLS, **THINK)
    assert choice["reasoning"] == ""
    assert choice["content"] == "Hm.Yes."
    assert len(choice["calls"]) == 2


def test_reasoning_parser_alone(reasoning_only: Server, encode: Any) -> None:
    (choice,) = every_way(reasoning_only, encode(REASONED), **THINK)
    assert (choice["reasoning"], choice["content"]) == ("Hm.", "Yes.")
    (choice,) = every_way(reasoning_only, encode(CALLED), tools=TOOLS, tool_choice="none")
    assert choice["content"] == "call:get{city:Paris}call:set-it{}"


def test_requests_own_skip_special_tokens(both: Server, encode: Any) -> None:
    for own in (True, False):
        ask(both, encode(REASONED), skip_special_tokens=own)
        assert both.engine.requests[-1].skip_special_tokens is own


def test_call_ids_are_unique_and_openai_s_fields_complete(both: Server, encode: Any) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    both.script(encode(CALLED))
    request = ChatCompletionRequest(model=server.MODEL, messages=USER, tools=TOOLS)
    response = server.run(both.app.state.openai_serving_chat.create_chat_completion(request))
    calls = response.choices[0].message.tool_calls
    assert len({c.id for c in calls}) == 2
    assert {c.type for c in calls} == {"function"}
    assert response.choices[0].message.content is None


def test_batch(both: Server, encode: Any) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import BatchChatCompletionRequest

    async def ask_batch(**fields: Any) -> list[dict[str, Any]]:
        request = BatchChatCompletionRequest(model=server.MODEL, messages=[USER, USER], **fields)
        response = await both.app.state.openai_serving_chat_batch.create_batch_chat_completion(request)
        assert type(response.choices[0].message.content) is str
        return [whole_choice(c.model_dump(), response.usage.completion_tokens) for c in response.choices]

    both.script(encode(REASONED), cut=by(3))
    answers = server.run(ask_batch())
    assert [(a["reasoning"], a["content"]) for a in answers] == [("Hm.", "Yes.")] * 2
    answers = server.run(ask_batch(include_reasoning=False))
    assert [(a["reasoning"], a["content"]) for a in answers] == [("", "Yes.")] * 2


def test_error_of_the_engine_is_passed_on(both: Server, encode: Any) -> None:
    async def broken(*_: Any, **__: Any) -> Any:
        raise ValueError("the engine says no")
        yield

    original, both.engine.generate = both.engine.generate, broken
    try:
        with pytest.raises(AssertionError, match="the engine says no"):
            ask(both, encode(REASONED), stream=True)
    finally:
        both.engine.generate = original


@pytest.mark.parametrize("parsers", [("granite", None), ("", "hermes"), ("", None), ("gemma4", "hermes")])
def test_other_parsers_are_left_alone(overlay: None, folder: Any, encode: Any, parsers: tuple[str, str | None]) -> None:
    """Byte for byte what vLLM answers without the patch."""
    served = server.run(Server(str(folder), *parsers).start())
    tokens = encode("Here is my thought process: Hm. Here is my response: Hi <tool_call>{}<turn|>")
    request = {"tools": TOOLS} if parsers[1] else {}
    with_patch = [ask(served, tokens, cut=by(2), stream=stream, **request) for stream in (False, True)]
    PATCHER.undo([CHAT_OUTPUT])
    try:
        without = [ask(served, tokens, cut=by(2), stream=stream, **request) for stream in (False, True)]
    finally:
        PATCHER.apply([CHAT_OUTPUT])
    assert with_patch == without
