"""Short queries run on the kernel that splits the context, and only where its scratch holds them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.configs import GEMMA4, LLAMA, vllm_config
from tests.support.fresh import interpreted
from vllm_gemma4_spec.kernels import cluster_attention, few_query_attention
from vllm_gemma4_spec.kernels.few_query_attention import Form
from vllm_gemma4_spec.kernels.scratch import Scratch
from vllm_gemma4_spec.performance import split_attention
from vllm_gemma4_spec.performance.split_attention import IN_SCOPE, QUERIES, Launch


def test_every_choice_gives_the_same_attention(tmp_path: Path) -> None:
    interpreted("tests.performance.attention_by_triton", tmp_path / "results.pt")
    results = torch.load(tmp_path / "results.pt")
    for case in results:
        for output in case["outputs"].values():
            torch.testing.assert_close(output, case["wanted"], rtol=1e-4, atol=1e-5)
    kernels = [case["kernels"] for case in results]
    # Stock never splits a query of several tokens. The last batch, 20 tokens, is more than the scratch's 16.
    walks, splits = [("2d", 32, 0)], [("3d", 16, 8), ("ts", 16, 8)]
    assert [(case["stock"], case["split"]) for case in kernels] == [(walks, splits)] * 3 + [(walks, walks)]
    for case in kernels:
        assert (case["own"], case["3d"], case["2d"]) == ([], [("3d", 64, 4), ("ts", 64, 4)], [("2d", 64, 0)])


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


SLIDING, FULL = (32, 16, 256, 1024), (32, 4, 512, 0)  # 31B's: query heads, KV heads, head size, window
E4B_SLIDING, E4B_FULL = (8, 2, 256, 512), (8, 2, 512, 0)


def own(split: int) -> Launch:
    return Launch(Form(split, 32, 4, 2))


def three(segments: int) -> Launch:
    return Launch(segments=segments, numbers=(("TILE_SIZE", 32), ("num_warps", 4), ("num_stages", 2)))


def two(tile: int) -> Launch:
    return Launch(numbers=(("TILE_SIZE", tile), ("num_warps", 4), ("num_stages", 2)))


@pytest.mark.parametrize(
    ("layer", "num_seqs", "queries", "launch"),
    [
        (SLIDING, 1, 1, own(8)),
        (SLIDING, 1, 5, own(8)),  # as many parts as for one query
        (SLIDING, 4, 1, own(4)),
        (SLIDING, 8, 1, own(2)),
        (SLIDING, 16, 1, two(64)),
        (SLIDING, 16, 5, two(64)),
        (E4B_SLIDING, 16, 5, own(8)),
        (FULL, 1, 1, three(64)),
        (FULL, 2, 1, three(64)),
        (FULL, 4, 1, three(16)),
        (FULL, 4, 5, three(16)),
        (FULL, 15, 1, three(16)),
        (FULL, 16, 1, three(8)),
        (FULL, 32, 1, three(8)),
        (FULL, 33, 1, two(32)),  # fills a GPU without segments
        (FULL, 16, 5, two(32)),  # 256 programs without segments
        (E4B_FULL, 16, 5, three(16)),
        (SLIDING, 65, 1, None),  # vLLM's choice fills a GPU
        (SLIDING, 8, 40, None),  # more than the scratch holds
        ((64, 2, 256, 1024), 1, 1, None),  # more query heads per KV head than a block has rows
        ((32, 16, 256, 0), 1, 1, None),  # no layer of Gemma 4
        ((32, 16, 512, 1024), 1, 1, None),
        ((64, 4, 512, 0), 32, 1, three(8)),  # what fits into the scratch to 3 %
    ],
)
def test_launches_by_layer_and_batch(
    layer: tuple[int, int, int, int], num_seqs: int, queries: int, launch: Launch | None
) -> None:
    heads, kv_heads, size, window = layer
    q = torch.empty(num_seqs * queries, heads, size, device="meta", dtype=torch.bfloat16)
    k = torch.empty(9, 16, kv_heads, size, device="meta", dtype=torch.bfloat16)
    assert split_attention.launch(q, k, num_seqs, window) == launch
    assert split_attention.launch(q.float(), k.float(), num_seqs, window) is None


@pytest.mark.parametrize(
    ("layer", "num_seqs", "queries", "launch"),
    [
        (SLIDING, 1, 1, own(8)),
        (SLIDING, 16, 1, None),
        (FULL, 1, 1, Launch(segments=16)),
        (FULL, 4, 1, Launch(segments=16)),
        (FULL, 16, 1, Launch(segments=8)),
        (FULL, 16, 5, None),
    ],
)
def test_launches_with_a_cache_in_fp8(
    layer: tuple[int, int, int, int], num_seqs: int, queries: int, launch: Launch | None
) -> None:
    heads, kv_heads, size, window = layer
    q = torch.empty(num_seqs * queries, heads, size, device="meta", dtype=torch.bfloat16)
    k = torch.empty(9, 16, kv_heads, size, device="meta", dtype=torch.float8_e4m3fn)
    assert split_attention.launch(q, k, num_seqs, window) == launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What this package's kernel is launched with, on something like a GPU."""
    seen: list[Any] = []
    monkeypatch.setattr(few_query_attention, "attention", lambda *args, **kwargs: seen.append((args, kwargs)))
    monkeypatch.setattr(split_attention, "_suits", lambda _: True)
    monkeypatch.setattr(split_attention, "few_queries", split_attention.FewQueries())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return seen


