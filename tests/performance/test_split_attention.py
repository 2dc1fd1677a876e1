"""Short queries run on the kernel that splits the context, and only where its scratch holds them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
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


@pytest.mark.parametrize(
    ("tokens", "num_seqs", "heads", "kv_heads", "size", "dtype", "few"),
    [
        (80, 16, 8, 2, 256, torch.bfloat16, True),  # E4B's first pass for 16 requests, sliding layers
        (16, 16, 8, 2, 256, torch.bfloat16, True),  # and a further one
        (16, 16, 8, 2, 512, torch.bfloat16, False),  # full layers: not measured
        (16, 16, 8, 2, 256, torch.float32, False),  # twice the shared memory
        (64, 16, 32, 16, 256, torch.bfloat16, False),  # 31B: 384 programs
        (8192, 1, 8, 2, 256, torch.bfloat16, False),  # a prompt
        (4, 4, 64, 2, 256, torch.bfloat16, False),  # more query heads per KV head than a block has rows
    ],
)
def test_where_few_programs_get_larger_tiles(
    tokens: int, num_seqs: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype, few: bool
) -> None:
    q = torch.empty(tokens, heads, size, device="meta", dtype=dtype)
    k = torch.empty(9, 16, kv_heads, size, device="meta", dtype=dtype)
    assert split_attention.few_programs(q, k, num_seqs) is few


@pytest.mark.parametrize(
    ("scoped", "larger", "changed"), [(True, True, True), (False, True, False), (True, False, False)]
)
def test_larger_tiles_reach_the_kernel_and_no_later_launch(
    monkeypatch: pytest.MonkeyPatch, scoped: bool, larger: bool, changed: bool
) -> None:
    launched: list[dict[str, Any]] = []

    class Stock:
        arg_names = ("TILE_SIZE",)

        def __getitem__(self, grid: Any) -> Any:
            return lambda **kwargs: launched.append({"grid": grid, **kwargs})

    kernel = split_attention.attention_kernel(Stock())
    attention = split_attention.unified_attention(lambda **_: kernel[4, 2](TILE_SIZE=32, BLOCK_M=16))
    monkeypatch.setattr(split_attention, "few_programs", lambda *_: True)
    monkeypatch.setattr(split_attention, "_larger_tiles", lambda _: larger)
    scratch = SimpleNamespace(**{split_attention.IN_SCOPE: scoped}, shape=(0, 0, 0, 0))
    cuda = SimpleNamespace(device=torch.device("cuda", 0), shape=(16, 8, 256))
    attention(q=cuda, k=cuda, seqused_k=[0], max_seqlen_q=1, softmax_segm_output=scratch, num_par_softmax_segments=16)
    kernel[4, 2](TILE_SIZE=32, BLOCK_M=16)  # somebody else's
    stock = {"grid": (4, 2), "TILE_SIZE": 32, "BLOCK_M": 16}
    assert launched == [(stock | split_attention.FEW_PROGRAMS) if changed else stock, stock]
    assert kernel.arg_names == ("TILE_SIZE",)


@pytest.mark.parametrize(
    ("device", "invariant", "major", "larger"),
    [("cuda", False, 9, True), ("cuda", False, 8, False), ("cuda", True, 9, False), ("cpu", False, 9, False)],
)
def test_cards_and_settings_for_larger_tiles(
    monkeypatch: pytest.MonkeyPatch, device: str, invariant: bool, major: int, larger: bool
) -> None:
    import vllm.envs

    monkeypatch.setattr(vllm.envs, "VLLM_BATCH_INVARIANT", invariant)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 0))
    assert split_attention._larger_tiles.__wrapped__(torch.device(device)) is larger
