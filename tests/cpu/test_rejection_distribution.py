"""Speculative random sampling gives the distribution of plain sampling, with vLLM's own sampler classes.

The target is a Markov chain over four tokens, so the exact probability of every three-token answer is known. A
drafter with another chain drafts; ``RejectionSampler`` keeps or replaces its drafts until every answer is complete.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from vllm.v1.sample import rejection_sampler
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_gemma4_spec.cpu import rejection_kernels
from vllm_gemma4_spec.cpu.launch import CpuKernel
from vllm_gemma4_spec.cpu.patches import CPU_KERNELS
from vllm_gemma4_spec.registry import PATCHER

VOCAB, LENGTH, DRAFTS, ANSWERS = 4, 3, 3, 10_000
START = 0  # the token before every answer
# Row: logits after that token. The drafter is like the target, but not the same.
TARGET = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1)) * 1.2
DRAFTER = TARGET + torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def cpu_kernels() -> Iterator[None]:
    PATCHER.apply([CPU_KERNELS])
    # The sampler of the bonus token is compiled: seconds of C++ for nothing that is tested here.
    with torch.compiler.set_stance("force_eager"):
        yield
    PATCHER.undo([CPU_KERNELS])


def sampling(
    temperature: torch.Tensor, top_k: int | None = None, top_p: float | None = None, own_seeds: bool = True
) -> SamplingMetadata:
    """Sampling parameters of a batch, one row per entry of ``temperature``; 0 is greedy."""
    rows = len(temperature)
    seeds = {i: torch.Generator().manual_seed(7919 * i + 3) for i in range(rows)} if own_seeds else {}
    none = torch.empty(0)
    return SamplingMetadata(
        temperature=temperature,
        all_greedy=bool((temperature == 0).all()),
        all_random=bool((temperature > 0).all()),
        top_p=None if top_p is None else torch.full((rows,), top_p),
        top_k=None if top_k is None else torch.full((rows,), top_k, dtype=torch.int32),
        generators=seeds,
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=none,
        presence_penalties=none,
        repetition_penalties=none,
        output_token_ids=[[] for _ in range(rows)],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )


def answers_by_speculation(how: SamplingMetadata, with_draft_probs: bool) -> np.ndarray:
    """[rows, LENGTH] tokens. Each step has 0 to DRAFTS drafts per row.

    With ``with_draft_probs`` drafts are sampled and their probabilities given; without, they are the drafter's
    most probable tokens and count as certain, which is what vLLM 0.19.1 does for every method.
    """
    rng = np.random.default_rng(11)
    noise = torch.Generator().manual_seed(12)
    rows = len(how.temperature)
    sampler = RejectionSampler(Sampler())
    answer = np.full((rows, LENGTH + DRAFTS + 1), -1)
    length = np.zeros(rows, dtype=int)
    last = torch.full((rows,), START)
    draft_prob_of = DRAFTER.softmax(-1)
    while (length < LENGTH).any():
        counts = rng.integers(0, DRAFTS + 1, rows)
        context = [last]
        for _ in range(DRAFTS):
            probs = draft_prob_of[context[-1]]
            sampled = torch.multinomial(probs, 1, generator=noise).squeeze(1)
            context.append(sampled if with_draft_probs else probs.argmax(-1))
        contexts = torch.stack(context, 1)  # [rows, DRAFTS + 1]
        is_draft = torch.arange(DRAFTS) < torch.as_tensor(counts).unsqueeze(1)
        is_logit = torch.arange(DRAFTS + 1) <= torch.as_tensor(counts).unsqueeze(1)
        ends = np.cumsum(counts + 1)
        bonus = torch.as_tensor(ends - 1)
        metadata = SpecDecodeMetadata(
            draft_token_ids=contexts[:, 1:][is_draft].int(),
            num_draft_tokens=counts.tolist(),
            cu_num_draft_tokens=torch.as_tensor(np.cumsum(counts)).int(),
            cu_num_sampled_tokens=torch.as_tensor(ends).int(),
            target_logits_indices=torch.as_tensor(np.setdiff1d(np.arange(ends[-1]), bonus)),
            bonus_logits_indices=bonus,
            logits_indices=torch.arange(ends[-1]),
        )
        draft_probs = draft_prob_of[contexts[:, :-1][is_draft]] if with_draft_probs else None
        sampled = sampler(metadata, draft_probs, TARGET[contexts[is_logit]], how).sampled_token_ids.numpy()
        for column in sampled.T:
            row = np.flatnonzero((column != -1) & (length < LENGTH))
            answer[row, length[row]] = column[row]
            length[row] += 1
        last = torch.as_tensor(answer[np.arange(rows), np.maximum(length, 1) - 1])
    return answer[:, :LENGTH]


def answers_by_plain_sampling(how: SamplingMetadata) -> np.ndarray:
    """[rows, LENGTH] tokens, one at a time."""
    tokens = [torch.full((len(how.temperature),), START)]
    sampler = Sampler()
    for _ in range(LENGTH):
        tokens.append(sampler(TARGET[tokens[-1]], how).sampled_token_ids.view(-1).long())
    return torch.stack(tokens[1:], 1).numpy()


def exact(temperature: float, top_k: int | None = None, top_p: float | None = None) -> np.ndarray:
    """[VOCAB ** LENGTH] probability of each answer, from the definitions of temperature, top-k and top-p."""
    logits = TARGET.double().numpy() / temperature
    order = np.argsort(-logits, axis=1)
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for row, ranks in zip(probs, order, strict=True):
        row[ranks[top_k:] if top_k else []] = 0
        row /= row.sum()
        before = np.cumsum(row[ranks]) - row[ranks]
        row[ranks[before >= (top_p or 1)]] = 0
        row /= row.sum()
    out = [
        np.prod([probs[a, b] for a, b in itertools.pairwise((START, *answer))])
        for answer in itertools.product(range(VOCAB), repeat=LENGTH)
    ]
    return np.array(out)


def p_value(answers: np.ndarray, expected: np.ndarray) -> float:
    """Pearson's chi-square test; answers expected fewer than five times count as one."""
    assert np.isclose(expected.sum(), 1)
    index = np.ravel_multi_index(tuple(answers.T), (VOCAB,) * LENGTH)
    counts, means = np.bincount(index, minlength=len(expected)), expected * len(answers)
    if counts[expected == 0].any():
        return 0.0
    rare = means < 5
    counts = np.append(counts[~rare], counts[rare].sum())
    means = np.append(means[~rare], means[rare].sum())
    counts, means = counts[means > 0], means[means > 0]
    statistic = ((counts - means) ** 2 / means).sum()
    half_freedom = torch.tensor((len(means) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half_freedom, torch.tensor(statistic / 2)))


