"""Tool calls out of the text they are written in: Gemma 4's own form, and the JSON of forced tool choices."""

from __future__ import annotations

import json
import re
from typing import Protocol

import regex  # a dependency of vLLM; unlike `re` it knows partial matches

from vllm_gemma4_spec.chat.arguments import Arguments

_PREFIX = "call:"
_HEAD = re.compile(r"call:\s*([^\s{}]+)\s*\Z")
_SPACE = " \t\r\n"


class Sink(Protocol):
    """Where a reader puts what it finds."""

    def content(self, text: str) -> None: ...

    def begin_call(self, name: str) -> None: ...

    def arguments(self, json: str) -> None: ...

    def end_call(self, complete: bool) -> None: ...


class Reader(Protocol):
    """Reads what stands where calls may stand; what is no call goes to the sink as content."""

    def text(self, text: str) -> None: ...

    def quote(self, mark: str) -> bool: ...

    def end(self) -> None: ...


class _OneCall:
    """The arguments of the call that has begun."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._arguments = Arguments()
        self.over = False  # no more text belongs to it
        self.whole = False  # and it was read to its last brace

    def text(self, text: str) -> str:
        """Read on; returns the text after the call, or from where it cannot be read on."""
        out, rest = self._arguments.text(text)
        self._sink.arguments(out)
        return self._settle(rest)

    def quote(self, mark: str) -> bool:
        """Read a quote token, whose text is ``mark`` if it is shown; False where it cannot stand."""
        out = self._arguments.quote(mark)
        if out is not None:
            self._sink.arguments(out)
        return out is not None

    def _settle(self, rest: str) -> str:
        if self._arguments.complete:
            if not self.over:
                self._sink.end_call(True)
            self.over = self.whole = True
        elif rest:
            rest = self._broken() + rest
        return rest

    def _broken(self) -> str:
        out, unsaid = self._arguments.close()
        self._sink.arguments(out)
        self._sink.end_call(False)
        self.over = True
        return unsaid

    def end(self) -> str:
        """No more text; returns what was read and is in no argument."""
        return "" if self.over else self._broken()


class NativeCall:
    """What stands between ``<|tool_call>`` and ``<tool_call|>``: ``call:NAME{ARGUMENTS}``."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._space = ""  # before the head
        self._head = ""
        self._call: _OneCall | None = None
        self._plain = False  # from here on it is no call

    def text(self, text: str) -> None:
        if not self._plain and self._call is None:
            text = self._read_head(text)
        if not self._plain and self._call is not None:
            text = self._call.text(text)
            self._plain = self._call.over and bool(text)
        if text:
            self._sink.content(text)

    def _read_head(self, text: str) -> str:
        """Returns what is left to read: the arguments, or all of it if this is no call."""
        head, brace, rest = text.partition("{")
        if not self._head:
            stripped = head.lstrip()
            self._space += head[: len(head) - len(stripped)]
            head = stripped
        self._head += head
        match = _HEAD.match(self._head) if brace else None
        if match:
            self._sink.begin_call(match[1])
            self._call = _OneCall(self._sink)
            return brace + rest
        if not brace and _PREFIX.startswith(self._head[: len(_PREFIX)]):
            return ""
        self._plain = True
        return self._space + self._head + brace + rest

    def quote(self, mark: str) -> bool:
        if self._plain or self._call is None or self._call.over:
            self._plain |= bool(mark) and self._call is not None  # the space behind it is text
            return False
        if self._call.quote(mark):
            return True
        self._sink.content(self._call.end())
        self._plain = True
        return False

    def end(self) -> None:
        rest = self._call.end() if self._call is not None else "" if self._plain else self._space + self._head
        if rest:
            self._sink.content(rest)


class NamedCall:
    """``tool_choice`` names a function: the text is its arguments as a JSON object."""

    def __init__(self, sink: Sink, name: str) -> None:
        self._sink = sink
        self._name = name
        self._call: _OneCall | None = None
        self._plain = False

    def text(self, text: str) -> None:
        if not self._plain and self._call is None:
            text = text.lstrip(_SPACE)
            if text.startswith("{"):
                self._sink.begin_call(self._name)
                self._call = _OneCall(self._sink)
            else:
                self._plain = bool(text)
        if self._call is not None and not self._plain:
            text = self._call.text(text)
            self._plain = self._call.over and bool(text)
        if text:
            self._sink.content(text)

    def quote(self, mark: str) -> bool:
        return False

    def end(self) -> None:
        rest = self._call.end() if self._call is not None else ""
        if rest:
            self._sink.content(rest)


class RequiredCalls:
    """``tool_choice`` is required: the text is ``[{"name": NAME, "parameters": {…}}, …]``.

    The schema that vLLM forces has these two members in this order. Text of any other form is content.
    """

    _ITEM = r'\s*\{\s*"name"\s*:\s*(?P<name>"(?:[^"\\]|\\.)*")\s*,\s*"parameters"\s*:\s*(?=\{)'
    _FIRST = regex.compile(rf"\s*\[{_ITEM}")
    _NEXT = regex.compile(rf"\s*\}}\s*(?:(?P<last>\])|,{_ITEM})")
    _LIMIT = 4096  # characters between two calls; a name that long is none

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._held = ""  # syntax and name read since the last call
        self._pattern = self._FIRST
        self._call: _OneCall | None = None
        self._plain = False

    def text(self, text: str) -> None:
        while text and not self._plain:
            text = self._head(text) if self._call is None else self._parameters(self._call, text)
        if text:
            self._sink.content(text)

    def _parameters(self, call: _OneCall, text: str) -> str:
        rest = call.text(text)
        if call.over:
            self._call = None
            self._plain = not call.whole
        return rest

    def _head(self, text: str) -> str:
        """Read what stands before a call's parameters; returns them, or everything if no call comes."""
        text, self._held = self._held + text, ""
        match = self._pattern.match(text, partial=len(text) <= self._LIMIT)
        if match is None:
            self._plain = True
            return text
        if match.partial:
            self._held = text
            return ""
        if self._pattern is self._NEXT and match["last"]:
            self._plain = True
            return text[match.end() :].lstrip()
        self._sink.begin_call(str(json.loads(match["name"], strict=False)))
        self._pattern = self._NEXT
        self._call = _OneCall(self._sink)
        return text[match.end() :]

    def quote(self, mark: str) -> bool:
        return False

    def end(self) -> None:
        rest = self._call.end() if self._call is not None else ""
        # After a call, closing brackets and a comma are syntax that was cut, not text.
        rest += self._held if self._pattern is self._FIRST else self._held.lstrip(_SPACE + "}],")
        if rest:
            self._sink.content(rest)
