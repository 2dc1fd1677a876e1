"""Two kernels sample where every request of a step wants the largest of its logits alone; vLLM's samplers elsewhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vllm_gemma4_spec
from tests.support import engine as _engine  # sets the environment
from tests.support.configs import GEMMA4, LLAMA, vllm_config
from tests.support.step_cases import drafted, greedy
from tests.support.stock import without
from vllm_gemma4_spec import scope
from vllm_gemma4_spec.kernels import greedy as kernels
from vllm_gemma4_spec.performance.patches import GREEDY_SAMPLING

assert _engine

DRAFTS = [[4, 2], [1]]
# The first request's first draft is right and its second is not, the second's is: then comes the token behind it.
LOGITS = torch.eye(6)[[4, 3, 5, 1, 0]] * 9


class OnCard(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


@pytest.fixture(autouse=True)
def patched() -> None:
    vllm_gemma4_spec.apply()


def sampled(
    monkeypatch: pytest.MonkeyPatch,
    metadata: Any,
    target: Any = GEMMA4,
    logits: torch.Tensor | None = None,
    steps: int = 1,
) -> list[str]:
    """Our kernels that sample for a plain and a speculative step, or are compiled; the samples must be right."""
    from vllm.v1.sample.rejection_sampler import RejectionSampler
    from vllm.v1.sample.sampler import Sampler

    launched: list[tuple[str, torch.Tensor]] = []

    def tokens(logits: torch.Tensor) -> torch.Tensor:
        launched.append(("tokens", logits.argmax(-1).int()))
        return launched[-1][1]

    def verdict(metadata: Any, logits: torch.Tensor, most_drafts: int) -> torch.Tensor:
        assert metadata.num_draft_tokens == [2, 1]
        assert most_drafts == 2
        launched.append(("verdict", torch.tensor([[4, 3, -1], [1, 0, -1]], dtype=torch.int32)))
        return launched[-1][1]

    monkeypatch.setattr(kernels, "tokens", tokens)
    monkeypatch.setattr(kernels, "verdict", verdict)
    config = vllm_config(target, target)
    config.speculative_config.num_speculative_tokens = 2
    monkeypatch.setattr(scope, "current_config", lambda: config)
    given = LOGITS.clone().as_subclass(OnCard) if logits is None else logits
    sampler = Sampler()
    both = sampler, RejectionSampler(sampler)
    for _ in range(steps):
        plain = both[0](given[:2], metadata).sampled_token_ids
        speculative = both[1](drafted(DRAFTS), None, given, metadata).sampled_token_ids
        assert plain.dtype == speculative.dtype == torch.int32
        if metadata.all_greedy and metadata.allowed_token_ids_mask is None:
            assert plain.tolist() == [[4], [3]]
            assert speculative.tolist() == [[4, 3, -1], [1, 0, -1]]
    used = {plain.data_ptr(), speculative.data_ptr()}
    return [name if made.data_ptr() in used else f"{name} compiled" for name, made in launched]


def test_two_kernels_sample_greedily(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sampled(monkeypatch, greedy()) == ["tokens", "verdict"]


def test_stock_copies_the_logits_first(monkeypatch: pytest.MonkeyPatch) -> None:
    with without(GREEDY_SAMPLING):
        assert sampled(monkeypatch, greedy()) == []


def processors(*them: Any) -> Any:
    from vllm.v1.sample.logits_processor import LogitsProcessors

    return LogitsProcessors(them)


class Own:
    """Of a user's own."""

    def is_argmax_invariant(self) -> bool:
        return False

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits


def builtin(name: str, **state: Any) -> Any:
    """One of vLLM's processors, or of ours, with such requests."""
    from vllm.v1.sample.logits_processor import builtin

    from vllm_gemma4_spec.requests.min_tokens import MinTokens
    from vllm_gemma4_spec.requests.thinking_budget import ThinkingBudget

    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=2),
        speculative_config=SimpleNamespace(num_speculative_tokens=2),
        reasoning_config=SimpleNamespace(reasoning_start_token_ids=[1], reasoning_end_token_ids=[2]),
    )
    kinds = {kind.__name__: kind for kind in (MinTokens, ThinkingBudget)} | vars(builtin)
    made = kinds[name](config, torch.device("cpu"), False)
    for attribute, value in state.items():
        setattr(made, attribute, value)
    return made


IDLE = {
    "LogitBiasLogitsProcessor": "biases",
    "MinTokensLogitsProcessor": "min_toks",
    "MinTokens": "min_toks",
    "ThinkingBudget": "requests",
}


def test_processors_without_a_request_are_no_hindrance(monkeypatch: pytest.MonkeyPatch) -> None:
    idle = [builtin(name) for name in IDLE]
    idle += [builtin("ThinkingTokenBudgetLogitsProcessor", is_enabled=False)]
    assert sampled(monkeypatch, greedy(logitsprocs=processors(*idle))) == ["tokens", "verdict"]


@pytest.mark.parametrize("name", IDLE)
def test_a_processors_request_is(name: str) -> None:
    from vllm_gemma4_spec.performance.greedy_sampling import only_largest

    assert only_largest(greedy(logitsprocs=processors(builtin(name))))
    assert not only_largest(greedy(logitsprocs=processors(builtin(name, **{IDLE[name]: {0: None}}))))


def test_vllms_own_thinking_budget_is() -> None:
    from vllm_gemma4_spec.performance.greedy_sampling import only_largest

    assert not only_largest(greedy(logitsprocs=processors(builtin("ThinkingTokenBudgetLogitsProcessor"))))


@pytest.mark.parametrize(
    "changed",
    [
        {"max_num_logprobs": 0},
        {"allowed_token_ids_mask": torch.zeros(2, 6, dtype=torch.bool)},
        {"bad_words_token_ids": {0: [[5]]}},
        {"all_greedy": False, "temperature": torch.zeros(2)},
        {"no_penalties": False},
    ],
    ids=lambda c: next(iter(c)),
)
def test_a_request_for_more_is(changed: dict[str, Any]) -> None:
    from vllm_gemma4_spec.performance.greedy_sampling import only_largest

    assert only_largest(greedy())
    assert not only_largest(greedy(**changed))


def test_logprobs_are_vllms_and_the_first_sampling_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each sampler, and nobody uses the result."""
    assert sampled(monkeypatch, greedy(max_num_logprobs=0), steps=2) == ["tokens compiled", "verdict compiled"]


def test_a_users_own_processor_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(Own, "apply", lambda _, logits: asked.append(len(logits)) or logits)
    sampled(monkeypatch, greedy(logitsprocs=processors(Own())))
    assert asked == [2, 2]  # of the speculative step vLLM asks it for the tokens after the drafts


@pytest.mark.parametrize("elsewhere", ["another model", "a CPU", "float64", "AMD"])
def test_elsewhere_vllm_samples(monkeypatch: pytest.MonkeyPatch, elsewhere: str) -> None:
    on_card = LOGITS.clone().as_subclass(OnCard)
    logits = {"a CPU": LOGITS.clone(), "float64": on_card.double()}.get(elsewhere, on_card)
    target = LLAMA if elsewhere == "another model" else GEMMA4
    if elsewhere == "AMD":
        monkeypatch.setattr(torch.version, "hip", "7.0")
    assert sampled(monkeypatch, greedy(), target, logits) == []


def test_logits_of_a_row_must_lie_together() -> None:
    assert kernels.suits(LOGITS[:, 1:])
    assert not kernels.suits(LOGITS.T)
    assert not kernels.suits(LOGITS[0])