CONSTRAINTS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 3},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 3, "top_p": 0.9},
]


@pytest.mark.parametrize("with_draft_probs", [False, True], ids=["certain-drafts", "sampled-drafts"])
@pytest.mark.parametrize("constraints", CONSTRAINTS, ids=str)
def test_distribution_is_that_of_plain_sampling(constraints: dict[str, Any], with_draft_probs: bool) -> None:
    expected = exact(**constraints)
    temperature = torch.full((ANSWERS,), constraints["temperature"])
    limits = {k: v for k, v in constraints.items() if k != "temperature"}
    assert p_value(answers_by_plain_sampling(sampling(temperature, **limits)), expected) > 1e-3
    assert p_value(answers_by_speculation(sampling(temperature, **limits), with_draft_probs), expected) > 1e-3


def test_requests_without_a_seed() -> None:
    torch.manual_seed(5)
    answers = answers_by_speculation(sampling(torch.ones(ANSWERS), own_seeds=False), with_draft_probs=False)
    assert p_value(answers, exact(1.0)) > 1e-3


def test_greedy_and_random_requests_in_one_batch() -> None:
    temperature = torch.arange(2 * ANSWERS) % 2 * 1.0
    answers = answers_by_speculation(sampling(temperature), with_draft_probs=False)
    token, greedy = START, []
    for _ in range(LENGTH):
        token = int(TARGET[token].argmax())
        greedy.append(token)
    assert (answers[0::2] == greedy).all()
    assert p_value(answers[1::2], exact(1.0)) > 1e-3


def test_all_greedy() -> None:
    how = sampling(torch.zeros(50))
    assert (answers_by_speculation(how, with_draft_probs=False) == answers_by_plain_sampling(how)).all()


def _recovered_without_noise(grid: Any, output: torch.Tensor, cu: Any, draft: Any, q: Any, p: Any, *rest: Any) -> None:
    """The most probable replacement each time."""
    form = rejection_kernels.sample_recovered_tokens
    form[grid](output, cu, draft, q, p, torch.ones_like(rest[0]), *rest[1:-1], NO_DRAFT_PROBS=q is None)


def _recovered_from_target(grid: Any, output: torch.Tensor, cu: Any, draft: Any, q: Any, p: Any, *rest: Any) -> None:
    """From the target's distribution instead of what the drafts leave of it."""
    form = rejection_kernels.sample_recovered_tokens
    form[grid](output, cu, torch.full_like(draft, -1), None, p, *rest[:-1], NO_DRAFT_PROBS=True)


def _recovered_with_one_noise(grid: Any, output: torch.Tensor, cu: Any, draft: Any, q: Any, p: Any, *rest: Any) -> None:
    """Every request with the random numbers of the first: each is right by itself, together they are not."""
    form = rejection_kernels.sample_recovered_tokens
    form[grid](output, cu, draft, q, p, rest[0][:1].expand_as(rest[0]), *rest[1:-1], NO_DRAFT_PROBS=q is None)


@pytest.mark.parametrize("with_draft_probs", [False, True], ids=["certain-drafts", "sampled-drafts"])
@pytest.mark.parametrize("wrong", [_recovered_from_target, _recovered_without_noise, _recovered_with_one_noise])
def test_a_wrong_recovered_token_kernel_is_found(
    wrong: Callable[..., None], with_draft_probs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def form(grid: Any, *args: Any, NO_DRAFT_PROBS: bool) -> None:
        wrong(grid, *args, NO_DRAFT_PROBS)

    monkeypatch.setattr(rejection_sampler, "sample_recovered_tokens_kernel", CpuKernel(form))
    answers = answers_by_speculation(sampling(torch.ones(ANSWERS)), with_draft_probs)
    assert p_value(answers, exact(1.0)) < 1e-9


def test_a_wrong_acceptance_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepting 10 % too often."""

    def form(grid: Any, *args: Any, **kwargs: Any) -> None:
        args = (*args[:7], args[7] * 0.9, *args[8:])
        rejection_kernels.rejection_random_sample[grid](*args, **kwargs)

    monkeypatch.setattr(rejection_sampler, "rejection_random_sample_kernel", CpuKernel(form))
    answers = answers_by_speculation(sampling(torch.ones(ANSWERS)), with_draft_probs=False)
    assert p_value(answers, exact(1.0)) < 1e-4
