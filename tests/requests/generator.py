"""Random requests that combine what a request can ask for, and the smallest of those that are answered differently.

A request is plain data, so that a failure can be read and asked again: ``prompt`` (token ids) and ``params`` (what
SamplingParams takes, with ``structured_outputs`` as a mapping).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vllm_gemma4_spec.demo import data, template

Request = dict[str, Any]

DEFAULT_MAX_TOKENS = 16  # SamplingParams' own max_tokens
LOGPROB_TOLERANCE = 1e-3  # float32, batches of other shapes
STOPS = ["1", "2", "3", "4", "5", ", ", "is", " has", "The", ".", "\n", "call", " Anna", "apples", "thought"]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": data.NAMES[:4]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
CONSTRAINTS: list[dict[str, Any]] = [
    {"choice": ["yes", "no"]},
    {"choice": [f"{name} has {n}" for name in data.NAMES[:3] for n in (1, 2)]},
    {"regex": "[0-9]{1,3}(, [0-9]{1,2}){0,2}"},
    {"regex": "The answer is [a-z]+\\."},
    {"json": SCHEMA},
    {"grammar": 'root ::= "I" " count"? " " [0-9]+ "."'},
]
# Parameter -> a random value of it. Each is in a request with the chance that stands beside it.
FIELDS: dict[str, tuple[float, Callable[[random.Random], Any]]] = {
    "structured_outputs": (0.35, lambda rng: dict(rng.choice(CONSTRAINTS))),
    "thinking_token_budget": (0.3, lambda rng: rng.choice([0, 1, 2, 3, 4, 6, 9, 15])),
    "stop": (0.3, lambda rng: rng.sample(STOPS, rng.randint(1, 4))),
    "include_stop_str_in_output": (0.15, lambda rng: True),
    "stop_token_ids": (0.15, lambda rng: rng.sample(range(107, 1000), 60)),
    "min_tokens": (0.15, lambda rng: rng.randint(1, 12)),
    "ignore_eos": (0.15, lambda rng: True),
    "n": (0.15, lambda rng: rng.randint(2, 3)),
    "logprobs": (0.25, lambda rng: rng.randint(0, 5)),
    "prompt_logprobs": (0.1, lambda rng: rng.randint(0, 3)),
    "flat_logprobs": (0.05, lambda rng: True),
    "presence_penalty": (0.12, lambda rng: rng.choice([-0.5, 0.7])),
    "frequency_penalty": (0.12, lambda rng: rng.choice([-0.4, 0.9])),
    "repetition_penalty": (0.12, lambda rng: rng.choice([0.9, 1.3])),
    "bad_words": (0.12, lambda rng: rng.sample(["Anna", "Here", "The", "2", "capital", "start"], 2)),
    "allowed_token_ids": (0.05, lambda rng: [1, 50, 100, 101, 106, *rng.sample(range(107, 1000), 500)]),
    "repetition_detection": (0.1, lambda rng: {"max_pattern_size": 3, "min_pattern_size": 1, "min_count": 3}),
    "skip_special_tokens": (0.3, lambda rng: False),
    "spaces_between_special_tokens": (0.1, lambda rng: False),
    "detokenize": (0.05, lambda rng: False),
    "skip_reading_prefix_cache": (0.05, lambda rng: True),
    "seed": (0.1, lambda rng: rng.randint(0, 99)),
    "top_p": (0.1, lambda rng: 0.9),
    "top_k": (0.1, lambda rng: 5),
}


def requests(seed: int, tokenizer: Any) -> Iterator[Request]:
    """An endless, reproducible stream over the demo's kinds of prompts."""
    rng = random.Random(seed)
    asked = data.dialogues(seed, held_out=True)
    for dialogue in asked:
        text = template.prompt_text(dialogue)
        if rng.random() < 0.3:  # an answer that has begun: in its reasoning, or in its content
            text += dialogue.answer[: rng.randint(0, len(dialogue.answer))]
        params = {name: value(rng) for name, (chance, value) in FIELDS.items() if rng.random() < chance}
        params["max_tokens"] = rng.choice([1, 2, 3, 5, 8, 20, 40, 60])
        params["min_tokens"] = min(params.get("min_tokens", 0), params["max_tokens"])
        if "stop" in params:
            params.pop("detokenize", None)
        yield {"prompt": tokenizer.encode(text, add_special_tokens=False), "params": params}


