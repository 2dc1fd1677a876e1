"""The slot kernels in Triton's interpreter.

``python -m tests.kernels.slot_mapping_by_triton CASES RESULTS`` (torch files). Of a first pass and of a step,
vLLM's slots and ours.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    from types import SimpleNamespace

    import torch
    from vllm.v1.spec_decode.utils import compute_new_slot_mapping
    from vllm.v1.worker.block_table import MultiGroupBlockTable

    from vllm_gemma4_spec.kernels.slot_mapping import GroupSlotKernel, StepSlots, first_pass_slots

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
        if "longest" in case:
            sizes, longest = case["block_sizes"], case["longest"]
            together = MultiGroupBlockTable(8, case["length"], longest, False, torch.device("cpu"), sizes, sizes)
            for of, given in zip(together.block_tables, case["tables"], strict=True):
                of.block_table.gpu.copy_(given)
            found = []
            for compute in (
                MultiGroupBlockTable.compute_slot_mapping,
                lambda them, *args: StepSlots(them.block_tables)(*args),
            ):
                for of in together.block_tables:
                    of.slot_mapping.gpu.fill_(-7)
                compute(together, len(case["query_start_loc"]) - 1, case["query_start_loc"], case["positions"])
                found.append(torch.stack([of.slot_mapping.gpu.clone() for of in together.block_tables]))
            results.append(tuple(found))
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
