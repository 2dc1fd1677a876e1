"""One kernel chooses the experts that vLLM's own function for Gemma 4 chooses, with its weights."""

from __future__ import annotations

import inspect
import types
from pathlib import Path
from typing import Any

import torch

from tests.support.fresh import interpreted


def stock(logits: torch.Tensor, scales: torch.Tensor, top: int) -> Any:
    """``routing_function`` as it stands in ``Gemma4MoE.__init__``, over these scales."""
    from vllm.model_executor.models import gemma4

    made = inspect.unwrap(gemma4.Gemma4MoE.__init__).__code__
    (code,) = (c for c in made.co_consts if getattr(c, "co_name", "") == "routing_function")
    assert code.co_freevars == ("per_expert_scale",)
    function = types.FunctionType(code, vars(gemma4), closure=(types.CellType(scales),))
    return function(None, logits, top, True)


def test_the_kernel_routes_as_vllm_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    cases = [
        {"logits": torch.randn(tokens, experts) * spread, "scales": torch.rand(experts) * 2, "top": top}
        for tokens, experts, top, spread in [(5, 128, 8, 1.0), (3, 128, 8, 30.0), (2, 12, 3, 1.0), (0, 128, 8, 1.0)]
    ]
    cases[0]["scales"] = cases[0]["scales"].bfloat16()
    cases[0]["logits"][0, ::2] = -float("inf")
    torch.save(cases, tmp_path / "cases.pt")
    interpreted("tests.kernels.routing_by_triton", tmp_path / "cases.pt", tmp_path / "results.pt")
    for case, (weights, ids) in zip(cases, torch.load(tmp_path / "results.pt"), strict=True):
        wanted, chosen = stock(**case)
        assert torch.equal(ids, chosen)
        torch.testing.assert_close(weights, wanted, rtol=2e-6, atol=1e-9)
