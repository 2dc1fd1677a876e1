"""Kernels alone on the card, beside vLLM's or float64: attention over clusters, cache, slots, tables, sampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.test_cluster_attention import Batch
from tests.support import head_cases, step_cases

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda")]
PAGE = 16
# Query heads, KV heads, head size, window (0: none)
SHAPES = {
    "E4B sliding": (8, 2, 256, 512),
    "E4B full": (8, 2, 512, 0),
    "31B sliding": (32, 16, 256, 1024),
}


@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("name", SHAPES)
def test_attention_over_clusters(name: str, queries: int, measured: Any) -> None:
    """Contexts shorter than a page, than the window, and longer; padding; the same bits beside other requests."""
    from vllm_gemma4_spec.kernels import cluster_attention

    heads, kv_heads, size, window = SHAPES[name]
    form = cluster_attention.form(size, heads // kv_heads, window, PAGE, queries)
    assert form is not None
    worst = 0.0
    for lengths in ([queries], [700, 5, 0, 1300], [15_000]):
        batch = Batch(lengths, [queries] * len(lengths), heads, kv_heads, size, window)
        many = _attention(form, batch, queries)
        worst = max(worst, float((many.double().cpu() - batch.wanted()).abs().max()))
        for request, length in enumerate(lengths):
            alone = _attention(form, batch.alone(request), queries)
            mine = many[request * queries : (request + 1) * queries]
            if window:  # of a longer context the number of clusters, and so the order of additions, goes by the batch
                assert torch.equal(alone, mine), f"other bits alone at {length} keys"
    measured(worst=round(worst, 5))
    assert worst < 0.02


def _attention(form: Any, batch: Batch, queries: int) -> torch.Tensor:
    from vllm_gemma4_spec.kernels import cluster_attention

    q, k, v, table, starts = (t.cuda() for t in (batch.q, batch.k, batch.v, batch.table, batch.starts))
    lengths = torch.tensor(batch.lengths).int().cuda()
    units = len(lengths) * batch.kv_heads * form.tiles(queries)
    clusters = cluster_attention.clusters(form.window, units)
    scratch = torch.full((form.scratch(units, clusters),), torch.nan, device="cuda")
    arrivals = torch.zeros(units * 8, dtype=torch.int32, device="cuda")
    out = torch.full_like(q, torch.nan)
    cluster_attention.attention(form, out, q, k, v, table, lengths, starts, 1.0, scratch, arrivals, queries)
    assert not arrivals.any()
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [(2, 256), (2, 512), (16, 256), (4, 512), (8, 256)], ids=str)
def test_the_early_cache_write(kind: tuple[int, int], dtype: torch.dtype) -> None:
    """The whole cache has the bits that vLLM's kernel leaves there."""
    from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash

    from vllm_gemma4_spec.kernels.cache_write import write

    kv_heads, size = kind
    one = torch.ones(1, device="cuda")
    for seed, (tokens, padding) in enumerate([(1, 0), (5, 2), (80, 16), (320, 0), (3, 3)]):
        torch.manual_seed(seed)
        rows = torch.randn(tokens + 2, 3, kv_heads, size, device="cuda").to(dtype)  # keys and values beside queries
        key, value = rows[:, 1], rows[:, 2]
        slots = torch.randperm(400, device="cuda")[:tokens]
        slots[torch.randperm(tokens, device="cuda")[:padding]] = -1
        whole = torch.randn(25, 2, 16, kv_heads, size, device="cuda").to(dtype)
        ours, theirs = whole.clone(), whole.clone()
        write(key, value, *ours.unbind(1), slots)
        triton_reshape_and_cache_flash(key, value, *theirs.unbind(1), slots, "auto", one, one)
        assert torch.equal(ours, theirs), f"{tokens} tokens, {padding} of padding"
        assert torch.equal(ours, whole) == (tokens == padding)


def test_a_steps_slots() -> None:
    """Of all groups, padding among them."""
    from vllm.v1.worker.block_table import MultiGroupBlockTable

    from vllm_gemma4_spec.kernels.slot_mapping import StepSlots

    def stock(*given: Any) -> None:
        for table in together.block_tables:
            table.compute_slot_mapping(*given)

    sizes = [16, 32, 64, 16]
    together = MultiGroupBlockTable(16, 4096, 8192, True, torch.device("cuda"), sizes, sizes)
    torch.manual_seed(0)
    for table in together.block_tables:
        table.block_table.gpu.random_(1, 5000)
    slots = StepSlots(together.block_tables)
    for lengths in ([1], [4] * 16, [4096, 1, 900], [3000, 3000]):
        starts = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
        positions = torch.cat([torch.arange(n, device="cuda") + 4096 - n for n in lengths])
        found = []
        for compute in (stock, slots):
            for table in together.block_tables:
                table.slot_mapping.gpu.fill_(-7)
            compute(len(lengths), starts, positions)
            found.append(torch.stack([table.slot_mapping.gpu.clone() for table in together.block_tables]))
        assert torch.equal(*found), lengths
    slots(0, starts[:2], positions[:16])  # no request, as a start maps it
    assert all(bool((table.slot_mapping.gpu[16:] == -1).all()) for table in together.block_tables)


@pytest.mark.parametrize("clean", [True, False], ids=["used", "whole"])
def test_rows_of_block_tables_are_the_hosts(clean: bool) -> None:
    """Requests that come, grow, go and change places; the kernel reads the host's pinned memory."""
    assert step_cases.wrong_copies("cuda", clean, 300) == []


