"""The routing kernel in Triton's interpreter.

``python -m tests.kernels.routing_by_triton CASES RESULTS`` (torch files).
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    import torch

    from vllm_gemma4_spec.kernels.routing import route

    torch.save([route(c["logits"], c["scales"], c["top"]) for c in torch.load(sys.argv[1])], sys.argv[2])
