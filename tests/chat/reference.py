"""What an output means, written apart from the parser: the whole sequence at once, by recursive descent.

It shares no code with the package. Text is decoded run by run with the tokenizer itself.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

CALL, END_CALL, RESPONSE, QUOTE, CHANNEL, END_CHANNEL, TURN, END_TURN, EOS = 48, 49, 50, 52, 100, 101, 105, 106, 1
BREAKS = {EOS, RESPONSE, TURN, END_TURN}  # these end whatever is open
MARK = "\ue000"  # a quote token inside a call's text
SPACE = " \t\r\n"
DEEPEST = 100  # objects and arrays in one another

Decode = Callable[[Sequence[int]], str]


@dataclass
class Meaning:
    reasoning: str = ""
    content: str = ""
    calls: list[list[Any]] = field(default_factory=list)  # [name, arguments as pairs]
    whole: bool = True  # every call was read to its end

    def finish(self, engine: str, named: bool = False) -> str:
        return "tool_calls" if self.calls and self.whole and not named else engine


class Pairs(list[Any]):
    """The members of an object, in order; unlike an array that happens to hold the same."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pairs) and list.__eq__(self, other)

    __hash__ = None  # type: ignore[assignment]


class BrokenCallError(Exception):
    """The call's text cannot go on at ``args[0]``; what is not in a value begins there."""


def understand(
    tokens: Sequence[int],
    decode: Decode,
    special: dict[int, str],
    *,
    prompt: Sequence[int] = (),
    reasoning: bool = True,
    tools: bool = True,
    shown: bool = False,
    stop: str | None = None,
    include_stop: bool = False,
    cut: bool = True,
) -> Meaning:
    """The meaning of an output.

    Args:
        tokens: the output, without an end-of-sequence token that is not to be shown.
        decode: token ids to text.
        special: texts of the special tokens.
        prompt: token ids before it.
        reasoning: a reasoning parser is on.
        tools: calls are read.
        shown: special tokens without meaning are shown (``skip_special_tokens=False``).
        stop: a stop string; the text ends at its first occurrence.
        include_stop: but with it.
        cut: the output was cut (by its length, or the stop string), not ended by a token of its own.
    """
    symbols: list[tuple[int, str]] = []  # (special token, "") or (-1, text)
    for is_special, run in itertools.groupby(tokens, lambda t: t in special):
        run = list(run)
        symbols += [(t, special[t] if shown else "") for t in run] if is_special else [(-1, decode(run))]
    if stop:
        symbols = _until(symbols, stop, include_stop)
    meaning = Meaning()
    meaningful = set()
    if reasoning or not shown:
        meaningful |= {CHANNEL, END_CHANNEL}
    if tools or not shown:
        meaningful |= {CALL, END_CALL}
    inside = _prompt_tail(prompt) if CHANNEL in meaningful else None
    if inside is not None:  # special tokens without meaning are no text, in a prompt as in an output
        inside = [t for t in inside if t not in special]
    boundaries = meaningful | BREAKS | {CALL, END_CALL}
    at = 0
    if inside is not None:
        body, at = _body(symbols, 0, boundaries, meaningful)
        broken_off = cut and len(body) == len(symbols)
        _channel(meaning, decode(inside) + _plain(body), reasoning, broken_off, len(decode(inside)))
    while at < len(symbols):
        token, text = symbols[at]
        at += 1
        if token == CHANNEL and token in meaningful:
            begin = at
            body, at = _body(symbols, begin, boundaries, meaningful)
            _channel(meaning, _plain(body), reasoning, cut and begin + len(body) == len(symbols))
        elif token == CALL and tools:
            body, at = _body(symbols, at, boundaries - {END_CHANNEL}, meaningful)
            _call(
                meaning,
                "".join(MARK if t == QUOTE else x for t, x in body if t not in {END_CHANNEL} & meaningful),
                shown,
            )
        elif token not in meaningful:
            meaning.content += text
    return meaning


def _plain(body: list[tuple[int, str]]) -> str:
    return "".join(text for _, text in body)


def _body(
    symbols: list[tuple[int, str]], at: int, boundaries: set[int], meaningful: set[int]
) -> tuple[list[tuple[int, str]], int]:
    end = next((i for i in range(at, len(symbols)) if symbols[i][0] in boundaries), len(symbols))
    # The tokens that close are used up; those that open something, or end the turn, are read again.
    used = end < len(symbols) and symbols[end][0] in {END_CHANNEL, END_CALL} & meaningful
    return symbols[at:end], end + used


def _until(symbols: list[tuple[int, str]], stop: str, include: bool) -> list[tuple[int, str]]:
    left = "".join(text for _, text in symbols).find(stop)
    if left < 0:
        return symbols
    left += len(stop) if include else 0
    out = []
    for token, text in symbols:
        if not left:
            break
        if token >= 0 and len(text) > left:
            break
        out.append((token, text[:left]))
        left -= len(text[:left])
    return out


def _prompt_tail(prompt: Sequence[int]) -> list[int] | None:
    """The tokens after the channel that the prompt leaves open, if it does."""
    marks = [i for i, t in enumerate(prompt) if t in BREAKS | {CHANNEL, END_CHANNEL, CALL, END_CALL}]
    return list(prompt[marks[-1] + 1 :]) if marks and prompt[marks[-1]] == CHANNEL else None