def test_greedy_steps_are_vllms() -> None:
    """Equal logits, NaN, infinities, both zeros; drafts that are right, wrong and absent; 262,144 tokens."""
    assert step_cases.wrong_greedy_steps(262_144, "cuda", 24) == []


def test_corrected_counts_are_vllms() -> None:
    """Requests come, go and change places within the tensor that is overwritten."""
    from vllm_gemma4_spec.kernels import computed_counts

    assert step_cases.wrong_counts(computed_counts.update, "cuda", 8) == []


def test_of_all_bfloat16_values_the_largest_wins() -> None:
    """Beside its neighbour, its opposite and others, as the smaller and the larger, before and behind them."""
    from vllm_gemma4_spec.kernels import greedy

    bits = torch.arange(65536, device="cuda").to(torch.int32).to(torch.int16)
    values = bits.view(torch.bfloat16)
    logits = torch.stack([values, values.roll(1), values.flip(0)], 1)
    logits = torch.cat([logits, logits.roll(7919, 0)], 1)
    assert greedy.tokens(logits).tolist() == logits.float().argmax(-1).tolist()


def test_capped_logits_have_pytorchs_bits() -> None:
    """Every bfloat16, NaN among them, with Gemma 4's cap and others, in rows that are cut off."""
    from vllm_gemma4_spec.kernels import soft_cap

    values = torch.arange(65536, device="cuda").to(torch.int32).to(torch.int16).view(torch.bfloat16)
    for cap in (30.0, 50.0, 7.3):
        rows = torch.stack([values, values.flip(0)])[:, : 65536 - 24]
        wanted = ((rows / cap).tanh() * cap).view(torch.int16)
        wanted_is_nan = rows.isnan()
        found = soft_cap.soft_cap(rows, cap)
        assert torch.equal(found.isnan(), wanted_is_nan)
        assert torch.equal(found.view(torch.int16)[~wanted_is_nan], wanted[~wanted_is_nan]), cap


def test_heads_are_what_float64_rounds_to() -> None:
    """Norms and rotary embedding of a layer's heads; a token's bits are the same among any number of others."""
    assert head_cases.wrong_heads("cuda", torch.bfloat16, (1, 4, 16, 64, 2048)) == []
    assert head_cases.wrong_caches("cuda", torch.bfloat16, (1, 4, 16, 64, 2048)) == []


BF16_SHAPES = [
    (8192, 1024, False),  # 31B's assistant: queries, outputs, gate and up, down, both projections
    (1024, 8192, False),
    (16384, 1024, False),
    (1024, 16384, False),
    (16384, 1024, True),
    (1024, 4096, False),
    (1024, 10752, False),
    (5376, 1024, False),
    (256, 2048, False),  # E4B's
    (4096, 256, True),
    (10752, 2560, False),  # E4B's per-layer inputs
]


@pytest.mark.parametrize("shape", BF16_SHAPES, ids=str)
def test_bfloat16_rows(shape: tuple[int, int, bool], measured: Any) -> None:
    """No further from float64 than cuBLAS's, whatever rows stand beside a row."""
    from vllm_gemma4_spec.kernels import bf16_gemm

    n, k, gelu = shape
    torch.manual_seed(n)
    weight = (torch.randn(n, k, device="cuda") / k**0.5).bfloat16()
    assert bf16_gemm.suits(weight)
    x = torch.randn(bf16_gemm.MOST_ROWS, k, device="cuda").bfloat16()
    exact = x.double() @ weight.double().T
    if gelu:
        gate, up = exact.chunk(2, -1)
        exact = torch.nn.functional.gelu(gate, approximate="tanh") * up
    worst = 0.0
    for rows in range(1, len(x) + 1):
        ours, theirs = (
            float((call(x[:rows], weight, gelu).double() - exact[:rows]).norm() / exact[:rows].norm())
            for call in (bf16_gemm.gemm, bf16_gemm._other)
        )
        worst = max(worst, ours / theirs)
    measured(over_cublas=round(worst, 3))
    assert worst < 1.1
    for most in bf16_gemm.FORMS:
        many = bf16_gemm.gemm(x[:most], weight, gelu)
        assert torch.equal(bf16_gemm.gemm(x[: most - 3], weight, gelu), many[: most - 3]), f"other bits beside {most}"


def test_bfloat16_rows_wait_for_what_they_read() -> None:
    """Each GEMM starts before the one ahead has ended: replays of a chain have the bits of calls one by one."""
    from vllm_gemma4_spec.kernels import bf16_gemm

    torch.manual_seed(5)
    weights = [(torch.randn(2048, 1024, device="cuda") / 32).bfloat16() for _ in range(12)]
    weights += [(torch.randn(1024, 2048, device="cuda") / 45).bfloat16() for _ in range(12)]
    x = torch.randn(3, 1024, device="cuda").bfloat16()

    def chain(between: Any) -> torch.Tensor:
        y = x
        for up, down in zip(weights[:12], weights[12:], strict=True):
            for weight in (up, down):
                y = bf16_gemm.gemm(y, weight)
                between()
        return y

    wanted = chain(torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = chain(lambda: None)
    for _ in range(200):
        y.zero_()
        graph.replay()
        assert torch.equal(y, wanted)
    assert float(wanted.float().norm()) > 1
