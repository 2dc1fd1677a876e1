"""The slots of a draft's first pass come from one kernel on a GPU, and from vLLM's function elsewhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vllm_gemma4_spec
from tests.support import engine as _engine  # sets the environment
from tests.support.configs import GEMMA4, LLAMA, vllm_config
from tests.support.stock import modules_around, without
from vllm_gemma4_spec.kernels import slot_mapping
from vllm_gemma4_spec.performance import first_pass_slots
from vllm_gemma4_spec.performance.patches import FIRST_PASS_SLOTS

assert _engine

INDICES = torch.tensor([4], dtype=torch.int32)


@pytest.fixture(autouse=True)
def patched() -> None:
    vllm_gemma4_spec.apply()


def prepared(
    monkeypatch: pytest.MonkeyPatch, device: str = "cuda", drafter: Any = GEMMA4, more: bool = True
) -> tuple[list[tuple[Any, ...]], Any]:
    """What the kernel is given for a request of four tokens, two of them rejected; and what the pass is given."""
    from vllm.v1.spec_decode import eagle

    seen: list[tuple[Any, ...]] = []

    def kernel(*args: Any) -> torch.Tensor:
        seen.append(args)
        return torch.full((5,), -1)

    monkeypatch.setattr(slot_mapping, "first_pass_slots", kernel)
    starts = torch.tensor([0, 4], dtype=torch.int32)
    cad = SimpleNamespace(
        block_table_tensor=torch.ones(1, 4, dtype=torch.int32),
        query_start_loc=starts,
        naive_query_lens=lambda: starts.diff(),
    )

    def original(self: Any, *args: Any, **kwargs: Any) -> Any:
        slots = eagle.compute_new_slot_mapping(
            cad=cad,
            new_positions=torch.arange(5),
            is_rejected_token_mask=torch.tensor([False, False, False, True, True]),
            block_size=16,
            num_new_tokens=1,
            max_model_len=64,
        )
        return 5, INDICES, slots

    proposer = SimpleNamespace(
        needs_extra_input_slots=more, device=torch.device(device), vllm_config=vllm_config(LLAMA, drafter)
    )
    given = first_pass_slots.set_inputs_first_pass(original)(proposer)
    assert not first_pass_slots._prepares.get()
    return seen, given


def test_one_kernel_finds_a_first_passs_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, (num_tokens, indices, slots) = prepared(monkeypatch)
    assert [args[4:] for args in seen] == [(1, 16, 64)]
    assert (num_tokens, indices.tolist(), indices.dtype) == (5, [4], torch.int64)
    assert slots.tolist() == [-1] * 5


@pytest.mark.parametrize(
    ("device", "drafter", "more"), [("cpu", GEMMA4, True), ("cuda", LLAMA, True), ("cuda", GEMMA4, False)]
)
def test_elsewhere_vllms_function_finds_them(
    monkeypatch: pytest.MonkeyPatch, device: str, drafter: Any, more: bool
) -> None:
    seen, (num_tokens, indices, slots) = prepared(monkeypatch, device, drafter, more)
    assert not seen
    assert num_tokens == 5
    assert indices is INDICES
    assert slots.tolist() == [16, 17, 18, -1, -1]


def test_stock_finds_slots_with_pytorchs_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    with without(FIRST_PASS_SLOTS):
        seen, (_, _, slots) = prepared(monkeypatch)
    assert not seen
    assert slots.tolist() == [16, 17, 18, -1, -1]


def test_the_proposers_method_is_wrapped() -> None:
    from vllm.v1.spec_decode.eagle import SpecDecodeBaseProposer

    around = modules_around(SpecDecodeBaseProposer.set_inputs_first_pass)
    assert "vllm_gemma4_spec.performance.first_pass_slots" in around
