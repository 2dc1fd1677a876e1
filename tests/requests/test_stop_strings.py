"""vLLM's own output processor: stop strings by token, and nothing for requests without them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support import scripted
from tests.support.configs import GEMMA4, LLAMA

FIRST, LAST = 2, 4  # words of a step of six


def processor(target: Any = GEMMA4) -> Any:
    import vllm_gemma4_spec

    vllm_gemma4_spec.apply()
    from vllm.v1.engine.output_processor import OutputProcessor

    from vllm_gemma4_spec.requests.stop_strings import engine_init

    made = OutputProcessor(scripted.tokenizer(), log_stats=False)
    init = engine_init(lambda engine, config: setattr(engine, "output_processor", made))
    init(SimpleNamespace(), SimpleNamespace(model_config=target))
    return made


def word(at: int) -> str:
    return str(scripted.tokenizer().decode(scripted.words()[at : at + 1]))


def add(to: Any, name: str, resumable: bool = False, **fields: Any) -> Any:
    """Parts of the request that a step's tokens go to."""
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    params = SamplingParams(max_tokens=40, logprobs=0, **fields)
    more: dict[str, Any] = {"external_req_id": name, "resumable": resumable}
    request = EngineCoreRequest(name, [2, 3], None, params, None, 0.0, None, None, None, **more)
    to.add_request(request, None)
    state = to.request_states[name]
    return state.detokenizer, state.logprobs_processor


def step(to: Any, name: str) -> Any:
    """The answer after a step of six tokens."""
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.outputs import LogprobsLists

    tokens = scripted.words()[:6]
    logprobs = LogprobsLists(np.array([[t] for t in tokens]), np.full((6, 1), -0.5), np.zeros(6, dtype=np.int64), None)
    (output,) = to.process_outputs([EngineCoreOutput(name, tokens, new_logprobs=logprobs)]).request_outputs
    (answer,) = output.outputs
    return answer


@pytest.mark.parametrize("included", [False, True])
def test_the_string_that_ends_first_ends_text_ids_and_log_probabilities(included: bool) -> None:
    outputs = processor()
    add(outputs, "a", stop=[word(LAST), word(FIRST)], include_stop_str_in_output=included)
    answer = step(outputs, "a")
    assert (answer.finish_reason, answer.stop_reason) == ("stop", word(FIRST))
    assert list(answer.token_ids) == scripted.words()[: FIRST + 1]
    assert len(answer.logprobs) == FIRST + 1
    assert answer.text.endswith(word(FIRST)) == included
    assert word(FIRST - 1) in answer.text


def test_a_string_over_several_tokens_and_one_before_min_tokens() -> None:
    outputs = processor()
    add(outputs, "a", stop=[word(FIRST) + word(FIRST + 1)])
    assert len(step(outputs, "a").token_ids) == FIRST + 2
    add(outputs, "later", stop=[word(LAST)], min_tokens=LAST + 1)
    assert step(outputs, "later").finish_reason is None
    assert step(outputs, "later").stop_reason == word(LAST)
    add(outputs, "b", stop=[word(FIRST), word(LAST)], min_tokens=FIRST + 1)
    answer = step(outputs, "b")
    assert (answer.stop_reason, len(answer.token_ids)) == (word(LAST), LAST + 1)


def test_only_requests_with_stop_strings_of_a_gemma_4_are_touched() -> None:
    from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer
    from vllm.v1.engine.logprobs import LogprobsProcessor

    theirs = {FastIncrementalDetokenizer, LogprobsProcessor}
    outputs = processor()
    assert set(map(type, add(outputs, "a"))) == theirs
    answer = step(outputs, "a")
    assert (answer.finish_reason, len(answer.token_ids), len(answer.logprobs)) == (None, 6, 6)
    ours = set(map(type, add(outputs, "b", True, stop=["x"])))
    assert not ours & theirs
    assert set(map(type, add(outputs, "c", stop=["y"]))) == ours
    assert set(map(type, add(outputs, "b", True, stop=["x"]))) == ours  # more input for the same request
    assert set(map(type, add(processor(LLAMA), "a", stop=["x"]))) == theirs
