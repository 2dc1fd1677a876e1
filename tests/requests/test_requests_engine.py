"""Rules that change in the middle of an answer, in the real engine: plain decoding and speculation say the same.

The checkpoint follows a script, so that reasoning ends where the prompt says: at every place of a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.requests.test_grammar_positions import CHOICES, KINDS, SCHEMA, WITHOUT_SPACES, fits_schema
from tests.requests.test_random_requests import OPTIONS
from tests.support import scripted
from tests.support.engine import acceptance, engine

START, END = 100, 101
BUDGETS = (0, 1, 2, 4, 9)
STOPS = range(0, 16, 3)  # words of the script
LEAST = (4, 8, 12)  # min_tokens: some answers end where a step's drafts have just reached them
ALL_LEFT = range(scripted.THOUGHTS)
SOME_CHOICE = [*CHOICES, *WITHOUT_SPACES["choice"]["choice"]]
CONSTRAINED = ("choice", "regex", "json", "grammar")
THINKING = "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nWhat?<turn|>\n<|turn>model\n"
# Prompts that leave no channel to open, beside a reasoning parser.
NO_CHANNEL = {
    "completion": "<bos>Answer:",
    "small-model-thinking-off": "<bos><|turn>user\nWhat?<turn|>\n<|turn>model\n",
    "large-model-thinking-off": "<bos><|turn>user\nWhat?<turn|>\n<|turn>model\n<|channel>thought\n<channel|>",
    "continue-final-message": f"{THINKING}Anna says:",
}
CHANNEL = {
    "thinking": THINKING,
    "open": f"{THINKING}<|channel>thought\n",
}
ENGINES: dict[str, tuple[str | None, int, dict[str, Any]]] = {
    "near-3": ("near", 3, {}),
    "self-5": ("target", 5, {}),
    **{
        f"{drafter}-{k}": (drafter, k, {})
        for k in (1, 2, 3, 4, 5, 8)
        for drafter in ("near", "target")
        if (drafter, k) != ("near", 3) and (drafter, k) != ("target", 5)
    },
    "chunked-prefill": ("near", 3, {"max_num_batched_tokens": 16, "max_num_seqs": 4, "enable_chunked_prefill": True}),
    "preemption": ("near", 3, {"num_gpu_blocks_override": 60, "max_num_seqs": 8, "max_model_len": 256}),
    "ngram": (
        None,
        3,
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}},
    ),
    "eagle": ("eagle", 3, {"speculative": {"method": "eagle"}}),
    "eagle-5": ("eagle", 5, {"speculative": {"method": "eagle"}}),
    **{
        backend: ("near", 3, {"structured_outputs_config": OPTIONS["structured_outputs_config"] | {"backend": backend}})
        for backend in ("guidance", "outlines")
    },
}
ENGINES["outlines"][2]["structured_outputs_config"].pop("disable_any_whitespace")  # it has no such option
FAST = ("near-3", "self-5")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("scripted")
    return {
        "target": scripted.save(folder / "target"),
        "near": scripted.save(folder / "near", scripted.mistakes()),
        "eagle": scripted.save_eagle(folder / "eagle"),
    }


def prompts(name: str) -> list[list[int]]:
    kind = name.partition(" ")[0]
    if kind in NO_CHANNEL | CHANNEL:
        return [scripted.tokenizer().encode((NO_CHANNEL | CHANNEL)[kind])]
    return [scripted.prompt(left) for left in ALL_LEFT]


def structured(constraint: dict[str, Any]) -> dict[str, Any]:
    from vllm.sampling_params import StructuredOutputsParams

    return {"structured_outputs": StructuredOutputsParams(**constraint), "max_tokens": 60}


def cases(backend: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name -> what is asked of every prompt of that name; functions, since a request's parameters are used up."""
    out: dict[str, Callable[[], dict[str, Any]]] = {"free": dict}
    for kind in CONSTRAINED:
        constraint = KINDS[kind][0](backend)
        if constraint is not None:
            out[kind] = lambda c=constraint: structured(c)

    def choice(**more: Any) -> dict[str, Any]:
        return structured(KINDS["choice"][0](backend) or {}) | more

    # vLLM samples several answers at random only: from the one likeliest token each is the greedy answer.
    out["several"] = lambda: choice(n=2, temperature=1.0, top_k=1, seed=3)
    out["ignore-eos"] = lambda: choice(ignore_eos=True, max_tokens=30)
    out["min-tokens"] = lambda: structured({"regex": "[0-9]{1,9}"}) | {"min_tokens": 6}
    for least in LEAST:
        out[f"least {least}"] = lambda least=least: {"min_tokens": least}
    out["logprobs"] = lambda: choice(logprobs=3)
    out |= {f"{name} grammar": choice for name in NO_CHANNEL | CHANNEL}
    for b in BUDGETS:
        out[f"budget {b}"] = out[f"thinking budget {b}"] = lambda b=b: {"thinking_token_budget": b}
        out[f"budget and grammar {b}"] = lambda b=b: choice(thinking_token_budget=b)
    for i in STOPS:
        out[f"stop {i}"] = lambda i=i: {"stop": [word(i + 2), word(i)], "logprobs": 1}
    out["stop included"] = lambda: {"stop": [word(14), word(13)], "include_stop_str_in_output": True}
    return out


