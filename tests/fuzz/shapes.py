"""Long outputs of every shape that a parser could take quadratic time over."""

from __future__ import annotations

from collections.abc import Callable

from tests.chat.reference import CALL, CHANNEL, END_CALL, END_CHANNEL, QUOTE, TURN
from tests.fuzz.chat import Words, output, read
from vllm_gemma4_spec.chat.machine import Options, Tools

Shape = tuple[Options, list[int]]
STOP = ("never in it", "</s>" * 50)


def shapes(w: Words) -> dict[str, Callable[[int], Shape]]:
    """Name -> options and tokens for a length; every token is one character of what it repeats."""

    def call(begin: str, repeated: str, quoted: bool = False) -> Callable[[int], Shape]:
        head, body = [CALL, *w.encode(begin)], w.encode(repeated)
        return lambda n: (Options(), head + ([QUOTE] if quoted else []) + (body * n)[:n])

    def forced(tools: Tools, begin: str, repeated: str) -> Callable[[int], Shape]:
        return lambda n: (Options(tools=tools, tool_name="g"), w.encode(begin) + (w.encode(repeated) * n)[:n])

    def plain(*repeated: int, **options: object) -> Callable[[int], Shape]:
        return lambda n: (Options(**options), (list(repeated) * n)[:n])  # type: ignore[arg-type]

    a = w.encode("a")
    whole = [CALL, *w.encode("call:f{a:1}"), END_CALL]
    return {
        "content": plain(*a),
        "content, stop strings": plain(*a, stop=STOP),
        "content that looks like a stop string": plain(*w.encode("</s>"), stop=STOP),
        "reasoning": lambda n: (Options(), [CHANNEL, *a * n]),
        "channels": plain(CHANNEL, *a, END_CHANNEL),
        "open channels": plain(CHANNEL),
        "calls": plain(*whole),
        "calls without an end": plain(CALL),
        "bytes that are no text": plain(w.first_byte + 0xFF),
        "beginnings of characters": plain(w.first_byte + 0xF0),
        "string": call("call:f{a:", "ab ", quoted=True),
        "string in quotes": call('call:f{a:"', "ab "),
        "escapes": call('call:f{a:"', "\\u00e9"),
        "backslashes": call('call:f{a:"', "\\"),
        "bare value": call("call:f{a:", "1"),
        "key": call("call:f{", "a"),
        "key of quotes": call('call:f{"', '\\"'),
        "key of backslashes": call('call:f{"', "\\"),
        "key in quote tokens": call("call:f{", "a", quoted=True),
        "objects": call("call:f{", "a:{"),
        "arrays": call("call:f{a:", "["),
        "members": call("call:f{", "a:1,"),
        "commas": call("call:f{", ","),
        "spaces": call("call:f{a:", " "),
        "spaces before a call": call("", " "),
        "spaces before a name": call("call:", " "),
        "name": call("call:", "a"),
        "quoted value": call('call:f{a:"', "ab ,}"),
        "quotes in a bare value": call("call:f{a:", ' "a" '),
        "calls in one pair of marks": call("", "call:f{a:1}"),
        "braces after a call": call("call:f{}", "}"),
        "half surrogates": forced(Tools.NAMED, '{"a": "', "\\ud83d"),
        "turns": plain(TURN),
        "turns with a header": plain(TURN, *w.encode("model\n")),
        "turns with half a header": plain(TURN, *w.encode("mode")),
        "kinds in turn, stop strings": plain(CHANNEL, *a, END_CHANNEL, *a, stop=STOP),
        "text after a call": call("call:f{}", "a "),
        "quotes after a call": lambda n: (Options(), [CALL, *w.encode("call:f{}"), *[QUOTE] * n]),
        "required: spaces": forced(Tools.REQUIRED, "", " "),
        "required: name": forced(Tools.REQUIRED, '[{"name": "', "a"),
        "required: escapes in a name": forced(Tools.REQUIRED, '[{"name": "', '\\"'),
        "required: calls": forced(Tools.REQUIRED, "[", '{"name": "f", "parameters": {"a": 1}}, '),
        "required: string": forced(Tools.REQUIRED, '[{"name": "f", "parameters": {"a": "', "ab "),
        "required: objects": forced(Tools.REQUIRED, '[{"name": "f", "parameters": ', '{"a":'),
        "named: spaces": forced(Tools.NAMED, "", " "),
        "named: string": forced(Tools.NAMED, '{"a": "', "ab "),
    }


def parse(shape: Shape, size: int) -> None:
    """The tokens in deltas of ``size``, as a stream has them."""
    options, tokens = shape
    deltas = [output(tokens[at : at + size]) for at in range(0, len(tokens), size)]
    deltas[-1].finish_reason = "length"
    read(options, (), deltas)
