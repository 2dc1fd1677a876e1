"""The state machine: token ids in, pieces of output out.

It knows nothing of requests and servers. However the tokens are cut into deltas, the pieces join to the same, and
so is what streamed and plain answers are made of.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any, Literal, NamedTuple

from vllm_gemma4_spec.chat import tokens
from vllm_gemma4_spec.chat.calls import NamedCall, NativeCall, Reader, RequiredCalls
from vllm_gemma4_spec.chat.detokenize import TextStream
from vllm_gemma4_spec.chat.events import Event, Kind
from vllm_gemma4_spec.chat.stops import StopGuard
from vllm_gemma4_spec.chat.tokens import Vocabulary


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


class Piece(list[int]):
    """Consecutive token ids, and what they brought about, which is of one kind.

    A token that brings nothing about belongs to the piece that follows; one that ends a piece and begins the
    next belongs to the first.

    Attributes:
        kind: None where the tokens brought nothing about.
        texts: they join to the reasoning or content.
        calls: the events of calls.
    """

    __slots__ = ("calls", "kind", "texts")
    kind: Kind | None
    texts: list[str]
    calls: list[Event]

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def __add__(self, other: Any) -> Any:
        # vLLM joins the ids of all deltas, a copy of everything with every token; nobody reads the sum here.
        return other


def _piece() -> Piece:
    piece = Piece()
    piece.kind, piece.texts, piece.calls = None, [], []
    return piece


_LABEL_LINE = tokens.LABEL + "\n"
_STRUCTURE = tokens.TURN_ENDS | {
    tokens.CHANNEL_OPEN,
    tokens.CHANNEL_CLOSE,
    tokens.TOOL_CALL_OPEN,
    tokens.TOOL_CALL_CLOSE,
}


class OutputParser:
    """Parses one output (one choice). Feed it every token once, in order."""

    # How every output begins; most have no more of these than their defaults.
    _mode: Literal["content", "channel", "call", "header"] = "content"
    _label: str | None = None  # the beginning of a channel or a turn, while it may be the label or a role
    _known = 0  # characters of it that stand in the prompt
    _native: NativeCall | None = None
    _forced: Reader | None = None
    _guard: StopGuard | None = None
    _begun = 0
    _cut = False
    _before_stop: tuple[int, bool] | None = None  # `_begun` and `_cut` when a stop string was found
    _silent = False  # in a call that is not given out, and in what is wrong with it

    def __init__(self, vocabulary: Vocabulary, options: Options, prompt: Sequence[int] = ()) -> None:
        """
        Args:
            vocabulary: of the checked tokenizer.
            options: of the request.
            prompt: token ids of the prompt; it decides whether the output begins inside a channel.
        """
        self._special = vocabulary.special
        self._texts = vocabulary.texts
        self._text_of = vocabulary.texts.__getitem__
        self._options = options
        self._stream = TextStream(vocabulary)
        self._events: list[Event] = []
        if options.tools is Tools.NAMED:
            self._forced = NamedCall(self, options.tool_name)
        elif options.tools is Tools.REQUIRED:
            self._forced = RequiredCalls(self)
        self._enter(prompt)
        if options.stop:  # only now: a prompt's text is none of the output's
            self._guard = StopGuard(options.stop, options.include_stop)
        self._plain = self._takes_plain()

    @property
    def calls_whole(self) -> bool:
        """At least one call was given out, and every one that was, or would have been, was read to its end."""
        return self._begun > 0 and not self._cut

    def _enter(self, prompt: Sequence[int]) -> None:
        """Start where the prompt ends. Templates of July 2026 end with ``<|channel>thought\\n`` after a
        tool's response, and a prompt may end inside a channel that the client began."""
        inside: list[int] = []
        for token in reversed(prompt):
            if token in _STRUCTURE:
                break
            if token not in self._special:  # no text of a prompt, whatever the request wants of its output
                inside.append(token)
        else:
            return
        if token != tokens.CHANNEL_OPEN or not self._structure(token, ""):
            return
        self._channel("".join([self._stream.push(t) for t in reversed(inside)]) + self._stream.flush())
        self._events.clear()
        self._known = len(self._label or "")

    def read(
        self, token_ids: Sequence[int], ended: bool = False, last: int | None = None, cut: bool = False
    ) -> list[Piece]:
        """Read the next tokens, each of them once.

        Args:
            token_ids: of one delta, or of the whole output.
            ended: the output ends with them.
            last: the token behind them that ended it and is no text (end of sequence, ``stop_token_ids``).
            cut: no token ended it (``max_tokens``), so it may end inside a character.

        Returns:
            What they bring about, in order; at least one piece.
        """
        run = self._plain_run(token_ids)
        if run is not None and not ended:
            return [run]
        pieces, quiet = self._one_by_one(token_ids) if run is None else ([run], [])
        if ended:
            self._finish(last, cut)
            if last is not None:
                quiet.append(last)
            if self._events:
                _gather(pieces, self._drain(), quiet)
        pieces[-1].extend(quiet)
        return pieces

    def read_text(self, text: str) -> list[Piece]:
        """Read the last of the text, which no token ends with."""
        self._text(text)
        self._finish(None, cut=True)
        pieces = [_piece()]
        _gather(pieces, self._drain(), [])
        return pieces

    def _plain_run(self, token_ids: Sequence[int]) -> Piece | None:
        """Read tokens at once if all are text and text is taken as it stands here, as in most deltas.

        Such text changes no state, so this is what :meth:`_feed` makes of them one by one. None: nothing was read.
        """
        kind = self._plain
        if kind is None:
            return None
        text: str | None
        if len(token_ids) == 1:  # nearly always, and joining would cost as much again
            text = self._texts[token_ids[0]]
            if text is None:
                return None
        else:
            try:
                text = "".join(map(self._text_of, token_ids))  # type: ignore[arg-type]
            except TypeError:  # a control token or a byte has no text
                return None
        if self._guard is not None:
            text = self._guard.push_text(text)
        piece = Piece(token_ids)  # an __init__ of its own would cost as much again
        piece.calls = []
        if text:
            piece.kind, piece.texts = kind, [text]
        else:
            piece.kind, piece.texts = None, []
        return piece

    def _one_by_one(self, token_ids: Sequence[int]) -> tuple[list[Piece], list[int]]:
        """The pieces of tokens fed one by one, and the last of them, which brought nothing about."""
        pieces, quiet = [_piece()], []
        for token in token_ids:
            quiet.append(token)
            self._feed(token)
            if self._events:
                _gather(pieces, self._drain(), quiet)
        return pieces, quiet

    def _takes_plain(self) -> Kind | None:
        """What text becomes at present, if all of it becomes the same and nothing waits for it."""
        if self._stream.waits or self._label is not None or self._mode == "call":
            return None
        kind: Kind = "content"
        if self._mode == "content":
            if self._forced is not None:
                return None
        elif self._options.reasoning:
            if not self._options.include_reasoning:
                return None
            kind = "reasoning"
        return kind if self._guard is None or self._guard.takes(kind) else None

    def feed(self, token: int) -> list[Event]:
        """Read one token, where pieces are not asked for; returns what it brings about."""
        self._feed(token)
        return self._drain()

    def _feed(self, token: int) -> None:
        text = self._texts[token]
        if text is not None:
            if self._plain is not None:
                if self._guard is not None:
                    text = self._guard.push_text(text)
                if text:
                    self._events.append(Event(self._plain, text))
                return
            if self._native is not None and not self._stream.waits:
                self._native.text(text)  # text does not end a call, so nothing else changes
                return
        if token in self._special:
            if self._stream.waits:
                self._text(self._stream.flush())
            # Seen only on request.
            text = self._special[token] if self._options.special_text else ""
            if not self._structure(token, text):
                self._text(text)
        else:
            self._text(self._stream.push(token))
        self._plain = self._takes_plain()

    def stopped(self, matched: str, engine_length: int) -> None:
        """The tokens still to be read are the last: the engine found a stop string. See :class:`StopGuard`."""
        if self._guard is not None:
            self._guard.stopped(matched, engine_length)
            self._plain = None
            self._before_stop = self._begun, self._cut

    def _finish(self, last: int | None, cut: bool) -> None:
        if last is not None:
            if self._options.include_stop:
                self._feed(last)
            elif last in self._special:
                self._structure(last, "")
        if self._stream.waits:
            self._text(self._stream.cut() if cut else self._stream.flush())
        if self._mode != "content":
            if self._mode == "channel":
                self._label = None  # the output was cut within the label, so the channel has said nothing
            self._leave()
        if self._forced is not None:
            self._forced.end()
        if self._guard is not None:
            kept = self._guard.finish()
            self._events += kept
            if self._before_stop is not None:  # what came behind the stop string counts for nothing
                self._begun = self._before_stop[0] + sum(bool(event.name) for event in kept)
                self._cut = self._before_stop[1] or any(event.cut for event in kept)

    def _drain(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _structure(self, token: int, text: str) -> bool:
        """Follow a token of the output's structure; False for every other special token."""
        if token in (tokens.CHANNEL_OPEN, tokens.CHANNEL_CLOSE):
            if not self._options.reasoning and self._options.special_text:
                return False
            if token == tokens.CHANNEL_OPEN:
                self._break()
                self._mode, self._label = "channel", ""
            elif self._mode != "call":
                self._leave()
            return True  # a stray close is absorbed
        if token in (tokens.TOOL_CALL_OPEN, tokens.TOOL_CALL_CLOSE):
            # A call is never reasoning, even where it is not parsed.
            self._leave(closed=token == tokens.TOOL_CALL_CLOSE)
            if self._options.tools is Tools.OFF:
                return not self._options.special_text
            if token == tokens.TOOL_CALL_OPEN:
                self._break()
                self._mode, self._native = "call", NativeCall(self)
            return True
        if token in tokens.TURN_ENDS:
            self._break()
            if token == tokens.TURN_OPEN and not self._options.special_text:
                self._mode, self._label = "header", ""
                return True
        return token == tokens.QUOTE and self._native is not None and self._native.quote(text)

    def _text(self, text: str) -> None:
        if not text:
            return
        if self._mode == "channel":
            self._channel(text)
        elif self._mode == "header":
            self._header(text)
        elif self._native is not None:
            self._native.text(text)
        elif self._forced is not None:
            self._forced.text(text)
        else:
            self.content(text)

    def _channel(self, text: str) -> None:
        if self._label is not None:
            text = self._label + text
            if text != _LABEL_LINE and _LABEL_LINE.startswith(text):
                self._label = text
                return
            self._label = None
            said = text.removeprefix(_LABEL_LINE)
            text = text[self._known :] if said == text else said
        self._reasoning(text)

    def _header(self, text: str) -> None:
        text = f"{self._label}{text}"
        role, newline, rest = text.partition("\n")
        if not newline and any(known.startswith(role) for known in tokens.ROLES):
            self._label = text
            return
        self._mode, self._label = "content", None
        self._text(rest if newline and role in tokens.ROLES else text)

    def _break(self) -> None:
        """End all that is open, for something else begins: also a call of a forced choice."""
        self._leave()
        if self._forced is not None:
            self._forced.leave()

    def _leave(self, closed: bool = False) -> None:
        """End the channel, the call or the header that is open.

        Args:
            closed: a call, by its own mark.
        """
        if self._mode == "channel":
            if self._label and self._label != tokens.LABEL:
                self._reasoning(self._label[self._known :])
            self._known = 0
        elif self._native is not None:
            self._native.end(closed)
            self._native = None
        self._mode, self._label = "content", None
        self._silent = False

    def _reasoning(self, text: str) -> None:
        if not self._options.reasoning:
            self.content(text)
        elif text and self._options.include_reasoning:
            self._emit(Event("reasoning", text))

    def _emit(self, event: Event) -> None:
        if self._guard is None:
            self._events.append(event)
        else:
            self._events += self._guard.push(event)

    # The sink of the call readers.

    def content(self, text: str) -> None:
        if text and not self._silent:
            self._emit(Event("content", text))

    def begin_call(self, name: str) -> None:
        self._begun += 1
        self._silent = self._begun > 1 and not self._options.parallel_calls
        if not self._silent:
            self._emit(Event("call", "", self._begun - 1, name))

    def arguments(self, json: str) -> None:
        if json and not self._silent:
            self._emit(Event("call", json, self._begun - 1))

    def end_call(self, complete: bool) -> None:
        if not complete and not self._silent:
            self._cut = True
            self._emit(Event("call", "", self._begun - 1, cut=True))

    def lose_call(self) -> None:
        self._cut |= self._begun == 0 or self._options.parallel_calls


def _gather(pieces: list[Piece], events: list[Event], token_ids: list[int]) -> None:
    """Add events, and the tokens that brought them about, which are taken out of ``token_ids``."""
    piece = pieces[-1]
    for event in events:
        if piece.kind != event.kind:
            if piece.kind is not None:
                piece = _piece()
                pieces.append(piece)
            piece.kind = event.kind
        if event.kind == "call":
            piece.calls.append(event)
        else:
            piece.texts.append(event.text)
        piece += token_ids
        token_ids.clear()
