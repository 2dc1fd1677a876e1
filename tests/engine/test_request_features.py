"""What a request can ask for, with speculation: the answer is that of plain decoding.

logit_bias and min_p are refused by vLLM 0.19.1 itself, with a clear error (checked in ``runs``).

One engine with and one without a drafter that is right now and then (so tokens are accepted and rejected in
every request); plain decoding owns tokens, finish reasons and log-probabilities.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.mtp import pairs
from tests.mtp.drafts import Watched
from tests.support import tiny_multimodal
from tests.support.engine import acceptance, engine, random_prompts

MAX_MODEL_LEN = 256
PROMPTS = random_prompts((5, 40, 100))
# float32, batches of other shapes; measured 1e-5
LOGPROB_TOLERANCE = 1e-3


# Ids of tokens that JSON is written with, in place of words that no other case names.
JSON_TOKENS = dict(enumerate([*'{}[]":,-.', *"0123456789", *"abcdefgh", "name", "age", "tags", "true", "false"], 440))


@pytest.fixture(scope="module")
def target(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared target with a tokenizer, which structured output and stop strings need."""
    folder = tmp_path_factory.mktemp("features") / "target"
    shutil.copytree(tiny["target"], folder)
    tiny_multimodal.tokenizer(names=JSON_TOKENS).save_pretrained(folder)
    return folder


OPTIONS = {"max_model_len": MAX_MODEL_LEN, "skip_tokenizer_init": False, "max_logprobs": 16, "max_num_seqs": 16}


def outputs(llm: Any) -> dict[str, Any]:
    """What every case gives, all asked at once: a step has requests of several cases."""
    from vllm import SamplingParams

    asked = [(name, prompt) for name in CASES for prompt in prompts(name)]
    made = llm.generate(
        [{"prompt_token_ids": prompt} for _, prompt in asked],
        [SamplingParams(**({"temperature": 0.0, "max_tokens": 40} | CASES[name]())) for name, _ in asked],
        use_tqdm=False,
    )
    return {name: [output for (of, _), output in zip(asked, made, strict=True) if of == name] for name in CASES}


class Helped(Watched):
    """A random assistant is right by chance alone: every other draft becomes what plain decoding answers."""

    def __init__(self, llm: Any, assistant: Path, plain: dict[str, Any]) -> None:
        super().__init__(llm, assistant, reference=False)
        self._following: dict[tuple[int, ...], list[int]] = {}
        for request in (request for case in plain.values() for request in case):
            for answer in request.outputs:
                tokens = [*request.prompt_token_ids, *answer.token_ids]
                for end in range(len(request.prompt_token_ids) + 1, len(tokens)):
                    self._following[tuple(tokens[:end])] = tokens[end:]

    def __call__(self, **kwargs: Any) -> Any:
        drafts = super().__call__(**kwargs)
        for row, made in enumerate(self.drafts[-len(drafts) :]):
            following = self._following.get(tuple(made.context), []) if len(made.context) % 2 else []
            for i, token in enumerate(following[: drafts.shape[1]]):
                drafts[row, i] = token
        return drafts


@pytest.fixture(scope="module")
def plain(target: Path) -> dict[str, Any]:
    with engine(target, **OPTIONS) as llm:
        return outputs(llm)


@pytest.fixture(scope="module", params=["close", pytest.param("assistant", marks=pytest.mark.slow)])
def runs(
    request: pytest.FixtureRequest,
    tiny: dict[str, Path],
    target: Path,
    plain: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Any]:
    """Outputs of every case, plain and with speculation; and the counters of the latter."""
    from vllm import SamplingParams

    model = tiny.get(request.param) or pairs.save_assistant(pairs.KINDS["31b"](), tmp_path_factory.mktemp("assistant"))
    method = "mtp" if request.param == "assistant" else "draft_model"
    with engine(target, model, 4, speculative={"method": method}, **OPTIONS) as llm:
        before = acceptance(llm)
        if method == "mtp":
            Helped(llm, model, plain)
        out = {"plain": plain, "speculation": outputs(llm)}
        out["counts"] = acceptance(llm) - before
        for refused in ({"logit_bias": {50: 4.0}}, {"min_p": 0.1}):
            with pytest.raises(ValueError, match="not yet supported with speculative decoding"):
                llm.generate({"prompt_token_ids": PROMPTS[0]}, SamplingParams(**refused), use_tqdm=False)
    return out


def structured(**constraint: Any) -> dict[str, Any]:
    from vllm.sampling_params import StructuredOutputsParams

    return {"structured_outputs": StructuredOutputsParams(**constraint)}


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "bed", "cafe"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}

