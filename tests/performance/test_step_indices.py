"""Indices of drafts and logits are kept from one step to the next while nothing changes."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import vllm_gemma4_spec
from tests.support import engine as _engine  # sets the environment
from tests.support.configs import GEMMA4, LLAMA, vllm_config
from tests.support.stock import without
from vllm_gemma4_spec.performance import step_indices
from vllm_gemma4_spec.performance.patches import STEP_INDICES

assert _engine

# Numbers of drafts, and of tokens before them: decode steps, one of them twice, a prompt's chunk among them, a request
# more and one less, other numbers of drafts for the same tokens.
STEPS = [
    ([3, 3], [0, 0]),
    ([3, 3], [0, 0]),
    ([3, 3], [0, 0]),
    ([3, 0, 2], [0, 100, 0]),
    ([3, 0, 2], [0, 99, 1]),
    ([3, 3, 1], [0, 0, 0]),
    ([3, 3], [0, 0]),
    ([2, 3], [1, 0]),
    ([2, 3], [1, 0]),
    ([0, 0], [3, 4]),
    ([0, 0], [3, 4]),
]


def steps(target: Any = GEMMA4) -> list[tuple[Any, Any]]:
    """Of each step what the runner's method gives, patched as it is now, and vLLM's own."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    runner = SimpleNamespace(
        device=torch.device("cpu"),
        vllm_config=vllm_config(target, target),
        arange_np=np.arange(512),
        _arange_scratch=np.zeros(512, dtype=np.int64),
        input_ids=SimpleNamespace(gpu=torch.zeros(512, dtype=torch.int32)),
    )
    runner._get_cumsum_and_arange = lambda *args, **kwargs: GPUModelRunner._get_cumsum_and_arange(
        runner, *args, **kwargs
    )
    found = []
    now = GPUModelRunner._calc_spec_decode_metadata
    stock = getattr(now, "__wrapped__", now)
    for seed, (drafts, others) in enumerate(STEPS):
        runner.input_ids.gpu.copy_(torch.randint(0, 9999, (512,), generator=torch.Generator().manual_seed(seed)))
        given = np.array(drafts, dtype=np.int32), np.cumsum(np.array(drafts) + 1 + others)
        found.append((now(runner, *given), stock(runner, *given)))
    return found


FIELDS = (
    "draft_token_ids",
    "cu_num_draft_tokens",
    "cu_num_sampled_tokens",
    "target_logits_indices",
    "bonus_logits_indices",
    "logits_indices",
)


@pytest.fixture(autouse=True)
def patched() -> None:
    vllm_gemma4_spec.apply()


def kept(found: list[tuple[Any, Any]]) -> list[bool]:
    """Of each step whether it has the indices of the one before, and not a copy."""
    pairs = itertools.pairwise(ours for ours, _ in found)
    return [False, *(before.logits_indices is now.logits_indices for before, now in pairs)]


def test_every_step_has_vllms_indices() -> None:
    for number, (ours, theirs) in enumerate(steps()):
        assert ours.num_draft_tokens == theirs.num_draft_tokens
        assert ours.max_spec_len == theirs.max_spec_len
        for field in FIELDS:
            a, b = getattr(ours, field), getattr(theirs, field)
            assert a.dtype == b.dtype
            assert torch.equal(a, b), (number, field)


def test_a_step_like_the_last_has_its_indices() -> None:
    alike = [False, *(a == b for a, b in itertools.pairwise(STEPS))]
    assert sum(alike) == 4
    # The first of several is vLLM's own object, the second has its tensors.
    assert kept(steps()) == alike


def test_what_a_step_does_with_its_numbers_is_its_own() -> None:
    found = [ours for ours, _ in steps()]
    found[1].num_draft_tokens.clear()
    found[0].num_draft_tokens.clear()
    assert found[2].num_draft_tokens == [3, 3]


def test_stock_copies_indices_each_step() -> None:
    with without(STEP_INDICES):
        assert not any(kept(steps()))


def test_other_models_have_vllms() -> None:
    assert not any(kept(steps(LLAMA)))


def test_numbers_kept_are_not_the_callers() -> None:
    """What the first step's caller does to its list is not what the second gets."""
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    made = SpecDecodeMetadata.make_dummy([[1, 2]], torch.device("cpu"))
    runner = SimpleNamespace(
        vllm_config=vllm_config(GEMMA4, GEMMA4), input_ids=SimpleNamespace(gpu=torch.zeros(8, dtype=torch.int32))
    )
    of = step_indices.calc_spec_decode_metadata(lambda *_: made)
    given = np.array([2], dtype=np.int32), np.array([3], dtype=np.int32)
    of(runner, *given).num_draft_tokens.clear()
    assert of(runner, *given).num_draft_tokens == [2]
