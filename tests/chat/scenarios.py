"""Outputs that a model gives, or may give. Each is run in every cut, streamed and not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
ALL = -1  # max_tokens: as many as there are
RESPONSE = "<|tool_response>"


@dataclass(frozen=True)
class Scenario:
    """``parts``: text whose control tokens are real, ``("plain", text)`` of ordinary tokens only, and ``("bytes", text,
    character, count)``: the text and the first bytes of the character."""

    name: str
    parts: tuple[Any, ...]
    request: dict[str, Any] = field(default_factory=dict)
    after_tool: bool = False  # the prompt ends after a tool's response

    def tokens(self, encode: Callable[[str], list[int]], plain: Callable[[str], list[int]]) -> list[int]:
        out: list[int] = []
        for part in self.parts:
            out += encode(part) if isinstance(part, str) else plain(*part[1:])
        return out

    def cut_at(self, length: int) -> Scenario:
        """With its tokens counted."""
        cut = {"max_tokens": length} if self.request.get("max_tokens") == ALL else {}
        return replace(self, request={**self.request, **cut})

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
    _(
        "a stop string in reasoning does not stop",
        T + "One, two, three." + E + "A" + TURN,
        stop=["two", "zzz"],
        **THINK,
    ),
    _(
        "stop strings that never match",
        T + "Think it over." + E + "The answer." + TURN,
        stop=["zzzzzzzzzzzzzzzz"],
        **THINK,
    ),
    _("stop strings and a call", T + "Hm." + E + C + "get{n:1}" + Z + RESPONSE, stop=["zzzzzzzzzzzz"], **WITH, **THINK),
    _("without reasoning", T + "Think." + E + "Answer." + TURN, include_reasoning=False, **THINK),
    _("an end of sequence that is shown", "A" + TURN, include_stop_str_in_output=True, skip_special_tokens=False),
    # A call that is cut leaves nothing of its syntax.
    _("cut in the word call", "Ok. <|tool_call>cal", max_tokens=ALL, **WITH),
    _("cut after call:", "Ok. " + C, max_tokens=ALL, **WITH),
    _("cut in the name", "Ok. " + C + "get", max_tokens=ALL, **WITH),
    _("cut behind the name", "Ok. " + C + "get ", max_tokens=ALL, **WITH),
    _("cut at the brace", "Ok. " + C + "get{", max_tokens=ALL, **WITH),
    _("cut in a key", "Ok. " + C + "get{location", max_tokens=ALL, **WITH),
    _("cut behind a key", "Ok. " + C + "get{location:", max_tokens=ALL, **WITH),
    _("cut in a word", "Ok. " + C + "get{a:true", max_tokens=ALL, **WITH),
    _("cut in a quoted key", "Ok. " + C + "get{" + Q + "city", max_tokens=ALL, **WITH),
    _("cut in an array", "Ok. " + C + "get{l:[1,2", max_tokens=ALL, **WITH),
    _("cut in an object", "Ok. " + C + "get{o:{a:1,b", max_tokens=ALL, **WITH),
    _("cut behind a comma", "Ok. " + C + "get{n:1,", max_tokens=ALL, **WITH),
    _("cut behind the last brace", "Ok. " + C + "get{n:1}", max_tokens=ALL, **WITH),
    _("cut in ordinary quotes", "Ok. " + C + 'get{city:"Par', max_tokens=ALL, **WITH),
    _("cut in the second call's name", C + "get{n:1}" + Z + C + "se", max_tokens=ALL, **WITH),
    _("cut at the second call's mark", C + "get{n:1}" + Z + "<|tool_call>", max_tokens=ALL, **WITH),
    _("a name and no arguments", "Ok. " + C + "get" + Z + TURN, **WITH),
    _("a name, ended by the turn", "Ok. " + C + "get" + TURN, **WITH),
    _("a key, ended by the turn", "Ok. " + C + "get{location" + TURN, **WITH),
    _("nothing between the marks", "Ok. <|tool_call>" + Z + TURN, **WITH),
    # Half a character is none.
    _("content cut inside a character", ("bytes", "Hi ", "🫠", 2), max_tokens=ALL),
    _("reasoning cut inside a character", T, ("bytes", "Hi ", "🫠", 3), max_tokens=ALL, **THINK),
    _("an argument cut inside a character", C + "get{city:" + Q, ("bytes", "Hi ", "🫠", 1), max_tokens=ALL, **WITH),
    _("half a character, then the turn's end", ("bytes", "Hi ", "🫠", 1), TURN),
    _("half a character inside", ("bytes", "Hi ", "🫠", 1), " there" + TURN),
    # One call only: whatever comes behind it.
    _("one call only, of two", C + "get{n:1}" + Z + C + "get{n:2}" + Z + RESPONSE, parallel_tool_calls=False, **WITH),
    _(
        "one call only, then a broken one",
        C + "get{n:1}" + Z + C + "get{n}" + Z + TURN,
        parallel_tool_calls=False,
        **WITH,
    ),
    _(
        "one call only, then a cut one",
        C + "get{n:1}" + Z + C + "get{n:2,city",
        parallel_tool_calls=False,
        max_tokens=ALL,
        **WITH,
    ),
    _(
        "one call only, then half a name",
        C + "get{n:1}" + Z + C + "ge",
        parallel_tool_calls=False,
        max_tokens=ALL,
        **WITH,
    ),
    _(
        "one call only, the first is broken",
        C + "get{n}" + Z + C + "get{n:2}" + Z + TURN,
        parallel_tool_calls=False,
        **WITH,
    ),
    _(
        "one call only, then an answer",
        C + "get{n:1}" + Z + C + "get{n:2}" + Z + "Done." + TURN,
        parallel_tool_calls=False,
        **WITH,
    ),
    # Values that JSON cannot hold, or that look like something else.
    _("a number beyond every float", C + "get{n:1e400,m:-2.5E+999}" + Z + RESPONSE, **WITH),
    _("a number below every float", C + "get{n:1e-400,m:0.0}" + Z + RESPONSE, **WITH),
    _("an integer of many digits", C + "get{n:" + "1234567890" * 500 + "}" + Z + RESPONSE, **WITH),
    _("quotes in a bare value", C + 'get{q:"a" or "b",n:1}' + Z + RESPONSE, **WITH),
    _("commas in quotes in a bare value", C + 'get{q:"a, b" or "c}",n:1}' + Z + RESPONSE, **WITH),
    _("a quoted word in a bare value", C + 'get{q:say "x, y" twice,n:1}' + Z + RESPONSE, **WITH),
    _("inches", C + 'get{d:5" pipe,n:1}' + Z + RESPONSE, **WITH),
    _("quotes in a bare value of an array", C + 'get{q:["a" or "b","c"]}' + Z + RESPONSE, **WITH),
    _("an ordinary quote and space", C + 'get{city:"Paris" , n:1 }' + Z + RESPONSE, **WITH),
    _("half a surrogate", C + 'get{city:"a\\ud83d b",n:"\\ud83d\\ude00"}' + Z + RESPONSE, **WITH),
    _("an empty key", C + "get{:1}" + Z + RESPONSE, **WITH),
    _("empty keys inside", C + "get{a:{:1,b:2},:3}" + Z + RESPONSE, **WITH),
    # A turn's header that the model writes itself.
    _("a header before the answer", "<|turn>model\nThe answer." + TURN),
    _("a header before reasoning", "<|turn>model\n" + T + "Hm." + E + "The answer." + TURN, **THINK),
    _("a header before a call", "<|turn>model\n" + C + "get{n:1}" + Z + RESPONSE, **WITH),
    _("a header in the middle", "First." + "<|turn>model\n" + "Second." + TURN),
    _("a header cut inside", "<|turn>mo", max_tokens=ALL),
    _("a header without its line end", "<|turn>model" + C + "get{n:1}" + Z + RESPONSE, **WITH),
    _("another header", "<|turn>user\nWhat?" + TURN),
    _("no header", "<|turn>modelling\nWhat?" + TURN),
    _("a header that is asked for", "<|turn>model\nThe answer." + TURN, skip_special_tokens=False),
    # What stands between the marks beside a call.
    _("two calls in one pair of marks", C + "get{n:1}call:set-it{n:2}" + Z + RESPONSE, **WITH),
    _("three calls in one pair of marks", C + "get{n:1}, call:set-it{}\n:get{n:3}" + Z + RESPONSE, **WITH),
    _("two calls in one pair of marks, cut", C + "get{n:1}call:se", max_tokens=ALL, **WITH),
    _("a brace too many", C + "get{n:1}}" + Z + RESPONSE, **WITH),
    _("junk behind a call", C + "get{n:1})]; I called it" + Z + RESPONSE, **WITH),
    _("a brace too many, no close", C + "get{n:1}}" + TURN, **WITH),
    _("no call behind a call without its close", C + "get{n:1}call:{}x" + C + "get{n:2}" + Z + RESPONSE, **WITH),
    _("text behind a call without its close", C + "get{n:1} Called it." + TURN, **WITH),
    _("a string behind its quotes", C + "get{city:" + Q + "a" + Q + "b" + Q + "c" + Q + ",n:1}" + Z + TURN, **WITH),
    _("a quote where none can stand", C + "get{n:1" + Q + "2" + Q + "}" + Z + TURN, **WITH),
    _("no word call", "<|tool_call>:get{n:1}" + Z + RESPONSE, **WITH),
    _("as Python calls", C + "get({n:1})" + Z + RESPONSE, **WITH),
    _("as Python calls, cut", "Ok. " + C + "get(", max_tokens=ALL, **WITH),
    _("as Python calls, without arguments", C + "get()" + Z + TURN, **WITH),
    _("parentheses in a name", C + "get(a){n:1}" + Z + TURN, **WITH),
    _("no word call, cut", "Ok. <|tool_call>:ge", max_tokens=ALL, **WITH),
    # Stop strings: what a user sees.
    _("a line end stops, after thinking", T + "Think it over." + E + "One.\nTwo." + TURN, stop=["\n"], **THINK),
    _("a line end in reasoning does not stop", T + "One.\nTwo." + E + "A" + TURN, stop=["\n"], **THINK),
    _(
        "unseen reasoning does not stop",
        T + "One.\nTwo." + E + "A\nB" + TURN,
        stop=["\n"],
        include_reasoning=False,
        **THINK,
    ),
    _("the label does not stop", T + "Hm." + E + "A thought." + TURN, stop=["thought"], **THINK),
    _("the label and a line end", T + "Hm." + E + "A." + TURN, stop=["thought\n", "ght\n"], **THINK),
    _(
        "a call does not stop",
        "So. " + C + "get{city:" + Q + "a\nb" + Q + "}" + Z + RESPONSE,
        stop=["\n", "call", "{"],
        **WITH,
    ),
    _("content behind a call stops", "A" + C + "get{n:1}" + Z + "B\nC" + TURN, stop=["\n"], **WITH),
    _("no stop string across kinds", T + "ab" + E + "cd ef" + TURN, stop=["bc", "d e"], **THINK),
    _("a header does not stop", "<|turn>model\nOne\nTwo" + TURN, stop=["\n"]),
]

# One or two of every kind, for tests that cost much a scenario; the others are slow there.
FEW = {
    "reasoning, content, a call",
    "every kind of argument",
    "other special tokens in content",
    "cut in the name",
    "cut in a word",
    "content cut inside a character",
    "one call only, then a cut one",
    "a number beyond every float",
    "quotes in a bare value",
    "an empty key",
    "a header before a call",
    "a header cut inside",
    "two calls in one pair of marks",
    "junk behind a call",
    "no word call",
    "a string behind its quotes",
    "a line end stops, after thinking",
    "a call does not stop",
}
