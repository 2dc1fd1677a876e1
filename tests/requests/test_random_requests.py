"""Random requests: an engine that speculates answers as one that does not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.requests import generator
from tests.support import scripted
from tests.support.engine import acceptance, engine

REASONING = {"reasoning_start_str": "<|channel>", "reasoning_end_str": "<channel|>"}
OPTIONS: dict[str, Any] = {
    "skip_tokenizer_init": False,
    "structured_outputs_config": {
        "reasoning_parser": "gemma4",
        "backend": "xgrammar",
        "disable_any_whitespace": True,  # a model of no judgement would write it without end
    },
    "max_num_seqs": 64,
    "reasoning_config": REASONING,
    "max_logprobs": 16,
    "generation_config": "auto",
}
FAST, SLOW = 40, 2000
LENGTHS = (1, 2, 3, 5, 8)  # drafts a step; each gets its share of the requests


def compare(
    asked: Sequence[generator.Request],
    plain: Callable[[], Any],
    speculating: Callable[[], Any],
    wanted: Sequence[Any] | None = None,
) -> list[int]:
    """Places of the requests that the two engines answer differently; ``wanted``: plain answers known already."""
    if wanted is None:
        with plain() as llm:
            wanted = generator.answers(llm, asked)
    with speculating() as llm:
        before = acceptance(llm)
        got = generator.answers(llm, asked)
        drafted = acceptance(llm) - before
    assert len(asked) < FAST or 0 < drafted.accepted < drafted.proposed
    return [i for i, (a, b) in enumerate(zip(wanted, got, strict=True)) if not generator.same(a, b)]


def check(
    asked: list[generator.Request],
    plain: Callable[[], Any],
    speculating: Callable[[], Any],
    wanted: Sequence[Any] | None = None,
) -> None:
    differing = compare(asked, plain, speculating, wanted)
    if differing:

        def differ(tried: list[generator.Request]) -> list[bool]:
            places = set(compare(tried, plain, speculating))
            return [i in places for i in range(len(tried))]

        small = generator.shrink(asked[differing[0]], differ)
        pytest.fail(f"{len(differing)} of {len(asked)} requests are answered differently; one of them: {small}")


def test_answers_are_those_of_plain_decoding(tmp_path: Path) -> None:
    target = scripted.save(tmp_path / "target")
    drafter = scripted.save(tmp_path / "drafter", scripted.mistakes())
    asked = list(itertools.islice(generator.requests(7, scripted.tokenizer()), FAST))
    check(asked, lambda: engine(target, **OPTIONS), lambda: engine(target, drafter, 4, **OPTIONS))


@pytest.fixture(scope="module")
def demo() -> Any:
    from vllm_gemma4_spec.demo import build

    return build.ensure(build.default_folder())[0]


@pytest.fixture(scope="module")
def thousands(demo: Any) -> dict[int, tuple[list[generator.Request], list[Any]]]:
    """k -> requests, and what plain decoding answers: one engine for all of them."""
    from transformers import AutoTokenizer

    asked = list(itertools.islice(generator.requests(11, AutoTokenizer.from_pretrained(demo.target)), SLOW))
    with engine(demo.target, **OPTIONS) as llm:
        wanted = generator.answers(llm, asked)
    share = SLOW // len(LENGTHS)
    return {
        k: (asked[at : at + share], wanted[at : at + share])
        for k, at in zip(LENGTHS, range(0, SLOW, share), strict=True)
    }


@pytest.mark.slow
@pytest.mark.parametrize("k", LENGTHS)
def test_two_thousand_requests_to_the_demo_pair(thousands: Any, demo: Any, k: int) -> None:
    asked, wanted = thousands[k]
    check(
        asked,
        lambda: engine(demo.target, **OPTIONS),
        lambda: engine(demo.target, demo.drafter, k, **OPTIONS),
        wanted,
    )


def test_a_failure_shrinks_to_what_it_takes() -> None:
    """Of a request with every field, what is left is the one that two imaginary engines disagree on."""

    def differ(tried: list[generator.Request]) -> list[bool]:
        return ["5" in r["params"].get("stop", ()) and r["params"].get("max_tokens", 0) > 2 for r in tried]

    stream = generator.requests(3, scripted.tokenizer())
    found = next(r for r in stream if differ([r])[0] and len(r["params"]) > 5)
    small = generator.shrink(found, differ)
    assert small["params"] == {"stop": ["5"], "max_tokens": 3}
    assert len(small["prompt"]) == 1