def word(at: int) -> str:
    """Text of a word of the script."""
    return str(scripted.tokenizer().decode(scripted.words()[at : at + 1]))


@pytest.fixture(scope="module")
def runs(models: dict[str, Path]) -> Callable[[str], dict[str, Any]]:
    """Outputs of every case of an engine: ``plain``, one of ENGINES, or one of these without speculation."""
    made: dict[str, dict[str, Any]] = {}

    def get(name: str) -> dict[str, Any]:
        if name not in made:
            drafter, k, options = (None, 0, {}) if name == "plain" else ENGINES[name.removeprefix("plain ")]
            if name.startswith("plain "):
                drafter, options = None, {n: v for n, v in options.items() if not n.startswith("speculative")}
            made[name] = ask_all(models, drafter, k, options)
        return made[name]

    return get


def ask_all(models: dict[str, Path], drafter: str | None, k: int, options: dict[str, Any]) -> dict[str, Any]:
    from vllm import SamplingParams
    from vllm.sampling_params import BeamSearchParams

    settings = OPTIONS | {"max_model_len": 512} | options
    backend = settings["structured_outputs_config"]["backend"]
    out: dict[str, Any] = {}
    with engine(models["target"], models[drafter] if drafter else None, k, **settings) as llm:
        before = acceptance(llm)
        asked, params, places = [], [], []
        for case, sampling in cases(backend).items():
            for prompt in prompts(case):
                asked.append({"prompt_token_ids": prompt})
                values = {"temperature": 0.0, "max_tokens": 40, "skip_special_tokens": False} | sampling()
                params.append(SamplingParams(**values))
                places.append(case)
        for case, output in zip(places, llm.generate(asked, params, use_tqdm=False), strict=True):
            out.setdefault(case, []).append(output)
        out["counts"] = acceptance(llm) - before
        beams = llm.beam_search(asked[:3], BeamSearchParams(beam_width=2, max_tokens=6))
        out["beams"] = tuple([list(sequence.tokens) for sequence in output.sequences] for output in beams)
        out["preempted"] = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    return out


def told(output: Any) -> list[tuple[Any, ...]]:
    return [(list(o.token_ids), o.text, o.finish_reason, o.stop_reason) for o in output.outputs]


ALL_ENGINES = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in ENGINES]


@pytest.mark.parametrize("name", ALL_ENGINES)
def test_every_answer_is_that_of_plain_decoding(runs: Any, name: str) -> None:
    special = ENGINES[name][2]
    plain, speculating = runs(f"plain {name}" if "structured_outputs_config" in special else "plain"), runs(name)
    different = [
        (case, left)
        for case in speculating
        if isinstance(speculating[case], list)
        for left, (a, b) in enumerate(zip(plain[case], speculating[case], strict=True))
        if told(a) != told(b)
    ]
    assert different == []
    assert speculating["counts"].accepted > 0
    assert name.startswith(("target", "self")) or speculating["counts"].accepted < speculating["counts"].proposed
    assert name != "preemption" or speculating["preempted"] > 0
    for a, b in zip(plain["logprobs"], speculating["logprobs"], strict=True):
        assert len(a.outputs[0].logprobs) == len(a.outputs[0].token_ids) == len(b.outputs[0].logprobs)
        for p, q in zip(a.outputs[0].logprobs, b.outputs[0].logprobs, strict=True):
            assert p.keys() == q.keys()
            assert max(abs(p[t].logprob - q[t].logprob) for t in p) < 1e-3


@pytest.mark.parametrize("name", ALL_ENGINES)
def test_beam_search_is_that_of_plain_decoding(runs: Any, name: str) -> None:
    special = ENGINES[name][2]
    plain = runs(f"plain {name}" if "structured_outputs_config" in special else "plain")
    assert runs(name)["beams"] == plain["beams"]
    assert len(plain["beams"]) == 3


