"""What stands around a draft's attention and head: cache write, argmax behind the candidates' GEMM, first pass's slots.

    python benchmarks/draft_edges.py --out draft-edges.json

Needs a Hopper card or later and vLLM 0.19.1. E4B's shapes, 1, 4 and 16 requests, in CUDA graphs; results are compared
with PyTorch's or vLLM's first, and a line says WRONG where they differ. Microseconds: of a layer in a chain of 24 (a
kernel in rope's place, the write, attention of few queries) with each write and without one, and of the head's kernels
behind one in the GEMM's place, less that one alone. What is ready is written as it comes; no part begins after
``--seconds``.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from first_pass import graph_us
from torch import Tensor
from vllm.triton_utils import tl, triton
from vllm.v1.attention.ops.triton_reshape_and_cache_flash import triton_reshape_and_cache_flash
from vllm.v1.spec_decode.utils import compute_new_slot_mapping

from vllm_gemma4_spec.kernels import block_logits, few_query_attention
from vllm_gemma4_spec.kernels.cache_write import write
from vllm_gemma4_spec.kernels.slot_mapping import first_pass_slots
from vllm_gemma4_spec.mtp.centroids import CentroidHead
from vllm_gemma4_spec.performance import split_attention

DEVICE = "cuda"
REQUESTS = (1, 4, 16)
LAYERS = 24
# Query heads, KV heads, head size, window (0: none), tokens of a cache block.
KINDS = {"E4B sliding": (8, 2, 256, 512, 16), "31B sliding": (32, 16, 256, 1024, 16)}
CONTEXT = 256
VOCAB, SIZE, BLOCK, CANDIDATES = 262144, 2560, 128, 8
FORMS = ((4, 4), (8, 4), (16, 4), (16, 8), (32, 8), (8, 2), (4, 2))  # rows and warps of a program
WHEN = ("first", "waited", "end", "never")
PASSES = 24  # heads of a graph, each with candidates of its own: more than the L2 holds

Head = Callable[[Tensor, Tensor, Tensor], Tensor]


@triton.jit
def copied(x, y, count, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """Stands for the kernel ahead: launched early, and lets the next one start."""
    tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    at = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(y + at, tl.load(x + at, mask=at < count), mask=at < count)


@triton.jit
def written(  # type: ignore[no-untyped-def]
    key,
    value,
    k,
    v,
    slots,
    key_stride,
    value_stride,
    stride,
    token_stride,
    size: tl.constexpr,
    block_size: tl.constexpr,
    heads: tl.constexpr,  # of a program
    when: tl.constexpr,  # the next kernel may start: 0 at once, 1 after the wait, 2 at the end, 3 not before it
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * heads
    if when == 0:
        tl.extra.cuda.gdc_launch_dependents()
    tl.extra.cuda.gdc_wait()
    if when == 1:
        tl.extra.cuda.gdc_launch_dependents()
    at = head * size + tl.arange(0, heads * size)
    slot = tl.load(slots + token)
    x = tl.load(key + token * key_stride + at)
    y = tl.load(value + token * value_stride + at)
    into = slot // block_size * stride + slot % block_size * token_stride + at
    tl.store(k + into, x, mask=slot >= 0)
    tl.store(v + into, y, mask=slot >= 0)
    if when == 2:
        tl.extra.cuda.gdc_launch_dependents()


def variant(when: int, heads: int, key: Tensor, value: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    heads = min(heads, key.shape[1], 4096 // key.shape[2])
    written[(len(slots), key.shape[1] // heads)](
        key,
        value,
        k,
        v,
        slots,
        key.stride(0),
        value.stride(0),
        k.stride(0),
        k.stride(1),
        key.shape[2],
        k.shape[1],
        heads,
        when,
        launch_pdl=True,
        num_warps=max(1, heads * key.shape[2] // 256),
    )


def copy(x: Tensor, y: Tensor) -> None:
    copied[(triton.cdiv(x.numel(), 2048),)](x, y, x.numel(), 2048, launch_pdl=True)


@functools.cache
def one() -> Tensor:
    return torch.ones(1, device=DEVICE)


def stock_write(key: Tensor, value: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
    triton_reshape_and_cache_flash(key, value, k, v, slots, "auto", one(), one())


def stock_slots(
    table: Tensor, starts: Tensor, positions: Tensor, rejected: Tensor, added: int, block_size: int, longest: int
) -> Tensor:
    cad = SimpleNamespace(block_table_tensor=table, query_start_loc=starts, naive_query_lens=lambda: starts.diff())
    return compute_new_slot_mapping(cad, positions, rejected, block_size, added, longest)


class Chain:
    """Layers of one kind for a batch."""

    def __init__(self, kind: str, requests: int, queries: int) -> None:
        self.heads, self.kv_heads, self.size, self.window, block = KINDS[kind]
        self.tokens = tokens = requests * queries
        pages = -(-CONTEXT // block) + 1
        self.caches = torch.randn(
            LAYERS, requests * pages + 1, 2, block, self.kv_heads, self.size, device=DEVICE
        ).bfloat16()
        table = torch.randperm(requests * pages, device=DEVICE).view(requests, pages) + 1
        position = torch.arange(CONTEXT - queries, CONTEXT, device=DEVICE).repeat(requests)
        request = torch.arange(requests, device=DEVICE).repeat_interleave(queries)
        self.slots = table[request, position // block] * block + position % block
        self.table = table.int()
        self.lengths = torch.full((requests,), CONTEXT, dtype=torch.int32, device=DEVICE)
        self.starts = torch.arange(requests + 1, dtype=torch.int32, device=DEVICE) * queries
        self.qkv = torch.randn(tokens, (self.heads + 2 * self.kv_heads) * self.size, device=DEVICE).bfloat16()
        self.roped, self.out = torch.empty_like(self.qkv), self.qkv.new_empty(tokens, self.heads, self.size)
        cut = [self.heads * self.size, self.kv_heads * self.size, self.kv_heads * self.size]
        self.q, self.key, self.value = (t.unflatten(-1, (-1, self.size)) for t in self.roped.split(cut, dim=-1))
        found = split_attention.launch(self.q, self.caches[0, :, 0], requests, self.window)
        self.form = found.own if found and found.own else few_query_attention.Form(2, 32)
        self.one = queries == 1
        self.scratch = torch.empty(9 * 2**20, device=DEVICE)

    def __call__(self, how: Callable[..., None] | None) -> None:
        for cache in self.caches:
            copy(self.qkv, self.roped)
            k, v = cache.unbind(1)
            if how:
                how(self.key, self.value, k, v, self.slots)
            batch = self.table, self.lengths, self.starts, 0.0625, self.window
            few_query_attention.attention(self.form, self.out, self.q, k, v, *batch, self.scratch, one=self.one)


def same_bits(chain: Chain) -> bool:
    before = chain.caches[0].clone()
    copy(chain.qkv, chain.roped)
    slots = chain.slots.clone()
    slots[1::3] = -1
    found = []
    for how in (stock_write, write):
        cache = before.clone()
        how(chain.key, chain.value, *cache.unbind(1), slots)
        found.append(cache)
    torch.cuda.synchronize()
    return torch.equal(*found) and not torch.equal(found[0], before)


def old_head(hidden: Tensor, weight: Tensor, scores: Tensor) -> Tensor:
    """As it was with PyTorch's functions."""
    blocks = scores.unflatten(-1, (-1, BLOCK)).amax(-1).topk(CANDIDATES, dim=-1, sorted=False).indices
    _, best = block_logits.block_logits(hidden, weight, blocks, BLOCK).max(-1, keepdim=True)
    return (blocks.gather(-1, best // BLOCK) * BLOCK + best % BLOCK).squeeze(-1)


def old_centroids(head: CentroidHead, hidden: Tensor) -> Tensor:
    chosen = (hidden @ head.centroids.T).topk(head.top_k, dim=-1, sorted=False).indices
    best = block_logits.block_logits(hidden, head.weight, chosen, head.cluster).argmax(-1, keepdim=True)
    place = chosen.gather(-1, best // head.cluster) * head.cluster + best % head.cluster
    return head.token_ordering[place].squeeze(-1)


def new_head(rows: int, warps: int) -> Head:
    def head(hidden: Tensor, weight: Tensor, scores: Tensor) -> Tensor:
        keys = block_logits.block_maxima(scores, BLOCK)
        logits, blocks = block_logits.chosen_logits(hidden, weight, keys, CANDIDATES, BLOCK, rows, warps)
        return block_logits.largest(logits, blocks, BLOCK, VOCAB)[1]

    return head


def reference(hidden: Tensor, weight: Tensor, scores: Tensor) -> Tensor:
    """In float64, over the same blocks: the first ones of equal maxima."""
    maxima = scores.unflatten(-1, (-1, BLOCK)).amax(-1)
    blocks = maxima.float().sort(dim=-1, descending=True, stable=True).indices[:, :CANDIDATES].sort(-1).values
    rows = (blocks.unsqueeze(-1) * BLOCK + torch.arange(BLOCK, device=DEVICE)).flatten(1)
    logits = torch.einsum("nrd,nd->nr", weight[rows].double(), hidden.double())
    return rows.gather(1, logits.argmax(-1, keepdim=True)).squeeze(-1)


def repeated(call: Callable[[], Any]) -> None:
    for _ in range(20):
        call()


def passes(hidden: Tensor, weight: Tensor, scores: list[Tensor], scratch: Tensor, head: Head | None) -> None:
    for mine in scores:
        copy(mine, scratch)
        if head:
            head(hidden, weight, scratch)


def parts(results: dict[str, Any]) -> Any:
    """Each step of the measurement, in the order of what matters."""
    for kind, requests, queries in ((k, n, q) for k in KINDS for q in (1, 5) for n in REQUESTS):
        if kind != "E4B sliding" and (queries > 1 or requests > 4):
            continue
        chain = Chain(kind, requests, queries)
        name = f"{kind}, {requests} x {queries}"
        if not same_bits(chain):
            print(f"WRONG {name}: the cache differs", flush=True)
        us = {
            label: graph_us(functools.partial(chain, w), LAYERS)
            for label, w in (
                ("none", None),
                ("vLLM", stock_write),
                ("early", write),
                *(
                    (f"{t}, {h} heads", functools.partial(variant, i, h))
                    for h in (1, 2, 16)
                    for i, t in enumerate(WHEN)
                ),
                ("vLLM again", stock_write),
            )
        }
        results["write"][name] = us
        yield name, us
    weight = torch.randn(VOCAB, SIZE, device=DEVICE, dtype=torch.bfloat16)
    for requests in REQUESTS:
        hidden = torch.randn(requests, SIZE, device=DEVICE).bfloat16()
        scores = [torch.randn(requests, VOCAB, device=DEVICE).bfloat16() for _ in range(PASSES)]
        scratch = torch.empty_like(scores[0])
        heads = {"PyTorch": old_head} | {f"{r} rows, {w} warps": new_head(r, w) for r, w in FORMS}
        wanted = reference(hidden, weight, scores[0])
        lost = torch.full_like(scores[0], torch.nan)
        for label, head in heads.items():
            # Of equal rough scores PyTorch's topk takes any.
            if head is not old_head and not torch.equal(head(hidden, weight, scores[0]), wanted):
                print(f"WRONG head of {requests}, {label}", flush=True)
            tokens = head(hidden * torch.nan, weight, lost)
            if not bool(((tokens >= 0) & (tokens < VOCAB)).all()):
                print(f"WRONG head of {requests}, {label}: NaN", flush=True)

        chained = functools.partial(passes, hidden, weight, scores, scratch)
        alone = graph_us(functools.partial(chained, None), PASSES)
        us = {label: round(graph_us(functools.partial(chained, h), PASSES) - alone, 2) for label, h in heads.items()}
        results["head"][requests] = {"copy": alone} | us
        yield f"head of {requests}", results["head"][requests]
    with torch.device(DEVICE):
        centroids = CentroidHead(VOCAB, 256, 2048, 32).to(torch.bfloat16)
        centroids.token_ordering = torch.randperm(VOCAB)
    for part in (centroids.weight, centroids.centroids):
        part.data.normal_()
    for requests in REQUESTS:
        hidden = torch.randn(requests, 256, device=DEVICE).bfloat16()
        found, wanted = centroids.argmax(hidden), old_centroids(centroids, hidden)
        if requests == 1 and not torch.equal(found, wanted):  # of more some may be of equal centroids
            print(f"WRONG centroids of {requests}", flush=True)
        calls = {"PyTorch": functools.partial(old_centroids, centroids), "here": centroids.argmax}
        us = {
            label: graph_us(functools.partial(repeated, functools.partial(c, hidden)), 20) for label, c in calls.items()
        }
        results["head by centroids, weights in the L2"][requests] = us
        yield f"head by centroids of {requests}, weights in the L2, {(found == wanted).sum()} the same", us
    for requests in REQUESTS:
        table = torch.randint(1, 999, (requests, 8192), dtype=torch.int32, device=DEVICE)
        starts = torch.arange(requests + 1, dtype=torch.int32, device=DEVICE) * 4
        rejected = torch.arange(requests * 5, device=DEVICE) % 5 > 2
        given = table, starts, torch.arange(requests * 5, device=DEVICE) * 7, rejected, 1, 16, 131072
        slots = functools.partial(first_pass_slots, *given), functools.partial(stock_slots, *given)
        if not torch.equal(slots[0](), slots[1]()):
            print(f"WRONG slots of {requests}", flush=True)
        us = {"PyTorch": graph_us(slots[1], 1), "one kernel": graph_us(slots[0], 1)}
        results["first pass's slots"][requests] = us
        yield f"first pass's slots of {requests}", us
    # Each kernel by itself, in a chain of its likes.
    for requests in REQUESTS:
        hidden = torch.randn(requests, SIZE, device=DEVICE).bfloat16()
        scores = torch.randn(requests, VOCAB, device=DEVICE).bfloat16()
        keys = block_logits.block_maxima(scores, BLOCK)
        logits, blocks = block_logits.chosen_logits(hidden, weight, keys, CANDIDATES, BLOCK)
        each = {
            "maxima": functools.partial(block_logits.block_maxima, scores, BLOCK),
            "logits": functools.partial(block_logits.chosen_logits, hidden, weight, keys, CANDIDATES, BLOCK),
            "largest": functools.partial(block_logits.largest, logits, blocks, BLOCK, VOCAB),
        }
        us = {label: graph_us(functools.partial(repeated, call), 20) for label, call in each.items()}
        results["kernels, weights in the L2"][requests] = us
        yield f"kernels of {requests}, weights in the L2 where they fit", us


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=55)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    begun = time.monotonic()
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "write": {},
        "head": {},
        "head by centroids, weights in the L2": {},
        "first pass's slots": {},
        "kernels, weights in the L2": {},
    }
    with torch.inference_mode():
        for name, us in parts(results):
            print(f"{time.monotonic() - begun:5.1f} s  {name}: {us}", flush=True)
            args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            if time.monotonic() - begun > args.seconds:
                print("out of time")
                break


if __name__ == "__main__":
    main()
