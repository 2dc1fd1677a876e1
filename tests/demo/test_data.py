"""The synthetic dialogues: reproducible, split for good, and written as vLLM's Gemma 4 parsers read them."""

from __future__ import annotations

import re
from itertools import islice, pairwise
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from vllm_gemma4_spec.demo import data, measure
from vllm_gemma4_spec.demo.template import chat_template, prompt_text

KINDS = {"arithmetic", "counting", "listing", "capital", "tool call", "tool answer"}


def some(held_out: bool, count: int = 400, seed: int = 3) -> list[data.Dialogue]:
    return list(islice(data.dialogues(seed, held_out), count))


def question(d: data.Dialogue) -> str:
    return "\n".join(str(m["content"]) for m in d.messages if m["role"] != "system")


def test_a_seed_gives_the_same_dialogues() -> None:
    assert some(False) == some(False)
    assert some(False) != some(False, seed=4)


def test_no_question_is_on_both_sides() -> None:
    trained = {question(d) for d in some(False, 3000)}
    asked = {question(d) for d in some(True, 600)}
    assert len(asked) > 100
    assert not trained & asked


@pytest.mark.parametrize("held_out", [False, True])
def test_both_sides_have_all_kinds_with_and_without_thinking(held_out: bool) -> None:
    assert {(d.kind, d.thinking) for d in some(held_out)} == {(k, t) for k in KINDS for t in (False, True)}


def test_arithmetic_and_counting_are_right() -> None:
    for d in some(False):
        if d.kind == "arithmetic":
            a, sign, b, result = re.search(r"so (\d+) ([+-]) (\d+) = (\d+)\.", d.reasoning).groups()  # type: ignore[union-attr]
            assert int(a) + int(b) * (1 if sign == "+" else -1) == int(result)
            assert f" {result} " in d.content
        elif d.kind == "counting":
            first, last = map(int, re.findall(r"\d+", question(d)))
            numbers = [int(n) for n in re.findall(r"\d+", d.content)]
            assert (numbers[0], numbers[-1]) == (first, last)
            assert {b - a for a, b in pairwise(numbers)} == {1 if first < last else -1}


def test_an_answer_is_what_the_template_writes_for_it() -> None:
    """So a dialogue that goes on holds the same tokens that the model was taught to write."""
    for d in some(False, 200):
        if d.in_reasoning:
            continue
        answer: dict[str, Any] = {"role": "assistant", "content": d.content}
        if d.thinking:
            answer["reasoning"] = d.reasoning
        if d.calls:
            answer["tool_calls"] = [{"function": {"name": n, "arguments": a}} for n, a in d.calls]
        (whole,), _ = render_jinja_template(
            conversations=[[*d.messages, answer]],
            tools=d.tools or None,
            chat_template=chat_template(),
            bos_token="<bos>",
            enable_thinking=d.thinking,
        )
        prompt = prompt_text(d).removesuffix("<|channel>thought\n<channel|>")
        assert whole.removesuffix("\n") == prompt + d.answer


def test_vllm_reads_calls_and_reasoning() -> None:
    """vLLM's own regular expressions and argument parser, without a server."""
    gemma4 = pytest.importorskip("vllm.tool_parsers.gemma4_tool_parser")
    thoughts = pytest.importorskip("vllm.reasoning.gemma4_utils")
    called = [d for d in some(False) if d.calls]
    assert len(called) > 20
    for d in called:
        found = re.findall(r"<\|tool_call>call:([\w\-\.]+)\{(.*?)\}<tool_call\|>", d.answer)
        assert [(name, gemma4._parse_gemma4_args(text)) for name, text in found] == d.calls
    for d in some(False):
        if d.thinking and not d.calls and not d.in_reasoning:
            assert thoughts.parse_thinking_output(d.answer) == {"thinking": d.reasoning, "answer": d.content}


def test_held_out_questions_do_not_change() -> None:
    assert [d.held_out for d in measure.held_out(20)] == [True] * 20
    assert measure.held_out(20) == measure.held_out(40)[:20]
