"""One kernel copies the block tables of all KV cache groups to a GPU; elsewhere vLLM copies each."""

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
from vllm_gemma4_spec.kernels import table_copies as kernels
from vllm_gemma4_spec.performance import table_copies
from vllm_gemma4_spec.performance.patches import TABLE_COPIES
from vllm_gemma4_spec.spec_decode.block_tables import CLEAN

assert _engine


@pytest.fixture(autouse=True)
def patched() -> None:
    vllm_gemma4_spec.apply()


def copied(
    monkeypatch: pytest.MonkeyPatch,
    device: str = "cuda",
    target: Any = GEMMA4,
    groups: int = 2,
    pinned: bool = True,
    clean: tuple[bool, ...] = (True, True),
    hip: str | None = None,
) -> tuple[int, list[bool]]:
    """How many tables vLLM copies for a step of such an engine, and our launches: whether of whole rows."""
    from vllm.v1.worker import block_table

    theirs, ours = MagicMock(), MagicMock()
    monkeypatch.setattr(block_table.BlockTable, "commit_block_table", theirs)
    monkeypatch.setattr(kernels, "_copy_rows", ours)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: pinned)
    real = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *args, pin_memory=False, **kwargs: real(*args, **kwargs))
    monkeypatch.setattr(torch.version, "hip", hip)
    together = tables(groups)
    for table, of in zip(together.block_tables, clean, strict=False):
        setattr(table, CLEAN, of)
    reinitialize(table_copies.may_reinitialize_input_batch, together, device, target)
    together.commit_block_table(1)
    return theirs.call_count, [c.kwargs["whole"] for c in ours.__getitem__.return_value.call_args_list]


def test_one_launch_copies_the_tables_of_all_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    assert copied(monkeypatch) == (0, [False])


@pytest.mark.parametrize("clean", [(True, False), (False, False)])
def test_whole_rows_where_what_lies_behind_may_not_be_zero(
    monkeypatch: pytest.MonkeyPatch, clean: tuple[bool, ...]
) -> None:
    assert copied(monkeypatch, clean=clean) == (0, [True])


@pytest.mark.parametrize(
    "engine",
    [{"device": "cpu"}, {"target": LLAMA}, {"groups": 1}, {"pinned": False}, {"hip": "7.0"}],
    ids=lambda e: str(*e),
)
def test_elsewhere_vllm_copies_each(monkeypatch: pytest.MonkeyPatch, engine: dict[str, Any]) -> None:
    assert copied(monkeypatch, **engine) == (engine.get("groups", 2), [])


def test_stock_copies_each_table(monkeypatch: pytest.MonkeyPatch) -> None:
    with without(TABLE_COPIES):
        assert copied(monkeypatch, groups=22) == (22, [])


def test_a_table_counts_on_where_the_kernel_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    together = tables()
    together.add_row(([3], [4, 5]), 1)
    copies = kernels.TableCopies(together.block_tables, clean=True)
    together.append_row(([6], [7]), 1)
    assert copies._counts.tolist() == [[0, 2], [0, 3]]


def test_nothing_is_kept_in_memory_that_sleeps() -> None:
    """As of step-slots: only the counts, on the host."""
    together = tables()
    copies = kernels.TableCopies(together.block_tables, clean=True)
    assert [n for n, value in vars(copies).items() if isinstance(value, torch.Tensor | tuple)] == ["_counts"]


def test_the_runners_method_is_wrapped() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert "vllm_gemma4_spec.performance.table_copies" in modules_around(GPUModelRunner.may_reinitialize_input_batch)
