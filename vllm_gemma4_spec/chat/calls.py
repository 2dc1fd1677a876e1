"""Tool calls out of the text they are written in: Gemma 4's own form, and the JSON of forced tool choices."""

from __future__ import annotations

import re
from typing import Protocol

import regex  # a dependency of vLLM; unlike `re` it knows partial matches

from vllm_gemma4_spec.chat.arguments import Arguments, unescaped

_PREFIX = "call:"
# Models leave out the word now and then, or call as Python does: `:NAME{`, `call:NAME({`.
_HEAD = re.compile(r"(?:call)?:\s*([^\s{}()]+)\s*\(?\s*\Z")
_HEAD_BEGUN = re.compile(r"c|ca|cal|call|(?:call)?:\s*[^\s{}]*\s*\(?\s*")
_SPACE = " \t\r\n"
_BETWEEN = _SPACE + "}]),;"  # what models put behind a call's last brace


class Sink(Protocol):
    """Where a reader puts what it finds."""

    def content(self, text: str) -> None: ...

    def begin_call(self, name: str) -> None: ...

    def arguments(self, json: str) -> None: ...

    def end_call(self, complete: bool) -> None: ...

    def lose_call(self) -> None:
        """A call was cut before its arguments: nothing of it is given out."""


class Reader(Protocol):
    """Reads what stands where calls may stand; what is no call goes to the sink as content."""

    def text(self, text: str) -> None: ...

    def leave(self) -> None:
        """Something else begins; a call that is open does not go on behind it."""

    def end(self) -> None:
        """No more text."""


class _OneCall:
    """The arguments of the call that has begun."""

    def __init__(self, sink: Sink, native: bool = False) -> None:
        self._sink = sink
        self._arguments = Arguments(native)
        self.over = False  # no more text belongs to it
        self.whole = False  # and it was read to its last brace

    def text(self, text: str) -> str:
        """Read on; returns the text after the call, or from where it cannot be read on."""
        out, rest = self._arguments.text(text)
        self._sink.arguments(out)
        if self._arguments.complete:
            if not self.over:
                self._sink.end_call(True)
            self.over = self.whole = True
        elif rest:
            rest = self._close(cut=False) + rest
        return rest

    def quote(self, mark: str) -> str | None:
        """Read a quote token, whose text is ``mark`` if it is shown; returns text, as :meth:`text` does, where it
        cannot stand."""
        out = self._arguments.quote(mark)
        if out is None:
            return self._close(cut=False)
        self._sink.arguments(out)
        return None

    def _close(self, cut: bool) -> str:
        out, unsaid = self._arguments.close(cut)
        self._sink.arguments(out)
        self._sink.end_call(False)
        self.over = True
        return unsaid

    def end(self) -> None:
        """No more text. What had begun and is in no argument is half a call, and no content."""
        if not self.over:
            self._close(cut=True)


class NativeCall:
    """What stands between ``<|tool_call>`` and ``<tool_call|>``: ``call:NAME{ARGUMENTS}``, once or more often."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._space = ""  # before the head
        self._head = ""
        self._call: _OneCall | None = None
        self._whole = 0  # calls read to the end
        self._junk: list[str] = []  # text behind the last of them
        self._plain = False  # from here on it is no call

    def text(self, text: str) -> None:
        while text:
            if self._plain:
                return self._sink.content(text)
            if self._junk:
                return self._junk.append(text)
            text = self._read_head(text) if self._call is None else self._arguments(self._call, text)
        return None

    def _arguments(self, call: _OneCall, text: str) -> str:
        rest = call.text(text)
        if call.whole:
            self._call, self._space, self._head = None, "", ""
            self._whole += 1
        elif call.over:
            self._plain = True
        return rest

    def _read_head(self, text: str) -> str:
        """Returns what is left to read: the arguments, or all of it if this is no call."""
        if not self._head:
            stripped = text.lstrip(_BETWEEN if self._whole else None)
            self._space += "" if self._whole else text[: len(text) - len(stripped)]
            text = stripped
        head, brace, rest = text.partition("{")
        self._head += head
        match = _HEAD.match(self._head) if brace else None
        if match:
            self._sink.begin_call(match[1])
            self._call = _OneCall(self._sink, native=True)
            return brace + rest
        if not brace and (_PREFIX.startswith(self._head[: len(_PREFIX)]) or self._head[:1] == ":"):
            return ""
        text = self._space + self._head + brace + rest
        if self._whole:
            self._junk.append(text)
            self._head = ""  # no call that has begun, whatever it looks like
            return ""
        self._plain = True
        return text

    def quote(self, mark: str) -> bool:
        if self._call is None or self._plain:
            return False
        unsaid = self._call.quote(mark)
        if unsaid is None:
            return True
        self._call, self._plain = None, True
        self._sink.content(unsaid)
        return False

    def end(self, closed: bool) -> None:
        """No more text.

        Args:
            closed: ``<tool_call|>`` ended it, so what stands behind its last call was part of the call.
        """
        if self._call is not None:
            self._call.end()
        elif self._plain:
            return
        elif _HEAD_BEGUN.fullmatch(self._head):
            self._sink.lose_call()
        elif self._whole:
            if not closed:
                self._sink.content("".join(self._junk) or self._head)
        elif self._head:
            self._sink.content(self._space + self._head)
        elif not closed:
            self._sink.lose_call()


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

    def leave(self) -> None:
        self.end()

    def end(self) -> None:
        if self._call is not None:
            self._call.end()


class RequiredCalls:
    """``tool_choice`` is required: the text is ``[{"name": NAME, "parameters": {…}}, …]``.

    The schema that vLLM forces has these two members in this order. Text of any other form is content.
    """

    _ITEM = r'\s*\{\s*"name"\s*:\s*"(?P<name>(?:[^"\\]|\\.)*)"\s*,\s*"parameters"\s*:\s*(?=\{)'
    _FIRST = regex.compile(rf"\s*\[{_ITEM}")
    _NEXT = regex.compile(rf"\s*\}}\s*(?:(?P<last>\])|,{_ITEM})")
    _LIMIT = 4096  # characters between two calls; a name that long is none

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._held = ""  # syntax and name read since the last call
        self._pattern = self._FIRST
        self._call: _OneCall | None = None
        self._plain = False
        self._ended = False  # the list has; space behind it is none of the answer

    def text(self, text: str) -> None:
        while text and not self._plain:
            text = self._head(text) if self._call is None else self._parameters(self._call, text)
        if self._ended:
            text = text.lstrip()
            self._ended = not text
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
            self._plain = self._ended = True
            return text[match.end() :]
        self._sink.begin_call(unescaped(match["name"]))
        self._pattern = self._NEXT
        self._call = _OneCall(self._sink)
        return text[match.end() :]

    def leave(self) -> None:
        if self._call is not None:
            self._call.end()
            self._call, self._plain = None, True

    def end(self) -> None:
        if self._call is not None:
            self._call.end()
        elif self._held.lstrip(_SPACE if self._pattern is self._FIRST else _SPACE + "}"):
            self._sink.lose_call()  # the beginning of one more
