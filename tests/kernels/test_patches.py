"""The kernels are in vLLM's place while their patches are on, and vLLM's own without them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vllm_gemma4_spec
from tests.support import engine as _engine  # sets the environment
from tests.support.stock import without
from vllm_gemma4_spec.performance.argmax import HEAD
from vllm_gemma4_spec.performance.patches import DRAFT_ARGMAX, SPLIT_ATTENTION
from vllm_gemma4_spec.quantization.patches import DRAFT_PRODUCTS

assert _engine


@pytest.fixture(autouse=True)
def patched() -> None:
    vllm_gemma4_spec.apply()


def kernel_for_four_tokens(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that the attention backend launches for a verification of one request."""
    from vllm.v1.attention.backends import triton_attn
    from vllm.v1.attention.ops import triton_unified_attention as ops

    launched: list[str] = []

    def launcher(name: str) -> Any:
        return lambda **_: launched.append(name)

    for name in ("kernel_unified_attention_2d", "kernel_unified_attention_3d", "reduce_segments"):
        monkeypatch.setattr(ops, name, {key: launcher(name) for key in GRIDS})
    q = torch.empty(4, 32, 256, device="meta")
    triton_attn.unified_attention(
        q=q,
        k=torch.empty(9, 16, 16, 256, device="meta"),
        v=torch.empty(9, 16, 16, 256, device="meta"),
        out=q,
        cu_seqlens_q=torch.empty(2, device="meta"),
        max_seqlen_q=4,
        seqused_k=torch.empty(1, device="meta"),
        max_seqlen_k=100,
        softmax_scale=1.0,
        causal=True,
        window_size=(1023, 0),
        block_table=torch.empty(1, 9, device="meta"),
        softcap=0,
        q_descale=None,
        k_descale=None,
        v_descale=None,
        seq_threshold_3D=8,
        num_par_softmax_segments=16,
        softmax_segm_output=torch.empty(8, 32, 16, 512, device="meta"),
        softmax_segm_max=torch.empty(8, 32, 16, device="meta"),
        softmax_segm_expsum=torch.empty(8, 32, 16, device="meta"),
    )
    return launched


# Grids of the 2D kernel, the 3D kernel and its reduction for the call above.
GRIDS = [(1, 16), (1, 16, 16), (4, 32)]


def test_a_verification_splits_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_for_four_tokens(monkeypatch) == ["kernel_unified_attention_3d", "reduce_segments"]


def test_stock_walks_the_context_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    with without(SPLIT_ATTENTION):
        assert kernel_for_four_tokens(monkeypatch) == ["kernel_unified_attention_2d"]


class Gemma4MLP(torch.nn.Module):
    """A drafter's MLP whose gate and up projection has been packed for the few-row kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = SimpleNamespace(rows_codes=torch.empty(1), rows_gelu=False, svdquant_lora_a=None)
        self.act_fn = torch.nn.GELU()


def loaded_drafter(monkeypatch: pytest.MonkeyPatch) -> tuple[Gemma4MLP, bool]:
    """The model that the proposer loads, and whether its layers were known as the drafter's meanwhile."""
    from vllm.v1.spec_decode import draft_model

    from vllm_gemma4_spec.quantization import small_batch_layers

    known: list[bool] = []

    def get_model(**_: Any) -> Gemma4MLP:
        known.append(small_batch_layers._loading_drafter)
        return Gemma4MLP()

    monkeypatch.setattr(draft_model, "get_model", get_model)
    proposer = SimpleNamespace(_create_draft_vllm_config=lambda: None, device=torch.device("cpu"))
    model = draft_model.DraftModelProposer._get_model(proposer)
    assert not small_batch_layers._loading_drafter
    return model, known[0]


def test_a_drafters_activation_is_part_of_its_product(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp, known = loaded_drafter(monkeypatch)
    assert known
    assert mlp.gate_up_proj.rows_gelu
    assert isinstance(mlp.act_fn, torch.nn.Identity)


def test_stock_loads_a_drafter_as_any_model(monkeypatch: pytest.MonkeyPatch) -> None:
    with without(DRAFT_PRODUCTS):
        mlp, known = loaded_drafter(monkeypatch)
    assert not known
    assert not mlp.gate_up_proj.rows_gelu
    assert isinstance(mlp.act_fn, torch.nn.GELU)


def sampled(requests: int) -> tuple[torch.Tensor, list[str]]:
    """Drafts of a proposer that has a two-pass head for up to 16 requests, and which way they came."""
    from vllm.v1.spec_decode.eagle import SpecDecodeBaseProposer

    ways: list[str] = []

    def argmax(hidden: torch.Tensor) -> torch.Tensor:
        ways.append("two passes")
        return hidden.argmax(-1)

    def compute_logits(hidden: torch.Tensor) -> torch.Tensor:
        ways.append("all logits")
        return hidden

    proposer = SimpleNamespace(use_local_argmax_reduction=False, model=SimpleNamespace(compute_logits=compute_logits))
    setattr(proposer, HEAD, SimpleNamespace(argmax=argmax, most_requests=16))
    return SpecDecodeBaseProposer._greedy_sample(proposer, torch.eye(32)[:requests]), ways


def test_the_drafters_argmax_takes_two_passes() -> None:
    assert sampled(16)[1] == ["two passes"]
    drafts, ways = sampled(17)
    assert ways == ["all logits"]
    assert drafts.tolist() == list(range(17))


def test_stock_computes_every_logit() -> None:
    with without(DRAFT_ARGMAX):
        assert sampled(1)[1] == ["all logits"]
