"""The two-pass head in Triton's interpreter: ``head_by_triton.py CASES RESULTS`` (torch files).

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
    from vllm_gemma4_spec.kernels.head import DraftHead

    results = []
    for case in torch.load(sys.argv[1]):
        rough = case["rough"]
        results.append(DraftHead(case["weight"], coarse=lambda h, rough=rough: rough).argmax(case["hidden"]))
    torch.save(results, sys.argv[2])
