"""What is captured of an assistant, and that a replay drafts what eager passes do: on the CPU a replay runs them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.mtp import pairs
from tests.mtp.drafts import Watched
from tests.mtp.rerun import Rerun
from tests.support.engine import engine, generate, random_prompts
from vllm_gemma4_spec.mtp.graphs import AssistantGraphs, batch_sizes, capturable
from vllm_gemma4_spec.performance.draft_graphs import GRAPHS

K = 3


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return pairs.save_pair("31b", tmp_path_factory.mktemp("mtp"))


@pytest.mark.slow
def test_replays_of_every_draft_length(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Adaptive k chooses among the captured draft lengths."""
    monkeypatch.setenv("VLLM_GEMMA4_SPEC_ADAPTIVE_K", "0.2")
    target, assistant = pair
    prompts, limits = random_prompts([5, 40, 90, 17, 33]), [20, 26, 32, 38, 44]
    options: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 64}
    with engine(target, **options) as llm:
        plain = generate(llm, prompts, limits)
    options["speculative_config"] = {"model": str(assistant), "num_speculative_tokens": K}
    with engine(target, **options) as llm:
        drafter = llm.llm_engine.model_executor.driver_worker.worker.model_runner.drafter
        graphs = Rerun(drafter, [1, 2, 4], range(1, K + 1))
        graphs.capture(None)
        setattr(drafter, GRAPHS, graphs)
        watched = Watched(llm, assistant)
        assert generate(llm, prompts, limits) == plain
    assert graphs.replays > 20
    assert graphs.padded > 0
    assert watched.changed == 0
    assert [d.made for d in watched.drafts] == [d.wanted for d in watched.drafts]
    assert {len(d.made) for d in watched.drafts} != {K}


def test_a_padding_row_reads_the_null_block() -> None:
    """vLLM marks block table rows past its batch with -1; a row that pads a replay has one key to read, in block 0."""
    tables = [torch.full((4, 3), 7, dtype=torch.int32) for _ in range(2)]
    proposer = SimpleNamespace(
        seq_lens=torch.full((4,), 90, dtype=torch.int32),
        positions=torch.full((4,), 89),
        input_ids=torch.full((4,), 5, dtype=torch.int32),
        block_tables=lambda n: [table[:n] for table in tables],
    )
    graphs = AssistantGraphs(proposer, [4], [K])
    seen: list[torch.Tensor] = []
    replayed = SimpleNamespace(replay=lambda: seen.extend(t.clone() for t in tables))
    graphs._graphs[4, K] = replayed, torch.zeros(4, K)  # type: ignore[assignment]
    for table in tables:
        table[3:] = -1
    assert graphs.replay(3, K).shape == (3, K)
    assert len(seen) == 2
    for table in seen:
        assert table.tolist() == [[7, 7, 7]] * 3 + [[0, 0, 0]]
    assert proposer.seq_lens.tolist() == [90, 90, 90, 1]
    assert proposer.positions.tolist() == [89, 89, 89, 0]
    assert proposer.input_ids.tolist() == [5, 5, 5, 0]


def test_batch_sizes() -> None:
    assert batch_sizes([5, 10, 20], 5, 16) == [1, 2, 3, 4]
    assert batch_sizes([512], 5, 256) == [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 24, 28, 32, 48, 64, 80, 96, 102]
    assert batch_sizes([512], 5, 3) == [1, 2, 3]
    assert batch_sizes([], 5, 3) == []


def test_only_where_metadata_depends_on_device_tensors_alone() -> None:
    def proposer(*names: str) -> Any:
        builders = [type(name, (), {})() for name in names]
        return SimpleNamespace(
            draft_attn_groups=[SimpleNamespace(get_metadata_builder=lambda b=b: b) for b in builders]
        )

    assert capturable(proposer("TritonAttentionMetadataBuilder", "TritonAttentionMetadataBuilder"))
    assert not capturable(proposer("TritonAttentionMetadataBuilder", "FlashInferMetadataBuilder"))