# Functions, so that vLLM is imported when a case runs and not when the tests are collected.
CASES: dict[str, Any] = {
    "greedy": lambda: {"ignore_eos": True},
    "end-of-sequence": dict,
    "one-token": lambda: {"max_tokens": 1},
    "two-tokens": lambda: {"max_tokens": 2},
    "several-answers": lambda: {"n": 3, "temperature": 1.0, "top_k": 1, "seed": 3},
    "stop-tokens": lambda: {"stop_token_ids": list(range(11, 512, 7))},
    "stop-strings": lambda: {"stop": [f"w{i}" for i in range(100, 512, 9)]},
    "min-tokens": lambda: {"min_tokens": 20, "stop_token_ids": list(range(11, 512, 5))},
    "allowed-tokens": lambda: {"allowed_token_ids": list(range(11, 300)), "ignore_eos": True},
    "bad-words": lambda: {"bad_words": [f"w{i}" for i in range(200, 330)], "ignore_eos": True},
    "penalties": lambda: {
        "presence_penalty": 0.8,
        "frequency_penalty": 0.6,
        "repetition_penalty": 1.3,
        "ignore_eos": True,
    },
    "logprobs": lambda: {"logprobs": 5, "prompt_logprobs": 2, "ignore_eos": True},
    "length-limit": lambda: {"max_tokens": MAX_MODEL_LEN, "ignore_eos": True},
    "regex": lambda: structured(regex="(w1[0-9]|w2[0-9]){3,9}"),
    "json-schema": lambda: structured(json=SCHEMA) | {"max_tokens": 100},
    "choice": lambda: structured(choice=["w77w78w79w80", "w77w20w90w91w92"]),
}
EXACT = [name for name in CASES if name != "several-answers"]


def prompts(name: str) -> list[list[int]]:
    if name == "length-limit":  # the maximum length comes at every place of a draft of four
        return random_prompts([MAX_MODEL_LEN - 20 - i for i in range(6)])
    return PROMPTS


@pytest.mark.parametrize("name", EXACT)
def test_an_answer_is_that_of_plain_decoding(runs: dict[str, Any], name: str) -> None:
    for want, got in zip(runs["plain"][name], runs["speculation"][name], strict=True):
        for w, g in zip(want.outputs, got.outputs, strict=True):
            assert (list(g.token_ids), g.text, g.finish_reason, g.stop_reason) == (
                list(w.token_ids),
                w.text,
                w.finish_reason,
                w.stop_reason,
            )


def test_drafts_were_accepted_and_rejected(runs: dict[str, Any]) -> None:
    assert 0.01 < runs["counts"].accepted / runs["counts"].proposed < 1


def test_the_cases_do_what_they_say(runs: dict[str, Any]) -> None:
    """Each feature has an effect, so its parity says something."""
    answers = {name: [list(o.outputs[0].token_ids) for o in outs] for name, outs in runs["plain"].items()}
    reasons = {name: [o.outputs[0].finish_reason for o in outs] for name, outs in runs["plain"].items()}
    for name in ("allowed-tokens", "bad-words", "penalties"):
        assert answers[name] != answers["greedy"], name
    assert {len(a) for a in answers["one-token"]} == {1}
    assert "stop" in reasons["stop-tokens"]
    assert "stop" in reasons["stop-strings"]
    assert min(len(a) for a in answers["min-tokens"]) >= 20
    lengths = [len(p) + len(a) for p, a in zip(prompts("length-limit"), answers["length-limit"], strict=True)]
    assert set(lengths) == {MAX_MODEL_LEN}
    assert set(reasons["length-limit"]) == {"length"}
    assert all(o.outputs[0].text for o in runs["plain"]["regex"])
    for output in runs["speculation"]["json-schema"]:
        made = json.loads(output.outputs[0].text.replace(" ", ""))
        assert set(made) == {"name", "age", "tags"}
        assert 0 <= made["age"] <= 120
        assert set(made["tags"]) <= {"a", "bed", "cafe"}


def test_several_answers(runs: dict[str, Any]) -> None:
    """Random sampling with a seed, from the one likeliest token: all three are the greedy answer."""
    for want, got in zip(runs["plain"]["several-answers"], runs["speculation"]["several-answers"], strict=True):
        assert len(got.outputs) == 3
        assert [list(o.token_ids) for o in got.outputs] == [list(o.token_ids) for o in want.outputs]


def test_logprobs(runs: dict[str, Any]) -> None:
    for want, got in zip(runs["plain"]["logprobs"], runs["speculation"]["logprobs"], strict=True):
        for w, g in zip(
            [*want.prompt_logprobs[1:], *want.outputs[0].logprobs],
            [*got.prompt_logprobs[1:], *got.outputs[0].logprobs],
            strict=True,
        ):
            assert w.keys() == g.keys()
            assert max(abs(w[t].logprob - g[t].logprob) for t in w) < LOGPROB_TOLERANCE
