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
        hidden, weight = torch.randn(len(scores), 256).bfloat16(), torch.randn(scores.shape[1], 256).bfloat16()
        chosen.append((hidden, weight, *block_logits.chosen_logits(hidden, weight, keys, candidates, block)))
    best = [block_logits.largest(*case) for case in parts["logits"]]
    of_ranks = []
    for ranks in parts["ranks"]:
        sent = [
            block_logits.largest_of_rank(*part, block=16, vocab=128, rank=rank, ranks=len(ranks))
            for rank, part in enumerate(ranks)
        ]
        of_ranks.append((sent, block_logits.largest_of_ranks(sum(sent[1:], sent[0]), 128 * len(ranks))))
    lost = block_logits.largest_of_ranks(torch.tensor([[[torch.nan] * 2] * 2, [[0.0, 1e30], [1.0, -5.0]]]), 256)
    torch.save((found, {"chosen": chosen, "best": best, "ranks": of_ranks, "lost": lost}), sys.argv[2])