def call(**changed: Any) -> dict[str, Any]:
    """Arguments of ``unified_attention`` for plain decoding of four requests, a sliding layer of 31B."""
    given: dict[str, Any] = {
        "q": torch.empty(4, 32, 256, dtype=torch.bfloat16, device="meta"),
        "k": torch.empty(9, 16, 16, 256, dtype=torch.bfloat16, device="meta"),
        "v": torch.empty(9, 16, 16, 256, dtype=torch.bfloat16, device="meta"),
        "out": torch.empty(4, 32, 256, dtype=torch.bfloat16, device="meta"),
        "cu_seqlens_q": torch.empty(5, dtype=torch.int32, device="meta"),
        "max_seqlen_q": 1,
        "seqused_k": torch.empty(4, dtype=torch.int32, device="meta"),
        "softmax_scale": 0.5,
        "window_size": (1023, 0),
        "block_table": torch.empty(4, 9, dtype=torch.int32, device="meta"),
        "softcap": 0,
        "q_descale": None,
        "k_descale": torch.empty(4, 16, device="meta"),
        "v_descale": torch.empty(4, 16, device="meta"),
        "seq_threshold_3D": 8,
        "num_par_softmax_segments": 16,
        "softmax_segm_output": torch.empty(8, 32, 16, 512, device="meta"),
        "mm_prefix_range": None,
    } | changed
    return given


def marked(given: dict[str, Any], *marks: str) -> dict[str, Any]:
    for mark in marks:
        setattr(given["softmax_segm_output"], mark, 4)
    return given


def ran_vllms(given: dict[str, Any]) -> list[dict[str, Any]]:
    """What vLLM's function is given."""
    ran: list[dict[str, Any]] = []
    split_attention.unified_attention(lambda **kwargs: ran.append(kwargs))(**given)
    return ran


def test_few_queries_run_this_packages_kernel(launches: list[Any]) -> None:
    given = marked(call(), IN_SCOPE, QUERIES)
    assert not ran_vllms(given)
    assert not ran_vllms(given | {"max_seqlen_q": 4})
    assert ran_vllms(given | {"max_seqlen_q": 5})
    ((how, *args), more), ((_, *other), others) = launches
    assert how == own(4).own
    names = ("out", "q", "k", "v", "block_table", "seqused_k", "cu_seqlens_q", "softmax_scale")
    assert all(arg is given[name] for arg, name in zip(args, names, strict=False))
    window, scratch, scales = args[8:]
    assert (window, scales, more, others) == (1024, None, {"one": True}, {"one": False})
    assert (scratch.numel(), scratch.dtype) == (33 * 2**18, torch.float32)
    assert other[9] is scratch


def test_a_full_layer_gets_segments_and_their_scratch(launches: list[Any]) -> None:
    given = marked(call(window_size=(-1, -1)), IN_SCOPE, QUERIES)
    q, k = (torch.empty(*t, 512, dtype=torch.bfloat16, device="meta") for t in ((16, 32), (9, 32, 4)))
    (ran,) = ran_vllms(given | {"q": q, "k": k, "max_seqlen_q": 4})
    assert (ran["max_seqlen_q"], ran["seq_threshold_3D"], ran["num_par_softmax_segments"]) == (1, 4, 16)
    sizes = [ran[f"softmax_segm_{part}"].numel() for part in ("output", "max", "expsum")]
    assert sizes == [16 * 32 * 16 * 512, 16 * 32 * 16, 16 * 32 * 16]
    assert ran.keys() == given.keys() | {"softmax_segm_max", "softmax_segm_expsum"}
    (walked,) = ran_vllms(
        given | {"seqused_k": torch.empty(16), "q": q.new_empty(16, 32, 256)} | {"window_size": (1023, 0)}
    )
    assert (walked["seq_threshold_3D"], walked["max_seqlen_q"]) == (0, 1)  # more requests than the threshold
    assert not launches


