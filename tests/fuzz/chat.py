"""Chat output: arbitrary token sequences, arbitrary deltas, every option.

The words are those of the property tests, so that random sequences reach the states that matter.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from tests.chat import reference
from tests.chat.reference import MARK, Pairs, read_json
from tests.chat.test_machine import CONTROL, TEXTS
from tests.chat.tokenizer import small_tokenizer_json
from tests.fuzz.source import Source, pieces
from vllm_gemma4_spec.chat.arguments import Arguments
from vllm_gemma4_spec.chat.detokenize import TextStream
from vllm_gemma4_spec.chat.events import BOUNDARY, Event, SeenText
from vllm_gemma4_spec.chat.machine import Options, OutputParser, Tools
from vllm_gemma4_spec.chat.results import Choice, Message
from vllm_gemma4_spec.chat.stops import StopGuard
from vllm_gemma4_spec.chat.tokens import Vocabulary, vocabulary

MORE_TEXTS = [
    "name",
    "parameters",
    '[{"name": "f", "parameters": ',
    '{"name"',
    "}, {",
    "}]",
    "e",
    "E+",
    ".",
    "-",
    "0",
    "u",
    "n",
]
MORE_TEXTS += [
    "model\n",
    "mo",
    "user\n",
    "call:g{}",
    "call:g({",
    ":g{",
    '"a" or "b"',
    '"a, b"',
    "1e400",
    "\\ud83d",
    "\\ude00",
    "9" * 99,
]
MORE_TEXTS += ["é", "中", "�", "\x00", "\u2028", "'", "\t", "\r\n", "call:g{", "thought", "n:", "null", "]", "}", "'"]


class Words:
    """A word for every byte: control tokens, texts, single bytes of characters."""

    def __init__(self) -> None:
        from tokenizers import Tokenizer

        self.core: Any = Tokenizer.from_str(json.dumps(small_tokenizer_json()))
        self.vocabulary: Vocabulary = vocabulary(SimpleNamespace(_tokenizer=self.core))
        self.special = self.vocabulary.special
        texts = [self.encode(t) for t in TEXTS + MORE_TEXTS]
        self.first_byte: int = self.core.token_to_id("<0x00>")
        texts += [[self.first_byte + b for b in c.encode()] for c in "日😀é"]
        words = [[t] for t in CONTROL] * 3 + texts
        self.words = [words[i % len(words)] for i in range(256)]
        self.texts = [w for w in self.words if w[0] not in self.special]
        self.spelled = [self.decode(w) for w in self.texts]

    def encode(self, text: str) -> list[int]:
        return [t for c in text for t in self.core.encode(c, add_special_tokens=False).ids]

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.core.decode(list(ids), skip_special_tokens=False)) if ids else ""

    def byte(self, token: int) -> int | None:
        code = token - self.first_byte
        return code if 0 <= code < 256 else None

    def tokens(self, data: bytes) -> list[int]:
        words = self.words
        return [t for b in data for t in words[b]]


@functools.cache
def words() -> Words:
    return Words()


def output(tokens: Sequence[int], finish: str | None = None, text: str = "", stop: str | None = None) -> Any:
    return SimpleNamespace(token_ids=list(tokens), text=text, finish_reason=finish, stop_reason=stop)


def read(options: Options, prompt: Sequence[int], deltas: Sequence[Any]) -> Message:
    """The message of one choice, delta by delta; every token is counted once, every piece is of one kind, and nothing
    stands between the events of a call."""
    choice = Choice(OutputParser(words().vocabulary, options, prompt), calls_finish=True)
    message, counted, going_on = Message(), 0, -1
    for delta in deltas:
        for piece in choice.pieces(delta):
            assert not (piece.texts and piece.calls)
            counted += len(piece)
            for event in piece.calls:
                assert event.name or event.call == going_on, "of a call that is over"
                going_on = -1 if event.cut else event.call
            if piece.texts:
                going_on = -1
            message.add(piece)
    assert counted == sum(len(d.token_ids) for d in deltas), "a token was counted twice or not at all"
    message.finish_reason = choice.finish_reason(deltas[-1].finish_reason)
    for call in message.tool_calls:
        assert isinstance(strict(call.arguments), dict)
    return message


def strict(text: str) -> Any:
    """JSON and nothing beyond it."""
    return json.loads(text, parse_constant=_refuse, parse_int=str, parse_float=str)


def _refuse(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


def agree(message: Message, meaning: reference.Meaning) -> None:
    assert message.reasoning == meaning.reasoning, (message.reasoning, meaning.reasoning)
    assert message.content == meaning.content, (message.content, meaning.content)
    got = [[c.name, read_json(c.arguments)] for c in message.tool_calls]
    assert got == meaning.calls, (got, meaning.calls)
    assert (not any(c.cut for c in message.tool_calls)) == meaning.whole


def machine(data: bytes) -> None:
    """Any tokens, any options: the same however they are cut, and what the reference makes of them."""
    source, w = Source(data), words()
    flags = source.byte()
    tools = (Tools.AUTO, Tools.AUTO, Tools.OFF, Tools.AUTO)[flags & 3]
    options = Options(
        reasoning=not flags & 4,
        include_reasoning=flags & 24 != 24,
        tools=tools,
        parallel_calls=flags & 96 != 96,
        special_text=bool(flags & 128),
    )
    cuts = source.cuts(600)
    prompt = w.tokens(bytes(source.byte() for _ in range(source.below(6))))
    tokens = w.tokens(source.rest())
    cuts = [min(c, len(tokens)) for c in cuts]
    whole = read(options, prompt, [output(tokens, "length")])
    parts = pieces(tokens, cuts)
    streamed = read(options, prompt, [output(p) for p in parts[:-1]] + [output(parts[-1], "length")])
    assert streamed == whole, (streamed, whole)
    meaning = reference.understand(
        tokens,
        w.decode,
        w.special,
        prompt=prompt,
        reasoning=options.reasoning,
        tools=tools is Tools.AUTO,
        shown=options.special_text,
        include_reasoning=options.include_reasoning,
        parallel=options.parallel_calls,
        byte=w.byte,
    )
    agree(whole, meaning)
    assert whole.finish_reason == meaning.finish("length")


def forced(data: bytes) -> None:
    """``tool_choice`` required or named: the JSON is split into calls, all other text is content."""
    source, w = Source(data), words()
    flags = source.byte()
    named = bool(flags & 1)
    options = Options(tools=Tools.NAMED if named else Tools.REQUIRED, tool_name="g")
    tokens: list[int] = []
    if flags & 2:  # begin as the grammar does
        tokens += w.encode("{" if named else '[{"name": "f", "parameters": {')
    cuts = source.cuts(600)
    marks = bool(flags & 4)  # where no grammar is applied
    tokens += w.tokens(source.rest()) if marks else [t for b in source.rest() for t in w.texts[b % len(w.texts)]]
    tokens = reference._whole_characters(tokens, w.byte)
    cuts = [min(c, len(tokens)) for c in cuts]
    whole = read(options, (), [output(tokens, "length")])
    parts = pieces(tokens, cuts)
    streamed = read(options, (), [output(p) for p in parts[:-1]] + [output(parts[-1], "length")])
    assert streamed == whole, (streamed, whole)
    if marks:
        return
    text = w.decode(tokens)
    if not whole.tool_calls:
        # Syntax of a call that never came, and space before it, is the only text that may be missing.
        begun = not named and not whole.content and re.match(r"\s*(\[|$)", text)
        assert begun or whole.content in (text, text.lstrip(reference.SPACE)), (whole.content, text)
    elif named:
        meaning = reference.Meaning()
        pairs = Pairs()
        call = ["g", pairs, True]
        meaning.parts.append(("call", call))
        body = text.lstrip(reference.SPACE)
        try:
            meaning.say("content", body[reference._object(body, 1, pairs, native=False) :].lstrip(reference.SPACE))
        except reference.CutCallError:
            call[2] = False
        except reference.BrokenCallError as broken:
            call[2] = False
            meaning.say("content", body[broken.args[0] :])
        agree(whole, meaning.sum_up())
    try:
        wanted = json.loads(text, parse_constant=_refuse)
    except (ValueError, AssertionError):
        return
    if named and isinstance(wanted, dict):
        assert [c.name for c in whole.tool_calls] == ["g"]
        assert whole.content == ""


def arguments(data: bytes) -> None:
    """One object of arguments: always JSON, whatever was read of it and however it was cut."""
    source, w = Source(data), words()
    quote_at = source.byte() | 1
    texts = w.spelled
    symbols: list[str] = list("{") if source.byte() & 1 else []
    for b in source.rest():
        symbols += [MARK] if b % 16 == quote_at % 16 else [*texts[b % len(texts)]]
    one_by_one = _arguments(symbols)
    runs: list[str] = []
    for s in symbols:
        if runs and s != MARK and runs[-1] != MARK:
            runs[-1] += s
        else:
            runs.append(s)
    joined = _arguments(runs)
    assert joined == one_by_one, (joined, one_by_one)
    assert isinstance(strict(joined[0]), dict)
    body = "".join(symbols)
    joined = (*joined[:2], joined[2].replace(MARK, ""))  # whether quote tokens are shown is not decided here
    begin = len(body) - len(body.lstrip(reference.SPACE))
    if body[begin : begin + 1] != "{":
        assert joined[0] == "{}"
        return
    pairs = Pairs()
    cut = False
    try:
        whole, rest = True, body[reference._object(body, begin + 1, pairs) :].replace(MARK, "").lstrip(reference.SPACE)
    except reference.CutCallError:
        whole, rest, cut = False, "", True
    except reference.BrokenCallError as broken:
        whole, rest = False, body[broken.args[0] :].replace(MARK, "")
    got = joined[2].lstrip(reference.SPACE) if whole else joined[2]
    assert (joined[1], got if not cut else "") == (whole, rest), (joined, body)
    assert read_json(joined[0]) == pairs, (joined[0], pairs)
    json.dumps(json.loads(joined[0], parse_int=str, parse_float=str), ensure_ascii=False).encode()


def _arguments(parts: Sequence[str]) -> tuple[str, bool, str]:
    """JSON, whether it was read to the last brace, and the text that is not in it."""
    arguments, out = Arguments(), ""
    for i, part in enumerate(parts):
        if part == MARK:
            json_text = arguments.quote()
            if json_text is not None:
                out += json_text
                continue
            rest = "".join(parts[i:])
        else:
            json_text, rest = arguments.text(part)
            out += json_text
            if not rest:
                continue
            rest += "".join(parts[i + 1 :])
        if arguments.complete:
            return out, True, rest.lstrip(reference.SPACE)
        closing, unsaid = arguments.close(cut=False)
        return out + closing, False, unsaid + rest
    if arguments.complete:
        return out, True, ""
    closing, _ = arguments.close(cut=True)
    return out + closing, False, ""


def stop_strings(data: bytes) -> None:
    """The engine searches the text that is seen, and stops there: the answer ends there, whatever the deltas."""
    source, w = Source(data), words()
    flags = source.byte()
    include, shown = bool(flags & 1), bool(flags & 2)
    at, length = source.byte() << 8 | source.byte(), 1 + source.below(5)
    extra = source.below(4)
    how: dict[str, Any] = {"shown": shown, "include_reasoning": flags & 12 != 12, "parallel": flags & 48 != 48}
    cuts = source.cuts(600)
    prompt = w.tokens(bytes(source.byte() for _ in range(source.below(4))))
    tokens = w.tokens(source.rest())
    tokens = [t for t in tokens if t in w.special or w.vocabulary.texts[t]]  # a token at a time, no bytes
    options = Options(
        include_stop=include,
        special_text=shown,
        include_reasoning=how["include_reasoning"],
        parallel_calls=how["parallel"],
    )
    # What the engine sees, token by token, as its detokenizer does.
    engine, seen, texts = OutputParser(w.vocabulary, options, prompt), SeenText(), []
    for token in tokens:
        texts.append(seen.add_all(engine.feed(token)))
    text = "".join(texts)
    if len(text) < 2:
        return
    at %= len(text)
    stop = text[at : at + length].strip(BOUNDARY).partition(BOUNDARY)[0]
    found = text.find(stop)
    if not stop:
        return
    # The token that completes the stop string is in the last delta, with up to `extra` more behind it.
    last, length = 0, 0
    while length + len(texts[last]) < found + len(stop):
        length += len(texts[last])
        last += 1
    tokens = tokens[: last + 1 + extra]
    cuts = [min(c, last) for c in cuts]
    parts = pieces(tokens, cuts)
    options = options._replace(stop=(stop, "never matches"))
    given = "x" * (found + (len(stop) if include else 0))
    deltas = [output(p) for p in parts[:-1]] + [output(parts[-1], "stop", given, stop)]
    meaning = reference.understand(tokens, w.decode, w.special, prompt=prompt, stop=stop, include_stop=include, **how)
    agree(read(options, prompt, deltas), meaning)


def guard(data: bytes) -> None:
    """The stop guard by itself: it lets events through in order, whole, and up to the match."""
    source = Source(data)
    stops = tuple("".join(source.pick("ab<|") for _ in range(1 + source.below(4))) for _ in range(1 + source.below(3)))
    flags = source.byte()
    include, quick = bool(flags & 1), bool(flags & 2)
    events = []
    while source.left and len(events) < 200:
        b = source.byte()
        spelled = "".join("ab<|"[b >> i & 3] for i in range(0, 1 + b % 5, 2))
        events.append(
            Event("call", spelled) if b & 192 == 192 else Event("content" if b & 128 else "reasoning", spelled)
        )
    seen = SeenText()
    texts = [seen.add(e) for e in events]
    text = "".join(texts)
    matches = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
    held = StopGuard(stops, include)
    out: list[Event] = []
    end, begin, stop = min(matches) if matches else (len(text) + 1, 0, "")
    length = 0
    for event, own in zip(events, texts, strict=True):
        length += len(own)
        if length >= end:
            held.stopped(stop, begin + (len(stop) if include else 0))
        if quick and event.kind != "call" and held.takes(event.kind):
            out.append(event._replace(text=held.push_text(event.text)))
        else:
            out += held.push(event)
        if length >= end:
            break
    out += held.finish()
    got = [(e.kind, e.text) for e in out if e.text]
    wanted, left = [], len(text) if not matches else end if include else begin
    for event, own in zip(events, texts, strict=True):
        if event.kind != "content":
            # One that stands at the cut is in front of the stop string, not behind it.
            if left > len(own) or (left >= len(own) and not (include and matches)):
                wanted.append((event.kind, event.text))
            left -= len(own)
            continue
        shown = own[: max(0, left)].lstrip(BOUNDARY)
        left -= len(own)
        if shown:
            wanted.append((event.kind, shown))
    assert _runs(got) == _runs(wanted), (got, wanted, stop)


def _runs(parts: list[tuple[Any, str]]) -> list[tuple[Any, str]]:
    """Neighbours of one kind joined."""
    return [(kind, "".join(t for _, t in run)) for kind, run in itertools.groupby(parts, lambda p: p[0])]


def text(data: bytes) -> None:
    """Ids to text, one at a time: what decoding them together gives, or more where bytes are no text."""
    source, w = Source(data), words()
    tokens, plain = [], b""
    while source.left:
        b = source.byte()
        if b & 1:
            tokens.append(w.first_byte + source.byte())
            plain += bytes([tokens[-1] - w.first_byte])
        else:
            at = (b >> 1) % len(w.texts)
            tokens += w.texts[at]
            plain += w.spelled[at].encode()
    stream = TextStream(w.vocabulary)
    out = "".join(stream.push(t) for t in tokens) + stream.flush()
    whole = w.decode(tokens)
    if "\ufffd" not in whole:
        assert out == whole
    # Bytes that are no text spoil their neighbours when decoded together, less so one by one.
    assert _within(whole, out), (out, whole)
    assert _within(out, plain.decode(errors="replace")), (out, plain)


def _within(one: str, other: str) -> bool:
    """The characters of ``one`` are in ``other``, in order; U+FFFD apart."""
    rest = iter(other)
    return all(c in rest for c in one if c != "\ufffd")
