"""The drafter's two-pass argmax: the exact one wherever the coarse pass names its block."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.fresh import interpreted
from vllm_gemma4_spec.checkpoints import nvfp4
from vllm_gemma4_spec.kernels import draft_head
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


def scores_cases() -> list[tuple[torch.Tensor, int, int]]:
    """Rough scores, how many blocks are chosen of them, and their size."""
    torch.manual_seed(1)
    wide = torch.randn(2, 40, 128).bfloat16()  # as many blocks as fill no program
    wide[1] -= 10  # none above 0
    equal = torch.zeros(1, 16, 16)
    equal[0, 3, 5] = equal[0, 11, 0] = 7
    equal[0, 9] = -0.0
    lost = torch.full((1, 24, 16), torch.nan)
    lost[0, :8] = -torch.inf
    padded = torch.randn(2, 16 * 16 + 3)[:, : 16 * 16]  # rows of a wider tensor
    single = torch.randn(2, 2048).bfloat16()  # a score a block, as centroids have
    single[1, 77] = single[1, 1900] = single[1].max()
    return [
        (single, 32, 1),
        (wide.flatten(1), 8, 128),
        (equal.flatten(1), 4, 16),
        (lost.flatten(1), 8, 16),
        (padded, 8, 16),
    ]


def logits_cases() -> list[tuple[torch.Tensor, torch.Tensor, int, int, torch.Tensor | None]]:
    """Arguments of ``largest``."""
    torch.manual_seed(2)
    blocks = torch.tensor([[5, 0, 3], [2, 7, 1]])
    logits = torch.randn(2, 3, 16)
    tied = logits.clone()
    tied[0, 0, 2] = tied[0, 2, 9] = tied[1, 0, 15] = tied[1, 2, 0] = 9
    lost = torch.full((2, 3, 16), torch.nan)
    lost[1] = -torch.inf
    names = torch.randperm(128)
    return [
        (t.flatten(1), blocks, 16, 128, n) for t, n in ((logits, None), (logits, names), (tied, None), (lost, names))
    ]


def ranks_cases() -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Logits and blocks of each rank, for two, three and four of them; in the last row all have one largest."""
    torch.manual_seed(3)
    cases = []
    for ranks in (2, 3, 4):
        case = [(torch.randn(5, 3 * 16), torch.stack([torch.randperm(8)[:3] for _ in range(5)])) for _ in range(ranks)]
        for logits, _ in case:
            logits[3] -= 20  # all below 0, which the others' places hold
            logits[4, 7] = 9
        cases.append(case)
    return cases


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the kernels find; one process for all, as its start costs most."""
    folder = tmp_path_factory.mktemp("head")
    parts = {"scores": scores_cases(), "logits": logits_cases(), "ranks": ranks_cases()}
    torch.save(([*exact_cases(), missed_case()], parts), folder / "cases.pt")
    interpreted("tests.kernels.head_by_triton", folder / "cases.pt", folder / "results.pt")
    return torch.load(folder / "results.pt")


@pytest.fixture
def by_triton(results: Any) -> list[torch.Tensor]:
    """What is found for ``[*exact_cases(), missed_case()]``."""
    found: list[torch.Tensor] = results[0]
    return found


def test_the_blocks_with_the_largest_scores_are_chosen(results: Any) -> None:
    """Largest first, the first of equal ones; blocks of the vocabulary whatever the scores are."""
    for (scores, candidates, block), (*_, chosen) in zip(scores_cases(), results[1]["chosen"], strict=True):
        maxima = scores.unflatten(-1, (-1, block)).float().amax(-1)
        assert chosen.min() >= 0
        assert chosen.max() < maxima.shape[1]
        assert all(len(set(row)) == candidates for row in chosen.tolist())
        if not maxima.isnan().any():
            # A float32 score counts with its upper 16 bits.
            upper = (maxima.view(torch.int32) & -65536).view(torch.float32)
            wanted = upper.sort(dim=-1, descending=True, stable=True)
            assert torch.equal(chosen, wanted.indices[:, :candidates])
    assert results[1]["chosen"][2][-1].tolist() == [[3, 11, 0, 1]]


def test_the_largest_logit_has_the_first_of_its_tokens(results: Any) -> None:
    (plain, named, tied, lost) = results[1]["best"]
    logits, blocks, block, _, _ = logits_cases()[0]
    best, at = logits.max(-1)
    rows = blocks.gather(1, at.unsqueeze(-1) // block).squeeze(-1) * block + at % block
    assert torch.equal(plain[0], best)
    assert torch.equal(plain[1], rows)
    names = logits_cases()[1][4]
    assert names is not None
    assert torch.equal(named[1], names[rows])
    assert tied[1].tolist() == [3 * 16 + 9, 1 * 16]
    assert (lost[1] >= 0).all()
    assert (lost[1] < 128).all()


def test_logits_of_the_chosen_blocks_are_exact(results: Any) -> None:
    for (_, _, block), (hidden, weight, logits, chosen) in zip(scores_cases(), results[1]["chosen"], strict=True):
        rows = weight.double().unflatten(0, (-1, block))[chosen].flatten(1, 2)
        wanted = torch.einsum("nrd,nd->nr", rows, hidden.double())
        torch.testing.assert_close(logits.double(), wanted, rtol=1e-5, atol=1e-4)


def test_the_argmax_is_that_of_the_exact_logits(by_triton: list[torch.Tensor]) -> None:
    for case, got in zip(exact_cases(), by_triton[:-1], strict=True):
        wanted = (case["hidden"].double() @ case["weight"].double().T).argmax(-1)
        assert got.tolist() == wanted.tolist()
    assert got[0] == NEAREST


def test_a_block_that_the_coarse_pass_misses_is_not_found(by_triton: list[torch.Tensor]) -> None:
    """The limit of the method, and a check that the coarse pass is what chooses."""
    assert by_triton[-1][0] < VOCAB // 2


def test_of_several_ranks_the_largest_logit_wins(results: Any) -> None:
    """Each has a part of the vocabulary; of equal ones the first rank's."""
    for case, (sent, found) in zip(ranks_cases(), results[1]["ranks"], strict=True):
        logits = torch.full((5, 128 * len(case)), -torch.inf)
        for rank, (own, blocks) in enumerate(case):
            tokens = (blocks.unsqueeze(-1) * 16 + torch.arange(16)).flatten(1)
            logits[:, rank * 128 : (rank + 1) * 128].scatter_(1, tokens, own)
            others = [r for r in range(len(case)) if r != rank]
            assert not sent[rank][:, others].any(), "more than this rank's"
        assert torch.equal(found, logits.argmax(-1))
    assert results[1]["lost"].tolist() == [0, 0], "no token of the vocabulary"


def test_the_head_of_a_rank_sends_its_best_and_takes_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    results = {"block_maxima": "keys", "chosen_logits": ("logits", "blocks"), "largest_of_rank": "sent"}
    for name, result in (results | {"largest_of_ranks": "token"}).items():
        monkeypatch.setattr(draft_head, name, lambda *given, n=name, r=result: called.append((n, *given)) or r)
    group = SimpleNamespace(rank_in_group=1, world_size=2, all_reduce=lambda part: f"sum of {part}")
    head = DraftHead(torch.empty(VOCAB, SIZE), coarse=lambda hidden: hidden, group=group)
    assert head.argmax(torch.zeros(1, SIZE)) == "token"
    assert called[-2:] == [
        ("largest_of_rank", "logits", "blocks", 128, VOCAB, 1, 2),
        ("largest_of_ranks", "sum of sent", 2 * VOCAB),
    ]
