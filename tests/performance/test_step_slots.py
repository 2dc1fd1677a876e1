"""One kernel finds the slots of a step in all KV cache groups on a GPU, vLLM's a group each elsewhere."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

import vllm_gemma4_spec
from tests.support import engine as _engine  # sets the environment
from tests.support.configs import GEMMA4, LLAMA
from tests.support.step_cases import reinitialize, tables
from tests.support.stock import modules_around, without
from vllm_gemma4_spec.kernels import slot_mapping
from vllm_gemma4_spec.performance import step_slots
from vllm_gemma4_spec.performance.patches import STEP_SLOTS

assert _engine

STARTS, POSITIONS = torch.tensor([0, 2], dtype=torch.int32), torch.arange(2)


@pytest.fixture(autouse=True)
def patched() -> None:
    vllm_gemma4_spec.apply()


def launched(
    monkeypatch: pytest.MonkeyPatch,
    device: str = "cuda",
    target: Any = GEMMA4,
    groups: int = 2,
    ranks: int = 1,
    hip: str | None = None,
) -> tuple[int, int]:
    """How often vLLM's kernel and ours are launched for a step of an engine with so many groups."""
    from vllm.v1.worker import block_table

    theirs, ours = MagicMock(), MagicMock()
    monkeypatch.setattr(block_table, "_compute_slot_mapping_kernel", theirs)
    monkeypatch.setattr(slot_mapping, "_step_slots", ours)
    monkeypatch.setattr(torch.version, "hip", hip)
    together = tables(groups)
    for table in together.block_tables:
        table.dcp_world_size = ranks
    reinitialize(step_slots.may_reinitialize_input_batch, together, device, target)
    together.compute_slot_mapping(1, STARTS, POSITIONS)
    return theirs.__getitem__.return_value.call_count, ours.__getitem__.return_value.call_count


def test_one_launch_finds_the_slots_of_all_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched(monkeypatch) == (0, 1)


@pytest.mark.parametrize(
    "engine", [{"device": "cpu"}, {"target": LLAMA}, {"groups": 1}, {"ranks": 2}, {"hip": "7.0"}], ids=lambda e: str(*e)
)
def test_elsewhere_vllms_kernel_finds_them(monkeypatch: pytest.MonkeyPatch, engine: dict[str, Any]) -> None:
    assert launched(monkeypatch, **engine) == (engine.get("groups", 2), 0)


def test_stock_launches_a_kernel_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    with without(STEP_SLOTS):
        assert launched(monkeypatch, groups=22) == (22, 0)


def test_the_runners_method_is_wrapped() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert "vllm_gemma4_spec.performance.step_slots" in modules_around(GPUModelRunner.may_reinitialize_input_batch)


def test_nothing_is_kept_in_memory_that_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM makes the tables, and has the method called, in the KV cache's pool, which loses its contents."""
    together = tables()
    slots = slot_mapping.StepSlots(together.block_tables)
    assert not any(isinstance(value, torch.Tensor | tuple) for value in vars(slots).values())
