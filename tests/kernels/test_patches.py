"""The kernels are in vLLM's place while their patches are on, and vLLM's own without them."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import vllm_gemma4_spec
from tests.support import engine as _engine  # sets the environment
from tests.support.configs import GEMMA4, LLAMA, vllm_config
from tests.support.stock import without
from vllm_gemma4_spec.kernels import small_batch_gemm
from vllm_gemma4_spec.performance import argmax
from vllm_gemma4_spec.performance.argmax import HEAD
from vllm_gemma4_spec.performance.patches import DRAFT_ARGMAX, SPLIT_ATTENTION
from vllm_gemma4_spec.performance.split_attention import builder_init
from vllm_gemma4_spec.quantization.patches import DRAFT_PRODUCTS

assert _engine


@pytest.fixture(autouse=True)
def patched() -> None:
    vllm_gemma4_spec.apply()


def kernel_for_four_tokens(monkeypatch: pytest.MonkeyPatch, target: Any = GEMMA4) -> list[str]:
    """The kernels that the attention backend launches for a verification of one request."""
    from vllm.v1.attention.backends import triton_attn
    from vllm.v1.attention.ops import triton_unified_attention as ops

    launched: list[str] = []

    def launcher(name: str) -> Any:
        return lambda **_: launched.append(name)

    with monkeypatch.context() as kernels:  # over before patches go on or off: one of them has a kernel as its target
        for name in ("kernel_unified_attention_2d", "kernel_unified_attention_3d", "reduce_segments"):
            kernels.setattr(ops, name, {key: launcher(name) for key in GRIDS})
        q = torch.empty(4, 32, 256, device="meta")

        def init(self: Any) -> None:
            self.vllm_config = vllm_config(target, LLAMA)
            self.softmax_segm_output = torch.empty(8, 32, 16, 512, device="meta")

        builder = SimpleNamespace()
        builder_init(init)(builder)
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
            softmax_segm_output=builder.softmax_segm_output,
            softmax_segm_max=torch.empty(8, 32, 16, device="meta"),
            softmax_segm_expsum=torch.empty(8, 32, 16, device="meta"),
        )
    return launched


# Grids of the 2D kernel, the 3D kernel and its reduction for the call above.
GRIDS = [(1, 16), (1, 16, 16), (4, 32)]


def test_a_verification_splits_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_for_four_tokens(monkeypatch) == ["kernel_unified_attention_3d", "reduce_segments"]


def test_another_models_verification_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_for_four_tokens(monkeypatch, LLAMA) == ["kernel_unified_attention_2d"]


def test_stock_walks_the_context_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    with without(SPLIT_ATTENTION):
        assert kernel_for_four_tokens(monkeypatch) == ["kernel_unified_attention_2d"]


class Gemma4MLP(torch.nn.Module):
    """A drafter's MLP whose gate and up projection has been packed for the small-batch kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = SimpleNamespace(rows_codes=torch.empty(1), rows_gelu=False, svdquant_lora_a=None)
        self.act_fn = torch.nn.GELU()


def loaded_drafter(monkeypatch: pytest.MonkeyPatch, drafter: Any = GEMMA4) -> tuple[Gemma4MLP, bool]:
    """The model that the proposer loads, and whether its layers were known as the drafter's meanwhile."""
    from vllm.v1.spec_decode import draft_model

    from vllm_gemma4_spec.quantization import small_batch_layers

    known: list[bool] = []

    def get_model(**_: Any) -> Gemma4MLP:
        known.append(small_batch_layers._loading_drafter)
        return Gemma4MLP()

    monkeypatch.setattr(draft_model, "get_model", get_model)
    proposer = SimpleNamespace(
        _create_draft_vllm_config=lambda: None, device=torch.device("cpu"), vllm_config=vllm_config(GEMMA4, drafter)
    )
    model = draft_model.DraftModelProposer._get_model(proposer)
    assert not small_batch_layers._loading_drafter
    return model, known[0]


def test_a_drafters_activation_is_part_of_its_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[bool] = []
    monkeypatch.setattr(small_batch_gemm, "choose", lambda _, gelu: measured.append(gelu))
    mlp, known = loaded_drafter(monkeypatch)
    assert measured == [True]
    assert known
    assert mlp.gate_up_proj.rows_gelu
    assert isinstance(mlp.act_fn, torch.nn.Identity)


@pytest.mark.parametrize("drafter", [LLAMA, GEMMA4], ids=["another drafter", "without the patch"])
def test_stock_loads_a_drafter_as_any_model(monkeypatch: pytest.MonkeyPatch, drafter: Any) -> None:
    with without(DRAFT_PRODUCTS) if drafter is GEMMA4 else nullcontext():
        mlp, known = loaded_drafter(monkeypatch, drafter)
    assert not known
    assert not mlp.gate_up_proj.rows_gelu
    assert isinstance(mlp.act_fn, torch.nn.GELU)


