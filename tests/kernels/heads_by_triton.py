"""Norms and rotary embedding of heads, interpreted: ``-m tests.kernels.heads_by_triton RESULTS``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    import torch

    from tests.support.head_cases import wrong_caches, wrong_heads

    # In float32: the interpreter cuts bfloat16 off where a GPU rounds.
    said = wrong_heads("cpu", torch.float32, (1, 3))
    said += wrong_caches("cpu", torch.float32, (1, 3), ("E4B sliding", "odd"))
    Path(sys.argv[1]).write_text(json.dumps(said))
