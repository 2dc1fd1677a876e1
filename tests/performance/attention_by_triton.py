"""vLLM's attention kernels in Triton's interpreter, as chosen with and without ``split-attention``.

``python -m tests.performance.attention_by_triton RESULTS`` saves, per case, the output of a reference, those of vLLM's
choice, of short queries split by vLLM's kernel, and of each kind of launch that a GPU is given, and which kernels ran.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    import torch
    from vllm.v1.attention.ops import triton_unified_attention as ops

    from vllm_gemma4_spec.kernels.few_query_attention import Form
    from vllm_gemma4_spec.performance import split_attention
    from vllm_gemma4_spec.performance.split_attention import Launch

    HEADS, KV_HEADS, SIZE, BLOCK, SEGMENTS, ROOM = 4, 2, 16, 16, 8, 16
    ran: list[str] = []
    for name in ("kernel_unified_attention_2d", "kernel_unified_attention_3d", "reduce_segments"):
        kernel = getattr(ops, name)

        class Noted:
            def __init__(self, kernel=kernel, name=name):
                self.kernel, self.name = kernel, name

            def __getitem__(self, grid):
                def launch(**given):
                    ran.append((self.name[-2:], given["TILE_SIZE"], given.get("NUM_SEGMENTS_PER_SEQ", 0)))
                    self.kernel[grid](**given)

                return launch

        setattr(ops, name, Noted())
        replaced = split_attention.reduce_kernel if name == "reduce_segments" else split_attention.attention_kernel
        setattr(ops, name, replaced(getattr(ops, name)))
    TILES = (("TILE_SIZE", 64),)
    # Beside vLLM's choice and what a GPU before Hopper runs; what a GPU runs is larger.
    LAUNCHES = {
        "stock": None,
        "split": None,
        "own": Launch(Form(2, 16, early=False)),
        "3d": Launch(segments=4, numbers=TILES),
        "2d": Launch(numbers=TILES),
    }

    def reference(q, k, v, query_len, seq_lens, table, window):
        out = torch.empty_like(q)
        for request, length in enumerate(seq_lens.tolist()):
            keys = k[table[request].long()].flatten(0, 1)[:length].repeat_interleave(HEADS // KV_HEADS, 1)
            values = v[table[request].long()].flatten(0, 1)[:length].repeat_interleave(HEADS // KV_HEADS, 1)
            for i in range(query_len):
                token, last = request * query_len + i, length - query_len + i
                first = max(0, last - window + 1) if window else 0
                scores = torch.einsum("hd,thd->ht", q[token], keys[first : last + 1])
                out[token] = torch.einsum("ht,thd->hd", scores.softmax(-1), values[first : last + 1])
        return out

    results = []
    for query_len, lengths, window in ((4, [140], 0), (5, [77, 50], 40), (4, [64, 5], 0), (5, [17] * 4, 0)):
        torch.manual_seed(query_len)
        num_seqs, tokens, pages = len(lengths), len(lengths) * query_len, -(-max(lengths) // BLOCK)
        q = torch.randn(tokens, HEADS, SIZE) / 4
        k, v = torch.randn(2, num_seqs * pages, BLOCK, KV_HEADS, SIZE)
        table = torch.randperm(num_seqs * pages).view(num_seqs, pages).int()
        seq_lens = torch.tensor(lengths, dtype=torch.int32)
        outputs, chosen = [], []
        patched = split_attention.unified_attention(ops.unified_attention)
        for name, launched in LAUNCHES.items():
            attention = ops.unified_attention if name == "stock" else patched
            split_attention._suits = lambda _, on_gpu=launched is not None: on_gpu
            split_attention.launch = lambda *_, launched=launched: launched
            out = torch.full_like(q, torch.nan)
            ran.clear()
            scratch = torch.full((ROOM, HEADS, SEGMENTS, SIZE), torch.nan)
            for mark in (split_attention.IN_SCOPE, split_attention.QUERIES):  # as a builder in scope does
                setattr(scratch, mark, 5)
            attention(
                q=q,
                k=k,
                v=v,
                out=out,
                cu_seqlens_q=torch.arange(num_seqs + 1, dtype=torch.int32) * query_len,
                max_seqlen_q=query_len,
                seqused_k=seq_lens,
                max_seqlen_k=max(lengths),
                softmax_scale=1.0,
                causal=True,
                window_size=(window - 1, 0) if window else (-1, -1),
                block_table=table,
                softcap=0,
                q_descale=None,
                k_descale=torch.ones(num_seqs, KV_HEADS),
                v_descale=torch.ones(num_seqs, KV_HEADS),
                seq_threshold_3D=2,
                num_par_softmax_segments=SEGMENTS,
                softmax_segm_output=scratch,
                softmax_segm_max=torch.full((ROOM, HEADS, SEGMENTS), torch.nan),
                softmax_segm_expsum=torch.full((ROOM, HEADS, SEGMENTS), torch.nan),
                mm_prefix_range=None,
            )
            outputs.append(out)
            chosen.append(list(ran))
        wanted = reference(q, k, v, query_len, seq_lens, table, window)
        made = dict(zip(LAUNCHES, outputs, strict=True))
        results.append({"outputs": made, "wanted": wanted, "kernels": dict(zip(LAUNCHES, chosen, strict=True))})
    torch.save(results, sys.argv[1])
