"""``min_tokens`` while it is not known yet which drafts of the step before were accepted, as with async scheduling."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

K, END, VOCAB, LEAST = 3, 5, 8, 8


@pytest.fixture
def processor() -> Any:
    from vllm_gemma4_spec.requests.min_tokens import MinTokens

    config: Any = SimpleNamespace(speculative_config=SimpleNamespace(num_speculative_tokens=K))
    return MinTokens(config, torch.device("cpu"), False)


def add(processor: Any, output: list[int], least: int = LEAST) -> None:
    params = SimpleNamespace(min_tokens=least, all_stop_token_ids={END})
    processor.update_state(SimpleNamespace(added=[(0, params, None, output)], removed=[], moved=[]))


def forbidden(processor: Any, drafts: list[int] | None) -> bool:
    processor.drafts = drafts
    logits: torch.Tensor = processor.apply(torch.zeros(1, VOCAB))
    assert logits.isfinite().sum() in (VOCAB, VOCAB - 1)
    return bool(logits[0, END].isinf())


def test_placeholders_of_rejected_drafts_are_no_tokens(processor: Any) -> None:
    output = [1, 2, 3, 4]
    add(processor, output)
    output += [-1] * (K + 1)  # in flight: a token and K drafts
    processor.update_state(None)
    output[4:] = [6]  # all drafts were rejected
    assert forbidden(processor, [0])
    assert forbidden(processor, [2])
    assert not forbidden(processor, [3])
    assert forbidden(processor, None)
    places = processor._places
    assert forbidden(processor, None)
    assert processor._places is places  # nothing is copied to the device again
    # Positions of the drafts themselves: the first three of four follow 5, 6 and 7 tokens.
    logits = processor.apply_with_spec_decode(torch.zeros(4, VOCAB), [4])
    assert logits[:, END].isinf().tolist() == [True, True, True, False]


def test_a_request_is_forgotten_once_its_output_is_long_enough_whatever_is_rejected(processor: Any) -> None:
    output: list[int] = [1] * (LEAST + K - 1)
    add(processor, output)
    assert processor.min_toks
    output.append(1)
    processor.update_state(None)
    assert not processor.min_toks
    add(processor, [], least=0)
    assert not processor.min_toks


@pytest.mark.parametrize("least", [0, LEAST])
def test_outputs_are_asked_for_while_a_request_has_min_tokens(processor: Any, least: int) -> None:
    from vllm_gemma4_spec.requests.min_tokens import MIN_TOKENS, make_sampling_metadata

    add(processor, [], least)
    asked = []
    logitsprocs = SimpleNamespace(**{MIN_TOKENS: processor})
    batch = SimpleNamespace(logitsprocs=logitsprocs, logitsprocs_need_output_token_ids=False)
    make_sampling_metadata(lambda batch: asked.append(batch.logitsprocs_need_output_token_ids))(batch)
    assert asked == [least > 0]
    assert batch.logitsprocs_need_output_token_ids is False
