"""``parse_output`` for ``LLM.chat``: the same answers as the server's."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_gemma4_spec.chat import parse_output

from . import server
from .scenarios import SCENARIOS, Scenario
from .server import by
from .test_serving import differences, expected


@pytest.fixture(scope="module")
def engine(folder: Any) -> server.ScriptedEngine:
    return server.ScriptedEngine(str(folder))


# ``LLM`` searches stop strings in all text, so these end before their content begins, or in a call.
STOPPED_ELSEWHERE = {
    "a stop string in reasoning does not stop",
    "a line end stops, after thinking",
    "a line end in reasoning does not stop",
    "the label does not stop",
    "the label and a line end",
    "a call does not stop",
    "no stop string across kinds",
    "a header does not stop",
}


def plainly(scenario: Scenario) -> bool:
    """What a SamplingParams can ask for; the rest is the server's."""
    fields = {"include_reasoning", "parallel_tool_calls"} & set(scenario.request)
    return not fields and scenario.name not in STOPPED_ELSEWHERE


@pytest.mark.parametrize("scenario", [s for s in SCENARIOS if plainly(s)], ids=lambda s: s.name)
def test_scenarios(engine: server.ScriptedEngine, scenario: Scenario, encode: Any, plain: Any) -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    tokens = scenario.tokens(encode, plain)
    scenario = scenario.cut_at(len(tokens))
    request = scenario.request
    keep = ("stop", "max_tokens", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens")
    params = SamplingParams(
        **{"max_tokens": 9000, **{k: v for k, v in request.items() if k in keep}},
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    prompt = encode("<|turn>model\n<|channel>thought\n" if scenario.after_tool else "<|turn>model\n")
    engine.script, engine.cut = [tokens], by(3)

    async def last() -> Any:
        async for output in engine.generate({"prompt_token_ids": prompt}, params, "r"):
            result = output
        return result

    output = server.run(last())
    (message,) = parse_output(
        output,
        engine.tokenizer,
        tools=scenario.tools,
        skip_special_tokens=params.skip_special_tokens,
        include_stop_str_in_output=params.include_stop_str_in_output,
    )
    got = {
        "reasoning": message.reasoning,
        "content": message.content,
        "calls": [[c.name, c.arguments] for c in message.tool_calls],
        "finish_reason": message.finish_reason,
        "usage": None,
    }

    want = {**expected(engine.tokenizer, scenario, tokens, prompt), "usage": None}
    assert differences(got, want) == {}
