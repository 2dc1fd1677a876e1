"""Short queries run on the kernel that splits the context, and only where its scratch holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.fresh import interpreted
from vllm_gemma4_spec.performance import split_attention


def test_vllms_own_split_kernel_gives_the_same_attention(tmp_path: Path) -> None:
    interpreted("tests.performance.attention_by_triton", tmp_path / "results.pt")
    results = torch.load(tmp_path / "results.pt")
    for case in results:
        torch.testing.assert_close(case["stock"], case["wanted"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(case["split"], case["wanted"], rtol=1e-4, atol=1e-5)
    # Stock never splits a query of several tokens. The last batch, 20 tokens, is more than the scratch's 16.
    assert [case["kernels"] for case in results] == [[["2d"], ["3d"]]] * 3 + [[["2d"], ["2d"]]]


@pytest.mark.parametrize(
    ("tokens", "num_seqs", "heads", "kv_heads", "size", "room", "fits"),
    [
        (4, 1, 32, 16, 256, 8, True),  # 31B, sliding layers, one request
        (4, 1, 32, 4, 512, 8, True),  # and full layers
        (16, 4, 32, 16, 256, 8, False),  # more tokens than the scratch has rows
        (16, 4, 8, 2, 256, 8, True),  # a drafter of fewer heads fits more into the same scratch
        (40, 8, 8, 2, 256, 8, False),
        (64, 16, 32, 16, 256, 64, False),  # the other kernel fills the GPU
        (4, 1, 32, 4, 1024, 8, False),  # wider heads than the scratch's 512
        (4, 1, 64, 2, 256, 8, False),  # more query heads per KV head than a block has rows
    ],
)
def test_what_fits(tokens: int, num_seqs: int, heads: int, kv_heads: int, size: int, room: int, fits: bool) -> None:
    q = torch.empty(tokens, heads, size, device="meta")
    scratch = torch.empty(room, 32, 16, 512, device="meta")
    assert split_attention.fits(q, num_seqs, kv_heads, 16, scratch) is fits
    assert not split_attention.fits(q, num_seqs, kv_heads, 16, None)


def test_one_token_per_request_and_image_prefixes_are_left_alone() -> None:
    seen: list[dict[str, Any]] = []
    attention = split_attention.unified_attention(lambda **kwargs: seen.append(kwargs))
    base = {
        "q": torch.empty(4, 8, 256, device="meta"),
        "k": torch.empty(9, 16, 2, 256, device="meta"),
        "seqused_k": torch.empty(1, device="meta"),
        "seq_threshold_3D": 0,
        "num_par_softmax_segments": 16,
        "softmax_segm_output": torch.empty(8, 8, 16, 256, device="meta"),
    }
    setattr(base["softmax_segm_output"], split_attention.IN_SCOPE, True)
    for max_seqlen_q, prefix in ((1, None), (4, torch.empty(1, 1, 2)), (4, None)):
        attention(**base, max_seqlen_q=max_seqlen_q, mm_prefix_range=prefix)
    assert [(c["max_seqlen_q"], c["seq_threshold_3D"]) for c in seen] == [(1, 0), (4, 0), (1, 1)]
