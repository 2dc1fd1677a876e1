"""The state machine against the reference, over arbitrary sequences of control and text tokens.

A few hundred examples each; `make fuzz` asks the same reference millions of times."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from vllm_gemma4_spec.chat.machine import Options, OutputParser, Tools
from vllm_gemma4_spec.chat.results import Choice, Message
from vllm_gemma4_spec.chat.tokens import CONTROL_TOKENS, Vocabulary, vocabulary

from . import reference
from .reference import CALL, CHANNEL, END_CALL, END_CHANNEL, QUOTE, read_json

# The words the sequences are made of: every control token, and texts that matter to one of the states.
CONTROL = [CALL, END_CALL, QUOTE, CHANNEL, END_CHANNEL, 106, 105, 50, 51, 46, 98, 0, 2]
TEXTS = [
    *(
        "thought\n",
        "thought",
        "\n",
        "tho",
        "thoughts\n",
        " ",
        "Hi é中",
        "😀",
        "call:",
        "call:f{",
        "f",
        "a:",
        "a",
        ":",
        ",",
    ),
    *("{", "}", "[", "]", "{}", "1", "-2.5e3", "01", "true", "null", "None", "nan", '"', '"x"', "\\", '\\"', "\\u00e9"),
    *("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>', "<turn|>", "<", "|", '{"a": "b"}'),
]


_BYTE = re.compile(r"<0x[0-9A-F]{2}>\Z")


class Subject:
    """A tokenizer with the sequences' words as ids."""

    def __init__(self, tokenizer: Any) -> None:
        self.vocabulary: Vocabulary = vocabulary(tokenizer)
        self.decode = lambda ids: tokenizer.decode(ids, skip_special_tokens=False)
        pieces = [[t] for t in CONTROL]
        for text in TEXTS:
            ids = [t for c in text for t in tokenizer.encode(c, add_special_tokens=False)]
            assert not set(ids) & set(self.vocabulary.special)
            assert self.decode(ids) == text
            pieces.append(ids)
        self.sequences = st.lists(st.sampled_from(pieces), max_size=30).map(lambda p: [t for ids in p for t in ids])
        # Calls that are often right: random words seldom are.
        quoted = st.sampled_from(pieces[len(CONTROL) :]).map(lambda ids: [QUOTE, *ids, QUOTE])
        head = [t for c in "call:f{a:" for t in tokenizer.encode(c, add_special_tokens=False)]
        brace = tokenizer.encode("}", add_special_tokens=False)
        call = st.one_of(quoted, self.sequences).map(lambda v: [CALL, *head, *v, *brace, END_CALL])
        self.outputs = st.lists(st.one_of(call, self.sequences), max_size=4).map(
            lambda p: [t for ids in p for t in ids]
        )
        # Any token; bytes as those of whole characters.
        core = self.vocabulary.core
        self.byte = lambda t: reference.byte_of(core.id_to_token(t))
        ids = {token_id for piece, token_id in core.get_vocab().items() if not _BYTE.match(piece)}
        characters = st.characters(exclude_categories=["Cs"]).map(
            lambda c: [core.token_to_id(f"<0x{b:02X}>") for b in c.encode()]
        )
        self.anything = st.lists(
            st.one_of(st.sampled_from(sorted(ids)).map(lambda t: [t]), characters, st.sampled_from(pieces))
        ).map(lambda p: [t for ids in p for t in ids])


@pytest.fixture(scope="module")
def subject(tokenizer: Any) -> Subject:
    return Subject(tokenizer)


def output(tokens: Sequence[int], finish: str | None = "length", text: str = "", stop: str | None = None) -> Any:
    return SimpleNamespace(token_ids=list(tokens), text=text, finish_reason=finish, stop_reason=stop)


def parse(subject: Subject, tokens: Sequence[int], options: Options, prompt: Sequence[int] = ()) -> Message:
    parser = OutputParser(subject.vocabulary, options, prompt)
    return Choice(parser, calls_finish=True).message(output(tokens))


def compare(message: Message, meaning: reference.Meaning) -> None:
    assert message.reasoning == meaning.reasoning
    assert message.content == meaning.content
    assert [[c.name, read_json(c.arguments)] for c in message.tool_calls] == meaning.calls
    assert (not any(c.cut for c in message.tool_calls)) == meaning.whole
    assert message.finish_reason == meaning.finish("length")


