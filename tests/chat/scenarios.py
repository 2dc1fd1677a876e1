"""Outputs that a model gives, or may give. Each is run in every cut, streamed and not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": name,
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "n": {"type": "integer"}}},
        },
    }
    for name in ("get", "set-it")
]
T = "<|channel>thought\n"
E = "<channel|>"
C = "<|tool_call>call:"
Z = "<tool_call|>"
Q = '<|"|>'
TURN = "<turn|>"
RESPONSE = "<|tool_response>"


@dataclass(frozen=True)
class Scenario:
    """``parts``: text whose control tokens are real, and ``("plain", text)`` of ordinary tokens only."""

    name: str
    parts: tuple[Any, ...]
    request: dict[str, Any] = field(default_factory=dict)
    after_tool: bool = False  # the prompt ends after a tool's response

    def tokens(self, encode: Callable[[str], list[int]], plain: Callable[[str], list[int]]) -> list[int]:
        return [t for part in self.parts for t in (plain(part[1]) if isinstance(part, tuple) else encode(part))]

    @property
    def tools(self) -> bool:
        return bool(self.request.get("tools")) and self.request.get("tool_choice", "auto") == "auto"


def _(name: str, *parts: Any, after_tool: bool = False, **request: Any) -> Scenario:
    return Scenario(name, parts, request, after_tool)


THINK = {"chat_template_kwargs": {"enable_thinking": True}}
WITH = {"tools": TOOLS}

SCENARIOS = [
    _("content", "Hello, wörld 😀!" + TURN),
    _("nothing at all", TURN),
    _("reasoning, then content", T + "Let me think.\nWell…" + E + "The answer is 4." + TURN, **THINK),
    _("reasoning only", T + "Let me think." + E + TURN, **THINK),
    _("empty reasoning", T + E + "Answer." + TURN, **THINK),
    _("empty channel without a label", "<|channel>" + E + "Answer." + TURN, **THINK),
    _("a channel without a label", "<|channel>Just so" + E + "Answer." + TURN, **THINK),
    _("a channel with another label", "<|channel>thoughts\nJust so" + E + "Answer." + TURN, **THINK),
    _("only the label", "<|channel>thought" + E + "Answer." + TURN, **THINK),
    _("content before a channel", "First. " + T + "Hm." + E + "Second." + TURN, **THINK),
    _("several channels", T + "One." + E + "A. " + T + "Two." + E + "B." + TURN, **THINK),
    _("a channel opened again", T + "One." + T + "Two." + E + "A." + TURN, **THINK),
    _("a stray close", "A" + E + "B" + TURN, **THINK),
    _("two closes", T + "A" + E + E + "B" + TURN, **THINK),
    _("reasoning cut by max_tokens", T + "Let me think about it for long", max_tokens=8, **THINK),
    _("reasoning cut inside the label", "<|channel>thought\n", max_tokens=2, **THINK),
    _("content cut by max_tokens", T + "Hm." + E + "The answer is surely", max_tokens=9, **THINK),
    _("reasoning ended by the turn", T + "Let me think." + TURN, **THINK),
    _("inside a channel from the prompt", "More thoughts." + E + "Answer." + TURN, after_tool=True, **WITH, **THINK),
    _("inside a channel, then a call", "More." + E + C + "get{n:1}" + Z + RESPONSE, after_tool=True, **WITH, **THINK),
    _("inside a channel, cut", "More thoughts and", after_tool=True, max_tokens=3, **WITH, **THINK),
    _("inside a channel, opened again", T + "More." + E + "Answer." + TURN, after_tool=True, **WITH, **THINK),
    _("a call", C + "get{city:" + Q + "Paris" + Q + "}" + Z + RESPONSE, **WITH),
    _("a call without arguments", C + "get{}" + Z + RESPONSE, **WITH),
    _("a call, ended by the turn", C + "set-it{n:42}" + Z + TURN, **WITH),
    _("a call without its close", C + "get{n:42}" + TURN, **WITH),
    _("calls in parallel", (C + "get{n:1}" + Z) * 2 + C + "set-it{}" + Z + RESPONSE, **WITH),
    _("reasoning, then a call", T + "I need it." + E + C + "get{n:1}" + Z + RESPONSE, **WITH, **THINK),
    _("reasoning, content, a call", T + "Hm." + E + "Wait. " + C + "get{n:1}" + Z + RESPONSE, **WITH, **THINK),
    _("a call from inside reasoning", T + "Hm." + C + "get{n:1}" + Z + "Done." + TURN, **WITH, **THINK),
    _("content after a call", C + "get{n:1}" + Z + "Called it." + TURN, **WITH),
    _("content between calls", C + "get{}" + Z + " and " + C + "get{}" + Z + RESPONSE, **WITH),
    _("reasoning between calls", C + "get{}" + Z + T + "Hm." + E + C + "get{}" + Z + RESPONSE, **WITH, **THINK),
    _("a call cut in its name", C + "get", max_tokens=4, **WITH),
    _("a call cut in a string", C + "get{n:1,city:" + Q + "Paris, the city", max_tokens=12, **WITH),
    _("a call cut in a number", C + "get{n:12345", max_tokens=8, **WITH),
    _("a call cut after another", C + "get{n:1}" + Z + C + "get{city:" + Q + "Pa", max_tokens=18, **WITH),
    _("a call cut by a channel", C + "get{city:" + Q + "Paris" + T + "Hm." + E + "So." + TURN, **WITH, **THINK),
    _("no call between the marks", "<|tool_call>what is this" + Z + "Well." + TURN, **WITH),
    _("a broken call", C + "get{city " + Q + "x" + Q + "}" + Z + "Well." + TURN, **WITH),
    _(
        "every kind of argument",
        C + "get{s:" + Q + "x" + Q + ",i:-3,f:2.50,big:123456789012345678901234567890,e:1e+16,t:true,b:false,z:null,",
        "o:{a:{},b:[[],[1,{c:" + Q + Q + "}]]},l:[" + Q + "a" + Q + ",null,true,1.0]}" + Z + RESPONSE,
        **WITH,
    ),
    _(
        "braces and quotes in a string",
        C + "get{city:" + Q + 'a "b" {c: [d]}, \\n \\ \n\t e' + Q + "}" + Z + RESPONSE,
        **WITH,
    ),
    _(
        "look-alikes in a string",
        C + "get{city:" + Q,
        ("plain", '<|"|>,n:1}<tool_call|><|channel>'),
        Q + "}" + Z + RESPONSE,
        **WITH,
    ),
    _(
        "look-alikes in content",
        ("plain", "Write <|tool_call>call:get{}<tool_call|> or <|channel>thought\n"),
        TURN,
        **WITH,
    ),
    _("look-alikes in reasoning", T, ("plain", "End it with <channel|> now"), E + "Answer." + TURN, **THINK),
    _("an ordinary quote in arguments", C + 'get{"city": "a \\"b\\" \\u00e9", "n": 1}' + Z + RESPONSE, **WITH),
    _("quoted keys", C + "get{" + Q + "city" + Q + ":{" + Q + "x y" + Q + ":1}}" + Z + RESPONSE, **WITH),
    _("unicode in arguments", C + "get{city:" + Q + "Zürich 日本 😀" + Q + "}" + Z + RESPONSE, **WITH),
    _("tool markers with tool_choice none", C + "get{city:" + Q + "x" + Q + "}" + Z + TURN, tool_choice="none", **WITH),
    _("tool markers without tools", "A" + C + "get{}" + Z + "B" + TURN),
    _("other special tokens in content", "A<pad>B<|think|>C" + Q + "D<tool_response|>E" + TURN),
    _("other special tokens in reasoning", T + "A<pad>B<tool_response|>C" + E + "D" + TURN, **THINK),
    _("special tokens on request", "A<pad>B" + Q + "C" + TURN, skip_special_tokens=False),
    _("past the end of a turn", T + "A" + TURN + "B<eos>CC DD", ignore_eos=True, max_tokens=8, **THINK),
    _("a stop string", T + "Think." + E + "One, two, three." + TURN, stop=["two"], **THINK),
    _("a stop string that is shown", "One, two, three." + TURN, stop=["two"], include_stop_str_in_output=True),
    _("a stop string in reasoning", T + "One, two, three." + E + "A" + TURN, stop=["two", "zzz"], **THINK),
    _(
        "stop strings that never match",
        T + "Think it over." + E + "The answer." + TURN,
        stop=["zzzzzzzzzzzzzzzz"],
        **THINK,
    ),
    _("stop strings and a call", T + "Hm." + E + C + "get{n:1}" + Z + RESPONSE, stop=["zzzzzzzzzzzz"], **WITH, **THINK),
    _("without reasoning", T + "Think." + E + "Answer." + TURN, include_reasoning=False, **THINK),
    _("an end of sequence that is shown", "A" + TURN, include_stop_str_in_output=True, skip_special_tokens=False),
]
