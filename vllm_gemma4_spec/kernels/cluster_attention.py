"""Attention of a few queries per request over a paged KV cache in bfloat16 as one kernel, ``cluster_attention.cu``.

The keys that a request's queries see are divided among the eight blocks of a cluster, which add up through each other's
shared memory: no second kernel. Of contexts too long for one cluster the last of several adds up the rest.

The kernel asks for keys of earlier passes before the kernel ahead has ended. It may, because such a pass is over:
between two passes there are kernels without programmatic launch, which start when all before has ended. Pages that this
pass writes, of whatever request, it reads behind its wait alone. ``ahead=False`` reads nothing before.
"""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from vllm_gemma4_spec.kernels import cuda

BLOCKS = 8  # of a cluster
MOST_TILES = 3  # of eight rows, which are a request's queries times their heads
MOST_REQUESTS = 64
_FULL_GRID = 132  # blocks of which each may have a multiprocessor to itself
_CLUSTERS = 8  # of a request and KV head, at most
_ALONE = 1024  # keys up to which one cluster takes them: eight blocks bring 128 KiB of keys each in some 3 us
_MULTIPROCESSOR = 228 * 1024  # bytes of shared memory, of which each block takes 1 KiB more than it asks for


@dataclass(frozen=True)
class Form:
    """How the kernel is compiled.

    Attributes:
        size: of a head.
        group: query heads of a KV head.
        window: keys that a query sees at most; 0: all.
        page: tokens of a cache block.
        tiles: of eight rows.
        chunk: keys that are in shared memory at a time.
        stages: chunks that are asked for at a time.
        receive: where the other blocks' sums come to: memory of their own (0), over the keys (1), over all (2).
        alone: keys up to which one cluster takes a request.
        ahead: keys of earlier passes are asked for before the kernel ahead has ended.
    """

    size: int
    group: int
    window: int
    page: int
    tiles: int
    chunk: int
    stages: int
    receive: int
    alone: int = _ALONE
    ahead: bool = True

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        rows, tiles = self.tiles * 8, self.chunk // 16
        split = 1 if tiles > 4 else 8 // tiles
        kept = 4 * self.stages * self.chunk * self.size + 2 * rows * self.size
        kept += split * rows * (self.chunk + 4) * 4 + rows * (self.chunk + 8) * 2 + rows * 4 + BLOCKS * rows * 8
        return kept + (0 if self.receive else self.received)

    @property
    def received(self) -> int:
        """Bytes of the other blocks' sums."""
        return 4 * BLOCKS * self.tiles * 8 * (self.size // BLOCKS + 4)

    def scratch(self, requests: int, kv_heads: int, clusters: int) -> int:
        """Floats that a launch needs."""
        if clusters == 1:
            return 0
        return requests * kv_heads * BLOCKS * clusters * self.tiles * 8 * (self.size // BLOCKS + 2)


def form(size: int, group: int, window: int, page: int, queries: int, programs: int) -> Form | None:
    """The form for requests of at most ``queries`` tokens; None if there is none whose blocks all run at once.

    Args:
        programs: requests times KV heads.
    """
    tiles, one = -(-queries * group // 8), queries == 1
    if size != (256 if window else 512) or not 0 < tiles <= MOST_TILES or page & (page - 1) or page < 16:
        return None
    if queries > 1:  # few variants to compile
        tiles = 1 if tiles == 1 else MOST_TILES
        queries = tiles * 8 // group
    if window:  # all of a block's keys at once
        chunk = -(-(window + queries - 1) // (BLOCKS * 16)) * 16
        found = Form(size, group, window, page, tiles, chunk, 1, 1)
        if found.received > 2 * chunk * size:
            found = replace(found, receive=0)
    else:
        wide = programs * BLOCKS <= _FULL_GRID
        found = Form(size, group, window, page, tiles, 32 if wide else 16, 2, 0 if wide or one else 2)
    at_once = _FULL_GRID * (_MULTIPROCESSOR // (found.shared_bytes + 1024))
    return found if found.chunk <= 256 and programs * BLOCKS <= at_once else None


def clusters(window: int, programs: int) -> int:
    """Clusters of a request and KV head: a window's keys are one's, of longer contexts as many as fill the card."""
    return 1 if window else max(1, min(_CLUSTERS, _FULL_GRID // (programs * BLOCKS)))


def source(how: Form) -> str:
    """The kernel's CUDA C++."""
    text = resources.files(__package__).joinpath("cluster_attention.cu").read_text()
    macros = {
        "SIZE": how.size,
        "GROUP": how.group,
        "WINDOW": how.window,
        "PAGE": how.page,
        "NT": how.tiles,
        "CHUNK": how.chunk,
        "STAGES": how.stages,
        "RECEIVE": how.receive,
        "ALONE": how.alone,
        "EARLY": int(how.ahead),
        "SHARED": how.shared_bytes,
    }
    return "".join(f"#define {name} {value}\n" for name, value in macros.items()) + text


@functools.cache
def kernel(how: Form) -> Any:
    """Compiled for the current device; not while a CUDA graph is captured."""
    made = cuda.Kernel(source(how), "cluster_attention")
    made.allow_shared(how.shared_bytes)
    return made


def takes(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> bool:
    """Whether rows lie as the kernel reads them."""
    tensors = (q, k, v, out)
    return (
        all(x.dtype == torch.bfloat16 and x.stride(-1) == 1 for x in tensors)
        and k.stride() == v.stride()
        and all(s % 8 == 0 for x in tensors for s in x.stride()[:-1])
        and all(x.is_meta or x.data_ptr() % 16 == 0 for x in tensors)
    )


def attention(
    how: Form,
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    lengths: Tensor,
    starts: Tensor,
    scale: float,
    scratch: Tensor,
    arrivals: Tensor,
    count: int | None = None,
) -> None:
    """Fill ``out`` with the attention of ``q`` over the keys of its request up to each query's own.

    Args:
        k: ``[blocks, block_size, kv_heads, size]``, as ``v``.
        lengths: keys of each request, those of its queries among them; 0: its rows are zeros.
        starts: first token of each request, and behind the last.
        scratch: at least :meth:`Form.scratch` of float32.
        arrivals: eight int32 zeros per request and KV head, which the kernel leaves as zeros.
        count: clusters of a request and KV head; None: :func:`clusters`.
    """
    requests, kv_heads = len(lengths), k.shape[2]
    count = clusters(how.window, requests * kv_heads) if count is None else count
    kernel(how)(
        grid=(requests, kv_heads * count, BLOCKS),
        block=256,
        args=arguments(out, q, k, v, table, lengths, starts, scale, scratch, arrivals, count),
        shared_bytes=how.shared_bytes,
        cluster=BLOCKS,
    )


def arguments(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    lengths: Tensor,
    starts: Tensor,
    scale: float,
    scratch: Tensor,
    arrivals: Tensor,
    count: int,
) -> list[Any]:
    """The kernel's."""
    (bits,) = struct.unpack("i", struct.pack("f", scale * math.log2(math.e)))
    strides = [table.stride(0), *q.stride()[:2], *out.stride()[:2], *k.stride()[:3]]
    return [out, q, k, v, table, lengths, starts, scratch, arrivals, bits, len(lengths), *strides, count]