@given(data=st.data(), reasoning=st.booleans(), tools=st.booleans(), shown=st.booleans(), parallel=st.booleans())
@settings(max_examples=250, deadline=None)
def test_agrees_with_the_reference(
    subject: Subject, data: st.DataObject, reasoning: bool, tools: bool, shown: bool, parallel: bool
) -> None:
    tokens = data.draw(subject.outputs)
    prompt = data.draw(st.one_of(st.just([]), subject.sequences))
    options = Options(reasoning=reasoning, tools=Tools.AUTO if tools else Tools.OFF, special_text=shown)
    options = options._replace(parallel_calls=parallel)
    meaning = reference.understand(
        tokens,
        subject.decode,
        subject.vocabulary.special,
        prompt=prompt,
        reasoning=reasoning,
        tools=tools,
        shown=shown,
        parallel=parallel,
        byte=subject.byte,
    )
    compare(parse(subject, tokens, options, prompt), meaning)


@given(data=st.data(), seen=st.booleans())
@settings(max_examples=100, deadline=None)
def test_any_tokens_of_the_vocabulary(subject: Subject, data: st.DataObject, seen: bool) -> None:
    """Not only the words above: any token, bytes of characters as well; also where its text is known by now."""
    tokens = data.draw(subject.anything)
    if seen:
        for token in tokens:
            _ = subject.vocabulary.texts[token]
    else:
        subject.vocabulary.texts.clear()
    meaning = reference.understand(tokens, subject.decode, subject.vocabulary.special, byte=subject.byte)
    compare(parse(subject, tokens, Options()), meaning)


OPTIONS = st.builds(
    Options,
    reasoning=st.booleans(),
    include_reasoning=st.booleans(),
    tools=st.sampled_from(Tools),
    tool_name=st.just("f"),
    parallel_calls=st.booleans(),
    special_text=st.booleans(),
    stop=st.sampled_from([(), ("never matches",), ("no", "neither does this")]),
)


@given(data=st.data(), options=OPTIONS)
@settings(max_examples=150, deadline=None)
def test_any_cut_gives_the_same(subject: Subject, data: st.DataObject, options: Options) -> None:
    tokens = data.draw(subject.outputs)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=6)))
    one_by_one = cut_up(subject, tokens, range(len(tokens)), options)
    assert cut_up(subject, tokens, cuts, options) == one_by_one
    assert parse(subject, tokens, options) == one_by_one


def cut_up(subject: Subject, tokens: list[int], cuts: Sequence[int], options: Options) -> Message:
    """The message of an output that came in several deltas."""
    choice = Choice(OutputParser(subject.vocabulary, options), calls_finish=True)
    message, counted = Message(), 0
    for start, end in zip([0, *cuts], [*cuts, len(tokens)], strict=True):
        for piece in choice.pieces(output(tokens[start:end], None)):
            assert not (piece.texts and piece.calls)
            counted += len(piece)
            message.add(piece)
    for piece in choice.pieces(output([])):
        message.add(piece)
    message.finish_reason = choice.finish_reason("length")
    assert counted == len(tokens)
    return message


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_nothing_is_lost_or_doubled(subject: Subject, data: st.DataObject) -> None:
    """Without calls, reasoning and content together are the text of all ordinary tokens, labels apart."""
    tokens = [t for t in data.draw(subject.outputs) if t != CHANNEL]
    special = subject.vocabulary.special
    message = parse(subject, tokens, Options(tools=Tools.OFF))
    runs, run = [], []
    for token in [*tokens, 0]:
        if token in special:
            runs.append(subject.decode(run))
            run = []
        else:
            run.append(token)
    assert message.content == "".join(runs)
    assert message.reasoning == ""


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_no_text_of_control_tokens(subject: Subject, data: st.DataObject) -> None:
    looks = [t for c in "<>|" for t in subject.vocabulary.core.encode(c, add_special_tokens=False).ids]
    tokens = [t for t in data.draw(subject.outputs) if t not in looks]
    if any(mark in subject.decode([t]) for t in tokens for mark in "<>|" if t not in subject.vocabulary.special):
        return
    message = parse(subject, tokens, Options())
    everything = message.reasoning + message.content + "".join(c.name + c.arguments for c in message.tool_calls)
    assert not any(text in everything for text in CONTROL_TOKENS)


