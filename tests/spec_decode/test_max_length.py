"""One request near the maximum length: the others' drafts go on, and stay right afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support import tiny_models
from tests.support.engine import acceptance, engine, generate, random_prompts
from tests.support.stock import without

K = 3
LONGEST = 128
# The first reaches the maximum length while the second is being answered; the third comes after it.
PROMPTS = random_prompts((90, 10, 25))
OPTIONS = {"max_model_len": LONGEST, "max_num_seqs": 2, "enable_prefix_caching": True}


@pytest.fixture(scope="module")
def plain(tiny: dict[str, Path]) -> list[list[int]]:
    with engine(tiny["target"], **OPTIONS) as llm:
        return generate(llm, PROMPTS, 90)


def test_every_draft_is_accepted_beside_a_request_that_ends_at_the_limit(
    tiny: dict[str, Path], plain: list[list[int]]
) -> None:
    with engine(tiny["target"], tiny["target"], K, **OPTIONS) as llm:
        before = acceptance(llm)
        assert generate(llm, PROMPTS, 90) == plain
        counts = acceptance(llm) - before
        assert [len(p) + len(a) for p, a in zip(PROMPTS, plain, strict=True)] == [LONGEST, 100, 115]
        assert counts.accepted == counts.proposed
        assert counts.accepted > 0.6 * sum(len(a) for a in plain)  # every step of every request had drafts
        # What the drafter left in the cache serves prompts that continue a cached answer, or part of it: drafts past
        # the maximum length were written nowhere.
        again = [PROMPTS[0] + plain[0][:10], *(p + a for p, a in zip(PROMPTS[1:], plain[1:], strict=True))]
        before = acceptance(llm)
        generate(llm, again, 10)
        counts = acceptance(llm) - before
        assert counts.accepted == counts.proposed > 0


def test_a_drafter_that_ends_before_the_target(tiny: dict[str, Path], plain: list[list[int]], tmp_path: Path) -> None:
    """It drafts for the requests within its own length, as E4B (131,072) does beside 31B (262,144)."""
    short = tmp_path / "short"
    shutil.copytree(tiny["target"], short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    alone = [PROMPTS[1]]
    with engine(tiny["target"], short, K, **OPTIONS) as llm:
        before = acceptance(llm)
        generate(llm, alone, 40)  # within 64
        within = acceptance(llm) - before
        assert within.accepted == within.proposed > 0
        llm.reset_prefix_cache()
        before = acceptance(llm)
        assert generate(llm, PROMPTS, 90) == plain
        counts = acceptance(llm) - before
    # Both requests that begin within the drafter's length got their drafts, although a longer one ran beside them.
    assert within.accepted <= counts.accepted < counts.proposed


def test_without_the_patch_acceptance_decays(tiny: dict[str, Path], plain: list[list[int]]) -> None:
    from vllm_gemma4_spec.spec_decode.patches import LENGTH_LIMIT

    with without(LENGTH_LIMIT), engine(tiny["target"], tiny["target"], K, **OPTIONS) as llm:
        before = acceptance(llm)
        assert generate(llm, PROMPTS, 90) == plain
        counts = acceptance(llm) - before
    assert counts.accepted < counts.proposed


@pytest.mark.slow
def test_prompts_up_to_the_maximum_length(tmp_path: Path) -> None:
    """Sixty times the longer window, in chunks of a quarter; the last but one ends in the middle of a draft."""
    longest = 4096
    config = tiny_models.target_config(max_position_embeddings=longest)
    model = tiny_models.save(config, tmp_path / "long")
    prompts = random_prompts((3000, longest - 30, longest - 1, 50))
    options = {"max_model_len": longest, "max_num_batched_tokens": longest // 4, "max_num_seqs": 4}
    with engine(model, **options) as llm:
        want = generate(llm, prompts, 40)
    assert [len(a) for a in want] == [40, 30, 1, 40]
    with engine(model, model, K, **options) as llm:
        before = acceptance(llm)
        assert generate(llm, prompts, 40) == want
        counts = acceptance(llm) - before
    assert counts.accepted == counts.proposed > 0.6 * sum(len(a) for a in want)