def sampling(request: Request) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

    params = dict(request["params"])
    for name, kind in (
        ("structured_outputs", StructuredOutputsParams),
        ("repetition_detection", RepetitionDetectionParams),
    ):
        if name in params:
            params[name] = kind(**params[name])
    # vLLM samples several answers at random only: from the one likeliest token each is the greedy answer.
    several = {"temperature": 1.0, "top_p": 1.0, "top_k": 1, "seed": 0} if params.get("n", 1) > 1 else {}
    return SamplingParams(**({"temperature": 0.0} | params | several))


def answers(llm: Any, asked: Sequence[Request]) -> list[dict[str, Any]]:
    """What an engine makes of each request, in a form that :func:`same` compares."""
    outputs = llm.generate(
        [{"prompt_token_ids": r["prompt"]} for r in asked], [sampling(r) for r in asked], use_tqdm=False
    )
    return [
        {
            "choices": [
                (o.text, list(o.token_ids), o.finish_reason, o.stop_reason)
                for o in sorted(output.outputs, key=lambda o: o.index)
            ],
            "usage": [len(output.prompt_token_ids), sum(len(o.token_ids) for o in output.outputs)],
            "logprobs": [_plain(o.logprobs) for o in sorted(output.outputs, key=lambda o: o.index)],
            "prompt_logprobs": _plain(output.prompt_logprobs),
        }
        for output in outputs
    ]


def _plain(logprobs: Any) -> list[dict[int, float]] | None:
    if logprobs is None:
        return None
    return [{} if at is None else {token: p.logprob for token, p in at.items()} for at in logprobs]


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    if a["choices"] != b["choices"] or a["usage"] != b["usage"]:
        return False
    return all(
        (x is None) == (y is None) and (x is None or _close(x, y))
        for x, y in zip([*a["logprobs"], a["prompt_logprobs"]], [*b["logprobs"], b["prompt_logprobs"]], strict=True)
    )


def _close(a: list[dict[int, float]], b: list[dict[int, float]]) -> bool:
    """Equal within the tolerance; of two tokens as likely as each other, either may stand at the end of the list."""
    if len(a) != len(b):
        return False
    for x, y in zip(a, b, strict=True):
        if any(abs(x[t] - y[t]) > LOGPROB_TOLERANCE for t in x.keys() & y.keys()):
            return False
        only = [x[t] for t in x.keys() - y.keys()], [y[t] for t in y.keys() - x.keys()]
        if len(only[0]) != len(only[1]):
            return False
        if any(abs(p - q) > LOGPROB_TOLERANCE for p, q in zip(sorted(only[0]), sorted(only[1]), strict=True)):
            return False
    return True


def smaller(request: Request) -> list[Request]:
    """Requests that ask for a little less."""
    prompt, params = request["prompt"], request["params"]
    out = [{"prompt": prompt, "params": {k: v for k, v in params.items() if k != name}} for name in params]
    for name, value in params.items():
        if isinstance(value, list) and len(value) > 1:
            out += [{"prompt": prompt, "params": {**params, name: half}} for half in _halves(value)]
        elif isinstance(value, int) and not isinstance(value, bool) and value > 1:
            out += [{"prompt": prompt, "params": {**params, name: v}} for v in {value // 2, value - 1}]
    out += [{"prompt": half, "params": params} for half in _halves(prompt)] if len(prompt) > 1 else []
    return [r for r in out if r["params"].get("min_tokens", 0) <= r["params"].get("max_tokens", DEFAULT_MAX_TOKENS)]


def _halves(values: list[Any]) -> list[list[Any]]:
    middle = len(values) // 2
    return [values[:middle], values[middle:]]


def shrink(request: Request, differ: Callable[[list[Request]], list[bool]], rounds: int = 20) -> Request:
    """The smallest request found that still differs.

    Args:
        differ: asks all of them of both engines; True where the answers differ.
    """
    for _ in range(rounds):
        tried = smaller(request)
        differing = [candidate for candidate, differs in zip(tried, differ(tried), strict=True) if differs]
        if not differing:
            break
        request = min(differing, key=lambda r: (len(r["params"]), len(str(r))))
    return request
