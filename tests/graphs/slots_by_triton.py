"""Run the slot kernel in Triton's interpreter: ``slots_by_triton.py CASES RESULTS`` (torch files).

A process of its own, because TRITON_INTERPRET must be set before triton is imported.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", VLLM_PLUGINS="", VLLM_LOGGING_LEVEL="ERROR")

    import torch
    import triton
    import triton.language as tl
    import vllm.triton_utils

    # On a CPU vLLM puts stand-ins in Triton's place.
    vllm.triton_utils.triton, vllm.triton_utils.tl = triton, tl
    from vllm_gemma4_spec.graphs.slots import GroupSlotKernel

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
