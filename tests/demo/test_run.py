"""What the demo makes of a server's answers and metrics."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_gemma4_spec.demo import run
from vllm_gemma4_spec.demo.build import Pair
from vllm_gemma4_spec.demo.run import Answer, DemoError

LOG = Path("/logs/server.log")
METRICS = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 10.0
# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 30.0
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 24.0
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 8.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 9.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="2"} 7.0
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="m"} 99.0
"""


def test_metrics_are_read_per_position() -> None:
    found = run.drafting(METRICS)
    assert (found.drafts, found.proposed, found.accepted, found.accepted_at) == (10, 30, 24, [9, 8, 7])
    assert found.acceptance_length == pytest.approx(3.4)


def test_a_server_without_speculation_has_no_drafts() -> None:
    found = run.drafting('# TYPE vllm:prompt_tokens_total counter\nvllm:prompt_tokens_total{engine="0"} 9.0\n')
    assert (found.drafts, found.accepted_at, found.acceptance_length) == (0, [], 1.0)


def test_one_held_out_question_of_each_kind() -> None:
    asked = run.questions()
    assert [(d.kind, d.thinking) for d in asked] == list(run.ASKED)
    assert all(d.held_out for d in asked)
    assert any(d.calls for d in asked)


def test_the_usual_flags_are_given() -> None:
    pair = Pair(Path("/p"), Path("/p/target"), Path("/p/drafter"), Path("/p/assistant"), {})
    plain = run.serve_arguments(pair, speculate=False)
    whole = run.serve_arguments(pair, speculate=True)
    assert whole[: len(plain)] == plain
    assert json.loads(whole[-1]) == {"method": "draft_model", "model": "/p/drafter", "num_speculative_tokens": 3}
    assistant = run.serve_arguments(pair, speculate=True, drafter="assistant")
    assert assistant[:-1] == whole[:-1]
    assert json.loads(assistant[-1]) == {"method": "mtp", "model": "/p/assistant", "num_speculative_tokens": 3}
    for flag in ("--enable-prefix-caching", "--enable-chunked-prefill", "--enable-auto-tool-choice"):
        assert flag in plain
    assert plain[plain.index("--reasoning-parser") + 1] == plain[plain.index("--tool-call-parser") + 1] == "gemma4"


def delta(content: str | None = None, reasoning: str | None = None, calls: Any = None, end: str | None = None) -> Any:
    part = SimpleNamespace(content=content, tool_calls=calls, model_extra={"reasoning": reasoning})
    return SimpleNamespace(choices=[SimpleNamespace(delta=part, finish_reason=end)])


def test_streamed_pieces_are_joined() -> None:
    call = [SimpleNamespace(index=0, function=SimpleNamespace(name="f", arguments=""))]
    rest = [SimpleNamespace(index=0, function=SimpleNamespace(name=None, arguments='{"a": 1}'))]
    seen: list[str] = []
    chunks = [
        delta(reasoning="Hm"),
        delta(reasoning="."),
        delta("A"),
        delta("b"),
        delta(calls=call),
        delta(calls=rest, end="stop"),
    ]
    answer = run._join(chunks, seen.append)
    assert answer == Answer("Hm.", "Ab", [("f", {"a": 1})], "stop")
    assert "".join(seen) == "Hm.Ab"


def test_arguments_that_are_no_json_are_an_error() -> None:
    with pytest.raises(DemoError, match="arguments of f that are no JSON"):
        run._answer("", "", [("f", "{")], "stop")


@pytest.mark.parametrize("change", [{"reasoning": "x"}, {"content": "x"}, {"calls": [("g", {})]}, {"ended": "length"}])
def test_a_difference_is_named(change: dict[str, Any]) -> None:
    question = run.questions()[0]
    one = {"reasoning": "r", "content": "c", "calls": [("f", {})], "ended": "stop"}
    run.check_same(question, Answer(**one), Answer(**one), ("streamed", "plain"), LOG)
    with pytest.raises(DemoError, match=rf"{next(iter(change))} of the streamed answer .* /logs/server.log"):
        run.check_same(question, Answer(**one), Answer(**{**one, **change}), ("streamed", "plain"), LOG)


def test_a_missing_part_is_named() -> None:
    arithmetic, _, _, tool_call, _ = run.questions()
    with pytest.raises(DemoError, match="no reasoning"):
        run.check_shape(arithmetic, Answer("", "text", [], "stop"), LOG)
    with pytest.raises(DemoError, match="no calls"):
        run.check_shape(tool_call, Answer("thought", "text", [], "stop"), LOG)


def test_right_means_every_part() -> None:
    arithmetic, counting, _, tool_call, _ = run.questions()
    assert run.is_right(arithmetic, Answer(arithmetic.reasoning + "\n", arithmetic.content, [], "stop"))
    assert not run.is_right(arithmetic, Answer("", arithmetic.content, [], "stop"))
    assert run.is_right(counting, Answer("", counting.content, [], "stop"))
    assert run.is_right(tool_call, Answer(tool_call.reasoning, "", tool_call.calls, "tool_calls"))
    assert not run.is_right(tool_call, Answer(tool_call.reasoning, "", [], "stop"))


def test_missing_vllm_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DemoError, match=r"vllm is not installed .* `make setup`"):
        run.require_vllm()