def _channel(meaning: Meaning, text: str, reasoning: bool, broken_off: bool, known: int = 0) -> None:
    """``known`` characters of ``text`` stand in the prompt; ``broken_off``: nothing ended the channel."""
    if text == "thought" or (broken_off and "thought\n".startswith(text)):
        return  # the label, or a part of it, is all there is
    skip = len("thought\n") if text.startswith("thought\n") else 0
    text = text[max(skip, known) :]
    if reasoning:
        meaning.reasoning += text
    else:
        meaning.content += text


def _call(meaning: Meaning, body: str, shown: bool) -> None:
    def given_back(text: str) -> str:
        return text.replace(MARK, '<|"|>' if shown else "")

    head, brace, _ = body.partition("{")
    match = re.fullmatch(r"\s*call:\s*([^\s{}]+)\s*", given_back(head))
    if not match or not brace:
        meaning.content += given_back(body)
        return
    pairs = Pairs()
    meaning.calls.append([match[1], pairs])
    try:
        end = _object(body, len(head) + 1, pairs)
    except BrokenCallError as broken:
        meaning.whole = False
        meaning.content += given_back(body[broken.args[0] :])
    else:
        meaning.content += given_back(body[end:]).lstrip(SPACE)


def _skip(body: str, at: int, more: str = "") -> int:
    while at < len(body) and body[at] in SPACE + more:
        at += 1
    return at


def _object(body: str, at: int, pairs: list[Any], depth: int = 1) -> int:
    while True:
        at = _skip(body, at, ",")
        if body[at : at + 1] == "}":
            return at + 1
        begin = at
        if body[at : at + 1] == MARK:
            end = body.find(MARK, at + 1)
            if end < 0:
                raise BrokenCallError(begin)
            key, at = body[at + 1 : end], _skip(body, end + 1)
        elif body[at : at + 1] == '"':
            end = _json_string_end(body, at + 1, key=True)
            if end < 0:
                raise BrokenCallError(begin)
            key, at = _json_key(body[at + 1 : end]), _skip(body, end + 1)
        else:
            match = re.compile(rf"[^:,{{}}\[\]{MARK}]+").match(body, at)
            if not match:
                raise BrokenCallError(begin)
            key, at = match[0].strip(SPACE), match.end()
        if body[at : at + 1] != ":":
            raise BrokenCallError(begin)
        at = _value(body, at + 1, lambda value, key=key: pairs.append((key, value)), begin, "}", depth)
        at = _skip(body, at)
        if body[at : at + 1] not in (",", "}"):
            raise BrokenCallError(at)


def _array(body: str, at: int, items: list[Any], depth: int) -> int:
    while True:
        at = _skip(body, at, ",")
        if body[at : at + 1] == "]":
            return at + 1
        at = _skip(body, _value(body, at, items.append, at, "]", depth))
        if body[at : at + 1] not in (",", "]"):
            raise BrokenCallError(at)


def _value(body: str, at: int, keep: Callable[[Any], None], begin: int, closer: str, depth: int) -> int:
    at = _skip(body, at)
    first = body[at : at + 1]
    if first == MARK:
        end = body.find(MARK, at + 1)
        keep(body[at + 1 :] if end < 0 else body[at + 1 : end])
        if end < 0:
            raise BrokenCallError(len(body))
        return end + 1
    if first == '"':
        end = _json_string_end(body, at + 1)
        mark = body.find(MARK, at + 1)
        stop = min(i for i in (end, mark, len(body)) if i >= 0)
        keep(_json_value(body[at + 1 : stop]))
        if stop != end:
            raise BrokenCallError(stop)
        return end + 1
    if first and first in "{[" and depth == DEEPEST:
        raise BrokenCallError(begin)
    if first == "{":
        pairs = Pairs()
        keep(pairs)
        return _object(body, at + 1, pairs, depth + 1)
    if first == "[":
        items: list[Any] = []
        keep(items)
        return _array(body, at + 1, items, depth + 1)
    match = re.compile(rf"[^,{{}}\[\]{MARK}]*").match(body, at)
    assert match
    if body[match.end() : match.end() + 1] not in (",", closer) or match.end() == len(body):
        raise BrokenCallError(begin)
    keep(scalar(match[0].strip(SPACE)))
    return match.end()


def _json_string_end(body: str, at: int, key: bool = False) -> int:
    # In a key, a backslash always takes the next character with it.
    # An escape is read once, left to right: a backslash before a quote never ends the string by itself.
    inside = (
        r"(?:\\.|[^\"\\])*"
        if key
        else r'(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})|\\(?!["\\/bfnrt]|u[0-9a-fA-F]{4})|[^"\\])*'
    )
    match = re.compile(inside + '"', re.DOTALL).match(body, at)
    return match.end() - 1 if match else -1


def _json_value(raw: str) -> str:
    repaired = re.sub(r'(\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))|\\', lambda m: m[1] or "\\\\", raw)
    return json.loads(f'"{repaired}"', strict=False)


def _json_key(raw: str) -> str:
    try:
        return json.loads(f'"{raw}"', strict=False)
    except ValueError:
        return raw


def _fraction(text: str) -> Any:
    try:
        return Decimal(text)
    except InvalidOperation:  # an exponent that not even Decimal has
        return ("number", text)


def scalar(text: str) -> Any:
    """A value without quotes."""
    if text.lower() in ("none", "nil", "null"):
        return None
    if text in ("true", "false"):
        return text == "true"
    try:
        value = json.loads(text, parse_float=_fraction, parse_constant=str)
    except ValueError:
        return text
    return value if isinstance(value, (int, Decimal, tuple)) else text


def read_json(text: str) -> Any:
    """JSON in the same form: objects as lists of pairs, fractions as Decimal."""
    return json.loads(text, object_pairs_hook=Pairs, parse_float=_fraction)
