"""What a replay does around the graph, in the real engine: staging, padding and the live count.

A CPU has no CUDA graphs. Here a replay runs the captured function again on the same buffers, so everything
else is the real thing; ``tests/gpu/test_exactness.py`` compares the graphs themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.engine import acceptance, engine, generate, random_prompts
from vllm_gemma4_spec.performance.draft_graphs import GRAPHS, DraftGraphs, _Graph, decode_batch_sizes, with_draft_length
from vllm_gemma4_spec.spec_decode.slot_mapping import PADDING_SLOT_ID, group_slot_mappings

K = 3


class SlotsInPyTorch:
    """Stands in for ``GroupSlotKernel``; test_slot_kernel.py shows that they write the same."""

    def __init__(self, groups: Any) -> None:
        self._groups = groups
        self.num_live = torch.tensor([2**31 - 1], dtype=torch.int32)

    def bind(self, tables: list[torch.Tensor]) -> None:
        self._tables = tables

    def __call__(self, starts: torch.Tensor, num_reqs: int, positions: torch.Tensor, primary: torch.Tensor) -> None:
        primary = primary.clone()
        live = int(self.num_live)
        if live < num_reqs:
            primary[starts[live] :] = PADDING_SLOT_ID
        arange = torch.arange(len(positions), dtype=torch.int32)
        groups = self._groups
        group_slot_mappings(
            self._tables, groups._block_sizes, positions, starts[1 : num_reqs + 1], arange, primary, groups._slots
        )


class Rerun(DraftGraphs):
    """Graphs whose replay calls the captured function on the same buffers."""

    def capture(self, pool: Any, warmups: int = 0) -> None:
        for n, draft_length in itertools.product(self.batch_sizes, self.draft_lengths):
            drafts = torch.full((n, draft_length), -1, dtype=torch.int64)
            self._graphs[n, draft_length] = _Graph(
                SimpleNamespace(replay=lambda n=n, d=draft_length, drafts=drafts: drafts.copy_(self.run(n, d))), drafts
            )

    def run(self, num_reqs: int, draft_length: int) -> torch.Tensor:
        with self._as_captured(), with_draft_length(self._proposer, draft_length):
            return self._run(num_reqs)


def attach(llm: Any, batch_sizes: list[int]) -> dict[str, Any]:
    """Give the running engine's drafter ``Rerun`` graphs; every replay is compared with the original."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    drafter = runner.drafter
    groups = drafter._gemma4_spec_groups
    groups.slot_kernel = SlotsInPyTorch(groups)
    groups._check = False  # it reads every pass back; with it on, nothing is captured
    table = runner.input_batch.block_table[drafter.kv_cache_gid]
    graphs = Rerun(drafter, groups, table.get_device_tensor, type(drafter).propose, batch_sizes, range(1, K + 1))
    graphs.capture(None)
    setattr(drafter, GRAPHS, graphs)
    seen: dict[str, Any] = {"replays": 0, "padded": 0, "originals": 0, "different": 0, "draft_lengths": set()}
    wrapped = type(drafter).propose

    def propose(**kwargs: Any) -> torch.Tensor:
        cad = kwargs["common_attn_metadata"]
        drafts = wrapped(drafter, **kwargs)
        if graphs.fits(cad, kwargs["num_rejected_tokens_gpu"], kwargs["mm_embed_inputs"]):
            seen["replays"] += 1
            seen["draft_lengths"].add(drafts.shape[1])
            seen["padded"] += cad.num_reqs not in batch_sizes
            seen["different"] += int((drafts != wrapped.__wrapped__(drafter, **kwargs)).sum())
        else:
            seen["originals"] += 1
        return drafts

    drafter.propose = propose
    return seen