def sampled(requests: int) -> tuple[torch.Tensor, list[str]]:
    """Drafts of a proposer that has a two-pass head for up to 16 requests, and which way they came."""
    from vllm.v1.spec_decode.eagle import SpecDecodeBaseProposer

    ways: list[str] = []

    def two_passes(hidden: torch.Tensor) -> torch.Tensor:
        ways.append("two passes")
        return hidden.argmax(-1)

    def compute_logits(hidden: torch.Tensor) -> torch.Tensor:
        ways.append("all logits")
        return hidden

    proposer = SimpleNamespace(use_local_argmax_reduction=False, model=SimpleNamespace(compute_logits=compute_logits))
    setattr(proposer, HEAD, SimpleNamespace(argmax=two_passes, most_requests=16))
    return SpecDecodeBaseProposer._greedy_sample(proposer, torch.eye(32)[:requests]), ways


def test_the_drafters_argmax_takes_two_passes() -> None:
    assert sampled(16)[1] == ["two passes"]
    drafts, ways = sampled(17)
    assert ways == ["all logits"]
    assert drafts.tolist() == list(range(17))


@pytest.mark.parametrize(
    ("drafter", "device", "wanted"), [(GEMMA4, "cuda", True), (LLAMA, "cuda", False), (GEMMA4, "cpu", False)]
)
def test_a_drafter_gets_its_head_when_it_is_loaded(
    monkeypatch: pytest.MonkeyPatch, drafter: Any, device: str, wanted: bool
) -> None:
    """Which the argmax then finds: the head is made of the model that was loaded."""
    made: list[Any] = []

    def head_of(model: Any) -> Any:
        made.append(model)
        return SimpleNamespace(argmax=lambda hidden: torch.full((len(hidden),), 7), most_requests=16)

    def load(self: Any, target: Any) -> None:
        self.model = "loaded"

    monkeypatch.setattr(argmax, "head_of", head_of)
    logits = SimpleNamespace(compute_logits=lambda hidden: hidden)
    proposer = SimpleNamespace(vllm_config=vllm_config(GEMMA4, drafter), device=torch.device(device))
    argmax.load_model(load)(proposer, None)
    assert made == (["loaded"] if wanted else [])
    proposer.use_local_argmax_reduction, proposer.model = False, logits
    from vllm.v1.spec_decode.eagle import SpecDecodeBaseProposer

    drafts = SpecDecodeBaseProposer._greedy_sample(proposer, torch.eye(3))
    assert drafts.tolist() == ([7, 7, 7] if wanted else [0, 1, 2])


@pytest.mark.parametrize(
    ("ranks", "rows", "quantized", "suits", "wanted"),
    [
        pytest.param(1, 8, False, True, True, id="fits"),
        pytest.param(2, 4, False, True, True, id="sharded"),
        pytest.param(2, 8, False, True, False, id="sharded-and-padded"),
        pytest.param(1, 16, False, True, False, id="padded-vocabulary"),
        pytest.param(1, 8, True, True, False, id="quantized"),
        pytest.param(1, 8, False, False, False, id="another-shape"),
    ],
)
def test_which_heads_are_made(
    monkeypatch: pytest.MonkeyPatch, ranks: int, rows: int, quantized: bool, suits: bool, wanted: bool
) -> None:
    from vllm import distributed

    from vllm_gemma4_spec.kernels import draft_head

    group = SimpleNamespace(world_size=ranks)
    monkeypatch.setattr(distributed, "get_tp_group", lambda: group)
    monkeypatch.setattr(draft_head, "suits", lambda _: suits)
    monkeypatch.setattr(draft_head, "DraftHead", lambda weight, group: ("head", len(weight), group))
    waited: list[bool] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(True))
    lm_head = SimpleNamespace() if quantized else SimpleNamespace(weight=torch.nn.Parameter(torch.empty(rows, 4)))
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=8))
    made = ("head", rows, group if ranks > 1 else None) if wanted else None
    assert argmax.head_of(SimpleNamespace(lm_head=lm_head, config=config)) == made
    assert waited == [True] * wanted  # its copy is whole before a graph reads it


def test_each_ranks_largest_logits_are_compared() -> None:
    processor = SimpleNamespace(get_top_tokens=lambda lm_head, hidden: (lm_head, hidden))
    model: Any = SimpleNamespace(logits_processor=processor, lm_head="lm_head")
    assert argmax.get_top_tokens(None)(model, "hidden") == ("lm_head", "hidden")


def test_stock_computes_every_logit() -> None:
    with without(DRAFT_ARGMAX):
        assert sampled(1)[1] == ["all logits"]
