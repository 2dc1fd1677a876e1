"""The two-pass head in Triton's interpreter: ``python -m tests.kernels.head_by_triton CASES RESULTS`` (torch files)."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    import torch

    from vllm_gemma4_spec.kernels.draft_head import DraftHead

    results = []
    for case in torch.load(sys.argv[1]):
        rough = case["rough"]
        results.append(DraftHead(case["weight"], coarse=lambda h, rough=rough: rough).argmax(case["hidden"]))
    torch.save(results, sys.argv[2])