@given(data=st.data(), include=st.booleans(), shown=st.booleans(), reasoning=st.booleans())
@settings(max_examples=250, deadline=None)
def test_stop_strings(subject: Subject, data: st.DataObject, include: bool, shown: bool, reasoning: bool) -> None:
    """The engine has cut the content at a stop string; the parser cuts at the same character, whatever the delta."""
    tokens = data.draw(subject.outputs)
    special = subject.vocabulary.special
    how: dict[str, Any] = {"shown": shown, "include_reasoning": reasoning}
    seen = reference.understand(tokens, subject.decode, special, **how).seen()
    text = data.draw(st.sampled_from([t for kind, t in seen if t and kind == "content"] or [""]))
    if len(text) < 2:
        return
    at = data.draw(st.integers(0, len(text) - 1))
    stop = text[at : at + data.draw(st.integers(1, 4))]
    meaning = reference.understand(tokens, subject.decode, special, stop=stop, include_stop=include, **how)
    # One character stands where another text begins.
    engine = sum(len(t) for kind, t in meaning.seen() if kind == "content") + max(0, len(meaning.seen()) - 1)
    options = Options(
        stop=(stop, "never matches"), include_stop=include, special_text=shown, include_reasoning=reasoning
    )
    # In the first delta the engine has given out what cannot be part of a match any more; here: nothing.
    cut = data.draw(st.integers(0, len(tokens)))
    before = reference.understand(tokens[:cut], subject.decode, special, **how)
    if any(stop in t for kind, t in before.seen() if kind == "content"):
        cut = 0
    choice = Choice(OutputParser(subject.vocabulary, options), calls_finish=True)
    message = Message()
    for piece in choice.pieces(output(tokens[:cut], None)):
        message.add(piece)
    for piece in choice.pieces(output(tokens[cut:], "stop", "x" * engine, stop)):
        message.add(piece)
    assert message.reasoning == meaning.reasoning
    assert message.content == meaning.content
    assert [[c.name, read_json(c.arguments)] for c in message.tool_calls] == meaning.calls


def test_bytes_of_a_character_in_several_tokens(subject: Subject) -> None:
    core = subject.vocabulary.core
    whole = [core.token_to_id(f"<0x{b:02X}>") for b in "日😀".encode()]
    assert parse(subject, whole, Options()).content == "日😀"
    assert parse(subject, [CHANNEL, *whole[:4]], Options()).reasoning == "日"  # cut inside the second
    spoiled = [*whole[:4], *whole[:3], END_CHANNEL]
    assert parse(subject, spoiled, Options()).content.startswith("日")


def test_bytes_that_are_no_text_cost_no_more(subject: Subject) -> None:
    token = subject.vocabulary.core.token_to_id("<0xFF>")
    assert parse(subject, [token] * 8000, Options()).content == "\ufffd" * 8000


@example(["a", "b"])
@given(st.lists(st.text(max_size=5), min_size=1, max_size=4))
@settings(max_examples=30, deadline=None)
def test_required_and_named_choices(subject: Subject, values: list[str]) -> None:
    """JSON of any content, token by token, is what json.loads makes of it; cut anywhere it stays JSON."""
    calls = [{"name": f"f{i}", "parameters": {"v": v, "n": [i, {"x": None}]}} for i, v in enumerate(values)]
    for text in (json.dumps(calls), json.dumps(calls, ensure_ascii=False, indent=1)):
        tokens = subject.vocabulary.core.encode(text, add_special_tokens=False).ids
        if set(tokens) & set(subject.vocabulary.special) or subject.decode(tokens) != text:
            return
        message = parse(subject, tokens, Options(tools=Tools.REQUIRED))
        assert [(c.name, json.loads(c.arguments)) for c in message.tool_calls] == [
            (c["name"], c["parameters"]) for c in calls
        ]
        assert message.content == ""
        assert message.finish_reason == "tool_calls"
        for end in range(0, len(tokens), 3):
            part = parse(subject, tokens[:end], Options(tools=Tools.REQUIRED))
            for call in part.tool_calls:
                json.loads(call.arguments)
        named = subject.vocabulary.core.encode(json.dumps(calls[0]), add_special_tokens=False).ids
        message = parse(subject, named, Options(tools=Tools.NAMED, tool_name="g"))
        assert [(c.name, json.loads(c.arguments)) for c in message.tool_calls] == [("g", calls[0])]


@pytest.mark.parametrize("tools", [Tools.REQUIRED, Tools.NAMED])
def test_forced_choice_without_json_is_content(subject: Subject, tools: Tools) -> None:
    tokens = subject.vocabulary.core.encode('Sorry, no. [{"name"', add_special_tokens=False).ids
    message = parse(subject, tokens, Options(tools=tools, tool_name="g"))
    assert message.content == 'Sorry, no. [{"name"'
    assert message.tool_calls == []


def test_one_call_only(subject: Subject, encode: Any) -> None:
    tokens = encode("<|tool_call>call:f{}<tool_call|><|tool_call>call:g{a:1}<tool_call|>")
    message = parse(subject, tokens, Options(parallel_calls=False))
    assert [c.name for c in message.tool_calls] == ["f"]
