"""The trained pair (made once per recipe, in the user's cache): shapes, right answers, drafts accepted, the engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.commands import gemma4_spec, printed
from tests.support.engine import acceptance, engine, generate
from vllm_gemma4_spec.demo import assistant as network
from vllm_gemma4_spec.demo import build, measure
from vllm_gemma4_spec.demo.build import Pair
from vllm_gemma4_spec.demo.template import prompt_text
from vllm_gemma4_spec.demo.tokenizer import END_IDS

OTHER_SEED = 77  # not the one that the pair was measured with when it was made


@pytest.fixture(scope="module")
def pair() -> Pair:
    made, _ = build.ensure(build.default_folder())
    return made


@pytest.fixture(scope="module")
def loaded(pair: Pair) -> tuple[Any, Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models = [AutoModelForCausalLM.from_pretrained(p, dtype="float32") for p in (pair.target, pair.drafter)]
    return models[0], models[1], AutoTokenizer.from_pretrained(pair.target)


def test_the_shapes_are_those_of_31b_and_e4b(pair: Pair) -> None:
    target, drafter = (json.loads((p / "config.json").read_text()) for p in (pair.target, pair.drafter))
    assert target["architectures"] == drafter["architectures"] == ["Gemma4ForCausalLM"]
    assert target["layer_types"] == ["sliding_attention"] * 5 + ["full_attention"]
    assert target["attention_k_eq_v"] is True
    assert target["num_global_key_value_heads"] < target["num_key_value_heads"] < target["num_attention_heads"]
    assert target["final_logit_softcapping"] == 30.0
    assert target["hidden_size_per_layer_input"] == 0 < drafter["hidden_size_per_layer_input"]
    assert drafter["num_kv_shared_layers"] > 0
    assert drafter["sliding_window"] < target["sliding_window"]
    for folder in (pair.target, pair.drafter):
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [1, 106, 50]


def test_the_target_answers_held_out_questions(loaded: tuple[Any, Any, Any]) -> None:
    target, drafter, tokenizer = loaded
    found = measure.pair(target, drafter, tokenizer, 150, 3, OTHER_SEED)
    assert found["right"] > 0.95, found
    assert min(right / asked for right, asked in found["right_by_kind"].values()) > 0.8, found
    assert found["acceptance_length"] > 2.5, found


def test_the_engine_gives_the_tokens_of_transformers(pair: Pair, loaded: tuple[Any, Any, Any]) -> None:
    target, _, tokenizer = loaded
    asked = measure.held_out(16, OTHER_SEED)
    prompts = [tokenizer(prompt_text(d))["input_ids"] for d in asked]
    # One prompt at a time: padding rounds differently.
    wanted = [measure.greedy(target, [p], measure.LONGEST_ANSWER)[0] for p in prompts]
    ending = {"ignore_eos": False, "stop_token_ids": END_IDS, "max_tokens": measure.LONGEST_ANSWER}
    with engine(pair.target) as llm:
        assert generate(llm, prompts, **ending) == wanted
    with engine(pair.target, pair.drafter) as llm:
        before = acceptance(llm)
        assert generate(llm, prompts, **ending) == wanted
        counted = acceptance(llm) - before
    assert 1 + counted.accepted / counted.drafts > 2.5
    offline = network.acceptance(target, *network.load(pair.assistant), prompts, wanted, build.DRAFTS)
    with engine(pair.target, speculative_config={"model": str(pair.assistant), "num_speculative_tokens": 3}) as llm:
        before = acceptance(llm)
        assert generate(llm, prompts, **ending) == wanted
        counted = acceptance(llm) - before
    # Of a step's drafts past the end of an answer the engine counts those before the token that ends it.
    assert counted.accepted / counted.drafts == pytest.approx(sum(offline), rel=0.05)
    assert 1 + sum(offline) > 2.2


@pytest.mark.slow
def test_the_whole_demo_as_json(pair: Pair) -> None:
    found = printed("demo", gemma4_spec("demo", "--check", "--json"))
    assert found["equal_to_plain"] is True
    assert [a["kind"] for a in found["answers"] if not a["right"]] == []
    assert found["acceptance_length"] > 2.5
    assert found["assistant"]["acceptance_length"] > 2.2