def test_numbers_reach_the_kernels_and_no_later_launch(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[dict[str, Any]] = []

    class Stock:
        arg_names = ("TILE_SIZE",)

        def __getitem__(self, grid: Any) -> Any:
            return lambda **kwargs: launched.append({"grid": grid, **kwargs})

    kernel, reduce = split_attention.attention_kernel(Stock()), split_attention.reduce_kernel(Stock())

    def original(**_: Any) -> None:
        kernel[4, 2](TILE_SIZE=16, BLOCK_M=16)
        reduce[4, 2](TILE_SIZE=16)
        if fails:
            raise RuntimeError("out of memory")

    fails = False
    attention = split_attention.unified_attention(original)
    monkeypatch.setattr(split_attention, "launch", lambda *_: three(16))
    given = marked(call(), IN_SCOPE, QUERIES)
    attention(**given)
    changed = {"TILE_SIZE": 32, "num_warps": 4, "num_stages": 2}
    grid = {"grid": (4, 2)}
    assert launched == [grid | changed | {"BLOCK_M": 16}, grid | {"TILE_SIZE": 32}]
    fails = True
    with pytest.raises(RuntimeError):
        attention(**given)
    launched.clear()
    kernel[4, 2](TILE_SIZE=16)  # somebody else's
    assert launched == [grid | {"TILE_SIZE": 16}]
    assert kernel.arg_names == ("TILE_SIZE",)


@pytest.mark.parametrize(
    ("query", "cache", "ours", "scaled"),
    [
        (torch.bfloat16, torch.float8_e4m3fn, True, True),
        (torch.float8_e4m3fn, torch.float8_e4m3fn, True, False),  # as vLLM, which has no scales for such a query
        (torch.bfloat16, torch.float8_e5m2, False, False),
        (torch.float32, torch.float32, False, False),
    ],
)
def test_dtypes_of_the_cache(
    launches: list[Any], query: torch.dtype, cache: torch.dtype, ours: bool, scaled: bool
) -> None:
    given = marked(call(), IN_SCOPE, QUERIES)
    for name, dtype in (("q", query), ("k", cache), ("v", cache)):
        given[name] = given[name].to(dtype)
    assert bool(ran_vllms(given)) is not ours
    if ours:
        scales = (given["k_descale"], given["v_descale"])
        assert launches[0][0][-1] == (scales if scaled else None)


@pytest.mark.parametrize(
    "other",
    [{"softcap": 50.0}, *({name: 1} for name in ("alibi_slopes", "sinks", "qq_bias", "output_scale"))],
    ids=lambda other: next(iter(other)),
)
def test_what_the_kernel_does_not_know_is_left_to_vllm(launches: list[Any], other: dict[str, Any]) -> None:
    assert ran_vllms(marked(call(**other), IN_SCOPE, QUERIES))
    assert not launches


def test_engines_out_of_scope_or_without_a_number_are_left_to_vllm(launches: list[Any]) -> None:
    assert ran_vllms(call())
    assert ran_vllms(marked(call(), IN_SCOPE))
    assert not launches


def test_a_first_call_within_a_graph_makes_no_memory(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    given = marked(call(), IN_SCOPE, QUERIES)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert ran_vllms(given)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert not ran_vllms(given)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not ran_vllms(given)


def test_a_kernel_that_does_not_compile_is_one_line(
    launches: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = marked(call(), IN_SCOPE, QUERIES)

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("PassManager::run failed\nand more")

    works = few_query_attention.attention
    monkeypatch.setattr(few_query_attention, "attention", fails)
    with caplog.at_level("INFO", logger="vllm.plugins.gemma4_spec"):
        assert ran_vllms(given)
        assert ran_vllms(given)
    assert caplog.messages == ["Short queries run on vLLM's own attention kernels: PassManager::run failed"]
    monkeypatch.setattr(split_attention, "few_queries", split_attention.FewQueries())
    monkeypatch.setattr(few_query_attention, "attention", works)
    assert not ran_vllms(given)
    monkeypatch.setattr(few_query_attention, "attention", fails)
    with pytest.raises(RuntimeError):  # it had worked: that is no compiler's error
        ran_vllms(given)


def drafter_call(**changed: Any) -> dict[str, Any]:
    """Arguments of ``unified_attention`` for a sliding layer of E4B, four requests of one token."""
    tensors = {name: torch.empty(4, 8, 256, dtype=torch.bfloat16, device="meta") for name in ("q", "out")}
    tensors |= {name: torch.empty(9, 16, 2, 256, dtype=torch.bfloat16, device="meta") for name in ("k", "v")}
    return marked(call(window_size=(511, 0), **tensors) | changed, IN_SCOPE, QUERIES)


def full_layer(requests: int) -> dict[str, Any]:
    """What is other in a full layer."""
    tensors = {name: torch.empty(requests, 8, 512, dtype=torch.bfloat16, device="meta") for name in ("q", "out")}
    tensors |= {name: torch.empty(9, 16, 2, 512, dtype=torch.bfloat16, device="meta") for name in ("k", "v")}
    return tensors | {"window_size": (-1, -1), "seqused_k": torch.empty(requests, device="meta")}


@pytest.fixture
def clusters(launches: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the kernel over clusters is launched with."""
    seen: list[Any] = []
    monkeypatch.setattr(cluster_attention, "kernel", lambda form: seen.append(form))
    monkeypatch.setattr(cluster_attention, "attention", lambda *args: seen.append(args))
    return seen


def test_few_queries_of_a_small_drafter_run_over_clusters(clusters: list[Any], launches: list[Any]) -> None:
    given = drafter_call()
    assert not ran_vllms(given)
    assert not ran_vllms(given)
    compiled, (form, *first), (same, *_) = clusters
    assert compiled == form == same == cluster_attention.form(256, 4, 512, 16, 1)
    names = ("out", "q", "k", "v", "block_table", "seqused_k", "cu_seqlens_q", "softmax_scale")
    assert all(arg is given[name] for arg, name in zip(first, names, strict=False))
    scratch, arrivals, queries = first[8:]
    assert (scratch.dtype, arrivals.dtype, arrivals.numel()) == (torch.float32, torch.int32, 256)
    assert queries == 1
    assert not launches


@pytest.mark.parametrize("requests", [1, 4, 8, 16])
def test_a_full_layer_of_one_query_a_request_runs_over_clusters(clusters: list[Any], requests: int) -> None:
    assert not ran_vllms(drafter_call() | full_layer(requests))
    assert clusters[0] == cluster_attention.form(512, 4, 0, 16, 1)


@pytest.mark.parametrize(
    "changed",
    [
        {"q": torch.empty(4, 8, 256, dtype=torch.float16, device="meta")},
        {name: torch.empty(9, 16, 2, 256, dtype=torch.float8_e4m3fn, device="meta") for name in ("k", "v")},
        {"v": torch.empty(9, 16, 4, 256, dtype=torch.bfloat16, device="meta")[:, :, :2]},  # not as the keys lie
        {
            name: torch.empty(9, 24, 2, 256, dtype=torch.bfloat16, device="meta") for name in ("k", "v")
        },  # no power of two
        {"seqused_k": torch.empty(17, device="meta")},
        {"max_seqlen_q": 4, "seqused_k": torch.empty(9, device="meta")},  # 36 tiles of rows
        full_layer(6),  # 24 clusters
        full_layer(17),
        full_layer(1) | {"max_seqlen_q": 2},
    ],
    ids=["float16", "fp8", "strides", "page", "requests", "queries", "few-clusters", "full-requests", "full-queries"],
)
def test_other_batches_do_not_run_over_clusters(clusters: list[Any], changed: dict[str, Any]) -> None:
    ran_vllms(drafter_call() | changed)
    assert not clusters


def test_several_queries_of_a_full_layer_do_not_run_over_clusters(
    clusters: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_attention, "at_once", lambda *_: True)
    ran_vllms(drafter_call() | full_layer(1) | {"max_seqlen_q": 2})
    assert not clusters


def test_a_kernel_over_clusters_is_not_loaded_within_a_graph(
    clusters: list[Any], launches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    split_attention.few_queries.scratch(torch.device("meta"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not ran_vllms(drafter_call())
    assert (len(clusters), len(launches)) == (0, 1)


@pytest.mark.parametrize("error", [RuntimeError("NVRTC, for sm_90: no\nmore"), ImportError("NVRTC, for sm_90: no")])
def test_without_the_kernel_over_clusters_two_stay_and_the_log_says_so(
    error: Exception,
    launches: list[Any],
    clusters: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuses(_: Any) -> None:
        raise error

    monkeypatch.setattr(cluster_attention, "kernel", refuses)
    with caplog.at_level("INFO", logger="vllm.plugins.gemma4_spec"):
        assert not ran_vllms(drafter_call())
        assert not ran_vllms(drafter_call())
    assert caplog.messages == ["Attention of few queries stays two kernels: NVRTC, for sm_90: no"]
    assert (len(clusters), len(launches)) == (0, 2)


@pytest.mark.parametrize(
    ("device", "invariant", "major", "suits"),
    [("cuda", False, 9, True), ("cuda", False, 8, False), ("cuda", True, 9, False), ("cpu", False, 9, False)],
)
def test_cards_and_settings(
    monkeypatch: pytest.MonkeyPatch, device: str, invariant: bool, major: int, suits: bool
) -> None:
    import vllm.envs

    monkeypatch.setattr(vllm.envs, "VLLM_BATCH_INVARIANT", invariant)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 0))
    assert split_attention._suits.__wrapped__(torch.device(device)) is suits


def one_stream(halves: bool = False) -> dict[str, Any]:
    return {"parallel_config": SimpleNamespace(use_ubatching=halves)}


@pytest.mark.parametrize(
    ("more", "queries"),
    [
        (one_stream() | {"speculative_config": SimpleNamespace(num_speculative_tokens=4)}, 6),
        (one_stream() | {"speculative_config": None}, 1),
        (one_stream(True) | {"speculative_config": None}, 0),
        ({}, 0),
    ],
)
def test_a_builder_in_scope_marks_its_scratch(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, Any], queries: int
) -> None:
    def init(self: Any, config: Any) -> None:
        self.vllm_config, self.softmax_segm_output = config, torch.empty(1, device="meta")

    monkeypatch.setattr(split_attention, "PARTS", Scratch())
    for target, in_scope in ((GEMMA4, True), (LLAMA, False)):
        builder = SimpleNamespace()
        split_attention.builder_init(init)(builder, vllm_config(target, LLAMA, **more))
        assert getattr(builder.softmax_segm_output, IN_SCOPE, False) is in_scope
        assert getattr(builder.softmax_segm_output, QUERIES, 0) == (queries if in_scope else 0)


@pytest.mark.parametrize(
    ("halves", "suits", "floats"), [(False, True, 33 * 2**18), (False, False, 80), (True, True, 0)]
)
def test_builders_have_one_scratch_and_it_is_the_gemms(
    monkeypatch: pytest.MonkeyPatch, halves: bool, suits: bool, floats: int
) -> None:
    """Not where two halves of a batch run at once."""
    device, parts = torch.device("cpu"), Scratch()
    made = [torch.empty(2, 4, 5), torch.empty(2, 8, 5)]
    monkeypatch.setattr(split_attention, "PARTS", parts)
    monkeypatch.setattr(split_attention, "_suits", lambda _: suits)
    builders = [SimpleNamespace(), SimpleNamespace()]
    for builder, its_own in zip(builders, made, strict=True):

        def init(self: Any, config: Any, its_own: torch.Tensor = its_own) -> None:
            self.vllm_config, self.softmax_segm_output = config, its_own

        more = one_stream(halves) | {"speculative_config": None}
        split_attention.builder_init(init)(builder, vllm_config(GEMMA4, LLAMA, **more))
        assert builder.softmax_segm_output.shape == its_own.shape
        assert (builder.softmax_segm_output is its_own) is halves
    assert (parts.floats(device, 1) is not None) is (floats > 0)
    if floats:
        held = parts.on(device)[0]
        assert held.numel() == floats
        starts = {b.softmax_segm_output.data_ptr() for b in builders} | {held.data_ptr()}
        assert len(starts) == (1 if suits else 2)  # the second is larger: the first one's stays what it was
        few = split_attention.FewQueries().scratch(device)
        assert few is not None
        assert (few is held) is suits
        assert few.numel() == 33 * 2**18
