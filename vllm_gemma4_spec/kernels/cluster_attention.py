"""Attention of a few queries per request over a paged KV cache in bfloat16 as one kernel, ``cluster_attention.cu``.

The keys that a request's queries see are divided among the eight blocks of a cluster, which add up through each other's
shared memory: no second kernel. Of contexts too long for one cluster the last of several adds up the rest.
"""

from __future__ import annotations

import functools
import math
import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_gemma4_spec.kernels import cuda

BLOCKS = 8  # of a cluster
ROWS = 8  # of a tile: queries times their heads
# Clusters that run side by side on an H200, by blocks that a multiprocessor holds: all lie within one GPC, which has
# 16 or 18. One that waits for others doubles the time.
_SIDE_BY_SIDE = {1: 0, 2: 30, 3: 32}
_ALONE = 512  # keys up to which one cluster takes them
_MOST_CLUSTERS = 16
_MULTIPROCESSOR = 228 * 1024  # bytes of shared memory, of which each block takes 1 KiB more than it asks for


def _received(size: int) -> int:
    """Bytes of the other blocks' sums."""
    return 4 * BLOCKS * ROWS * (size // BLOCKS + 4)


@dataclass(frozen=True)
class Form:
    """How the kernel is compiled.

    Attributes:
        size: of a head.
        group: query heads of a KV head.
        window: keys that a query sees at most; 0: all.
        page: tokens of a cache block.
        chunk: keys that are in shared memory at a time.
        stages: chunks that are asked for at a time.
        receive: where the other blocks' sums come to: memory of their own (0), over the keys (1), over all (2).
        rows: of a tile that are queries.
        alone: keys up to which one cluster takes a tile of rows.
        early: before the kernel ahead has ended nothing is read (0), lengths and block table are (1), and keys and
            values are brought into the L2 (2).
    """

    size: int
    group: int
    window: int
    page: int
    chunk: int
    stages: int
    receive: int
    rows: int = ROWS
    alone: int = _ALONE
    early: int = 1

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block."""
        tiles = self.chunk // 16
        split = 1 if tiles > 4 else 8 // tiles
        kept = 4 * self.stages * self.chunk * self.size + 2 * self.rows * self.size
        kept += split * ROWS * (self.chunk + 4) * 4 + ROWS * (self.chunk + 8) * 2 + ROWS * 4 + BLOCKS * ROWS * 8
        return kept + (0 if self.receive else _received(self.size))

    @property
    def fit(self) -> int:
        """Blocks that a multiprocessor holds, three at most."""
        return min(3, _MULTIPROCESSOR // (self.shared_bytes + 1024))

    @property
    def queries(self) -> int:
        """Of a tile of rows."""
        return self.rows // self.group

    def tiles(self, queries: int) -> int:
        """Of rows, for requests of at most so many queries."""
        return -(-queries // self.queries)

    def scratch(self, units: int, clusters: int) -> int:
        """Floats that a launch needs.

        Args:
            units: tiles of rows, of all requests and KV heads.
        """
        return units * BLOCKS * clusters * ROWS * (self.size // BLOCKS + 2) if clusters > 1 else 0


def form(size: int, group: int, window: int, page: int, queries: int) -> Form | None:
    """The form for requests of at most ``queries`` tokens; None if there is none."""
    if size != (256 if window else 512) or group > ROWS or page & (page - 1) or page < 16:
        return None
    rows = group * min(queries, ROWS // group)
    if not window:
        return Form(size, group, window, page, 16, 2, 2, rows)
    seen = window + rows // group - 1  # all of a block's keys at once
    chunk = -(-seen // (BLOCKS * 16)) * 16
    over_keys = 2 * chunk * size >= _received(size)
    return Form(size, group, window, page, chunk, 1, int(over_keys), rows) if chunk <= 256 else None


def at_once(how: Form, units: int) -> bool:
    """Whether all clusters run side by side."""
    return units * clusters(how.window, units) <= _SIDE_BY_SIDE.get(how.fit, 0)


def clusters(window: int, units: int) -> int:
    """Clusters of a tile of rows: a window's keys are one's, of longer contexts as many as fill the card."""
    return 1 if window else max(1, min(_MOST_CLUSTERS, _SIDE_BY_SIDE[3] // units))


def source(how: Form) -> str:
    """The kernel's CUDA C++."""
    macros = {
        "SIZE": how.size,
        "GROUP": how.group,
        "WINDOW": how.window,
        "PAGE": how.page,
        "CHUNK": how.chunk,
        "STAGES": how.stages,
        "RECEIVE": how.receive,
        "ALONE": how.alone,
        "Q_ROWS": how.rows,
        "FIT": how.fit,
        "EARLY": how.early,
        "SHARED": how.shared_bytes,
    }
    return cuda.source("cluster_attention.cu", macros)


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
    queries: int,
    count: int | None = None,
) -> None:
    """Fill ``out`` with the attention of ``q`` over the keys of its request up to each query's own.

    Args:
        k: ``[blocks, block_size, kv_heads, size]``, as ``v``.
        lengths: keys of each request, those of its queries among them; 0: its rows are zeros.
        starts: first token of each request, and behind the last.
        scratch: at least :meth:`Form.scratch` of float32.
        arrivals: eight int32 zeros per tile of rows, which the kernel leaves as zeros.
        queries: most of a request.
        count: clusters of a tile of rows; None: :func:`clusters`.
    """
    tiles = how.tiles(queries)
    units = k.shape[2] * tiles
    count = clusters(how.window, len(lengths) * units) if count is None else count
    kernel(how)(
        grid=(len(lengths), units * count, BLOCKS),
        block=256,
        args=arguments(out, q, k, v, table, lengths, starts, scale, scratch, arrivals, tiles, count),
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
    tiles: int,
    count: int,
) -> list[Any]:
    """The kernel's."""
    (bits,) = struct.unpack("i", struct.pack("f", scale * math.log2(math.e)))
    strides = [table.stride(0), *q.stride()[:2], *out.stride()[:2], *k.stride()[:3]]
    return [out, q, k, v, table, lengths, starts, scratch, arrivals, bits, *strides, tiles, count]
