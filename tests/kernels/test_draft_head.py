"""The drafter's two-pass argmax: the exact one wherever the coarse pass names its block."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.support.fresh import interpreted
from vllm_gemma4_spec.checkpoints import nvfp4
from vllm_gemma4_spec.kernels.draft_head import DraftHead

VOCAB, SIZE = 2048, 512  # half of the vocabulary are candidates of the exact pass
NEAREST = 1900


def rounded_to_nvfp4(weight: torch.Tensor) -> torch.Tensor:
    scale_2 = weight.abs().amax().float() / (nvfp4.CODE_MAX * nvfp4.SCALE_MAX)
    scale = nvfp4.block_scale(weight, scale_2)
    return nvfp4.dequantize(nvfp4.encode(weight, scale, scale_2), scale, scale_2)


def exact_cases() -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    weight = torch.randn(VOCAB, SIZE).bfloat16()
    cases = []
    for num_reqs in (1, 3):
        hidden = torch.randn(num_reqs, SIZE).bfloat16()
        cases.append({"weight": weight, "hidden": hidden, "rough": hidden.float() @ rounded_to_nvfp4(weight).T})
    # The coarse pass alone is wrong where two logits are close: the exact pass must decide.
    near = weight.clone()
    near[77] = near[NEAREST] = hidden[0] * 2
    near[NEAREST, 0] += hidden[0, 0].sign()
    rough = hidden.float() @ near.float().T
    rough[0, 77] += 50
    cases.append({"weight": near, "hidden": hidden, "rough": rough})
    return cases


def missed_case() -> dict[str, torch.Tensor]:
    weight = torch.zeros(VOCAB, SIZE).bfloat16()
    weight[NEAREST] = 1
    rough = torch.zeros(1, VOCAB)
    rough[0, : VOCAB // 2] = 1.0
    return {"weight": weight, "hidden": torch.ones(1, SIZE).bfloat16(), "rough": rough}


@pytest.fixture(scope="module")
def by_triton(tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    """What the kernel finds in ``[*exact_cases(), missed_case()]``; one process for all, as its start costs most."""
    folder = tmp_path_factory.mktemp("head")
    torch.save([*exact_cases(), missed_case()], folder / "cases.pt")
    interpreted("tests.kernels.head_by_triton", folder / "cases.pt", folder / "results.pt")
    return torch.load(folder / "results.pt")


def test_the_argmax_is_that_of_the_exact_logits(by_triton: list[torch.Tensor]) -> None:
    for case, got in zip(exact_cases(), by_triton[:-1], strict=True):
        wanted = (case["hidden"].double() @ case["weight"].double().T).argmax(-1)
        assert got.tolist() == wanted.tolist()
    assert got[0] == NEAREST


def test_a_block_that_the_coarse_pass_misses_is_not_found(by_triton: list[torch.Tensor]) -> None:
    """The limit of the method, and a check that the coarse pass is what chooses."""
    assert by_triton[-1][0] < VOCAB // 2


def test_of_two_ranks_the_larger_logit_wins() -> None:
    """Each rank has half of the vocabulary; the first of equal ones is the lower id."""
    logits, tokens = torch.tensor([[[1.0], [5.0], [-2.0]], [[4.0], [3.0], [-2.0]]]), torch.tensor([[3], [2], [1]])
    sent: list[torch.Tensor] = []

    def all_reduce(part: torch.Tensor) -> torch.Tensor:
        sent.append(part)
        return sum(sent[:2], torch.zeros_like(part)) if len(sent) > 2 else part

    def found(rank: int) -> torch.Tensor:
        group = SimpleNamespace(rank_in_group=rank, world_size=2, all_reduce=all_reduce)
        head = DraftHead(torch.empty(VOCAB, SIZE), coarse=lambda hidden: hidden, group=group)
        return head._of_all_ranks(logits[rank], tokens)

    for rank in range(2):  # what each sends
        found(rank)
    for rank in range(2):
        assert found(rank).tolist() == [VOCAB + 3, 2, 1]
