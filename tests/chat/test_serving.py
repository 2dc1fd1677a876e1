"""/v1/chat/completions: vLLM's server code over scripted tokens, every scenario in every cut."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from vllm_gemma4_spec.chat.patches import CHAT_OUTPUT
from vllm_gemma4_spec.chat.tokens import vocabulary
from vllm_gemma4_spec.registry import PATCHER

from . import reference, server
from .scenarios import SCENARIOS, Scenario
from .server import Server, all_at_once, by, random_cut

USER = [{"role": "user", "content": "Hi"}]
AFTER_TOOL = [
    *USER,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "get", "arguments": '{"n": 1}'}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "15 degrees"},
]
SHORT = 24  # tokens; short outputs are also split in two everywhere


def cuts(length: int, whole: bool, every: bool) -> list[tuple[str, server.Cut]]:
    """The ways to cut a streamed answer; a whole answer is the same in all, so a few do."""
    if not every:
        return [("3", by(3))] if whole else [("1", by(1)), ("3", by(3)), ("all", all_at_once)]
    some = [("1", by(1)), ("3", by(3)), ("all", all_at_once)]
    if whole:
        return some
    some += [("2", by(2)), ("6", by(6)), ("random 1", random_cut(1)), ("random 2", random_cut(2))]
    if length <= SHORT:
        some += [
            (f"{at} + rest", lambda n, at=at: [min(at, n), *([n - at] if n > at else [])]) for at in range(1, length)
        ]
    return some


def expected(tokenizer: Any, scenario: Scenario, tokens: list[int], prompt: list[int]) -> dict[str, Any]:
    """The reference's answer, in the server's plain form; arguments as :func:`reference.read_json` gives them."""
    request = scenario.request
    ends = next((i for i, t in enumerate(tokens, 1) if t in server.ENDS), None)
    limit = request.get("max_tokens")
    stopped = ends is not None and not request.get("ignore_eos") and (limit is None or ends <= limit)
    used = tokens[:ends] if stopped else tokens[:limit]
    text_tokens = used[:-1] if stopped and not request.get("include_stop_str_in_output") else used
    stops = request.get("stop", [])
    understood = functools.partial(
        reference.understand,
        text_tokens,
        lambda ids: tokenizer.decode(ids, skip_special_tokens=False),
        vocabulary(tokenizer).special,
        prompt=prompt,
        tools=scenario.tools,
        shown=request.get("skip_special_tokens") is False,
        include_stop=bool(request.get("include_stop_str_in_output")),
        include_reasoning=request.get("include_reasoning", True),
        parallel=request.get("parallel_tool_calls", True) is not False,
        cut=not stopped,
        byte=lambda t: reference.byte_of(tokenizer.convert_ids_to_tokens(t)),
    )
    meaning = understood()
    texts = [text for kind, text in meaning.seen() if kind == "content"]
    # The one that ends first in the first text that has any.
    ends_at = [(at, text.find(s) + len(s), s) for at, text in enumerate(texts) for s in stops if s in text]
    stop = min(ends_at, key=lambda found: found[:2])[2] if ends_at else None
    if stop:
        meaning = understood(stop=stop)
    engine = "stop" if stopped or stop else "length"
    return {
        "reasoning": meaning.reasoning,
        "content": meaning.content,
        "calls": meaning.calls,
        "finish_reason": meaning.finish(engine),
        "usage": None if stop else len(used),  # with a stop string, the tokens of the last step count
    }


def differences(got: dict[str, Any], want: dict[str, Any]) -> dict[str, Any]:
    try:
        got = {**got, "calls": [[name, reference.read_json(arguments)] for name, arguments in got["calls"]]}
    except ValueError as error:
        return {"arguments are no JSON": (got["calls"], str(error))}
    return {k: (got[k], v) for k, v in want.items() if got[k] != v and v is not None}


async def one(served: Server, scenario: Scenario, tokens: list[int], cut: server.Cut, stream: bool) -> dict[str, Any]:
    served.script(tokens, cut=cut)
    options = {"stream_options": {"include_usage": True}} if stream else {}
    messages = AFTER_TOOL if scenario.after_tool else USER
    (answer,) = await served.chat(messages=messages, stream=stream, **options, **scenario.request)
    return answer


def wrong(served: Server, scenario: Scenario, encode: Any, plain: Any, every: bool = True) -> dict[str, Any]:
    """Cut -> what differs from the reference."""

    tokens = scenario.tokens(encode, plain)
    scenario = scenario.cut_at(len(tokens))

    async def every_cut() -> dict[str, Any]:
        bad = {}
        for stream in (False, True):
            for name, cut in cuts(len(tokens), not stream, every):
                try:
                    got = await one(served, scenario, tokens, cut, stream)
                    want = expected(served.engine.tokenizer, scenario, tokens, served.engine.prompts[-1])
                    difference = differences(got, want)
                except AssertionError as error:
                    difference = {"error": str(error)}
                if difference:
                    bad[f"{'streamed' if stream else 'whole'}, {name}"] = difference
        return bad

    return server.run(every_cut())


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_some_cuts(both: Server, scenario: Scenario, encode: Any, plain: Any) -> None:
    assert wrong(both, scenario, encode, plain, every=False) == {}


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.name)
def test_every_cut(both: Server, scenario: Scenario, encode: Any, plain: Any) -> None:
    assert wrong(both, scenario, encode, plain) == {}


@pytest.mark.slow
def test_stock_is_wrong(overlay: None, both: Server, encode: Any, plain: Any, record_property: Any) -> None:
    """What the patch is for: without it most scenarios go wrong in some cut. Fails when it can be retired."""
    PATCHER.undo([CHAT_OUTPUT])
    try:
        bad = {s.name: wrong(both, s, encode, plain) for s in SCENARIOS}
    finally:
        PATCHER.apply([CHAT_OUTPUT])
    broken = {name for name, cuts_ in bad.items() if cuts_}
    token_by_token = {n for n, c in bad.items() if "streamed, 1" in c}
    plainly = {n for n, c in bad.items() if any(k.startswith("whole") for k in c)}
    counts = (len(SCENARIOS), len(broken), len(token_by_token), len(plainly))
    text = "{} scenarios: stock is wrong in {}, {} streamed token by token, {} not streamed".format(*counts)
    record_property("stock", text)
    print(text)
    for name in ("reasoning, then content", "a call", "calls in parallel", "reasoning, then a call"):
        assert name in broken
    assert len(broken) > len(SCENARIOS) / 2
    assert wrong(both, SCENARIOS[2], encode, plain) == {}