@pytest.mark.parametrize("name", [pytest.param("plain"), *ALL_ENGINES])
def test_constrained_text_fits_its_constraint(runs: Any, name: str) -> None:
    for kind in CONSTRAINED:
        fits = KINDS[kind][1]
        for left, output in enumerate(runs(name).get(kind, ())):
            (answer,) = output.outputs
            tokens = list(answer.token_ids)
            assert tokens.index(END) == left
            text = scripted.tokenizer().decode(tokens[left + 1 :], skip_special_tokens=True)
            assert answer.finish_reason == "stop", (kind, left)
            assert fits(text), (kind, left, text)
    for case in [f"{n} grammar" for n in NO_CHANNEL]:
        (output,) = runs(name)[case]
        assert scripted.tokenizer().decode(output.outputs[0].token_ids, skip_special_tokens=True) in SOME_CHOICE, case
    for case in [f"{n} grammar" for n in CHANNEL]:
        tokens = list(runs(name)[case][0].outputs[0].token_ids)
        assert scripted.tokenizer().decode(tokens[tokens.index(END) + 1 :], skip_special_tokens=True) in SOME_CHOICE, (
            case
        )


@pytest.mark.parametrize("name", [pytest.param("plain"), *ALL_ENGINES])
def test_budgets_are_kept(runs: Any, name: str) -> None:
    for budget in BUDGETS:
        for left, output in enumerate(runs(name)[f"budget {budget}"]):
            assert list(output.outputs[0].token_ids).index(END) == min(budget, left)
        tokens = list(runs(name)[f"thinking budget {budget}"][0].outputs[0].token_ids)
        assert tokens.index(END) - tokens.index(START) - 1 == min(budget, scripted.THOUGHTS + 1)
        for left, output in enumerate(runs(name)[f"budget and grammar {budget}"]):
            tokens = list(output.outputs[0].token_ids)
            assert tokens.index(END) == min(budget, left)
            assert scripted.tokenizer().decode(tokens[tokens.index(END) + 1 :], skip_special_tokens=True) in SOME_CHOICE


@pytest.mark.parametrize("name", [pytest.param("plain"), *ALL_ENGINES])
def test_the_stop_string_that_ends_first_ends_the_answer(runs: Any, name: str) -> None:
    """Also its token ids, log-probabilities and number of tokens; the request names the later word first."""
    for i in STOPS:
        for left, output in enumerate(runs(name)[f"stop {i}"]):
            (answer,) = output.outputs
            if scripted.THOUGHTS - left > i:  # the word stands in the prompt
                continue
            assert answer.stop_reason == word(i)
            assert scripted.tokenizer().decode(answer.token_ids[-1:]) == word(i)
            assert not answer.text.endswith(word(i))
            assert len(answer.logprobs) == len(answer.token_ids)
    (answer,) = runs(name)["stop included"][0].outputs
    assert answer.text.endswith(word(13))


def test_stock_vllm_forgets_grammar_budget_and_stop_strings(models: dict[str, Path]) -> None:
    """What 0.19.1 does without these patches: every row of it is an answer that plain decoding does not give."""
    from vllm import SamplingParams

    from tests.support.stock import without
    from vllm_gemma4_spec.requests.patches import PATCHES

    ask = {
        "choice": structured({"choice": CHOICES}),
        "json": structured({"json": SCHEMA}),
        "budget": {"thinking_token_budget": 2},
        "stop": {"stop": [word(14), word(13)]},
        "no channel": structured({"choice": CHOICES}),
        "least": {"min_tokens": 12},
    }
    with contextlib.ExitStack() as stack:
        for patch in PATCHES:
            stack.enter_context(without(patch))
        with engine(models["target"], models["target"], 5, **(OPTIONS | {"max_model_len": 512})) as llm:
            made = {
                name: llm.generate(
                    [
                        {"prompt_token_ids": p}
                        for p in (prompts("completion") if name == "no channel" else prompts(name))
                    ],
                    SamplingParams(**({"temperature": 0.0, "max_tokens": 40, "skip_special_tokens": False} | params)),
                    use_tqdm=False,
                )
                for name, params in ask.items()
            }
    decode = scripted.tokenizer().decode
    for kind, fits in (("choice", CHOICES.__contains__), ("json", _fits_json)):
        ended = [list(o.outputs[0].token_ids) for o in made[kind]]
        texts = [decode(t[t.index(END) + 1 :], skip_special_tokens=True) for t in ended]
        assert not all(map(fits, texts)), kind
    assert any(list(o.outputs[0].token_ids).index(END) > 2 for o in made["budget"])
    assert {o.outputs[0].stop_reason for o in made["stop"]} != {word(13)}
    assert made["no channel"][0].outputs[0].text not in CHOICES
    # From the end of reasoning on the script has 8 tokens: five answers must go on, and the one of 13 does, too.
    longer = [left for left, o in enumerate(made["least"]) if len(o.outputs[0].token_ids) > 8 + left]
    assert longer == [0, 1, 2, 3, 4, 5]


def _fits_json(text: str) -> bool:
    try:
        return fits_schema(text)
    except (ValueError, KeyError, TypeError):
        return False
