"""Attention of a few queries over a cluster: compiled for the cards it is for, and run on a CPU beside float64."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_gemma4_spec.kernels import cluster_attention, cuda
from vllm_gemma4_spec.kernels.cluster_attention import Form

COMPILER = shutil.which("g++")
PAGE = 16

Run = Callable[[Form, "Batch"], Tensor]


def form(size: int, window: int, queries: int, group: int = 4) -> Form:
    found = cluster_attention.form(size, group, window, PAGE, queries)
    assert found is not None
    return found


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize(("size", "window"), [(256, 512), (512, 0)])
def test_the_kernel_compiles(capability: int, size: int, window: int) -> None:
    try:
        architecture = cuda.architecture(capability)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"this PyTorch brings no NVRTC: {error}")
    code = cuda.compiled(cluster_attention.source(form(size, window, 1)), architecture)
    assert b"cluster_attention" in code


@dataclass
class Batch:
    """Requests over one cache, whose pages lie in no order; nothing is written where nobody has been."""

    lengths: list[int]
    queries: list[int]
    heads: int
    kv_heads: int
    size: int
    window: int
    clusters: int = 1

    def __post_init__(self) -> None:
        torch.manual_seed(sum(self.lengths))
        pages = [-(-max(n, 1) // PAGE) for n in self.lengths]
        order = (torch.randperm(sum(pages)) + 1).int().split(pages)
        self.table = torch.zeros(len(pages), max(pages), dtype=torch.int32)
        self.k, self.v = torch.full((2, sum(pages) + 1, PAGE, self.kv_heads, self.size), torch.nan).bfloat16()
        self.k_before, self.v_before = self.k.clone(), self.v.clone()
        for request, (length, queries) in enumerate(zip(self.lengths, self.queries, strict=True)):
            self.table[request, : pages[request]] = order[request]
            for cache, before in ((self.k, self.k_before), (self.v, self.v_before)):
                rows = torch.randn(length, self.kv_heads, self.size).bfloat16()
                at = torch.arange(length)
                page, within = order[request][at // PAGE].long(), at % PAGE
                cache[page, within] = rows
                old = max(length - queries, 0)  # the pass itself writes the rest
                before[page[:old], within[:old]] = rows[:old]
        if self.window:  # the scheduler has freed what no query sees any more
            for request, (length, queries) in enumerate(zip(self.lengths, self.queries, strict=True)):
                self.table[request, : max(0, length - queries - self.window + 1) // PAGE] = 0
        self.starts = torch.tensor([0, *self.queries]).cumsum(0).int()
        self.q = (torch.randn(sum(self.queries), self.heads, self.size) / 4).bfloat16()

    def alone(self, request: int) -> Batch:
        """The same, of one request."""
        mine = replace(self)
        mine.__dict__.update(self.__dict__)
        first, behind = self.starts[request : request + 2].tolist()
        mine.lengths, mine.queries = [self.lengths[request]], [self.queries[request]]
        mine.table, mine.q = self.table[request : request + 1], self.q[first:behind].contiguous()
        mine.starts = torch.tensor([0, behind - first]).int()
        return mine

    def wanted(self) -> Tensor:
        out, group = torch.zeros(self.q.shape, dtype=torch.float64), self.heads // self.kv_heads
        token = 0
        for request, (length, queries) in enumerate(zip(self.lengths, self.queries, strict=True)):
            for last in range(length - queries, length):
                first = max(0, last - self.window + 1) if self.window else 0
                if last >= 0:
                    at = torch.arange(first, last + 1)
                    page, within = self.table[request].long()[at // PAGE], at % PAGE
                    keys, values = (x[page, within].double().repeat_interleave(group, 1) for x in (self.k, self.v))
                    scores = torch.einsum("hd,thd->ht", self.q[token].double(), keys)
                    out[token] = torch.einsum("ht,thd->hd", scores.softmax(-1), values)
                token += 1
        return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("cluster-attention")
    libraries: dict[Form, Any] = {}

    def compiled(how: Form) -> Any:
        if how not in libraries:
            kernel, library = folder / f"{len(libraries)}.cu", folder / f"{len(libraries)}.so"
            kernel.write_text(cluster_attention.source(how))
            host = str(Path(__file__).with_name("cluster_on_host.cpp"))
            defines = [f'-DKERNEL="{kernel}"', f"-DSHARED={how.shared_bytes}"]
            build = [str(COMPILER), "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-U_FORTIFY_SOURCE"]
            subprocess.run([*build, *defines, host, "-o", str(library)], check=True)
            libraries[how] = ctypes.CDLL(str(library)).run
        return libraries[how]

    def attention(how: Form, batch: Batch) -> Tensor:
        q, k, v = (torch.full_like(x, torch.nan) for x in (batch.q, batch.k, batch.v))
        out = torch.full_like(q, torch.nan)
        requests, tiles = len(batch.lengths), how.tiles(max(batch.queries))
        units = requests * batch.kv_heads * tiles
        scratch = torch.full((how.scratch(units, batch.clusters),), torch.nan)
        arrivals = torch.zeros(units * 8, dtype=torch.int32)
        lengths = torch.tensor(batch.lengths).int()
        shared = batch.table, lengths, batch.starts, 1.0, scratch, arrivals, tiles, batch.clusters
        given = cluster_attention.arguments(out, q, k, v, *shared)
        tensors, numbers = given[:9], torch.tensor(given[9:]).int()
        before = torch.full_like(q, torch.nan), batch.k_before, batch.v_before
        pointers = [*tensors, numbers, *before, batch.q, batch.k, batch.v]
        sizes = [ctypes.c_long(x.nbytes) for x in (q, k)]
        addresses = [ctypes.c_void_p(x.data_ptr()) for x in pointers]
        stuck = compiled(how)(*addresses, *sizes, requests, batch.kv_heads)
        assert not stuck
        assert not arrivals.any()
        return out

    return attention


def check(run: Run, how: Form, batch: Batch) -> None:
    got = run(how, batch)
    torch.testing.assert_close(got.double(), batch.wanted(), rtol=0.02, atol=0.02)


SLIDING, FULL = form(256, 64, 5), replace(form(512, 0, 1), alone=200)
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("how", "batch"),
    [
        (form(256, 512, 1), Batch([0, 1, 511, 512, 513, 1000], [1] * 6, 4, 1, 256, 512)),
        (SLIDING, Batch([3, 700, 15, 0], [3, 5, 1, 1], 8, 2, 256, 64)),
        (FULL, Batch([1000, 17, 1], [1, 5, 1], 8, 2, 512, 0)),
        pytest.param(form(256, 512, 5), Batch([5, 518, 5000], [5, 2, 5], 4, 1, 256, 512), marks=slow),
        pytest.param(form(256, 1024, 4, group=2), Batch([1100, 2], [5, 2], 4, 2, 256, 1024), marks=slow),
        pytest.param(replace(SLIDING, early=0), Batch([90], [3], 4, 1, 256, 64), marks=slow),
        pytest.param(replace(SLIDING, early=2, receive=0), Batch([90], [3], 4, 1, 256, 64), marks=slow),
        pytest.param(form(512, 0, 1, group=8), Batch([200], [2], 8, 1, 512, 0), marks=slow),
        pytest.param(form(512, 0, 1, group=3), Batch([50], [3], 6, 2, 512, 0), marks=slow),
    ],
    ids=["window", "queries", "full", "518", "two-heads", "late", "l2", "eight-heads", "three-heads"],
)
def test_attention_is_right(run: Run, how: Form, batch: Batch) -> None:
    check(run, how, batch)


@pytest.mark.parametrize(("length", "clusters"), [(700, 3), (300, 3), (40, 3), pytest.param(5000, 8, marks=slow)])
def test_several_clusters_share_a_long_context(run: Run, length: int, clusters: int) -> None:
    check(run, FULL, Batch([length], [3], 4, 1, 512, 0, clusters=clusters))


def test_a_request_has_the_same_bits_alone(run: Run) -> None:
    batch = Batch([700, 15, 90], [5, 1, 4], 8, 2, 256, 64)
    together = run(SLIDING, batch)
    apart = [run(SLIDING, batch.alone(request)) for request in range(3)]
    assert torch.equal(together, torch.cat(apart))


def test_forms_fit_a_multiprocessor_twice() -> None:
    for size, window, queries in ((256, 512, 1), (256, 512, 5), (512, 0, 1)):
        how = form(size, window, queries)
        assert cluster_attention.at_once(how, 32)
        assert not cluster_attention.at_once(how, 33)
    assert not cluster_attention.at_once(form(256, 1024, 4, group=2), 1)  # a block to a multiprocessor
    assert form(256, 512, 1).chunk == 64
    assert cluster_attention.form(128, 4, 512, PAGE, 1) is None
    assert cluster_attention.form(256, 16, 512, PAGE, 1) is None
    assert cluster_attention.form(256, 4, 512, 24, 1) is None
    assert cluster_attention.form(256, 4, 4096, PAGE, 1) is None


def test_tiles_hold_whole_queries() -> None:
    assert [form(256, 512, 5).tiles(queries) for queries in (1, 2, 3, 5)] == [1, 1, 2, 3]
    assert form(256, 512, 5, group=3).tiles(5) == 3


def test_longer_contexts_get_clusters_until_the_card_is_full() -> None:
    assert [cluster_attention.clusters(0, units) for units in (1, 2, 8, 32, 64)] == [16, 16, 4, 1, 1]
    assert cluster_attention.clusters(512, 2) == 1


@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"q": torch.empty(4, 8, 256)}, False),
        ({"k": torch.empty(9, 16, 2, 256).bfloat16().transpose(0, 1)}, False),  # not as the values
        ({"out": torch.empty(4, 8, 257).bfloat16()[..., :256]}, False),  # rows not at 16 bytes
    ],
)
def test_what_the_kernel_takes(change: dict[str, Tensor], taken: bool) -> None:
    tensors = {"q": torch.empty(4, 8, 256).bfloat16(), "k": torch.empty(9, 16, 2, 256).bfloat16()}
    tensors |= {"v": tensors["k"].clone(), "out": tensors["q"].clone()}
    assert cluster_attention.takes(**(tensors | change)) is taken
