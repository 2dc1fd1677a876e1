"""The state machine: token ids in, events out, one token at a time.

It knows nothing of requests, servers or deltas. However the tokens are cut into deltas, the events are the
same, and so is what streamed and plain answers are made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from vllm_gemma4_spec.chat import tokens
from vllm_gemma4_spec.chat.calls import NamedCall, NativeCall, Reader, RequiredCalls
from vllm_gemma4_spec.chat.detokenize import TextStream
from vllm_gemma4_spec.chat.stops import Item, StopGuard
from vllm_gemma4_spec.chat.tokens import Vocabulary


class Kind(Enum):
    REASONING = "reasoning"
    CONTENT = "content"
    CALL = "call"


class Event(NamedTuple):
    """A piece of output. For a call, ``call`` counts from 0; its first event has ``name`` and no text,
    the texts of the others join to its arguments as one JSON object; ``cut`` comes last, if the call was
    not read to its end."""

    kind: Kind
    text: str
    call: int = -1
    name: str = ""
    cut: bool = False


class Tools(Enum):
    """What is done with calls."""

    OFF = "markers are dropped, what stands between them is content"
    AUTO = "calls in Gemma 4's own form"
    REQUIRED = "also a JSON list of calls in place of content"
    NAMED = "also the JSON arguments of one function in place of content"


class Options(NamedTuple):
    """What one request wants.

    Attributes:
        reasoning: channels are reasoning; otherwise their text is content.
        include_reasoning: give reasoning out; otherwise it is dropped.
        tools: see :class:`Tools`.
        tool_name: the function of ``Tools.NAMED``.
        parallel_calls: otherwise only the first call is given out.
        special_text: give out the text of control tokens that are not the output's structure.
        stop: the request's stop strings.
        include_stop: give out the stop string, or the text of the stop token, that ended the output.
    """

    reasoning: bool = True
    include_reasoning: bool = True
    tools: Tools = Tools.AUTO
    tool_name: str = ""
    parallel_calls: bool = True
    special_text: bool = False
    stop: tuple[str, ...] = ()
    include_stop: bool = False


class _Mode(Enum):
    CONTENT = "content"
    CHANNEL = "channel"
    CALL = "call"


class OutputParser:
    """Parses one output (one choice). Feed it every token once, in order."""

    def __init__(self, vocabulary: Vocabulary, options: Options, prompt: Sequence[int] = ()) -> None:
        """
        Args:
            vocabulary: of the checked tokenizer.
            options: of the request.
            prompt: token ids of the prompt; it decides whether the output begins inside a channel.
        """
        self._special = vocabulary.special
        self._texts = vocabulary.texts
        self._options = options
        self._stream = TextStream(vocabulary)
        self._guard = StopGuard(options.stop, options.include_stop) if options.stop else None
        self._mode = _Mode.CONTENT
        self._label: str | None = None  # the beginning of a channel, while it may be the label
        self._known = 0  # characters of it that stand in the prompt
        self._native: NativeCall | None = None
        self._events: list[Event] = []
        self._begun = 0
        self._cut = False
        self._forced: Reader | None = None
        if options.tools is Tools.NAMED:
            self._forced = NamedCall(self, options.tool_name)
        elif options.tools is Tools.REQUIRED:
            self._forced = RequiredCalls(self)
        self._enter(prompt)
        self._plain = self._takes_plain()

    @property
    def calls(self) -> int:
        """Calls begun so far."""
        return self._begun

    @property
    def calls_whole(self) -> bool:
        """There is at least one call, and every one was read to its end."""
        return self._begun > 0 and not self._cut

    def _enter(self, prompt: Sequence[int]) -> None:
        """Start where the prompt ends. Templates of July 2026 end with ``<|channel>thought\\n`` after a
        tool's response, and a prompt may end inside a channel that the client began."""
        for start in range(len(prompt) - 1, -1, -1):
            token = prompt[start]
            if token == tokens.CHANNEL_OPEN:
                guard, self._guard = self._guard, None  # stop strings are looked for in the output alone
                for inside in prompt[start:]:
                    self._feed(inside)
                self._stream.flush()
                self._guard = guard
                self._events.clear()
                self._known = len(self._label or "")
                return
            if token == tokens.CHANNEL_CLOSE or token == tokens.TOOL_CALL_OPEN or token in tokens.TURN_ENDS:
                return

    def plain(self, token_ids: Sequence[int]) -> list[Event] | None:
        """Read tokens at once if all are text and text is taken as it stands here, as in most deltas.

        Such text changes no state, so this is what :meth:`feed` makes of them one by one.

        Returns:
            The events; None if nothing was read and the tokens are to be fed.
        """
        if self._plain is None:
            return None
        try:
            text = "".join([self._texts[token] for token in token_ids])  # type: ignore[misc]
        except (KeyError, TypeError):  # a control token, one not met before; a byte
            return None
        if self._guard is not None:
            text = self._guard.push_text(text)
        return [Event(self._plain, text)] if text else []

    def feed(self, token: int) -> list[Event]:
        """Read one token; returns the events it brings about."""
        self._feed(token)
        self._plain = self._takes_plain()
        return self._drain()

    def _takes_plain(self) -> Kind | None:
        """What text becomes at present, if all of it becomes the same and nothing waits for it."""
        if self._stream.waits or (self._guard is not None and self._guard.holds_controls):
            return None
        if self._mode is _Mode.CONTENT:
            return Kind.CONTENT if self._forced is None else None
        if self._mode is _Mode.CALL or self._label is not None:
            return None
        if not self._options.reasoning:
            return Kind.CONTENT
        return Kind.REASONING if self._options.include_reasoning else None

    def _feed(self, token: int) -> None:
        if token in self._special:
            text = self._stream.flush()
            if text:
                self._put(Item(text))
            # The engine's text, in which stop strings are searched, has special tokens only on request.
            self._put(Item(self._special[token] if self._options.special_text else "", token))
        else:
            text = self._stream.push(token)
            if text and self._guard is None:
                self._text(text)
            elif text:
                self._put(Item(text))

    def stopped(self, matched: str, engine_length: int) -> None:
        """The tokens still to be fed are the last: the engine found a stop string. See :class:`StopGuard`."""
        self._plain = None
        if self._guard is not None:
            self._guard.stopped(matched, engine_length)

    def finish(self, last: int | None = None) -> list[Event]:
        """The output has ended.

        Args:
            last: the token that ended it and is no text (end of sequence, ``stop_token_ids``), not fed before.
        """
        if last is not None:
            if self._options.include_stop:
                self._feed(last)
            elif last in self._special:
                self._put(Item("", last))
        text = self._stream.flush()
        if text:
            self._put(Item(text))
        if self._guard is not None:
            for item in self._guard.finish():
                self._read(item)
        self._leave()
        if self._forced is not None:
            self._forced.end()
        return self._drain()

    def _drain(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _put(self, item: Item) -> None:
        if self._guard is None:
            self._read(item)
        else:
            for sure in self._guard.push(item):
                self._read(sure)

    # Below, items are certain to belong to the output.

    def _read(self, item: Item) -> None:
        if item.token >= 0 and self._structure(item.token, item.text):
            return
        if item.text:
            self._text(item.text)

    def _structure(self, token: int, text: str) -> bool:
        """Follow a token of the output's structure; False for every other special token."""
        if token in (tokens.CHANNEL_OPEN, tokens.CHANNEL_CLOSE):
            if not self._options.reasoning and self._options.special_text:
                return False
            if token == tokens.CHANNEL_OPEN:
                self._leave()
                self._mode, self._label = _Mode.CHANNEL, ""
            elif self._mode is _Mode.CHANNEL:
                self._leave()
            return True  # a stray close is absorbed
        if token in (tokens.TOOL_CALL_OPEN, tokens.TOOL_CALL_CLOSE):
            self._leave()  # a call is never reasoning, even where it is not parsed
            if self._options.tools is Tools.OFF:
                return not self._options.special_text
            if token == tokens.TOOL_CALL_OPEN:
                self._mode, self._native = _Mode.CALL, NativeCall(self)
            return True
        if token in tokens.TURN_ENDS:
            self._leave()
        return token == tokens.QUOTE and self._native is not None and self._native.quote(text)

    def _text(self, text: str) -> None:
        if self._mode is _Mode.CHANNEL:
            self._channel(text)
        elif self._native is not None:
            self._native.text(text)
        elif self._forced is not None:
            self._forced.text(text)
        else:
            self.content(text)

    def _channel(self, text: str) -> None:
        if self._label is not None:
            text = self._label + text
            if (tokens.LABEL + "\n").startswith(text) and text != tokens.LABEL + "\n":
                self._label = text
                return
            self._label = None
            said = text.removeprefix(tokens.LABEL + "\n")
            text = text[self._known :] if said == text else said
        self._reasoning(text)

    def _leave(self) -> None:
        """End the channel or the call that is open."""
        if self._mode is _Mode.CHANNEL:
            if self._label and self._label != tokens.LABEL:
                self._reasoning(self._label[self._known :])
            self._label, self._known = None, 0
        elif self._native is not None:
            self._native.end()
            self._native = None
        self._mode = _Mode.CONTENT

    def _reasoning(self, text: str) -> None:
        if not self._options.reasoning:
            self.content(text)
        elif text and self._options.include_reasoning:
            self._events.append(Event(Kind.REASONING, text))

    # The sink of the call readers.

    def content(self, text: str) -> None:
        if text:
            self._events.append(Event(Kind.CONTENT, text))

    def begin_call(self, name: str) -> None:
        self._begun += 1
        if self._begun == 1 or self._options.parallel_calls:
            self._events.append(Event(Kind.CALL, "", self._begun - 1, name))

    def arguments(self, json: str) -> None:
        if json and (self._begun == 1 or self._options.parallel_calls):
            self._events.append(Event(Kind.CALL, json, self._begun - 1))

    def end_call(self, complete: bool) -> None:
        self._cut |= not complete
        if not complete and (self._begun == 1 or self._options.parallel_calls):
            self._events.append(Event(Kind.CALL, "", self._begun - 1, cut=True))
