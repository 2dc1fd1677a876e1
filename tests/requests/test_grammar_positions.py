"""Grammars by position, over every backend: a step of k drafts gives the tokens that one token a step gives.

The backends, vLLM's manager and its way through a step are real; the model is a table of random preferences, so that
steps of every length, drafts right and wrong, and the end of reasoning at every place of a step come cheap.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support import scripted
from tests.support.configs import GEMMA4, LLAMA
from vllm_gemma4_spec.demo.data import GET_WEATHER, SET_TIMER

END_OF_REASONING = 101
EOS = 1
BACKENDS = ("xgrammar", "guidance", "outlines")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["Anna", "Ben", "Carla"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "likes": {"type": "array", "items": {"enum": ["apples", "books"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
REGEX = r"(yes|no), [0-9]{2,4}( apples)?"
CHOICES = ["Anna has 2 apples", "Anna has 3", "Ben"]
# vLLM gives outlines two spaces for the one in `▁has`: with this tokenizer, as with Gemma 4's, no answer has a space.
WITHOUT_SPACES: dict[str, dict[str, Any]] = {
    "choice": {"choice": ["Anna", "Ben", "Benjamin"]},
    "regex": {"regex": "(yes|no),[0-9]{2,4}(apples)?"},
}
EBNF = 'root ::= who " has " [0-9] [0-9]?\nwho ::= "Anna" | "Ben"'
LARK = 'start: who " has " /[0-9][0-9]?/\nwho: "Anna" | "Ben"'


def fits_schema(text: str) -> bool:
    made = json.loads(text)
    return (
        list(made) == ["name", "age", "likes"]
        and made["name"] in ("Anna", "Ben", "Carla")
        and type(made["age"]) is int
        and 0 <= made["age"] <= 120
        and 1 <= len(made["likes"]) <= 2
        and set(made["likes"]) <= {"apples", "books"}
    )


def fits_calls(text: str) -> bool:
    calls = json.loads(text)
    return bool(calls) and all(
        (c["name"] == "get_weather" and isinstance(c["parameters"]["city"], str))
        or (c["name"] == "set_timer" and type(c["parameters"]["minutes"]) is int)
        for c in calls
    )


def calls_schema() -> Any:
    """What vLLM constrains ``tool_choice: required`` with."""
    from openai.types.responses import FunctionTool
    from vllm.tool_parsers.utils import get_json_schema_from_tools

    tools = [FunctionTool(type="function", strict=None, **tool["function"]) for tool in (GET_WEATHER, SET_TIMER)]
    return get_json_schema_from_tools(tool_choice="required", tools=tools)


# Kind -> the constraint for a backend (None: it does not offer the kind), and whether a text fits it.
KINDS: dict[str, tuple[Callable[[str], dict[str, Any] | None], Callable[[str], bool]]] = {
    "choice": (
        lambda b: WITHOUT_SPACES["choice"] if b == "outlines" else {"choice": CHOICES},
        lambda text: text in [*CHOICES, *WITHOUT_SPACES["choice"]["choice"]],
    ),
    "regex": (
        lambda b: WITHOUT_SPACES["regex"] if b == "outlines" else {"regex": REGEX},
        lambda text: re.fullmatch(f"{REGEX}|{WITHOUT_SPACES['regex']['regex']}", text) is not None,
    ),
    "json": (lambda b: None if b == "outlines" else {"json": SCHEMA}, fits_schema),
    "calls": (lambda b: {"json": calls_schema()} if b in ("xgrammar", "guidance") else None, fits_calls),
    "grammar": (
        lambda b: {"xgrammar": {"grammar": EBNF}, "guidance": {"grammar": LARK}}.get(b),
        lambda text: re.fullmatch("(Anna|Ben) has [0-9][0-9]?", text) is not None,
    ),
}
CASES = [
    pytest.param(backend, kind, id=f"{backend}-{kind}")
    for backend in BACKENDS
    for kind in KINDS
    if kind in ("choice", "regex") or backend != "outlines"
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scripted.save(tmp_path_factory.mktemp("scripted") / "target")


@pytest.fixture(scope="module")
def manager(checkpoint: Path) -> Iterator[Callable[[str, int], Any]]:
    """A StructuredOutputManager as an engine has it, by backend and number of drafts."""
    import vllm_gemma4_spec

    vllm_gemma4_spec.apply()
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.structured_output import StructuredOutputManager

    config = EngineArgs(
        str(checkpoint),
        dtype="float32",
        max_num_seqs=2,
        enforce_eager=True,
        reasoning_parser="gemma4",
        max_model_len=512,
    ).create_engine_config()
    made: dict[tuple[str, int], Any] = {}

    def get(backend: str, k: int) -> Any:
        if (backend, k) not in made:
            config.speculative_config = (
                SimpleNamespace(num_speculative_tokens=k, draft_model_config=None) if k else None
            )
            made[backend, k] = StructuredOutputManager(config)
        return made[backend, k]

    yield get
    for one in made.values():
        one.clear_backend()


def new_request(manager: Any, backend: str, constraint: dict[str, Any], prompt: list[int]) -> Any:
    """What the engine core makes of a request, its grammar compiled."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams
    from vllm.v1.request import Request

    params = SamplingParams(max_tokens=100, structured_outputs=StructuredOutputsParams(**constraint))
    config = manager.vllm_config.structured_outputs_config
    config.backend = backend
    params._validate_structured_outputs(config, manager.tokenizer)
    request = Request("r", prompt, params, None, reasoning_ended=False)
    manager.grammar_init(request)
    grammar: Any = request.structured_output_request._grammar
    request.structured_output_request.grammar = grammar.result()
    return request


