"""The two-pass head in Triton's interpreter: ``python -m tests.kernels.head_by_triton CASES RESULTS`` (torch files).

Results: what each case's argmax is; then what the kernels give for scores and logits of the cases of ``parts``.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    import torch

    from vllm_gemma4_spec.kernels import block_logits
    from vllm_gemma4_spec.kernels.draft_head import DraftHead

    cases, parts = torch.load(sys.argv[1])
    found = []
    for case in cases:
        rough = case["rough"]
        found.append(DraftHead(case["weight"], coarse=lambda h, rough=rough: rough).argmax(case["hidden"]))
    chosen = []
    for scores, candidates, block in parts["scores"]:
        keys = block_logits.block_maxima(scores, block)
        hidden, weight = torch.zeros(len(scores), 256).bfloat16(), torch.zeros(scores.shape[1], 256).bfloat16()
        rows = min(block, block_logits.ROWS)
        chosen.append(block_logits.chosen_logits(hidden, weight, keys, candidates, block, rows)[1])
    best = [block_logits.largest(*case) for case in parts["logits"]]
    given = [block_logits.block_logits(*case) for case in parts["given"]]
    torch.save((found, {"chosen": chosen, "best": best, "given": given}), sys.argv[2])