@pytest.mark.parametrize(
    ("kind", "cost"), [("target", "0"), pytest.param("close", "0", marks=pytest.mark.slow), ("close", "0.2")]
)
def test_replays_draft_what_the_original_drafts(
    tiny: dict[str, Path], kind: str, cost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_GEMMA4_SPEC_ADAPTIVE_K", cost)
    prompts = random_prompts([5, 40, 90, 17, 33])
    limits = [20, 26, 32, 38, 44]  # they end one after the other, so batches of every size occur
    with engine(tiny["target"], max_num_seqs=4) as llm:
        plain = generate(llm, prompts, limits)
    with engine(tiny["target"], tiny[kind], K, max_num_seqs=4) as llm:
        seen, before = attach(llm, [1, 2, 4]), acceptance(llm)
        answers, counts = generate(llm, prompts, limits), acceptance(llm) - before
    assert answers == plain
    assert seen["different"] == 0
    assert seen["replays"] > 5
    assert seen["padded"] > 0  # three requests in the graph of four
    assert seen["originals"] > 0  # prompts
    assert K in seen["draft_lengths"]
    assert (len(seen["draft_lengths"]) > 1) == (cost != "0")
    if kind == "target":
        assert counts.accepted == counts.proposed > 0
    else:
        assert 0 < counts.accepted < counts.proposed


def test_padding_stands_in_the_null_block_and_the_batch_where_it_was() -> None:
    """What a replay of three requests in the graph of four reads: no request's tokens but theirs."""
    tables = [torch.full((4, 5), 7, dtype=torch.int32) for _ in range(3)]
    groups = SimpleNamespace(block_tables=lambda rows: [t[:rows] for t in tables[1:]])
    proposer: Any = SimpleNamespace(num_speculative_tokens=K, device=torch.device("cpu"))
    graphs = Rerun(proposer, groups, lambda rows: tables[0][:rows], None, [1, 2, 4], [K])  # type: ignore[arg-type]
    drafts, ran = torch.arange(4 * K).view(4, K), []
    graphs._graphs[4, K] = _Graph(SimpleNamespace(replay=lambda: ran.append(True)), drafts)
    graphs._inputs.seq_lens.fill_(900)  # of an earlier step
    tokens = torch.arange(3 * (K + 1), dtype=torch.int32)
    last, rejected, lengths = torch.tensor([[4, 5, 6], [0, 1, 3], [50, 60, 70]], dtype=torch.int32)
    cad: Any = SimpleNamespace(num_reqs=3, seq_lens=lengths)
    made = graphs.replay(tokens, tokens.long() + 40, last, cad, rejected)
    assert ran == [True]
    assert graphs._num_live.tolist() == [3]
    assert graphs._inputs.seq_lens.tolist() == [50, 60, 70, K + 1]
    for table in tables:
        assert table.tolist() == [[7] * 5] * 3 + [[0] * 5]
    assert torch.equal(graphs._inputs.token_ids[: len(tokens)], tokens)
    assert torch.equal(graphs._inputs.positions[: len(tokens)], tokens.long() + 40)
    assert graphs._inputs.next_token_ids[:3].tolist() == last.tolist()
    assert graphs._inputs.num_rejected[:3].tolist() == rejected.tolist()
    drafts.zero_()  # the next replay
    assert made.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    graphs._graphs[1, K] = graphs._graphs[4, K]
    alone: Any = SimpleNamespace(num_reqs=1, seq_lens=lengths[:1])
    for given, live in ((alone, 1), (alone, 1), (cad, 3)):  # live requests are counted anew where they change
        n = given.num_reqs * (K + 1)
        graphs.replay(tokens[:n], tokens[:n].long(), last[: given.num_reqs], given, rejected[: given.num_reqs])
        assert graphs._num_live.tolist() == [graphs._live] == [live]


def test_a_capture_runs_the_original_on_inputs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each size and length, the largest first, nothing live and no graph inside a graph; then all is as it was."""
    capturing: list[bool] = []

    @contextmanager
    def graph(*_: Any, **__: Any) -> Iterator[None]:
        capturing.append(True)
        yield
        capturing.clear()

    for name, value in {"graph": graph, "CUDAGraph": object, "synchronize": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    kernel = SimpleNamespace(num_live="the engine's")
    before = {
        "num_speculative_tokens": K,
        "device": torch.device("cpu"),
        "cudagraph_dispatcher": SimpleNamespace(keys_initialized=True),
        "vllm_config": SimpleNamespace(model_config=SimpleNamespace(max_model_len=900)),
        GRAPHS: "of an earlier capture",
    }
    proposer: Any = SimpleNamespace(**before)
    ran = []

    def propose(self: Any, **given: Any) -> torch.Tensor:
        cad = given["common_attn_metadata"]
        n, tokens = cad.num_reqs, cad.num_reqs * (K + 1)
        ran.append((n, self.num_speculative_tokens, bool(capturing)))
        assert kernel.num_live.tolist() == [0]
        assert not self.cudagraph_dispatcher.keys_initialized
        assert GRAPHS not in vars(self)
        assert cad.query_start_loc.tolist() == cad.query_start_loc_cpu.tolist() == list(range(0, tokens + 1, K + 1))
        assert (cad.max_seq_len, cad.max_query_len, cad.num_actual_tokens) == (900, K + 1, tokens)
        assert cad.seq_lens.tolist() == [K + 1] * n
        assert set(cad.slot_mapping.tolist()) == {PADDING_SLOT_ID}
        assert len(given["target_token_ids"]) == len(given["target_positions"]) == tokens
        assert len(given["next_token_ids"]) == len(given["num_rejected_tokens_gpu"]) == n == len(cad.block_table_tensor)
        return torch.full((n, self.num_speculative_tokens), len(ran))

    table = torch.zeros(4, 5, dtype=torch.int32)
    graphs = DraftGraphs(
        proposer, SimpleNamespace(slot_kernel=kernel), lambda rows: table[:rows], propose, [1, 4], [K, 2]
    )
    graphs._num_live.fill_(3)  # of a step before
    graphs._live = 3
    graphs.capture(None)
    assert graphs._num_live.tolist() == [graphs._live] == [0]
    wanted = [(4, K), (4, K), (4, K), (1, K), (1, K), (4, 2), (4, 2), (4, 2), (1, 2), (1, 2)]
    captures = [2, 4, 7, 9]
    assert ran == [(*one, at in captures) for at, one in enumerate(wanted)]
    assert {key: int(g.drafts[0, 0]) - 1 for key, g in graphs._graphs.items()} == {wanted[at]: at for at in captures}
    assert vars(proposer) == before
    assert (kernel.num_live, proposer.cudagraph_dispatcher.keys_initialized) == ("the engine's", True)


def test_batches_that_no_graph_fits() -> None:
    graphs = Rerun(
        SimpleNamespace(num_speculative_tokens=K, device=torch.device("cpu")), None, None, None, [1, 2, 4], [K]  # type: ignore[arg-type]
    )  # fmt: skip
    rejected = torch.zeros(2, dtype=torch.int32)

    def metadata(num_reqs: int, num_tokens: int, longest: int) -> Any:
        return SimpleNamespace(num_reqs=num_reqs, num_actual_tokens=num_tokens, max_query_len=longest)

    assert graphs.fits(metadata(2, 8, 4), rejected, None)
    assert not graphs.fits(metadata(2, 8, 4), None, None)  # nothing was verified: prompts alone
    assert not graphs.fits(metadata(2, 8, 4), rejected, ([], rejected))  # image embeddings
    assert not graphs.fits(metadata(2, 5, 4), rejected, None)  # one request without drafts
    assert not graphs.fits(metadata(2, 8, 7), rejected, None)  # a prompt of 7 and a request of 1
    assert not graphs.fits(metadata(5, 20, 4), rejected, None)  # more than was captured


def test_batch_sizes_follow_the_targets_and_thin_out() -> None:
    proposer = SimpleNamespace(num_speculative_tokens=K, max_num_tokens=8192)
    tokens = [4, *range(8, 513, 4)]
    sizes = decode_batch_sizes(proposer, tokens, max_num_seqs=100)
    assert sizes == [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 24, 28, 32, 48, 64, 80, 96, 100]
    assert decode_batch_sizes(proposer, [4, 8, 16], max_num_seqs=3) == [1, 2, 3]
    assert decode_batch_sizes(proposer, [1, 2], max_num_seqs=3) == []
    proposer.max_num_tokens = 12  # two requests of k + 2 tokens
    assert decode_batch_sizes(proposer, tokens, max_num_seqs=100) == [1, 2]
