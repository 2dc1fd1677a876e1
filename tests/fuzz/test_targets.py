"""A short form of the fuzzing: fixed seeds, every target; and what its long runs found."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.chat.reference import CALL, CHANNEL, END_CHANNEL, END_TURN, QUOTE
from tests.fuzz.chat import output, read, words
from tests.fuzz.child import mutation
from tests.fuzz.shapes import parse, shapes
from tests.fuzz.targets import TARGETS
from vllm_gemma4_spec.chat.machine import Options

# Cases per target: about a tenth of a second each.
CASES = {"machine": 150, "forced": 100, "stop-strings": 300, "plan": 30, "checkpoint": 300}
PAD = 0
SHAPES = list(shapes(words()))


@pytest.mark.parametrize("name", TARGETS)
def test_invariants_hold_for_random_inputs(name: str) -> None:
    target, longest = TARGETS[name].load(), TARGETS[name].longest
    rng = random.Random(name)
    corpus = [rng.randbytes(rng.randrange(longest)) for _ in range(20)]
    for _ in range(CASES.get(name, 1000)):
        data = mutation(rng, corpus)[:longest]
        try:
            target(data)
        except Exception as error:
            raise AssertionError(f"{name}({data!r})") from error


@pytest.mark.parametrize("shape", SHAPES)
def test_long_outputs_of_every_shape_are_parsed(shape: str) -> None:
    parse(shapes(words())[shape](1500), 3)


def message(tokens: list[int], prompt: list[int] | None = None, **options: Any) -> Any:
    return read(Options(**options), prompt or [], [output(tokens, "length")])


def test_a_replacement_character_of_the_model_spoils_no_character_after_it() -> None:
    tokens = [words().first_byte + b for b in "\ufffd😀".encode()]
    assert message(tokens).content == "\ufffd😀"


def test_a_quoted_key_that_is_cut_is_no_content() -> None:
    w = words()
    tokens = [CALL, *w.encode("call:f{"), QUOTE, *w.encode("\tkey")]
    assert message(tokens).content == ""
    assert message(tokens, special_text=True).content == ""


def test_text_of_the_prompt_is_never_in_the_answer() -> None:
    w = words()
    for inside in ("tho", "thought\n", "I think"):
        prompt = [CHANNEL, *w.encode(inside)]
        assert message([], prompt).reasoning == ""
        assert message(w.encode("X"), prompt).reasoning == "X"
        assert message(w.encode("X"), prompt, stop=("a stop string",)).reasoning == "X"
    assert message(w.encode("ught\nX"), [CHANNEL, *w.encode("tho")]).reasoning == "X"


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_is_found_neither_in_the_label_nor_in_reasoning(include: bool, shown: bool) -> None:
    w = words()
    said = [*w.encode("a ught b"), END_CHANNEL, *w.encode("c ught d")]
    label = w.encode("thought\n")
    for inside in ([], [PAD], [PAD, *w.encode("tho"), PAD]):
        known = len([t for t in inside if t != PAD])
        for cut in range(len(label) - known):
            tokens = [*label[known:], *said]
            options = Options(stop=("ught",), include_stop=include, special_text=shown)
            engine = "x" * (3 + (4 if include else 0))  # a character stands where reasoning does
            deltas = [output(tokens[:cut]), output(tokens[cut:], "stop", engine, "ught")]
            answer = read(options, [CHANNEL, *inside], deltas)
            assert (answer.reasoning, answer.content) == ("a ught b", "c ught" if include else "c ")


def test_special_tokens_of_a_prompt_are_no_text_whatever_the_request_shows() -> None:
    tokens = words().encode("thought\nX")
    for shown in (False, True):
        assert message(tokens, [CHANNEL, PAD], special_text=shown).reasoning == "X"


def test_a_channel_that_is_closed_within_the_label_said_that() -> None:
    w = words()
    for tokens in ([*w.encode("thou"), END_CHANNEL], [*w.encode("thou"), CHANNEL], [*w.encode("thou"), END_TURN]):
        assert message([CHANNEL, *tokens]).reasoning == "thou"
    assert message([CHANNEL, *w.encode("thou")]).reasoning == ""  # cut there by its length


def test_arguments_nest_no_deeper_than_parsers_read() -> None:
    w = words()
    made = message([CALL, *w.encode("call:f{" + "a:{" * 150)])
    (call,) = made.tool_calls
    assert call.arguments.count("{") == 100
    assert call.cut
    assert made.content == "a:{" * 51
