"""Attention of few queries in Triton's interpreter, beside a reference.

``python -m tests.kernels.few_queries_by_triton RESULTS`` saves, per case, both outputs, and what the rows of a batch
give when each request is asked for alone.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    import torch

    from vllm_gemma4_spec.kernels import few_query_attention as few

    SIZE, BLOCK = 16, 16

    def reference(q, k, v, query_lens, seq_lens, table, window):
        out, token, group = torch.empty_like(q), 0, q.shape[1] // k.shape[2]
        for request, (queries, length) in enumerate(zip(query_lens, seq_lens, strict=True)):
            keys = k[table[request].long()].flatten(0, 1)[:length].repeat_interleave(group, 1)
            values = v[table[request].long()].flatten(0, 1)[:length].repeat_interleave(group, 1)
            for last in range(length - queries, length):
                first = max(0, last - window + 1) if window else 0
                scores = torch.einsum("hd,thd->ht", q[token], keys[first : last + 1])
                out[token] = torch.einsum("ht,thd->hd", scores.softmax(-1), values[first : last + 1])
                token += 1
        return out

    def run(form, q, k, v, query_lens, seq_lens, table, window, **more):
        tokens, heads = q.shape[:2]
        scratch = torch.full((form.scratch(tokens, heads, SIZE, window),), torch.nan)
        starts = torch.tensor([0, *query_lens]).cumsum(0).int()
        out = torch.full_like(q, torch.nan)
        few.attention(form, out, q, k, v, table, torch.tensor(seq_lens).int(), starts, 1.0, window, scratch, **more)
        return out

    results = []
    for case, (query_lens, seq_lens, window, heads, kv_heads, split, tile, rows) in enumerate(
        [
            ([1], [200], 0, 4, 2, 4, 16, 16),
            ([1, 1, 1], [77, 130, 5], 40, 4, 2, 2, 16, 16),
            ([5, 5], [77, 130], 40, 4, 2, 2, 16, 16),
            ([5], [300], 100, 8, 1, 4, 16, 16),  # three blocks of queries
            ([4, 4, 4], [64, 5, 33], 0, 4, 2, 8, 16, 16),
            ([5, 1, 3], [290, 32, 3], 64, 4, 2, 4, 16, 32),  # of different lengths
            ([1, 1], [40, 1], 0, 4, 2, 1, 16, 16),  # one part
            ([16], [48], 33, 2, 2, 2, 16, 16),  # more queries than keys of a part
        ]
    ):
        torch.manual_seed(case)
        tokens, pages = sum(query_lens), -(-max(seq_lens) // BLOCK)
        form = few.Form(split, tile, rows=rows, early=False)
        q = torch.randn(tokens, heads, SIZE) / 4
        k, v = torch.full((2, len(seq_lens) * pages + 1, BLOCK, kv_heads, SIZE), torch.nan)
        table = torch.randperm(len(seq_lens) * pages).view(len(seq_lens), pages).int() + 1
        for request, length in enumerate(seq_lens):
            for cache in (k, v):
                written = torch.randn(pages * BLOCK, kv_heads, SIZE)
                written[length:] = torch.nan  # nobody has written there
                cache[table[request].long()] = written.view(pages, BLOCK, kv_heads, SIZE)
            if window:  # the scheduler has freed what no query sees any more
                table[request, : max(0, length - query_lens[request] - window + 1) // BLOCK] = 0
        seen = k.nan_to_num(), v.nan_to_num()
        wanted = reference(q, *seen, query_lens, seq_lens, table, window)
        got = run(form, q, k, v, query_lens, seq_lens, table, window)
        at, alone = 0, []
        for request, queries in enumerate(query_lens):
            mine = q[at : at + queries], k, v, [queries], [seq_lens[request]], table[request : request + 1], window
            alone.append(run(form, *mine))
            at += queries
        result = {"got": got, "wanted": wanted, "alone": torch.cat(alone)}
        if case < 2:
            fp8 = [t.to(torch.float8_e4m3fn) for t in (k, v)]
            scales = torch.tensor([0.5]), torch.tensor([3.0])
            result["scaled"] = run(form, q, *fp8, query_lens, seq_lens, table, window, scales=scales)
            dequantized = [(t.float() * s).nan_to_num() for t, s in zip(fp8, scales, strict=True)]
            result["scaled wanted"] = reference(q, *dequantized, query_lens, seq_lens, table, window)
        if max(query_lens) == 1:
            result["searched"] = run(form, q, k, v, query_lens, seq_lens, table, window, one=False)
        results.append(result)
    torch.save(results, sys.argv[1])
