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
ROLES = ("model", "user", "system", "developer")
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
    lost: bool = False  # a call was cut before its arguments
    parts: list[tuple[str, Any]] = field(default_factory=list)  # ("reasoning" | "content", text) or ("call", call)

    def finish(self, engine: str, named: bool = False) -> str:
        return "tool_calls" if self.calls and self.whole and not self.lost and not named else engine

    def say(self, kind: str, text: str) -> None:
        if text:
            self.parts.append((kind, text))

    def seen(self) -> list[tuple[str, str]]:
        """Texts that a user sees, one after the other: neighbours of one kind are one text."""
        out = []
        for kind, run in itertools.groupby(self.parts, lambda part: part[0]):
            out.append((kind, "" if kind == "call" else "".join(text for _, text in run)))
        return out

    def parts_of(self, kind: str) -> list[Any]:
        return [part for k, part in self.parts if k == kind]

    def sum_up(self) -> Meaning:
        self.reasoning = "".join(t for kind, t in self.parts if kind == "reasoning")
        self.content = "".join(t for kind, t in self.parts if kind == "content")
        calls = [call for kind, call in self.parts if kind == "call"]
        self.calls = [call[:2] for call in calls]
        self.whole = all(call[2] for call in calls)
        return self

    def until(self, stop: str, include: bool) -> Meaning:
        """What comes before the first occurrence of ``stop`` in content; reasoning and calls are not searched."""
        out = Meaning()
        parts = list(self.parts)
        for kind, text in self.seen():
            at = text.find(stop) if kind == "content" else -1
            left = len(text) if at < 0 else at + (len(stop) if include else 0)
            while parts and parts[0][0] == kind:
                part = parts.pop(0)
                if kind == "call":
                    out.parts.append(part)
                    continue
                out.say(kind, part[1][:left])
                left -= len(part[1][:left])
            if at >= 0:
                return out
        return self


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
    include_reasoning: bool = True,
    parallel: bool = True,
    cut: bool = True,
    byte: Callable[[int], int | None] | None = None,
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
        stop: a stop string; the answer ends at its first occurrence in a text that a user sees.
        include_stop: but with it.
        include_reasoning: reasoning is seen.
        parallel: otherwise there is one call at most.
        cut: the output was cut (by its length, or the stop string), not ended by a token of its own.
        byte: what a token stands for that is one byte of a character; with it, half a character at a cut is no text.
    """
    if cut and not stop and byte:
        tokens = _whole_characters(list(tokens), byte)
    symbols: list[tuple[int, str]] = []  # (special token, "") or (-1, text)
    for is_special, group in itertools.groupby(tokens, lambda t: t in special):
        run = list(group)
        symbols += [(t, special[t] if shown else "") for t in run] if is_special else [(-1, decode(run))]
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
            begin = at
            body, at = _body(symbols, at, boundaries - {END_CHANNEL}, meaningful)
            closed = at > begin + len(body) and symbols[at - 1][0] == END_CALL
            _call(
                meaning,
                "".join(MARK if t == QUOTE else x for t, x in body if t not in {END_CHANNEL} & meaningful),
                shown,
                closed,
                parallel,
            )
        elif token == TURN and not shown:
            # The header runs to the next token that opens, closes or ends something; marks without meaning are none.
            end = next((i for i in range(at, len(symbols)) if symbols[i][0] in boundaries), len(symbols))
            written = _plain(symbols[at:end])
            role, newline, rest = written.partition("\n")
            if role in ROLES and newline:
                meaning.say("content", rest)
            elif newline or not any(known.startswith(role) for known in ROLES):
                meaning.say("content", written)
            at = end
        elif token not in meaningful:
            meaning.say("content", text)
    if not include_reasoning:
        meaning.parts = [part for part in meaning.parts if part[0] != "reasoning"]
    return (meaning.until(stop, include_stop) if stop else meaning).sum_up()


def _whole_characters(run: list[int], byte: Callable[[int], int | None]) -> list[int]:
    """``run`` without its last tokens if they are the beginning of a character."""
    for count in (3, 2, 1):
        codes = [byte(t) for t in run[-count:]]
        if len(codes) < count or None in codes:
            continue
        try:
            bytes(code for code in codes if code is not None).decode()
        except UnicodeDecodeError as error:
            if error.start == 0 and error.reason == "unexpected end of data":
                return run[:-count]
    return run


def byte_of(piece: str | None) -> int | None:
    """The byte that a token of a byte-fallback vocabulary stands for."""
    match = re.fullmatch(r"<0x([0-9A-F]{2})>", piece or "")
    return int(match[1], 16) if match else None


def _plain(body: list[tuple[int, str]]) -> str:
    return "".join(text for _, text in body)


def _body(
    symbols: list[tuple[int, str]], at: int, boundaries: set[int], meaningful: set[int]
) -> tuple[list[tuple[int, str]], int]:
    end = next((i for i in range(at, len(symbols)) if symbols[i][0] in boundaries), len(symbols))
    # The tokens that close are used up; those that open something, or end the turn, are read again.
    used = end < len(symbols) and symbols[end][0] in {END_CHANNEL, END_CALL} & meaningful
    return symbols[at:end], end + used


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
    meaning.say("reasoning" if reasoning else "content", text)


HEAD = re.compile(r"(?:call)?:\s*([^\s{}()]+)\s*\(?\s*")
HEAD_BEGUN = re.compile(r"c|ca|cal|call|(?:call)?:\s*[^\s{}]*\s*\(?\s*")
BETWEEN = SPACE + "}]),;"


def _call(meaning: Meaning, body: str, shown: bool, closed: bool, parallel: bool) -> None:
    """One pair of marks, with any number of calls in it.

    Args:
        closed: by its own mark; otherwise something else ended it.
    """

    def given_back(text: str) -> str:
        return text.replace(MARK, '<|"|>' if shown else "")

    silent = False

    def say(text: str) -> None:
        if not silent:
            meaning.say("content", text)

    count = 0
    while True:
        if count:
            body = _lstrip(body, BETWEEN, shown)
        # Of quote tokens, only those in arguments are more than their text.
        head, brace, _ = body.partition("{")
        head_text = given_back(head)
        match = HEAD.fullmatch(head_text if count else head_text.lstrip())
        if not match or not brace:
            break
        begun = sum(kind == "call" for kind, _ in meaning.parts)
        silent = begun > 0 and not parallel
        pairs = Pairs()
        call = [match[1], pairs, True]
        if not silent:
            meaning.parts.append(("call", call))
        try:
            end = _object(body, len(head) + 1, pairs)
        except CutCallError:
            call[2] = False
            return
        except BrokenCallError as broken:
            call[2] = False
            say(given_back(body[broken.args[0] :]))
            return
        body, count = body[end:], count + 1
    rest = given_back(body)
    begun = HEAD_BEGUN.fullmatch(rest if count else rest.lstrip())
    if begun or not (count or closed or rest.strip()):
        meaning.lost |= parallel or not meaning.parts_of("call")  # the beginning of a call
    elif (not closed) if count else rest.strip():
        say(rest)


def _lstrip(body: str, characters: str, shown: bool) -> str:
    """Without ``characters`` in front, and without quote tokens that are not shown."""
    return body.lstrip(characters + ("" if shown else MARK))


class CutCallError(Exception):
    """The text ended inside a call; what had begun and is in no value is no text either."""


def _skip(body: str, at: int, more: str = "") -> int:
    while at < len(body) and body[at] in SPACE + more:
        at += 1
    return at


def _object(body: str, at: int, pairs: list[Any], depth: int = 1, native: bool = True) -> int:
    while True:
        at = _there(body, _skip(body, at, ","))
        if body[at] == "}":
            return at + 1
        begin = at
        if body[at] == MARK:
            end = _there(body, body.find(MARK, at + 1))
            key, at = body[at + 1 : end], _skip(body, end + 1)
        elif body[at] == '"':
            end = _quoted_end(body, at + 1, begin)
            _there(body, end)
            key, at = _unescaped(body[at + 1 : end]), _skip(body, end + 1)
        else:
            match = re.compile(rf"[^:,{{}}\[\]{MARK}]*").match(body, at)
            assert match
            key, at = match[0].strip(SPACE), match.end()
        if body[_there(body, at)] != ":":
            raise BrokenCallError(begin)
        at = _value(body, at + 1, lambda value, key=key: pairs.append((key, value)), begin, "}", depth, native)
        at = _there(body, _skip(body, at))
        if body[at] not in (",", "}"):
            raise BrokenCallError(at)


def _there(body: str, at: int) -> int:
    if not 0 <= at < len(body):
        raise CutCallError
    return at


def _array(body: str, at: int, items: list[Any], depth: int, native: bool) -> int:
    while True:
        at = _there(body, _skip(body, at, ","))
        if body[at] == "]":
            return at + 1
        at = _there(body, _skip(body, _value(body, at, items.append, at, "]", depth, native)))
        if body[at] not in (",", "]"):
            raise BrokenCallError(at)


def _value(body: str, at: int, keep: Callable[[Any], None], begin: int, closer: str, depth: int, native: bool) -> int:
    at = _there(body, _skip(body, at))
    first = body[at]
    if first == MARK:
        end = body.find(MARK, at + 1)
        keep(body[at + 1 :] if end < 0 else body[at + 1 : end])
        return _there(body, end) + 1
    if first == '"':
        end = _quoted_end(body, at + 1, begin)
        if end < 0:
            keep(_unescaped(body[at + 1 :], cut=True))
            raise CutCallError
        if not native:
            keep(_unescaped(body[at + 1 : end]))
            return end + 1
        after = _skip(body, end + 1)
        if after == len(body) or body[after] in (",", closer):
            keep(_unescaped(body[at + 1 : end]))
            return _there(body, after)
    if first in "{[" and depth == DEEPEST:
        raise BrokenCallError(begin)
    if first == "{":
        pairs = Pairs()
        keep(pairs)
        return _object(body, at + 1, pairs, depth + 1, native)
    if first == "[":
        items: list[Any] = []
        keep(items)
        return _array(body, at + 1, items, depth + 1, native)
    end = at
    while body[_there(body, end)] not in (",", closer):
        if body[end] in "{}[]" + MARK:
            raise BrokenCallError(begin)
        if body[end] == '"' and native and not (end > at and body[end - 1].isalnum()):
            end = _there(body, _quoted_end(body, end + 1, begin))
        end += 1
    keep(scalar(body[at:end].strip(SPACE)))
    return end


def _quoted_end(body: str, at: int, begin: int) -> int:
    """Where the ordinary quotes end that were opened before ``at``; -1: nowhere. No quote token stands in them."""
    match = re.compile(rf'(?:\\[^{MARK}]|[^"\\{MARK}])*', re.DOTALL).match(body, at)
    assert match
    end = match.end()
    if MARK in body[end : end + 2]:
        raise BrokenCallError(begin)
    return end if body[end : end + 1] == '"' else -1


ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
BEGUN = re.compile(
    r"\\(u([0-9a-cA-CefEF][0-9a-fA-F]{0,2}|[dD]([0-7][0-9a-fA-F]?)?|[dD][89abAB][0-9a-fA-F]{0,2}"
    r"|[dD][89abAB][0-9a-fA-F]{2}\\(u([dD]([c-fC-F][0-9a-fA-F]?)?)?)?)?)?"
)


def _unescaped(raw: str, cut: bool = False) -> str:
    """The inside of a JSON string; a backslash that is no escape stands for itself, half a one at a cut for nothing."""
    out, at = "", 0
    while at < len(raw):
        rest = raw[at:]
        if rest[0] != "\\":
            out += rest[0]
            at += 1
        elif rest[1:2] in ESCAPES and rest[1:]:
            out += ESCAPES[rest[1]]
            at += 2
        elif pair := re.match(r"\\u([dD][89abAB]..)\\u([dD][c-fC-F]..)", rest):
            try:
                halves = bytes.fromhex(pair[1] + pair[2])
            except ValueError:
                halves = b""
            out += halves.decode("utf-16-be") if halves else "\\"
            at += 12 if halves else 1
        elif (code := re.match(r"\\u([0-9a-fA-F]{4})", rest)) and not 0xD800 <= int(code[1], 16) < 0xE000:
            out += chr(int(code[1], 16))
            at += 6
        elif cut and BEGUN.fullmatch(rest):
            return out
        else:
            out += "\\"
            at += 1
    return out


def _fraction(text: str) -> Any:
    try:
        return Decimal(text)
    except InvalidOperation:  # an exponent that not even Decimal has
        return ("number", text)


def _fits(text: str) -> bool:
    """Whether JSON parsers can hold a number."""
    if re.fullmatch(r"-?[0-9]+", text):
        return len(text) <= 4300
    try:
        value = float(text)
    except ValueError:
        return True  # no number
    return abs(value) != float("inf") and (value != 0 or not set(re.split("[eE]", text)[0]) & set("123456789"))


def scalar(text: str) -> Any:
    """A value without quotes."""
    if text.lower() in ("none", "nil", "null"):
        return None
    if text in ("true", "false"):
        return text == "true"
    if not _fits(text):
        return text
    try:
        value = json.loads(text, parse_float=_fraction, parse_constant=str)
    except ValueError:
        return text
    return value if isinstance(value, (int, Decimal, tuple)) else text


def read_json(text: str) -> Any:
    """JSON in the same form: objects as lists of pairs, fractions as Decimal."""
    return json.loads(text, object_pairs_hook=Pairs, parse_float=_fraction)
