"""Random sampling with speculation has the distribution of plain random sampling."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma4ForCausalLM

from tests.support import tiny_models
from tests.support.engine import Acceptance, acceptance, engine, generate

VOCAB, TOKENS, SAMPLES = 8, 3, 4000
PROMPT = [3, 5, 7, 4]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vocab8")
    sizes = {"vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB}
    return {
        "target": tiny_models.save(tiny_models.target_config(**sizes), folder / "target"),
        "drafter": tiny_models.save(tiny_models.drafter_config(**sizes), folder / "drafter", seed=1),
    }


def probabilities(model: Path, temperature: float) -> dict[tuple[int, ...], float]:
    """Chance of every answer of ``TOKENS`` tokens, by transformers."""
    hf = Gemma4ForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    chances = {(): 1.0}
    for _ in range(TOKENS):
        grown: dict[Any, float] = {}
        prefixes = list(chances)
        with torch.no_grad():
            logits = hf(torch.tensor([PROMPT + list(p) for p in prefixes])).logits[:, -1]
        for prefix, row in zip(prefixes, (logits / temperature).softmax(-1).tolist(), strict=True):
            grown |= {(*prefix, t): chances[prefix] * p for t, p in enumerate(row)}
        chances = grown
    return chances


def chi_square(counts: Counter[tuple[int, ...]], chances: dict[tuple[int, ...], float]) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; rare answers share one cell."""
    total, rare, statistic, cells = sum(counts.values()), [0, 0.0], 0.0, 0
    for answer, chance in chances.items():
        if chance * total < 10:
            rare = [rare[0] + counts[answer], rare[1] + chance * total]
        else:
            statistic, cells = statistic + (counts[answer] - chance * total) ** 2 / (chance * total), cells + 1
    if rare[1] > 0:
        statistic, cells = statistic + (rare[0] - rare[1]) ** 2 / rare[1], cells + 1
    return statistic, cells - 1


def limit(freedom: int) -> float:
    """A value that a right sampler exceeds once in about 100,000 runs (Wilson and Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.26 * (2 / (9 * freedom)) ** 0.5) ** 3


def sample(small: dict[str, Path], temperature: float) -> tuple[Counter[tuple[int, ...]], Acceptance]:
    with engine(small["target"], small["drafter"], 2, max_num_seqs=64, seed=11) as llm:
        before = acceptance(llm)
        answers = generate(llm, [PROMPT] * SAMPLES, TOKENS, temperature=temperature)
        return Counter(map(tuple, answers)), acceptance(llm) - before


def test_speculative_sampling_has_the_targets_distribution(small: dict[str, Path]) -> None:
    counts, drafts = sample(small, temperature=0.4)
    assert 0 < drafts.accepted < drafts.proposed
    statistic, freedom = chi_square(counts, probabilities(small["target"], 0.4))
    assert freedom > 20
    assert statistic < limit(freedom)
    # The test can fail: the same samples do not fit a slightly different temperature.
    wrong, freedom = chi_square(counts, probabilities(small["target"], 0.5))
    assert wrong > limit(freedom)