class Preferences:
    """A model: ``script`` first, then random preferences by what stands last and where."""

    def __init__(self, script: list[int], seed: int) -> None:
        self.script, self.seed = script, seed

    def __call__(self, output: list[int], mask: np.ndarray) -> int:
        """The likeliest token that ``mask`` (int32 words of bits) allows."""
        allowed = np.unpackbits(mask.view(np.uint8), bitorder="little")[: scripted.VOCAB_SIZE].astype(bool)
        likely = np.random.default_rng([self.seed, len(output), output[-1] if output else 0]).random(
            scripted.VOCAB_SIZE
        )
        likely[UNLIKELY] *= 0.2
        if len(output) < len(self.script):
            likely[self.script[len(output)]] = 2
        return int(np.where(allowed, likely, -1).argmax())


# Control tokens and white space, so that JSON comes to its end.
UNLIKELY = [
    i for i in range(scripted.VOCAB_SIZE) if not scripted.tokenizer().decode([i], skip_special_tokens=True).strip()
]
ALL = np.full(scripted.VOCAB_SIZE // 32, -1, dtype=np.int32)


def one_by_one(request: Any, model: Preferences, length: int, ends: bool, backend: str) -> list[int]:
    """Plain decoding with the backend's own grammar: free up to the end of reasoning and after the end of sequence."""
    import torch

    grammar = request.structured_output_request.grammar._inner
    output: list[int] = []
    bits = torch.from_numpy(ALL.copy()).repeat(1, 1)
    while len(output) < length:
        begun = END_OF_REASONING in output
        over = EOS in output[output.index(END_OF_REASONING) :] if begun else False
        if begun and not over:
            grammar.fill_bitmask(bits, 0)
        token = model(output, bits[0].numpy() if begun and not over else ALL)
        if begun and not over:
            assert grammar.accept_tokens("r", [token]) or (token == EOS and backend == "outlines")
        output.append(token)
        if ends and begun and token == EOS:
            break
    return output


def in_steps(
    manager: Any, request: Any, model: Preferences, k: int, right: float, length: int, ends: bool
) -> list[int]:
    """The scheduler's way: drafts are validated, masks filled for all of them, accepted tokens advance the grammar."""
    grammar = request.structured_output_request.grammar
    rng = np.random.default_rng(k)
    output: list[int] = []
    while len(output) < length:
        drafts: list[int] = []
        for _ in range(k if output else 0):  # the first token comes from the prefill
            known = model(output + drafts, ALL)  # a drafter knows no grammar
            drafts.append(known if rng.random() < right else int(rng.integers(scripted.VOCAB_SIZE)))
        # The constrained text is what a drafter that has seen such answers would propose.
        drafts = request.hints(output, drafts) if rng.random() < right else drafts
        assert manager.should_advance(request)
        drafts = grammar.validate_tokens(drafts)
        mask = manager.grammar_bitmask({"r": request}, ["r"], {"r": drafts})
        assert mask.shape[0] == len(drafts) + 1
        made: list[int] = []
        for at, draft in enumerate([*drafts, None]):
            made.append(model(output + made, mask[at]))
            if made[-1] != draft:
                break
        stop = next((i + 1 for i, t in enumerate(made) if ends and t == EOS), len(made))
        made = made[:stop]
        assert manager.should_advance(request)
        assert grammar.accept_tokens("r", made)
        output += made
        if ends and output[-1] == EOS:
            break
    return output[:length]


@pytest.mark.parametrize("ends", [True, False], ids=["", "ignore-eos"])
@pytest.mark.parametrize(("backend", "kind"), CASES)
@pytest.mark.parametrize("ks", [(2, 5), pytest.param((1, 3, 4, 8), marks=pytest.mark.slow)], ids=str)
def test_steps_give_what_single_tokens_give(
    manager: Any, backend: str, kind: str, ends: bool, ks: tuple[int, ...]
) -> None:
    """The end of reasoning at every place of a step of k drafts, mostly right."""
    constrain, fits = KINDS[kind]
    constraint = constrain(backend)
    assert constraint is not None
    tokenizer = scripted.tokenizer()
    crossed = 0
    for k in ks:
        for before in range(k + 1):
            script = [*scripted.words()[:before], END_OF_REASONING]
            model = Preferences(script, seed=before + 10 * k)
            prompt = scripted.prompt(before)
            length = before + (60 if ends else 30)
            plain = new_request(manager(backend, 0), backend, constraint, prompt)
            wanted = one_by_one(plain, model, length, ends, backend)
            request = new_request(manager(backend, k), backend, constraint, prompt)
            request.hints = lambda output, drafts, wanted=wanted: wanted[len(output) : len(output) + len(drafts)]
            made = in_steps(manager(backend, k), request, model, k, 0.8, length, ends)
            assert made == wanted[: len(made)]
            assert len(made) == len(wanted)
            assert made[before] == END_OF_REASONING
            if ends and made[-1] == EOS:
                assert fits(tokenizer.decode(made[before + 1 : -1])), tokenizer.decode(made)
                crossed += 1
    assert not ends or crossed > 0


def fill(grammar: Any) -> list[int]:
    """The mask of the next token: int32 words."""
    import torch

    bits = torch.from_numpy(ALL.copy()).repeat(1, 1)
    grammar.fill_bitmask(bits, 0)
    words: list[int] = bits[0].tolist()
    return words


def answered(manager: Any, backend: str) -> Any:
    """The grammar of a request whose answer is one of several words."""
    constraint = KINDS["choice"][0](backend)
    assert constraint is not None
    return new_request(manager(backend, 5), backend, constraint, scripted.prompt(0)).structured_output_request.grammar


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rollback_leads_to_where_it_was(manager: Any, backend: str) -> None:
    """By up to k tokens, over the end of reasoning, the end of sequence and the free tokens behind it."""
    k, grammar = 5, answered(manager, backend)
    answer = scripted.tokenizer().encode(CHOICES[2], add_special_tokens=False)
    tokens = [7, 8, END_OF_REASONING, *answer, EOS, 9, 10, 11]
    masks, over = [fill(grammar)], [grammar.is_terminated()]
    for at, token in enumerate(tokens, 1):
        assert grammar.accept_tokens("r", [token])
        masks.append(fill(grammar))
        over.append(grammar.is_terminated())
        for back in range(min(k, at) + 1):
            grammar.rollback(back)
            assert (fill(grammar), grammar.is_terminated()) == (masks[at - back], over[at - back]), (at, back)
            assert grammar.accept_tokens("r", tokens[at - back : at])
            assert (fill(grammar), grammar.is_terminated()) == (masks[at], over[at]), (at, back)
    assert over == [at > tokens.index(EOS) for at in range(len(tokens) + 1)]
    assert grammar.validate_tokens([3, 4]) == [3, 4]  # after the end all are free
    with pytest.raises(NotImplementedError):
        grammar.reset()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_that_the_grammar_forbids_is_rejected(manager: Any, backend: str) -> None:
    grammar = answered(manager, backend)
    assert grammar.accept_tokens("r", [END_OF_REASONING])
    mask = fill(grammar)
    assert not mask[9 // 32] >> 9 % 32 & 1
    assert not grammar.accept_tokens("r", [9])
    assert not grammar.is_terminated()


@pytest.mark.parametrize(
    ("target", "reasoner", "positioned"), [(GEMMA4, None, True), (GEMMA4, object(), False), (LLAMA, None, False)]
)
def test_other_models_and_reasoning_parsers_keep_the_backends_grammar(
    target: Any, reasoner: Any, positioned: bool
) -> None:
    from vllm_gemma4_spec.requests.grammar import PositionedGrammar
    from vllm_gemma4_spec.requests.structured_output import create_grammar, manager_init

    backend = SimpleNamespace(allocate_token_bitmask=lambda rows: np.zeros((rows, 4), dtype=np.int32))
    made = SimpleNamespace(reasoner=reasoner, tokenizer=SimpleNamespace(eos_token_id=EOS), backend=backend)
    manager_init(lambda manager, config: None)(made, SimpleNamespace(model_config=target))
    grammar, request = object(), SimpleNamespace(structured_output_request=SimpleNamespace())
    got = create_grammar(lambda manager, request: grammar)(made, request)
    assert isinstance(got, PositionedGrammar) == positioned
    assert (got is grammar) != positioned


def test_lm_format_enforcer_cannot_be_loaded() -> None:
    """Its releases import a name that 0.19.1 has moved. Where this fails, the backend belongs into BACKENDS."""
    with pytest.raises(ImportError, match="vllm is not installed"):
        importlib.import_module("lmformatenforcer.integrations.vllm")
