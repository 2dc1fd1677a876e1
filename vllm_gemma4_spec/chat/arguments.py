"""Call arguments to JSON, as they arrive.

The form is that of the chat templates' macro ``format_argument``, where ``<|"|>`` is one token::

    {city:<|"|>Paris<|"|>,days:3,units:{metric:true},tags:[<|"|>a<|"|>,null]}

Strings and keys may also stand between ordinary quotes with JSON's escapes, so the same class reads the
JSON that structured outputs force (``tool_choice`` required or named).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?\Z")
_ESCAPE = re.compile(r'\\(["\\/bfnrt]|u[0-9a-fA-F]{4})\Z')
_ESCAPE_BEGUN = re.compile(r"\\(u[0-9a-fA-F]{0,3})?\Z")
_SPACE = " \t\r\n"
_CLOSER = {"{": "}", "[": "]"}
_encode = json.JSONEncoder(ensure_ascii=False).encode  # dumps() with an option makes an encoder every time
_DEEPEST = 100  # braces and brackets in one another; JSON parsers give up on more (serde at 128, Python near 1,000)


def json_text(text: str) -> str:
    """``text`` as the inside of a JSON string."""
    return _encode(text)[1:-1]


def json_scalar(text: str) -> str:
    """A value without quotes: a number digit by digit as it stands, true, false, null, else a string.

    ``none`` and ``nil`` are null in any case of letters, as in vLLM 0.19.1.
    """
    if text in ("true", "false") or _NUMBER.match(text):
        return text
    return "null" if text.lower() in ("null", "none", "nil") else f'"{json_text(text)}"'


class Arguments:
    """One object of arguments, from its opening brace to its closing one.

    What :meth:`text` and :meth:`quote` return joins to the beginning of one valid JSON object;
    :meth:`close` makes it whole at any time. Strings are given out as they arrive, every other value when
    it has ended.
    """

    def __init__(self) -> None:
        self._step: Callable[[str], str] = self._start
        self._open: list[str] = []  # the braces and brackets that are open, outermost first
        self._empty = True  # the innermost of them has no member yet
        self._key = ""
        self._value = ""  # a bare value, or an escape, that has not ended
        self._unsaid = ""  # all text read since the last JSON was given out
        self._stuck = False

    @property
    def complete(self) -> bool:
        return self._step == self._end

    def text(self, text: str) -> tuple[str, str]:
        """Read ordinary text; returns JSON, and the rest of ``text`` from where it fits nowhere on."""
        out: list[str] = []
        for i, c in enumerate(text):
            if self._step == self._string:
                return "".join([*out, json_text(text[i:])]), ""
            out.append(self._step(c))
            if self._stuck:
                return "".join(out), text[i:]
            if self._unsaid or c not in _SPACE + "," or self._step in (self._quoted_key, self._colon):
                self._unsaid = "" if out[-1] else self._unsaid + c
        return "".join(out), ""

    def quote(self, mark: str = "") -> str | None:
        """Read a quote token; returns JSON, or None where no string can begin or end.

        ``mark`` is the token's text if it is shown: a key that is cut is given back with it.
        """
        if self._step == self._string:
            return self._end_string()
        if self._step == self._quoted_key:
            self._step = self._colon
            self._unsaid += mark
            return ""
        if self._step == self._key_start:
            self._step, self._key = self._quoted_key, ""
            self._unsaid += mark
            return ""
        if self._step == self._value_start:
            return self._begin_string(self._string)
        return None

    def close(self) -> tuple[str, str]:
        """End the input: the JSON still missing, and the text read that is not in it.

        A string that was cut ends where it was cut; a key, number or word that was cut is given back.
        """
        out, rest = "", self._unsaid
        if self._step == self._string or self._step == self._json_string:
            out, rest = json_text(self._value) + '"', ""
        if self._step == self._start:
            out = "{"
            self._open.append("{")
        out += "".join(_CLOSER[b] for b in reversed(self._open))
        self._open.clear()
        self._unsaid = self._value = ""
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
        if c in ":{[]":
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
            try:
                self._key = json.loads(self._key, strict=False)
            except ValueError:
                self._key = self._key[1:-1]
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
        if c == '"':
            return self._begin_string(self._json_string)
        if self._open[-1] == "[" and c == ",":
            return ""
        if self._open[-1] == "[" and c == "]":
            return self._pop()
        self._step = self._bare
        return self._bare(c)

    def _bare(self, c: str) -> str:
        if c == "," or c == _CLOSER[self._open[-1]]:
            # `a:,` and `a:}` mean the empty string, as in vLLM 0.19.1.
            out = self._before_value() + json_scalar(self._value.strip(_SPACE))
            self._value = ""
            return out + self._after_value(c)
        if c in "{}[]":
            return self._no()
        self._value += c
        return ""

    def _begin_string(self, step: Callable[[str], str]) -> str:
        self._step = step
        self._unsaid = ""
        return self._before_value() + '"'

    def _end_string(self) -> str:
        self._step = self._after_value
        return '"'

    def _string(self, c: str) -> str:
        return json_text(c)

    def _json_string(self, c: str) -> str:
        if not self._value and c == '"':
            return self._end_string()
        if not self._value and c != "\\":
            return json_text(c)
        held, self._value = self._value + c, ""
        if _ESCAPE.match(held):
            return held
        if _ESCAPE_BEGUN.match(held):
            self._value = held
            return ""
        return json_text(held[:-1]) + self._json_string(c)  # not an escape of JSON's: taken as it stands

    def _after_value(self, c: str) -> str:
        if c == ",":
            self._step = self._key_start if self._open[-1] == "{" else self._value_start
            return ""
        if c == _CLOSER[self._open[-1]]:
            return self._pop()
        return "" if c in _SPACE else self._no()

    def _end(self, c: str) -> str:
        return "" if c in _SPACE else self._no()
