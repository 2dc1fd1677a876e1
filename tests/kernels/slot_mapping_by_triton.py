"""The slot kernel in Triton's interpreter.

``python -m tests.kernels.slot_mapping_by_triton CASES RESULTS`` (torch files).
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    import torch

    from vllm_gemma4_spec.kernels.slot_mapping import GroupSlotKernel

    results = []
    for case in torch.load(sys.argv[1]):
        out = torch.full_like(case["out"], -7)
        kernel = GroupSlotKernel(case["block_sizes"], out)
        kernel.bind(case["tables"])
        if case["live"] is not None:
            kernel.num_live = torch.tensor([case["live"]], dtype=torch.int32)
        starts = case["query_start_loc"]
        kernel(starts, len(starts) - 1, case["positions"], case["primary_slots"])
        results.append(out)
    torch.save(results, sys.argv[2])
