"""The drafter's two-pass argmax: the exact one wherever the coarse pass names its block."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.support.interpreter import interpreted
from vllm_gemma4_spec.checkpoints import nvfp4

VOCAB, SIZE = 4096, 512


def rounded_to_nvfp4(weight: torch.Tensor) -> torch.Tensor:
    scale_2 = weight.abs().amax().float() / (nvfp4.CODE_MAX * nvfp4.SCALE_MAX)
    scale = nvfp4.block_scale(weight, scale_2)
    return nvfp4.dequantize(nvfp4.encode(weight, scale, scale_2), scale, scale_2)


def run(cases: list[dict[str, torch.Tensor]], folder: Path) -> list[torch.Tensor]:
    torch.save(cases, folder / "cases.pt")
    interpreted("tests.kernels.head_by_triton", folder / "cases.pt", folder / "results.pt")
    return torch.load(folder / "results.pt")


def test_the_argmax_is_that_of_the_exact_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weight = torch.randn(VOCAB, SIZE).bfloat16()
    cases = []
    for num_reqs in (1, 3):
        hidden = torch.randn(num_reqs, SIZE).bfloat16()
        cases.append({"weight": weight, "hidden": hidden, "rough": hidden.float() @ rounded_to_nvfp4(weight).T})
    # The coarse pass alone is wrong where two logits are close: the exact pass must decide.
    near = weight.clone()
    near[77] = near[3000] = hidden[0] * 2
    near[3000, 0] += hidden[0, 0].sign()
    rough = hidden.float() @ near.float().T
    rough[0, 77] += 50
    cases.append({"weight": near, "hidden": hidden, "rough": rough})
    for case, got in zip(cases, run(cases, tmp_path), strict=True):
        wanted = (case["hidden"].double() @ case["weight"].double().T).argmax(-1)
        assert got.tolist() == wanted.tolist()
    assert got[0] == 3000


def test_a_block_that_the_coarse_pass_misses_is_not_found(tmp_path: Path) -> None:
    """The limit of the method, and a check that the coarse pass is what chooses."""
    weight = torch.zeros(VOCAB, SIZE).bfloat16()
    weight[2000] = 1
    hidden = torch.ones(1, SIZE).bfloat16()
    rough = torch.zeros(1, VOCAB)
    rough[0, :1024] = 1.0
    (got,) = run([{"weight": weight, "hidden": hidden, "rough": rough}], tmp_path)
    assert got[0] < 1024
