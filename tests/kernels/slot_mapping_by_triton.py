"""The slot kernels in Triton's interpreter.

``python -m tests.kernels.slot_mapping_by_triton CASES RESULTS`` (torch files). Of a first pass, vLLM's slots and ours.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from types import SimpleNamespace

    import torch
    from vllm.v1.spec_decode.utils import compute_new_slot_mapping

    from vllm_gemma4_spec.kernels.slot_mapping import GroupSlotKernel, first_pass_slots

    results = []
    for case in torch.load(sys.argv[1]):
        if "rejected" in case:
            table, starts, positions, rejected, *numbers = case.values()
            cad = SimpleNamespace(
                block_table_tensor=table, query_start_loc=starts, naive_query_lens=lambda starts=starts: starts.diff()
            )
            added, block_size, longest = numbers
            theirs = compute_new_slot_mapping(cad, positions, rejected, block_size, added, longest)
            results.append((theirs, first_pass_slots(table, starts, positions, rejected, *numbers)))
            continue
        out = torch.full_like(case["out"], -7)
        kernel = GroupSlotKernel(case["block_sizes"], out)
        kernel.bind(case["tables"])
        if case["live"] is not None:
            kernel.num_live = torch.tensor([case["live"]], dtype=torch.int32)
        starts = case["query_start_loc"]
        kernel(starts, len(starts) - 1, case["positions"], case["primary_slots"])
        results.append(out)
    torch.save(results, sys.argv[2])
