"""Rows of vLLM's own batch: requests leave it, move and are swapped, and each keeps its ``allowed_token_ids``."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.configs import GEMMA4, LLAMA, vllm_config
from tests.support.stock import without
from vllm_gemma4_spec.requests.patches import ALLOWED_TOKENS

VOCABULARY, ROWS = 32, 4


def batch(target: Any = GEMMA4) -> Any:
    import vllm_gemma4_spec

    vllm_gemma4_spec.apply()
    from vllm.v1.worker.gpu_input_batch import InputBatch
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    made = InputBatch(ROWS, 64, 64, torch.device("cpu"), False, VOCABULARY, [16], [16])
    runner: Any = SimpleNamespace(input_batch=made, vllm_config=vllm_config(target, target))
    with pytest.raises(AttributeError, match="finished_req_ids"):  # a step of a runner, as far as it marks its batch
        GPUModelRunner._update_states(runner, SimpleNamespace())
    return made


def add(to: Any, name: str, allowed: list[int] | None) -> None:
    from vllm import SamplingParams
    from vllm.v1.worker.gpu_input_batch import CachedRequestState

    params = SamplingParams(temperature=0.0, allowed_token_ids=allowed)
    row = to.add_request(CachedRequestState(name, [1], [], params, None, ([1],), 0, []))
    assert to.req_ids[row] == name


def kept(of: Any) -> list[tuple[str, list[int] | None]]:
    """Requests by row, with the ids that each may have."""
    of.refresh_metadata()
    mask = of.sampling_metadata.allowed_token_ids_mask
    allowed = [[] if mask is None else (~mask[row]).nonzero().flatten().tolist() for row in range(of.num_reqs)]
    return [(name, None if len(a) in (0, VOCABULARY) else a) for name, a in zip(of.req_ids, allowed, strict=True)]


def moved(target: Any = GEMMA4) -> list[tuple[str, list[int] | None]]:
    """The second request moves to the first one's row; a third comes to its old row."""
    rows = batch(target)
    add(rows, "a", None)
    add(rows, "b", [3, 4])
    rows.remove_request("a")
    rows.condense()
    rows.refresh_metadata()
    add(rows, "c", None)
    return kept(rows)


def swapped(target: Any = GEMMA4) -> list[tuple[str, list[int] | None]]:
    rows = batch(target)
    for name, allowed in (("a", [7]), ("b", [3, 4])):
        add(rows, name, allowed)
    rows.refresh_metadata()
    rows.swap_states(0, 1)
    return kept(rows)


def test_each_request_keeps_its_own() -> None:
    assert moved() == [("b", [3, 4]), ("c", None)]
    assert swapped() == [("b", [3, 4]), ("a", [7])]


def test_stock_leaves_them_to_another_request() -> None:
    with without(ALLOWED_TOKENS):
        assert moved() == [("b", [3, 4]), ("c", [3, 4])]
        assert swapped() == [("b", [3, 4]), ("a", [3, 4])]


def test_other_models_batches_are_left_to_vllm() -> None:
    assert moved(LLAMA) == [("b", [3, 4]), ("c", [3, 4])]
    assert swapped(LLAMA) == [("b", [3, 4]), ("a", [3, 4])]


def test_any_sequence_of_steps() -> None:
    rng = random.Random(0)
    rows, asked, number = batch(), {}, 0
    for _ in range(300):
        for name in [n for n in asked if rng.random() < 0.3]:
            rows.remove_request(name)
            del asked[name]
        while len(asked) < ROWS and rng.random() < 0.6:
            number += 1
            asked[f"r{number}"] = sorted(rng.sample(range(VOCABULARY), 3)) if rng.random() < 0.5 else None
            add(rows, f"r{number}", asked[f"r{number}"])
        rows.condense()
        rows.refresh_metadata()
        if len(asked) > 1 and rng.random() < 0.5:
            rows.swap_states(*rng.sample(range(len(asked)), 2))
        assert dict(kept(rows)) == asked
