"""Async scheduling with a draft model: when it is on, and that it frees no block too early."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support import engine as _engine  # sets the environment
from tests.support.configs import GEMMA4, LLAMA, vllm_config
from vllm_gemma4_spec.performance import async_scheduling
from vllm_gemma4_spec.performance.async_scheduling import MARGIN
from vllm_gemma4_spec.performance.patches import ASYNC_DRAFTS
from vllm_gemma4_spec.registry import PATCHER

assert _engine
WINDOW, BLOCK, K = 32, 16, 3


@pytest.fixture
def patched() -> Iterator[None]:
    PATCHER.apply([ASYNC_DRAFTS])
    yield
    PATCHER.undo([ASYNC_DRAFTS])


def blocks_in_window(length: int, margin: int) -> tuple[list[bool], int]:
    """Schedule a request whose optimistic length is ``length + K``; which blocks of the real window are left.

    Returns ``[block is there]`` for the blocks that the next token at ``length`` may read, and the number of
    blocks that were freed.
    """
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
    from vllm.v1.request import Request

    spec = SlidingWindowSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32, sliding_window=WINDOW)
    config = KVCacheConfig(num_blocks=64, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    manager = KVCacheManager(
        config, max_model_len=1024, hash_block_size=BLOCK, enable_caching=False, use_eagle=False
    )  # fmt: skip
    setattr(manager.coordinator, MARGIN, margin)
    request = Request("r", list(range(length)), SamplingParams(max_tokens=100), None)
    assert manager.allocate_slots(request, length + K + 1) is not None
    request.num_computed_tokens = length + K  # all drafts counted as accepted; in fact all were rejected
    assert manager.allocate_slots(request, K + 1, num_lookahead_tokens=K) is not None
    blocks = manager.coordinator.single_type_managers[0].req_to_blocks["r"]
    freed = sum(b.is_null for b in blocks)
    first = max(0, length - WINDOW + 1)
    return [not blocks[i].is_null for i in range(first // BLOCK, length // BLOCK + 1)], freed


@pytest.mark.usefixtures("patched")
def test_the_window_of_the_real_length_keeps_its_blocks() -> None:
    lengths = range(40, 120)
    assert all(all(blocks_in_window(n, K)[0]) for n in lengths)
    # 0.19.1's own way loses some, or this test would show nothing.
    assert not all(all(blocks_in_window(n, 0)[0]) for n in lengths)
    # What the margin costs: never more than one block of a group.
    assert all(blocks_in_window(n, 0)[1] - blocks_in_window(n, K)[1] <= 1 for n in lengths)


@pytest.mark.parametrize(("asynchronous", "margin"), [(True, K), (False, 0)])
def test_the_margin_is_there_with_async_scheduling_only(asynchronous: bool, margin: int) -> None:
    def init(self: Any) -> None:
        self.num_spec_tokens = K
        self.scheduler_config = SimpleNamespace(async_scheduling=asynchronous)
        self.kv_cache_manager = SimpleNamespace(coordinator=SimpleNamespace())

    for model, wanted in ((GEMMA4, margin), (LLAMA, 0)):
        scheduler = SimpleNamespace(vllm_config=vllm_config(model, model))
        async_scheduling.scheduler_init(init)(scheduler)
        assert getattr(scheduler.kv_cache_manager.coordinator, MARGIN, 0) == wanted


def config(**changes: Any) -> Any:
    from vllm.v1.executor import Executor

    supports = staticmethod(lambda: changes.get("executor", True))
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(async_scheduling=changes.get("asked")),
        speculative_config=changes.get("speculative", DRAFT_MODEL),
        model_config=changes.get("model", GEMMA4),
        kv_transfer_config=changes.get("connector"),
        cache_config=SimpleNamespace(kv_offloading_size=changes.get("offloading")),
        parallel_config=SimpleNamespace(
            distributed_executor_backend=type("Given", (Executor,), {"supports_async_scheduling": supports})
        ),
    )


DRAFT_MODEL = SimpleNamespace(method="draft_model", disable_padded_drafter_batch=False)
EAGLE = SimpleNamespace(method="eagle", disable_padded_drafter_batch=False)
UNPADDED = SimpleNamespace(method="draft_model", disable_padded_drafter_batch=True)


@pytest.mark.parametrize(
    ("cuda", "changes", "wanted"),
    [
        (True, {}, True),
        (False, {}, None),  # a CPU is left as it is
        (True, {"asked": False}, False),  # what the user says stays
        (True, {"speculative": None}, None),
        (True, {"speculative": EAGLE}, None),  # vLLM's own default decides
        (True, {"speculative": UNPADDED}, None),
        (True, {"connector": object()}, None),
        (True, {"offloading": 4.0}, None),  # vLLM makes a connector of it, later
        (True, {"model": LLAMA}, None),
        (True, {"executor": False}, None),
    ],
)
def test_async_scheduling_is_the_default_where_it_is_exact(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, changes: dict[str, Any], wanted: bool | None
) -> None:
    import vllm.platforms

    monkeypatch.setattr(vllm.platforms.current_platform, "is_cuda", lambda: cuda, raising=False)
    given = config(**changes)
    async_scheduling.vllm_config(lambda self: None)(given)
    assert given.scheduler_config.async_scheduling is wanted
