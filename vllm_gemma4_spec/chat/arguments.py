"""Call arguments to JSON, as they arrive.

The form is that of the chat templates' macro ``format_argument``, where ``<|"|>`` is one token::

    {city:<|"|>Paris<|"|>,days:3,units:{metric:true},tags:[<|"|>a<|"|>,null]}

Strings and keys may also stand between ordinary quotes with JSON's escapes, so the same class reads the
JSON that structured outputs force (``tool_choice`` required or named).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from json.encoder import encode_basestring

import regex  # a dependency of vLLM; unlike `re` it knows partial matches

_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?\Z", re.ASCII)
_NOT_ZERO = re.compile(r"-?[0.]*[1-9]")
_LONGEST = 4300  # digits of an integer; Python's json module reads no more
_HIGH = r"u[dD][89abAB][0-9a-fA-F]{2}"  # the first half of a character outside the basic plane
# What stands for one character. Half a character is none: it is taken as it stands, like any other backslash.
_ESCAPE = rf'\\(?:["\\/bfnrt]|u(?![dD][89a-fA-F])[0-9a-fA-F]{{4}}|{_HIGH}\\u[dD][c-fC-F][0-9a-fA-F]{{2}})'
_ONE_ESCAPE = regex.compile(_ESCAPE)
_BACKSLASHES = re.compile(rf"({_ESCAPE})|\\")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
# The beginning of an escape at the end of a text; what is before it are whole ones and other characters.
_CUT_ESCAPE = re.compile(
    r"(?<!\\)((?:\\\\)*)\\(?:u(?![dD][c-fC-F])[0-9a-fA-F]{0,3}"
    rf"|{_HIGH}(?:\\(?:u(?:[dD](?:[c-fC-F][0-9a-fA-F]?)?)?)?)?)?\Z"
)
_HALF = re.compile(rf"\\{_HIGH}")
_SPACE = " \t\r\n"
_CLOSER = {"{": "}", "[": "]"}
_DEEPEST = 100  # braces and brackets in one another; JSON parsers give up on more (serde at 128, Python near 1,000)


def json_text(text: str) -> str:
    """``text`` as the inside of a JSON string."""
    return encode_basestring(text)[1:-1]  # what dumps() comes to in the end, with an encoder of its own each time


def json_scalar(text: str) -> str:
    """A value without quotes: a number digit by digit as it stands, true, false, null, else a string.

    ``none`` and ``nil`` are null in any case of letters, as in vLLM 0.19.1. A number that JSON parsers cannot
    hold (``1e400``, thousands of digits) is a string as well: clients would fail on it, or read another number.
    """
    if text in ("true", "false") or (_NUMBER.match(text) and _readable(text)):
        return text
    return "null" if text.lower() in ("null", "none", "nil") else f'"{json_text(text)}"'


def _readable(number: str) -> bool:
    if number.lstrip("-").isdigit():
        return len(number) <= _LONGEST
    value = float(number)
    return math.isfinite(value) and (value != 0 or not _NOT_ZERO.match(number))


def unescaped(text: str) -> str:
    """The inside of a JSON string as a model writes it; a backslash that begins no escape is one."""
    doubled = _BACKSLASHES.sub(lambda match: match[1] or "\\\\", text)
    return str(json.loads(f'"{doubled}"', strict=False))


def _text_of(quoted: str) -> str:
    """A string in ordinary quotes as JSON; cut where the last of them is missing, and then without half an escape."""
    whole = _QUOTED.fullmatch(quoted)
    inside = quoted[1:-1] if whole else _CUT_ESCAPE.sub(r"\1", quoted[1:])
    return f'"{json_text(unescaped(inside))}"'


class Arguments:
    """One object of arguments, from its opening brace to its closing one.

    What :meth:`text` and :meth:`quote` return joins to the beginning of one valid JSON object;
    :meth:`close` makes it whole at any time. Strings are given out as they arrive, every other value when
    it has ended; so is a string in ordinary quotes in Gemma's own form, where it may be the beginning of a value
    without quotes (``"a" or "b"``).
    """

    def __init__(self, native: bool = True) -> None:
        """
        Args:
            native: Gemma's own form; else JSON.
        """
        self._native = native
        self._step: Callable[[str], str] = self._start
        self._open: list[str] = []  # the braces and brackets that are open, outermost first
        self._empty = True  # the innermost of them has no member yet
        self._key = ""
        self._held: list[str] = []  # a value that has not ended, or the beginning of an escape
        self._escaped = False  # a backslash was the last of it
        self._unsaid: list[str] = []  # all text read since the last JSON was given out
        self._stuck = False

    @property
    def complete(self) -> bool:
        return self._step == self._end

    def text(self, text: str) -> tuple[str, str]:
        """Read ordinary text; returns JSON, and the rest of ``text`` from where it fits nowhere on."""
        if self._step == self._string:
            return json_text(text), ""
        out: list[str] = []
        for i, c in enumerate(text):
            if self._step == self._string:
                return "".join([*out, json_text(text[i:])]), ""
            out.append(self._step(c))
            if self._stuck:
                return "".join(out), text[i:]
            if self._unsaid or c not in _SPACE + "," or self._step in (self._quoted_key, self._colon):
                if out[-1]:
                    self._unsaid.clear()
                else:
                    self._unsaid.append(c)
        return "".join(out), ""

    def quote(self, mark: str = "") -> str | None:
        """Read a quote token; returns JSON, or None where no string can begin or end.

        ``mark`` is the token's text if it is shown: a key that is cut is given back with it.
        """
        if self._step == self._string:
            return self._end_string()
        if self._step == self._quoted_key:
            self._step = self._colon
            self._unsaid.append(mark)
            return ""
        if self._step == self._key_start:
            self._step, self._key = self._quoted_key, ""
            self._unsaid.append(mark)
            return ""
        if self._step == self._value_start:
            return self._begin_string(self._string)
        return None

    def close(self, cut: bool) -> tuple[str, str]:
        """End the input: the JSON still missing, and the text read that is not in it.

        Args:
            cut: the input ended, so a string ends with it, half an escape apart; a key, number or word that may have
                gone on is in no JSON. Otherwise it cannot be read on, and what had begun is text.
        """
        out, rest = "", "".join(self._unsaid)
        if self._step == self._string or self._step == self._json_string:
            out, rest = '"', ""
            if not cut:
                out = json_text("".join(self._held)) + out
        elif cut and self._step in (self._first_quotes, self._after_quotes):
            held = "".join(self._held)
            held = held.rstrip(_SPACE) if self._step == self._after_quotes else held
            out = self._before_value() + _text_of(held)
        if self._step == self._start:
            out = "{"
            self._open.append("{")
        out += "".join(_CLOSER[b] for b in reversed(self._open))
        self._open.clear()
        self._unsaid.clear()
        self._held.clear()
        self._step = self._end
        return out, rest

    # One method per state; each reads one character and returns JSON.

    def _no(self) -> str:
        self._stuck = True
        return ""

    def _start(self, c: str) -> str:
        return self._push(c) if c == "{" else "" if c in _SPACE else self._no()

    def _push(self, brace: str) -> str:
        if len(self._open) == _DEEPEST:
            return self._no()
        out = self._before_value() + brace if self._open else brace
        self._open.append(brace)
        self._empty = True
        self._step = self._key_start if brace == "{" else self._value_start
        return out

    def _pop(self) -> str:
        closer = _CLOSER[self._open.pop()]
        self._empty = False
        self._step = self._after_value if self._open else self._end
        return closer

    def _before_value(self) -> str:
        comma = "" if self._empty else ", "
        self._empty = False
        return comma if self._open[-1] == "[" else f'{comma}"{json_text(self._key)}": '

    def _key_start(self, c: str) -> str:
        self._key = ""
        if c in _SPACE or c == ",":
            return ""
        if c == "}":
            return self._pop()
        if c == ":":  # what the templates write for an empty key
            self._step = self._value_start
            return ""
        if c in "{[]":
            return self._no()
        self._step = self._json_key if c == '"' else self._bare_key
        self._key = c
        return ""

    def _bare_key(self, c: str) -> str:
        if c == ":":
            self._key = self._key.strip(_SPACE)
            self._step = self._value_start
        elif c in ",{}[]":
            return self._no()
        self._key += c if c != ":" else ""
        return ""

    def _quoted_key(self, c: str) -> str:
        self._key += c
        return ""

    def _json_key(self, c: str) -> str:
        self._key += c
        if c == '"' and (len(self._key) - len(self._key[:-1].rstrip("\\"))) % 2:
            self._key = unescaped(self._key[1:-1])
            self._step = self._colon
        return ""

    def _colon(self, c: str) -> str:
        if c == ":":
            self._step = self._value_start
        elif c not in _SPACE:
            return self._no()
        return ""

    def _value_start(self, c: str) -> str:
        if c in _SPACE:
            return ""
        if c in "{[":
            return self._push(c)
        if c == '"' and not self._native:
            return self._begin_string(self._json_string)
        if self._open[-1] == "[" and c == ",":
            return ""
        if self._open[-1] == "[" and c == "]":
            return self._pop()
        if c == '"':
            self._held.append(c)
            self._step = self._first_quotes
            return ""
        self._step = self._bare
        return self._bare(c)

    def _bare(self, c: str) -> str:
        if c == "," or c == _CLOSER[self._open[-1]]:
            # `a:,` and `a:}` mean the empty string, as in vLLM 0.19.1.
            return self._end_value(json_scalar(self._said()), c)
        if c in "{}[]":
            return self._no()
        if c == '"' and self._native and not (self._held and self._held[-1].isalnum()):
            self._step = self._quotes  # 5" is five inches
        self._held.append(c)
        return ""

    def _said(self) -> str:
        text = "".join(self._held).strip(_SPACE)
        self._held.clear()
        return text

    def _end_value(self, json: str, c: str) -> str:
        self._held.clear()
        return self._before_value() + json + self._after_value(c)

    def _quotes(self, c: str) -> str:
        """In ordinary quotes inside a bare value, where nothing else ends it."""
        if self._in_quotes(c):
            self._step = self._bare
        return ""

    def _first_quotes(self, c: str) -> str:
        """In the ordinary quotes that a value began with."""
        if self._in_quotes(c):
            self._step = self._after_quotes
        return ""

    def _in_quotes(self, c: str) -> bool:
        """Take one character; whether it is the closing quote."""
        self._held.append(c)
        ends = c == '"' and not self._escaped
        self._escaped = c == "\\" and not self._escaped
        return ends

    def _after_quotes(self, c: str) -> str:
        if c == "," or c == _CLOSER[self._open[-1]]:
            return self._end_value(_text_of(self._said()), c)
        if c in _SPACE:
            self._held.append(c)
            return ""
        self._step = self._bare  # it was the beginning of a value without quotes
        return self._bare(c)

    def _begin_string(self, step: Callable[[str], str]) -> str:
        self._step = step
        self._unsaid.clear()
        return self._before_value() + '"'

    def _end_string(self) -> str:
        self._step = self._after_value
        return '"'

    def _string(self, c: str) -> str:
        return json_text(c)

    def _json_string(self, c: str) -> str:
        if not self._held:
            if c == '"':
                return self._end_string()
            if c != "\\":
                return json_text(c)
        held = "".join(self._held) + c
        self._held.clear()
        match = _ONE_ESCAPE.fullmatch(held, partial=True)
        if match is None:
            half = _HALF.match(held)
            at = half.end() if half else len(held) - 1
            return json_text(held[:at]) + "".join(map(self._step, held[at:]))
        if not match.partial:
            return held
        self._held.append(held)
        return ""

    def _after_value(self, c: str) -> str:
        if c == ",":
            self._step = self._key_start if self._open[-1] == "{" else self._value_start
            return ""
        if c == _CLOSER[self._open[-1]]:
            return self._pop()
        return "" if c in _SPACE else self._no()

    def _end(self, c: str) -> str:
        return "" if c in _SPACE else self._no()
