"""What the clients ask: every kind of held-out question, long and short, in all the ways a client can ask."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from vllm_gemma4_spec.demo import measure, run

# Greedy requests: (max_tokens, more fields). Cut in the middle of anything; to the end; far beyond it.
LIMITS = ((160, {}), (7, {}), (24, {}), (160, {"ignore_eos": True}), (160, {"stop": ["apples", "\n2."]}))
# Requests that must be refused, and the status of the answer.
WRONG: tuple[tuple[dict[str, Any], int], ...] = (
    ({"model": "no-such-model"}, 404),
    ({"temperature": -1}, 400),
    ({"max_tokens": 100_000}, 400),
    ({"messages": "no list"}, 400),
    ({"messages": [{"role": "user", "content": "Count from 1 to 9. " * 600}]}, 400),
    ({"tools": [{"type": "function"}]}, 400),
)


@dataclass(frozen=True)
class Asked:
    """One request. ``status`` is what must come back; ``greedy`` answers must be the same every time."""

    key: int
    body: dict[str, Any]
    status: int = 200
    greedy: bool = True


def pool(count: int, seed: int = 11) -> list[Asked]:
    """``count`` greedy requests; every third has a conversation of up to 1,500 tokens before it."""
    rng = random.Random(seed)
    questions = measure.held_out(count * 4, seed)
    out = []
    for key, question in enumerate(questions[:count]):
        messages = run._json_arguments(question.messages)
        if key % 3 == 0 and messages[0]["role"] == "user":
            before: list[dict[str, Any]] = []
            for other in rng.sample(questions[count:], 12 + key % 17):
                if other.content and len(other.messages) == 1:
                    before += [*other.messages, {"role": "assistant", "content": other.content}]
            messages = before + messages
        limit, more = LIMITS[key % len(LIMITS)]
        body = {
            "model": run.MODEL,
            "messages": messages,
            "temperature": 0,
            "max_tokens": limit,
            "chat_template_kwargs": {"enable_thinking": question.thinking},
            **more,
            **({"tools": question.tools} if question.tools else {}),
        }
        out.append(Asked(key, body))
    return out


def mix(requests: list[Asked], rng: random.Random) -> Asked:
    """The next request of a client: one in twelve is sampled, one in twenty wrong."""
    asked = rng.choice(requests)
    roll = rng.random()
    if roll < 0.05:
        change, status = rng.choice(WRONG)
        return Asked(asked.key, {**asked.body, **change}, status)
    if roll < 0.13:
        return Asked(asked.key, {**asked.body, "temperature": 0.9, "seed": rng.randrange(1000)}, greedy=False)
    return asked
